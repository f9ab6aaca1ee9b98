"""Loads a checkpoint with the experts of one task alone, chosen by a prompt (TAER of PreMoe, arXiv 2505.17639).

The prompt runs as far as the router of the first MoE layer, with no expert in memory; its query vector finds the
nearest task; that task's experts, and no others, are read from the original checkpoint into a stock model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.experts import decoded
from moezip.arch.skeleton import Skeleton
from moezip.calibrate.data import default_seq_len, tokenizer_of
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import ArchitectureError, UsageError
from moezip.plan.apply import Applied
from moezip.runtime.patterns import Patterns, distance
from moezip.runtime.skipping import attach

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Array = npt.NDArray[np.float64]

# What transformers itself runs experts with, where it can.
EXPERTS = "grouped_mm"
# A task's own text is cut into pieces of about the length of a prompt to see how far prompts stray.
PIECE = 128
# Share of these pieces that lie within the radius.
WITHIN = 0.95

log = logging.getLogger("moezip")


# -- queries ------------------------------------------------------------------------------------------------


class _Routed(Exception):
    """Carries the router's logits out of the model's forward."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits


def masked_scores(logits: torch.Tensor, top: int) -> torch.Tensor:
    """Softmax over the ``top`` largest of each token's router logits [T, E], 0 elsewhere; [T, E] float64.

    TCESS per token, in the form with positive scores (see `moezip methods tcess`).
    """
    import torch

    values, ids = logits.double().topk(min(top, logits.shape[-1]))
    return torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, ids.cpu(), values.softmax(-1).cpu())


def routing(source: Source, rows: Sequence[Sequence[int]], *, device: str = "cpu") -> Iterator[Array]:
    """Masked scores [T, E] of the first MoE layer for every row of T token ids, in the checkpoint's own dtype.

    Reads the embeddings, the layers before that one, and of itself all but the experts; frees them at the end.

    Raises:
        ArchitectureError: unknown model, or one without experts.
    """
    import torch

    skeleton = Skeleton(decoded(source), device=device)
    entry, model = skeleton.architecture, skeleton.model
    facts = entry.layer_facts(source.config)
    if not facts:
        raise ArchitectureError("no layer of this model has experts", where=source.folder)
    first = facts[0]
    experts = f"{entry.layers}.{first.layer}.{entry.block}.{entry.experts_module}."
    targets = [*skeleton.embedding_targets()]
    for layer in range(first.layer + 1):
        targets += [name for name in skeleton.layer_targets(layer) if not name.startswith(experts)]
    router = skeleton.layers[first.layer].get_submodule(f"{entry.block}.{entry.router_module}")

    def stop(_module: Any, _args: Any, output: Any) -> None:
        raise _Routed(output[0] if isinstance(output, tuple) else output)

    hook = router.register_forward_hook(stop)
    try:
        skeleton.load(targets)
        for row in rows:
            ids = torch.tensor([list(row)], dtype=torch.int64, device=skeleton.device)
            try:
                with torch.inference_mode():
                    model(input_ids=ids, use_cache=False)
            except _Routed as routed:
                yield masked_scores(routed.logits.reshape(len(row), -1), first.top_k).numpy()
    finally:
        hook.remove()
        skeleton.free(targets)


def query(source: Source, ids: Sequence[int], *, device: str = "cpu") -> list[float]:
    """[E]: the masked scores of the first MoE layer, mean over the tokens ``ids``."""
    (scores,) = routing(source, [ids], device=device)
    return [float(value) for value in scores.mean(0)]


def centre(scores: Sequence[Array]) -> tuple[list[float], float]:
    """A task's query vector, the mean over all tokens of its rows' scores [T, E], and its radius (see ``Task``)."""
    import numpy as np

    middle = np.concatenate(scores).mean(0)
    pieces = [
        row[start : start + PIECE].mean(0)
        for row in scores
        for start in range(0, max(len(row) - PIECE, 0) + 1, PIECE)
    ]  # fmt: skip
    # digits that a reader of the file can do without; what is compared later is what was written
    found = [round(float(value), 8) for value in middle]
    radius = np.quantile([distance(found, piece.tolist()) for piece in pieces], WITHIN)
    return found, round(float(radius), 8)


