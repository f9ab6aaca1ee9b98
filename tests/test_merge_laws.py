"""Laws of merging, for every family: nothing merged is nothing changed, copies merge into themselves, what a plan
says is what is written, and an interrupted run ends with the same bytes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moezip
from moezip.arch.decoded import decoded
from moezip.arch.families import identify
from moezip.arch.spec import LayerFacts
from moezip.checkpoint.reader import Checkpoint
from moezip.checkpoint.source import Source
from moezip.export.readers import Planned, planned
from moezip.formats import fp8_block
from moezip.merge.layer import MergeLayer
from moezip.merge.params import MergeParams
from moezip.merge.solve import merge
from moezip.pipeline.merge import Solved
from moezip.plan.apply import Applied
from moezip.plan.merged import VALUES, Merged, digest_of
from moezip.plan.plan import LayerPlan, Plan
from moezip.plan.recoded import Recoded
from tests.command import Cli, model_files, process, write_text
from tests.copies import Held, copies, shuffled, with_experts
from tests.test_laws import REORDERED, full_logits, largest_difference, load, plain_rows, streamed_logits, written
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
Groups = Sequence[tuple[int, ...]]
families = pytest.mark.parametrize("name", FAMILIES)
TOKENS = 1024
# Averages summed in another order are other weights by a unit in the last place; the decay rates of tiny qwen3_next
# models are drawn anew in every process, and one in 25 of them carries that to 1.4e-5.
AMPLIFIED = 1e-4
# Decoded codes are rounded to bfloat16 once more.
BFLOAT16 = 1 + 2**-7


def pairs(fact: LayerFacts) -> Groups:
    """0 and 1, 2 and 3, ...: the odd one dominates. Half of the experts, in every group of a router half of its own."""
    return [(e + 1, e) for e in range(0, fact.experts, 2)]


def some(fact: LayerFacts) -> Groups:
    """Two of four and two by themselves: six of eight, three of each group of four."""
    found: list[tuple[int, ...]] = []
    for first in range(0, fact.experts, 4):
        found += [(first + 1,), (first + 2, first), (first + 3,)]
    return found


def merged(source: Source, groups: Callable[[LayerFacts], Groups], router: str = "dominant", **settings: Any) -> Merged:
    """The view of a merge with these groups, weights 1 to E over their sum; in plain numbers."""
    view = seen(decoded(source), groups, router, **settings)
    assert isinstance(view, Merged)
    return view


def seen(source: Source, groups: Callable[[LayerFacts], Groups], router: str = "dominant", **settings: Any) -> Planned:
    """The same, in the form that is written."""
    entry = identify(source.config)
    params, layers, values = MergeParams(router=router, **settings), [], {}
    for fact in entry.layer_facts(source.config):
        stats = {"counts": np.arange(1.0, fact.experts + 1), "gate_sum": np.arange(1.0, fact.experts + 1)}
        found = merge(MergeLayer(decoded(source), entry, fact, tuple(groups(fact)), stats), params)
        layers.append(LayerPlan(fact.layer, fact.experts, found.picks, router=found.router))
        values |= found.values
    held = Held(values)
    digest = digest_of(held, held.names()) if values else ""
    plan = Plan(source.fingerprint, entry.name, tuple(layers), values=digest, solved=tuple(held.names()))
    return planned(source, plan, None, held)


def written_merge(view: Merged, output: Path) -> Path:
    return written(view, output)


# -- what merging leaves as it is ---------------------------------------------------------------------------


@families
def test_a_merge_of_nothing_gives_the_same_bytes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(name)
    source = Checkpoint.open(folder)
    entry = identify(source.config)
    facts = entry.layer_facts(source.config)
    alone = merge(
        MergeLayer(source, entry, facts[0], tuple((e,) for e in range(8)), {"counts": np.ones(8)}),
        MergeParams(router="dominant"),
    )
    identity = Plan.identity(source.fingerprint, entry.name, facts)
    assert alone.picks == identity.layers[0].picks and not alone.values
    output = written(Merged(source, identity), tmp_path / "same")
    for path in folder.iterdir():
        if path.name != "config.json":
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name


@families
def test_merged_copies_behind_all_rows_give_the_same_logits(name: str, tiny: Tiny) -> None:
    source = copies(Checkpoint.open(tiny(name)), {e: e // 2 * 2 for e in range(8)})
    view, rows = merged(source, pairs, "remap"), plain_rows()
    assert all(len(layer.picks) == 4 for layer in view.plan.layers)
    wanted = streamed_logits(source, rows)
    assert largest_difference(wanted, streamed_logits(view, rows), rows) < REORDERED
    blind = merged(source, pairs, "remap", align="none")  # averages of neurons that have nothing to do with each other
    assert largest_difference(wanted, streamed_logits(blind, rows), rows) > 0.01


@families
def test_order_of_experts_does_not_matter(name: str, tiny: Tiny) -> None:
    """A source whose experts and rows are in another order, grouped accordingly, is the same merged model."""
    source, rows = Checkpoint.open(tiny(name)), plain_rows()
    entry = identify(source.config)
    orders = {}
    for fact in entry.layer_facts(source.config):
        size, chance = fact.experts // fact.groups, random.Random(fact.layer)
        orders[fact.layer] = [
            e for g in range(fact.groups) for e in chance.sample(range(g * size, (g + 1) * size), size)
        ]
    from tests.test_laws import planned as pruned

    shuffled_source = pruned(source, lambda fact: orders[fact.layer])

    def accordingly(fact: LayerFacts) -> Groups:
        place = {expert: number for number, expert in enumerate(orders[fact.layer])}
        return sorted(tuple(place[e] for e in group) for group in some(fact))

    # a plain mean, as the weights of `merged` go by number
    for router in ("dominant", "remap"):
        wanted = streamed_logits(merged(source, some, router, combine="mean"), rows)
        got = streamed_logits(merged(shuffled_source, accordingly, router, combine="mean"), rows)
        assert largest_difference(wanted, got, rows) < AMPLIFIED


@families
def test_order_of_neurons_does_not_matter(name: str, tiny: Tiny) -> None:
    """What is merged is the function: experts whose neurons lie in another order give the same merged model."""
    source, rows = Checkpoint.open(tiny(name)), plain_rows()
    facts = identify(source.config).layer_facts(source.config)
    own = {f.layer: [(e, shuffled(f.width, 10 * f.layer + e)) for e in range(f.experts)] for f in facts}
    wanted = streamed_logits(merged(source, some), rows)
    got = streamed_logits(merged(with_experts(source, own), some), rows)
    assert largest_difference(wanted, got, rows) < AMPLIFIED
    assert largest_difference(wanted, streamed_logits(source, rows), rows) > 0.01


# -- what a plan says is what is written --------------------------------------------------------------------


@families
@pytest.mark.parametrize("router", ["dominant", "remap"])
def test_the_view_reads_what_is_written(name: str, router: str, tiny: Tiny, tmp_path: Path) -> None:
    view, rows = merged(Checkpoint.open(tiny(name)), some, router), plain_rows()
    output = Checkpoint.open(written_merge(view, tmp_path / "merged"))
    assert sorted(output.names()) == sorted(view.names())
    changed = 0
    for key in view.names():
        spec, kept = view.spec(key), output.spec(key)
        assert (spec.dtype, spec.shape) == (kept.dtype, kept.shape), key
        assert torch.equal(view.read(key), output.read(key)), key
        if spec.shape and spec.shape[0] > 1:
            part = range(1, spec.shape[0])
            assert torch.equal(view.read(key, part), output.read(key, part)), key
        changed += key in view._claims
    assert changed >= len(view.plan.layers)
    wanted = streamed_logits(view, rows)
    assert largest_difference(wanted, streamed_logits(output, rows), rows) == 0.0


@families
def test_a_stock_router_makes_a_stock_checkpoint(name: str, tiny: Tiny, tmp_path: Path) -> None:
    source, rows = Checkpoint.open(tiny(name)), plain_rows()
    entry, view = identify(source.config), merged(source, some)
    folder = written_merge(view, tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    assert {config[key] for key in entry.count_keys} == {6} and "quantization_config" not in config
    got = full_logits(load(folder), rows)  # nothing missing, nothing left over
    assert largest_difference(streamed_logits(view, rows), got, rows) == 0.0
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < source_bytes(source)


@families
def test_the_default_router_is_stock(name: str, tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    """Experts that are solved get rows fitted to the text where the router is a softmax; smaller, and read by
    transformers as it is."""
    folder, out = tiny(name, dtype="bfloat16"), tmp_path / "out"
    source, solved = Checkpoint.open(folder), ("--set", "combine=neurons")
    words = ("merge", folder, out, "--keep", 6, "--data", text, "--tokens", 256, "--seq-len", 64, *solved, "--json")
    answer = cli(*words)
    assert answer.code == 0, answer.err
    softmax = identify(source.config).scoring == "softmax"
    routers = {layer.router for layer in Plan.load(out / "moezip" / "plan.json").layers}
    assert routers == {"fitted" if softmax else "kept"}
    assert answer.json["settings"]["router"] == ("sum" if softmax else "dominant")
    output, rows = Checkpoint.open(out), plain_rows()
    assert source_bytes(output) < source_bytes(source) and "quantization_config" not in output.config
    assert largest_difference(streamed_logits(output, rows), full_logits(load(out), rows), rows) == 0.0


def test_averages_keep_the_dominant_experts_rows(tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    folder, out = tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "out"
    answer = cli("merge", folder, out, "--keep", 6, "--data", text, "--tokens", 256, "--seq-len", 64, "--json")
    assert answer.code == 0 and answer.json["settings"]["router"] == "dominant"
    assert {layer.router for layer in Plan.load(out / "moezip" / "plan.json").layers} == {"kept"}


def source_bytes(source: Checkpoint) -> int:
    return sum(f.stat().st_size for f in source.folder.glob("*.safetensors"))


@families
def test_all_rows_make_a_checkpoint_of_moezips_own(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """It loads with moezip imported, is smaller, and comes back as it is when it is saved."""
    view, rows = merged(Checkpoint.open(tiny(name)), pairs, "remap"), plain_rows()
    folder = written_merge(view, tmp_path / "merged")
    model = moezip.load(folder)
    tolerance = REORDERED  # experts in turn, where the stream has them sorted
    assert largest_difference(streamed_logits(view, rows), full_logits(model, rows), rows) < tolerance
    model.save_pretrained(tmp_path / "again")
    first, again = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first["quantization_config"] == again["quantization_config"]
    assert all(row == [0, 0, 1, 1, 2, 2, 3, 3] for row in first["quantization_config"]["remap"].values())
    before, after = tensors(folder), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key].to(value.dtype)) for key, value in before.items())
    assert torch.equal(moezip.load(tmp_path / "again")(rows.ids).logits, model(rows.ids).logits)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("router", ["dominant", "remap"])
def test_codes_are_decoded(router: str, tiny: Tiny, tmp_path: Path) -> None:
    """An average of mxfp4 codes is no code: the output is what merging the decoded checkpoint gives."""
    source = Checkpoint.open(tiny("gpt_oss", dtype="bfloat16", stored="mxfp4"))
    plain = Checkpoint.open(written(decoded(source), tmp_path / "plain"))
    one = written_merge(merged(source, some, router), tmp_path / "one")
    other = written_merge(merged(plain, some, router), tmp_path / "other")
    assert "mxfp4" not in (one / "config.json").read_text()
    assert model_files(one) == model_files(other)


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2"])
@pytest.mark.parametrize("router", ["dominant", "remap"])
def test_fp8_blocks_stay_fp8_blocks(name: str, router: str, tiny: Tiny, tmp_path: Path) -> None:
    """Averages are rounded to blocks of their own; every other code and scale is the source's, byte for byte."""
    source = Checkpoint.open(tiny(name, dtype="bfloat16", stored="fp8"))
    view = seen(source, some, router)
    assert isinstance(view, Recoded)
    output = Checkpoint.open(written(view, tmp_path / "merged"))
    assert source_bytes(output) < source_bytes(source)
    wanted, got, kept = merged(source, some, router), decoded(output), Applied(source, view.plan)
    rounded = 0
    for key in output.names():
        matrix = key.removesuffix(fp8_block.SUFFIX)
        if not wanted.touches(matrix):  # what a prune to the dominant experts would copy
            assert torch.equal(output.read(key).view(torch.uint8), kept.read(key).view(torch.uint8)), key
        elif key != matrix:
            rounded += 1
            exact = wanted.read(matrix).float()
            # 3 bits of fraction: half a step is a sixteenth; the smallest codes are multiples of 2^-9 of the largest
            slack = exact.abs() / 16 + exact.abs().max() / 448 * 2**-10
            assert bool(((got.read(matrix).float() - exact).abs() <= slack * BFLOAT16).all()), key
    assert rounded == view.recoded > 0
    rows = plain_rows()
    assert largest_difference(streamed_logits(view, rows), streamed_logits(output, rows), rows) == 0.0


