"""Recipes: what is shared, what is skipped, what runs again, and the promise that the demo makes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moezip import demo
from moezip.calibrate.data import DomainText
from moezip.errors import RecipeError
from moezip.pipeline.batch import run_recipe
from moezip.pipeline.common import Common
from moezip.pipeline.quantize import QuantizeJob, quantize_command
from moezip.plan.plan import Plan
from moezip.recipe import load
from tests.command import Cli, process, tree, write_text

TOKENS = 256
Tiny = Callable[..., Path]
Recipe = dict[str, Any]


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path) -> Recipe:
    """Two domains, and three jobs that decide with them in different ways."""
    for i, name in enumerate(("one", "two", "held")):
        write_text(tmp_path / f"{name}.jsonl", seed=i)
    measure = {"evaluate": {"data": "held.jsonl", "against": "source", "tokens": TOKENS}}
    return {
        "version": 1,
        "model": str(tiny("qwen3_moe")),
        "output": str(tmp_path / "out"),
        "seq_len": 64,
        "calibration": {
            "one": {"data": "one.jsonl", "tokens": TOKENS},
            "two": {"data": "two.jsonl", "tokens": TOKENS},
        },
        "jobs": {
            "narrow": {"steps": [{"prune": {"method": "reap", "keep": 4, "calibration": "one"}}, measure]},
            "wide": {"steps": [{"prune": {"method": "easy-ep", "ratio": 0.5}}]},
            "chance": {"steps": [{"prune": {"method": "random", "keep": 4}}, measure]},
        },
    }


@pytest.fixture
def run(cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    """Writes the recipe to a file and runs it; the answer."""

    def go(recipe: Recipe, *words: object) -> Any:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return cli("run", file, *words)

    return go


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The domains of every calibration pass that is run."""
    from moezip.calibrate import run as module

    seen: list[list[str]] = []
    calibrate = module.calibrate

    def counted(source: Any, rows: Any, *args: Any, **options: Any) -> Any:
        seen.append(list(dict.fromkeys(rows.domains)))
        return calibrate(source, rows, *args, **options)

    monkeypatch.setattr(module, "calibrate", counted)
    return seen


def states(answer: Any) -> dict[str, bool]:
    """Job -> whether it was skipped."""
    assert answer.code == 0, answer.err
    return {job["name"]: job["skipped"] for job in answer.json["jobs"]}


def test_jobs_share_one_pass_and_a_second_run_skips_everything(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path
) -> None:
    first = run(recipe, "--json")
    assert states(first) == {"narrow": False, "wide": False, "chance": False}
    assert passes == [["one", "two"]]
    jobs = {job["name"]: job for job in first.json["jobs"]}
    assert jobs["narrow"]["report"]["statistics"] == {"one": TOKENS}
    assert jobs["wide"]["report"]["statistics"] == {"one": TOKENS, "two": TOKENS}
    assert jobs["narrow"]["report"]["experts_after"] == [4, 4, 4]
    assert jobs["narrow"]["evaluations"][0]["against"]["kl"] > 0 and jobs["wide"]["evaluations"] == []
    out = tmp_path / "out"
    assert {"narrow", "wide", "chance", "recipe.yaml", "state.json", "statistics"} < set(tree(out))
    assert not (out / "work").exists()

    before = tree(tmp_path)
    again = run(recipe, "--json")
    assert states(again) == {"narrow": True, "wide": True, "chance": True}
    assert len(passes) == 1 and tree(tmp_path) == before
    # what is said of a skipped job is what was said when it ran
    for one, two in zip(first.json["jobs"], again.json["jobs"], strict=True):
        assert {**one, "skipped": None} == {**two, "skipped": None}
    people = run(recipe)
    assert people.code == 0 and people.out.count("finished before") == 3 and tree(tmp_path) == before


def change_method(recipe: Recipe, _: Path) -> None:
    recipe["jobs"]["narrow"]["steps"][0]["prune"]["keep"] = 5


def change_held_out_text(_: Recipe, folder: Path) -> None:
    write_text(folder / "held.jsonl", seed=9)


def change_calibration_text(_: Recipe, folder: Path) -> None:
    write_text(folder / "two.jsonl", seed=9)


