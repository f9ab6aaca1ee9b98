"""Pruning methods: one paper per file, one name in ``METHODS``."""

from moezip.prune.easy_ep import EASY_EP
from moezip.prune.frequency import FREQUENCY
from moezip.prune.gate_sum import GATE_SUM
from moezip.prune.heapr import HEAPR
from moezip.prune.man import MAN
from moezip.prune.mean_norm import MEAN_NORM
from moezip.prune.naee import NAEE
from moezip.prune.nats import NATS
from moezip.prune.random import RANDOM
from moezip.prune.reap import REAP
from moezip.prune.router_norm import ROUTER_NORM
from moezip.prune.stun import STUN
from moezip.prune.super_experts import SUPER_EXPERTS
from moezip.prune.tcess import TCESS

METHODS = (EASY_EP, REAP, NATS, HEAPR, MAN, TCESS, STUN, NAEE, FREQUENCY, GATE_SUM, MEAN_NORM, RANDOM, ROUTER_NORM)

# What calibration measures and reports, and no pruning goes by.
PROFILES = (SUPER_EXPERTS,)
