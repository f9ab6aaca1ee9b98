"""Writing: the identity gives the same bytes; whatever goes wrong leaves nothing that looks finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moezip.checkpoint import writer
from moezip.checkpoint.finite import all_finite
from moezip.checkpoint.reader import INDEX_NAME, Checkpoint
from moezip.checkpoint.source import TensorSpec
from moezip.checkpoint.writer import Staging
from moezip.errors import CheckpointError

SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


class Subset:
    """The source without some of its tensors: the simplest view that is not the identity."""

    def __init__(self, base: Checkpoint, dropped: Sequence[str] = ()):
        self._base, self._dropped = base, set(dropped)
        self.folder, self.config, self.fingerprint = base.folder, base.config, base.fingerprint

    def names(self) -> list[str]:
        return [name for name in self._base.names() if name not in self._dropped]

    def metadata(self, file: str) -> dict[str, str]:
        return self._base.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        whole = not any(self._base.spec(name).file == file for name in self._dropped)
        return self._base.raw_header(file) if whole else None

    def spec(self, name: str) -> TensorSpec:
        return self._base.spec(name)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        return self._base.read(name, rows)

    def chunks(self, name: str) -> Iterator[memoryview]:
        return self._base.chunks(name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three shards; the second has a header that no library writes: odd order, spaces, an escape, misaligned data."""
    path = tmp_path / "model"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(8, 4, generator=generator) for name in ("a", "b")}
    third = {"e": torch.randn(5, generator=generator).to(torch.bfloat16)}
    save_file(first, path / SHARDS[0], metadata={"format": "pt"})
    text = (
        b'{ "d":{"data_offsets":[6,8],"shape":[2],"dtype":"U8"},\n "\\u0063" : {"dtype":"BF16", "shape":[3,1],'
        b'"data_offsets":[0,6]}, "__metadata__":{"note":"by hand"}}   '
    )
    (path / SHARDS[1]).write_bytes(len(text).to_bytes(8, "little") + text + b"\0\1\2\3\4\5\6\7")
    save_file(third, path / SHARDS[2], metadata={"format": "pt"})
    # 2 x 8 x 4 floats of 4 bytes, 6 + 2 bytes by hand, 5 bf16 of 2 bytes: 256 + 8 + 10 = 274.
    weight_map = {"e": SHARDS[2], "d": SHARDS[1], "c": SHARDS[1], "b": SHARDS[0], "a": SHARDS[0]}
    index = {"weight_map": weight_map, "metadata": {"total_size": 274, "total_parameters": 74, "made_by": "hand"}}
    (path / INDEX_NAME).write_text(json.dumps(index, indent=1))
    (path / "config.json").write_text('{"model_type":   "made_up"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "LICENSE").write_text("do what you like")
    (path / "modeling_made_up.py").write_text("# code")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates/tool.jinja").write_text("{{ x }}")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(model: Path, out: Path, dropped: Sequence[str] = (), **options: Any) -> Staging:
    with Checkpoint.open(model) as source, Staging(out, source=model, **options) as staging:
        staging.write_tensors(Subset(source, dropped))
        staging.copy_side_files(model)
    return staging


def beside(out: Path) -> list[str]:
    """Everything in the parent folder that the writer made and did not publish."""
    return [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


# -- good runs ----------------------------------------------------------------------------------------------


def test_the_identity_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    staging = write(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)
    assert staging.digests == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents(tmp_path / "out").items()
    }
    assert beside(tmp_path / "out") == []


def test_a_single_file_stays_one_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    save_file({"a": torch.rand(3), "b": torch.rand(3)}, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    write(tmp_path / "m", tmp_path / "same")
    assert contents(tmp_path / "same") == contents(tmp_path / "m")
    write(tmp_path / "m", tmp_path / "less", ["a"])
    assert sorted(contents(tmp_path / "less")) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "less/model.safetensors").keys() == {"b"}


def test_dropping_tensors_keeps_the_partition(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "out", ["a", "d"])
    out = Checkpoint.open(tmp_path / "out")
    assert {name: out.spec(name).file for name in out.names()} == {"b": SHARDS[0], "c": SHARDS[1], "e": SHARDS[2]}
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_bytes())
    # b: 8 x 4 x 4 = 128 bytes, c: 6, e: 10.
    assert index["metadata"] == {"total_size": 144, "made_by": "hand"}
    assert out.metadata(SHARDS[1]) == {"note": "by hand"}
    source = Checkpoint.open(model)
    for name in out.names():
        assert b"".join(out.chunks(name)) == b"".join(source.chunks(name))
    assert (tmp_path / "out" / SHARDS[2]).read_bytes() == (model / SHARDS[2]).read_bytes()
    for file in SHARDS:
        assert len(out.raw_header(file)) % 8 == 0 or file == SHARDS[2]
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert set(opened.keys()) == {name for name in out.names() if out.spec(name).file == file}


