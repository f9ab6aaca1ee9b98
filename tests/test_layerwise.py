"""Layerwise quantization: what is looked at, what is put in its place, and what is left to go on from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.experts import decoded
from moezip.arch.packing import folded, unfolded
from moezip.calibrate.data import Rows
from moezip.calibrate.linears import layer_linears
from moezip.calibrate.moments import expert_inputs, linear_moments, second_moment
from moezip.calibrate.stream import Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import ArchitectureError, MoezipError
from moezip.formats.packed import Grid
from moezip.pipeline.common import opened
from moezip.pipeline.items import items_of
from moezip.pipeline.layerwise import Layerwise
from moezip.pipeline.solved import Solved
from moezip.pipeline.widths import uniform
from moezip.plan.apply import Applied
from moezip.plan.packed import LayerFiles, Packed
from moezip.plan.plan import Plan
from moezip.quantize.rtn import RtnParams
from moezip.quantize.rtn import solve as rtn
from moezip.quantize.settings import StorageParams
from tests.tiny import FAMILIES, token_ids

Tiny = Callable[..., Path]
# float32 sums over 40 tokens in another order.
SUM_TOLERANCE = 1e-4


def rows_of(count: int = 5, length: int = 8) -> Rows:
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[1, 5:] = False  # padding at the end, which nothing before it sees
    return Rows(token_ids(count, length, 0), mask, ("a",) * count)


def plain_rtn(weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> Any:
    return rtn(weight, hessian, grid, RtnParams())


def packing_for(folder: Path, bits: int = 4, **storage: Any) -> tuple[Any, Any, Any, dict[str, Grid]]:
    """The model, its plain tensors, the same with one tensor per expert and matrix, and a packing."""
    model = opened(str(folder))
    plain = decoded(model.source)
    plan = replace(Plan.identity(model.source.fingerprint, model.architecture.name, model.facts), mtp="drop")
    split = Applied(plain, plan, split=True)
    packing, _ = uniform(items_of(split, model), bits, 8, StorageParams(scale="F16", **storage))
    return model, plain, split, packing


def logits(source: Any, rows: Rows) -> torch.Tensor:
    stream = Stream(source, micro_rows=2)
    states = stream.embed(rows)
    for _ in stream.run(rows, states):
        pass
    stream.load_head()
    return torch.stack(
        [stream.logits(rows, states, 0, torch.arange(8)), stream.logits(rows, states, 4, torch.arange(8))]
    )


# -- what is looked at --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_real_inputs(family: str, tiny: Tiny) -> None:
    stream, rows = Stream(Checkpoint.open(tiny(family, dtype="float32")), micro_rows=2), rows_of()
    if family == "gpt_oss" or family == "jamba":  # sliding windows and state spaces see padding as they like
        rows = Rows(rows.ids, None, rows.domains)
    states = stream.embed(rows)
    stream.load_layer(0)
    linears = {path: module for path, _, module in layer_linears(stream, 0)}
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in linears}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, path=path: seen[path].append(args[0].clone()))
        for path, module in linears.items()
    ]
    for row in range(len(rows.ids)):  # the slow twin: one row at a time, padding cut off by hand
        keep = slice(None) if rows.mask is None else rows.mask[row].bool()
        stream.call(0, rows.ids[row : row + 1][:, keep], None, states.read(row, row + 1)[:, keep])
    for hook in hooks:
        hook.remove()
    found = linear_moments(stream, 0, rows, states, linears)
    assert set(found) == {path for path, inputs in seen.items() if inputs}
    for path, moment in found.items():
        x = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen[path]]).double()
        assert moment.tokens == len(x)
        torch.testing.assert_close(moment.total.double(), x.T @ x, rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)


def test_second_moment_by_hand() -> None:
    # x = (1, 2), (3, 0): sum of x x^T = [[1 + 9, 2], [2, 4]]; with weights 2 and 1/3: [[2 + 3, 4], [4, 8]]
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert second_moment(x).total.tolist() == [[10, 2], [2, 4]]
    weighted = second_moment(x, torch.tensor([2.0, 1 / 3]))
    torch.testing.assert_close(weighted.total, torch.tensor([[5.0, 4.0], [4.0, 8.0]]))
    assert weighted.tokens == 2


@pytest.mark.parametrize("in_file", [False, True])
def test_expert_inputs_are_those_of_the_tokens_routed_to_it(in_file: bool, tiny: Tiny, tmp_path: Path) -> None:
    stream, rows = Stream(Checkpoint.open(tiny("qwen3_moe", dtype="float32")), micro_rows=2), rows_of()
    states = stream.embed(rows)
    stream.load_layer(0)
    given = expert_inputs(stream, 0, rows, states, tmp_path / "x.bin" if in_file else None)
    entry = stream.skeleton.architecture
    block = stream.layers[0].get_submodule(entry.block)
    kept: dict[str, Any] = {}
    hook = block.register_forward_pre_hook(lambda _m, args: kept.update(x=args[0]))
    stream.call(0, rows.ids, rows.mask, states.read(0, 5))
    hook.remove()
    x = kept["x"].reshape(40, -1)
    real = rows.mask.reshape(-1)  # type: ignore[union-attr]
    assert ((given.ids[:, 0] >= 0) == real.numpy()).all()
    counts = 0
    for expert in range(8):
        tokens, slots = given.tokens(expert), given.slots(expert)
        where = slots // given.ids.shape[1]
        assert (given.ids.reshape(-1)[slots] == expert).all()
        torch.testing.assert_close(tokens, x[torch.from_numpy(where)], rtol=0, atol=SUM_TOLERANCE)
        assert given.weights(expert).tolist() == given.gates.reshape(-1)[slots].tolist()
        counts += len(slots)
    assert counts == int(real.sum()) * given.ids.shape[1]
    assert len(given.sample(1000)) == int(real.sum()) and len(given.sample(7)) == 7
    given.close()
    assert not (tmp_path / "x.bin").exists()


# -- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_packed_view_is_the_model_that_was_solved(family: str, tiny: Tiny, tmp_path: Path) -> None:
    """Hidden states behind the last layer, with codes put in place one by one, are those of the packed view."""
    folder = tiny(family, dtype="bfloat16")
    _, plain, split, packing = packing_for(folder)
    rows, solved = rows_of(), Solved(tmp_path / "work", "job")
    solved.begin(False)
    stream = Stream(plain, micro_rows=2)
    outputs: list[torch.Tensor] = []
    advance = stream.advance

    def kept(index: int, rows: Rows, states: Any, capture: Any = None, most: int | None = None) -> None:
        advance(index, rows, states, capture, most)
        outputs.append(states.read(0, 1).clone())

    stream.advance = kept  # type: ignore[method-assign]
    Layerwise(stream, rows, packing, plain_rtn, solved).run()
    view = Packed(split, packing, LayerFiles(solved.folder))
    again = Stream(view, micro_rows=2)
    states = again.embed(rows)
    for index in again.run(rows, states):
        assert torch.equal(states.read(0, 1), outputs[index]), f"layer {index}"
    held = {
        name for report in (solved.report(f.stem) for f in solved.folder.glob("*.safetensors")) for name in report.grids
    }
    assert held == set(packing)
    names = view.names()
    assert len(names) == len(set(names)) and not set(packing) & set(names)


def test_killed_between_layers_it_goes_on_with_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen2_moe", dtype="bfloat16")
    _, plain, _, packing = packing_for(folder, head=4)

    class Killed(Exception):
        pass

    def run(work: Path, resume: bool, stop: int | None = None) -> dict[str, bytes]:
        solved = Solved(work, "job")
        solved.begin(resume)
        save = solved.save

        def counted(step: str, *more: Any) -> None:
            save(step, *more)
            if step == f"layer-{stop:04}" if stop is not None else False:
                raise Killed

        solved.save = counted  # type: ignore[method-assign]
        try:
            Layerwise(Stream(plain, micro_rows=2), rows_of(), packing, plain_rtn, solved).run()
        except Killed:
            return {}
        return {file.name: file.read_bytes() for file in work.glob("*.safetensors")}

    whole = run(tmp_path / "whole", False)
    assert len(whole) == 4  # three layers and the head
    for stop in range(3):
        work = tmp_path / f"killed-{stop}"
        assert run(work, False, stop) == {}
        before = {file.name: file.stat().st_mtime_ns for file in work.glob("*.safetensors")}
        assert len(before) == stop + 1
        assert run(work, True) == whole
        assert all((work / name).stat().st_mtime_ns == then for name, then in before.items()), "solved again"


def test_work_of_another_job_is_not_gone_on_with(tmp_path: Path) -> None:
    Solved(tmp_path, "one").begin(False)
    with pytest.raises(MoezipError, match="other settings"):
        Solved(tmp_path, "two").begin(True)
    Solved(tmp_path, "one").begin(True)
    Solved(tmp_path, "one").clear()
    assert not tmp_path.exists()


def test_layers_see_quantized_or_original_ones(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", dtype="float32")
    _, plain, _, packing = packing_for(folder, bits=1, attention=1)
    moments: dict[bool, list[np.ndarray[Any, Any]]] = {True: [], False: []}
    for original in (True, False):

        def solve(weight: Any, hessian: Any, grid: Grid, original: bool = original) -> Any:
            if hessian is not None:
                moments[original].append(hessian.numpy().copy())
            return plain_rtn(weight, hessian, grid)

        solved = Solved(tmp_path / str(original), "job")
        solved.begin(False)
        Layerwise(Stream(plain), rows_of(), packing, solve, solved, original=original).run()
    first = zip(moments[True][:4], moments[False][:4], strict=True)  # q, k, v, o of the first layer
    assert all(np.array_equal(a, b) for a, b in first)
    assert not np.allclose(moments[True][-1], moments[False][-1])


def test_the_router_is_never_packed(tiny: Tiny) -> None:
    for family in FAMILIES:
        model, _, _, packing = packing_for(tiny(family, dtype="bfloat16"), attention=4, shared=4, dense=4)
        routers = {row.template.format(layer=fact.layer) for row in model.architecture.router for fact in model.facts}
        assert packing and not routers & set(packing)


# -- the table ----------------------------------------------------------------------------------------------


def test_the_table_in_the_config_is_read_back() -> None:
    grids = {
        "model.layers.3.mlp.experts.0.up_proj.weight": Grid(2, 32),
        "model.layers.3.mlp.experts.2.up_proj.weight": Grid(3, 32, symmetric=True),
        "model.layers.3.self_attn.q_proj.weight": Grid(4, 64, scale="BF16"),
    }
    table = folded(grids)
    assert table == {
        "model.layers.3.mlp.experts.*.up_proj.weight": ["int2-g32", None, "int3-g32-sym"],
        "model.layers.3.self_attn.q_proj.weight": "int4-g64-bf16",
    }
    assert unfolded(table) == grids
    for bad in ([], {"x": "int4-g32"}, {"a.weight": "int9-g32"}, {"experts.*.a.weight": "int4-g32"}, {"a.weight": 4}):
        with pytest.raises(ArchitectureError, match="packed"):
            unfolded(bad)


# -- the command --------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (*folder.glob("*.safetensors"), folder / "config.json")}


def test_quantize_writes_what_apply_writes_again(cli: Any, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    answer = cli("quantize", "demo", out, "--bits", 3, "--solver", "rtn", "--json")
    assert answer.code == 0, answer.err
    told = answer.json
    # int3 in groups of 64: 3 bits, a 16-bit scale and a 3-bit zero per group and 16 bytes of shape per matrix;
    # attention has 4 bits
    assert 3 + 19 / 64 < told["bits_per_weight"] < 3.7
    assert told["bytes_after"] == sum(len(data) for name, data in shards(out).items())
    assert cli("apply", "demo", out / "moezip" / "plan.json", again, "--quiet").code == 0
    assert tensors_of(out) == tensors_of(again)
    assert cli("verify", out, "--quiet").code == 0


def shards(folder: Path) -> dict[str, bytes]:
    """The tensors' bytes of every shard, without headers."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        found[file.name] = data[8 + int.from_bytes(data[:8], "little") :]
    return found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--bits", 2.5, "--solver", "rtn"), "--allocate lp"),
        (("--bits", 4), "needs calibration text"),
        (("--bits", 4, "--solver", "rtn", "--group-size", 48), r"\[64, 32\]"),
        (("--bits", 4, "--solver", "rtn", "--set", "attention=12"), "attention cannot have 12 bits"),
        (("--bits", 4, "--solver", "rtn", "--set", "atention=4"), "did you mean 'attention'"),
        (("--bits", 4, "--solver", "gptqq"), "did you mean 'gptq'"),
        (("--bits", 3, "--allocate", "lp", "--set", "attention=5"), "5 bits are not priced"),
        (("--bits", 4, "--solver", "rtn", "--for", "llamacpp"), "llama.cpp reads none of the formats"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(words: tuple[Any, ...], told: str, cli: Any, tmp_path: Path) -> None:
    answer = cli("quantize", "demo", tmp_path / "out", *words)
    assert answer.code in (1, 2) and not answer.out
    assert re.search(told, " ".join(answer.err.split())), answer.err
    assert not any(tmp_path.iterdir())


def test_what_a_reader_cannot_read_is_told_before_codes_are_solved(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve(*_: Any) -> None:
        raise AssertionError("solved all the same")

    monkeypatch.setattr("moezip.pipeline.quantize.solve_all", solve)
    answer = cli("quantize", "demo", tmp_path / "out", "--bits", 1, "--solver", "rtn", "--for", "vllm", "--quiet")
    assert answer.code == 1 and ("vLLM" in answer.err or "bit" in answer.err), answer.err
    assert "solved all the same" not in answer.err


def test_a_dry_run_says_the_size_to_the_byte(cli: Any, tmp_path: Path) -> None:
    asked = ("--bits", 2, "--solver", "rtn", "--set", "attention=8", "--json")
    told = cli("quantize", "demo", tmp_path / "out", *asked, "--dry-run").json
    assert not any(tmp_path.iterdir())
    done = cli("quantize", "demo", tmp_path / "out", *asked).json
    assert told["bytes_after"] == done["bytes_after"]
    assert told["bits_per_weight"] == done["bits_per_weight"]
