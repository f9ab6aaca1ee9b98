"""moezip: makes Mixture-of-Experts checkpoints small."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``moezip.load``, whose imports are heavy, once it is asked for."""
    if name == "load":
        from moezip.runtime.load import load

        return load
    raise AttributeError(f"module 'moezip' has no attribute {name!r}")
