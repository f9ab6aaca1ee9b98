"""The order of the stages. One function per command: typed options go in, a record comes out."""

from moezip.pipeline.apply import Outcome, apply_command
from moezip.pipeline.calibrate import calibrate_command, run_calibration
from moezip.pipeline.common import Clock, Common, Opened, open_checkpoint, opened
from moezip.pipeline.estimate import Estimate, dry_run
from moezip.pipeline.evaluate import evaluate_command
from moezip.pipeline.prune import PruneJob, make_plan, prepare_prune, prune_command

__all__ = [
    "Clock",
    "Common",
    "Estimate",
    "Opened",
    "Outcome",
    "PruneJob",
    "apply_command",
    "calibrate_command",
    "dry_run",
    "evaluate_command",
    "make_plan",
    "open_checkpoint",
    "opened",
    "prepare_prune",
    "prune_command",
    "run_calibration",
]
