"""Speed and memory beside a reference. No figure is tested for being fast: only that each is of what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moezip.errors import MoezipError
from moezip.evaluate import speed as module
from moezip.evaluate.footprint import Footprint, footprint
from moezip.evaluate.speed import Pace, Speed, maximum
from tests.command import Cli

Tiny = Callable[..., Path]


def test_ratios_are_of_the_model_over_the_reference() -> None:
    model, reference = Pace(200.0, 30.0, Footprint(50, 80, None)), Pace(100.0, 40.0, Footprint(200, 160, None))
    found = Speed(model, reference, 512, 32, 5)
    assert found.ratios() == {
        "prefill": 2.0, "decode": 0.75, "resident": 0.25, "prefill_peak": 0.5, "decode_peak": None,
    }  # fmt: skip
    told = found.to_json()
    assert told["against"]["resident_bytes"] == 200 and told["ratios"] == found.ratios()


def test_a_model_beside_itself(cli: Cli, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny("qwen3_moe")
    turns: list[tuple[int, int, int]] = []

    def timed(model: object, ids: object, new: int) -> float:
        turns.append((id(model), ids.shape[1], new))  # type: ignore[attr-defined]
        return 0.5

    def weighed(*words: object) -> Footprint:
        assert words[0] == source
        return Footprint(1000, 2000, 3000)

    monkeypatch.setattr(module, "write", timed)
    monkeypatch.setattr(module, "footprint", weighed)
    answer = cli("evaluate", source, "--against", source, "--speed", "--json")
    assert answer.code == 0, answer.err
    told = answer.json["speed"]
    # 128 positions: one is left for the new token
    assert told["prefill_tokens"] == 127 and told["prefill_tokens_per_second"] == 254.0
    assert told["decode_tokens"] == 32 and told["decode_tokens_per_second"] == 64.0
    assert set(told["ratios"].values()) == {1.0}
    assert answer.json["nll"] is None and answer.json["against"] is None  # no text was given
    one, two = turns[0][0], turns[2][0]
    assert one != two and turns == 6 * [(one, 127, 1), (one, 16, 32), (two, 127, 1), (two, 16, 32)]


def test_writing_takes_time_and_gives_exactly_the_tokens(tiny: Tiny) -> None:
    import torch

    from moezip.runtime.load import load

    model, seen = load(tiny("qwen3_moe")), []
    generated = model.generate
    model.generate = lambda *given, **options: seen.append(generated(*given, **options))
    assert module.write(model, torch.full((1, 16), 7), 5) > 0
    assert seen[0].shape == (1, 21)


def test_a_footprint_holds_the_weights(tiny: Tiny) -> None:
    folder = tiny("qwen3_moe", experts=64)
    found = footprint(folder, "cpu", 32, 16, 4)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # loaded once, and no more than a copy and the pages of a few libraries beside it
    assert weights / 2 < found.loaded < weights + 64 * 2**20
    assert found.prefill is None or found.prefill >= found.loaded / 2


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho early >&2\necho no memory >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(failing))
    with pytest.raises(MoezipError, match=r"measure its memory failed \(no memory\)"):
        footprint(tmp_path, "cpu", 32, 16, 4)


def test_speed_needs_a_reference_and_room(cli: Cli, tiny: Tiny) -> None:
    source = tiny("qwen3_moe")
    answer = cli("evaluate", source, "--speed")
    assert answer.code == 2 and "--against" in answer.err
    answer = cli("evaluate", source, "--speed", "--against", source, "--max-memory", "500MiB")
    assert answer.code == 1 and "2 models at a time whole in memory" in answer.err


def test_the_smaller_maximum_counts() -> None:
    assert maximum([{"max_position_embeddings": 512}, {"max_position_embeddings": 128}, {}]) == 128
    assert maximum([{}]) is None
