"""moezip: makes Mixture-of-Experts checkpoints small."""

__version__ = "0.1.0"
