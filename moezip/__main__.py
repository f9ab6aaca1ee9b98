"""``python -m moezip``."""

from moezip.cli import main

main()
