"""``moezip run``: a recipe's jobs, sharing what they can; finished ones are skipped, interrupted ones go on.

The output folder holds one checkpoint per job under the job's name and one ``JOB.FORMAT`` per export, ``statistics/``
with one file per calibration set (of models that other jobs make in a folder of theirs), ``<job>.evaluate.json`` with
the job's report and measurements, the resolved ``recipe.yaml``, ``summary.json`` and ``summary.csv`` with a row per
job, and ``state.json``, which says by digest what is finished.
"""

from moezip.pipeline.batch.jobs import JobResult
from moezip.pipeline.batch.run import run_recipe
from moezip.pipeline.batch.summary import summary_of

__all__ = ["JobResult", "run_recipe", "summary_of"]
