"""The Python API: ``moezip.open``, and a ``Model`` that is measured, made smaller and saved.

Every method is a stage that a command runs too, with that command's defaults. Nothing is written before ``save``: a
smaller model is a plan over the checkpoint, and steps compose by looking through it.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.errors import UsageError
from moezip.pipeline.common import Clock, Common, Opened, opened, refuse_file, refuse_output
from moezip.progress import Watch, unwatched

if TYPE_CHECKING:
    from moezip.calibrate.data import DomainText
    from moezip.calibrate.statistics import Statistics
    from moezip.evaluate.result import Evaluation
    from moezip.plan.packed import Values
    from moezip.plan.plan import Plan
    from moezip.plan.widths import Granularity
    from moezip.report.report import Report

FilePath = str | PathLike[str]
Texts = FilePath | Sequence[FilePath]
Settings = Mapping[str, bool | int | float | str]


def open(
    checkpoint: FilePath,
    *,
    device: str = "cpu",
    max_memory: int | None = None,
    workdir: FilePath | None = None,
    seed: int = 0,
    seq_len: int | None = None,
    progress: Watch | None = None,
) -> Model:
    """A checkpoint to work on. Reads its config and headers, and no weight.

    Args:
        checkpoint: a folder, or the word ``demo``.
        device: where layers are computed, one at a time.
        max_memory: ceiling of the process in bytes; default 80 % of what is free.
        workdir: an existing folder for hidden states that do not fit into memory, and for solved weights until they
            are saved; default the system's folder for temporary files. What is put there goes with the models.
        seed: the only source of chance.
        seq_len: window in tokens; default min(2048, the model's maximum).
        progress: called with a ``moezip.progress.Progress`` at every step.

    Raises:
        CheckpointError, ArchitectureError: no checkpoint, or none that moezip knows.
    """
    common = Common(
        device=device, max_memory=max_memory, workdir=None if workdir is None else Path(workdir), seed=seed,
        seq_len=seq_len, command=f"moezip.open, {shlex.join(sys.argv[:1])}", watch=progress or unwatched,
    )  # fmt: skip
    return Model(opened(str(checkpoint)), common)


class _Write(Protocol):
    """Writes a model; its report."""

    def __call__(self, out: Path, common: Common, clock: Clock) -> Report: ...


@dataclass(frozen=True, slots=True)
class _Step:
    """What a model is made of, beyond its checkpoint.

    Attributes:
        verb: what was done last.
        view: the result as it would be read back.
        plan: None where no plan says it. values: its solved values.
        stages: seconds that it took.
        before: the step that it follows, whose values it may read.
        folder: holds solved weights as long as a model lives that reads them.
    """

    verb: Literal["prune", "merge", "quantize", "skip"]
    view: Source
    write: _Write
    plan: Plan | None
    values: Values | None
    stages: Mapping[str, float]
    before: _Step | None = None
    folder: tempfile.TemporaryDirectory[str] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Model:
    """A checkpoint, or what was made of one. Models do not change: every step gives another one."""

    _source: Opened
    _common: Common
    _step: _Step | None = None

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies that everything is read from."""
        return self._source.source.folder

    @property
    def plan(self) -> Plan | None:
        """What becomes of each expert and matrix; ``plan.to_json()`` is readable. None for a checkpoint as it is, or
        with a rule for skipping, which no plan says."""
        return None if self._step is None else self._step.plan

    @property
    def experts(self) -> dict[int, int]:
        """How many experts each MoE layer has."""
        if self.plan is None:
            return {fact.layer: fact.experts for fact in self._source.facts}
        return {layer.layer: len(layer.picks) for layer in self.plan.layers}

    @property
    def bytes(self) -> int:
        """Of all tensors, as they are stored or would be."""
        from moezip.export.stock import tensor_bytes

        return tensor_bytes(self._view)

    def __repr__(self) -> str:
        counts = sorted(set(self.experts.values()))
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        made = "" if self._step is None else f", {self._step.verb}d" if self._step.verb[-1] == "e" else ", skipping"
        return (
            f"<moezip model {self.folder.name}{made}: {self._source.architecture.name}, {len(self.experts)} layers of "
            f"{span} experts, {self.bytes / 2**20:.1f} MiB>"
        )

    # -- measuring ------------------------------------------------------------------------------------------

    def calibrate(
        self, data: Texts, *, tokens: int = 65_536, record: Sequence[str] | None = None, out: FilePath | None = None
    ) -> Statistics:
        """What the experts do on a text: running sums that every method and every ratio can be decided with.

        Args:
            data: text files (.txt, .jsonl) or folders; each is one domain. ``demo:calib/python.jsonl`` names a file
                that comes with the package.
            tokens: shared over the domains.
            record: only these statistics, as for ``moezip calibrate --record``; ``gradients`` adds a backward pass.
            out: a file that gets them as well. ``moezip.Statistics.load`` and every ``stats=`` read it again.

        Raises:
            DataError: text that is not there or gives no tokens.
            UsageError: a file that exists, records that do not exist, or a model that is not a checkpoint as it is.
        """
        from moezip.pipeline.calibrate import require_files, require_recordable, run_calibration
        from moezip.pipeline.probes import PROBES

        self._require_whole("calibrate")
        if out is not None:
            refuse_file(Path(out), "statistics file", self._common)
        texts = texts_of(data, tokens)
        require_files(texts)
        require_recordable(record, self._source)
        with self._scratch() as folder:
            stats = run_calibration(
                self._source, texts, self._within(folder), record=record, workdir=Path(folder), probes=PROBES
            )
        if out is not None:
            stats.save(Path(out))
        return stats

    def evaluate(
        self,
        data: Texts = (),
        *,
        against: Model | FilePath | None = None,
        tasks: Texts = (),
        tokens: int | None = None,
    ) -> Evaluation:
        """Loss on text, divergence from a reference and task scores, streamed; saved or not.

        Args:
            data: text; every file is an entry of ``by_file``.
            against: a reference with the same tokenizer.
            tasks: files or folders of questions.
            tokens: at most this many per file; default all.

        Raises:
            UsageError: nothing to measure, or an unsaved model that skips by mask networks.
            DataError: text or questions that cannot be used, or a reference of another vocabulary.
        """
        from moezip.pipeline.evaluate import evaluate_source

        reference = against if isinstance(against, Model) or against is None else Model(
            opened(str(against)), self._common
        )  # fmt: skip
        for model in (self, reference):
            if model is not None:
                model._require_readable()
        with self._scratch() as folder:
            return evaluate_source(
                self._view,
                self._within(folder),
                against=None if reference is None else reference._view,
                data=paths_of(data),
                tasks=paths_of(tasks),
                tokens=tokens,
            )

    # -- making smaller -------------------------------------------------------------------------------------

    def prune(
        self,
        method: str = "easy-ep",
        *,
        keep: int | None = None,
        ratio: float | None = None,
        data: Texts = (),
        tokens: int = 65_536,
        stats: Statistics | FilePath | None = None,
        weights: Mapping[str, float] | None = None,
        scope: Literal["layer", "model"] = "layer",
        reader: str | None = None,
        settings: Settings | None = None,
    ) -> Model:
        """The model with the experts, or neurons, that matter for a text. What ``prune`` or ``merge`` left can be
        pruned too, if it is by whole experts.

        Args:
            method: see ``moezip methods``.
            keep, ratio: experts kept in each layer, or the share removed; one of them.
            data, tokens: calibration text. stats: statistics of the checkpoint in its place, taken or saved before.
            weights: how much each domain counts, by name; default alike.
            scope: as many experts in every layer, or ranked over all layers.
            reader: who must be able to read what is saved, as ``--for``.
            settings: the method's own, as ``--set``.

        Raises:
            UsageError, PlanError, StatisticsError, DataError: what cannot be decided or carried out, and why.
        """
        from moezip.export.readers import planned
        from moezip.pipeline.apply import write_plan
        from moezip.pipeline.onward import OBSERVED, joined, seen_through
        from moezip.pipeline.prune import PruneJob, decide_prune, prepare_prune, require_text

        plan, values = self._onward("prune", stats)
        job = PruneJob(
            method, keep, ratio, settings_of(settings), texts_of(data, tokens), _file_of(stats), weights or {}, scope,
            reader, plan, values,
        )  # fmt: skip
        prepared = prepare_prune(str(self.folder), job, self._common, seen_through(self._source, plan, values))
        taken = _taken(stats)
        if taken is None:
            require_text(prepared, job)
        clock, source = Clock(), self._source.source
        with self._scratch() as folder:
            made, seen, notes = decide_prune(prepared, job, self._within(folder), clock, Path(folder), stats=taken)
        if plan is not None and seen is not None:
            notes = [*notes, OBSERVED]
        plan, values = joined(plan, values, made, None)

        def write(out: Path, common: Common, clock: Clock) -> Report:
            return write_plan(source, plan, out, common, clock, seen, notes, reader, values)

        view = cast(Source, planned(source, plan, reader, values))
        return self._made(_Step("prune", view, write, plan, values, clock.stages, self._step))

    def merge(
        self,
        method: str = "m-smoe",
        *,
        keep: int | None = None,
        ratio: float | None = None,
        data: Texts = (),
        tokens: int = 65_536,
        stats: Statistics | FilePath | None = None,
        weights: Mapping[str, float] | None = None,
        scope: Literal["layer", "model"] = "layer",
        reader: str | None = None,
        settings: Settings | None = None,
    ) -> Model:
        """The model with several experts made into one. What ``prune`` left can be merged too, given text.

        Args: as of ``prune``; ``stats`` are of the checkpoint itself.

        Raises:
            UsageError, PlanError, StatisticsError, DataError: what cannot be decided or carried out, and why.
        """
        from moezip.export.readers import planned
        from moezip.pipeline.apply import write_plan
        from moezip.pipeline.merge import MergeJob, decide_merge, prepare_merge, require_text
        from moezip.pipeline.onward import OBSERVED, joined, seen_through
        from moezip.plan.packed import LayerFiles

        first, _ = self._onward("merge", stats)
        job = MergeJob(
            method, keep, ratio, settings_of(settings), texts_of(data, tokens), _file_of(stats), weights or {}, scope,
            reader, first,
        )  # fmt: skip
        seen_as = seen_through(self._source, first, merging=True)
        prepared = prepare_merge(str(self.folder), job, self._common, seen_as)
        taken = _taken(stats)
        if taken is None or prepared.looks:
            require_text(prepared, job)
        clock, source, held = Clock(), self._source.source, self._scratch()
        made, solved, seen, notes = decide_merge(
            prepared, job, self._within(held.name), clock, Path(held.name), stats=taken
        )  # fmt: skip
        if first is not None and seen is not None:
            notes = [OBSERVED, *notes]
        plan, values = joined(first, None, made, LayerFiles(solved.folder) if made.solved else None)

        def write(out: Path, common: Common, clock: Clock) -> Report:
            return write_plan(source, plan, out, common, clock, seen, notes, reader, values)

        view = cast(Source, planned(source, plan, reader, values))
        return self._made(_Step("merge", view, write, plan, values, clock.stages, self._step, held))

    def quantize(
        self,
        bits: float | None = None,
        *,
        size: int | float | None = None,
        solver: str = "gptq",
        allocate: str = "uniform",
        granularity: Granularity = "role",
        group_size: int | None = None,
        data: Texts = (),
        tokens: int = 65_536,
        reader: str | None = None,
        settings: Settings | None = None,
    ) -> Model:
        """The model with its weights in few bits: a checkpoint as it is, or what ``prune`` or ``merge`` left.

        Args:
            bits: of the codes; of ``lp``, ``outlier`` and ``block``, stored bits per weight.
            size: of the output in bytes instead, or, below 1, as a share of the checkpoint's.
            solver, allocate, granularity, group_size: as of ``moezip quantize``.
            data, tokens: calibration text; ``rtn`` with one width needs none.
            reader: who must be able to read what is saved, as ``--for``.
            settings: of storage, solver and allocation, as ``--set``.

        Raises:
            UsageError, PlanError, DataError: what cannot be decided or carried out, and why.
        """
        from moezip.pipeline.packed import readable
        from moezip.pipeline.quantize import WORK, QuantizeJob, prepare_quantize, solve_quantize

        if self._step is not None:
            self._require("quantize", "prune", "merge")
        job = QuantizeJob(
            None if bits is None else float(bits), solver, allocate, size, granularity, reader, group_size,
            settings_of(settings), texts_of(data, tokens), self.plan, None if self._step is None else self._step.values,
        )  # fmt: skip
        prepared = prepare_quantize(str(self.folder), job, self._common, self._source)
        clock, held = Clock(), self._scratch()
        codes = solve_quantize(prepared, job, self._within(held.name), clock, Path(held.name) / WORK)
        view = readable(codes.packed, reader)[0]
        return self._made(_Step("quantize", view, codes.write, codes.plan, None, clock.stages, self._step, held))

    def skip(
        self, rule: str = "odp", *, data: Texts = (), tokens: int = 65_536, settings: Settings | None = None
    ) -> Model:
        """The model with a rule by which it skips experts as it runs; the weights stay as they are.

        Compress first, save, open what was saved, and then have it skip.

        Args:
            rule: ``naee``, ``odp`` or ``otp``. settings: its own, as ``--set``.
            data, tokens: text that it is learnt on.

        Raises:
            UsageError, DataError, ArchitectureError: what cannot be learnt or carried out, and why.
        """
        from moezip.export.skipping import WithSkipping
        from moezip.pipeline.skip import SkipJob, prepare_skip, write_skip

        self._require_whole("skip")
        job = SkipJob(rule, settings_of(settings), texts_of(data, tokens))
        prepared = prepare_skip(str(self.folder), job, self._source)
        clock = Clock()
        with self._scratch() as folder, clock.stage("calibrate"):
            learnt = prepared.method.run(prepared, job, self._within(folder), Path(folder))

        def write(out: Path, common: Common, clock: Clock) -> Report:
            return write_skip(prepared, learnt, job, out, common, clock)

        view = WithSkipping(self._source.source, learnt.skipping)
        return self._made(_Step("skip", view, write, None, None, clock.stages, self._step))

    # -- writing --------------------------------------------------------------------------------------------

    def save(self, out: FilePath, *, overwrite: bool = False) -> Report:
        """Writes the checkpoint, whole or not at all, and proves it complete: the bytes that the commands write.

        Raises:
            UsageError: a checkpoint as it is, of which there is nothing to save.
            CheckpointError: an output that exists, a full disk, weights that are not finite.
        """
        if self._step is None:
            raise UsageError("nothing was done to this model", where=self.folder,
                             next="prune, merge or quantize it, or copy the folder")  # fmt: skip
        common = replace(self._common, overwrite=overwrite)
        refuse_output(Path(out), self.folder, common)
        stages = dict(self._step.stages)
        return self._step.write(Path(out), common, Clock(time.monotonic() - sum(stages.values()), stages))

    def export(self, out: FilePath, to: str, *, reader: str | None = None, overwrite: bool = False) -> Report:
        """Writes the same weights in the format of another reader; several formats need one quantization only.

        Args:
            to: ``safetensors`` (plain numbers), ``compressed-tensors`` or ``gptq``.
            reader: who must be able to read it, as ``--for``.

        Raises:
            UsageError: no such format or reader. PlanError: what the format cannot hold.
            CheckpointError: an output that exists, a full disk.
        """
        from moezip.export.stock import PLAN
        from moezip.pipeline.export import export_of, write_export

        self._require_readable()
        common = replace(self._common, overwrite=overwrite)
        refuse_output(Path(out), self.folder, common)
        source, facts = self._view, self._source.facts
        export = export_of(source, to, reader)
        if self.plan is not None:
            plan: bytes | None = self.plan.to_json().encode()
            facts = tuple(self._source.architecture.layer_facts(source.config))
        else:
            plan = (self.folder / PLAN).read_bytes() if (self.folder / PLAN).is_file() else None
        # whoever exports takes any Source
        model = Opened(cast(Checkpoint, source), self._source.architecture, facts)
        stages = {} if self._step is None else dict(self._step.stages)
        clock = Clock(time.monotonic() - sum(stages.values()), stages)
        return write_export(model, export, Path(out), to, plan, common, clock)

    # -- within ---------------------------------------------------------------------------------------------

    @property
    def _view(self) -> Source:
        return self._source.source if self._step is None else self._step.view

    def _made(self, step: _Step) -> Model:
        return Model(self._source, self._common, step)

    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        if self._common.workdir is not None:
            self._common.workdir.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="moezip-", dir=self._common.workdir)

    def _within(self, folder: str) -> Common:
        return replace(self._common, workdir=Path(folder))

    def _onward(self, verb: str, stats: Statistics | FilePath | None) -> tuple[Plan | None, Values | None]:
        """The plan that ``verb`` goes on from, and its values. Raises UsageError where it cannot."""
        if self._step is None:
            return None, None
        step = self._require(verb, "prune", "merge")
        if stats is not None:
            raise UsageError(
                "statistics of the checkpoint do not say what a smaller model does", where="stats",
                next="give data, and what was made is observed again",
            )  # fmt: skip
        return step.plan, step.values

    def _require(self, verb: str, *before: str) -> _Step:
        """The last step, which ``verb`` may follow. Raises UsageError where it may not."""
        assert self._step is not None
        if self._step.verb in before:
            return self._step
        raise UsageError(
            f"{verb} does not follow {self._step.verb} on a model that is not saved", where=self.folder,
            next="save it first, and go on with moezip.open of what was saved",
        )  # fmt: skip

    def _require_whole(self, verb: str) -> None:
        if self._step is not None:
            self._require(verb)

    def _require_readable(self) -> None:
        """Raises UsageError for a model that has files which only a saved one has."""
        from moezip.runtime.skipping import Skipping

        found = Skipping.of(self._view.config)
        if self._step is not None and self._step.verb == "skip" and found is not None and found.rule == "otp":
            raise UsageError("the mask networks of otp are written when the model is saved", where=self.folder,
                             next="save it first, and go on with moezip.open of what was saved")  # fmt: skip


# -- words made into values ---------------------------------------------------------------------------------


def paths_of(data: Texts) -> list[Path]:
    """One path or several; those of the packaged text by their ``demo:`` names. Raises DataError for one that is not
    there."""
    from moezip import demo

    each = [data] if isinstance(data, str | PathLike) else list(data)
    return [demo.named(str(path)) or Path(path) for path in each]


def texts_of(data: Texts, tokens: int) -> list[DomainText]:
    """One domain per path, ``tokens`` shared evenly over them."""
    from moezip.calibrate.data import domains_of

    if tokens < 2:
        raise UsageError(f"{tokens} tokens leave nothing to predict", where="tokens", next="ask for 2 or more")
    paths = paths_of(data)
    return domains_of(paths, tokens) if paths else []


def settings_of(settings: Settings | None) -> dict[str, str]:
    """Settings as ``--set`` would give them."""
    return {key: str(value) for key, value in (settings or {}).items()}


def _file_of(stats: Statistics | FilePath | None) -> Path | None:
    return Path(stats) if isinstance(stats, str | PathLike) else None


def _taken(stats: Statistics | FilePath | None) -> Statistics | None:
    return None if stats is None or isinstance(stats, str | PathLike) else stats
