"""A saved plan and the values that were solved for it: files that lie beside each other, or in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moezip.checkpoint.reader import Checkpoint
from moezip.errors import PlanError
from moezip.plan.merged import VALUES, CheckpointValues, digest_of
from moezip.plan.packed import LayerFiles, Values
from moezip.plan.plan import Plan


def save_plan(plan: Plan, out: Path, values: Values | None = None) -> None:
    """Whole or not at all; its solved values in the file beside it, before it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if values is not None and plan.solved:
        from safetensors.torch import save_file

        part = out.with_name(f".{VALUES}.part")
        save_file({name: values.read(name) for name in plan.solved}, part)
        part.replace(out.with_name(VALUES))
    temporary = out.with_name(f".{out.name}.part")
    temporary.write_text(plan.to_json(), encoding="utf-8")
    temporary.replace(out)


@contextmanager
def saved_plan(plan_file: Path | None) -> Iterator[tuple[Plan | None, Values | None]]:
    """A saved plan with its solved values; nothing without a file. Raises PlanError as of ``values_beside``."""
    if plan_file is None:
        yield None, None
        return
    plan = Plan.load(plan_file)
    with values_beside(plan, plan_file) as values:
        yield plan, values


@contextmanager
def values_beside(plan: Plan, plan_file: Path) -> Iterator[Values | None]:
    """The solved values of a saved plan: from the file beside it, or from the checkpoint that it lies in.

    Raises:
        PlanError: they are not there, or are not those that the plan was made with.
    """
    if not plan.solved:
        yield None
        return
    file, folder = plan_file.with_name(VALUES), plan_file.resolve().parent.parent
    if file.is_file():
        values: Values = LayerFiles(file.parent, file.name)
        _require_values(plan, values, file)
        yield values
    elif plan_file.name == "plan.json" and (folder / "config.json").is_file():
        with Checkpoint.open(folder) as checkpoint:
            values = CheckpointValues(checkpoint, plan.solved)
            _require_values(plan, values, folder)
            yield values
    else:
        raise PlanError(
            f"the plan has {len(plan.solved)} solved values, and the file with them is not beside it",
            where=file,
            next=f"keep {VALUES} beside the plan, or name the moezip/plan.json inside the checkpoint it was made for",
        )


def _require_values(plan: Plan, values: Values, where: Path) -> None:
    if missing := sorted(set(plan.solved) - set(values.names())):
        raise PlanError(f"the plan's value {missing[0]} is not there", where=where)
    if digest_of(values, plan.solved) != plan.values:
        raise PlanError(
            "the values are not those that the plan was made with", where=where,
            next="use both files of one plan, or make it again",
        )  # fmt: skip
