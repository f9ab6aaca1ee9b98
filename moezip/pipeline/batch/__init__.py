"""``moezip run``: a recipe's jobs, sharing what they can; finished ones are skipped, interrupted ones go on.

The output folder holds one checkpoint per job under the job's name, ``statistics/`` with one file per calibration
set, ``<job>.evaluate.json`` with the job's measurements, the resolved ``recipe.yaml``, and ``state.json``, which says
by digest what is finished.
"""

from moezip.pipeline.batch.jobs import JobResult
from moezip.pipeline.batch.run import run_recipe

__all__ = ["JobResult", "run_recipe"]
