"""A streamed pass: spilled to disk, interrupted, short of memory, fed with damaged weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moezip.calibrate.data import Rows
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.record import BY_NAME, RECORDS
from moezip.calibrate.run import Saved, calibrate
from moezip.calibrate.statistics import Statistics
from moezip.calibrate.stream import BASE_BYTES, Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import MoezipError
from moezip.progress import Progress
from tests.tiny import token_ids

Tiny = Callable[..., Path]
LAYERS = 3


def rows_of(count: int = 5, length: int = 8, seed: int = 0) -> Rows:
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[1, :3] = False
    domains = ("a",) * (count - 2) + ("b",) * 2
    return Rows(token_ids(count, length, seed), mask, domains)


def file_bytes(stats: Statistics, file: Path) -> bytes:
    stats.save(file)
    return file.read_bytes()


def low_ceiling(source: Checkpoint) -> int:
    """Just enough for one layer: no hidden state fits beside it."""
    return BASE_BYTES + Stream(source).layer_bytes + 1


# -- hidden states on disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_in_a_file_are_the_same_numbers(dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    source, rows, work = Checkpoint.open(tiny("qwen3_moe", dtype=dtype)), rows_of(), tmp_path / "work"
    in_memory = calibrate(source, rows, RECORDS, micro_rows=2)
    sizes = []

    def look(_: Progress) -> None:
        sizes.append((work / "hidden.bin").stat().st_size)

    spilled = calibrate(
        source, rows, RECORDS, micro_rows=2, max_memory=low_ceiling(source), workdir=work, watch=look
    )  # fmt: skip
    # rows x tokens x hidden size x bytes
    assert sizes == [5 * 8 * 32 * getattr(torch, dtype).itemsize] * (LAYERS + 1)
    assert file_bytes(in_memory, tmp_path / "one") == file_bytes(spilled, tmp_path / "two")
    assert not work.exists()


def test_hidden_states_that_do_not_fit_ask_for_a_folder(tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    with pytest.raises(MoezipError, match=r"hidden states of 37 tokens take 0.00 GiB, 0.00 GiB are allowed") as caught:
        calibrate(source, rows_of(), RECORDS, max_memory=low_ceiling(source))
    assert "--workdir" in str(caught.value.next)


@pytest.mark.parametrize("in_file", [False, True], ids=["memory", "file"])
def test_hidden_states_keep_what_is_written(in_file: bool, tmp_path: Path) -> None:
    wanted = torch.randn(6, 3, 4).bfloat16()
    states = HiddenStates((6, 3, 4), torch.bfloat16, tmp_path / "deep" / "h.bin" if in_file else None)
    states.write(0, 4, wanted[:4])
    states.write(4, 6, wanted[4:])
    states.write(1, 2, wanted[1:2] * 2)
    wanted[1] *= 2
    assert torch.equal(states.read(0, 6), wanted)
    assert torch.equal(states.read(2, 5), wanted[2:5])
    assert states.bytes == 6 * 3 * 4 * 2
    states.save(tmp_path / "saved", step=4)
    assert (tmp_path / "saved").stat().st_size == states.bytes
    other = HiddenStates((6, 3, 4), torch.bfloat16)
    other.restore(tmp_path / "saved")
    assert torch.equal(other.read(0, 6), wanted)
    with pytest.raises(MoezipError, match="saved hidden states have 144 bytes, 96 were expected"):
        HiddenStates((4, 3, 4), torch.bfloat16).restore(tmp_path / "saved")
    states.close()
    assert not (tmp_path / "deep" / "h.bin").exists()


def test_a_full_disk_is_said_before_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(MoezipError, match=r"hidden states need .* GiB of disk, .* are free") as caught:
        HiddenStates((2, 2, 2), torch.float32, tmp_path / "h.bin")
    assert "--workdir" in str(caught.value.next)
    assert not list(tmp_path.iterdir())


# -- interrupted and resumed --------------------------------------------------------------------------------


class Interrupt:
    """A watcher that interrupts when ``done`` layers are done."""

    def __init__(self, done: int):
        self.done = done

    def __call__(self, progress: Progress) -> None:
        if progress.done == self.done:
            raise KeyboardInterrupt


def interrupted(source: Checkpoint, work: Path, done: int, **options: Any) -> None:
    options = {"micro_rows": 2, "save_every": 0.0, **options}
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, rows_of(), RECORDS, workdir=work, watch=Interrupt(done), **options)


@pytest.mark.parametrize("spilled", [False, True], ids=["memory", "spilled"])
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_an_interrupted_pass_goes_on_to_the_same_bytes(done: int, spilled: bool, tiny: Tiny, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("deepseek_v3")), tmp_path / "work"
    wanted = file_bytes(calibrate(source, rows_of(), RECORDS, micro_rows=2), tmp_path / "one")
    memory: dict[str, Any] = {"max_memory": low_ceiling(source)} if spilled else {}
    interrupted(source, work, done, **memory)
    # layer ``done`` was not saved any more: the interrupt came first
    left = sorted(path.name for path in work.iterdir()) if work.exists() else []
    number = done - 1
    assert left == ([f"hidden-{number}.bin", "progress.json", f"sums-{number}.safetensors"] if number > 0 else [])
    steps: list[int] = []
    memory = {**memory, "watch": lambda progress: steps.append(progress.done)}
    stats = calibrate(source, rows_of(), RECORDS, workdir=work, resume=True, micro_rows=2, **memory)
    assert steps == list(range(max(number, 0), LAYERS + 1))  # what was done is not done again
    assert file_bytes(stats, tmp_path / "two") == wanted
    assert not work.exists()


def test_twice_interrupted(tiny: Tiny, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    wanted = file_bytes(calibrate(source, rows_of(), RECORDS, micro_rows=2), tmp_path / "one")
    interrupted(source, work, 2)
    interrupted(source, work, 3, resume=True)
    assert (work / "hidden-2.bin").exists()
    stats = calibrate(source, rows_of(), RECORDS, workdir=work, resume=True)
    assert file_bytes(stats, tmp_path / "two") == wanted


@pytest.mark.parametrize("method", ["save", "_forget"])
def test_interrupted_while_saving(method: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the second save is cut short, before or after the small file that makes it valid
    source, work, calls = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work", []
    wanted = file_bytes(calibrate(source, rows_of(), RECORDS, micro_rows=2), tmp_path / "one")
    owner, name = (HiddenStates, "save") if method == "save" else (Saved, "_forget")
    original = getattr(owner, name)

    def cut(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            if method == "save":
                args[0].write_bytes(b"half")
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(owner, name, cut)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, rows_of(), RECORDS, workdir=work, micro_rows=2, save_every=0.0)
    assert len(list(work.glob("hidden-*.bin"))) == 2
    stats = calibrate(source, rows_of(), RECORDS, workdir=work, resume=True, save_every=0.0)
    assert file_bytes(stats, tmp_path / "two") == wanted
    assert not work.exists()


def test_resuming_keeps_the_micro_batches(tiny: Tiny, tmp_path: Path) -> None:
    # sums depend on them in the last bits, so the saved number wins over the one that memory suggests now
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    wanted = file_bytes(calibrate(source, rows_of(), RECORDS, micro_rows=2), tmp_path / "one")
    interrupted(source, work, 2)
    assert json.loads((work / "progress.json").read_text())["micro_rows"] == 2
    stats = calibrate(source, rows_of(), RECORDS, workdir=work, resume=True, micro_rows=5)
    assert file_bytes(stats, tmp_path / "two") == wanted


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_threads_repeat_themselves_and_resume(tiny: Tiny, tmp_path: Path, two_threads: None) -> None:
    source, work = Checkpoint.open(tiny("deepseek_v3")), tmp_path / "work"
    rows = Rows(token_ids(9, 40), None, ("a",) * 6 + ("b",) * 3)
    found = [file_bytes(calibrate(source, rows, RECORDS, micro_rows=2), tmp_path / f"{i}") for i in range(4)]
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, rows, RECORDS, micro_rows=2, workdir=work, watch=Interrupt(2), save_every=0.0)
    resumed = calibrate(source, rows, RECORDS, workdir=work, resume=True)
    assert {*found, file_bytes(resumed, tmp_path / "resumed")} == {found[0]}
    torch.set_num_threads(1)
    alone = calibrate(source, rows, RECORDS, micro_rows=2)
    for layer, named in alone.domains[1].layers.items():
        for name, sums in named.items():
            # one thread multiplies in other pieces: float32 rounding, through three layers
            other = Statistics.load(tmp_path / "0").domains[1].layers[layer][name]
            assert abs(sums - other).max() <= 5e-5 * abs(sums).max(), (layer, name)


def test_resuming_something_else_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    interrupted(source, work, 2)
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    plain, other_names = rows_of(), Rows(rows_of().ids, rows_of().mask, ("a",) * 5)
    others: list[tuple[Checkpoint, Rows, Any]] = [
        (source, rows_of(seed=1), RECORDS),
        (source, Rows(plain.ids, None, plain.domains), RECORDS),
        (source, other_names, RECORDS),
        (source, plain, [BY_NAME["counts"]]),
        (Checkpoint.open(tiny("qwen3_moe", seed=1)), plain, RECORDS),
    ]
    for checkpoint, rows, records in others:
        with pytest.raises(
            MoezipError, match="interrupted pass with another checkpoint, other data or other"
        ) as caught:
            calibrate(checkpoint, rows, records, workdir=work, resume=True)
        assert caught.value.where == str(work)
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_starting_afresh_does_not_mind_what_was_left(tiny: Tiny, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    interrupted(source, work, 2)
    other = calibrate(source, rows_of(seed=1), RECORDS, workdir=work, micro_rows=2)
    assert file_bytes(other, tmp_path / "one") == file_bytes(
        calibrate(source, rows_of(seed=1), RECORDS, micro_rows=2), tmp_path / "two"
    )
    assert not work.exists()


def test_files_of_others_stay_in_the_work_folder(tiny: Tiny, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    work.mkdir()
    (work / "mine.txt").write_text("keep")
    calibrate(source, rows_of(), RECORDS, workdir=work, save_every=0.0)
    assert [path.name for path in work.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("damage", ["cut hidden", "no hidden", "cut sums", "no sums", "progress", "empty progress"])
def test_a_damaged_work_folder_is_refused(damage: str, tiny: Tiny, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    interrupted(source, work, 2)
    how, what = damage.split() if " " in damage else ("cut", damage)
    names = {"hidden": "hidden-1.bin", "sums": "sums-1.safetensors", "progress": "progress.json"}
    file = work / names[what]
    if how == "no":
        file.unlink()
    else:
        file.write_bytes(b"{}" if how == "empty" else file.read_bytes()[:-3])
    with pytest.raises(MoezipError) as caught:
        calibrate(source, rows_of(), RECORDS, workdir=work, resume=True)
    assert "without --resume" in str(caught.value.next)


# -- weights that are not numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weights_name_their_layer(value: float, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny("qwen3_moe", shards=1), folder)
    file = folder / "model.safetensors"
    file.chmod(0o644)
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    seen: list[int] = []
    with pytest.raises(MoezipError, match="decoder layer 1 gives values that are not finite") as caught:
        calibrate(Checkpoint.open(folder), rows_of(), RECORDS, watch=lambda p: seen.append(p.done))
    assert seen == [0, 1]
    assert "moezip verify" in str(caught.value.next)


# -- memory -------------------------------------------------------------------------------------------------


def test_a_ceiling_below_one_layer_is_refused_with_numbers(tiny: Tiny) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    Stream(source, max_memory=low_ceiling(source))
    with pytest.raises(
        MoezipError,
        match=r"--max-memory 0\.59 GiB is less than one layer \(0\.00 GiB\) and the program itself \(0\.59 GiB\)",
    ) as caught:
        Stream(source, max_memory=low_ceiling(source) - 2)
    assert caught.value.next == "allow at least 0.59 GiB"


def crowded(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """A device that holds ``limit`` rows of a layer; the sizes that were tried."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

    original, tried = Qwen3MoeDecoderLayer.forward, []

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        tried.append(hidden_states.shape[0])
        if hidden_states.shape[0] > limit:
            raise torch.OutOfMemoryError("simulated")
        return original(self, hidden_states, *args, **options)

    monkeypatch.setattr(Qwen3MoeDecoderLayer, "forward", forward)
    return tried