def test_an_empty_shard_is_dropped_and_the_rest_renumbered(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "out", ["c", "d"])
    out = Checkpoint.open(tmp_path / "out")
    assert out.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert {name: out.spec(name).file for name in out.names()} == {
        "a": out.files[0],
        "b": out.files[0],
        "e": out.files[1],
    }
    # Headers do not hold the file's name, so the bytes of the untouched shards are the source's.
    assert (tmp_path / "out" / out.files[1]).read_bytes() == (model / SHARDS[2]).read_bytes()


def test_uneven_digit_counts_survive(tmp_path: Path) -> None:
    """DeepSeek's own names: model-00001-of-000163.safetensors."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    files = ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"]
    for file, name in zip(files, "ab"):
        save_file({name: torch.rand(2)}, tmp_path / "m" / file)
    index = {"metadata": {"total_size": 16}, "weight_map": dict(zip("ab", files))}
    (tmp_path / "m" / INDEX_NAME).write_text(json.dumps(index))
    write(tmp_path / "m", tmp_path / "same")
    assert contents(tmp_path / "same") == contents(tmp_path / "m")
    write(tmp_path / "m", tmp_path / "less", ["a"])
    assert Checkpoint.open(tmp_path / "less").files == ["model-00001-of-000001.safetensors"]


def test_a_wrong_total_size_is_corrected(model: Path, tmp_path: Path) -> None:
    index = json.loads((model / INDEX_NAME).read_bytes())
    index["metadata"]["total_size"] = 1
    (model / INDEX_NAME).write_text(json.dumps(index))
    write(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX_NAME).read_bytes())["metadata"]["total_size"] == 274


def test_side_files(model: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "old.pt", "old.PTH", "q.gguf", "m.onnx", "tf_model.h5", "flax.msgpack",
                 "consolidated.safetensors", "pytorch_model.bin.index.json"):  # fmt: skip
        (model / name).write_bytes(b"weights")
    for folder in ("moezip", ".git", ".cache", "original/moezip"):
        (model / folder).mkdir(parents=True)
        (model / folder / "x.json").write_text("{}")
    (tmp_path / "blob").write_text("linked")
    (model / "README.md").symlink_to(tmp_path / "blob")  # as the hub's cache has it
    with Staging(tmp_path / "out", source=model) as staging:
        staging.add("config.json", b"edited")
        copied = staging.copy_side_files(model, skip=["LICENSE"])
    expected = [
        "README.md",
        "additional_chat_templates/tool.jinja",
        "modeling_made_up.py",
        "original/moezip/x.json",
        "tokenizer.json",
    ]
    assert sorted(copied) == expected
    out = contents(tmp_path / "out")
    assert sorted(out) == sorted([*expected, "config.json"])
    assert out["config.json"] == b"edited" and out["README.md"] == b"linked"
    assert not (tmp_path / "out/README.md").is_symlink()


def test_progress_counts_the_tensors_bytes(model: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    with Checkpoint.open(model) as source, Staging(tmp_path / "out") as staging:
        staging.write_tensors(source, seen.append)
    assert sum(seen) == 274


def test_large_tensors_in_order(tmp_path: Path) -> None:
    """Several pieces per tensor: reading, hashing and writing overlap, and must not mix."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    save_file({"w": torch.arange(12_000_000, dtype=torch.int32)}, tmp_path / "m/model.safetensors")  # 48 MB
    staging = write(tmp_path / "m", tmp_path / "out")
    content = (tmp_path / "out/model.safetensors").read_bytes()
    assert content == (tmp_path / "m/model.safetensors").read_bytes()
    assert staging.digests["model.safetensors"] == hashlib.sha256(content).hexdigest()


