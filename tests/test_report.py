"""`moezip report`: what it says of outputs of every kind, what it says where pieces are missing, and its pages."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moezip.plan.plan import LayerPlan, Part, Pick, Plan
from moezip.report.batch import open_batch, open_runs
from moezip.report.charts import front
from moezip.report.experts import bits_histogram, expert_map
from moezip.report.run import open_run
from tests.browser import BROWSER, look
from tests.command import Cli, write_text
from tests.test_card import evaluation, save

Tiny = Callable[..., Path]
Outputs = dict[str, Path]


def run(*words: object) -> None:
    """A command that must succeed, in this process: another one would take longer than what it does."""
    from moezip.cli import main

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["moezip", *map(str, words)])
        main()
    assert not left.value.code, words


@pytest.fixture(scope="module")
def outputs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """One output of every kind, made once; tests that change one copy it."""
    folder, source = tmp_path_factory.mktemp("outputs"), tiny("qwen3_moe")
    text = write_text(folder / "prose.txt")
    given = ("--data", text, "--seq-len", 32, "--tokens", 128, "-q")
    run("prune", source, folder / "pruned", "-m", "reap", "--keep", 4, *given)
    run("merge", source, folder / "merged", "-m", "m-smoe", "--keep", 4, *given)
    run("quantize", source, folder / "packed", "--bits", 4, "--allocate", "lp", "--group-size", 16, *given)
    run("prune", source, folder / "slim", "-m", "heapr", "--ratio", 0.3, "--set", "probes=0", *given)
    return {name: folder / name for name in ("pruned", "merged", "packed", "slim")}


@pytest.fixture(scope="module")
def pages(outputs: Outputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each output, and of all of them."""
    folder = tmp_path_factory.mktemp("pages")
    copies = {name: Path(shutil.copytree(out, folder / name)) for name, out in outputs.items()}
    for rise, copy in enumerate(copies.values(), 1):
        save(copy, evaluation(rise / 8))
        run("report", copy, "--html", folder / f"{copy.name}.html")
    run("report", *copies.values(), "--html", folder / "all.html")
    return {name: folder / f"{name}.html" for name in (*copies, "all")}


@pytest.fixture
def pruned(outputs: Outputs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(outputs["pruned"], tmp_path / "pruned"))


# -- what is said -------------------------------------------------------------------------------------------


def test_the_first_lines_answer_the_questions(cli: Cli, pruned: Path) -> None:
    save(pruned, evaluation(0.5))
    said = cli("report", pruned)
    assert said.code == 0
    report = json.loads((pruned / "moezip/report.json").read_text())
    share = f"({report['bytes_after'] / report['bytes_before']:.0%})"
    for each in (share, "2.2500 to 2.7500 nats per token (+0.5000, perplexity x 1.649)", "vLLM", "4 of 8", "reap",
                 "prose (", "+0.5000"):  # fmt: skip
        assert each in said.out, each
    assert "missing: a prediction" in said.err and "missing: a measurement" not in said.err


def test_intervals_are_shown_where_they_were_measured(cli: Cli, pruned: Path, tmp_path: Path) -> None:
    entry = evaluation(0.5)
    entry["against"] |= {"rise_low": 0.4, "rise_high": 0.625}
    save(pruned, entry)
    assert "+0.4000 to +0.6250" in cli("report", pruned).out
    assert cli("report", pruned, "--html", tmp_path / "page.html").code == 0
    assert "at 95 % from +0.400 to +0.625" in (tmp_path / "page.html").read_text()


def test_json(cli: Cli, pruned: Path) -> None:
    save(pruned, evaluation(0.5))
    found = cli("report", pruned, "--json").json
    (run,) = found["runs"]
    assert run["name"] == "pruned" and run["experts_after"] == [4, 4, 4] and run["form"] == "stock"
    assert run["measured"]["rise"] == pytest.approx(0.5) and run["measured"]["by_file"]["german"]["source"] == 3.0
    assert run["readers"]["vllm"]["reads"] == "yes" and run["readers"]["llamacpp"]["reads"] == "detour"
    assert "moezip" in run["command"] or run["command"]
    assert found["predictions"] == {"plans": 0, "rank_correlation": None}