def change_weight(recipe: Recipe, _: Path) -> None:
    recipe["calibration"]["two"]["weight"] = 3.0


def remove_output(_: Recipe, folder: Path) -> None:
    shutil.rmtree(folder / "out/wide")


def remove_results(_: Recipe, folder: Path) -> None:
    (folder / "out/chance.evaluate.json").unlink()


def remove_everything_but_the_state(_: Recipe, folder: Path) -> None:
    remove_output(_, folder)
    shutil.rmtree(folder / "out/statistics")


@pytest.mark.parametrize(
    ("change", "rerun", "new_passes"),
    [
        (change_method, {"narrow"}, []),
        (change_held_out_text, {"narrow", "chance"}, []),
        (change_calibration_text, {"wide"}, [["two"]]),
        (change_weight, {"wide"}, []),
        (remove_output, {"wide"}, []),
        (remove_results, {"chance"}, []),
        (remove_everything_but_the_state, {"wide"}, [["one", "two"]]),
    ],
)
def test_only_what_changed_runs_again(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path,
    change: Callable[[Recipe, Path], None], rerun: set[str], new_passes: list[list[str]],
) -> None:  # fmt: skip
    assert run(recipe).code == 0
    passes.clear()
    change(recipe, tmp_path)
    assert {name for name, skipped in states(run(recipe, "--json")).items() if not skipped} == rerun
    assert passes == new_passes
    assert all(states(run(recipe, "--json")).values())


