"""Loss on text, divergence from a reference, and task scores of a model that need not fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.arch.spec import LayerFacts
from moezip.calibrate.data import default_seq_len, tokenizer_of
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.stream import Stream
from moezip.checkpoint.source import Source
from moezip.errors import DataError, UsageError
from moezip.evaluate.confidence import Paired
from moezip.evaluate.forward import Group, Progress, close, forward, group
from moezip.evaluate.result import Evaluation, Skipped
from moezip.evaluate.routing import Agreement, Routing, Watch, maps
from moezip.evaluate.spill import inside, spill
from moezip.evaluate.tasks import Tasks, load, outcomes
from moezip.evaluate.text import Text, measure
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
        against: a reference with the same tokenizer; streamed as well, and asked the same questions.
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
    length = _window_length(source.config, data, tasks, tokens, seq_len)
    tokenizer = tokenizer_of(source.folder)
    if against is not None:
        _require_same_tokenizer(source, against, tokenizer)
    text = Text.load(data, tokenizer, tokens, length)
    asked = load(tasks)
    questions, theirs = (Tasks(asked, tokenizer, source.config) for _ in range(2))
    text_groups, task_groups = group(text.items), group(questions.items())
    groups = [*text_groups, *task_groups]

    def stream_of(each: Source) -> Stream:
        stream = Stream(each, device=device, max_memory=max_memory, micro_rows=micro_rows, dtype=dtype)
        attach(stream.model, stream.skeleton.architecture, each.config, each.folder)
        return stream

    model = stream_of(source)
    reference = None if against is None else stream_of(against)
    routing = None
    if against is not None and reference is not None and data:
        routing = maps(source, against, _facts(model), _facts(reference))
    need = sum(model.hidden_bytes(each.rows) for each in groups)
    if reference is not None:
        need += sum(reference.hidden_bytes(each.rows) for each in groups)
    if reference is not None and isinstance(routing, dict):
        need += Agreement.bytes(_facts(reference), text_groups)
    heads = sum(each.skeleton.bytes(each.skeleton.head_targets()) for each in (model, reference) if each is not None)
    keep = bool(questions.matches) and model.model_bytes + heads + need <= model.hidden_budget()
    with spill([model] if reference is None else [model, reference], need, heads, workdir) as folder:
        reference_states: list[HiddenStates] = []
        agreement: Agreement | None = None
        watches: list[Watch] = []
        if reference is not None:
            if isinstance(routing, dict):
                agreement = Agreement(routing, _facts(reference), text_groups, text.items, inside(folder, "choices"))
                watches = [agreement.of_reference(reference, number) for number in range(len(text_groups))]
            states = forward(
                reference, groups, folder=inside(folder, "reference"), watches=watches, progress=progress,
                stage="reference",
            )  # fmt: skip
            reference_states = states[: len(text_groups)]
            if asked:
                reference.load_head()
                last = states[len(text_groups) :]
                _answer(reference, theirs, task_groups, last, inside(folder, "answers"), progress)
                reference.free_head()
        if agreement is not None:
            watches = [agreement.of_model(model, number) for number in range(len(text_groups))]
        states = forward(
            model, groups, folder=inside(folder, "model"), keep=keep, watches=watches, progress=progress,
            stage="model",
        )  # fmt: skip
        model.load_head()
        compared = reference if data else None
        measured = measure(text, text_groups, model, states[: len(text_groups)], compared, reference_states)
        close([*reference_states, *states[: len(text_groups)]])
        _answer(model, questions, task_groups, states[len(text_groups) :], inside(folder, "model"), progress, keep)
    for each in (model, reference):
        if each is not None:  # the stream's closures form cycles, so its weights would outlive it for a while
            each.skeleton.free([*each.skeleton.outer_targets(), *_layer_targets(each)])
    scores = questions.scores()
    if reference is not None:
        answers = theirs.scores()
        scores = {name: replace(found, against=Paired.of(found.right, answers[name].right))
                  for name, found in scores.items()}  # fmt: skip
    skips = getattr(model.model, "moezip_skipping", None)
    losses = measured.results()
    return Evaluation(
        loss=losses.loss,
        seq_len=length,
        by_file=losses.by_file,
        against=losses.against,
        against_by_file=losses.against_by_file,
        tasks=scores,
        skipped=None if skips is None else Skipped(skips.skipping.rule, skips.calls, skips.dropped),
        routing=Routing({}, routing) if isinstance(routing, str) else None if agreement is None else agreement.result(),
    )


def _facts(stream: Stream) -> list[LayerFacts]:
    return list(stream.skeleton.architecture.layer_facts(stream.source.config))


def _answer(
    stream: Stream,
    tasks: Tasks,
    groups: Sequence[Group],
    states: Sequence[HiddenStates],
    folder: Path | None,
    progress: Progress | None,
    keep: bool = False,
) -> None:
    """All questions, from the last hidden states of the first pass over ``groups``; more passes where decoding
    needs them. The head must be loaded, and is at the end."""
    asked = tasks.items()
    tasks.take(outcomes(stream, asked, groups, states))
    close(states)
    while tasks.greedy.unfinished:
        stream.free_head()
        asked = tasks.greedy.items()
        groups = group(asked)
        states = forward(stream, groups, folder=folder, keep=keep, progress=progress, stage="answers")
        stream.load_head()
        tasks.greedy.take(outcomes(stream, asked, groups, states))
        close(states)


def _layer_targets(stream: Stream) -> list[str]:
    return [name for layer in range(len(stream.layers)) for name in stream.skeleton.layer_targets(layer)]


def _window_length(
    config: dict[str, Any],
    data: Sequence[Path],
    tasks: Sequence[Path],
    tokens: int | None,
    seq_len: int | None,
) -> int:
    if not data and not tasks:
        raise UsageError("there is nothing to measure", next="name text with --data, questions with --tasks, or both")
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
