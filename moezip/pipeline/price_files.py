"""What each layer's widths cost, in readable files: a pass that prices them goes on behind the last whole layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moezip.errors import MoezipError

if TYPE_CHECKING:
    from moezip.pipeline.items import Item

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Prices of one matrix by width: of rounding's codes, and where it is in the sample of the solver's.

    ``tokens`` are those that it was priced on, 0 if none were its own.
    """

    item: Item
    tokens: int
    rounded: Array
    solved: Array | None


@dataclass(slots=True)
class LayerPrices:
    """What one layer, or the head, came to.

    Attributes:
        rounded: by matrix, a price per width. tokens: by matrix. pooled: matrices that no token reached.
        pairs: per kind, sums over the sample of [rounding's, the solver's] price per width.
        sampled: per kind, how many. local: PMQ's losses, [E][3].
    """

    rounded: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    pooled: list[str] = field(default_factory=list)
    pairs: dict[str, list[list[float]]] = field(default_factory=dict)
    sampled: dict[str, int] = field(default_factory=dict)
    local: list[list[float]] = field(default_factory=list)

    def add(self, found: Found) -> None:
        """One matrix more."""
        name, kind = found.item.name, found.item.kind
        self.rounded[name], self.tokens[name] = found.rounded.tolist(), found.tokens
        if not found.tokens:
            self.pooled.append(name)
        if found.solved is not None:
            pair = np.array([found.rounded, found.solved])
            self.pairs[kind] = (np.array(self.pairs[kind]) + pair if kind in self.pairs else pair).tolist()
            self.sampled[kind] = self.sampled.get(kind, 0) + 1


class PriceFiles:
    """The files of one job in a folder.

    Args:
        digest: of everything that the prices depend on.
    """

    def __init__(self, folder: Path, digest: str):
        self.folder, self.digest = folder, digest
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, step: str) -> Path:
        return self.folder / f"prices-{step}.json"

    def save(self, step: str, found: LayerPrices) -> None:
        """All of a step or nothing."""
        temporary = self._file(step).with_suffix(".part")
        temporary.write_text(json.dumps({"job": self.digest, **asdict(found)}))
        temporary.replace(self._file(step))

    def load(self, step: str) -> LayerPrices | None:
        """What was saved, None if nothing was.

        Raises:
            MoezipError: it is of another job, or damaged.
        """
        file = self._file(step)
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text())
            job = values.pop("job")
            found = LayerPrices(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise MoezipError("saved prices are damaged", where=file, next="start afresh without --resume") from fault
        if job != self.digest:
            raise MoezipError(
                "the work folder holds prices of another checkpoint, other data or other settings",
                where=self.folder,
                next="repeat the interrupted command unchanged, or start afresh without --resume",
            )
        return found


def forget_prices(folder: Path) -> None:
    """Removes what passes left in a work folder, and the folder if nothing else is in it."""
    for pattern in ("prices-*.json", "prices-*.part"):
        for file in folder.glob(pattern):
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