# -- commands -----------------------------------------------------------------------------------------------

# method and settings: an average; all rows; neurons that no pick can say, which lie beside the plan; matrices and rows
# that were fitted to the text, layer by layer
WAYS: Mapping[str, tuple[object, ...]] = {
    "average": ("--method", "m-smoe", "--set", "router=dominant"),
    "all rows": ("--method", "m-smoe", "--set", "router=remap"),
    "values": ("--method", "dern", "--set", "threshold=-1"),
    "fitted": ("--method", "m-smoe", "--set", "combine=least-squares", "--set", "router=sum"),
}
SOLVED = ("values", "fitted")
ways = pytest.mark.parametrize("way", WAYS)


def words(folder: Path, out: Path, way: str, text: Path) -> tuple[object, ...]:
    keep = ("--keep", 4) if way == "all rows" else ("--keep", 6)
    return ("merge", folder, out, *WAYS[way], *keep, "--data", text, "--tokens", TOKENS, "--seq-len", 64, "--json")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "calib.jsonl")


@ways
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v3 fp8"])
def test_a_saved_plan_gives_the_same_bytes(
    name: str, way: str, tiny: Tiny, text: Path, tmp_path: Path, cli: Cli
) -> None:
    family, _, stored = name.partition(" ")
    folder = tiny(family, dtype="bfloat16", stored=stored or None)
    answer = cli(*words(folder, tmp_path / "merged", way, text))
    if way == "fitted" and family == "deepseek_v3":
        assert answer.code == 2 and "scores every expert by itself" in answer.err
        return
    assert answer.code == 0, answer.err
    told = answer.json
    assert told["experts_after"] == [4 if way == "all rows" else 6] * len(told["experts_before"])
    assert told["bytes_after"] == sum(v.nbytes for v in tensors(tmp_path / "merged").values()) < told["bytes_before"]
    wanted = model_files(tmp_path / "merged")
    assert cli(*words(folder, tmp_path / "p" / "plan.json", way, text), "--plan-only").code == 0
    assert (tmp_path / "p" / VALUES).is_file() == (way in SOLVED)
    # once from the two files of --plan-only, once from the plan inside the output, which has the values itself
    for number, plan in enumerate((tmp_path / "p" / "plan.json", tmp_path / "merged" / "moezip" / "plan.json")):
        answer = cli("apply", folder, plan, tmp_path / str(number))
        assert answer.code == 0, answer.err
        assert model_files(tmp_path / str(number)) == wanted
        assert cli("verify", tmp_path / str(number)).code == 0