# -- refusals -----------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match="output folder exists") as caught:
        write(model, tmp_path / "out", ["a"])
    assert "--overwrite" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="output folder exists"):
        write(model, tmp_path / "empty")
    assert contents(tmp_path / "out") == before and beside(tmp_path / "out") == []


def test_overwrite_replaces_the_whole_folder(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "out")
    (tmp_path / "out/stale.txt").write_text("of the old model")
    write(model, tmp_path / "out", ["a"], overwrite=True)
    assert "a" not in Checkpoint.open(tmp_path / "out").names()
    assert not (tmp_path / "out/stale.txt").exists() and beside(tmp_path / "out") == []


def test_overwrite_keeps_the_old_output_when_it_fails(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "out")
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "out", source=model, overwrite=True) as staging:
        staging.add("config.json", b"{}")
        _ = 1 / 0
    assert contents(tmp_path / "out") == contents(model) and beside(tmp_path / "out") == []


def test_overwrite_keeps_the_old_output_when_the_last_rename_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model, tmp_path / "out")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if "staging" in self.name and target.name == "out":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(model, tmp_path / "out", ["a"], overwrite=True)
    assert contents(tmp_path / "out") == contents(model) and beside(tmp_path / "out") == []


def test_overwrite_refuses_what_is_no_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="does not look like a model"):
        write(model, tmp_path / "home", overwrite=True)
    with pytest.raises(CheckpointError, match="is no folder"):
        write(model, tmp_path / "file", overwrite=True)
    assert (tmp_path / "home/thesis.tex").exists() and (tmp_path / "file").exists()


def test_never_writes_where_it_reads(model: Path, tmp_path: Path) -> None:
    before = contents(model)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "config.json").write_text("{}")  # so that the parent looks like a model
    paths = [
        model,
        model / "out",
        model / "a/b",
        tmp_path,
        tmp_path / "link",
        tmp_path / "link/out",
        model / "../model",
    ]
    for out in paths:
        with pytest.raises(CheckpointError, match="where the source is read"):
            write(model, out, overwrite=True)
    assert contents(model) == before and beside(model) == []


def test_too_little_space_is_said_before_writing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="5,000 bytes are needed, 1,000 are free"):
        write(model, tmp_path / "out", needed=5000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=273))
    with pytest.raises(CheckpointError, match="274 bytes are needed, 273 are free"):  # the tensors' own count
        write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and beside(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "."])
def test_names_that_leave_the_output(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="not a name inside"), Staging(tmp_path / "out") as staging:
        staging.add(name, b"")
    with pytest.raises(CheckpointError, match="twice"), Staging(tmp_path / "out") as staging:
        staging.add("a", b"")
        staging.add("a", b"")


