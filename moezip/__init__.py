"""moezip: makes Mixture-of-Experts checkpoints small.

``moezip.open(CHECKPOINT)`` gives a model to prune, merge, quantize, measure and save (``moezip.Model``);
``moezip.load(CHECKPOINT)`` gives the transformers model. Errors are ``moezip.MoezipError``.
After ``import moezip``, ``from_pretrained`` of transformers loads whatever moezip writes.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true; importing the package imports nothing
if TYPE_CHECKING:
    from moezip.api import Model as Model
    from moezip.api import open as open
    from moezip.calibrate.statistics import Statistics as Statistics
    from moezip.errors import MoezipError as MoezipError
    from moezip.runtime.load import load as load

# Where the names of the Python API are; their imports are heavy, so that each is made once it is asked for.
_OFFERED = {
    "open": "moezip.api",
    "Model": "moezip.api",
    "Statistics": "moezip.calibrate.statistics",
    "MoezipError": "moezip.errors",
    "load": "moezip.runtime.load",
}


def __getattr__(name: str) -> object:
    if name in _OFFERED:
        from importlib import import_module

        return getattr(import_module(_OFFERED[name]), name)
    raise AttributeError(f"module 'moezip' has no attribute {name!r}")


def _teach_transformers() -> None:
    from moezip.runtime.hook import install

    install()


_teach_transformers()