def test_an_interrupted_batch_goes_on(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezip.pipeline.batch import jobs

    write = jobs.write_plan

    def second_job(source: Any, plan: Any, out: Path, *rest: Any, **options: Any) -> Any:
        if out.name == "wide":
            raise KeyboardInterrupt
        return write(source, plan, out, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "write_plan", second_job)
        answer = run(recipe)
    assert answer.code == 130
    assert "finished jobs and statistics are kept: the same command again" in answer.err
    assert "--resume" not in answer.err  # `run` has no such option
    assert (tmp_path / "out/narrow").is_dir() and not (tmp_path / "out/wide").exists()
    assert states(run(recipe, "--json")) == {"narrow": True, "wide": False, "chance": False}
    assert passes == [["one", "two"]]


def test_an_interrupted_pass_of_a_batch_goes_on(
    run: Callable[..., Any], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezip.calibrate import run as module
    from moezip.calibrate.capture import Capture

    monkeypatch.setattr(module.calibrate, "__kwdefaults__", {**module.calibrate.__kwdefaults__, "save_every": 0.0})
    watch, seen = Capture.watch, []

    def stop(self: Capture, index: int, layer: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        watch(self, index, layer)

    with monkeypatch.context() as patched:
        patched.setattr(Capture, "watch", stop)
        answer = run(recipe)
    assert answer.code == 130 and "1 of 3 layers are calibrated and saved" in answer.err

    def note(self: Capture, index: int, layer: Any) -> None:
        seen.append(index)
        watch(self, index, layer)

    monkeypatch.setattr(Capture, "watch", note)
    assert run(recipe).code == 0
    assert seen == [1, 2]
    assert not (tmp_path / "out/work").exists()


def test_only_runs_a_job_and_what_it_needs(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path
) -> None:
    assert states(run(recipe, "--only", "chance", "--json")) == {"chance": False}
    assert passes == [] and not (tmp_path / "out/narrow").exists()
    recipe["jobs"]["chance"]["needs"] = ["narrow"]
    # needed jobs come first; `chance` changed by its need
    answer = run(recipe, "--only", "chance", "--json")
    assert [job["name"] for job in answer.json["jobs"]] == ["narrow", "chance"]
    assert states(answer) == {"narrow": False, "chance": False}
    assert passes == [["one"]]
    wrong = run(recipe, "--only", "chanse")
    assert wrong.code == 2 and "did you mean 'chance'" in wrong.err


def test_jobs_come_after_what_they_need(run: Callable[..., Any], recipe: Recipe) -> None:
    recipe["jobs"]["narrow"]["needs"] = ["chance"]
    answer = run(recipe, "--json")
    assert [job["name"] for job in answer.json["jobs"]] == ["chance", "narrow", "wide"]


def test_a_calibrate_step_alone(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path
) -> None:
    recipe["jobs"] = {"observe": {"steps": [{"calibrate": {"calibration": "two"}}]}}
    assert states(run(recipe, "--json")) == {"observe": False}
    assert passes == [["two"]] and tree(tmp_path / "out/statistics") == ["two.safetensors"]


def test_an_output_of_something_else_is_refused(run: Callable[..., Any], recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    answer = run(recipe)
    assert answer.code == 1 and "holds something else" in answer.err and str(out) in answer.err
    assert tree(out) == ["thesis.txt"]
    shutil.rmtree(out)
    out.write_text("a file")
    assert run(recipe).code == 1 and out.read_text() == "a file"
    del recipe["output"]
    answer = run(recipe)
    assert answer.code == 1 and "--set output=FOLDER" in answer.err
    assert run(recipe, "--set", f"output={tmp_path / 'there'}", "--only", "chance").code == 0
    assert (tmp_path / "there/chance/config.json").is_file()


def test_where_no_job_can_work_nothing_is_touched(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path
) -> None:
    recipe["jobs"] = {"wide": {"steps": [{"prune": {"method": "reap", "keep": 1}}]}}
    answer = run(recipe)
    assert answer.code == 1 and "keep at least 2" in answer.err
    recipe["jobs"]["wide"]["steps"] = [{"prune": {"method": "random", "keep": keep}} for keep in (6, 4)]
    recipe["jobs"]["deep"] = {"steps": [{"prune": {"method": "reap", "keep": 1}}]}
    answer = run(recipe)
    assert answer.code == 1 and "prunes twice" in answer.err and "jobs.wide" in answer.err
    assert "none of the 2 jobs can run" in answer.err
    assert passes == [] and not (tmp_path / "out").exists()


# -- failures -----------------------------------------------------------------------------------------------


def test_a_job_that_cannot_work_does_not_stop_the_others(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path
) -> None:
    recipe["jobs"]["narrow"]["steps"][0]["prune"]["keep"] = 1
    recipe["jobs"]["after"] = {"needs": "narrow", "steps": [{"prune": {"method": "random", "keep": 4}}]}
    recipe["jobs"]["last"] = {"model": "job:after", "steps": [{"evaluate": {"data": "held.jsonl"}}]}
    answer = run(recipe, "--json")
    assert answer.code == 1
    jobs = {job["name"]: job for job in answer.json["jobs"]}
    assert {name: job["status"] for name, job in jobs.items()} == {
        "narrow": "failed", "wide": "done", "chance": "done", "after": "not run", "last": "not run",
    }  # fmt: skip
    assert jobs["narrow"]["error"] == {
        "what": "cannot keep 1 experts: the router sends every token to 2", "where": "layer 0",
        "next": "keep at least 2",
    }  # fmt: skip
    assert jobs["after"]["error"]["what"] == "it needs 'narrow', which failed"
    assert jobs["last"]["error"]["what"] == "it needs 'after', which could not run either"
    # said before anything is computed, and again at the end
    assert answer.err.index("error in narrow") < answer.err.index("calibrate")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [(row["job"], row["status"]) for row in summary["jobs"]] == [
        ("narrow", "failed"), ("wide", "done"), ("chance", "done"), ("after", "not run"), ("last", "not run"),
    ]  # fmt: skip
    people = run(recipe)
    assert people.code == 1 and "not run" in people.out and "narrow: cannot keep 1 experts" in people.err
    assert passes == [["one", "two"]]
    # mended, it and what needs it run; nothing else does
    recipe["jobs"]["narrow"]["steps"][0]["prune"]["keep"] = 4
    assert {name for name, skipped in states(run(recipe, "--json")).items() if not skipped} == {
        "narrow", "after", "last",
    }  # fmt: skip


def test_what_fails_on_its_way_does_not_stop_the_others(
    run: Callable[..., Any], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezip.pipeline.batch import jobs

    write = jobs.write_plan

    def full(source: Any, plan: Any, out: Path, *rest: Any, **options: Any) -> Any:
        if out.name == "wide":
            raise OSError(28, "No space left on device")
        return write(source, plan, out, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "write_plan", full)
        answer = run(recipe, "--json")
    assert answer.code == 1 and "error in wide" in answer.err and "No space left" in answer.err
    found = {job["name"]: job for job in answer.json["jobs"]}
    assert {name: job["status"] for name, job in found.items()} == {
        "narrow": "done", "wide": "failed", "chance": "done",
    }  # fmt: skip
    assert "--only wide --debug" in found["wide"]["error"]["next"]
    assert states(run(recipe, "--json")) == {"narrow": True, "wide": False, "chance": True}


def test_a_text_that_cannot_be_read_fails_only_the_jobs_that_read_it(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": ""}))
    answer = run(recipe, "--json")
    assert answer.code == 1 and passes == [["one"]]
    assert [(job["name"], job["status"]) for job in answer.json["jobs"]] == [
        ("narrow", "done"), ("wide", "failed"), ("chance", "done"),
    ]  # fmt: skip
    assert "two.jsonl" in answer.json["jobs"][1]["error"]["where"]


# -- sweeps, jobs on jobs, exports --------------------------------------------------------------------------


def test_only_takes_a_sweep(run: Callable[..., Any], recipe: Recipe) -> None:
    recipe["jobs"]["grid"] = {"sweep": {"keep": [4, 6]}, "steps": [{"prune": {"method": "random"}}]}
    assert states(run(recipe, "--only", "grid", "--json")) == {"grid-keep4": False, "grid-keep6": False}


def test_several_exports_and_a_job_on_another_job_cost_one_calibration_each(
    run: Callable[..., Any], cli: Cli, recipe: Recipe, passes: list[list[str]], tmp_path: Path
) -> None:
    prune = {"prune": {"method": "reap", "keep": 4, "calibration": "one"}}
    exports = [{"export": {"to": "compressed-tensors"}}, {"export": {"to": "gptq"}}]
    packed = [{"quantize": {"bits": 4, "solver": "rtn", "group_size": 0}}, *exports]
    recipe["jobs"] = {
        "packed": {"model": "job:cut", "steps": packed},
        "cut": {"steps": [prune]},
        "twice": {"model": "job:cut", "steps": [{"prune": {"method": "easy-ep", "keep": 3, "calibration": "one"}},
                                                {"evaluate": {"data": "held.jsonl", "against": "source"}}]},
    }  # fmt: skip
    first = run(recipe, "--json")
    assert states(first) == {"cut": False, "packed": False, "twice": False}
    assert passes == [["one"], ["one"]]  # of the model, and of what `cut` made
    jobs = {job["name"]: job for job in first.json["jobs"]}
    assert jobs["packed"]["report"]["experts_before"] == [4, 4, 4]
    assert jobs["twice"]["report"]["experts_after"] == [3, 3, 3]
    assert [export["form"] for export in jobs["packed"]["exports"]] == ["compressed-tensors", "gptq"]
    # against the model that all goes back to
    direct = cli("evaluate", tmp_path / "out/twice", "--against", recipe["model"], "--data", tmp_path / "held.jsonl",
                 "--seq-len", 64, "--json")  # fmt: skip
    assert jobs["twice"]["evaluations"][0]["nll"] == direct.json["nll"]
    for name in ("packed", "packed.compressed-tensors", "packed.gptq"):
        assert cli("verify", tmp_path / "out" / name).code == 0
    again = run(recipe, "--json")
    assert all(states(again).values()) and len(passes) == 2
    # one export is lost: the codes are not solved again for it
    shutil.rmtree(tmp_path / "out/packed.gptq")
    plan = (tmp_path / "out/packed/moezip/plan.json").stat().st_mtime_ns
    assert states(run(recipe, "--json")) == {"cut": True, "packed": False, "twice": True}
    assert (tmp_path / "out/packed.gptq/config.json").is_file()
    assert (tmp_path / "out/packed/moezip/plan.json").stat().st_mtime_ns == plan
    # what comes before changes, so what comes after does
    recipe["jobs"]["cut"]["steps"][0]["prune"]["keep"] = 5
    assert not any(states(run(recipe, "--json")).values())


def test_a_job_may_have_a_model_of_its_own(
    run: Callable[..., Any], recipe: Recipe, tiny: Tiny, passes: list[list[str]], tmp_path: Path
) -> None:
    other = tiny("mixtral")
    recipe["jobs"]["other"] = {
        "model": str(other),
        "steps": [{"prune": {"method": "reap", "keep": 3, "calibration": "one"}},
                  {"evaluate": {"data": "held.jsonl", "against": "source", "tokens": TOKENS}}],
    }  # fmt: skip
    answer = run(recipe, "--json")
    assert not any(states(answer).values()) and passes == [["one", "two"], ["one"]]
    job = answer.json["jobs"][-1]
    assert job["report"]["source"] == str(other) and job["evaluations"][0]["against"]["kl"] > 0
    assert json.loads((tmp_path / "out/other/config.json").read_text())["model_type"] == "mixtral"
    assert all(states(run(recipe, "--json")).values())


def test_an_export_to_gguf_is_a_file(run: Callable[..., Any], recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    recipe["model"] = "demo"
    gguf = {"export": {"to": "gguf", "for": "llamacpp", "settings": {"type": "Q8_0"}}}
    recipe["jobs"] = {"chance": {"steps": [recipe["jobs"]["chance"]["steps"][0], gguf]}}
    answer = run(recipe, "--json")
    assert states(answer) == {"chance": False}
    assert answer.json["jobs"][0]["exports"][0]["form"] == "gguf"
    assert (tmp_path / "out/chance.gguf").read_bytes()[:4] == b"GGUF"
    assert states(run(recipe, "--json")) == {"chance": True}


def test_an_export_without_codes_is_told_before(run: Callable[..., Any], recipe: Recipe, tmp_path: Path) -> None:
    recipe["jobs"] = {"chance": {"steps": [recipe["jobs"]["chance"]["steps"][0], {"export": {"to": "gptq"}}]}}
    answer = run(recipe)
    assert answer.code == 1 and "this job has none" in answer.err and not (tmp_path / "out").exists()


def test_other_evaluations_leave_the_checkpoint_alone(run: Callable[..., Any], recipe: Recipe, tmp_path: Path) -> None:
    assert run(recipe).code == 0
    plan = tmp_path / "out/narrow/moezip/plan.json"
    before = plan.stat().st_mtime_ns
    recipe["jobs"]["narrow"]["steps"].append({"evaluate": {"data": "one.jsonl", "tokens": TOKENS}})
    answer = run(recipe, "--json")
    assert states(answer) == {"narrow": False, "wide": True, "chance": True}
    assert plan.stat().st_mtime_ns == before and len(answer.json["jobs"][0]["evaluations"]) == 2
    rows = (tmp_path / "out/summary.csv").read_text().splitlines()
    assert "loss_2" in rows[0].split(",")


# -- the summary --------------------------------------------------------------------------------------------


def test_the_summary_says_what_the_reports_say(run: Callable[..., Any], recipe: Recipe, tmp_path: Path) -> None:
    answer = run(recipe, "--json")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    rows = {row["job"]: row for row in summary["jobs"]}
    for job in answer.json["jobs"]:
        row = rows[job["name"]]
        assert row["bytes"] == job["report"]["bytes_after"] and row["seconds"] > 0
        for evaluation in job["evaluations"]:
            assert row["loss"] == evaluation["nll"] and row["kl"] == evaluation["against"]["kl"]
            assert row["rise"] == evaluation["nll"] - evaluation["against"]["nll"]
    assert rows["narrow"]["method"] == "reap" and rows["narrow"]["keep"] == 4 and rows["wide"]["ratio"] == 0.5
    assert rows["narrow"]["experts"] == "4" and summary["source"]["bytes"] == rows["narrow"]["bytes_before"]
    # of two of one size the one with the smaller loss is the best; the one without a loss is not compared
    better = min(("narrow", "chance"), key=lambda name: rows[name]["loss"])
    assert {name: row["pareto"] for name, row in rows.items()} == {
        name: None if name == "wide" else name == better for name in rows
    }
    table = list(csv.DictReader((tmp_path / "out/summary.csv").open()))
    assert [row["job"] for row in table] == list(recipe["jobs"])
    assert float(table[0]["loss"]) == rows["narrow"]["loss"] and table[1]["loss"] == ""


def test_the_best_are_those_that_no_other_beats() -> None:
    from moezip.pipeline.batch.summary import mark_best

    def row(size: int, loss: float, text: str = "a") -> dict[str, Any]:
        return {"status": "done", "bytes": size, "loss": loss, "measured_on": text}

    rows = [row(10, 1.0), row(10, 1.0), row(10, 2.0), row(5, 1.5), row(20, 0.5), row(30, 0.5), row(30, 9.0, "b")]
    mark_best(rows)
    assert [each["pareto"] for each in rows] == [True, True, False, True, True, False, True]


# -- dry runs -----------------------------------------------------------------------------------------------


def test_a_dry_run_touches_nothing_and_foretells_the_sizes(
    run: Callable[..., Any], recipe: Recipe, passes: list[list[str]], tmp_path: Path
) -> None:
    recipe["jobs"]["packed"] = {
        "steps": [{"prune": {"method": "reap", "keep": 4}}, {"quantize": {"bits": 4, "solver": "rtn", "group_size": 0}}]
    }
    recipe["jobs"]["merged"] = {"needs": "wide", "steps": [{"merge": {"method": "m-smoe", "keep": 5}}]}
    recipe["jobs"]["onward"] = {"model": "job:wide", "steps": [{"evaluate": {"data": "held.jsonl"}}]}
    recipe["jobs"]["bad"] = {"steps": [{"prune": {"method": "reap", "keep": 1}}]}
    before = tree(tmp_path)
    answer = run(recipe, "--dry-run", "--json")
    assert answer.code == 1 and set(tree(tmp_path)) == {*before, "recipe.yaml"} and passes == []
    jobs = {job["name"]: job for job in answer.json["jobs"]}
    assert jobs["bad"]["state"] == "cannot run" and jobs["bad"]["error"]["next"] == "keep at least 2"
    assert {name for name, job in jobs.items() if job["state"] != "to run"} == {"bad"}, jobs
    assert answer.json["unknown"] == ["onward"] and jobs["onward"]["needs"] == ["wide"]
    [seen] = answer.json["passes"]
    assert seen["sets"] == {"one": TOKENS, "two": TOKENS} and set(seen["jobs"]) == {
        "narrow",
        "wide",
        "packed",
        "merged",
    }
    del recipe["jobs"]["bad"]
    people = run(recipe, "--dry-run")
    assert people.code == 0 and "to run" in people.out and "in all about" in people.err
    done = run(recipe, "--json")
    assert done.code == 0
    for job in done.json["jobs"]:
        if job["report"] is not None:
            assert job["report"]["bytes_after"] == jobs[job["name"]]["bytes_after"], job["name"]
            assert max(job["report"]["experts_after"]) == jobs[job["name"]]["experts"]
    after = run(recipe, "--dry-run", "--json").json
    assert {job["state"] for job in after["jobs"]} == {"finished"} and after["passes"] == []


def test_the_resolved_recipe_is_saved_and_runs_as_it_is(
    cli: Cli, run: Callable[..., Any], recipe: Recipe, tmp_path: Path
) -> None:
    assert run(recipe, "--set", "jobs.narrow.steps.0.prune.keep=3").code == 0
    saved = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert saved["jobs"]["narrow"]["steps"][0]["prune"]["keep"] == 3
    assert saved["calibration"]["one"] == {"data": [str(tmp_path / "one.jsonl")], "tokens": TOKENS, "weight": 1.0}
    assert saved["jobs"]["wide"]["steps"][0]["prune"]["calibration"] == ["one", "two"]
    assert all(states(cli("run", tmp_path / "out/recipe.yaml", "--json")).values())


def test_damaged_state_is_said(run: Callable[..., Any], recipe: Recipe, tmp_path: Path) -> None:
    assert run(recipe, "--only", "chance").code == 0
    (tmp_path / "out/state.json").write_text('{"job chance":')
    answer = run(recipe)
    assert answer.code == 1 and "state.json" in answer.err and "damaged" in answer.err


def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    """The packaged model, as ``make demo`` runs it: about 20 s on a free core, the dearest test of this file."""
    answer = process("demo", "made", "--json", cwd=tmp_path)
    assert answer.code == 0, answer.err
    jobs = {job["name"]: job for job in answer.json["jobs"]}
    assert jobs["easy-ep"]["report"]["experts_after"] == [8, 8, 8, 8]

    def rises(job: str) -> dict[str, float]:
        measured = jobs[job]["evaluations"][0]
        before = measured["against"]["by_file"]
        return {name: found["nll"] - before[name]["nll"] for name, found in measured["by_file"].items()}

    chosen, chance = rises("easy-ep"), rises("random")
    assert set(chosen) == {"python", "scripture", "factbook", "arithmetic"}
    # experts chosen for Python serve Python: it loses least by far, and lots do worse on it
    assert all(chosen["python"] < 0.5 * rise for name, rise in chosen.items() if name != "python")
    assert chosen["python"] < 0.5 * chance["python"]
    # and the table says so, from what was saved
    again = process("demo", "made", cwd=tmp_path)
    assert again.code == 0 and "python (chosen for)" in again.out
    assert f"{chosen['python']:+.3f}" in again.out and f"{chance['python']:+.3f}" in again.out
    assert process("verify", tmp_path / "made/easy-ep").code == 0
    assert json.loads((tmp_path / "made/easy-ep/config.json").read_text())["num_experts"] == 8


# -- quantize steps -----------------------------------------------------------------------------------------


def test_a_pruned_model_is_quantized_without_being_written_in_between(tmp_path: Path) -> None:
    """The output of prune and quantize in one job is that of the two commands with a plan between them."""
    out = tmp_path / "out"
    text = f"""
version: 1
model: demo
output: {out}
seq_len: 64
calibration:
  python: {{data: "demo:calib/python.jsonl", tokens: 512}}
jobs:
  both:
    steps:
      - prune: {{method: frequency, keep: 4}}
      - quantize: {{bits: 3, settings: {{attention: 8}}}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    [result] = run_recipe(load(tmp_path / "recipe.yaml"), Common())
    assert result.report is not None and result.report["experts_after"] == [4] * 4
    plan = Plan.load(out / "both" / "moezip" / "plan.json")
    assert {grid.bits for name, grid in plan.packing.items() if ".experts." in name} == {3}
    assert {grid.bits for name, grid in plan.packing.items() if ".self_attn." in name} == {8}
    assert len(plan.packing) == 4 * (4 * 3 + 4)
    (tmp_path / "plan.json").write_text(replace(plan, packing={}).to_json())
    job = QuantizeJob(
        3, settings={"attention": "8"}, texts=[DomainText("python", (demo.data("calib") / "python.jsonl",), 512)],
        plan=Plan.load(tmp_path / "plan.json"),
    )  # fmt: skip
    quantize_command("demo", tmp_path / "alone", job, Common(seq_len=64))
    for file in (out / "both").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()
    again = run_recipe(load(tmp_path / "recipe.yaml"), Common())
    assert [each.skipped for each in again] == [True]


@pytest.mark.parametrize(
    "steps",
    [
        "[{quantize: {bits: 4, solver: rtn}}, {prune: {method: random, keep: 4}}]",
        "[{quantize: {bits: 4, solver: rtn}}, {quantize: {bits: 3, solver: rtn}}]",
        '[{prune: {method: random, keep: 4}}, {evaluate: {data: "demo:heldout"}}, {quantize: {bits: 4, solver: rtn}}]',
    ],
)
def test_a_job_prunes_then_quantizes_with_nothing_between(steps: str, tmp_path: Path) -> None:
    text = f"version: 1\nmodel: demo\noutput: {tmp_path / 'o'}\njobs:\n  a: {{steps: {steps}}}\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="each once, one right behind"):
        run_recipe(load(tmp_path / "r.yaml"), Common())
    assert not (tmp_path / "o").exists()