def test_values_that_are_not_the_plans_are_refused(tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    folder, plan = tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "p" / "plan.json"
    assert cli(*words(folder, plan, "values", text), "--plan-only").code == 0
    values = load_file(plan.with_name(VALUES))

    def refused(*parts: str) -> None:
        answer = cli("apply", folder, plan, tmp_path / "out")
        assert answer.code == 1 and not (tmp_path / "out").exists(), answer.err
        assert all(part in answer.err for part in parts), answer.err

    one = next(iter(values))
    save_file({**values, one: values[one] + 1}, plan.with_name(VALUES))
    refused("not those that the plan was made with")
    save_file({key: value for key, value in values.items() if key != one}, plan.with_name(VALUES))
    refused(one, "is not there")
    plan.with_name(VALUES).write_bytes(b"no safetensors")
    refused(VALUES)
    plan.with_name(VALUES).unlink()
    refused(VALUES, "not beside it")
    save_file(values, plan.with_name(VALUES))
    assert cli("apply", folder, plan, tmp_path / "out").code == 0


@ways
def test_killed_between_layers_and_resumed(
    way: str, tiny: Tiny, text: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("qwen3_moe", dtype="bfloat16")
    assert cli(*words(folder, tmp_path / "wanted", way, text)).code == 0
    saved, solving = Solved.save, list[int]()

    def dying(self: Solved, layer: int, found: Any) -> None:
        if len(solving) == 2:
            raise KeyboardInterrupt
        solving.append(layer)
        saved(self, layer, found)

    command = words(folder, tmp_path / "merged", way, text)
    with monkeypatch.context() as patch:
        patch.setattr(Solved, "save", dying)
        answer = cli(*command)
    assert answer.code == 130 and "--resume" in answer.err and not (tmp_path / "merged").exists()
    assert solving == [0, 1]

    def counted(self: Solved, layer: int, found: Any) -> None:
        solving.append(layer)
        saved(self, layer, found)

    monkeypatch.setattr(Solved, "save", counted)
    assert cli(*command, "--resume").code == 0
    assert solving == [0, 1, 2]  # what was done was not done again
    assert model_files(tmp_path / "merged") == model_files(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "wanted"]  # no work folder stays


def test_a_remapped_checkpoint_is_used_as_any_other(tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    folder, out = tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "merged"
    assert cli(*words(folder, out, "all rows", text)).code == 0
    assert cli("verify", out).code == 0
    answer = cli("evaluate", out, "--against", folder, "--data", text, "--seq-len", 64, "--json")
    assert answer.code == 0 and answer.json["against"]["kl"] > 0, answer.err
    shown = cli("inspect", out, "--json").json
    assert shown["experts"] == [4, 4, 4]
    plain = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1]); sys.exit()"
    stopped = process(out, before=plain)
    assert stopped.code != 0 and "RuntimeError" in stopped.err
    assert process(out, before="import moezip; " + plain).code == 0


def test_what_only_moezip_reads_is_not_written_for_others(tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tiny("qwen3_moe", dtype="bfloat16")
    for reader in ("vllm", "transformers"):
        answer = cli(*words(folder, tmp_path / "out", "all rows", text), "--for", reader)
        assert answer.code in (1, 2) and "more rows than there are experts" in answer.err
        assert "router=dominant" in answer.err and not (tmp_path / "out").exists()
    plan = tmp_path / "plan.json"
    assert cli(*words(folder, plan, "all rows", text), "--plan-only").code == 0
    assert cli("apply", folder, plan, tmp_path / "out", "--for", "vllm").code in (1, 2)
    assert cli("apply", folder, plan, tmp_path / "out", "--for", "moezip").code == 0


# -- one after the other ------------------------------------------------------------------------------------


def test_prune_after_merge_and_merge_after_prune(tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    folder = tiny("qwen3_moe", dtype="bfloat16")
    data = ("--data", text, "--tokens", TOKENS, "--seq-len", 64)
    assert cli(*words(folder, tmp_path / "merged", "average", text)).code == 0
    assert cli("prune", tmp_path / "merged", tmp_path / "both", "--method", "reap", "--keep", 4, *data).code == 0
    assert cli("prune", folder, tmp_path / "pruned", "--method", "reap", "--keep", 6, *data).code == 0
    answer = cli("merge", tmp_path / "pruned", tmp_path / "other", "--keep", 4, *data, "--set", "router=remap")
    assert answer.code == 0, answer.err
    for out in ("both", "other"):
        assert cli("verify", tmp_path / out).code == 0
        assert cli("inspect", tmp_path / out, "--json").json["experts"] == [4, 4, 4]
        assert cli("evaluate", tmp_path / out, "--data", text, "--seq-len", 64).code == 0


@ways
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "minimax_m2 fp8"])
def test_a_prune_of_a_plan_that_merges_is_that_of_what_it_writes(
    name: str, way: str, tiny: Tiny, text: Path, tmp_path: Path, cli: Cli
) -> None:
    """By view it is what pruning the written merge is, values and router rows included; its own plan applies again."""
    family, _, stored = name.partition(" ")
    if way == "fitted" and family in ("deepseek_v3", "minimax_m2"):
        pytest.skip("its router is not fitted")
    folder, plan = tiny(family, dtype="bfloat16", stored=stored or None), tmp_path / "p" / "plan.json"
    assert cli(*words(folder, plan, way, text), "--plan-only").code == 0
    reap = ("--method", "reap", "--keep", 4, "--data", text, "--tokens", TOKENS, "--seq-len", 64)
    answer = cli("prune", folder, tmp_path / "once", "--plan", plan, *reap, "--json")
    if way == "all rows":
        assert answer.code == 1 and "router=remap" in answer.err and not (tmp_path / "once").exists()
        return
    assert answer.code == 0, answer.err
    assert answer.json["experts_before"] == [8] * len(answer.json["experts_after"])
    assert any("read again through the plan before" in note for note in answer.json["notes"])
    if way == "average":  # told before any text is read
        answer = cli(
            "prune", folder, tmp_path / "no", "--plan", plan, "--method", "heapr", "--ratio", 0.5, "--data", text
        )
        assert answer.code == 1 and "neurons cannot be taken out" in answer.err and "calibrate" not in answer.err
    assert cli("apply", folder, plan, tmp_path / "merged").code == 0
    assert cli("prune", tmp_path / "merged", tmp_path / "twice", *reap).code == 0
    once = tensors(tmp_path / "once")
    assert same(once, tensors(tmp_path / "twice"))
    assert cli("apply", folder, tmp_path / "once" / "moezip" / "plan.json", tmp_path / "again").code == 0
    assert model_files(tmp_path / "again") == model_files(tmp_path / "once")
    # and as two files, by way of a plan
    assert cli("prune", folder, tmp_path / "q" / "plan.json", "--plan", plan, *reap, "--plan-only").code == 0
    assert cli("apply", folder, tmp_path / "q" / "plan.json", tmp_path / "third").code == 0
    assert model_files(tmp_path / "third") == model_files(tmp_path / "once")
    assert cli("prune", folder, tmp_path / "dry", "--plan", plan, *reap, "--dry-run", "--json").json[
        "bytes_after"
    ] == sum(value.nbytes for value in once.values())


def test_a_merge_of_a_plan_that_prunes_is_that_of_what_it_writes(
    tiny: Tiny, text: Path, tmp_path: Path, cli: Cli
) -> None:
    folder, plan = tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "plan.json"
    data = ("--data", text, "--tokens", TOKENS, "--seq-len", 64)
    assert cli("prune", folder, plan, "--method", "reap", "--keep", 6, *data, "--plan-only").code == 0
    fitted = ("--keep", 4, *WAYS["fitted"], *data)
    answer = cli("merge", folder, tmp_path / "once", "--plan", plan, *fitted, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["experts_before"] == [8] * 3 and answer.json["experts_after"] == [4] * 3
    assert cli("apply", folder, plan, tmp_path / "pruned").code == 0
    assert cli("merge", tmp_path / "pruned", tmp_path / "twice", *fitted).code == 0
    assert same(tensors(tmp_path / "once"), tensors(tmp_path / "twice"))
    # one after the other is as far as it goes
    merged = tmp_path / "once" / "moezip" / "plan.json"
    again = cli("merge", folder, tmp_path / "no", "--plan", merged, *fitted)
    assert again.code == 1 and "merges again" in again.err


@ways
def test_quantize_takes_a_plan_that_merges(way: str, tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    """By view it is what quantizing the written merge is; so it is by way of a plan with widths."""
    folder, plan, wide = tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "p" / "plan.json", tmp_path / "w" / "plan.json"
    assert cli(*words(folder, plan, way, text), "--plan-only").code == 0
    solver, bits = ("--solver", "rtn"), ("--bits", 4, "--group-size", 0)
    assert cli("quantize", folder, tmp_path / "once", *solver, *bits, "--plan", plan).code == 0
    assert cli("quantize", folder, wide, *solver, *bits, "--plan", plan, "--plan-only").code == 0
    assert cli("quantize", folder, tmp_path / "planned", *solver, "--plan", wide).code == 0
    once = tensors(tmp_path / "once")
    assert same(once, tensors(tmp_path / "planned"))
    assert cli("verify", tmp_path / "once").code == 0
    assert cli("evaluate", tmp_path / "once", "--data", text, "--seq-len", 64, "--tokens", 64).code == 0
    if way != "all rows":  # a checkpoint that has more rows than experts is not compressed again
        assert cli("apply", folder, plan, tmp_path / "merged").code == 0
        assert cli("quantize", tmp_path / "merged", tmp_path / "twice", *solver, *bits).code == 0
        assert same(once, tensors(tmp_path / "twice"))


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


RECIPE = """
version: 1
model: {model}
output: {out}
seq_len: 64
calibration:
  one: {{data: {text}, tokens: 1024}}
jobs:
  alone:
    steps:
      - merge: {{method: m-smoe, keep: 4, settings: {{router: remap}}}}
      - evaluate: {{data: {text}, tokens: 256}}
  values:
    steps:
      - merge: {{method: dern, keep: 6, settings: {{threshold: -1}}}}
      - quantize: {{bits: 4, solver: rtn, group_size: 0}}
  both:
    steps:
      - prune: {{method: reap, keep: 6}}
      - merge: {{method: m-smoe, keep: 4}}
  three:
    steps:
      - prune: {{method: reap, keep: 6}}
      - merge: {{method: dern, keep: 4, settings: {{threshold: -1}}}}
      - quantize: {{bits: 4, solver: rtn, group_size: 0}}
  later:
    steps:
      - merge: {{method: m-smoe, keep: 6, settings: {{combine: least-squares, router: sum}}}}
      - prune: {{method: reap, keep: 4}}
      - quantize: {{bits: 4, solver: rtn, group_size: 0}}
"""


def test_recipes_merge_by_view(tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    """Every job of the recipe gives what the commands give one after the other, with checkpoints in between."""
    folder, out = tiny("qwen3_moe", dtype="bfloat16"), tmp_path / "out"
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=folder, out=out, text=text))
    answer = cli("run", tmp_path / "r.yaml", "--json")
    assert answer.code == 0, answer.err
    jobs = {job["name"]: job for job in answer.json["jobs"]}
    assert jobs["alone"]["evaluations"][0]["tokens"] > 200
    assert jobs["both"]["report"]["experts_before"] == [8, 8, 8] and jobs["both"]["report"]["experts_after"] == [4] * 3
    assert not (out / "work").exists() or not any((out / "work").iterdir())

    data = ("--data", text, "--tokens", TOKENS, "--seq-len", 64)
    bits = ("--bits", 4, "--solver", "rtn", "--group-size", 0)
    dern = ("--method", "dern", "--set", "threshold=-1")
    chain: tuple[tuple[object, ...], ...] = (
        ("merge", folder, tmp_path / "alone", "--keep", 4, "--set", "router=remap", *data),
        ("merge", folder, tmp_path / "dern", "--keep", 6, *dern, *data),
        ("quantize", tmp_path / "dern", tmp_path / "values", *bits),
        ("prune", folder, tmp_path / "pruned", "--method", "reap", "--keep", 6, *data),
        ("merge", tmp_path / "pruned", tmp_path / "both", "--keep", 4, *data),
        ("merge", tmp_path / "pruned", tmp_path / "dern2", "--keep", 4, *dern, *data),
        ("quantize", tmp_path / "dern2", tmp_path / "three", *bits),
        ("merge", folder, tmp_path / "fitted", "--keep", 6, *WAYS["fitted"], *data),
        ("prune", tmp_path / "fitted", tmp_path / "fewer", "--method", "reap", "--keep", 4, *data),
        ("quantize", tmp_path / "fewer", tmp_path / "later", *bits),
    )
    for step in chain:
        answer = cli(*step)
        assert answer.code == 0, answer.err
    for name in jobs:
        assert same(tensors(out / name), tensors(tmp_path / name)), name
        assert cli("verify", out / name).code == 0
        # the plan in the output is for the recipe's model
        assert cli("apply", folder, out / name / "moezip" / "plan.json", tmp_path / f"{name}-again").code == 0
        assert model_files(tmp_path / f"{name}-again") == model_files(out / name)
    assert all(job["skipped"] for job in cli("run", tmp_path / "r.yaml", "--json").json["jobs"])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[{quantize: {bits: 4, solver: rtn}}, {prune: {method: reap, keep: 4}}]", "then quantize"),
        ("[{merge: {method: m-smoe, keep: 6, scope: model}}, {prune: {method: reap, keep: 4}}]", "layers that differ"),
        ("[{merge: {method: mc-smoe, keep: 6}}, {prune: {method: reap, keep: 4}}]", "factors"),
        (
            "[{merge: {method: m-smoe, keep: 6, settings: {router: remap}}}, {prune: {method: reap, keep: 4}}]",
            "nowhere",
        ),
        ("[{merge: {method: m-smoe, keep: 6}}, {prune: {method: heapr, ratio: 0.5}}]", "takes neurons out"),
        ("[{merge: {method: m-smoe, keep: 4}}, {prune: {method: reap, keep: 6}}]", "cannot keep 6 of 4"),
        ("[{merge: {method: m-smoe, keep: 6}}, {merge: {method: m-smoe, keep: 4}}]", "each once"),
        ("[{prune: {method: heapr, ratio: 0.5}}, {merge: {method: m-smoe, keep: 4}}]", "neurons"),
        ("[{prune: {method: reap, keep: 6}}, {merge: {method: m-smoe, keep: 4, settings: {router: remap}}}]", "remap"),
        ("[{prune: {method: reap, keep: 4}}, {merge: {method: m-smoe, keep: 6}}]", "cannot keep 6 of 4"),
        ("[{merge: {method: m-smo, keep: 6}}]", "did you mean 'm-smoe'"),
        ("[{merge: {method: m-smoe, keep: 6, settings: {aling: none}}}]", "aling"),
        ("[{merge: {method: m-smoe}}]", "either keep"),
        ("[{merge: {method: m-smoe, keep: 6, calibration: []}}]", "this merge has no calibration"),
    ],
)
def test_what_recipes_cannot_do_is_told_first(
    steps: str, message: str, tiny: Tiny, text: Path, tmp_path: Path, cli: Cli
) -> None:
    head = RECIPE.format(model=tiny("qwen3_moe", dtype="bfloat16"), out=tmp_path / "out", text=text)
    (tmp_path / "r.yaml").write_text(head.partition("jobs:")[0] + f"jobs:\n  a: {{steps: {steps}}}\n")
    answer = cli("run", tmp_path / "r.yaml")
    assert answer.code in (1, 2) and message in answer.err and not (tmp_path / "out").exists(), answer.err


def test_the_work_folder_of_another_job_is_refused(tiny: Tiny, text: Path, tmp_path: Path, cli: Cli) -> None:
    solved = Solved(tmp_path / "w", "one")
    solved.begin(False)
    shutil.copytree(tmp_path / "w", tmp_path / "v")
    with pytest.raises(moezip.errors.MoezipError, match="interrupted work"):
        Solved(tmp_path / "v", "another").begin(True)
    Solved(tmp_path / "v", "one").begin(True)
