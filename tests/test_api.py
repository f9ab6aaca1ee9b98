"""The Python API: the same stages as the commands, the same bytes, and nothing written before it is saved."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import moezip
from moezip.progress import Progress
from tests.command import Cli, model_files, tree, write_text

TOKENS = 512
Tiny = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


def test_prune_writes_what_the_command_writes(tiny: Tiny, cli: Cli, text: Path, tmp_path: Path):
    checkpoint = tiny("qwen3_moe")
    asked = ("--ratio", 0.5, "--tokens", TOKENS, "--data", text)
    assert cli("prune", checkpoint, tmp_path / "command", "-m", "reap", *asked).code == 0
    model = moezip.open(checkpoint)
    small = model.prune("reap", ratio=0.5, data=text, tokens=TOKENS)
    report = small.save(tmp_path / "api")
    assert model_files(tmp_path / "api") == model_files(tmp_path / "command")
    assert (report.form, report.experts_after) == ("stock", list(small.experts.values()))
    assert small.bytes == report.bytes_after < model.bytes == report.bytes_before
    # with statistics that were taken before, and with those of a file
    stats = model.calibrate(text, tokens=TOKENS, out=tmp_path / "stats")
    for given in (stats, tmp_path / "stats"):
        again = model.prune("reap", ratio=0.5, stats=given)
        assert again.plan == small.plan
    loaded = moezip.Statistics.load(tmp_path / "stats")
    assert (loaded.tokens, loaded.source) == (stats.tokens, stats.source)


def test_prune_then_quantize_writes_what_the_commands_write(tiny: Tiny, cli: Cli, text: Path, tmp_path: Path):
    checkpoint, plan = tiny("qwen3_moe"), tmp_path / "plan.json"
    asked = ("--data", text, "--tokens", TOKENS)
    assert cli("prune", checkpoint, plan, "-m", "reap", "--ratio", 0.5, "--plan-only", *asked).code == 0
    packed = ("--plan", plan, "--bits", 4, "--group-size", 16, *asked)
    assert cli("quantize", checkpoint, tmp_path / "command", *packed).code == 0
    small = moezip.open(checkpoint).prune("reap", ratio=0.5, data=text, tokens=TOKENS)
    small.quantize(4, group_size=16, data=text, tokens=TOKENS).save(tmp_path / "api")
    assert model_files(tmp_path / "api") == model_files(tmp_path / "command")


def test_merge_and_skip_write_what_the_commands_write(tiny: Tiny, cli: Cli, text: Path, tmp_path: Path):
    checkpoint = tiny("qwen3_moe")
    asked = ("--data", text, "--tokens", TOKENS)
    settings = ("--set", "combine=least-squares", "--set", "router=sum")
    assert cli("merge", checkpoint, tmp_path / "merged", "--ratio", 0.5, *settings, *asked).code == 0
    assert cli("skip", checkpoint, tmp_path / "skipping", "--rule", "otp", "--set", "steps=3", *asked).code == 0
    model = moezip.open(checkpoint)
    merged = model.merge(
        ratio=0.5, data=text, tokens=TOKENS, settings={"combine": "least-squares", "router": "sum"}
    )  # fmt: skip
    merged.save(tmp_path / "api-merged")
    assert model_files(tmp_path / "api-merged") == model_files(tmp_path / "merged")
    skipping = model.skip("otp", data=text, tokens=TOKENS, settings={"steps": 3})
    skipping.save(tmp_path / "api-skipping")
    assert model_files(tmp_path / "api-skipping") == model_files(tmp_path / "skipping")
    with pytest.raises(moezip.MoezipError, match="mask networks"):
        skipping.evaluate(text)


def test_what_is_not_saved_measures_as_what_is(tiny: Tiny, text: Path, tmp_path: Path):
    model = moezip.open(tiny("qwen3_moe"))
    small = model.prune("reap", ratio=0.5, data=text, tokens=TOKENS)
    settings = {"combine": "least-squares"}  # values that lie in a file, which must live as long as what reads them
    tiny_one = small.merge(ratio=0.25, data=text, tokens=TOKENS, settings=settings).prune("random", ratio=0.3)
    gc.collect()
    tiny_one = tiny_one.quantize(4, solver="rtn", group_size=16)
    gc.collect()
    assert max(tiny_one.experts.values()) < max(small.experts.values()) < max(model.experts.values())
    for number, each in enumerate((small, tiny_one)):
        found = each.evaluate(text, against=model, tokens=256)
        each.save(tmp_path / str(number))
        saved = moezip.open(tmp_path / str(number)).evaluate(text, against=tiny("qwen3_moe"), tokens=256)
        assert saved.to_json() == found.to_json()
        assert found.against is not None and found.against.kl > 0


def test_several_formats_of_one_quantization(tiny: Tiny, cli: Cli, text: Path, tmp_path: Path):
    """Exports of what is not saved are those of what is."""
    packed = moezip.open(tiny("qwen3_moe")).quantize(
        4, group_size=16, data=text, tokens=TOKENS, settings={"symmetric": True}
    )  # fmt: skip
    packed.save(tmp_path / "saved")
    for to in ("safetensors", "compressed-tensors", "gptq"):
        report = packed.export(tmp_path / to, to)
        assert cli("export", tmp_path / "saved", tmp_path / f"{to}-command", "--to", to).code == 0
        assert model_files(tmp_path / to) == model_files(tmp_path / f"{to}-command")
        assert report.method == f"export to {to}"


def test_nothing_is_written_before_it_is_saved(tiny: Tiny, text: Path, tmp_path: Path):
    work = tmp_path / "work"
    model = moezip.open(tiny("qwen3_moe"), workdir=work)
    stats = model.calibrate(text, tokens=TOKENS)
    small = model.merge("m-smoe", ratio=0.5, stats=stats).quantize(4, solver="rtn", group_size=16)
    assert tree(work) != []  # the solved weights, as long as somebody may ask for them
    del small
    gc.collect()
    assert tree(work) == []
    assert tree(tmp_path) == ["text.jsonl", "work"]


def test_progress_is_told(tiny: Tiny, text: Path):
    steps: list[Progress] = []
    model = moezip.open(tiny("qwen3_moe"), progress=steps.append)
    model.prune("reap", ratio=0.5, data=text, tokens=TOKENS).evaluate(text, tokens=256)
    assert {"read text", "evaluate model"} <= {step.stage for step in steps}
    assert all(0 <= step.done <= step.total for step in steps)


def test_what_cannot_be_is_said_at_once(tiny: Tiny, text: Path, tmp_path: Path):
    model = moezip.open(tiny("qwen3_moe"))
    small = model.prune("random", ratio=0.5)
    for attempt, words in (
        (lambda: moezip.open(tmp_path / "nowhere"), "there is no folder"),
        (lambda: model.save(tmp_path / "out"), "nothing was done"),
        (lambda: model.prune("reap", ratio=0.5), "needs calibration text"),
        (lambda: model.prune("raep", ratio=0.5), "unknown pruning method"),
        (lambda: model.prune("random", ratio=0.5, settings={"sede": 1}), "unknown setting"),
        (lambda: model.calibrate(tmp_path / "no.jsonl"), "no such"),
        (lambda: model.calibrate("demo:calib/pyhton.jsonl"), "no calib file"),
        (lambda: model.calibrate(text, tokens=1), "nothing to predict"),
        (lambda: small.prune("reap", ratio=0.5, stats=tmp_path / "stats"), "statistics of the checkpoint"),
        (lambda: small.skip("naee", data=text), "does not follow"),
        (lambda: small.calibrate(text), "does not follow"),
        (lambda: small.quantize(4, solver="rtn", group_size=16).quantize(4, solver="rtn"), "does not follow"),
        (lambda: small.merge(ratio=0.5, stats=tmp_path / "stats"), "statistics of the checkpoint"),
        (lambda: small.save(model.folder), "where the source is read"),
        (lambda: model.evaluate(), "nothing to measure"),
    ):
        with pytest.raises(moezip.MoezipError) as told:
            attempt()
        assert words in str(told.value)
    assert tree(tmp_path) == ["text.jsonl"]


def test_a_model_and_its_plan_can_be_read(tiny: Tiny):
    model = moezip.open(tiny("qwen3_moe"))
    assert model.plan is None and model.folder.is_dir()
    small = model.prune("random", ratio=0.5)
    assert small.plan is not None
    assert json.loads(small.plan.to_json())["made_by"]["method"] == "random"
    assert repr(small).startswith(f"<moezip model {model.folder.name}, pruned: qwen3_moe, ")
    assert model.plan is None  # models do not change


def test_the_packaged_text_has_names(cli: Cli, tmp_path: Path):
    asked = ("--data", "demo:calib/python.jsonl", "--tokens", 256, "--seq-len", 64)
    assert cli("prune", "demo", tmp_path / "plan.json", "--ratio", 0.5, "--plan-only", *asked).code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [domain["name"] for domain in plan["made_by"]["domains"]] == ["python"]
    wrong = cli("evaluate", "demo", "--data", "demo:heldout/pyhton.jsonl")
    assert wrong.code == 1 and "did you mean 'python.jsonl'" in wrong.err