NOT_FINITE = [
    (torch.float64, [float("nan")]), (torch.float32, [float("inf")]), (torch.float32, [float("-inf")]),
    (torch.float16, [float("nan")]), (torch.bfloat16, [float("-inf")]), (torch.bfloat16, [float("nan")]),
    (torch.float8_e4m3fn, [float("nan")]), (torch.float8_e5m2, [float("inf")]), (torch.float8_e8m0fnu, [float("nan")]),
    (torch.float8_e4m3fnuz, [float("nan")]), (torch.float8_e5m2fnuz, [float("nan")]),
    (torch.complex64, [complex(0, float("inf"))]),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bad"), NOT_FINITE)
def test_nan_and_infinity_are_refused_on_request(tmp_path: Path, dtype: torch.dtype, bad: list[complex]) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    # The largest finite numbers of either sign must pass.
    limits = torch.finfo(dtype if dtype != torch.complex64 else torch.float32)
    good = torch.tensor(
        [limits.max, limits.min if dtype != torch.float8_e8m0fnu else 1.0, 1.0], dtype=torch.float64
    ).to(dtype)
    tensors = {"good": good, "bad": torch.cat([good, torch.tensor(bad).to(dtype), good])}
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(CheckpointError, match="the tensor bad holds NaN or infinity"):
        write(tmp_path / "m", tmp_path / "out", check_finite=True)
    assert not (tmp_path / "out").exists()
    write(tmp_path / "m", tmp_path / "fine", ["bad"], check_finite=True)
    write(tmp_path / "m", tmp_path / "out")  # not asked for: a copy is a copy


def test_finiteness_does_not_depend_on_the_pieces() -> None:
    raw = memoryview(torch.tensor([1.0, 2.0, float("nan")]).numpy().tobytes())
    for size in range(1, 13):
        assert not all_finite("F32", (raw[i : i + size] for i in range(0, 12, size)))
        assert all_finite("F32", (raw[i : min(i + size, 8)] for i in range(0, 8, size)))


# -- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["reading", "after"])
def test_any_exception_leaves_nothing(
    model: Path, tmp_path: Path, error: type[BaseException], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunks(self: Subset, name: str) -> Iterator[memoryview]:
        if name == "d" and when == "reading":
            raise error
        return self._base.chunks(name)

    monkeypatch.setattr(Subset, "chunks", chunks)
    with pytest.raises(error), Checkpoint.open(model) as source, Staging(tmp_path / "out", source=model) as staging:
        staging.write_tensors(Subset(source))
        raise error
    assert not (tmp_path / "out").exists() and beside(tmp_path / "out") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    taken, real = 0, os.write

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal taken
        if taken + len(data) > 600:
            raise OSError(code, os.strerror(code))
        taken += len(data)
        return real(descriptor, data)

    with monkeypatch.context() as patched, pytest.raises(CheckpointError) as caught:
        patched.setattr(writer.os, "write", full)
        write(model, tmp_path / "out", needed=12_345)
    assert "the disk is full: the output needs 12,345 bytes" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "out").exists() and beside(tmp_path / "out") == []
    write(model, tmp_path / "out")


def test_a_truly_full_device(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own always-full device in place of one of the files."""
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    real = os.open

    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if str(path).endswith("2-of-00003.safetensors.part"):
            return real("/dev/full", os.O_WRONLY)
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(writer.os, "open", opened)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and beside(tmp_path / "out") == []


def test_short_writes_are_continued(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(writer.os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    write(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


def test_a_source_that_gives_too_little_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subset, "chunks", lambda self, name: iter([memoryview(b"xy")]))
    with pytest.raises(CheckpointError, match="a should take 128 bytes, but its source gave 2"):
        write(model, tmp_path / "out")


WRITE_THEN_HANG = """
import sys, time
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.writer import Staging

def hang(count):
    print("writing", flush=True)
    time.sleep(600)

source = Checkpoint.open(sys.argv[1])
with Staging(sys.argv[2], source=sys.argv[1], overwrite=True) as staging:
    staging.add("config.json", source.config_bytes)
    staging.write_tensors(source, hang)
"""


def start_and_wait(model: Path, out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITE_THEN_HANG, model, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_kill_during_write(model: Path, tmp_path: Path) -> None:
    process = start_and_wait(model, tmp_path / "out")
    try:
        (left,) = beside(tmp_path / "out")
        assert str(process.pid) in left
        # While the first lives, a second run neither harms it nor is kept from the same name.
        write(model, tmp_path / "out")
        assert beside(tmp_path / "out") == [left]
        shutil.rmtree(tmp_path / "out")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    assert beside(tmp_path / "out") == [left]
    with pytest.raises(CheckpointError):  # even its hidden folder does not pass for a model
        Checkpoint.open(tmp_path / left)
    write(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model) and beside(tmp_path / "out") == []


def test_kill_between_the_two_renames_loses_nothing(model: Path, tmp_path: Path) -> None:
    """The one moment when the old output is aside and the new one not yet there, made by hand."""
    write(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.moezip-old-123-0123abcd")
    with pytest.raises(CheckpointError, match="output folder exists"):
        write(model, tmp_path / "out", ["a"])
    assert contents(tmp_path / "out") == before and beside(tmp_path / "out") == []
    # With the new output in place, the old one is rubbish.
    shutil.copytree(tmp_path / "out", tmp_path / ".out.moezip-old-123-0123abcd")
    write(model, tmp_path / "out", ["a"], overwrite=True)
    assert beside(tmp_path / "out") == []


def test_only_our_own_leftovers_are_removed(model: Path, tmp_path: Path) -> None:
    others = [".out", ".out.moezip-staging", ".out.moezip-staging-1-xyz", ".out2.moezip-staging-1-0123abcd", ".config"]
    for name in others:
        (tmp_path / name).mkdir()
    write(model, tmp_path / "out")
    assert sorted(beside(tmp_path / "out")) == sorted(others)


def test_interrupt_from_the_keyboard(model: Path, tmp_path: Path) -> None:
    process = start_and_wait(model, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert not (tmp_path / "out").exists() and beside(tmp_path / "out") == []
