"""Experts that stay on disk: the same model bit by bit, whatever the cache; never more in memory than it may hold."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moezip
from moezip.arch.families import ARCHITECTURES
from moezip.arch.ragged import RaggedExperts
from moezip.calibrate.experts import IMPLEMENTATION, register
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import ArchitectureError, CheckpointError, UsageError
from moezip.formats.packed import Grid, encode
from moezip.kernels import products
from moezip.pipeline.items import Item
from moezip.quantize.rtn import RtnParams
from moezip.quantize.rtn import solve as rtn
from moezip.runtime.linear import Packed
from moezip.runtime.paged import PagedExperts, RaggedPaged, packed_bytes
from moezip.runtime.pages import Pages, bytes_of
from tests.test_packed_runtime import MIX, UP, _put, all_alike, damaged, everything, foreign, packed
from tests.test_ragged import kept_of, ragged

Tiny = Callable[..., Path]
families = pytest.mark.parametrize("name", ARCHITECTURES)
# More than all experts of any tiny model.
ALL = 2**20
# bf16 has 8 bits, a result rounded to it is half a unit of the last one off. Where the experts of a call do not fit
# into the cache together, a layer's output is rounded once per part and once for the sum; three layers of k = 2 of
# these, at weights that make outputs larger than inputs. Of the logits' norm; 0.0075 was the worst of all families.
PARTS = 0.02


def logits(model: Any, rows: int = 3, length: int = 17) -> torch.Tensor:
    """Of random tokens: enough that every layer uses most of its experts."""
    ids = torch.randint(4, 90, (rows, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits  # type: ignore[no-any-return]


def in_memory(folder: Path) -> Any:
    """The other one, weights moved to aligned memory, as ``tests.test_laws.load`` explains."""
    model = moezip.load(folder)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    for module in model.modules():
        if isinstance(module, RaggedExperts):
            module.join()
    return model


def largest(model: Any) -> int:
    """Bytes of the largest expert: the smallest cache."""
    return max(m.size(e) for m in model.modules() if isinstance(m, PagedExperts) for e in range(m.num_experts))


# -- the same model ---------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_experts_on_disk_are_those_in_memory(name: str, dtype: str, tiny: Tiny) -> None:
    # torch rounds sigmoid otherwise behind the last whole 32 numbers, and gpt-oss applies its gate to the tokens of all
    # experts in one piece where they are in memory
    folder = tiny(name, dtype=dtype, **({"intermediate_size": 32} if name == "gpt_oss" else {}))
    wanted = logits(in_memory(folder))
    model = moezip.load(folder, experts="mmap", cache=ALL)
    assert torch.equal(logits(model), wanted)
    before = model.moezip_experts.stats()
    assert torch.equal(logits(model), wanted)  # from the cache now
    after = model.moezip_experts.stats()
    assert before.misses > 0 and before.evicted == 0
    assert (after.misses, after.bytes_read) == (before.misses, before.bytes_read) and after.hits > before.hits
    one = moezip.load(folder, experts="mmap", cache=largest(model))
    assert torch.equal(logits(one), wanted)
    assert one.moezip_experts.stats().experts == 1


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ragged_experts_on_disk_are_those_in_memory(name: str, dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(name, dtype=dtype)
    folder = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    wanted = logits(in_memory(folder))
    model = moezip.load(folder, experts="mmap", cache=ALL)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(moezip.load(folder, experts="mmap", cache=largest(model))), wanted)


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packed_experts_on_disk_are_those_in_memory(name: str, dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    """Bit by bit where the experts of a call fit into the cache together; else within ``PARTS``."""
    folder = packed(tiny(name, dtype=dtype), tmp_path)
    wanted = logits(in_memory(folder))
    model = moezip.load(folder, experts="mmap", cache=ALL)
    assert torch.equal(logits(model), wanted)
    one = moezip.load(folder, experts="mmap", cache=largest(model))
    token = torch.tensor([[5]])
    with torch.inference_mode():
        alone, both = one(token).logits, model(token).logits
    assert float((alone - both).norm() / both.norm()) <= (PARTS if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_packed_experts_without_kernels(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Decoded one by one: then a cache of one is enough for the same bits."""
    monkeypatch.setattr(products, "available", lambda: False)
    folder = packed(tiny(name, dtype="bfloat16"), tmp_path)
    wanted = logits(in_memory(folder))
    model = moezip.load(folder, experts="mmap", cache=ALL)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(moezip.load(folder, experts="mmap", cache=largest(model))), wanted)


