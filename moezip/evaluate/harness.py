"""EleutherAI's lm-eval on a model in memory, or on one that is streamed because it does not fit.

Tasks are names that lm-eval knows (their data must be on this machine or the network), ``.yaml`` files of one's own, or
folders of such files. Relative paths to data in them are, as always with lm-eval, relative to the working folder.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moezip.calibrate.data import tokenizer_of
from moezip.calibrate.stream import Stream
from moezip.checkpoint.source import Source
from moezip.errors import DataError, MoezipError, UsageError
from moezip.evaluate.forward import Progress
from moezip.evaluate.whole import allowed_bytes, load_whole, needed_bytes
from moezip.runtime.skipping import attach

BATCH = 8
SUFFIXES = (".yaml", ".yml")
# Keys of a task's results that are no metrics.
OURS = ("alias", "name", "sample_len")


@dataclass(frozen=True, slots=True)
class Harness:
    """What lm-eval found.

    Attributes:
        version: of lm-eval. mode: whether the model was whole in memory, or streamed.
        tasks: per task, its metrics under lm-eval's names, and ``n``.
        against: the same of the reference; None without one.
    """

    version: str
    mode: Literal["memory", "streamed"]
    tasks: dict[str, dict[str, Any]]
    against: dict[str, dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """``version``, ``mode``, ``tasks``, ``against``."""
        return {"version": self.version, "mode": self.mode, "tasks": self.tasks, "against": self.against}


def require_harness() -> str:
    """The version of lm-eval. Raises UsageError, before anything is read, where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError as fault:
        raise UsageError(
            "EleutherAI's lm-eval is not installed", where="--lm-eval", next="pip install 'moezip[lm-eval]'"
        ) from fault


def run_harness(
    source: Source,
    tasks: Sequence[str],
    *,
    device: str = "cpu",
    max_memory: int | None = None,
    workdir: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    mode: Literal["memory", "streamed"] | None = None,
) -> Harness:
    """Runs tasks on one model.

    Args:
        tasks: names, files or folders.
        mode: default in memory where it fits, else streamed, which answers log-likelihood requests alone.

    Raises:
        UsageError: lm-eval is not installed, or no such task.
        DataError: lm-eval cannot run the task, for instance because its data is not here.
        MoezipError: a task that generates text, of a model that has to be streamed.
    """
    version = require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folders = [task for task in tasks if Path(task).is_dir()]
    # lm-eval writes here and there to stdout, which is for data
    with contextlib.redirect_stdout(sys.stderr):
        known = TaskManager(include_path=folders or None, include_defaults=any(map(_is_name, tasks)))
        specs = [spec for task in tasks for spec in resolved(task, known)]
        if mode is None:
            mode = "memory" if needed_bytes(source) <= allowed_bytes(max_memory) else "streamed"
        tokenizer = tokenizer_of(source.folder)
        if mode == "memory":
            lm = HFLM(pretrained=load_whole(source.folder, device), tokenizer=tokenizer, batch_size=BATCH)
        else:
            from moezip.evaluate.harness_model import Streamed

            stream = Stream(source, device=device, max_memory=max_memory)
            attach(stream.model, stream.skeleton.architecture, source.config, source.folder)
            lm = Streamed(stream, tokenizer, workdir, progress)
        try:
            found = simple_evaluate(
                model=lm, tasks=specs, task_manager=known, log_samples=False, bootstrap_iters=0,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        except MoezipError:
            raise
        except Exception as fault:  # the library, and those that fetch data for it, raise many kinds
            told = str(fault).strip().splitlines()
            raise DataError(
                f"lm-eval could not run the task ({type(fault).__name__}: {told[0] if told else ''})",
                where=", ".join(tasks),
                next="its data may not be on this machine; a task file of your own can name local files (dataset_path: "
                "json). --debug shows where it failed",
            ) from fault
    counts = found["n-samples"]
    results = {
        name: {**{key: value for key, value in metrics.items() if key not in OURS},
               **({"n": counts[name]["effective"]} if name in counts else {})}
        for name, metrics in found["results"].items()
    }  # fmt: skip
    return Harness(version, mode, results)


def _is_name(task: str) -> bool:
    return not Path(task).is_dir() and Path(task).suffix not in SUFFIXES


def resolved(task: str, known: Any) -> list[str]:
    """What lm-eval is to load for a name, a file or a folder.

    Args:
        known: lm-eval's ``TaskManager``.

    Raises:
        UsageError: there is no such file or name, or the folder holds none.
    """
    path = Path(task)
    if _is_name(task):
        if task not in known.all_tasks:
            raise _unknown(task, known.all_tasks)
        return [task]
    if not path.is_dir():
        if not path.is_file():
            raise UsageError("there is no such task file", where=f"--lm-eval {task}", next="check the path")
        return [task]
    files = {name: known.task_index[name].yaml_path for name in known.all_subtasks}
    found = [
        name for name, file in files.items()
        if file is not None and Path(file).resolve().is_relative_to(path.resolve())
    ]  # fmt: skip
    if not found:
        raise UsageError(
            "the folder holds no task", where=f"--lm-eval {task}", next="name one with task .yaml files"
        )
    return found


def _unknown(name: str, known: Sequence[str]) -> UsageError:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 3)
    return UsageError(
        f"lm-eval knows no task {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        where="--lm-eval", next="name a task, a .yaml file or a folder of them; `lm-eval ls tasks` lists the names",
    )  # fmt: skip
