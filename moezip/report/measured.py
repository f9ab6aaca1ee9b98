"""What saved evaluations say of an output: losses by text, beside the source's, and what came of the prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moezip.errors import CheckpointError
from moezip.evaluate.saved import load
from moezip.export.verify import EVALUATION

BESIDE = ".evaluate.json"  # what `moezip run` leaves beside a job's folder


@dataclass(frozen=True, slots=True)
class Domain:
    """Losses on one text, nats per token.

    Attributes:
        source: the source's on the same tokens; None where not compared.
        likely: from where to where the rise lies at 95 %; None where the evaluation does not say.
    """

    name: str
    nll: float
    tokens: int
    source: float | None = None
    kl: float | None = None
    likely: tuple[float, float] | None = None

    @property
    def rise(self) -> float | None:
        return None if self.source is None else self.nll - self.source


@dataclass(frozen=True, slots=True)
class Measured:
    """One evaluation.

    Attributes:
        domains: by text. nll: over all of them, each token counting once; source: the reference's, None without one.
        kl, top1: mean divergence from the reference, and share of tokens whose likeliest one is the same.
        likely: as of a text. tasks: per task ``accuracy`` and ``n``. when, command, against: provenance; empty where
            not saved.
    """

    domains: tuple[Domain, ...]
    nll: float | None
    source: float | None = None
    kl: float | None = None
    top1: float | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    when: str = ""
    command: str = ""
    against: str = ""
    seq_len: int | None = None
    likely: tuple[float, float] | None = None

    @property
    def rise(self) -> float | None:
        """Of the loss over all texts against the source."""
        return None if self.nll is None or self.source is None else self.nll - self.source

    @property
    def tokens(self) -> int:
        return sum(domain.tokens for domain in self.domains)

    def rise_on(self, names: Collection[str]) -> tuple[float, int] | None:
        """The rise over the texts of these names, each token counting once, and how many texts those are."""
        chosen = [domain for domain in self.domains if domain.name in names and domain.rise is not None]
        if not chosen:
            return None
        tokens = sum(domain.tokens for domain in chosen)
        return sum((domain.rise or 0.0) * domain.tokens for domain in chosen) / tokens, len(chosen)

    def rows(self) -> list[Domain]:
        """For a table: one per text and, where there are several, one named ``all``."""
        rows = list(self.domains)
        if len(rows) > 1 and self.nll is not None:
            rows.append(Domain("all", self.nll, self.tokens, self.source, self.kl, self.likely))
        return rows

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """One evaluation as ``moezip evaluate --json`` prints it. Raises ValueError, TypeError or KeyError."""
        against = data.get("against") or {}
        sources = against.get("by_file") or {}
        domains = tuple(
            Domain(
                str(name), _number(each["nll"]), int(each["tokens"]),
                _number(sources[name]["nll"]) if name in sources else None,
                _number(sources[name]["kl"]) if name in sources else None,
                _likely(sources[name]) if name in sources else None,
            )
            for name, each in data["by_file"].items()
        )  # fmt: skip
        whole = data.get("nll")
        return cls(
            domains,
            None if whole is None else _number(whole),
            _number(against["nll"]) if against else None,
            _number(against["kl"]) if against else None,
            _number(against["top1_agreement"]) if against else None,
            dict(data.get("tasks") or {}),
            str(data.get("date") or "")[:10],
            str(data.get("command") or ""),
            str(data.get("against_path") or ""),
            data.get("seq_len"),
            _likely(against),
        )


def _likely(compared: Mapping[str, Any]) -> tuple[float, float] | None:
    ends = compared.get("rise_low"), compared.get("rise_high")
    return None if None in ends else (_number(ends[0]), _number(ends[1]))


def _number(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{value} is no loss")
    return found


def evaluations_of(folder: Path) -> tuple[Measured, ...]:
    """All saved evaluations of an output, the oldest first: its own, or those that `moezip run` left beside it.

    Raises:
        CheckpointError: a file that cannot be read, or is of another version.
    """
    if (folder / EVALUATION).is_file():
        return parsed(load(folder), folder / EVALUATION)
    return beside_of(folder.with_name(f"{folder.name}{BESIDE}"))


def beside_of(file: Path) -> tuple[Measured, ...]:
    """What `moezip run` saved of one job; nothing where there is no such file. Raises CheckpointError if damaged."""
    if not file.is_file():
        return ()
    data = _read(file)
    return parsed(data.get("evaluations") if isinstance(data, dict) else None, file)


def parsed(entries: Any, where: Path) -> tuple[Measured, ...]:
    """Raises CheckpointError unless ``entries`` is a list of evaluations."""
    try:
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise TypeError("no list of evaluations")
        return tuple(Measured.from_json(entry) for entry in entries)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise _damaged(where, fault) from fault


def measured_of(folder: Path) -> Measured | None:
    """The evaluation that speaks for an output: the last one against a reference, else the last one."""
    return headline(evaluations_of(folder))


def headline(found: Sequence[Measured]) -> Measured | None:
    """The last evaluation against a reference, else the last one of any; None of none."""
    compared = [each for each in found if each.rise is not None]
    chosen = compared or list(found)
    return chosen[-1] if chosen else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise _damaged(path, fault) from fault


def _damaged(path: Path, fault: Exception) -> CheckpointError:
    return CheckpointError(
        f"the saved evaluations cannot be read ({type(fault).__name__}: {fault})", where=path,
        next="delete the file and measure again (moezip evaluate --save)",
    )  # fmt: skip