def test_every_kind_of_output_is_told(cli: Cli, outputs: Outputs) -> None:
    runs = {name: open_run(folder) for name, folder in outputs.items()}
    maps = {name: expert_map(run.plan) for name, run in runs.items() if run.plan is not None}
    assert maps["pruned"].counts() == {"kept": 12, "dropped": 12} and maps["pruned"].scored
    merged = maps["merged"].counts()
    assert merged["averaged"] and merged["merged"] and sum(merged.values()) == 24 and not merged["dropped"]
    # every merged expert is listed by the one that it went into
    for row in maps["merged"].cells.values():
        for cell in row:
            assert cell.fate != "merged" or cell.expert in row[cell.into or 0].members
    assert maps["packed"].packed and maps["packed"].scored, "the allocator's prices are the scores"
    histogram = bits_histogram(runs["packed"].plan)  # type: ignore[arg-type]
    assert set(histogram) <= {"gate", "up", "down", "no expert's"}
    assert sum(sum(row.values()) for row in histogram.values()) == len(runs["packed"].plan.packing)  # type: ignore[union-attr]
    assert maps["slim"].slim and not maps["pruned"].slim
    assert {name: run.report["form"] for name, run in runs.items()} == {
        "pruned": "stock", "merged": "stock", "packed": "moezip", "slim": "moezip",
    }  # fmt: skip
    reads = {each.reader: each.reads for each in runs["slim"].readings}
    assert reads == {"transformers": "yes", "vllm": "no", "sglang": "no", "llamacpp": "no", "moezip": "yes"}


def test_a_map_by_hand() -> None:
    picks = (Pick.keep(3), Pick((Part(0, 0.75), Part(2, 0.25))), Pick.slim(4, [0, 7], 8))
    plan = Plan("f", "qwen3_moe", (LayerPlan(2, 5, picks, (0.1, 0.2, 0.3, 0.4, 0.5), (3,)),))
    found = expert_map(plan)
    assert found is not None
    zero, one, two, three, four = found.cells[2]
    assert [cell.fate for cell in found.cells[2]] == ["averaged", "dropped", "merged", "kept", "kept"]
    assert (zero.members, two.into, one.score, three.guarded, four.share) == ((2,), 0, 0.2, True, 0.25)
    assert found.lines() == [(2, "3-4", "0 ← 2", "1")]


def test_steps_are_priced_one_by_one(pruned: Path) -> None:
    file = pruned / "moezip/plan.json"
    plan = json.loads(file.read_text())
    first = {"method": "nats", "predicted_nats": 0.25}
    both = {"method": "m-smoe", "predicted_nats": 0.375, "after": first}
    plan["made_by"] = {"method": "gptq", "bits": 4, "allocate": "lp", "predicted_nats": 0.5, "chosen_by": both}
    file.write_text(json.dumps(plan))
    assert open_run(pruned).steps == [("nats", 0.25), ("m-smoe", 0.125), ("gptq, lp, 4 bits", 0.5)]


# -- what is missing, or damaged ----------------------------------------------------------------------------


def test_missing_pieces_are_named(cli: Cli, pruned: Path) -> None:
    for name in ("plan.json", "manifest.json"):
        (pruned / "moezip" / name).unlink()
    (pruned / "config.json").unlink()
    said = cli("report", pruned)
    assert said.code == 0
    for what in ("plan.json: which experts", "manifest.json: the command", "a measurement: moezip evaluate",
                 "a prediction", "the weights: "):  # fmt: skip
        assert f"missing: {what}" in said.err.replace("missing: moezip/", "missing: "), what
    page = pruned / "page.html"
    assert cli("report", pruned, "--html", page).code == 0
    text = page.read_text()
    assert "Missing here" in text and "not measured" in text and "which experts were kept cannot be shown" in text


@pytest.mark.parametrize("name", ["plan.json", "report.json", "manifest.json", "evaluation.json"])
@pytest.mark.parametrize("text", ["{", '{"schema": 1', "[1]", "\x00"])
def test_damaged_files_are_one_clear_error(cli: Cli, pruned: Path, name: str, text: str) -> None:
    (pruned / "moezip" / name).write_text(text)
    page = pruned.parent / "page.html"
    said = cli("report", pruned, "--html", page)
    assert said.code == 1 and not said.out and not page.exists()
    assert said.err.startswith("error: ") and name in said.err and "next:" in said.err and "foresee" not in said.err


