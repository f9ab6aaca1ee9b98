"""``moezip inspect``: what would fit in which memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moezip.report import fitting
from tests.command import Cli

Tiny = Callable[..., Path]


def test_bytes_by_hand() -> None:
    # 800 weights in experts, 80 in other matrices, 8 in the rest, which stay in two bytes each
    found = fitting.choices(800, 80, 8, {"ram": 1000, "cuda:0": 270})
    sizes = {(choice.bits, choice.experts): choice.bytes for choice in found}
    assert sizes[16, 1.0] == 2 * 888 and sizes[16, 0.5] == 2 * 488
    assert sizes[4, 1.0] == 440 + 16 and sizes[2.5, 0.5] == 150 + 16
    fits = {(choice.bits, choice.experts): choice.fits for choice in found}
    # a tenth of a memory is kept free: of 270 bytes 243 may be taken
    assert fits[4, 1.0] == {"ram": True, "cuda:0": False} and fits[4, 0.5] == {"ram": True, "cuda:0": False}
    assert fits[16, 1.0] == {"ram": False, "cuda:0": False} and fits[2.5, 0.5] == {"ram": True, "cuda:0": True}


def test_inspect_says_where_it_fits(cli: Cli, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("qwen3_moe", dtype="bfloat16")
    size = cli("inspect", folder, "--json").json["bytes"]
    monkeypatch.setattr(fitting, "memories", lambda: {"ram": 10 * size, "cuda:0": size})
    found = cli("inspect", folder, "--json").json["fits_in"]
    assert found["memory"] == {"ram": 10 * size, "cuda:0": size} and found["room"] == 0.9
    whole = found["choices"][0]
    assert whole == {"bits": 16.0, "experts": 1.0, "bytes": size, "fits": {"ram": True, "cuda:0": False}}
    assert len(found["choices"]) == 8 and found["choices"][-1]["fits"] == {"ram": True, "cuda:0": True}
    said = cli("inspect", folder).out
    assert "2.5 bits, half the experts" in said and "too big" in said and "cuda:0" in said


def test_this_machine_has_memory() -> None:
    found = fitting.memories()
    assert found["ram"] > 2**20 and all(size > 0 for size in found.values())
