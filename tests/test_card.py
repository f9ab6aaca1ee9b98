"""Model cards: what they say, and that what was measured gets into them without breaking the manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moezip.errors import CheckpointError
from moezip.report.card import front_matter, refresh_card, source_name
from tests.command import Cli

Tiny = Callable[..., Path]
CARD = """---
license: mit
license_link: LICENSE
language: [de]
tags: [chat]
base_model: someone/older
model-index: [{name: scores that are not ours}]
---
What the source says of itself.
"""


@pytest.fixture
def source(tiny: Tiny, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-model"
    shutil.copytree(tiny("qwen3_moe"), folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Do what you like.")
    return folder


def evaluation(rise: float, against: bool = True) -> dict[str, Any]:
    """An evaluation of two texts, as `moezip evaluate --json` prints it."""
    texts = {"python": (2.0, 300), "german": (3.0, 100)}
    found: dict[str, Any] = {
        "nll": 2.25 + rise,
        "perplexity": 9.0,
        "tokens": 400,
        "seq_len": 64,
        "by_file": {n: {"nll": nll + rise, "perplexity": 9.0, "tokens": count} for n, (nll, count) in texts.items()},
        "against": None,
        "tasks": {},
        "skipped": None,
        "date": "2026-11-29T10:00:00+00:00",
        "command": "moezip evaluate OUT",
        "against_path": "SOURCE",
    }
    if against:
        rows = {name: {"kl": 0.05, "top1_agreement": 0.9, "nll": nll} for name, (nll, _) in texts.items()}
        found["against"] = {"kl": 0.05, "top1_agreement": 0.9, "nll": 2.25, "by_file": rows}
    return found


def save(out: Path, *entries: dict[str, Any]) -> None:
    (out / "moezip/evaluation.json").write_text(json.dumps({"version": 1, "evaluations": list(entries)}))


def test_a_card_says_what_was_done_and_under_which_licence(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("prune", source, out, "-m", "router-norm", "--keep", 4).code == 0
    front, body = front_matter((out / "README.md").read_text())
    assert front == {
        "license": "mit", "license_link": "LICENSE", "language": ["de"], "base_model": "tiny-model",
        "tags": ["chat", "mixture-of-experts", "moezip", "pruned"],
    }  # fmt: skip
    for said in ("`router-norm`", "4 of 8 routed experts", "| experts per layer | 8 | 4 |", "`mit` (see `LICENSE`)",
                 "Not predicted", "Not measured yet", "vllm serve", "model.gguf --to gguf",
                 "What the source says of itself."):  # fmt: skip
        assert said in body, said


def test_what_was_measured_gets_into_the_card(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("prune", source, out, "-m", "router-norm", "--keep", 4).code == 0
    before = (out / "README.md").read_text()
    save(out, evaluation(0.5))
    assert refresh_card(out)
    card = (out / "README.md").read_text()
    assert "| python | 300 | 2.5000 | 2.0000 | +0.5000 |" in card
    assert "| all | 400 | 2.7500 | 2.2500 | +0.5000 |" in card
    assert "Not measured yet" not in card and "2026-11-29" in card
    assert cli("verify", out).code == 0
    bounded = evaluation(0.5)
    bounded["against"] |= {"rise_low": 0.4, "rise_high": 0.625}
    save(out, bounded)
    assert refresh_card(out) and "| +0.4000 to +0.6250 |" in (out / "README.md").read_text()
    # the last one against a reference counts, whatever came after it
    save(out, evaluation(0.5), evaluation(0.25), evaluation(0.125, against=False))
    assert refresh_card(out) and "+0.2500 |" in (out / "README.md").read_text()
    assert cli("verify", out).code == 0
    (out / "moezip/evaluation.json").unlink()
    assert refresh_card(out) and (out / "README.md").read_text() == before
    assert cli("verify", out).code == 0


def test_only_the_own_section_is_rewritten(cli: Cli, source: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert cli("prune", source, once, "-m", "router-norm", "--keep", 6).code == 0
    save(once, evaluation(0.5))
    refresh_card(once)
    assert cli("prune", once, twice, "-m", "router-norm", "--keep", 4).code == 0
    card = (twice / "README.md").read_text()
    assert card.count("<!-- moezip:measured -->") == 1 and "+0.5000" in card and "4 of 6" in card
    assert front_matter(card)[0]["tags"] == ["chat", "mixture-of-experts", "moezip", "pruned"]
    save(twice, evaluation(0.75))
    refresh_card(twice)
    card = (twice / "README.md").read_text()
    assert card.index("+0.7500") < card.index("## The card of the source model") < card.index("+0.5000")


def test_cards_that_are_not_moezips_stay(source: Path, tmp_path: Path) -> None:
    assert not refresh_card(source) and (source / "README.md").read_text() == CARD
    assert not refresh_card(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}', '{"version": 1, "evaluations": [{"nll": 1}]}',
                                  '{"version": 1, "evaluations": [{"nll": 1e999, "by_file": {}}]}'])  # fmt: skip
def test_damaged_evaluations_leave_the_card_alone(cli: Cli, source: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    assert cli("prune", source, out, "-m", "router-norm", "--keep", 4).code == 0
    (out / "moezip/evaluation.json").write_text(text)
    with pytest.raises(CheckpointError, match="evaluation"):
        refresh_card(out)
    assert cli("verify", out).code == 0


def test_forms_say_who_reads_them(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", dtype="bfloat16")
    packed, codes = tmp_path / "packed", tmp_path / "codes"
    common = ("--bits", 4, "--solver", "rtn", "--group-size", 16)
    assert cli("quantize", folder, packed, *common).code == 0
    card = (packed / "README.md").read_text()
    assert "after `import moezip`" in card and "--to compressed-tensors" in card and "vllm serve" not in card
    assert front_matter(card)[0]["base_model_relation"] == "quantized"
    assert cli("export", packed, codes, "--to", "compressed-tensors").code == 0
    card = (codes / "README.md").read_text()
    assert "vllm serve" in card and "model.gguf --to gguf" in card and "no moezip needed" not in card


def test_front_matter() -> None:
    assert front_matter("---\na: 1\n---\nb\n") == ({"a": 1}, "b")
    for text in ("no fences", "---\n[unclosed\n---\nx", "---\n- a list\n---\nx", ""):
        assert front_matter(text) == ({}, text)


def test_the_name_of_a_source_is_its_hub_id_where_the_cache_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    assert (source_name(folder), source_name(tmp_path)) == ("org/name", tmp_path.name)