def test_what_is_no_output_is_refused(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    for folder in (tiny("qwen3_moe"), tmp_path / "none"):
        said = cli("report", folder)
        assert said.code == 1 and "next:" in said.err and "foresee" not in said.err


def test_pages_replace_pages_and_nothing_else(cli: Cli, pruned: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli("report", pruned, "--html", page).code == 0
    first = page.read_bytes()
    assert cli("report", pruned, "--html", page).code == 0 and page.read_bytes() == first
    page.write_text("a letter")
    for place in (page, tmp_path, tmp_path / "none" / "page.html"):
        said = cli("report", pruned, "--html", place)
        assert said.code == 2 and "next:" in said.err
    assert page.read_text() == "a letter"


def test_without_matplotlib(cli: Cli, pruned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = cli("report", pruned, "--html", tmp_path / "page.html")
    assert said.code == 2 and "pip install 'moezip[report]'" in said.err and not (tmp_path / "page.html").exists()
    assert cli("report", pruned).code == 0


# -- several ------------------------------------------------------------------------------------------------


def test_runs_side_by_side(cli: Cli, outputs: Outputs, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(outputs[name], tmp_path / name)) for name in ("pruned", "merged", "packed")]
    for folder, rise in zip(folders, (0.5, 0.25, 0.125)):
        save(folder, evaluation(rise))
    said = cli("report", *folders)
    assert said.code == 0 and all(word in said.out for word in ("+0.5000", "+0.2500", "+0.1250", "gptq, lp, 4 bits"))
    found = cli("report", *folders, "--json").json
    assert [run["name"] for run in found["runs"]] == ["pruned", "merged", "packed"]
    again = open_runs([folders[0], folders[0]])
    assert [run.name for run in again] == [str(folders[0])] * 2, "runs of one name are told apart by their folders"


def summary(*rows: dict[str, Any], version: int = 1) -> str:
    return json.dumps({"version": version, "jobs": [{"status": "done", "out": "somewhere", **row} for row in rows]})


def test_a_batch_is_read_from_its_summary(cli: Cli, outputs: Outputs, tmp_path: Path) -> None:
    shutil.copytree(outputs["pruned"], tmp_path / "half")
    for name, rise in (("half", 0.5), ("gone", 0.25)):
        record = {"out": name, "report": None, "evaluations": [evaluation(rise)]}
        (tmp_path / f"{name}.evaluate.json").write_text(json.dumps(record))
    error = {"what": "no memory", "where": "layer 3", "next": None}
    gone = {"job": "gone", "method": "nats + gptq", "bytes": 1000, "bytes_before": 4000, "predicted_nats": 0.2}
    rows = ({"job": "half", "method": "reap"}, gone, {"job": "bad", "status": "failed", "error": error, "out": None})
    (tmp_path / "summary.json").write_text(summary(*rows))
    half, other, bad = open_batch(tmp_path)
    assert (half.name, half.rise, half.method, half.plan is not None) == ("half", pytest.approx(0.5), "reap", True)
    assert (other.rise, other.bytes_after, other.predicted, other.plan) == (pytest.approx(0.25), 1000, 0.2, None)
    assert "its folder" in other.missing[0] and (bad.state, bad.why) == ("failed", "layer 3: no memory")
    said = cli("report", tmp_path)
    assert said.code == 0 and "failed" in said.out and "bad: layer 3: no memory" in said.err
    page = tmp_path / "page.html"
    assert cli("report", tmp_path, "--html", page).code == 0
    text = page.read_text()
    assert "3 runs side by side; 1 failed" in text and "no memory" in text and 'id="pareto-title"' in text


def test_a_batch_without_a_summary_is_read_from_what_its_jobs_left(outputs: Outputs, tmp_path: Path) -> None:
    shutil.copytree(outputs["pruned"], tmp_path / "half")
    (tmp_path / "recipe.yaml").write_text("version: 1\n")
    (tmp_path / "half.evaluate.json").write_text(json.dumps({"evaluations": [evaluation(0.5)]}))
    (run,) = open_runs([tmp_path])
    assert run.rise == pytest.approx(0.5) and run.plan is not None


@pytest.mark.parametrize("text", ["{", summary({"job": "a"}, version=2), summary(), '{"version": 1, "jobs": [{}]}'])
def test_damaged_summaries(cli: Cli, tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    said = cli("report", tmp_path)
    assert said.code == 1 and "summary" in said.err and "next:" in said.err and "foresee" not in said.err


def test_the_front() -> None:
    assert front([(1.0, 0.5), (2.0, 0.6), (3.0, 0.1), (1.0, 0.4)]) == [3, 2]
    assert front([]) == [] and front([(1.0, 0.0), (1.0, 0.0)]) == [0]


# -- pages --------------------------------------------------------------------------------------------------


def test_pages_hold_what_they_promise_and_load_nothing(pages: dict[str, Path]) -> None:
    drawings = {
        "pruned": {"importance", "losses", "seconds"},
        "merged": {"importance", "losses", "seconds"},
        "packed": {"importance", "bits", "histogram", "losses", "seconds"},
        "slim": {"importance", "losses", "seconds"},
        "all": {"pareto"},
    }
    for name, page in pages.items():
        text = page.read_text()
        assert set(re.findall(r'<title id="(\w+)-title">', text)) >= drawings[name], name
        identifiers = re.findall(r'\bid="([^"]+)"', text)
        assert len(identifiers) == len(set(identifiers)), name
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(identifiers), name
        addresses = re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)[^)]*\)|@import', text)
        assert addresses == [] and "<script" not in text, name
        assert not re.findall(r"#0a0[bc]\d\d", text), "colours that the style sheet does not know"


