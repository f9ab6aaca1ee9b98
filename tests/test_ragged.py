"""Ragged checkpoints: different numbers of experts per layer, experts of different widths. They load, run, save."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moezip
from moezip.arch.experts import check_shapes, read_expert
from moezip.arch.families import ARCHITECTURES, identify
from moezip.arch.layout import TRIPWIRE_SHAPE, Layout, tripwire
from moezip.arch.matrices import fused_part
from moezip.arch.ragged import RaggedExperts, neighbours
from moezip.arch.spec import Architecture
from moezip.calibrate.data import Rows
from moezip.calibrate.experts import IMPLEMENTATION, register
from moezip.calibrate.stream import Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import ArchitectureError, MoezipError
from moezip.export.verify import verify
from tests.test_laws import REORDERED, full_logits, largest_difference, plain_rows
from tests.tiny import WIDTH

Tiny = Callable[..., Path]
Widths = dict[int, list[int]]
# Which expert of the source each expert is, and which of its neurons it keeps.
Kept = dict[int, list[tuple[int, list[int]]]]

# Published with one tensor for all experts of a layer; ragged, every expert has its own.
FUSED = [name for name, entry in ARCHITECTURES.items() if any(tensor.fused for tensor in entry.experts)]
# Here dropping an expert equals a router logit of minus infinity: gates renormalised over the chosen k, or raw sigmoid
# scores; no selection bias beside them. The options make it so where the config decides.
RENORMALISED: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {"norm_topk_prob": True},
    "jamba": {},
    "granitemoe": {},
    "gpt_oss": {},
}
families = pytest.mark.parametrize("name", ARCHITECTURES)


# -- fixtures made by hand ----------------------------------------------------------------------------------


def kept_of(source: Checkpoint, seed: int = 0) -> Kept:
    """Others in every layer: fewer experts in the last, some neurons of each, one expert without any."""
    generator = torch.Generator().manual_seed(seed)
    entry, found = identify(source.config), {}
    facts = entry.layer_facts(source.config)
    for fact in facts:
        size = fact.experts // fact.groups
        fewer = size - (1 if fact.layer == facts[-1].layer else 0)
        experts = [
            group * size + e
            for group in range(fact.groups)
            for e in sorted(torch.randperm(size, generator=generator)[:fewer].tolist())
        ]
        found[fact.layer] = []
        for e in experts:
            width = 1 + (5 * e + fact.layer) % fact.width
            neurons = torch.randperm(fact.width, generator=generator)[:width]
            found[fact.layer].append((e, sorted(neurons.tolist())))
        found[fact.layer][1] = (found[fact.layer][1][0], [])
    return found


def ragged(folder: Path, out: Path, kept: Kept) -> Path:
    """The checkpoint in ``folder`` with these experts and neurons, in moezip's format, as one shard."""
    source = Checkpoint.open(folder)
    entry, tensors = identify(source.config), {}
    for name in source.names():
        claim, value = entry.claim(name, source.config), source.read(name)
        if claim.kind == "router" and claim.tensor is not None:
            axis = claim.tensor.axis  # type: ignore[union-attr]
            tensors[name] = value.index_select(axis, torch.tensor([e for e, _ in kept[claim.layer]]))
        elif claim.kind not in ("expert", "fused"):
            tensors[name] = value
    for layer, row in kept.items():
        for number, (expert, neurons) in enumerate(row):
            whole = read_expert(source, entry, layer, expert)
            for tensor in entry.split.experts:
                value, key = getattr(whole, tensor.role), tensor.template.format(layer=layer, expert=number)
                if tensor.role == "down_bias":  # of the hidden size, and output whatever the width
                    tensors[key] = value
                elif neurons:
                    tensors[key] = value.index_select(1 if tensor.role == "down" else 0, torch.tensor(neurons))
    layout = Layout({layer: tuple(len(neurons) for _, neurons in row) for layer, row in kept.items()})
    tensors[tripwire(entry, layout)] = torch.zeros(1, dtype=torch.uint8)
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    config = source.config | {"quantization_config": layout.to_config()}
    (out / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def everything(source: Checkpoint) -> Kept:
    facts = identify(source.config).layer_facts(source.config)
    return {fact.layer: [(e, list(range(fact.width))) for e in range(fact.experts)] for fact in facts}


def load(folder: Path, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """As a user loads it; then weights moved to aligned memory, as ``tests.test_laws.load`` explains."""
    from transformers import AutoModelForCausalLM

    register()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation=implementation, output_loading_info=True
    )
    assert not any(info.values()), info
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    for module in model.modules():
        if isinstance(module, RaggedExperts):
            module.join()
    return model.eval()


def streamed(folder: Path, rows: Rows, implementation: str) -> list[torch.Tensor]:
    stream = Stream(
        Checkpoint.open(folder), experts_implementation=implementation, dtype=torch.float32, micro_rows=1
    )  # fmt: skip
    states = stream.embed(rows)
    for _ in stream.run(rows, states):
        pass
    stream.load_head()
    return [stream.logits(rows, states, i, torch.arange(rows.ids.shape[1])) for i in range(len(rows.ids))]


def block(model: Any, entry: Architecture, layer: int) -> Any:
    return model.get_submodule(f"{entry.layers}.{layer}.{entry.block}")


def zero_neurons(model: Any, entry: Architecture, kept: Kept) -> None:
    """Zeroes in a stock model what ``kept`` leaves out of the experts that it has."""
    for layer, row in kept.items():
        experts = block(model, entry, layer).get_submodule(entry.experts_module)
        for expert, neurons in row:
            down = fused_part(experts, "down", expert)
            mask = torch.zeros(down.shape[1])
            mask[neurons] = 1
            down *= mask


def edited(folder: Path, out: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    edit(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


# -- the same model -----------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("implementation", ["eager", IMPLEMENTATION])
def test_all_widths_as_configured_is_the_stock_model(
    name: str, implementation: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder, rows = tiny(name), plain_rows()
    same = ragged(folder, tmp_path / "same", everything(Checkpoint.open(folder)))
    wanted = full_logits(load(folder, implementation), rows)
    # gpt_oss publishes matrices [in, out], whose products another kernel sums in another order
    tolerance = REORDERED if name == "gpt_oss" else 0.0
    assert largest_difference(wanted, full_logits(load(same, implementation), rows), rows) <= tolerance
    assert largest_difference(wanted, streamed(same, rows, implementation), rows) <= tolerance


@families
def test_dropped_neurons_are_zeroed_neurons(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder, rows = tiny(name), plain_rows()
    source = Checkpoint.open(folder)
    kept = everything(source)
    for layer, row in kept.items():
        for expert in range(len(row)):
            row[expert] = (expert, list(range((3 * expert + layer) % 7, WIDTH, 1 + expert % 3)))
        row[2] = (2, [])  # of width 0: its output is 0, whatever the gate
    wanted = load(folder)
    zero_neurons(wanted, identify(source.config), kept)
    got = load(ragged(folder, tmp_path / "slim", kept))
    difference = largest_difference(full_logits(wanted, rows), full_logits(got, rows), rows)
    assert difference < REORDERED
    assert largest_difference(full_logits(load(folder), rows), full_logits(got, rows), rows) > 0.01


@pytest.mark.parametrize("name", RENORMALISED)
def test_dropped_experts_are_logits_of_minus_infinity(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder, rows = tiny(name, **RENORMALISED[name]), plain_rows()
    source = Checkpoint.open(folder)
    entry, kept = identify(source.config), everything(source)
    kept = {layer: [one for one in row if one[0] not in (layer, layer + 3)] for layer, row in kept.items()}
    last = max(kept)
    kept[last] = kept[last][:-1]
    wanted = load(folder)
    for layer, row in kept.items():
        stock = block(wanted, entry, layer)
        gone = sorted(set(range(8)) - {expert for expert, _ in row})
        _mute(stock.get_submodule(entry.router_module), gone, name)
    got = load(ragged(folder, tmp_path / "fewer", kept))
    assert largest_difference(full_logits(wanted, rows), full_logits(got, rows), rows) < REORDERED


def _mute(router: Any, experts: list[int], name: str) -> None:
    """Gives the router's linear map a bias of minus infinity for these experts."""
    original, functional = router.forward, sys.modules[type(router).__module__].torch.nn.functional

    def forward(*args: Any) -> Any:
        linear = functional.linear

        def muted(value: torch.Tensor, weight: torch.Tensor, *more: Any) -> torch.Tensor:
            logits = linear(value, weight, *more)
            if weight is router.weight:
                logits[:, experts] = float("-inf")
            return logits

        functional.linear = muted
        try:
            return original(*args)
        finally:
            functional.linear = linear

    router.forward = forward


@families
def test_streamed_is_loaded(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder, rows = tiny(name), plain_rows()
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    for implementation in ("eager", IMPLEMENTATION):
        wanted = full_logits(load(path, implementation), rows)
        assert largest_difference(wanted, streamed(path, rows, implementation), rows) == 0.0
    # the other implementation sums in another order
    assert largest_difference(wanted, streamed(path, rows, "eager"), rows) < REORDERED


# -- load, generate, save -----------------------------------------------------------------------------------


@families
def test_generates_and_saves_the_same_bytes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(name, dtype="bfloat16")
    source = Checkpoint.open(folder)
    path = ragged(folder, tmp_path / "ragged", kept_of(source))
    model = moezip.load(path)
    assert model.config._experts_implementation == IMPLEMENTATION
    prompt = torch.tensor([[5, 6, 7, 8]])
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > 4
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    stock = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for key, value in before.items():
        if key.endswith("e_score_correction_bias"):  # minimax_m2 stores float32 and keeps it in the model's dtype
            value = value.to(next(tensor.dtype for name, tensor in stock.items() if name.endswith("correction_bias")))
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    first, second = (json.loads((f / "config.json").read_text()) for f in (path, tmp_path / "again"))
    assert first["quantization_config"] == second["quantization_config"]
    entry = identify(first)
    assert entry.layer_facts(first) == entry.layer_facts(second)
    again = moezip.load(tmp_path / "again")
    again.save_pretrained(tmp_path / "third")
    assert (tmp_path / "third" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    assert torch.equal(again(prompt).logits, model(prompt).logits)
    assert torch.equal(again.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0), tokens)


@families
def test_a_dtype_reaches_every_tensor(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(name)  # float32
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    wanted = {name: tensor.dtype for name, tensor in load(folder, dtype=torch.bfloat16).state_dict().items()}
    assert torch.bfloat16 in wanted.values()
    for key, tensor in moezip.load(path, dtype=torch.bfloat16).state_dict().items():
        if tensor.shape == TRIPWIRE_SHAPE and tensor.dtype == torch.uint8:
            continue
        if ".experts." not in key:
            assert tensor.dtype == wanted[key], key
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16, key


def test_gate_and_up_lie_together_and_stay_so(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    model = moezip.load(ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder))))
    for _ in range(2):
        for module in (m for m in model.modules() if isinstance(m, RaggedExperts)):
            for expert, width in enumerate(module.widths):
                if width:
                    gate, up, down = (module.matrix(expert, role).weight for role in ("gate", "up", "down"))
                    assert neighbours(gate, up) and down.data_ptr() % 64 == 0
                    wanted = torch.cat([gate, up])
                    with torch.no_grad():
                        assert torch.equal(module._gate_up(expert), wanted)
                        assert module._gate_up(expert).data_ptr() == gate.data_ptr()
        model = model.to(torch.bfloat16)


def test_gradients_reach_every_expert(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("mixtral")
    model = moezip.load(ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder))))
    model.config._experts_implementation = "eager"
    ids = plain_rows(4, 24).ids
    logits = model(ids).logits
    with torch.no_grad():  # the two ways of taking gate and up as one matrix
        assert torch.equal(logits, model(ids).logits)
    logits.square().mean().backward()
    experts = [module for module in model.modules() if isinstance(module, RaggedExperts)]
    seen = [float(parameter.grad.abs().sum()) for module in experts for parameter in module.parameters()
            if parameter.grad is not None]  # fmt: skip
    assert len(seen) > 40 and sum(value > 0 for value in seen) > 0.9 * len(seen)


def test_stacked_implementations_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    model = moezip.load(path)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ArchitectureError, match="grouped_mm"):
        model(plain_rows(1, 4).ids)


def test_offloaded_experts_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny("qwen3_moe")
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    layers = {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    with pytest.raises(ArchitectureError, match="offloaded"):
        AutoModelForCausalLM.from_pretrained(path, device_map=places | layers, offload_folder=tmp_path / "off")


# -- without moezip, and with damage ------------------------------------------------------------------------


@pytest.fixture
def without_moezip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers as it is in a process that never imported moezip."""
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "moezip")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "moezip")
    yield


def shapes_that_could_pass(source: Checkpoint) -> Mapping[str, Kept]:
    """Layouts whose tensors look stock in one way or another."""
    whole = everything(source)
    first = min(whole)
    return {
        "as configured": whole,
        "one width for all": {layer: [(e, neurons[:8]) for e, neurons in row] for layer, row in whole.items()},
        "one narrower expert": whole | {first: [(e, n[:8] if e == 3 else n) for e, n in whole[first]]},
        "one narrower layer": whole | {first: [(e, n[:8]) for e, n in whole[first]]},
        "fewer experts in a layer": whole | {first: [whole[first][e] for e in (0, 1, 2, 4, 5, 6)]},
        "one layer without any neuron": whole | {first: [(e, []) for e, _ in whole[first]]},
        "no neuron anywhere": {layer: [(e, []) for e, _ in row] for layer, row in whole.items()},
    }


@families
def test_without_moezip_nothing_loads(name: str, tiny: Tiny, tmp_path: Path, without_moezip: None) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(name)
    for number, kept in enumerate(shapes_that_could_pass(Checkpoint.open(folder)).values()):
        path = ragged(folder, tmp_path / str(number), kept)
        with pytest.raises(RuntimeError, match=r"(?i)conver|mismatch|shape"):
            AutoModelForCausalLM.from_pretrained(path)


def test_the_tripwire_is_what_stops_it(tiny: Tiny, tmp_path: Path, without_moezip: None) -> None:
    # What would happen without: a layer with no tensors of experts is filled with random numbers.
    from transformers import AutoModelForCausalLM

    folder = tiny("qwen3_moe")
    source = Checkpoint.open(folder)
    path = ragged(folder, tmp_path / "out", shapes_that_could_pass(source)["no neuron anywhere"])
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    layout = Layout.of(config)
    assert layout is not None
    del tensors[tripwire(identify(config), layout)]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(path)
    assert float(model.model.layers[0].mlp.experts.down_proj.detach().std()) > 0


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.experts).__name__)
"""


def run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("code", "works"),
    [
        (PLAIN, False),
        ("import moezip" + PLAIN, True),
        (PLAIN.replace("model =", "import moezip\nmodel ="), True),
        ("import moezip, transformers, transformers.quantizers" + PLAIN, True),
        ("import importlib.util, moezip; importlib.util.find_spec('transformers.quantizers.auto')" + PLAIN, True),
    ],
    ids=["without", "before", "after", "twice", "looked-for"],
)
def test_import_moezip_is_all_it_takes(code: str, works: bool, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    ran = run(code, path)
    if works:
        assert (ran.returncode, ran.stdout.split()) == (0, ["RaggedExperts"]), ran.stderr
    else:
        assert ran.returncode != 0 and "RuntimeError" in ran.stderr


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"].__setitem__(key, value)


def _experts(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda config: edit(config["quantization_config"]["experts"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("version", 2), "version 2"),
        (_set("bits", 4), "4 bits"),
        (_set("experts", None), "no table of layers"),
        (_set("experts", {}), "no table of layers"),
        (_experts(lambda e: e.pop("2")), r"lists the layers \[1\]"),
        (_experts(lambda e: e.update({"0": [4]})), r"lists the layers \[0, 1, 2\]"),
        (_experts(lambda e: e.update({"two": [4]})), "'two'"),
        (_experts(lambda e: e.update({"1": 8})), "no list of widths"),
        (_experts(lambda e: e.update({"1": []})), "no list of widths"),
        (_experts(lambda e: e["1"].__setitem__(0, -1)), "no width"),
        (_experts(lambda e: e["1"].__setitem__(0, 2.5)), "no width"),
        (_experts(lambda e: e["1"].__setitem__(0, True)), "no width"),
        (_experts(lambda e: e["1"].__setitem__(0, 15)), "expert width 15"),
        (_experts(lambda e: e["1"].__setitem__(1, 3)), "missing is 1"),
        (_experts(lambda e: e["1"].__setitem__(0, 0)), "width is 0"),
        (_experts(lambda e: e["1"].pop()), "2 groups"),
        (_experts(lambda e: e.update({"1": e["1"][:6]})), "tripwire|8|stops loaders"),
        (_experts(lambda e: e.update({"1": [4, 4]})), "2 experts leave 1 in a group, the router needs 2"),
        (_experts(lambda e: e.update({"1": [4]})), "sends every token to 2"),
    ],
)
def test_corrupt_layouts_are_refused(
    edit: Callable[[dict[str, Any]], None], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny("deepseek_v3")  # two groups, the first layer dense
    good = ragged(folder, tmp_path / "good", kept_of(Checkpoint.open(folder)))
    bad = edited(good, tmp_path / "bad", edit)
    with pytest.raises(MoezipError, match=message):
        source = Checkpoint.open(bad)
        check_shapes(source, identify(source.config))
    with pytest.raises(MoezipError, match=message):
        moezip.load(bad)
    assert verify(good, deep=True) == []
    if "tripwire" not in message and message != "missing is 1":
        assert verify(bad, deep=False)


def test_a_missing_expert_is_refused_before_it_is_made_up(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArchitectureError, match="the first missing is 3"):
        moezip.load(path)
    assert any("experts.3.up_proj" in finding.what for finding in verify(path, deep=False))


def test_the_layout_survives_its_config() -> None:
    layout = Layout({0: (4, 0, 7), 11: (3,)})
    assert Layout.of({"quantization_config": json.loads(json.dumps(layout.to_config()))}) == layout
    assert Layout.of({}) is None
    assert Layout.of({"quantization_config": {"quant_method": "fp8"}}) is None


# -- commands -----------------------------------------------------------------------------------------------


def test_inspect_verify_and_evaluate_read_it(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("deepseek_v3")
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    found = cli("inspect", path, "--json").json
    assert found["experts"] == [8, 6]
    stored = [Checkpoint.open(path).spec(name) for name in Checkpoint.open(path).names()]
    assert found["parameters"] == sum(spec.elements for spec in stored) - 1  # the tripwire is no parameter
    assert cli("verify", path).code == 0
    nll = cli("evaluate", path, "--data", text, "--seq-len", 32, "--json").json["nll"]
    # the same loss by hand, from the loaded model
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(path)(text.read_text(), add_special_tokens=False).input_ids
    model, losses = load(path, IMPLEMENTATION), []
    for start in range(0, len(ids) - 31, 32):
        row = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            losses.append(model(row, use_cache=False, labels=row).loss)
    assert len(losses) > 5 and nll == pytest.approx(float(torch.stack(losses).mean()), abs=0.02)


def test_compressing_it_again_is_refused(cli: Any, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    path = ragged(folder, tmp_path / "ragged", kept_of(Checkpoint.open(folder)))
    answer = cli("prune", path, tmp_path / "out", "--method", "random", "--keep", 4)
    assert answer.code == 1 and "differ" in answer.err
