"""Solvers: which codes stand for a matrix. One method per file, one name in ``METHODS``."""

from moezip.quantize.gptq import GPTQ
from moezip.quantize.rtn import RTN

METHODS = (GPTQ, RTN)