@pytest.mark.parametrize(("name", "stored"), [("deepseek_v3", "fp8"), ("gpt_oss", "mxfp4")])
def test_stored_quantization_is_decoded_as_it_is_read(name: str, stored: str, tiny: Tiny) -> None:
    folder = tiny(name, dtype="bfloat16", stored=stored)
    model = moezip.load(folder, experts="mmap", cache=ALL)
    assert torch.equal(logits(model), logits(in_memory(folder)))


def test_codes_of_compressed_tensors_stay_packed(tiny: Tiny, tmp_path: Path) -> None:
    folder = foreign(tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "foreign", experts_on_four)
    model = moezip.load(folder, experts="mmap", cache=ALL)
    assert any(isinstance(module, RaggedPaged) for module in model.modules())
    assert torch.equal(logits(model), logits(in_memory(folder)))


def test_int8_activations_reach_experts_and_linears(tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path, all_alike, everything)
    model = moezip.load(folder, experts="mmap", cache=ALL, activations="int8")
    wanted = logits(moezip.load(folder, activations="int8"))
    assert torch.equal(logits(model), wanted)
    assert not torch.equal(wanted, logits(moezip.load(folder)))


def test_the_implementation_of_skipping_and_its_nobody(tiny: Tiny) -> None:
    """Tokens sent to nobody get nothing; products are those of moezip's implementation for experts in memory."""
    folder = tiny("gpt_oss", dtype="float32")
    stock, model = in_memory(folder), moezip.load(folder, experts="mmap", cache=ALL)
    for each in (stock, model):
        each.config._experts_implementation = register()
    assert model.model.layers[0].mlp.experts.config._experts_implementation == IMPLEMENTATION
    assert torch.equal(logits(stock), logits(model))
    experts = model.model.layers[0].mlp.experts
    hidden, gates = torch.randn(2, 32), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert torch.equal(experts(hidden, torch.full((2, 2), experts.nobody), gates), torch.zeros(2, 32))


def test_generates_with_cache_batches_and_padding(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("qwen3_moe", dtype="bfloat16")
    ids = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]])
    given = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for folder in (plain, packed(plain, tmp_path)):
        wanted = in_memory(folder).generate(ids, **given)
        model = moezip.load(folder, experts="mmap", cache=ALL)
        assert torch.equal(model.generate(ids, **given), wanted)


def test_two_threads_share_a_cache_of_one_expert(tiny: Tiny) -> None:
    folder = tiny("mixtral", dtype="float32")
    model = moezip.load(folder, experts="mmap", cache=ALL)
    wanted, one = logits(model), moezip.load(folder, experts="mmap", cache=largest(model))
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(logits(one))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(each, wanted) for each in found)
    assert one.moezip_experts.stats().most_held <= largest(model)


# -- the cache --------------------------------------------------------------------------------------------------------


class Counted:
    """In place of the files."""

    bytes_read = 0


def test_a_cache_by_hand() -> None:
    pages = Pages(3, Counted())  # type: ignore[arg-type]
    read: list[tuple[int, int]] = []

    def use(layer: int, expert: int, size: int = 1, keep: tuple[int, ...] = ()) -> None:
        pages.lend((layer, expert), size, lambda: read.append((layer, expert)), keep)

    use(0, 0)
    use(0, 1)
    use(0, 0)  # a hit; expert 1 is the oldest of layer 0 now
    use(1, 5)  # full: two of layer 0, one of layer 1
    use(1, 6)  # both layers would hold two: the one that reads gives up its own, expert 5
    assert pages.held_first(1, [5, 6]) == [6, 5] and pages.held_first(0, [2, 1, 0]) == [1, 0, 2]
    use(2, 9)  # nothing of layer 2 is there; layer 0 holds most and gives up expert 1, its oldest
    assert pages.held_first(0, [1, 0]) == [0, 1]
    stats = pages.stats()
    assert (stats.hits, stats.misses, stats.evicted, stats.held, stats.experts) == (1, 5, 2, 3, 3)
    assert stats.hit_rate == 1 / 6
    assert read == [(0, 0), (0, 1), (1, 5), (1, 6), (2, 9)]
    use(1, 7, 2, keep=(6,))  # of layer 1 nothing may go, so two others do
    assert pages.held_first(1, [7, 6]) == [7, 6] and pages.stats().held == 3
    with pytest.raises(UsageError, match="no room"):
        use(1, 8, 1, keep=(6, 7))
    pages.clear()
    assert pages.stats().held == 0


