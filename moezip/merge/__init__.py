"""Merging methods: one paper per file, one name in ``METHODS``."""

from moezip.merge.dern import DERN
from moezip.merge.hc_smoe import HC_SMOE
from moezip.merge.m_smoe import M_SMOE
from moezip.merge.mc_smoe import MC_SMOE
from moezip.merge.sub_moe import SUB_MOE

METHODS = (DERN, HC_SMOE, M_SMOE, MC_SMOE, SUB_MOE)