def test_out_of_memory_halves_the_micro_batch(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, rows = Checkpoint.open(tiny("qwen3_moe")), Rows(token_ids(5, 8), None, ("a",) * 5)
    single = file_bytes(calibrate(source, rows, RECORDS, micro_rows=1), tmp_path / "one")
    tried = crowded(monkeypatch, 1)
    stats = calibrate(source, rows, RECORDS, micro_rows=5)
    # 5 fails; 0-2 fails: 1, 1; 2-5 fails: 1, and 3-5 fails: 1, 1; the next layers take one row at once
    assert tried == [5, 2, 1, 1, 3, 1, 2, 1, 1] + [1] * 5 * (LAYERS - 1)
    assert file_bytes(stats, tmp_path / "two") == single


def test_out_of_memory_with_one_row_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    crowded(monkeypatch, 0)
    with pytest.raises(MoezipError, match="one row of 8 tokens is too much for the memory of cpu") as caught:
        calibrate(source, rows_of(), RECORDS, micro_rows=2)
    assert "--seq-len" in str(caught.value.next)
    assert caught.value.where == "decoder layer 0"


def test_micro_batches_cross_no_domain(tiny: Tiny) -> None:
    names = ("a",) * 5 + ("b",) + ("c",) * 2
    stream = Stream(Checkpoint.open(tiny("qwen3_moe")), micro_rows=2)
    assert stream.steps(Rows(token_ids(8, 4), None, names)) == [(0, 2), (2, 4), (4, 5), (5, 6), (6, 8)]


CHILD = """
import sys
from pathlib import Path
import torch
from moezip.calibrate.data import Rows
from moezip.calibrate.record import RECORDS
from moezip.calibrate.run import calibrate
from moezip.calibrate.stream import BASE_BYTES, Stream
from moezip.checkpoint.reader import Checkpoint

source, budget = Checkpoint.open(Path(sys.argv[1])), 1 << 20
layer = Stream(source).layer_bytes
rows = Rows(torch.randint(4, 90, (64, 128)), None, ("text",) * 64)
ceiling = BASE_BYTES + layer + budget
stats = calibrate(source, rows, RECORDS, max_memory=ceiling, workdir=Path(sys.argv[2]))
# not ru_maxrss: that starts with the peak of the process that started this one
status = Path("/proc/self/status").read_text()
print(layer, ceiling, 1024 * int(status.split("VmHWM:")[1].split()[0]), stats.tokens)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_that_of_one_layer_whatever_the_depth(tmp_path: Path) -> None:
    # Layers of 24 MiB: 64 experts x 3 matrices x 128 x 512 x 2 bytes. The hidden states (64 x 128 x 128 x 2 = 2 MiB)
    # are over their budget of 1 MiB and go to a file.
    from tests.tiny import make

    found = []
    for layers in (3, 12):
        folder = make(
            "qwen3_moe", tmp_path / f"of {layers}", dtype="bfloat16", experts=64, layers=layers, hidden_size=128,
            moe_intermediate_size=512, tokenizer=False,
        )  # fmt: skip
        command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "work")]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        layer, ceiling, peak, tokens = map(int, run.stdout.split())
        assert tokens == 64 * 128
        assert 24 * 2**20 < layer < 25 * 2**20
        assert peak < ceiling
        found.append(peak)
    # nine more layers are 216 MiB more weights
    assert found[1] < 1.1 * found[0]
