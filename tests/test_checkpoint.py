"""Reading: agreement with the reference library on good files, one clear error for every kind of bad file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moezip.checkpoint import reader
from moezip.checkpoint.header import LARGEST_HEADER, build_header
from moezip.checkpoint.reader import INDEX_NAME, Checkpoint
from moezip.errors import CheckpointError

EVERY_DTYPE = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bits (``==`` would call NaN different)."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def folder_with(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "made_up"}')
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def sharded(path: Path, shards: list[dict[str, torch.Tensor]]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "made_up"}')
    weight_map, total = {}, 0
    for i, tensors in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(path, weight_map, total)
    return path


def write_index(path: Path, weight_map: dict[str, Any], total: int = 0) -> None:
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def by_hand(path: Path, header: dict[str, Any] | str, data: bytes = b"", length: int | None = None) -> Path:
    """A checkpoint whose only file has exactly this header."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    (path / "model.safetensors").write_bytes(prefix + text + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return str(caught.value)


# -- good files ---------------------------------------------------------------------------------------------


def test_every_dtype_and_odd_shapes_round_trip(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 7), "one": torch.ones(1)}
    for dtype in EVERY_DTYPE:
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (5, 3 * dtype.itemsize), generator=generator)
        tensors[str(dtype)] = raw.to(torch.uint8).view(dtype).view(5, 3)
    with Checkpoint.open(folder_with(tmp_path / "m", tensors)) as checkpoint:
        assert set(checkpoint.names()) == set(tensors)
        for name, tensor in tensors.items():
            assert same(checkpoint.read(name), tensor), name
            assert checkpoint.spec(name).shape == tuple(tensor.shape)
            assert checkpoint.spec(name).bytes == tensor.nbytes
            assert b"".join(checkpoint.chunks(name)) == bits(tensor)
        assert checkpoint.metadata("model.safetensors") == {"format": "pt"}


def test_rows(tmp_path: Path) -> None:
    tensor = torch.arange(2 * 3 * 7).view(7, 2, 3).to(torch.bfloat16)
    checkpoint = Checkpoint.open(folder_with(tmp_path / "m", {"w": tensor, "s": torch.tensor(1.0)}))
    for rows in (range(0, 7), range(2, 5), range(6, 7), range(3, 3), range(7, 7)):
        assert same(checkpoint.read("w", rows), tensor[rows.start : rows.stop])
    for name, rows in (("w", range(0, 8)), ("w", range(-1, 3)), ("w", range(0, 6, 2)), ("s", range(0, 1))):
        with pytest.raises(CheckpointError, match="has no rows"):
            checkpoint.read(name, rows)


def test_read_gives_fresh_memory(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path / "m", {"w": torch.ones(4)}))
    checkpoint.read("w").zero_()
    assert checkpoint.read("w").sum() == 4


def test_shards(tmp_path: Path) -> None:
    shards = [{"b": torch.rand(3), "a": torch.rand(2, 2)}, {"c": torch.rand(1)}]
    with Checkpoint.open(sharded(tmp_path / "m", shards)) as checkpoint:
        assert checkpoint.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert checkpoint.spec("c").file == checkpoint.files[1]
        for tensors in shards:
            for name, tensor in tensors.items():
                assert same(checkpoint.read(name), tensor)


def test_names_follow_the_bytes_not_the_header(tmp_path: Path) -> None:
    header = {"late": entry(3, 5), "early": entry(0, 3), "last": entry(5, 6)}
    checkpoint = Checkpoint.open(by_hand(tmp_path / "m", header, b"abcdef"))
    assert checkpoint.names() == ["early", "late", "last"]
    assert b"".join(checkpoint.chunks("late")) == b"de"
    assert checkpoint.raw_header("model.safetensors") + b"abcdef" == (tmp_path / "m/model.safetensors").read_bytes()


def test_the_only_file_may_have_any_name(tmp_path: Path) -> None:
    folder_with(tmp_path / "m", {"w": torch.ones(1)})
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/weights.safetensors")
    assert Checkpoint.open(tmp_path / "m").files == ["weights.safetensors"]


