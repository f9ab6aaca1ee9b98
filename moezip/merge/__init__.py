"""Merging methods: one paper per file, one name in ``METHODS``."""

from moezip.merge.m_smoe import M_SMOE

METHODS = (M_SMOE,)
