"""``moezip evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moezip.errors import UsageError
from moezip.pipeline.common import Common, Opened, opened
from moezip.progress import Progress

if TYPE_CHECKING:
    from moezip.checkpoint.source import Source
    from moezip.evaluate.generation import Generation
    from moezip.evaluate.harness import Harness
    from moezip.evaluate.result import Evaluation
    from moezip.evaluate.speed import Speed


def evaluate_command(
    checkpoint: str,
    common: Common,
    *,
    against: str | None = None,
    data: Sequence[Path] = (),
    tasks: Sequence[Path] = (),
    tokens: int | None = None,
    lm_eval: Sequence[str] = (),
    generate: int = 0,
    speed: bool = False,
    save: bool = False,
) -> Evaluation:
    """Loss, divergence from ``against`` and task scores of a checkpoint, streamed; and what else is asked for.

    Args:
        lm_eval: tasks of EleutherAI's lm-eval: names, ``.yaml`` files or folders of them.
        generate: how many documents of ``data`` are continued.
        speed: measure speed and memory beside ``against``.
        save: keep what was found in the checkpoint's ``moezip/evaluation.json``, and say it in its card.

    Raises:
        UsageError: nothing to measure, options that need another, or a package that is not installed.
        MoezipError: a model that must be whole in memory and does not fit.
    """
    from moezip.calibrate.data import default_seq_len
    from moezip.evaluate import saved
    from moezip.evaluate.result import Evaluation
    from moezip.report.card import refresh_card

    model = opened(checkpoint)
    reference = None if against is None else opened(against)
    _check(model, reference, common, data, lm_eval, generate, speed)
    if save:
        saved.require_place(model.source.folder)
    if data or tasks or not (lm_eval or speed):
        found = evaluate_source(
            model.source, common, against=None if reference is None else reference.source, data=data, tasks=tasks,
            tokens=tokens,
        )  # fmt: skip
    else:
        found = Evaluation(None, common.seq_len or default_seq_len(model.source.config))
    if lm_eval:
        found = replace(found, lm_eval=_harness(model, reference, common, lm_eval))
    if generate:
        found = replace(found, generation=_generation(model, reference, common, data, generate))
    if speed:
        assert reference is not None
        found = replace(found, speed=_speed(model, reference, common))
    if save:
        more = [*(f"lm-eval {name}" for name in lm_eval), *["generate"] * bool(generate), *["speed"] * speed]
        folder = None if reference is None else reference.source.folder
        saved.save(model.source.folder, found.to_json(), saved.Request(data, tasks, folder, more), common.command)
        refresh_card(model.source.folder)
    return found


def evaluate_source(
    source: Source,
    common: Common,
    *,
    against: Source | None = None,
    data: Sequence[Path] = (),
    tasks: Sequence[Path] = (),
    tokens: int | None = None,
) -> Evaluation:
    """What can be streamed, of a source that is open already, a view perhaps."""
    from moezip.evaluate.loss import evaluate

    return evaluate(
        source,
        data=data,
        against=against,
        tasks=tasks,
        tokens=tokens,
        seq_len=common.seq_len,
        device=common.device,
        max_memory=common.max_memory,
        workdir=common.workdir,
        progress=_layers(common),
    )


def _layers(common: Common) -> Callable[[str, int, int], None]:
    """Tells the watch how many layers are done."""

    def progress(stage: str, done: int, total: int) -> None:
        common.watch(Progress(f"evaluate {stage}", done, total))

    return progress


def _check(
    model: Opened,
    reference: Opened | None,
    common: Common,
    data: Sequence[Path],
    lm_eval: Sequence[str],
    generate: int,
    speed: bool,
) -> None:
    """Raises whatever can be known before anything is computed."""
    from moezip.evaluate.harness import require_harness
    from moezip.evaluate.whole import require_room

    models = [model.source] if reference is None else [model.source, reference.source]
    if lm_eval:
        require_harness()
    if generate:
        if not data:
            raise UsageError("there are no documents to continue", where="--generate", next="name text with --data")
        for source in models:
            require_room([source], common.max_memory, "--generate")
    if speed:
        if reference is None:
            raise UsageError("speed is measured beside a reference", where="--speed", next="name it with --against")
        require_room(models, common.max_memory, "--speed")


def _harness(model: Opened, reference: Opened | None, common: Common, tasks: Sequence[str]) -> Harness:
    """Tasks of lm-eval on both models, one after the other."""
    from moezip.evaluate.harness import run_harness

    found = [
        run_harness(
            each.source, tasks, device=common.device, max_memory=common.max_memory, workdir=common.workdir,
            seed=common.seed, progress=_layers(common),
        )
        for each in (model, reference) if each is not None
    ]  # fmt: skip
    return found[0] if reference is None else replace(found[0], against=found[1].tasks)


def _generation(
    model: Opened, reference: Opened | None, common: Common, data: Sequence[Path], count: int
) -> Generation:
    """What both models write, one after the other."""
    from moezip.calibrate.data import tokenizer_of
    from moezip.evaluate.generation import generate, prompts
    from moezip.evaluate.speed import maximum
    from moezip.evaluate.tasks import ends_of
    from moezip.evaluate.whole import load_whole

    models = [each.source for each in (model, reference) if each is not None]
    tokenizer = tokenizer_of(model.source.folder)
    given = prompts(data, tokenizer, count)

    def written(source: Source, stage: str) -> Generation:
        def progress(done: int, total: int) -> None:
            common.watch(Progress(stage, done, total, "texts"))

        whole = load_whole(source.folder, common.device)
        return generate(
            whole, given, ends=ends_of(tokenizer, model.source.config), seed=common.seed,
            longest=maximum([each.config for each in models]), progress=progress,
        )  # fmt: skip

    found = written(model.source, "write")
    return found if reference is None else replace(found, against=written(reference.source, "write, reference"))


def _speed(model: Opened, reference: Opened, common: Common) -> Speed:
    from moezip.evaluate.speed import maximum, measure_speed

    def progress(done: int, total: int) -> None:
        common.watch(Progress("speed", done, total, "rounds"))

    configs = [model.source.config, reference.source.config]
    return measure_speed(
        model.source.folder, reference.source.folder, longest=maximum(configs),
        vocabulary=min(int(config["vocab_size"]) for config in configs), device=common.device, seed=common.seed,
        progress=progress,
    )  # fmt: skip