def test_four_bit_floats_can_be_copied_but_not_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(by_hand(tmp_path / "m", {"w": entry(0, 2, [4], "F4")}, b"xy"))
    assert b"".join(checkpoint.chunks("w")) == b"xy"
    with pytest.raises(CheckpointError, match="F4"):
        checkpoint.read("w")


def test_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    def fingerprint(config: str, name: str, value: float, at: int = 0) -> str:
        weight = torch.zeros(100_000)  # 400 kB, more than is fingerprinted
        weight[at] = value
        folder_with(tmp_path / "m", {name: weight})
        (tmp_path / "m/config.json").write_text(config)
        return Checkpoint.open(tmp_path / "m").fingerprint

    first = fingerprint("{}", "w", 1.0)
    assert first == fingerprint("{}", "w", 1.0)
    assert len({first, fingerprint("{ }", "w", 1.0), fingerprint("{}", "v", 1.0), fingerprint("{}", "w", 2.0)}) == 4
    # 64 KiB are 16,384 floats: what lies behind them is not looked at (8.12).
    assert fingerprint("{}", "w", 0.0) == fingerprint("{}", "w", 1.0, at=16_384)
    assert fingerprint("{}", "w", 0.0) != fingerprint("{}", "w", 1.0, at=16_383)


def test_threads_share_a_checkpoint(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((1000,), float(i)) for i in range(40)}
    names = list(tensors) * 5
    with Checkpoint.open(folder_with(tmp_path / "m", tensors)) as checkpoint, ThreadPoolExecutor(8) as pool:
        for name, tensor in zip(names, pool.map(checkpoint.read, names)):
            assert same(tensor, tensors[name])


