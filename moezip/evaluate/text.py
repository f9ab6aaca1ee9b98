"""Text as windows, and what two models say of them: sums per window, means per file, intervals over windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moezip.calibrate.data import domain_names, text_files, token_stream, windows
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.stream import Stream
from moezip.errors import DataError, MoezipError
from moezip.evaluate.confidence import Rise, draw, interval
from moezip.evaluate.forward import Group, Item, batches, logits, targets
from moezip.evaluate.result import Divergence, Loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Columns of the sums of a window.
TOKENS, NLL, _, _, REFERENCE_NLL = COLUMNS = range(5)


@dataclass(frozen=True, slots=True)
class Text:
    """The windows of all files; ``files[i]`` is the stem, made unique, of the file that ``items[i]`` is from."""

    names: list[str]
    items: list[Item]
    files: list[str]

    @classmethod
    def load(cls, data: Sequence[Path], tokenizer: Any, tokens: int | None, length: int) -> Text:
        paths = [file for path in data for file in text_files(path)]
        names = domain_names(paths)
        items: list[Item] = []
        files: list[str] = []
        for path, name in zip(paths, names, strict=True):
            found = windows(token_stream(path, tokenizer, tokens), length)
            if len(found[0]) < 2:
                raise DataError("the text is one token long, so nothing can be predicted", where=path)
            items += [Item(ids, 1) for ids in found]
            files += [name] * len(found)
        return cls(names, items, files)


@dataclass(frozen=True, slots=True)
class Results:
    """Means over the scored tokens of all files and of each; what was not measured is None, or empty."""

    loss: Loss | None
    by_file: dict[str, Loss]
    against: Divergence | None
    against_by_file: dict[str, Divergence]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was summed over the scored tokens of every window.

    Attributes:
        names: of the files. files: [W], the file of each window.
        sums: [W, 5]: tokens, nll, KL(reference || model), agreements on the likeliest token, the reference's nll; the
            last three are 0 without a reference.
    """

    names: Sequence[str]
    files: Sequence[str]
    sums: Floats
    compared: bool

    def results(self) -> Results:
        """Means per file and over all, with intervals by the bootstrap over windows."""
        places: dict[str, list[int]] = {name: [] for name in self.names}
        for window, name in enumerate(self.files):
            places[name].append(window)
        if not places:
            return Results(None, {}, None, {})
        files = {name: self.sums[found] for name, found in places.items()}
        drawn = {name: draw(sums, number) for number, (name, sums) in enumerate(files.items())}
        by_file = {name: self._means(sums.sum(0), drawn[name], len(sums)) for name, sums in files.items()}
        loss, against = self._means(self.sums.sum(0), sum(drawn.values()), len(self.sums), len(files))
        against_by_file = {name: found for name, (_, found) in by_file.items() if found is not None}
        return Results(loss, {name: found for name, (found, _) in by_file.items()}, against, against_by_file)

    def _means(self, sums: Floats, drawn: Any, windows: int, strata: int = 1) -> tuple[Loss, Divergence | None]:
        tokens = int(sums[TOKENS])
        nll, kl, agreed, reference = (float(each) / tokens for each in sums[NLL:])
        loss = Loss(nll, tokens, interval(nll, drawn[:, NLL] / drawn[:, TOKENS], windows, strata))
        if not self.compared:
            return loss, None
        rises = (drawn[:, NLL] - drawn[:, REFERENCE_NLL]) / drawn[:, TOKENS]
        rise = nll - reference
        return loss, Divergence(kl, agreed, reference, Rise(rise, interval(rise, rises, windows, strata)))


def measure(
    text: Text,
    groups: Sequence[Group],
    model: Stream,
    states: Sequence[HiddenStates],
    reference: Stream | None,
    reference_states: Sequence[HiddenStates],
) -> Measured:
    """Sums per window, from both models' last hidden states side by side. The model's head must be loaded.

    Raises:
        MoezipError: log-probabilities that are not finite.
    """
    import torch

    sums = np.zeros((len(text.items), len(COLUMNS)))
    # logits, their float32 copy and log-softmax exist side by side, and those of the reference beside them
    limit = max(model.head_chunk() // (2 if reference is None else 3), 1)
    if reference is not None:
        reference.load_head()
    for batch in batches(text.items, groups, limit):
        ours = logits(model, text.items, states, batch).log_softmax(-1)
        tokens = targets(text.items, batch, ours.device)[:, None]
        columns = [-ours.gather(1, tokens)[:, 0]]
        if reference is not None:
            theirs = logits(reference, text.items, reference_states, batch).log_softmax(-1)
            agreed = (theirs.argmax(-1) == ours.argmax(-1)).float()
            reference_nll = -theirs.gather(1, tokens)[:, 0]
            # KL(reference || model) = sum of p_ref (log p_ref - log p); ``ours`` becomes the bracket
            kl = (theirs.exp() * ours.neg_().add_(theirs)).sum(-1)
            columns += [kl, agreed, reference_nll]
        values = torch.stack(columns, 1).double()
        if not bool(torch.isfinite(values).all()):
            raise MoezipError(
                "the model gives log-probabilities that are not finite", where=text.files[batch[0].item],
                next="the weights may be damaged (run `moezip verify`), or the dtype overflows",
            )  # fmt: skip
        at = 0
        for piece in batch:
            count = piece.stop - piece.start
            sums[piece.item, TOKENS] += count
            sums[piece.item, NLL : NLL + len(columns)] += values[at : at + count].sum(0).cpu().numpy()
            at += count
    if reference is not None:
        reference.free_head()
    return Measured(text.names, text.files, sums, reference is not None)
