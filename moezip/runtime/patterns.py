"""Which experts each task needs, and how to tell a task by its text: what ``moezip tasks build`` saves.

After TAER of PreMoe (arXiv 2505.17639), in a simpler form that says the same: per task the kept experts of every layer,
and a query vector to find the task by. The authors store the ranks of the first layer and permutations to the other
layers, from which the same sets are rebuilt.

A query is a share per expert, all of them adding up to 1. The authors compare queries by L2; here it is L2 between
their square roots (Hellinger's distance, times the root of 2): shares of few tokens scatter with the root of their
size, so that plain L2 hears little but the busiest experts. Of 400 prompts of 256 held-out tokens, 87 in 100 found
their own among the ten tasks of a trained 32-expert model in this way, and 81 by plain L2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moezip.errors import PlanError, UsageError
from moezip.plan.plan import LayerPlan, Pick, Plan
from moezip.registry import lookup

SCHEMA = 1
MAKE = "make it with `moezip tasks build CKPT --task NAME=DATA ... --out PATTERNS`"


@dataclass(frozen=True, slots=True)
class Task:
    """What one task's text asked for.

    Attributes:
        name: what users call it.
        tokens: how many were calibrated on.
        data: fingerprints of their rows.
        query: [E], what the first MoE layer's router made of a token, on average (``moezip.runtime.tasks.query``).
        radius: the distance from ``query`` within which 95 % of short pieces of the task's own text lie: the scale of
            a threshold.
        kept: per MoE layer, the ids of the experts that stay, ascending.
    """

    name: str
    tokens: int
    data: tuple[str, ...]
    query: tuple[float, ...]
    radius: float
    kept: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Patterns:
    """The tasks of one checkpoint.

    Attributes:
        source: fingerprint of the checkpoint; patterns of another one are refused.
        architecture: model_type.
        experts: E, the same in every layer.
        made_by: method, settings, seed, window, version: for the reader.
    """

    source: str
    architecture: str
    experts: int
    tasks: tuple[Task, ...]
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def keep(self) -> int:
        """Experts kept in each layer."""
        return len(next(iter(self.tasks[0].kept.values())))

    def task(self, name: str) -> Task:
        """Raises UsageError, with the nearest name, where there is no such task."""
        return lookup(name, {task.name: task for task in self.tasks}, "task")

    def plan(self, name: str) -> Plan:
        """The task's experts as a plan. Raises UsageError where there is no such task."""
        layers = tuple(
            LayerPlan(layer, self.experts, tuple(map(Pick.keep, kept))) for layer, kept in self.task(name).kept.items()
        )
        return Plan(self.source, self.architecture, layers, made_by={**self.made_by, "task": name})

    def require_source(self, fingerprint: str, where: object = None) -> None:
        """Raises PlanError if these are the patterns of another checkpoint."""
        if self.source != fingerprint:
            raise PlanError(
                f"the tasks are those of another checkpoint ({self.source[:12]}, not {fingerprint[:12]})",
                where=where,
                next="name the checkpoint that they were built from, or build them again for this one",
            )

    def distances(self, query: Sequence[float]) -> dict[str, float]:
        """Distance of ``query`` [E] to every task, nearest first; equal ones in the order of the tasks."""
        found = {task.name: distance(task.query, query) for task in self.tasks}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def overlap(self, one: str, other: str) -> float:
        """Share of the kept experts that two tasks have in common, mean over the layers."""
        mine, theirs = self.task(one).kept, self.task(other).kept
        shares = [len(set(kept) & set(theirs[layer])) / len(kept) for layer, kept in mine.items()]
        return sum(shares) / len(shares)

    # -- file -----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Readable JSON: one line per list of numbers."""
        tasks = []
        for task in self.tasks:
            kept = ",\n".join(f'        "{layer}": {json.dumps(list(ids))}' for layer, ids in task.kept.items())
            entry = {"name": task.name, "tokens": task.tokens, "data": list(task.data), "radius": task.radius,
                     "query": list(task.query)}  # fmt: skip
            body = "".join(f"      {json.dumps(key)}: {json.dumps(value)},\n" for key, value in entry.items())
            tasks.append("    {\n" + body + '      "kept": {\n' + kept + "\n      }\n    }")
        head = {"schema": SCHEMA, "source": self.source, "architecture": self.architecture, "experts": self.experts}
        text = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        made_by = json.dumps(self.made_by, indent=2).replace("\n", "\n  ")
        return "{\n" + text + f'  "made_by": {made_by},\n  "tasks": [\n' + ",\n".join(tasks) + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, text: str, where: object = None) -> Patterns:
        """Raises PlanError if the text holds no patterns of this schema."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise PlanError(f"patterns of schema {data['schema']}, this moezip reads {SCHEMA}", where=where)
            tasks = tuple(
                Task(
                    str(entry["name"]),
                    int(entry["tokens"]),
                    tuple(entry["data"]),
                    tuple(float(value) for value in entry["query"]),
                    float(entry["radius"]),
                    {int(layer): tuple(map(int, kept)) for layer, kept in entry["kept"].items()},
                )
                for entry in data["tasks"]
            )
            found = cls(str(data["source"]), str(data["architecture"]), int(data["experts"]), tasks, data["made_by"])
            if not tasks or any(
                len(task.query) != found.experts
                or not all(0 <= share <= 1 for share in task.query)
                or list(task.kept) != list(tasks[0].kept)
                or {len(kept) for kept in task.kept.values()} != {found.keep}
                for task in tasks
            ):
                raise ValueError("its tasks do not fit together")
            return found
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as fault:
            raise PlanError(
                f"these are no task patterns, or damaged ones ({type(fault).__name__}: {fault})",
                where=where,
                next=MAKE,
            ) from fault

    @classmethod
    def load(cls, path: Path) -> Patterns:
        """Raises PlanError if the file cannot be read, or holds no patterns."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as fault:
            raise PlanError("these are no task patterns: the file is not text", where=path, next=MAKE) from fault
        except OSError as fault:
            raise PlanError(f"the task patterns cannot be read ({fault.strerror})", where=path, next=MAKE) from fault
        return cls.from_json(text, path)

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(self.to_json(), encoding="utf-8")
        temporary.replace(path)


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """L2 between the square roots of two queries [E]: 0 for equal ones, the root of 2 where no expert is in both."""
    return math.dist([math.sqrt(share) for share in one], [math.sqrt(share) for share in other])


def require_tasks(names: Sequence[str]) -> None:
    """Raises UsageError unless there are tasks to tell apart."""
    if len(names) < 2:
        raise UsageError(
            "one task alone leaves nothing to choose from" if names else "there are no tasks",
            next="give --task NAME=DATA for two tasks or more; for one kind of text use `moezip prune`",
        )