def query_of_text(source: Source, text: str, *, device: str = "cpu") -> list[float]:
    """``query`` of a text's first window, tokenized as calibration text is.

    Raises:
        UsageError: the text gives no tokens.
        DataError: the checkpoint has no usable tokenizer.
    """
    ids = tokenizer_of(source.folder)(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise UsageError("the prompt gives no tokens", where="prompt", next="give some text, or name the task")
    return query(source, ids[: default_seq_len(source.config)], device=device)


# -- loading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Why a model was loaded with the experts that it has; printed, a sentence.

    Attributes:
        task: the nearest task, or the one that was named.
        distance: of the prompt's query to the task's; None where the task was named.
        distances: to all tasks, nearest first; empty where the task was named.
        radius: 95 % of short pieces of the task's own text lie within this distance.
        threshold: the distance beyond which all experts are loaded; None for never.
        fell_back: whether that is what happened.
        kept: experts per layer that were loaded. experts: that there are.
    """

    task: str
    distance: float | None
    distances: Mapping[str, float]
    radius: float
    threshold: float | None
    fell_back: bool
    kept: int
    experts: int

    def __str__(self) -> str:
        if self.distance is None:
            return f"task {self.task}, as named: {self.kept} of {self.experts} experts per layer"
        near = f"nearest task {self.task} at distance {self.distance:.4f} (its own text: {self.radius:.4f})"
        if self.fell_back:
            return f"{near}, beyond the threshold {self.threshold:g}: all {self.experts} experts per layer"
        return f"{near}: {self.kept} of {self.experts} experts per layer"


def load_for_task(
    checkpoint: str | PathLike[str],
    patterns: str | PathLike[str] | Patterns,
    *,
    prompt: str | None = None,
    task: str | None = None,
    threshold: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    experts_implementation: str = EXPERTS,
) -> Any:
    """A stock transformers model with one task's experts alone, read from the original checkpoint.

    Args:
        checkpoint: the folder that the patterns were built from.
        patterns: the file, or what was loaded from it.
        prompt: text whose task is to be found.
        task: the task's name, in place of a prompt.
        threshold: with a prompt: distance beyond which all experts are loaded; a task's ``radius`` is its scale.
        dtype: default the config's own.

    Returns:
        The model, ready for ``generate``; ``model.moezip_task`` is a ``Retrieved``.

    Raises:
        UsageError: both or neither of prompt and task, a task that does not exist, or an empty prompt.
        PlanError: patterns of another checkpoint, or damaged ones.
    """
    if (prompt is None) == (task is None):
        raise UsageError("say what the model is for", next="give either prompt=TEXT or task=NAME")
    if threshold is not None and (prompt is None or not threshold >= 0):
        raise UsageError(f"a threshold of {threshold:g} cannot be kept to", where="threshold",
                         next="give a distance of 0 or more, together with a prompt")  # fmt: skip
    where = None if isinstance(patterns, Patterns) else Path(patterns)
    known = patterns if isinstance(patterns, Patterns) else Patterns.load(Path(patterns))
    with Checkpoint.open(checkpoint) as source:
        known.require_source(source.fingerprint, where)
        distances: dict[str, float] = {}
        if prompt is not None:
            distances = known.distances(query_of_text(source, prompt, device=device))
        chosen = known.task(task if task is not None else next(iter(distances)))
        apart = distances.get(chosen.name)
        fell_back = threshold is not None and apart is not None and apart > threshold
        view: Source = source if fell_back else Applied(source, known.plan(chosen.name))
        model = whole(view, device=device, dtype=dtype, experts_implementation=experts_implementation)
    kept = known.experts if fell_back else known.keep
    found = Retrieved(
        chosen.name, apart, distances, chosen.radius, threshold, fell_back, kept, known.experts
    )  # fmt: skip
    log.log(logging.WARNING if fell_back else logging.INFO, "%s", found)
    model.moezip_task = found
    return model


def whole(
    source: Source,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    experts_implementation: str = EXPERTS,
) -> Any:
    """The stock model of ``source`` with all its parameters, each read once, straight into its place.

    Raises:
        ArchitectureError: unknown or incomplete model.
    """
    from transformers import GenerationConfig

    skeleton = Skeleton(decoded(source), experts_implementation=experts_implementation, dtype=dtype, device=device)
    skeleton.require_complete()
    for layer in range(len(skeleton.layers)):
        skeleton.load(skeleton.layer_targets(layer))
    skeleton.load(skeleton.outer_targets())
    skeleton.tie()
    model = skeleton.model
    model.config._name_or_path = str(source.folder)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    attach(model, skeleton.architecture, source.config, source.folder)
    return model
