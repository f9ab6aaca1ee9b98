"""What a model writes: figures by hand, and continuations of every kind of checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moezip import demo
from moezip.arch.families import identify
from moezip.calibrate.data import tokenizer_of
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import DataError
from moezip.evaluate.generation import PROMPT_TOKENS, Generation, Written, figures, generate, period, prompts
from moezip.evaluate.whole import needed_bytes
from moezip.plan.plan import LayerPlan, Pick, Plan
from moezip.runtime.load import load
from tests.command import Cli, write_text

Tiny = Callable[..., Path]
END = 9


def test_the_figures_by_hand() -> None:
    # 4-grams of the first: 1212, 2121, 1212: two of three are distinct. The second ends, and has one 4-gram.
    found = figures([[1, 2, 1, 2, 1, 2], [3, 4, 5, 6, END, END]], {END})
    assert found.repetition == pytest.approx((1 / 3 + 0) / 2)
    # 1-grams: 6 of 10. 2-grams: 12, 21, 34, 45, 56 of 5 + 3. 3-grams: 121, 212, 345, 456 of 4 + 2.
    assert found.distinct == pytest.approx((6 / 10, 5 / 8, 4 / 6))
    assert (found.length, found.ended, found.loops) == (5.0, 0.5, 0.0)
    assert found.to_json() == {
        "repetition": found.repetition, "distinct_1": 0.6, "distinct_2": 0.625, "distinct_3": found.distinct[2],
        "length": 5.0, "ended": 0.5, "loops": 0.0,
    }  # fmt: skip


def test_a_loop_is_three_times_the_same_over_24_tokens_to_the_end() -> None:
    assert period([7] * 24) == 1
    assert period([5, 6, 8] + [7] * 24) == 1  # whatever came before
    assert period([7] * 23) is None  # too short
    assert period([7] * 40 + [8]) is None  # not to the end
    assert period([1, 2, 3, 4] * 6) == 4
    assert period(list(range(10)) * 3) == 10  # 30 tokens
    assert period(list(range(10, 20)) + list(range(10)) * 2) is None  # twice is not three times
    assert period([9, *list(range(10)) * 3, 0, 1]) == 10  # within a round
    assert period([]) is None
    # a text that ends is in no loop, though it repeated itself
    assert figures([[7] * 30, [7] * 30 + [END]], {END}).loops == 0.5


def test_the_model_is_said_to_loop_where_it_does_so_more_than_its_reference() -> None:
    def written(loops: float) -> Written:
        return Written(0.0, (1.0, 1.0, 1.0), 10.0, 0.0, loops)

    def wrote(loops: float, against: Generation | None = None) -> Generation:
        return Generation(4, 32, 128, 0, written(loops), written(0.0), against)

    assert wrote(0.5).loops and not wrote(0.2).loops
    assert wrote(0.5, wrote(0.25)).loops and not wrote(0.5, wrote(0.5)).loops


def test_prompts_are_the_beginnings_of_documents_from_all_files_in_turn(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny("qwen3_moe"))
    one = write_text(tmp_path / "one.jsonl", seed=1, documents=5, length=40)
    two = write_text(tmp_path / "two.jsonl", seed=2, documents=2, length=50)
    short = write_text(tmp_path / "short.jsonl", documents=4, length=PROMPT_TOKENS - 1)
    found = prompts([one, short, two], tokenizer, 5)
    assert [len(ids) for ids in found] == [PROMPT_TOKENS] * 5
    alone = [prompts([file], tokenizer, 9) for file in (one, two)]
    assert [len(ids) for ids in alone] == [5, 2]
    assert found == [alone[0][0], alone[1][0], alone[0][1], alone[1][1], alone[0][2]]
    with pytest.raises(DataError, match="no document has 32 tokens"):
        prompts([short], tokenizer, 5)


def test_continuations_are_those_of_transformers_and_the_seed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("moezip.evaluate.generation.NEW_TOKENS", 12)
    folder = demo.checkpoint()
    tokenizer, model = tokenizer_of(folder), load(folder, dtype=torch.float32)
    given = prompts([demo.data("heldout")], tokenizer, 3)
    rows: list[list[int]] = []
    generated = model.generate

    def kept(*args: object, **options: object) -> torch.Tensor:
        found = generated(*args, **options)
        rows.extend(row[PROMPT_TOKENS:].tolist() for row in found)
        return found

    monkeypatch.setattr(model, "generate", kept)
    options: dict[str, Any] = {"ends": {tokenizer.eos_token_id}, "longest": None}
    before = torch.get_rng_state()
    first = generate(model, given, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), before)  # chance elsewhere goes on as if nothing had been
    assert generate(model, given, seed=1, **options) == first
    assert generate(model, given, seed=2, **options).greedy == first.greedy
    greedy, sampled, other = rows[:3], rows[3:6], rows[-3:]
    assert rows[9:12] == sampled != other
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, row in zip(given, greedy, strict=True):
        ids = list(prompt)
        for token in row:
            with torch.no_grad():
                assert int(plain(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
            if token == tokenizer.eos_token_id:
                break
    assert (first.prompts, first.new_tokens, first.greedy.length) == (3, 12, figures(greedy, options["ends"]).length)


@pytest.mark.parametrize("kind", ["plain", "ragged", "packed"])
def test_every_kind_of_checkpoint_writes(kind: str, cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    source, out, text = tiny("qwen3_moe"), tmp_path / "out", write_text(tmp_path / "text.jsonl", documents=3)
    facts = identify(Checkpoint.open(source).config, source).layer_facts(Checkpoint.open(source).config)
    layers = tuple(LayerPlan(f.layer, f.experts, tuple(map(Pick.keep, range(4 + f.layer)))) for f in facts)
    plan = Plan(Checkpoint.open(source).fingerprint, "qwen3_moe", layers)
    (tmp_path / "plan.json").write_text(plan.to_json())
    made = {
        "plain": ("prune", source, out, "--method", "random", "--keep", 4),
        "ragged": ("apply", source, tmp_path / "plan.json", out),
        "packed": ("quantize", source, out, "--bits", 4, "--solver", "rtn", "--group-size", 16),
    }
    answer = cli(*made[kind])
    assert answer.code == 0, answer.err
    answer = cli("evaluate", out, "--against", source, "--data", text, "--tokens", 64, "--seq-len", 32,
                 "--generate", 2, "--json")  # fmt: skip
    assert answer.code == 0, answer.err
    told = answer.json["generation"]
    assert (told["prompts"], told["prompt_tokens"]) == (2, PROMPT_TOKENS)
    for one in (told, told["against"]):
        for how in ("greedy", "sampled"):
            assert 0 < one[how]["length"] <= told["new_tokens"] and 0 < one[how]["distinct_1"] <= 1


def test_there_must_be_documents_and_room(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    text, source = write_text(tmp_path / "text.jsonl", documents=3), tiny("qwen3_moe")
    answer = cli("evaluate", source, "--generate", 2)
    assert answer.code == 2 and "no documents to continue" in answer.err
    answer = cli("evaluate", source, "--generate", 2, "--data", text, "--max-memory", "500MiB")
    assert answer.code == 1 and "whole in memory" in answer.err


def test_what_is_decoded_as_it_is_loaded_needs_more_room_than_it_has_on_disk(tiny: Tiny) -> None:
    stored, plain = (Checkpoint.open(tiny("deepseek_v3", dtype="bfloat16", **kind)) for kind in ({"stored": "fp8"}, {}))
    sizes = [sum(source.spec(name).bytes for name in source.names()) for source in (stored, plain)]
    assert sizes[0] < sizes[1]
    assert needed_bytes(stored) == needed_bytes(plain) > sizes[1]
