"""A calibration pass: rows in, statistics out, resumable layer by layer."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moezip.calibrate.backward import Backward, Labels
from moezip.calibrate.capture import Capture
from moezip.calibrate.data import Rows
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.kept import STATE, another_job, damaged, forget_files
from moezip.calibrate.record import Record
from moezip.calibrate.statistics import Domain, Statistics
from moezip.calibrate.stream import Stream
from moezip.checkpoint.source import Source
from moezip.errors import MoezipError, StatisticsError
from moezip.progress import Progress, Watch, unwatched

# A pass is saved after a layer if the last save is older than this: saving costs a write of all hidden states, losing
# costs the work since then.
SAVE_EVERY_SECONDS = 60.0
BACKWARD = "backward"  # folder of its files, in the work folder


def calibrate(
    source: Source,
    rows: Rows,
    records: Sequence[Record],
    *,
    device: str = "cpu",
    max_memory: int | None = None,
    workdir: Path | None = None,
    resume: bool = False,
    watch: Watch = unwatched,
    settings: dict[str, Any] | None = None,
    micro_rows: int | None = None,
    save_every: float = SAVE_EVERY_SECONDS,
    gradients: Labels | None = None,
    seed: int = 0,
) -> Statistics:
    """Streams ``rows`` through the model once and sums what its MoE layers did.

    Args:
        source: the checkpoint (or a view of one).
        records: what to sum.
        workdir: where an interrupted pass waits (and hidden states that do not fit); left empty when done.
        resume: go on from what an interrupted pass left there; from the start if there is nothing.
        save_every: seconds between saves.
        gradients: also run backward, with the text's own labels (``data``) or labels drawn from the model
            (``model``, by ``seed``). Needs ``workdir`` for the layers' inputs.

    Raises:
        MoezipError: weights that are not finite, a work folder of another job, too little memory or disk.
    """
    stream = Stream(source, device=device, max_memory=max_memory, spill=workdir, micro_rows=micro_rows)
    entry = stream.skeleton.architecture
    scale = float(source.config.get(entry.residual_scale_key) or 1.0) if entry.residual_scale_key else 1.0
    capture = Capture(entry, entry.layer_facts(source.config), records, scale)
    if workdir is not None and not resume:
        _forget_interrupted(workdir)
    job = _job(source, rows, records, stream)
    if gradients is not None:
        if workdir is None:
            raise MoezipError("a backward pass keeps every layer's input on disk", next="name a --workdir for them")
        backward = Backward(
            stream, rows, workdir / BACKWARD, labels=gradients, seed=seed, capture=capture,
            job=f"{job} {gradients} {seed}", save_every=save_every,
        )  # fmt: skip
        backward.run(watch, resume=resume)
        return _with_gradients(source, rows, capture, backward, {**_about(rows, stream), **(settings or {})})
    saved = None if workdir is None else Saved(workdir, job)
    first = 0
    states = stream.embed(rows)
    try:
        if saved is not None and resume:
            first, stream.micro_rows = saved.restore(states, capture, stream.micro_rows)
        last_save = time.monotonic()
        total = len(stream.layers)
        watch(Progress("calibrate", first, total, tokens=rows.tokens()))
        for index in stream.run(rows, states, first=first, capture=capture):
            watch(Progress("calibrate", index + 1, total, tokens=rows.tokens()))
            if saved is not None and index + 1 < total and time.monotonic() - last_save >= save_every:
                saved.save(index + 1, states, capture, stream.rows_per_step(rows.ids.shape[1]))
                last_save = time.monotonic()
    finally:
        states.close()
    if saved is not None:
        saved.clear()
    domains = tuple(_domains(rows, capture))
    return Statistics(source.fingerprint, domains, {**_about(rows, stream), **(settings or {})})


def _domains(rows: Rows, capture: Capture) -> Iterator[Domain]:
    for name in dict.fromkeys(rows.domains):
        yield capture.domain(name, rows.fingerprint(name), rows.tokens(name))


def _about(rows: Rows, stream: Stream) -> dict[str, Any]:
    return {"seq_len": rows.ids.shape[1], "dtype": str(stream.skeleton.dtype).removeprefix("torch.")}


def _with_gradients(
    source: Source, rows: Rows, capture: Capture, backward: Backward, settings: dict[str, Any]
) -> Statistics:
    domains = []
    for domain in _domains(rows, capture):
        sums = backward.sums[domain.name]
        layers = {layer: {**named, **sums[layer]} for layer, named in domain.layers.items()}
        scored, loss = backward.scored[domain.name], backward.losses[domain.name]
        linears = dict(sorted(backward.linears.get(domain.name, {}).items()))
        domains.append(replace(domain, layers=layers, scored=scored, loss=loss, linears=linears))
    return Statistics(
        source.fingerprint, tuple(domains), {**settings, "labels": backward.labels, "seed": backward.seed}
    )


def _forget_interrupted(workdir: Path) -> None:
    """Removes what an interrupted pass of either kind left in a work folder, the small file that names it first."""
    if (workdir / STATE).exists():
        Saved(workdir, "").clear()
    forget_files(workdir / BACKWARD)


def _job(source: Source, rows: Rows, records: Sequence[Record], stream: Stream) -> str:
    """Digest of everything that the sums depend on; the size of the micro-batches is saved beside them."""
    parts = [
        source.fingerprint,
        rows.fingerprint(),
        repr(rows.domains),
        repr([record.name for record in records]),
        str(stream.skeleton.dtype),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Saved:
    """An interrupted pass on disk: hidden states, sums, and one small file, replaced last, that makes them valid."""

    def __init__(self, folder: Path, job: str):
        self.folder, self.job = folder, job

    @property
    def _state(self) -> Path:
        return self.folder / STATE

    def save(self, layer: int, states: HiddenStates, capture: Capture, micro_rows: int) -> None:
        """Makes ``layer`` the place to go on from, with the same micro-batches."""
        self.folder.mkdir(parents=True, exist_ok=True)
        states.save(self.folder / f"hidden-{layer}.bin")
        sums = tuple(Domain(name, (), 0, layers) for name, layers in capture.sums.items())
        Statistics(self.job, sums).save(self.folder / f"sums-{layer}.safetensors")
        temporary = self._state.with_suffix(".part")
        temporary.write_text(json.dumps({"job": self.job, "next_layer": layer, "micro_rows": micro_rows}))
        temporary.replace(self._state)
        self._forget(keep=layer)

    def restore(self, states: HiddenStates, capture: Capture, micro_rows: int | None) -> tuple[int, int | None]:
        """The layer to go on from and the rows per micro-batch; 0 and ``micro_rows`` if nothing was saved.

        Raises:
            MoezipError: what was saved is of another job, or damaged.
        """
        if not self._state.exists():
            return 0, micro_rows
        try:
            state = json.loads(self._state.read_text())
            job, layer, rows = str(state["job"]), int(state["next_layer"]), int(state["micro_rows"])
        except (ValueError, KeyError, TypeError) as fault:
            raise damaged(self._state) from fault
        if job != self.job:
            raise another_job(self.folder)
        try:
            states.restore(self.folder / f"hidden-{layer}.bin")
            sums = Statistics.load(self.folder / f"sums-{layer}.safetensors")
        except (OSError, StatisticsError) as fault:
            raise damaged(self.folder) from fault
        capture.sums = {domain.name: {i: dict(named) for i, named in domain.layers.items()} for domain in sums.domains}
        return layer, rows

    def _forget(self, keep: int | None) -> None:
        for pattern in ("hidden-*.bin", "sums-*.safetensors"):
            for file in self.folder.glob(pattern):
                if file.stem.rpartition("-")[2] != str(keep):
                    file.unlink()

    def clear(self) -> None:
        """Removes what was saved, and the folder if nothing else is in it."""
        self._state.unlink(missing_ok=True)
        self._forget(keep=None)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
