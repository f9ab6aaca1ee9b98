"""Loss on text, divergence from a reference, and task scores of a model that need not fit into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.calibrate.data import default_seq_len, domain_names, text_files, token_stream, tokenizer_of, windows
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.stream import Stream
from moezip.checkpoint.source import Source
from moezip.errors import DataError, MoezipError, UsageError
from moezip.evaluate.forward import Group, Item, Progress, batches, close, forward, group, logits, targets
from moezip.evaluate.result import Divergence, Evaluation, Loss, Score, Skipped
from moezip.evaluate.tasks import Tasks, load, outcomes
from moezip.runtime.skipping import attach

if TYPE_CHECKING:
    import torch


def evaluate(
    source: Source,
    *,
    data: Sequence[Path] = (),
    against: Source | None = None,
    tasks: Sequence[Path] = (),
    tokens: int | None = None,
    seq_len: int | None = None,
    device: str = "cpu",
    max_memory: int | None = None,
    workdir: Path | None = None,
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
    micro_rows: int | None = None,
) -> Evaluation:
    """Measures ``source``, reading each decoder layer once for all texts and first answers.

    Documents are joined with the end-of-text token and cut into full windows of ``seq_len``; the first token of a
    window is not scored. A file shorter than one window is one short window.

    Args:
        data: files or folders of text; every file is an entry of ``by_file``.
        against: a reference with the same tokenizer; streamed as well.
        tasks: files or folders of questions.
        tokens: tokens per file; default all.
        seq_len: default min(2048, the model's maximum).
        max_memory: ceiling of the whole process in bytes; default 80 % of what is free.
        workdir: folder for hidden states that do not fit; what is written there is removed at the end.
        progress: called with (``"reference"``, ``"model"`` or ``"answers"``, layers done, layers).
        dtype: compute dtype; default the config's.
        micro_rows: rows per micro-batch; default by size.

    Raises:
        UsageError: nothing to measure, or a window below 2 tokens or beyond the model's maximum.
        DataError: text or questions that cannot be used, or a reference of another vocabulary.
        MoezipError: too little memory with no ``workdir``.
    """
    length = _window_length(source.config, data, against, tasks, tokens, seq_len)
    tokenizer = tokenizer_of(source.folder)
    if against is not None:
        _require_same_tokenizer(source, against, tokenizer)
    text = _Text.load(data, tokenizer, tokens, length)
    questions = Tasks(load(tasks), tokenizer, source.config)
    asked = questions.items()
    text_groups, task_groups = group(text.items), group(asked)

    def stream_of(each: Source) -> Stream:
        stream = Stream(each, device=device, max_memory=max_memory, micro_rows=micro_rows, dtype=dtype)
        attach(stream.model, stream.skeleton.architecture, each.config, each.folder)
        return stream

    model = stream_of(source)
    reference = None if against is None else stream_of(against)
    need = sum(model.hidden_bytes(each.rows) for each in [*text_groups, *task_groups])
    if reference is not None:
        need += sum(reference.hidden_bytes(each.rows) for each in text_groups)
    heads = sum(each.skeleton.bytes(each.skeleton.head_targets()) for each in (model, reference) if each is not None)
    keep = bool(questions.matches) and model.model_bytes + heads + need <= model.hidden_budget()
    with _spill(model, reference, need, heads, workdir) as folder:
        reference_states: list[HiddenStates] = []
        if reference is not None:
            reference_states = forward(
                reference, text_groups, folder=_inside(folder, "reference"), progress=progress, stage="reference"
            )
        groups = [*text_groups, *task_groups]
        states = forward(
            model, groups, folder=_inside(folder, "model"), keep=keep, progress=progress, stage="model"
        )  # fmt: skip
        text_states, task_states = states[: len(text_groups)], states[len(text_groups) :]
        model.load_head()
        sums = _measure(text, text_groups, model, text_states, reference, reference_states)
        close([*reference_states, *text_states])
        questions.take(outcomes(model, asked, task_groups, task_states))
        close(task_states)
        while questions.greedy.unfinished:
            model.free_head()
            asked = questions.greedy.items()
            groups = group(asked)
            states = forward(
                model, groups, folder=_inside(folder, "model"), keep=keep, progress=progress, stage="answers"
            )  # fmt: skip
            model.load_head()
            questions.greedy.take(outcomes(model, asked, groups, states))
            close(states)
    for each in (model, reference):
        if each is not None:  # the stream's closures form cycles, so its weights would outlive it for a while
            each.skeleton.free([*each.skeleton.outer_targets(), *_layer_targets(each)])
    found = _result(text, sums, reference is not None, questions.scores(), length)
    skips = getattr(model.model, "moezip_skipping", None)
    return found if skips is None else replace(found, skipped=Skipped(skips.skipping.rule, skips.calls, skips.dropped))


def _layer_targets(stream: Stream) -> list[str]:
    return [name for layer in range(len(stream.layers)) for name in stream.skeleton.layer_targets(layer)]


def _window_length(
    config: dict[str, Any],
    data: Sequence[Path],
    against: Source | None,
    tasks: Sequence[Path],
    tokens: int | None,
    seq_len: int | None,
) -> int:
    if not data and not tasks:
        raise UsageError("there is nothing to measure", next="name text with --data, questions with --tasks, or both")
    if against is not None and not data:
        raise UsageError("a comparison with a reference needs text", where="--against", next="name text with --data")
    if tokens is not None and tokens < 2:
        raise UsageError(f"{tokens} tokens leave nothing to predict", where="--tokens", next="ask for 2 or more")
    if seq_len is None:
        return default_seq_len(config)
    if seq_len < 2:
        raise UsageError(f"a window of {seq_len} leaves nothing to predict", where="--seq-len", next="2 or more")
    maximum = config.get("max_position_embeddings")
    if maximum is not None and seq_len > int(maximum):
        raise UsageError(
            f"windows of {seq_len} tokens, but the model's maximum is {maximum}", where="--seq-len",
            next=f"ask for at most {maximum}",
        )  # fmt: skip
    return seq_len


def _require_same_tokenizer(source: Source, against: Source, tokenizer: Any) -> None:
    ours, theirs = source.config.get("vocab_size"), against.config.get("vocab_size")
    if ours != theirs:
        raise DataError(
            f"the reference predicts {theirs} tokens, the model {ours}", where=against.folder,
            next="compare models of one vocabulary",
        )  # fmt: skip
    files = [each.folder / "tokenizer.json" for each in (source, against)]
    if files[0] == files[1] or (all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes()):
        return
    if tokenizer_of(against.folder).get_vocab() != tokenizer.get_vocab():
        raise DataError(
            "the reference has another tokenizer, so its tokens mean something else", where=against.folder,
            next="compare models of one tokenizer",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Text:
    """The windows of all files; ``files[i]`` is the stem, made unique, of the file that ``items[i]`` is from."""

    names: list[str]
    items: list[Item]
    files: list[str]

    @classmethod
    def load(cls, data: Sequence[Path], tokenizer: Any, tokens: int | None, length: int) -> _Text:
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


@contextmanager
def _spill(
    model: Stream, reference: Stream | None, need: int, heads: int, workdir: Path | None
) -> Iterator[Path | None]:
    """A folder for hidden states if they do not fit into memory, removed whatever happens; None if they fit."""
    streams = [each for each in (model, reference) if each is not None]
    # beside the hidden states there is at any time either one layer or the heads
    room = min(each.hidden_budget() - max(heads - each.layer_bytes, 0) for each in streams)
    if need <= room:
        yield None
        return
    if workdir is None:
        raise MoezipError(
            f"the hidden states take {need / 2**30:.2f} GiB, {max(room, 0) / 2**30:.2f} GiB are allowed",
            next="name a --workdir for them, allow more --max-memory, or use fewer --tokens",
        )
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="evaluate-", dir=workdir) as folder:
        yield Path(folder)


def _inside(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


@dataclass(slots=True)
class _Sums:
    """Sums over the scored tokens of one file."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: float = 0.0
    reference_nll: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.tokens + other.tokens,
            self.nll + other.nll,
            self.kl + other.kl,
            self.agreed + other.agreed,
            self.reference_nll + other.reference_nll,
        )

    def loss(self) -> Loss:
        return Loss(self.nll / self.tokens, self.tokens)

    def divergence(self) -> Divergence:
        return Divergence(self.kl / self.tokens, self.agreed / self.tokens, self.reference_nll / self.tokens)


def _measure(
    text: _Text,
    groups: Sequence[Group],
    model: Stream,
    states: Sequence[HiddenStates],
    reference: Stream | None,
    reference_states: Sequence[HiddenStates],
) -> dict[str, _Sums]:
    """Sums per file, from both models' last hidden states side by side."""
    import torch

    sums = {name: _Sums() for name in text.names}
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
            name = text.files[piece.item]
            sums[name] += _Sums(count, *values[at : at + count].sum(0).tolist())
            at += count
    if reference is not None:
        reference.free_head()
    return sums


def _result(text: _Text, sums: dict[str, _Sums], compared: bool, scores: dict[str, Score], length: int) -> Evaluation:
    whole = sum(sums.values(), _Sums())
    return Evaluation(
        loss=whole.loss() if whole.tokens else None,
        seq_len=length,
        by_file={name: found.loss() for name, found in sums.items()},
        against=whole.divergence() if compared else None,
        against_by_file={name: found.divergence() for name, found in sums.items()} if compared else {},
        tasks=scores,
    )
