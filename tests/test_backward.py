"""The streamed gradient against a plain backward of the whole model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from moezip.arch.families import identify
from moezip.arch.matrices import expert_matrices, gate_and_up
from moezip.arch.spec import LayerFacts
from moezip.calibrate.backward import Backward, _scale
from moezip.calibrate.choices import Recorded, held, ids_dtype
from moezip.calibrate.data import Rows
from moezip.calibrate.experts import register
from moezip.calibrate.kept import disk_bytes
from moezip.calibrate.record import BY_NAME, GRADIENT_RECORDS
from moezip.calibrate.run import calibrate
from moezip.calibrate.stream import BASE_BYTES, Stream
from moezip.calibrate.trace import Trace
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import MoezipError
from moezip.progress import Progress
from tests.tiny import FAMILIES, token_ids

# float32 sums in another order; the law's own bound.
RELATIVE = 1e-5
# A single expert's squares: twice the relative error of what is squared.
SQUARED = 2 * RELATIVE
# A float32 sum of some dozen positive terms, each rounded twice.
FLOAT32_SUM = 1e-5
# A few dozen roundings of 2^-11 one after another, which partly cancel.
FLOAT16 = 5e-3


def rows_of(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Rows:
    return Rows(ids, mask, ("text",) * len(ids))


class Watched(Backward):
    """Keeps u and v of every token, expert and neuron, by layer: two float64 arrays [T, E, F], NaN where not chosen."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        tokens = self.rows.ids.numel()
        self.inner = {
            fact.layer: np.full((2, tokens, fact.experts, fact.width), np.nan) for fact in self._facts.values()
        }

    def _step(self, index: int, inputs: Any, given: Any, ids: Any, start: int) -> Any:
        scale, gradients = super()._step(index, inputs, given, ids, start)
        if ids is not None:
            spread(self._trace, self.inner[index][:, start * self.rows.ids.shape[1] :], scale)
        return scale, gradients


def spread(trace: Trace, into: np.ndarray, scale: float = 1.0) -> None:
    for part in trace.parts:
        count, token = part.slots.numel(), part.slots // trace.ids.shape[1]
        into[0, token, part.expert] = part.inner.detach()[:count].double()
        into[1, token, part.expert] = part.inner.grad[:count].double() / scale


def streamed(folder: Path, rows: Rows, work: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Watched:
    with Checkpoint.open(folder) as source:
        # a quarter of 8: micro-batches of two rows, the last of one
        found = Watched(Stream(source, dtype=dtype, micro_rows=8), rows, work, **options)
        found.run()
    return found


def whole(folder: Path, rows: Rows, like: Watched) -> tuple[float, dict[int, np.ndarray]]:
    """Loss, and u and v as ``Watched`` has them, from one backward of the model in memory."""
    model, traces, entry = in_memory(folder, register()), {}, like._entry
    for layer in like.inner:
        block = model.get_submodule(entry.layers)[layer].get_submodule(entry.block)
        experts = block.get_submodule(entry.experts_module)
        traces[layer] = experts._moezip_trace = Trace()
    loss = backward_of(model, rows)
    found = {layer: np.full_like(inner, np.nan) for layer, inner in like.inner.items()}
    for layer, trace in traces.items():
        spread(trace, found[layer])
    return loss, found


def in_memory(folder: Path, implementation: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=implementation
    ).eval().requires_grad_(False)  # fmt: skip
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # off the mapped file, whose addresses change the last bit of products
    return model


def backward_of(model: Any, rows: Rows) -> float:
    """The summed loss, its gradients passed through the whole model."""
    embedded = model.get_input_embeddings()(rows.ids).detach().requires_grad_()
    mask = None if rows.mask is None else rows.mask.long()
    logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows.ids[:, 1:], reduction="none")
    if rows.mask is not None:
        losses = losses[rows.mask[:, :-1] & rows.mask[:, 1:]]
    loss = losses.sum()
    loss.backward()
    return loss.item()


