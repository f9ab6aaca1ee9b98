"""Run-time skipping: rules by hand, laws over the families, what is stored, the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moezip.arch.families import identify
from moezip.calibrate.skips import BINS, GATE_RATIOS, Lessons, lessons, ranked
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import ArchitectureError, CheckpointError
from moezip.evaluate.loss import evaluate
from moezip.export.verify import verify
from moezip.prune.odp import least_harmed, shares_below, thresholds
from moezip.prune.otp import MaskNetwork, train
from moezip.runtime.attended import important, received
from moezip.runtime.load import load
from moezip.runtime.skipping import KEY, MASKS, Chooser, Skipping, Skips, attach, masks_bytes, remaining
from tests.command import Cli, files_of, write_text
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]


def edited(folder: Path, out: Path, **keys: Any) -> Path:
    """A copy of a checkpoint with other keys in its config."""
    shutil.copytree(folder, out)
    for file in out.iterdir():
        file.chmod(0o644)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **keys}))
    return out


def rule(folder: Path, limit: float, **more: Any) -> dict[str, Any]:
    """The same threshold for every rank of every layer of a checkpoint."""
    source = Checkpoint.open(folder)
    facts = identify(source.config).layer_facts(source.config)
    rows = {fact.layer: (0.0, *(limit,) * (fact.top_k - 1)) for fact in facts}
    return Skipping("odp" if more.get("protect") else "naee", more.pop("renormalise", True), rows, **more).to_config()


def logits(folder: Path, ids: torch.Tensor, **keys: Any) -> torch.Tensor:
    model = load(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=ids, **keys).logits


IDS = torch.tensor([[5, 17, 42, 8, 23, 61, 30, 9, 77, 12], [9, 8, 71, 60, 5, 44, 31, 20, 19, 6]])


# -- gates --------------------------------------------------------------------------------------------------


def test_gates_are_ranked_by_size_whatever_their_order() -> None:
    # best 0.4 in place 1; ratios 1, 0.2 / 0.4, 0.1 / 0.4. Second token: equal gates keep their order; third: no gate
    places, ratios = ranked(torch.tensor([[0.1, 0.4, 0.2], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]]))
    assert places.tolist() == [[1, 2, 0], [0, 1, 2], [0, 1, 2]]
    assert ratios.tolist() == [[1.0, 0.5, 0.25], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


def test_gates_that_stay_add_up_to_what_all_did() -> None:
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    drop = torch.tensor([[False, False, True], [False, False, False]])
    # 0.5 + 0.3 is left of 1: 0.5 / 0.8, 0.3 / 0.8; the second token drops nothing
    assert remaining(gates, drop, True)[0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert remaining(gates, drop, False)[0].tolist() == pytest.approx([0.5, 0.3, 0.0])
    assert torch.equal(remaining(gates, drop, True)[1], gates[1])


class Experts:
    num_experts = 8


def chosen(skipping: Skipping, ids: list[list[int]], gates: list[list[float]]) -> tuple[Any, Skips]:
    skips = Skips(skipping)
    hook = Chooser(skipping, 3, skips, None, None)
    return hook(Experts(), (torch.zeros(len(ids), 4), torch.tensor(ids), torch.tensor(gates))), skips


def test_an_expert_below_the_threshold_of_its_rank_is_dropped() -> None:
    skipping = Skipping("naee", True, {3: (0.0, 0.5, 0.3)})
    # ratios, best first: 1, 0.4 (below 0.5: dropped), 0.32 (not below 0.3); then 1, 0.5 (not below), 0.2 (dropped)
    (_, ids, gates), skips = chosen(skipping, [[4, 5, 6], [1, 2, 3]], [[0.2, 0.5, 0.16], [0.5, 0.25, 0.1]])
    assert ids.tolist() == [[8, 5, 6], [1, 2, 8]]
    # 0.86 in all, 0.66 left: 0.5 * 0.86 / 0.66; 0.85 in all, 0.75 left
    assert gates[0].tolist() == pytest.approx([0.0, 0.5 * 0.86 / 0.66, 0.16 * 0.86 / 0.66])
    assert gates[1].tolist() == pytest.approx([0.5 * 0.85 / 0.75, 0.25 * 0.85 / 0.75, 0.0])
    assert (skips.calls, skips.dropped, skips.share) == ({3: 6}, {3: 2}, pytest.approx(1 / 3))


def test_another_layer_and_a_threshold_of_0_leave_the_call_alone() -> None:
    for limits in ({3: (0.0, 0.0, 0.0)}, {2: (0.0, 1.0, 1.0)}):
        given, skips = chosen(Skipping("naee", True, limits), [[4, 5, 6]], [[0.2, 0.5, 0.1]])
        assert given is None and skips.share == 0 and skips.calls == {3: 3}


# -- thresholds ---------------------------------------------------------------------------------------------


def test_thresholds_are_quantiles() -> None:
    histogram = np.zeros((2, 3, 4))
    histogram[0, 0] = [0, 0, 0, 8]
    # of 8 tokens 2 in [0, 1/4), 4 in [1/4, 1/2), 2 in [1/2, 3/4): the median is 2 of 4 into the second bin, at 3/8
    histogram[0, 1] = [2, 4, 2, 0]
    histogram[0, 2] = [8, 0, 0, 0]  # the median is in the middle of the first bin
    assert thresholds(histogram, 0.5) == (0.0, 0.375, 0.125)
    assert thresholds(histogram, 0.25) == (0.0, 0.25, 0.0625)
    assert thresholds(histogram, 0) == (0.0, 0.0, 0.0)
    assert thresholds(histogram, 1) == (0.0, 0.75, 0.25)
    # of 24 calls, half of the 8 seconds and of the 8 thirds are below
    histogram[1] = histogram[0] * np.array([[3.0], [2.0], [1.0]])
    # of a mass of 24 + 16 + 8 = 48, 8 + 4
    assert shares_below(histogram, (0.0, 0.375, 0.125)) == pytest.approx((8 / 24, 12 / 48))
    assert shares_below(histogram, (0.0, 0.0, 0.0)) == (0.0, 0.0)


def test_layers_that_lose_least_take_part() -> None:
    masses = {1: 0.3, 2: 0.1, 4: 0.2, 7: 0.1}
    assert least_harmed(masses, 0) == [1, 2, 4, 7]
    assert least_harmed(masses, 1) == [2]
    assert least_harmed(masses, 3) == [2, 4, 7]


def test_the_record_bins_ratios_and_weighs_them() -> None:
    from moezip.calibrate.record import Observation

    gates = torch.tensor([[0.25, 0.5], [0.5, 0.125]])
    norms = torch.tensor([[2.0, 3.0], [4.0, 8.0]])
    none = torch.zeros(0)
    seen = GATE_RATIOS.update(Observation(4, none.long(), gates, norms, none, none, none))
    assert seen.shape == (2, 2, BINS)
    # best gates have the ratio 1, the last bin: 0.5 * 3 and 0.5 * 4; the others 1/2 and 1/4: 0.25 * 2 and 0.125 * 8
    assert seen[0, 0].nonzero().flatten().tolist() == [BINS - 1] and seen[0, 0, -1] == 2 and seen[1, 0, -1] == 3.5
    assert [(int(i), float(seen[0, 1, i]), float(seen[1, 1, i])) for i in seen[0, 1].nonzero()] == [
        (BINS // 4, 1.0, 1.0), (BINS // 2, 1.0, 0.5)
    ]  # fmt: skip


# -- protected tokens ---------------------------------------------------------------------------------------


def test_attention_received_is_a_mean_over_those_who_may_look() -> None:
    # products 0: every token spreads its attention evenly over itself and what precedes it, as rows 1; 1/2 1/2; 1/3 ..
    query = torch.zeros(1, 2, 3, 4)
    found = received(query, torch.zeros(1, 1, 3, 4), None, None)
    # columns (1 + 1/2 + 1/3) / 3, (1/2 + 1/3) / 2, (1/3) / 1
    assert found[0].tolist() == pytest.approx([11 / 18, 5 / 12, 1 / 3])
    # the first token is padding, which may look at nothing and is looked at by nobody
    looks = torch.tensor([[False, False, False], [False, True, False], [False, True, True]])[None, None]
    assert received(query, query[:, :1], looks, None)[0].tolist() == pytest.approx([0.0, 3 / 4, 1 / 2])
    assert torch.equal(
        received(query, query[:, :1], torch.where(looks, 0.0, torch.finfo(torch.float32).min), None),
        received(query, query[:, :1], looks, None),
    )


def test_attention_received_is_that_of_the_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, heads, 7, 4, generator=chance) for heads in (6, 2))
    weights = (query @ key.repeat_interleave(3, 1).transpose(2, 3) / 2).masked_fill(
        torch.ones(7, 7).triu(1).bool(), -torch.inf
    )
    wanted = weights.softmax(-1).mean(1).sum(1) / torch.arange(7, 0, -1)
    for chunk in (2**26, 4 * 2 * 6 * 7 * 2):  # all at once, two rows at a time
        monkeypatch.setattr("moezip.runtime.attended.CHUNK", chunk)
        assert torch.allclose(received(query, key, None, None), wanted, atol=1e-6)  # sums of float32 in another order


def test_importance_is_norm_times_attention() -> None:
    seen = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    hidden = torch.tensor([[1.0, -1.0], [3.0, 0.0], [2.0, 2.0], [5.0, 5.0], [1.0, 0.0], [1.0, 0.0]])
    # 0.5 * 2, 0.4 * 3, 0.1 * 4; 0.1 * 10, 0.2, 0.7: the second of the first window, the first of the second
    assert important(seen, hidden, 0.1).tolist() == [False, True, False, True, False, False]
    assert important(seen, hidden, 0.4).tolist() == [True, True, False, True, False, True]  # 1.2 tokens, rounded up
    assert important(seen, hidden, 1.0).all()


# -- laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_laws(tiny: Tiny, tmp_path: Path, family: str) -> None:
    """Thresholds of 0 change no bit; thresholds of 1 leave the best expert; protected tokens keep all."""
    folder = tiny(family, dtype="float32")
    plain = edited(folder, tmp_path / "plain", **{KEY: rule(folder, 0.0)})
    source = Checkpoint.open(folder)
    entry = identify(source.config)
    facts = entry.layer_facts(source.config)
    model = load(plain, dtype=torch.float32)
    with torch.inference_mode():
        whole = model(input_ids=IDS).logits
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        assert sum(isinstance(hook, Chooser) for hook in hooks) == len(facts)
        assert model.moezip_skipping.share == 0
        for module in model.modules():
            module._forward_pre_hooks.clear()
        assert torch.equal(model(input_ids=IDS).logits, whole)
    shutil.rmtree(tmp_path / "plain")

    best = load(edited(folder, tmp_path / "best", **{KEY: rule(folder, 1.0)}), dtype=torch.float32)
    with torch.inference_mode():
        alone = best(input_ids=IDS).logits
    top_k = facts[0].top_k
    if entry.scoring != "sparsemixer":  # whose gates are all 1 where no expert is close to the best, as here
        assert best.moezip_skipping.share == pytest.approx(1 - 1 / top_k)
        assert not torch.equal(alone, whole)
    assert torch.isfinite(alone).all()

    kept = edited(folder, tmp_path / "kept", **{KEY: rule(folder, 1.0, protect=1.0)})
    model = load(kept, dtype=torch.float32)
    with torch.inference_mode():
        protected = model(input_ids=IDS).logits
    attends = "layer_types" not in source.config and "attn_layer_period" not in source.config
    if attends:
        assert model.moezip_skipping.share == 0
        assert torch.equal(protected, whole)
    else:  # layers without attention have nothing to protect by
        assert 0 <= model.moezip_skipping.share < 1 - 1 / top_k


def test_dropped_experts_are_as_if_their_gates_were_0(tiny: Tiny, tmp_path: Path) -> None:
    """Against the model of transformers whose experts are given the gates that remain."""
    folder = tiny("olmoe", dtype="float32")
    out = edited(folder, tmp_path / "out", **{KEY: rule(folder, 0.9, renormalise=False)})
    model = load(out, dtype=torch.float32)
    with torch.inference_mode():
        found = model(input_ids=IDS).logits
    assert 0.1 < model.moezip_skipping.share < 0.9
    stock = load(folder, dtype=torch.float32)
    stock.config._experts_implementation = "moezip"

    def weaken(_module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, gates = given
        return hidden, ids, gates * (gates >= 0.9 * gates.amax(-1, keepdim=True))

    for name, module in stock.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(weaken)
    with torch.inference_mode():
        assert torch.equal(stock(input_ids=IDS).logits, found)


@pytest.mark.parametrize("what", ["packed", "ragged", "remapped", "substituted"])
def test_models_of_every_form_skip(tiny: Tiny, tmp_path: Path, cli: Cli, what: str) -> None:
    """The streamed model and the loaded one drop the same calls, and lose as much."""
    folder, made, text = tiny("qwen3_moe"), tmp_path / "made", write_text(tmp_path / "text.jsonl")
    command = {
        "packed": ["quantize", folder, made, "--bits", 4, "--group-size", 0, "--solver", "rtn"],
        "ragged": ["prune", folder, made, "--method", "heapr", "--ratio", 0.5],
        "remapped": ["merge", folder, made, "--keep", 4, "--set", "router=remap"],
        "substituted": ["prune", folder, made, "--method", "nats", "--ratio", 0.4, "--scope", "model", "--for", "vllm"],
    }[what]
    answer = cli(*command, *([] if what == "packed" else ["--data", text, "--tokens", 512]), "-q")
    assert answer.code == 0, answer.err
    out = tmp_path / "out"
    answer = cli("skip", made, out, "--rule", "naee", "--data", text, "--tokens", 512, "--set", "quantile=0.6", "-q")
    assert answer.code == 0, answer.err
    assert cli("verify", out).code == 0
    seen = cli("evaluate", out, "--data", text, "--seq-len", 32, "--tokens", 32, "--json").json
    model = load(out)
    from moezip.calibrate.data import token_stream, tokenizer_of

    ids = torch.tensor([list(token_stream(text, tokenizer_of(out), 32))[:32]])
    with torch.inference_mode():
        found = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    loss = -found.gather(1, ids[0, 1:, None]).mean().item()
    # the loaded model's kernels round otherwise, so a gate at a threshold may fall on its other side
    assert model.moezip_skipping.share == pytest.approx(seen["skipped"]["share"], abs=0.05)
    assert 0.05 < model.moezip_skipping.share < 0.5
    assert loss == pytest.approx(seen["nll"], abs=0.02)


def test_decoding_skips_by_ratio_alone(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", dtype="float32")
    model = load(edited(folder, tmp_path / "out", **{KEY: rule(folder, 1.0, protect=1.0)}), dtype=torch.float32)
    with torch.inference_mode():
        first = model(input_ids=IDS, use_cache=True)
        assert model.moezip_skipping.share == 0  # the prompt's tokens are protected
        model.moezip_skipping.reset()
        model(input_ids=IDS[:, :1], past_key_values=first.past_key_values)
    assert model.moezip_skipping.share == pytest.approx(1 - 1 / model.config.num_experts_per_tok)


# -- masks --------------------------------------------------------------------------------------------------


class Constants:
    """Two experts that answer with constants."""

    num_experts, has_gate = 2, True

    def __init__(self, outputs: torch.Tensor):
        self.outputs = outputs

    def expert_linear(self, name: str, expert: int, value: torch.Tensor) -> torch.Tensor:
        return value if name == "gate_up_proj" else self.outputs[expert].expand(value.shape[0], -1)

    def _apply_gate(self, inner: torch.Tensor) -> torch.Tensor:
        return inner


def test_lessons_by_hand() -> None:
    experts = Constants(torch.tensor([[4.0, 0.0], [0.0, 8.0]]))
    hidden, ids = torch.ones(1, 2), torch.tensor([[1, 0]])
    gates = torch.tensor([[0.25, 0.75]])  # expert 0 is the best
    plain = lessons(experts, hidden, ids, gates, renormalise=False)
    # all: 0.75 * [4, 0] + 0.25 * [0, 8] = [3, 2]; the best alone: [3, 0], off by [0, -2]
    assert plain["products"].tolist() == [[[4.0, 0.0], [0.0, 0.0]]]
    grown = lessons(experts, hidden, ids, gates, renormalise=True)
    # the best alone with a gate of 1: [4, 0], off by [1, -2]
    assert grown["products"].tolist() == [[[5.0, 0.0], [0.0, 0.0]]]
    assert grown["ratios"].tolist() == [[1.0, pytest.approx(1 / 3)]]


def task(count: int = 2048) -> Lessons:
    """Tokens whose second expert is needed where their first number is positive, and useless where it is not."""
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(3))
    products = torch.zeros(count, 2, 2)
    products[:, 0, 0] = (inputs[:, 0] > 0).float()
    return Lessons(inputs, torch.tensor([[1.0, 0.5]]).expand(count, -1), products, 1.0)


def test_a_mask_network_learns_which_tokens_need_their_experts() -> None:
    given = task()
    network = train(given, penalty=1.0, steps=300, seed=0)
    kept = network.kept(given.inputs, given.ratios)
    needed = given.products[:, 0, 0] > 0
    # the second expert costs 0.5: worth it where leaving it out costs 1. Tokens near 0 are hard to tell
    assert ((kept == 2) == needed).float().mean() > 0.95


def test_training_in_a_program_that_uses_accelerate_itself() -> None:
    """Its own settings, here rounding to bf16 and sums over four batches, stay its own, and the network is the same."""
    code = (
        "from accelerate import Accelerator\n"
        "from tests.test_skipping import task\n"
        "from moezip.prune.otp import train\n"
        "own = Accelerator(cpu=True, mixed_precision='bf16', gradient_accumulation_steps=4) if {own} else None\n"
        "if own: own.gradient_state._set_sync_gradients(False)\n"  # between two of its updates
        "network = train(task(), penalty=1.0, steps=20, seed=0)\n"
        "kept = own and (own.mixed_precision, own.gradient_accumulation_steps, own.sync_gradients)\n"
        "assert kept in (None, ('bf16', 4, False)), kept\n"
        "print(network.inputs.double().sum().item(), network.bias.tolist())\n"
    )
    said = [
        subprocess.run([sys.executable, "-c", code.format(own=own)], capture_output=True, text=True, check=True).stdout
        for own in (False, True)
    ]
    assert said[0] == said[1] != ""


def test_penalties_at_both_ends() -> None:
    given = task()
    free, dear = (train(given, penalty=penalty, steps=300, seed=0) for penalty in (0.0, 50.0))
    assert (free.kept(given.inputs, given.ratios)[given.products[:, 0, 0] > 0] == 2).float().mean() > 0.95
    assert (dear.kept(given.inputs, given.ratios) == 1).all()
    again = train(given, penalty=50.0, steps=300, seed=0)
    assert torch.equal(again.inputs, dear.inputs) and torch.equal(again.bias, dear.bias)


def test_equal_scores_keep_more() -> None:
    network = MaskNetwork(torch.zeros(3, 4), torch.zeros(3, 3), torch.zeros(3))
    assert network.kept(torch.ones(2, 4), torch.ones(2, 3)).tolist() == [3, 3]
    network = MaskNetwork(torch.zeros(3, 4), torch.zeros(3, 3), torch.tensor([0.0, 1.0, 0.0]))
    assert network.kept(torch.ones(2, 4), torch.ones(2, 3)).tolist() == [2, 2]


def test_masks_that_keep_all_change_no_bit(tiny: Tiny, tmp_path: Path) -> None:
    import hashlib

    folder = tiny("deepseek_v3", dtype="float32")
    source = Checkpoint.open(folder)
    facts = identify(source.config).layer_facts(source.config)

    def stored(name: str, best: int) -> Path:
        raw = masks_bytes({
            fact.layer: MaskNetwork(
                torch.zeros(fact.top_k, fact.hidden), torch.zeros(fact.top_k, fact.top_k), torch.eye(fact.top_k)[best]
            )
            for fact in facts
        })  # fmt: skip
        skipping = Skipping(
            "otp", True, layers=tuple(fact.layer for fact in facts), sha256=hashlib.sha256(raw).hexdigest()
        )
        out = edited(folder, tmp_path / name, **{KEY: skipping.to_config()})
        (out / MASKS).parent.mkdir()
        (out / MASKS).write_bytes(raw)
        return out

    zero = edited(folder, tmp_path / "zero", **{KEY: rule(folder, 0.0)})
    assert torch.equal(logits(stored("all", facts[0].top_k - 1), IDS), logits(zero, IDS))
    one = edited(folder, tmp_path / "one", **{KEY: rule(folder, 1.0)})
    assert torch.equal(logits(stored("best", 0), IDS), logits(one, IDS))


# -- what is stored -----------------------------------------------------------------------------------------


def test_a_rule_survives_the_config() -> None:
    for skipping in (
        Skipping("naee", False, {0: (0.0, 0.25), 2: (0.0, 0.5)}),
        Skipping("odp", True, {1: (0.0, 0.5)}, protect=0.02),
        Skipping("otp", True, layers=(1, 2), sha256="ab"),
    ):
        assert Skipping.of(json.loads(json.dumps({KEY: skipping.to_config()}))) == skipping
    assert Skipping.of({}) is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"rule": "magic"}, "magic"),
        ({"thresholds": {"0": [0.1, 0.5]}}, "0 first"),
        ({"thresholds": {"0": [0.0, 1.5]}}, "between 0 and 1"),
        ({"thresholds": {"x": [0.0]}}, "cannot be read"),
        ({"thresholds": 3}, "cannot be read"),
        ({"protect": 2}, "protect"),
        ({"renormalise": "yes"}, "renormalise"),
        ({"thresholds": {"9": [0.0, 0.5]}}, "layer 9"),
        ({"thresholds": {"0": [0.0, 0.5, 0.5]}}, "3 thresholds"),
        ({"rule": "otp", "layers": [0]}, "no mask networks"),
    ],
)
def test_damaged_rules_are_refused(tiny: Tiny, tmp_path: Path, damage: dict[str, Any], said: str) -> None:
    folder = tiny("mixtral")
    out = edited(folder, tmp_path / "out", **{KEY: {**rule(folder, 0.5), **damage}})
    with pytest.raises(ArchitectureError, match=said):
        load(out)
    assert any(said in finding.what for finding in verify(out, deep=False))


# -- the command --------------------------------------------------------------------------------------------


def test_from_the_command_line(tiny: Tiny, tmp_path: Path, cli: Cli) -> None:
    folder, text = tiny("qwen3_moe"), write_text(tmp_path / "text.jsonl")
    made: dict[str, Any] = {}
    for name in ("naee", "odp", "otp"):
        out = tmp_path / name
        more = ["--set", "penalty=10"] if name == "otp" else []  # random experts put out more than the stream holds
        words = ["--rule", name, *more, "--data", text, "--tokens", 768, "--seq-len", 64]
        answer = cli("skip", folder, out, *words, "--json")
        assert answer.code == 0, answer.err
        assert answer.json["bytes_before"] == answer.json["bytes_after"] and answer.json["stock"]
        assert cli("verify", out).code == 0
        found, given = files_of(out), files_of(folder)
        assert all(found[file] == given[file] for file in given if ".safetensors" in file)
        seen = cli("evaluate", out, "--against", folder, "--data", text, "--seq-len", 64, "--json").json
        made[name] = seen["skipped"]["share"]
        assert seen["skipped"]["rule"] == name and set(seen["skipped"]["by_layer"]) == {"0", "1", "2"}
        # about the text that it was learnt on: medians drop half of the second of two
        if name == "naee":
            assert made[name] == pytest.approx(0.5 * (1 - 1 / 2), abs=0.01)
            assert answer.json["statistics"]["share_dropped"] == pytest.approx(made[name], abs=0.01)
        assert "loss" in cli("evaluate", out, "--data", text, "--seq-len", 64).out
    assert made["odp"] < made["naee"]  # some tokens are protected
    assert not cli("evaluate", folder, "--data", text, "--json").json["skipped"]
    smaller = tmp_path / "smaller"
    assert cli("prune", tmp_path / "otp", smaller, "--method", "random", "--keep", 6, "-q").code == 0
    assert files_of(smaller)[MASKS] == files_of(tmp_path / "otp")[MASKS]  # a rule is carried along
    assert cli("evaluate", smaller, "--data", text, "--json").json["skipped"]["share"] > 0
    (tmp_path / "otp" / MASKS).unlink()
    assert cli("verify", tmp_path / "otp").code == 1
    with pytest.raises(CheckpointError, match="not there"):
        load(tmp_path / "otp")


def test_quantile_0_changes_nothing(tiny: Tiny, tmp_path: Path, cli: Cli) -> None:
    folder, text = tiny("qwen2_moe"), write_text(tmp_path / "text.jsonl")
    out = tmp_path / "out"
    assert cli("skip", folder, out, "--rule", "odp", "--data", text, "--set", "quantile=0", "-q").code == 0
    measured = evaluate(Checkpoint.open(out), data=[text], seq_len=64)
    assert measured.loss == evaluate(Checkpoint.open(folder), data=[text], seq_len=64).loss
    assert measured.skipped is not None and measured.skipped.share == 0
    # a router that does not share gates out anew is not made to
    assert not json.loads((out / "config.json").read_text())[KEY]["renormalise"]


def test_stock_loaders_run_every_expert(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny("olmoe")
    out = edited(folder, tmp_path / "out", **{KEY: rule(folder, 1.0)})
    with torch.inference_mode():
        found, wanted = (AutoModelForCausalLM.from_pretrained(each)(input_ids=IDS).logits for each in (out, folder))
    assert torch.equal(found, wanted)


def test_the_command_asks_first(tiny: Tiny, tmp_path: Path, cli: Cli) -> None:
    folder, text, out = tiny("qwen3_moe"), write_text(tmp_path / "text.jsonl"), tmp_path / "out"
    for words, code, said in (
        (["--rule", "adp", "--data", text], 2, "did you mean 'odp'"),
        (["--rule", "naee"], 2, "--data"),
        (["--rule", "naee", "--data", tmp_path / "no.txt"], 1, "no such data file"),
        (["--data", text, "--set", "quantile=2"], 2, "from 0 to 1"),
        (["--rule", "naee", "--data", text, "--set", "protect=0.1"], 2, "protect"),
        (["--rule", "otp", "--data", text, "--set", "penalty=-1"], 2, "0 or more"),
        (["--data", text, "--set", "renormalise=perhaps"], 2, "auto, yes or no"),
        (["--data", text, "--set", "layers=7"], 2, "there are 3"),
    ):
        answer = cli("skip", folder, out, *words)
        assert answer.code == code and said in answer.err and not out.exists(), (words, answer)
    single = tiny("qwen3_moe", top_k=1)
    answer = cli("skip", single, out, "--data", text)
    assert answer.code == 1 and "one expert each" in answer.err


def test_dry_run_touches_nothing(tiny: Tiny, tmp_path: Path, cli: Cli) -> None:
    folder, text = tiny("qwen3_moe"), write_text(tmp_path / "text.jsonl")
    answer = cli(
        "skip", folder, tmp_path / "out", "--rule", "otp", "--data", text, "--tokens", 512, "--dry-run", "--json"
    )
    # 3 layers of 2 masks over 32 numbers, 2 ratios and a bias, of 4 bytes
    assert answer.json["masks_bytes"] == 3 * 2 * 4 * (32 + 2 + 1) and answer.json["tokens"] == 512
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_attach_to_a_model_that_has_no_rule(tiny: Tiny) -> None:
    folder = tiny("mixtral")
    source = Checkpoint.open(folder)
    model = load(folder)
    assert attach(model, identify(source.config), source.config, folder) is None
    assert not hasattr(model, "moezip_skipping")
