"""Token rows of many lengths through one streamed model, and its predictions a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.calibrate.data import Rows, stack
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.stream import Stream

if TYPE_CHECKING:
    import torch

# (stage, layers done, layers in all)
Progress = Callable[[str, int, int], None]
# Rows are padded to the longest of their group, which is at most this much (or a few tokens) longer than the shortest.
STRETCH, SLACK = 1.25, 16


@dataclass(frozen=True, slots=True)
class Item:
    """A row of tokens and which of them are predicted.

    Attributes:
        ids: the tokens.
        first: index, at least 1, of the first token whose prediction counts.
        beyond: 1 to ask for the prediction after the last token too, else 0.
        last: the token that stands there, -1 where none does; it is predicted and not read.
    """

    ids: Sequence[int]
    first: int
    beyond: int = 0
    last: int = -1

    @property
    def count(self) -> int:
        """Number of predictions."""
        return len(self.ids) - self.first + self.beyond

    def targets(self) -> list[int]:
        """The token that stands where each prediction goes; -1 where none does."""
        return [*self.ids[self.first :], *([self.last] * self.beyond)]


@dataclass(frozen=True, slots=True)
class Group:
    """Items of similar length as one batch; row ``r`` of ``rows`` is the item with index ``members[r]``."""

    rows: Rows
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Predictions ``start`` to ``stop`` of one item, which is row ``row`` of group ``group``."""

    item: int
    group: int
    row: int
    start: int
    stop: int


def group(items: Sequence[Item]) -> list[Group]:
    """Items by length, so that little is padded. Padding is on the right.

    No mask is given to the model: attention and state-space layers look back only, so nothing that counts sees the
    padding, and the unmasked attention kernels are the fast ones.
    """
    groups: list[list[int]] = []
    longest = 0.0
    for index in sorted(range(len(items)), key=lambda i: len(items[i].ids)):
        length = len(items[index].ids)
        if length > longest:
            groups.append([])
            longest = max(length * STRETCH, length + SLACK)
        groups[-1].append(index)
    found = []
    for members in groups:
        members.sort()
        ids = stack([items[i].ids for i in members], [""] * len(members)).ids
        found.append(Group(Rows(ids, None, ("",) * len(members)), tuple(members)))
    return found


def forward(
    stream: Stream,
    groups: Sequence[Group],
    *,
    folder: Path | None,
    keep: bool = False,
    watches: Sequence[Any] = (),
    progress: Progress | None = None,
    stage: str = "",
) -> list[HiddenStates]:
    """The last decoder layer's output of every group, each layer read once for all of them.

    Args:
        folder: where the hidden states are kept in files; None keeps them in memory.
        keep: leave the layers loaded for the next call.
        watches: captures (``moezip.calibrate.capture``) of the first groups; the others are not watched.
    """
    files = [None if folder is None else folder / f"hidden-{number}.bin" for number in range(len(groups))]
    states = stream.embed_all([each.rows for each in groups], files)
    try:
        if not keep:
            stream.skeleton.free(stream.skeleton.embedding_targets())
        # the groups take turns at every layer: all but the last leave it loaded for the next
        turns = [
            stream.run(each.rows, held, keep=keep or number < len(groups) - 1, capture=watch)
            for number, (each, held, watch) in enumerate(zip_longest(groups, states, watches))
        ]
        for done in zip(*turns, strict=True):
            if progress is not None:
                progress(stage, done[0] + 1, len(stream.layers))
    except BaseException:
        close(states)
        raise
    return states


def close(states: Sequence[HiddenStates]) -> None:
    """Gives memory and files back."""
    for held in states:
        held.close()


def batches(items: Sequence[Item], groups: Sequence[Group], limit: int) -> Iterator[list[Piece]]:
    """All predictions of all items in pieces, at most ``limit`` predictions together."""
    batch: list[Piece] = []
    free = limit
    for number, each in enumerate(groups):
        for row, index in enumerate(each.members):
            start = 0
            while start < items[index].count:
                stop = min(start + free, items[index].count)
                batch.append(Piece(index, number, row, start, stop))
                free -= stop - start
                start = stop
                if not free:
                    yield batch
                    batch, free = [], limit
    if batch:
        yield batch


def logits(
    stream: Stream, items: Sequence[Item], states: Sequence[HiddenStates], batch: Sequence[Piece]
) -> torch.Tensor:
    """Predictions of a batch, [P, V] float32. The head must be loaded."""
    import torch

    parts = []
    for piece in batch:
        offset = items[piece.item].first - 1
        row = states[piece.group].read(piece.row, piece.row + 1)[0]
        parts.append(row[offset + piece.start : offset + piece.stop])
    return stream.head(torch.cat(parts)).float()


def targets(items: Sequence[Item], batch: Sequence[Piece], device: torch.device) -> torch.Tensor:
    """The tokens that stand where the predictions of a batch go, [P]; -1 where none does."""
    import torch

    found = [token for piece in batch for token in items[piece.item].targets()[piece.start : piece.stop]]
    return torch.tensor(found, dtype=torch.int64, device=device)