def test_importing_needs_no_torch() -> None:
    code = "import sys, moezip.checkpoint.reader, moezip.checkpoint.writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_big_read_in_chunks_takes_little_memory(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    size = 256 << 20
    with (tmp_path / "m/model.safetensors").open("wb") as stream:
        text = json.dumps({"w": entry(0, size)}).encode()
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + size)  # a hole: no disk is used
    code = (
        "import resource, sys\n"
        "from moezip.checkpoint.reader import Checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "checkpoint = Checkpoint.open(sys.argv[1])\n"
        "before = peak()\n"
        "assert sum(len(piece) for piece in checkpoint.chunks('w')) == 256 << 20\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    # Two pieces of 8 MiB may be alive at once (the next is read before the last is dropped); ru_maxrss is in KiB.
    # A mapped file would show all 256 MiB.
    assert int(done.stdout) < 32 << 10


# -- bad files ----------------------------------------------------------------------------------------------


def test_not_a_checkpoint(tmp_path: Path) -> None:
    assert "no such folder" in error_of(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "is a file" in error_of(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in error_of(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    assert "has no weights" in error_of(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("\xff", "UTF-8"),
    ],
)
def test_bad_config(tmp_path: Path, text: str, message: str) -> None:
    folder_with(tmp_path / "m", {"w": torch.ones(1)})
    (tmp_path / "m/config.json").write_bytes(text.encode("latin-1"))
    assert message in error_of(tmp_path / "m")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_reason_and_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80")
    message = error_of(tmp_path)
    assert name in message and "can run code" in message and "safe_serialization=True" in message


BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "not json": ("nonsense", "not valid JSON"),
    "not an object": ("[1]", "not a JSON object"),
    "deeply nested": ("[" * 100_000, "not valid JSON"),
    "duplicate tensor": ('{"w": %s, "w": %s}' % ((json.dumps(entry(0, 4)),) * 2), "'w' appears twice"),
    "duplicate field": ('{"w": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}', "appears twice"),
    "entry is no object": ({"w": 3}, "expected exactly dtype, shape and data_offsets"),
    "field missing": ({"w": {"dtype": "U8", "shape": [4]}}, "expected exactly"),
    "field too many": ({"w": {**entry(0, 4), "extra": 1}}, "expected exactly"),
    "unknown dtype": ({"w": entry(0, 4, dtype="U7")}, "unknown dtype 'U7'"),
    "dtype no string": ({"w": entry(0, 4, dtype=[])}, "unknown dtype"),
    "negative size": ({"w": entry(0, 4, [-4, -1])}, "non-negative"),
    "size is a float": ({"w": entry(0, 4, [4.0])}, "non-negative"),
    "size is a boolean": ({"w": entry(0, 4, [4, True])}, "non-negative"),
    "size beyond any file": ({"w": entry(0, 4, [1 << 63, 0])}, "non-negative"),
    "shape is a number": ({"w": entry(0, 4, 4)}, "non-negative"),
    "too many axes": ({"w": entry(0, 4, [4] + [1] * 64)}, "at most 64"),
    "product overflows": ({"w": entry(0, 4, [1 << 61] * 60)}, "takes"),
    "offsets fall": ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, "rising"),
    "three offsets": ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, "rising"),
    "negative offset": ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, "rising"),
    "shape and bytes": ({"w": entry(0, 4, [3])}, "takes 24 bits, but its offsets span 4 bytes"),
    "half a byte": ({"w": entry(0, 4, [7], "F4")}, "takes 28 bits"),
    "overlap": ({"v": entry(0, 3), "w": entry(2, 4)}, "w at bytes 2:4 overlaps v, which ends at 3"),
    "same bytes twice": ({"v": entry(0, 4), "w": entry(0, 4)}, "overlaps"),
    "hole": ({"v": entry(0, 1), "w": entry(2, 4)}, "leaves a hole after v, which ends at 1"),
    "hole at the start": ({"w": entry(1, 4)}, "leaves a hole after the start"),
    "offsets outside the file": ({"w": entry(0, 5)}, "truncated"),
    "bytes of no tensor": ({"w": entry(0, 3)}, "belong to no tensor"),
    "metadata is no object": ({"__metadata__": [], "w": entry(0, 4)}, "__metadata__"),
    "metadata holds numbers": ({"__metadata__": {"a": 1}, "w": entry(0, 4)}, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header(tmp_path: Path, case: str) -> None:
    header, message = BAD_HEADERS[case]
    path = by_hand(tmp_path / "m", header, b"data")
    assert message in (text := error_of(path))
    assert str(path / "model.safetensors") in text


@pytest.mark.parametrize("length", [1 << 63, LARGEST_HEADER + 1, 1000, 15])
def test_lying_header_length(tmp_path: Path, length: int) -> None:
    # The file has 8 + 2 + 4 = 14 bytes, so that no header longer than 6 bytes can be in it.
    path = by_hand(tmp_path / "m", "{}", b"data", length)
    assert f"claims a length of {length} bytes, but the file has 14" in error_of(path)


def test_file_shorter_than_the_prefix(tmp_path: Path) -> None:
    by_hand(tmp_path / "m", "{}")
    (tmp_path / "m/model.safetensors").write_bytes(b"\1\2\3")
    assert "truncated" in error_of(tmp_path / "m")


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m", [{"a": torch.rand(10)}, {"b": torch.rand(10)}, {"c": torch.rand(10)}])
    second = path / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    message = error_of(path)
    assert str(second) in message and f"describes {len(whole)} bytes, found {len(whole) - 1}" in message
    second.unlink()
    assert "1 of 3 shards missing: model-00002-of-00003.safetensors" in error_of(path)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m", [{"a": torch.rand(1)}, {"b": torch.rand(1)}])
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(path, {"a": first, "b": first, "c": second})
    assert f"says that b is in {first}, but that shard does not hold it" in error_of(path)
    write_index(path, {"a": first, "c": second})
    assert "does not hold it" in error_of(path)
    save_file({"b": torch.rand(1), "d": torch.rand(1)}, path / second)
    write_index(path, {"a": first, "b": second})
    assert f"{second} holds d, but the index does not know it" in error_of(path)
    save_file({"b": torch.rand(1), "a": torch.rand(1)}, path / second)
    assert f"{second} holds a, but the index says that it is in {first}" in error_of(path)
    (path / INDEX_NAME).write_text("{}")
    assert "no weight_map" in error_of(path)


@pytest.mark.parametrize(
    "name",
    ["/etc/x.safetensors", "../m/a.safetensors", "..", "sub/a.safetensors", "sub\\a.safetensors", "a.bin",
     "C:a.safetensors", ".hidden.safetensors", "a\0.safetensors", 3, None, ["a.safetensors"]],
)  # fmt: skip
def test_shard_names_that_leave_the_folder(tmp_path: Path, name: Any) -> None:
    path = sharded(tmp_path / "m", [{"a": torch.rand(1)}])
    write_index(path, {"a": name})
    assert "not the bare name" in error_of(path)


def test_several_files_without_an_index_or_two_sets(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m", [{"a": torch.rand(1)}, {"b": torch.rand(1)}])
    save_file({"a": torch.rand(1)}, path / "model.safetensors")
    assert "two sets of weights" in error_of(path)
    (path / "model.safetensors").unlink()
    (path / INDEX_NAME).unlink()
    assert "2 safetensors files but no model.safetensors.index.json" in error_of(path)


def test_a_file_that_changes_after_opening(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "m", {"w": torch.ones(100_000)})
    before = Checkpoint.open(path)
    reading = Checkpoint.open(path)
    pieces = iter(reading.chunks("w"))
    reading.read("w")  # opens the file
    size = (path / "model.safetensors").stat().st_size
    with (path / "model.safetensors").open("r+b") as stream:
        stream.truncate(size - 4)
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        before.read("w")
    with pytest.raises(CheckpointError, match=r"ended early: expected 400000 bytes .* found 399996"):
        next(pieces)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.rand(1000)
    path = folder_with(tmp_path / "m", {"w": tensor})
    preadv = reader.os.preadv
    monkeypatch.setattr(reader.os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    assert same(Checkpoint.open(path).read("w"), tensor)


def test_unknown_tensor_and_closed_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path / "m", {"w": torch.ones(1)}))
    for call in (checkpoint.spec, checkpoint.read):
        with pytest.raises(CheckpointError, match="no tensor v"):
            call("v")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("w")


@pytest.mark.parametrize("flip", range(0, 120, 3))
def test_a_damaged_header_is_an_error_or_a_true_checkpoint(tmp_path: Path, flip: int) -> None:
    """No single wrong byte in prefix or header makes anything but our error, or a file that still adds up."""
    path = folder_with(tmp_path / "m", {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8)})
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    for value in (0, 0x22, 0x30, 0x39, 0x7D, content[flip] ^ 1, 0xFF):
        file.write_bytes(content[:flip] + bytes([value]) + content[flip + 1 :])
        try:
            checkpoint = Checkpoint.open(path)
        except CheckpointError:
            continue
        assert sum(checkpoint.read(name).nbytes for name in checkpoint.names()) == 28  # 6 floats and 4 bytes


def test_built_headers_are_read_by_the_reference_library(tmp_path: Path, make_specs: Callable[..., Any]) -> None:
    from safetensors import safe_open

    specs = make_specs()
    header = build_header(specs, {"format": "pt", "é": "ü"})
    assert len(header) % 8 == 0 and int.from_bytes(header[:8], "little") == len(header) - 8
    (tmp_path / "x.safetensors").write_bytes(header + bytes(sum(spec.bytes for spec in specs)))
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "é": "ü"}
        names = opened.keys()
        assert {name: tuple(opened.get_tensor(name).shape) for name in names} == {s.name: s.shape for s in specs}


@pytest.fixture
def make_specs() -> Callable[..., Any]:
    from moezip.checkpoint.source import TensorSpec

    return lambda: [
        TensorSpec("b", "BF16", (3, 5), "x.safetensors"),
        TensorSpec("ä", "F32", (2,), "x.safetensors"),
        TensorSpec("empty", "F32", (0,), "x.safetensors"),
        TensorSpec("scalar", "I64", (), "x.safetensors"),
    ]