def error_by_expert(own: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Relative error of [T, E, F], as norms over tokens and neurons, [E]; 0 for an expert that nobody chose."""
    difference = np.sqrt(np.nansum((own - wanted) ** 2, (0, 2)))
    size = np.sqrt(np.nansum(wanted**2, (0, 2)))
    return difference / np.where(size > 0, size, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_a_plain_backward(name: str, tiny: Any, tmp_path: Path) -> None:
    rows = rows_of(token_ids(5, 12))
    found = streamed(tiny(name), rows, tmp_path)
    loss, wanted = whole(tiny(name), rows, found)
    assert found.losses["text"] == pytest.approx(loss, rel=RELATIVE)
    assert found.scored == {"text": 5 * 11}
    assert list(tmp_path.iterdir()) == []
    for layer, (u, v) in found.inner.items():
        assert (np.isnan(u) == np.isnan(wanted[layer][0])).all()  # the same experts
        assert (np.nansum(v**2, (0, 2)) > 0).any()
        assert error_by_expert(u, wanted[layer][0]).max() < RELATIVE
        assert error_by_expert(v, wanted[layer][1]).max() < RELATIVE


def test_padding_takes_no_part(tiny: Any, tmp_path: Path) -> None:
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, 7:] = mask[4, 3:] = False  # lengths 12, 7, 12, 12 and 3: 46 tokens, 41 of them after another
    rows = rows_of(token_ids(5, 12), mask)
    found = streamed(tiny("qwen3_moe"), rows, tmp_path)
    loss, wanted = whole(tiny("qwen3_moe"), rows, found)
    assert found.losses["text"] == pytest.approx(loss, rel=RELATIVE)
    assert found.scored == {"text": 41}
    real = mask.flatten().numpy()
    for layer, (_, v) in found.inner.items():
        assert error_by_expert(v[real], wanted[layer][1][real]).max() < RELATIVE
        assert found.sums["text"][layer]["routed"].sum() == 46 * 2


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_sums_are_those_of_activations_and_gradients(name: str, tiny: Any, tmp_path: Path) -> None:
    found = streamed(tiny(name), rows_of(token_ids(5, 12)), tmp_path)
    for layer, (u, v) in found.inner.items():
        mine = found.sums["text"][layer]
        assert set(mine) == {record.name for record in GRADIENT_RECORDS}
        assert (mine["routed"] == (~np.isnan(u[:, :, 0])).sum(0)).all()
        squares = {"inner_square": u**2, "inner_grad_square": v**2, "inner_product_square": (u * v) ** 2}
        for key, value in squares.items():
            assert np.allclose(mine[key], np.nansum(value, 0), rtol=FLOAT32_SUM, atol=0), key


# -- squared gradients of outputs ---------------------------------------------------------------------------


def three_products(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts with their gate and up products apart; every product's output keeps its gradient, in
    ``module.seen``: (role, expert, tokens, output)."""
    result, module.seen = torch.zeros_like(hidden_states), []
    for expert in range(module.num_experts):
        token, place = torch.where(top_k_index == expert)
        matrices, biases = expert_matrices(module, expert), dict[str, Any]()
        if module.has_bias:
            biases["gate"], biases["up"] = gate_and_up(module, module.gate_up_proj_bias[expert])
            biases["down"] = module.down_proj_bias[expert]
        gate, up = (F.linear(hidden_states[token], matrices[role], biases.get(role)) for role in ("gate", "up"))
        both = torch.cat([gate, up], 1) if module.is_concatenated else torch.stack([gate, up], 2).flatten(1)
        down = F.linear(module._apply_gate(both), matrices["down"], biases.get("down"))
        for role, output in (("gate", gate), ("up", up), ("down", down)):
            output.retain_grad()
            module.seen.append((role, expert, token, output))
        result = result.index_add(0, token, down * top_k_weights[token, place, None])
    return result


Squares = tuple[dict[int, dict[str, np.ndarray]], dict[str, np.ndarray]]


def squares_of(model: Any, rows: Rows, like: Backward) -> Squares:
    """Sums of squared output gradients of one plain backward: per layer those of ``GRADIENT_RECORDS``, and per linear
    of the whole model, by module path."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):  # phimoe's router is a linear that chooses
                output.retain_grad()
                outputs[path] = output

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(keep(path))
    backward_of(model, rows)
    real = torch.ones(rows.ids.numel(), dtype=torch.bool) if rows.mask is None else rows.mask.flatten()
    experts, entry = {}, like._entry
    for layer, fact in like._facts.items():
        block = model.get_submodule(entry.layers)[layer].get_submodule(entry.block)
        sizes = {"gate": fact.width, "up": fact.width, "down": fact.hidden}
        found = experts[layer] = {f"{role}_grad_square": np.zeros((fact.experts, sizes[role])) for role in sizes}
        for role, expert, token, output in block.get_submodule(entry.experts_module).seen:
            found[f"{role}_grad_square"][expert] = output.grad[real[token]].double().square().sum(0).numpy()
    linears = {
        path: out.grad.reshape(len(real), -1)[real].double().square().sum(0).numpy() for path, out in outputs.items()
    }
    return experts, linears


def error_of(own_squares: np.ndarray, wanted_squares: np.ndarray) -> float:
    """Relative error of the gradients' norms over tokens, the worst row's.

    What is kept are squares; the law's bound is of gradients, and squaring doubles a relative error.
    """
    own, wanted = np.sqrt(own_squares), np.sqrt(wanted_squares)
    size = np.linalg.norm(wanted, axis=-1)
    return float((np.linalg.norm(own - wanted, axis=-1) / np.where(size > 0, size, 1)).max())


@pytest.fixture(scope="module")
def apart() -> str:
    """Name of an experts implementation."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("three-products", three_products)
    return "three-products"


PADDED = ("qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(("name", "padded"), [*((n, False) for n in FAMILIES), *((n, True) for n in PADDED)])
def test_squared_output_gradients_equal_a_plain_backward(
    name: str, padded: bool, tiny: Any, tmp_path: Path, apart: str
) -> None:
    mask = None
    if padded:
        mask = torch.ones(5, 12, dtype=torch.bool)
        mask[1, 7:] = mask[4, 3:] = False
    rows = rows_of(token_ids(5, 12), mask)
    found = streamed(tiny(name), rows, tmp_path)
    experts, linears = squares_of(in_memory(tiny(name), apart), rows, found)
    for layer, wanted in experts.items():
        for key, value in wanted.items():
            own_sums = found.sums["text"][layer][key]
            assert error_of(own_sums.ravel(), value.ravel()) < RELATIVE, (layer, key)
            assert error_of(own_sums, value) < SQUARED, (layer, key)
            assert (value.sum(1) > 0).any()
    # which linears there are is test_layerwise.py's and the skeleton's matter; that none is forgotten is this one's
    skeleton = found.stream.skeleton
    own = {
        path: found.linears["text"][fills[0].name]
        for path in linears
        if len(fills := skeleton.fills.get(f"{path}.weight", [])) == 1 and fills[0].name in found.linears["text"]
    }
    assert len(own) == len(found.linears["text"])
    assert {path.rpartition(".")[2] for path in linears.keys() - own.keys()} <= NO_PRICE
    assert ("lm_head" in own) == (name != "qwen3_moe")  # whose head is tied
    for path, sums in own.items():
        assert error_of(sums, linears[path]) < RELATIVE, path


# Routers, the one-output gate of a shared expert, and a head that is tied to the embeddings.
NO_PRICE = {"gate", "router", "shared_expert_gate", "lm_head"}


def test_windows_that_outgrow_the_ceiling_are_told(tiny: Any, tmp_path: Path) -> None:
    with Checkpoint.open(tiny("qwen3_moe")) as source:
        layer = Stream(source).layer_bytes
        # one token of float32: 16 widths (14 and one per expert) of 32 numbers, times four: 8 KiB. With nothing but the
        # program and the layer, 128 MiB are left: 16384 tokens.
        tight = Stream(source, max_memory=BASE_BYTES + layer)
        with pytest.raises(MoezipError, match=r"takes about 128 MiB with gradients, .* leaves 128 MiB") as caught:
            Backward(tight, rows_of(token_ids(1, 16_385)), tmp_path)
        assert "a --seq-len of at most 16384" in str(caught.value.next)
        # what just fits runs alone, what fits twice runs in twos
        for width, beside in ((16_384, 1), (8_192, 2)):
            tight.micro_rows = None
            tight.run_side_by_side(4)
            Backward(tight, rows_of(token_ids(1, width)), tmp_path)
            assert (tight.side_by_side, tight.micro_rows) == (beside, 1)


# -- the experts that were chosen ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Router:
    """A router of a whole model, what it was called with, and the facts of its layer."""

    module: Any
    args: tuple[Any, ...]
    fact: LayerFacts

    def free(self, args: tuple[Any, ...] | None = None) -> tuple[torch.Tensor, ...]:
        """Its outputs as it chooses itself; the last two are gates and ids [T, k]."""
        with torch.no_grad():
            result: tuple[torch.Tensor, ...] = self.module(*(args or self.args))
        return result

    def held(self, ids: torch.Tensor, args: tuple[Any, ...] | None = None) -> tuple[torch.Tensor, ...]:
        recorded = Recorded()
        recorded.ids = ids
        with held(self.module, recorded, self.fact):
            return self.free(args)


def router_of(folder: Path) -> Router:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    entry = identify(model.config.to_dict())
    fact = entry.layer_facts(json.loads((folder / "config.json").read_text()))[-1]
    block = model.get_submodule(entry.layers)[fact.layer].get_submodule(entry.block)
    module, seen = block.get_submodule(entry.router_module), []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(token_ids(8, 12), use_cache=False)
    hook.remove()
    return Router(module, seen[0], fact)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_router_can_be_held_to_what_it_chose(name: str, tiny: Any) -> None:
    router = router_of(tiny(name))
    own = router.free()
    # to its own choice: nothing changes, to the bit
    for free, same in zip(own, router.held(own[-1]), strict=True):
        assert torch.equal(free, same)
    # what it sees has moved so far that it would choose otherwise for some tokens
    noise = 0.3 * torch.randn(router.args[0].shape, generator=torch.Generator().manual_seed(1))
    moved = (router.args[0] + noise, *router.args[1:])
    (*_, gates, ids), (*_, held_gates, held_ids) = router.free(moved), router.held(own[-1], moved)
    same = (ids == own[-1]).all(1)
    assert 0 < same.sum() < len(same)
    assert torch.equal(held_ids, own[-1])
    assert torch.equal(held_gates[same], gates[same])
    assert (held_gates > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tie_is_decided_as_before(name: str, tiny: Any) -> None:
    """Two experts with one router row are tied: which of them is chosen is chance, and their gates are the same."""
    router = router_of(tiny(name))
    experts = router.fact.experts
    bias = [arg for arg in router.args[1:] if isinstance(arg, torch.Tensor) and arg.numel() == experts]
    for tensor in [*router.module.parameters(), *router.module.buffers(), *bias]:
        for axis in [axis for axis, size in enumerate(tensor.shape) if size == experts]:
            tensor.data.select(axis, 1).copy_(tensor.data.select(axis, 0))
    *_, gates, ids = router.free()
    one = (ids < 2).sum(1) == 1
    assert one.any()
    other = torch.where((ids < 2) & one[:, None], 1 - ids, ids)
    *_, held_gates, held_ids = router.held(other)
    assert torch.equal(held_ids, other) and not torch.equal(other, ids)
    assert torch.equal(held_gates, gates)


class Shaken(Watched):
    """Its routers are others when the layers are run again."""

    @contextmanager
    def _watched(self, index: int) -> Iterator[None]:
        with super()._watched(index):
            if index in self._facts:
                block = self.stream.layers[index].get_submodule(self._entry.block)
                weight = block.get_submodule(self._entry.router_module).weight.data
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            yield


def test_layers_that_run_again_take_the_recorded_experts(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(token_ids(5, 12))
    plain = streamed(tiny("qwen3_moe"), rows, tmp_path)
    with Checkpoint.open(tiny("qwen3_moe")) as source:
        shaken = Shaken(Stream(source, dtype=torch.float32, micro_rows=8), rows, tmp_path)
        shaken.run()
        for layer, (u, v) in shaken.inner.items():
            assert (np.isnan(u) == np.isnan(plain.inner[layer][0])).all()
            assert not np.allclose(v, plain.inner[layer][1], equal_nan=True)  # their gates are those of now
        # a router that cannot be held is told, not used
        monkeypatch.setattr("moezip.calibrate.backward.held", lambda *_: nullcontext())
        with pytest.raises(MoezipError, match="cannot be held to its choices"):
            Shaken(Stream(source, dtype=torch.float32, micro_rows=8), rows, tmp_path).run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("experts", "dtype"), [(256, torch.uint8), (257, torch.int16), (32_769, torch.int32)])
def test_ids_take_few_bytes(experts: int, dtype: torch.dtype) -> None:
    assert ids_dtype(experts) == dtype
    assert torch.tensor(experts - 1).to(dtype).item() == experts - 1


# -- interrupted and resumed --------------------------------------------------------------------------------


class Snapshots:
    """Copies the work folder whenever asked: what a process that is killed then leaves behind."""

    def __init__(self, work: Path, into: Path):
        self.work, self.into = work, into
        self.taken: list[tuple[str, Path]] = []
        self.most = 0

    def take(self, what: str) -> None:
        self.most = max(self.most, sum(file.stat().st_size for file in self.work.rglob("*.bin")))
        copy = self.into / f"{len(self.taken)}"
        shutil.copytree(self.work, copy)
        self.taken.append((what, copy))

    def __call__(self, progress: Progress) -> None:
        if progress.stage in ("forward", "backward"):
            self.take(f"{progress.stage} {progress.done}")


class Told:
    """The first step of either half that is told."""

    first = ""

    def __call__(self, progress: Progress) -> None:
        if progress.stage in ("forward", "backward"):
            self.first = self.first or f"{progress.stage} {progress.done}"


OPTIONS: dict[str, Any] = {"micro_rows": 8, "gradients": "data", "save_every": 0.0}


def passed(source: Checkpoint, work: Path, **options: Any) -> bytes:
    """The statistics file of a pass with gradients."""
    rows = Rows(token_ids(5, 12), None, ("a", "a", "a", "b", "b"))
    found = calibrate(source, rows, [BY_NAME["counts"]], workdir=work, **{**OPTIONS, **options})
    found.save(work.with_suffix(".stats"))
    return work.with_suffix(".stats").read_bytes()


def test_a_killed_pass_goes_on_to_the_same_bytes(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(tiny("deepseek_v3"))  # layer 0 is dense, the head is its own
    # labels that are drawn must be drawn the same again
    wanted = passed(source, tmp_path / "plain", save_every=1e9, gradients="model")
    shots, step = Snapshots(tmp_path / "work", tmp_path / "shots"), Backward._step

    def amid(self: Backward, index: int, inputs: Any, given: Any, ids: Any, start: int) -> Any:
        if start == 2:  # domain a is two micro-batches of rows 0, 1 and row 2
            shots.take(f"amid {index}")
        return step(self, index, inputs, given, ids, start)

    with monkeypatch.context() as patched:
        patched.setattr(Backward, "_step", amid)
        assert passed(source, tmp_path / "work", watch=shots, gradients="model") == wanted
    assert not (tmp_path / "work").exists()
    names = [what for what, _ in shots.taken]
    assert names == ["forward 0", "forward 1", "forward 2", "forward 3", "backward 0", "amid 2", "backward 1", "amid 1",
                     "backward 2", "amid 0", "backward 3"]  # fmt: skip
    # every layer is saved just after it is told, so what is told first after resuming is what was saved before
    first = ["forward 0", "forward 0", "forward 1", "forward 2", "backward 0", "backward 0", "backward 0", "backward 1",
             "backward 1", "backward 2", "backward 2"]  # fmt: skip
    for (_, copy), begins in zip(shots.taken, first, strict=True):
        told = Told()
        # micro-batches of what was saved, not of what is asked now
        rows = 8 if begins == "forward 0" else 99
        assert passed(source, copy, resume=True, micro_rows=rows, watch=told, gradients="model") == wanted
        assert told.first == begins
        assert not copy.exists()
    # 60 tokens; 3 layers' inputs of 32 float32, two gradients as large, and two times two ids of one byte:
    # 60 * (32 * 4 * (3 + 2) + 4)
    assert shots.most == 38_640 == disk_bytes(60, 32, 4, 3, identify(source.config).layer_facts(source.config))


class Interrupt:
    def __init__(self, stage: str, done: int):
        self.at = (stage, done)

    def __call__(self, progress: Progress) -> None:
        if (progress.stage, progress.done) == self.at:
            raise KeyboardInterrupt


def interrupted(source: Checkpoint, work: Path, stage: str, done: int, **options: Any) -> list[str]:
    """What an interrupted pass leaves."""
    with pytest.raises(KeyboardInterrupt):
        passed(source, work, watch=Interrupt(stage, done), **options)
    return sorted(file.name for file in work.rglob("*") if file.is_file())


def test_a_dry_run_says_how_much_disk(tiny: Any, tmp_path: Path, cli: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    words = ("--method", "nats", "--keep", 4, "--data", text, "--tokens", 60, "--dry-run", "--json")
    found = cli("prune", tiny("deepseek_v3"), tmp_path / "out", *words)
    # the hidden states of the model on four times the text, and three variants in each of two layers: 10 * 60 * 32 * 4
    assert found.json["disk_bytes"] == 76_800
    found = cli("prune", tiny("deepseek_v3"), tmp_path / "out", *words, "--set", "probes=0")
    assert found.json["disk_bytes"] == 38_640  # see above


def test_an_interrupted_command_says_how_far_it_is(
    tiny: Any, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, work = tmp_path / "text.txt", tmp_path / "work"
    text.write_text("some text that is long enough for a few windows of tokens " * 4)
    words = ("calibrate", tiny("qwen3_moe"), "--data", text, "--tokens", 64, "--seq-len", 16, "--record", "gradients",
             "--out", tmp_path / "stats", "--workdir", work)  # fmt: skip
    layer = Backward._layer

    def stop(self: Backward, index: int, *args: Any) -> None:
        if index == 0:
            raise KeyboardInterrupt
        layer(self, index, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Backward, "_layer", stop)
        patched.setattr(calibrate, "__kwdefaults__", {**calibrate.__kwdefaults__, "save_every": 0.0})
        answer = cli(*words)
    assert answer.code == 130 and "the forward half and 2 of 3 layers of the backward half are saved" in answer.err
    assert "--resume" in answer.err
    assert cli(*words, "--resume").code == 0
    assert not work.exists()


def test_an_interrupted_pass_leaves_what_it_needs(tiny: Any, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    wanted = passed(source, tmp_path / "plain", save_every=1e9)
    assert interrupted(source, work, "forward", 2) == [
        "ids-0.bin", "input-0.bin", "input-1.bin", "progress.json", "sums-forward-1.safetensors",
    ]  # fmt: skip
    assert interrupted(source, work, "backward", 2, resume=True) == [
        "gradient-2.bin", "ids-0.bin", "ids-1.bin", "input-0.bin", "input-1.bin", "progress.json",
        "sums-backward-1.safetensors",
    ]  # fmt: skip
    assert passed(source, work, resume=True) == wanted
    assert not work.exists()
    # seconds between saves hold for both halves
    assert interrupted(source, work, "backward", 2, save_every=1e9) == [] and not work.exists()


def test_another_pass_is_refused_and_a_fresh_start_is_not(tiny: Any, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    left = interrupted(source, work, "backward", 2)
    for other in ({"gradients": "model"}, {"seed": 1}, {"gradients": None}):
        with pytest.raises(MoezipError, match="interrupted pass with another checkpoint, other data or other"):
            passed(source, work, resume=True, **other)
        assert sorted(file.name for file in work.rglob("*") if file.is_file()) == left
    (work / "backward" / "mine.txt").write_text("keep")
    passed(source, work, gradients=None)
    assert [str(file.relative_to(work)) for file in work.rglob("*")] == ["backward", "backward/mine.txt"]


@pytest.mark.parametrize("name", ["input-0.bin", "ids-0.bin", "gradient-2.bin", "sums-backward-1.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_files_are_refused(name: str, how: str, tiny: Any, tmp_path: Path) -> None:
    source, work = Checkpoint.open(tiny("qwen3_moe")), tmp_path / "work"
    interrupted(source, work, "backward", 2)
    file = work / "backward" / name
    content = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(content[:-3])
    with pytest.raises(MoezipError) as caught:
        passed(source, work, resume=True)
    assert "without --resume" in str(caught.value.next)


# -- gradients that would vanish ----------------------------------------------------------------------------


def test_float16_gradients_do_not_vanish(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "faint"
    shutil.copytree(tiny("qwen3_moe", dtype="float16", shards=1, tie_word_embeddings=False), folder)
    file = folder / "model.safetensors"
    file.chmod(0o644)
    tensors = load_file(file)
    # gradients that reach the last layer are about 2^-12 * 2^-4 * 0.15: below 6e-8 once they are inside an expert
    tensors["model.norm.weight"] *= 2.0**-12
    tensors["lm_head.weight"] *= 2.0**-4
    tensors["model.embed_tokens.weight"] *= 2.0**7
    save_file(tensors, file, {"format": "pt"})
    rows = rows_of(token_ids(5, 12))
    exact, half = (streamed(folder, rows, tmp_path / "w", dtype=kind) for kind in (torch.float32, torch.float16))
    for layer, (_, v) in half.inner.items():
        wanted = exact.inner[layer][1]
        assert (np.isnan(v) == np.isnan(wanted)).all()  # a seed without ties within float16
        assert error_by_expert(v, wanted).max() < FLOAT16
    monkeypatch.setattr("moezip.calibrate.backward._scale", lambda peak: 1.0)
    lost = streamed(folder, rows, tmp_path / "w", dtype=torch.float16)
    assert all(error_by_expert(v, exact.inner[layer][1]).max() > 10 * FLOAT16 for layer, (_, v) in lost.inner.items())


@pytest.mark.parametrize(("peak", "scale"), [(16.0, 0.5), (15.9, 1.0), (1e-9, 2.0**33), (0.0, 1.0), (math.inf, 1.0)])
def test_scales_are_powers_of_two(peak: float, scale: float) -> None:
    # 1e-9 = 0.537 * 2^-29, so 16 * 2^29 = 2^33 brings it to 8.6
    assert _scale(peak) == scale
