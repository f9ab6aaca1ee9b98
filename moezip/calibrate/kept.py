"""What a backward pass keeps on disk, and how an interrupted one is gone on with.

In one folder of its own: the input of every layer (``input-0.bin`` is the embeddings' output, the last one that of the
last layer), the ids that each MoE layer chose (``ids-3.bin``), the gradient (``gradient-8.bin``, named after the layer
whose input it first was of), and the sums at the last save. Beside the folder lies one small file, replaced last and
only after the rest is forced to disk: what it does not name is not trusted. A gradient that was saved is not written to
any more; the layers after it work on the next file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moezip.arch.spec import LayerFacts
from moezip.calibrate.choices import ids_dtype
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.statistics import Domain, Statistics
from moezip.errors import MoezipError, StatisticsError

if TYPE_CHECKING:
    import torch

STATE = "progress.json"
GRADIENT_ITEM = 4  # float32
_OURS = ("input-*.bin", "ids-*.bin", "gradient-*.bin", "sums-*.safetensors", ".sums-*.part")


def disk_bytes(tokens: int, hidden: int, itemsize: int, layers: int, facts: Iterable[LayerFacts]) -> int:
    """The most that a backward pass has on disk at one time: all inputs and the chosen ids, and two gradients.

    The last output goes when the first gradient is saved, and only then is there a second one.
    """
    chosen = sum(fact.top_k * ids_dtype(fact.experts).itemsize for fact in facts)
    return tokens * (hidden * (layers * itemsize + 2 * GRADIENT_ITEM) + chosen)


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a backward pass has come.

    Attributes:
        half: ``forward`` or ``backward``.
        next_layer: the layer that this half runs next; one past the last where the forward half is done.
        micro_rows, side_by_side: rows per micro-batch and how many of those ran at a time, which the last bits of sums
            depend on.
        gradient: name of the file with the gradient of the output of ``next_layer``; empty in the forward half.
        losses, scored: by domain, of the loss, which is summed between the halves.
    """

    half: str = "forward"
    next_layer: int = 0
    micro_rows: int = 0
    side_by_side: int = 1
    gradient: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    scored: Mapping[str, int] = field(default_factory=dict)

    def files(self, facts: Mapping[int, LayerFacts]) -> set[str]:
        """Names of the big files that are needed to go on."""
        chosen = {f"ids-{layer}.bin" for layer in facts if layer < self.next_layer + (self.half == "backward")}
        return {f"input-{layer}.bin" for layer in range(self.next_layer + 1)} | chosen | ({self.gradient} - {""})


class Kept:
    """The files of one backward pass.

    Args:
        folder: for the big files, nothing else is in it; the small one lies beside it.
        job: digest of everything that the sums depend on; empty if the pass is not to be resumed.
        shape: N, S, D. dtype: of the model.
        facts: the MoE layers.
    """

    def __init__(
        self,
        folder: Path,
        job: str,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        facts: Mapping[int, LayerFacts],
    ):
        self.folder, self.job, self._shape, self._dtype, self._facts = folder, job, shape, dtype, facts
        self._state = folder.parent / STATE
        self._fresh: dict[str, HiddenStates] = {}
        self.saved = Standing()

    @property
    def bytes(self) -> int:
        """What lies in the folder now."""
        return sum(file.stat().st_size for file in self._files())

    def input(self, layer: int, there: bool = False) -> HiddenStates:
        """Input of ``layer``, or the output of the last; made anew unless it is ``there``."""
        return self._open(f"input-{layer}.bin", self._shape, self._dtype, there)

    def ids(self, layer: int, there: bool = False) -> HiddenStates:
        """Chosen expert ids of a MoE layer, [N, S, k] in the smallest integers that hold them."""
        fact = self._facts[layer]
        return self._open(f"ids-{layer}.bin", (*self._shape[:2], fact.top_k), ids_dtype(fact.experts), there)

    def gradient(self, name: str, there: bool = False) -> HiddenStates:
        """A gradient file, [N, S, D] float32."""
        import torch

        return self._open(name, self._shape, torch.float32, there)

    def _open(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype, there: bool) -> HiddenStates:
        states = HiddenStates(shape, dtype, self.folder / name, there=there)
        if not there:
            self._fresh[name] = states
        return states

    def save(self, standing: Standing, sums: Sequence[Domain]) -> None:
        """Makes ``standing`` the place to go on from, and removes what is not needed from there on."""
        needed = standing.files(self._facts)
        for name in needed & self._fresh.keys():
            self._fresh[name].sync()
        file = self.folder / _sums_file(standing)
        Statistics(self.job, tuple(sums)).save(file)
        temporary = self._state.with_suffix(".part")
        temporary.write_text(json.dumps({"job": self.job, **asdict(standing)}))
        temporary.replace(self._state)
        self.saved = standing
        self._fresh = {}
        self._remove(keep={*needed, file.name})

    def restore(self) -> tuple[Standing, tuple[Domain, ...]] | None:
        """Where an interrupted pass stood, and its sums; None if nothing was saved.

        Raises:
            MoezipError: what was saved is of another job, or damaged.
        """
        if not self._state.exists():
            return None
        try:
            state = json.loads(self._state.read_text())
            job = state.pop("job")
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise damaged(self._state) from fault
        if job != self.job:
            raise another_job(self.folder.parent)
        try:
            standing = Standing(**state)
            for layer in range(standing.next_layer + 1):
                self.input(layer, there=True)
            for name in sorted(standing.files(self._facts)):
                if name.startswith("ids-"):
                    self.ids(int(name[4:-4]), there=True)
            if standing.gradient:
                self.gradient(standing.gradient, there=True)
            found = Statistics.load(self.folder / _sums_file(standing))
        except (TypeError, ValueError, StatisticsError) as fault:
            raise damaged(self.folder) from fault
        self.saved = standing
        # what was begun after the save may be half written
        self._remove(keep={*standing.files(self._facts), _sums_file(standing)})
        return standing, found.domains

    def _files(self) -> list[Path]:
        return [file for pattern in _OURS for file in self.folder.glob(pattern)]

    def _remove(self, keep: set[str]) -> None:
        for file in self._files():
            if file.name not in keep:
                file.unlink()

    def clear(self) -> None:
        """Removes everything, the small file first, and the folders if nothing else is in them."""
        if self.job:
            self._state.unlink(missing_ok=True)
            forget_files(self.folder)
        self._remove(keep=set())
        self.saved, self._fresh = Standing(), {}

    def forget_unsaved(self) -> None:
        """Removes what the last save does not need; everything if there was none."""
        if not self.saved.next_layer and not self.saved.gradient:
            self.clear()
        else:
            self._remove(keep={*self.saved.files(self._facts), _sums_file(self.saved)})


def forget_files(folder: Path) -> None:
    """Removes all files of backward passes from ``folder``; the folder and its parent too if they are then empty."""
    for pattern in _OURS:
        for file in folder.glob(pattern):
            file.unlink()
    for empty in (folder, folder.parent):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()


def _sums_file(standing: Standing) -> str:
    return f"sums-{standing.half}-{standing.next_layer}.safetensors"


def damaged(where: Path) -> MoezipError:
    """The error of an interrupted pass that cannot be gone on with."""
    return MoezipError(
        "what an interrupted pass left behind is damaged", where=where, next="start afresh without --resume"
    )


def another_job(where: Path) -> MoezipError:
    """The error of a work folder that belongs to something else."""
    return MoezipError(
        "the work folder holds an interrupted pass with another checkpoint, other data or other settings",
        where=where,
        next="repeat the interrupted command unchanged, or start afresh without --resume",
    )