def test_names_are_escaped(cli: Cli, pruned: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    entry = evaluation(0.5)
    for part in (entry["by_file"], entry["against"]["by_file"]):
        part[evil] = part.pop("python")
    save(pruned, {**entry, "command": evil, "tasks": {evil: {"accuracy": 0.5, "n": 4}}})
    report = json.loads((pruned / "moezip/report.json").read_text())
    report |= {"method": evil, "notes": [evil], "source": evil, "statistics": {evil: 5}, "settings": {evil: evil}}
    (pruned / "moezip/report.json").write_text(json.dumps(report))
    for folders in ([pruned], [pruned, pruned]):
        assert cli("report", *folders, "--html", tmp_path / "page.html").code == 0
        text = (tmp_path / "page.html").read_text()
        assert "<script" not in text and "&lt;script&gt;" in text


def test_a_big_map_stays_a_small_page() -> None:
    pytest.importorskip("matplotlib")
    from moezip.report import charts

    picks = tuple(Pick.keep(expert) for expert in range(0, 128, 2))
    scores = tuple(float(expert) for expert in range(128))
    found = expert_map(Plan("f", "m", tuple(LayerPlan(layer, 128, picks, scores) for layer in range(48))))
    assert found is not None
    drawing = charts.importance(found)
    # 6144 experts, as in Qwen3-30B-A3B
    assert len(drawing.svg) < 800_000 and drawing.svg.count("<path") < 60 and "min-width" in drawing.svg


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")
def test_pages_in_a_browser(pages: dict[str, Path], tmp_path: Path) -> None:
    for name in ("packed", "all"):
        for width, dark in ((1280, False), (375, True)):
            seen = look(pages[name], width, tmp_path, dark)
            assert seen.console == [] and seen.wide == [] and seen.width <= width, (name, width)
            assert seen.title and seen.drawings >= 1
            assert seen.paper == ("rgb(15, 21, 28)" if dark else "rgb(246, 247, 249)")


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")
def test_the_browser_notices(pages: dict[str, Path], tmp_path: Path) -> None:
    """What the test above looks for is found where it is: a wide element, a load, an error."""
    page, text = tmp_path / "page.html", pages["pruned"].read_text()
    page.write_text(text.replace("<header>", '<header><div style="width:600px">wide</div>'))
    seen = look(page, 375, tmp_path)
    assert seen.width > 375 and seen.wide == ["DIV.null"]
    assert look(page, 1280, tmp_path).wide == []
    page.write_text(text.replace("<header>", '<header><img src="https://example.org/a.png" alt="">'))
    assert any("Content Security Policy" in line for line in look(page, 375, tmp_path).console)
