"""moezip: makes Mixture-of-Experts checkpoints small.

After ``import moezip``, ``from_pretrained`` of transformers loads whatever moezip writes.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true; importing the package imports nothing
if TYPE_CHECKING:
    from moezip.runtime.load import load as load


def __getattr__(name: str) -> object:
    """``moezip.load``, whose imports are heavy, once it is asked for."""
    if name == "load":
        from moezip.runtime.load import load

        return load
    raise AttributeError(f"module 'moezip' has no attribute {name!r}")


def _teach_transformers() -> None:
    from moezip.runtime.hook import install

    install()


_teach_transformers()