def test_what_is_held_and_read_is_what_was_used(tiny: Tiny) -> None:
    # one expert is 3 x 16 x 32 numbers of 2 bytes = 3072; a token uses 2 of them in each of 3 layers
    model = moezip.load(tiny("qwen3_moe", dtype="bfloat16"), experts="mmap", cache=4 * 3072)
    pages = model.moezip_experts
    assert pages.stats().bytes_read == pages.stats().held == 0
    with torch.inference_mode():
        model(torch.tensor([[5]]))
    stats = pages.stats()
    assert (stats.hits, stats.misses, stats.bytes_read) == (0, 6, 6 * 3072)
    assert (stats.held, stats.evicted, stats.limit) == (4 * 3072, 2, 4 * 3072)
    assert "0.0% of 6 uses" in str(stats)
    logits(model)
    assert pages.stats().most_held == 4 * 3072
    pages.reset_stats()
    assert pages.stats().misses == 0 and pages.stats().held == 4 * 3072


@pytest.mark.parametrize("grid", [each for each in MIX if each is not None], ids=str)
def test_codes_take_no_more_than_is_counted(grid: Grid) -> None:
    tensors = encode(rtn(torch.randn(21, 48), None, grid, RtnParams()).codes)
    matrix = Packed(grid, 21, 48, None, torch.device("cpu"))
    assert packed_bytes(matrix) >= sum(tensor.nbytes for tensor in tensors.values())
    for suffix, tensor in tensors.items():
        matrix._buffers[suffix] = tensor
    if matrix.lay_out():
        assert matrix.matrix is not None and matrix.matrix.laid.nbytes <= packed_bytes(matrix)


def test_sizes_as_text() -> None:
    assert bytes_of("2GiB") == 2 * 2**30 and bytes_of("1.5 MB") == 1_500_000 and bytes_of(7) == bytes_of("7") == 7
    for bad in ("2 parsecs", "", "-1", True):
        with pytest.raises(UsageError, match="is no size"):
            bytes_of(bad)


# -- refusals and damage ----------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", dtype="bfloat16")
    with pytest.raises(UsageError, match="3071 bytes does not hold one expert, which takes up to 3072"):
        moezip.load(folder, experts="mmap", cache=3071)
    with pytest.raises(UsageError, match="not 'disk'"):
        moezip.load(folder, experts="disk")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cache is for experts on disk"):
        moezip.load(folder, cache=ALL)
    with pytest.raises(UsageError, match="CPU"):
        moezip.load(folder, experts="mmap", device="cuda")
    model = moezip.load(folder, experts="mmap", cache=ALL)
    for save in (lambda: model.save_pretrained(tmp_path / "out"), model.state_dict):
        with pytest.raises(CheckpointError, match="on disk"):
            save()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArchitectureError, match="the experts are read as"):
        logits(model.float())


@pytest.mark.parametrize("how", ["truncated", "rewritten", "replaced", "gone"])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_changed_shard_is_detected(how: str, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    plain = tiny("qwen3_moe", dtype="bfloat16", shards=1)
    shutil.copytree(plain if kind == "plain" else packed(plain, tmp_path / "p"), folder)
    shard = folder / "model.safetensors"
    shard.chmod(0o644)
    model = moezip.load(folder, experts="mmap", cache=ALL)
    with torch.inference_mode():
        model(torch.tensor([[5]]))
    model.moezip_experts.clear()
    data = shard.read_bytes()
    if how == "truncated":
        os.truncate(shard, len(data) - 1)
    elif how == "rewritten":  # in place, as many bytes
        with shard.open("r+b") as stream:
            stream.write(data)
        os.utime(shard, ns=(1, 1))
    else:
        shard.unlink()
        if how == "replaced":
            shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot read the shard" if how == "gone" else "changed since"):
        logits(model)


def test_corrupt_codes_are_found_when_they_are_read(tiny: Tiny, tmp_path: Path) -> None:
    folder = packed(tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "good", experts_on_four, everything)
    bad = damaged(folder, tmp_path / "bad", UP + "weight_scale", _put(float("nan")))
    model = moezip.load(bad, experts="mmap", cache=ALL)
    with pytest.raises(CheckpointError, match="not a positive number"):
        logits(model)


def experts_on_four(items: list[Item]) -> dict[str, Grid]:
    return {item.name: Grid(4, 8) for item in items if item.expert is not None}
