"""The command line end to end, on tiny models: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import Cli, files_of, model_files, process, tree, write_text

COMMANDS = (
    "inspect", "methods", "architectures", "verify", "calibrate", "prune", "apply", "evaluate", "report", "run", "demo",
    "tasks",
)  # fmt: skip
TOKENS = 512
Tiny = Callable[..., Path]


@pytest.fixture
def model(tiny: Tiny) -> Path:
    return tiny("qwen3_moe")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "words.jsonl")


@pytest.fixture(scope="module")
def stats(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the tiny model, taken once for this file."""
    from moezip.pipeline import Common, calibrate_command

    folder = tmp_path_factory.mktemp("stats")
    out = folder / "stats.safetensors"
    calibrate_command(str(tiny("qwen3_moe")), [write_text(folder / "words.jsonl")], out, Common(), TOKENS, None)
    return out


# -- words out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    shown = cli(command, "--help")
    assert shown.code == 0 and shown.err == ""
    assert f"Usage: moezip {command}" in shown.out


def test_the_program_lists_every_command(cli: Cli) -> None:
    shown = cli("--help")
    assert shown.code == 0
    assert all(re.search(rf"│ {command} ", shown.out) for command in COMMANDS)


def test_the_version(cli: Cli) -> None:
    from moezip import __version__

    assert cli("--version").out == f"moezip {__version__}\n"


def test_the_module_runs_as_the_command() -> None:
    import subprocess
    import sys

    from tests.command import ROOT

    done = subprocess.run([sys.executable, "-m", "moezip", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("moezip ")


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("prune",),
        ("prune", "a", "b", "--no-such-flag"),
        ("prune", "a", "b", "--keep", "many"),
        ("prune", "a", "b", "--keep", "0"),
        ("prune", "a", "b", "--keep", "4", "--set", "guard"),
        ("prune", "a", "b", "--keep", "4", "--set", "guard=true", "--set", "guard=false"),
        ("prune", "a", "b", "--keep", "4", "--scope", "model"),
        ("calibrate", "a"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_why(cli: Cli, words: tuple[str, ...]) -> None:
    answer = cli(*words)
    assert answer.code == 2
    assert answer.out == "" and len(answer.err.strip()) > 10 and "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("size", "count"),
    [("1024", 1024), ("8GiB", 8 * 2**30), ("8g", 8 * 2**30), ("500MB", 500_000_000), ("1.5 KiB", 1536)],
)
def test_sizes(size: str, count: int) -> None:
    from moezip.sizes import size_of

    assert size_of(size) == count


@pytest.mark.parametrize("size", ["", "much", "8 apples", "-1GiB", "0", "nan", "inf", "1e999", "GiB", "8GiBB"])
def test_what_is_no_size(cli: Cli, model: Path, text: Path, tmp_path: Path, size: str) -> None:
    answer = cli("prune", model, tmp_path / "out", "--keep", 4, "--data", text, "--max-memory", size)
    assert answer.code == 2 and "is no size" in answer.err and "8GiB" in answer.err


# -- looking ------------------------------------------------------------------------------------------------


def test_inspect_json_by_hand(cli: Cli, model: Path) -> None:
    answer = cli("inspect", model, "--json")
    assert answer.code == 0 and answer.err == ""
    seen = answer.json
    # tiny qwen3_moe: 3 layers, all with 8 experts of width 16 on hidden 32: 3 x 8 x 3 x 16 x 32 = 36,864 weights in
    # experts, 4 bytes each
    assert seen["architecture"] == "Qwen3MoeForCausalLM" and seen["model_type"] == "qwen3_moe"
    assert seen["layers"] == 3 and seen["moe_layers"] == [0, 1, 2] and seen["experts"] == [8, 8, 8]
    assert seen["top_k"] == 2 and seen["dtype"] == "F32"
    assert seen["expert_parameters"] == 36_864 and seen["expert_bytes"] == 4 * 36_864
    assert seen["bytes"] == 4 * seen["parameters"]


def test_inspect_for_people(cli: Cli, model: Path) -> None:
    answer = cli("inspect", model)
    assert answer.code == 0 and "8 per layer, 2 per token" in answer.out


def test_the_tables_of_methods_and_architectures(cli: Cli) -> None:
    methods = cli("methods", "--json").json
    assert {entry["name"] for entry in methods} >= {
        "easy-ep", "reap", "frequency", "gate-sum", "mean-norm", "random", "router-norm",
    }  # fmt: skip
    assert len(cli("architectures", "--json").json) >= 15
    assert cli("methods").code == cli("architectures").code == 0
    assert "2504.06792" in cli("methods", "easy-ep").out
    assert "thin factors" in cli("methods", "mc-smoe").out  # not what it takes over from m-smoe
    assert cli("methods", "easy-ep", "--json").json["settings"]["guard"] is True


# -- the main job -------------------------------------------------------------------------------------------


def test_prune_loads_in_stock_transformers_verifies_and_evaluates(
    cli: Cli, model: Path, text: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    answer = cli("prune", model, out, "--keep", 5, "--data", text, "--tokens", TOKENS, "--json")
    assert answer.code == 0
    report = answer.json
    assert report["out"] == str(out)
    assert report["experts_before"] == [8, 8, 8] and report["experts_after"] == [5, 5, 5]
    # 3 of 8 experts go in 3 layers: 3 x 3 x (3 x 16 x 32 expert weights + 32 of the router's row), 4 bytes each
    assert report["bytes_before"] - report["bytes_after"] == 4 * 3 * 3 * (3 * 16 * 32 + 32)
    assert report["bits_per_weight"] == 32
    assert report["predicted_nats"] is None and report["predicted_nats_reason"]
    assert report["seconds"] >= sum(report["stages"].values()) > 0
    assert set(report["stages"]) == {"calibrate", "plan", "write"}
    assert report["peak_rss_bytes"] > 2**20

    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.num_experts == 5
    assert cli("verify", out).code == 0
    assert cli("verify", out, "--json").json == {"ok": True, "findings": []}

    measured = cli("evaluate", out, "--against", model, "--data", text, "--tokens", TOKENS, "--json").json
    assert measured["tokens"] > 0 and measured["nll"] > 0
    assert measured["by_file"]["words"].keys() >= {"nll", "perplexity", "tokens"}
    assert measured["by_file"]["words"]["nll"] == pytest.approx(measured["nll"])
    assert measured["against"]["kl"] > 0 and 0 <= measured["against"]["top1_agreement"] < 1
    assert measured["against"]["nll"] != measured["nll"]
    assert measured["tasks"] == {}
    people = cli("evaluate", out, "--data", text, "--tokens", TOKENS)
    assert people.code == 0 and "words" in people.out


def test_evaluate_tasks_json(cli: Cli, model: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "guess.jsonl"
    rows = [{"context": "ab", "choices": ["cd", "xy"], "answer": i % 2} for i in range(3)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = cli("evaluate", model, "--tasks", tasks, "--json").json
    assert answer["tasks"]["guess"]["n"] == 3 and 0 <= answer["tasks"]["guess"]["accuracy"] <= 1
    assert answer["nll"] is None and answer["against"] is None


def test_calibrate_json_and_the_file_it_makes(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    from moezip.calibrate.statistics import Statistics

    out = tmp_path / "made.safetensors"
    answer = cli("calibrate", model, "--data", text, "--out", out, "--tokens", TOKENS, "--seq-len", 64, "--json")
    assert answer.code == 0
    # 512 tokens are exactly 8 windows of 64
    assert answer.json["domains"] == {"words": TOKENS} and answer.json["tokens"] == TOKENS
    saved = Statistics.load(out)
    assert saved.tokens == TOKENS and saved.settings["seq_len"] == 64
    # every token goes to 2 experts
    assert all(layer["counts"].sum() == 2 * TOKENS for layer in saved.domains[0].layers.values())
    assert tree(tmp_path) == ["made.safetensors", "words.jsonl"]
    again = cli("calibrate", model, "--data", text, "--out", out)
    assert again.code == 2 and "exists" in again.err and "--overwrite" in again.err
    assert cli("calibrate", model, "--data", text, "--out", out, "--tokens", TOKENS, "--overwrite").code == 0


def test_statistics_serve_any_method_and_ratio_with_no_second_pass(
    cli: Cli, model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a second pass")

    monkeypatch.setattr("moezip.calibrate.run.calibrate", refuse)
    monkeypatch.setattr("moezip.pipeline.prune.run_calibration", refuse)
    for i, (method, amount, kept) in enumerate(
        [("easy-ep", ("--keep", 3), 3), ("reap", ("--ratio", 0.25), 6), ("frequency", ("--ratio", 0.5), 4)]
    ):
        answer = cli("prune", model, tmp_path / f"out-{i}", "-m", method, *amount, "--stats", stats, "--json")
        assert answer.json["experts_after"] == [kept] * 3


def test_saved_statistics_of_a_prune_give_the_same_plan(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    direct = cli("prune", model, tmp_path / "a", "--keep", 4, "--data", text, "--tokens", TOKENS, "--save-stats", kept)
    assert direct.code == 0 and kept.is_file()
    assert cli("prune", model, tmp_path / "b", "--keep", 4, "--stats", kept).code == 0
    assert model_files(tmp_path / "a") == model_files(tmp_path / "b")
    refused = cli("prune", model, tmp_path / "c", "--keep", 4, "--data", text, "--save-stats", kept)
    assert refused.code == 2 and "exists" in refused.err and not (tmp_path / "c").exists()
    pointless = cli("prune", model, tmp_path / "c", "-m", "random", "--keep", 4, "--save-stats", tmp_path / "x")
    assert pointless.code == 2 and "--save-stats" in pointless.err


def test_several_domains_stand_side_by_side(cli: Cli, model: Path, tmp_path: Path) -> None:
    one, two = write_text(tmp_path / "one.jsonl", 1), write_text(tmp_path / "two.jsonl", 2)
    words = ("--keep", 4, "--tokens", TOKENS, "--json")
    answer = cli("prune", model, tmp_path / "both", "--data", one, "--data", two, *words)
    assert answer.json["statistics"] == {"one": TOKENS // 2, "two": TOKENS // 2}
    plan = json.loads((tmp_path / "both/moezip/plan.json").read_text())
    assert [domain["name"] for domain in plan["made_by"]["domains"]] == ["one", "two"]
    # each domain's scores are divided by their layer sum, so those of a layer add up to the number of domains
    for layer in plan["layers"]:
        assert sum(layer["scores"]) == pytest.approx(2)


# -- plans --------------------------------------------------------------------------------------------------


def test_a_plan_applied_gives_the_bytes_of_a_direct_prune(cli: Cli, model: Path, stats: Path, tmp_path: Path) -> None:
    words = ("--method", "reap", "--keep", 4, "--stats", stats)
    assert cli("prune", model, tmp_path / "direct", *words).code == 0
    plan = tmp_path / "plan.json"
    assert cli("prune", model, plan, *words, "--plan-only", "--json").json["layers"].keys() == {"0", "1", "2"}
    for name in ("once", "twice"):
        answer = cli("apply", model, plan, tmp_path / name, "--json")
        assert answer.json["experts_after"] == [4, 4, 4] and answer.json["method"] == "reap"
    direct = model_files(tmp_path / "direct")
    assert {"config.json", "moezip/plan.json", "model.safetensors.index.json"} < direct.keys()
    assert direct == model_files(tmp_path / "once") == model_files(tmp_path / "twice")
    # the plan inside an output is a plan, too
    assert cli("apply", model, tmp_path / "direct/moezip/plan.json", tmp_path / "third").code == 0
    assert model_files(tmp_path / "third") == direct


@pytest.mark.parametrize("shards", [1, 3])
def test_keeping_all_gives_the_same_bytes(cli: Cli, tiny: Tiny, tmp_path: Path, shards: int) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("qwen3_moe", shards=shards), source)
    for file in source.iterdir():
        file.chmod(0o644)
    (source / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    assert cli("prune", source, tmp_path / "out", "-m", "router-norm", "--ratio", 0).code == 0
    made = files_of(tmp_path / "out")
    assert {name: made.get(name) for name in files_of(source)} == files_of(source)
    assert made.keys() - files_of(source).keys() == {
        "moezip/plan.json", "moezip/report.json", "moezip/manifest.json",
    }  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3])
def test_side_files_come_along(cli: Cli, tiny: Tiny, tmp_path: Path, shards: int) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("qwen3_moe", shards=shards), source)
    for file in source.iterdir():
        file.chmod(0o644)
    side = {
        "generation_config.json": '{"max_new_tokens": 7}',
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "free",
        "special_tokens_map.json": "{}",
        "modeling_own.py": "raise RuntimeError('remote code is carried, never run')",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
    }
    for name, content in side.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    (source / "pytorch_model.bin").write_bytes(b"weights that would be the old ones")
    (source / "README.md").write_text("---\nlicense: mit\n---\nThe old card.\n")
    assert cli("prune", source, tmp_path / "out", "-m", "random", "--keep", 4).code == 0
    made = files_of(tmp_path / "out")
    assert {name: made[name].decode() for name in side} == side
    assert "pytorch_model.bin" not in made
    card = made["README.md"].decode()
    assert card.startswith("---\nlicense: mit\nbase_model: source\n") and "4 of 8" in card and "The old card." in card
    assert cli("verify", tmp_path / "out").code == 0


# -- touching nothing ---------------------------------------------------------------------------------------


def test_a_dry_run_reads_no_text_and_writes_nothing(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = tmp_path / "blank.jsonl"  # reading it would be an error
    blank.write_text("not JSON\n")
    before, source = tree(tmp_path), files_of(model)
    monkeypatch.chdir(tmp_path)
    words = ("prune", model, "out", "--keep", 5, "--data", blank, "--tokens", TOKENS, "--dry-run")
    answer = cli(*words, "--json")
    assert answer.code == 0
    seen = answer.json
    assert seen["dry_run"] is True and seen["kept"] is None and seen["tokens"] == TOKENS
    assert seen["bytes_before"] - seen["bytes_after"] == 4 * 3 * 3 * (3 * 16 * 32 + 32)
    assert seen["seconds"] > 0 and seen["memory_bytes"] > 0
    people = cli(*words)
    assert people.code == 0 and "5 of 8" in people.out and "nothing was touched" in people.out
    assert tree(tmp_path) == before and files_of(model) == source


def test_a_dry_run_names_the_kept_experts_where_it_can(cli: Cli, model: Path, stats: Path, tmp_path: Path) -> None:
    data_free = cli("prune", model, tmp_path / "a", "-m", "router-norm", "--keep", 4, "--dry-run", "--json").json
    assert set(data_free["kept"]) == {"0", "1", "2"} and all(len(ids) == 4 for ids in data_free["kept"].values())
    words = ("-m", "reap", "--keep", 4, "--stats", stats, "--json")
    planned = cli("prune", model, tmp_path / "a", *words, "--dry-run").json["kept"]
    assert not (tmp_path / "a").exists()
    assert cli("prune", model, tmp_path / "a", *words).code == 0
    done = json.loads((tmp_path / "a/moezip/plan.json").read_text())["layers"]
    assert planned == {str(layer["layer"]): layer["picks"] for layer in done}


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_text_that_is_not_there_is_said_early(
    cli: Cli, model: Path, tmp_path: Path, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moezip.calibrate.data.tokenizer_of", lambda folder: pytest.fail("work had begun"))
    answer = cli("prune", model, tmp_path / "out", "--keep", 4, "--data", tmp_path / "gone.jsonl", *more)
    assert answer.code == 1 and "no such data file" in answer.err and "gone.jsonl" in answer.err
    assert tree(tmp_path) == []


def test_an_existing_output_is_refused_before_calibration(
    cli: Cli, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezip.pipeline import prune as pruning

    calibrate = pruning.run_calibration
    monkeypatch.setattr(pruning, "run_calibration", lambda *a, **k: pytest.fail("calibrated before looking"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    words = ("prune", model, out, "--keep", 4, "--data", text, "--tokens", TOKENS)
    for more, hint in [((), "--overwrite"), (("--overwrite",), "delete the folder yourself")]:
        answer = cli(*words, *more)
        assert answer.code == 1 and hint in answer.err and str(out) in answer.err
    assert files_of(out) == {"precious": b"mine"}
    into = cli("prune", model, model / "inside", "--keep", 4, "--data", text)
    assert into.code == 1 and "where the source is read" in into.err
    monkeypatch.setattr(pruning, "run_calibration", calibrate)
    shutil.rmtree(out)
    assert cli(*words).code == 0
    first = model_files(out)
    assert cli(*words, "--overwrite", "-m", "random").code == 0
    assert model_files(out) != first and not (out / "precious").exists()
    assert tree(tmp_path)[0] == "out"  # nothing hidden is left beside it


# -- quiet, errors, interruption ----------------------------------------------------------------------------


def test_quiet_says_nothing_and_json_leaves_only_json(model: Path, text: Path, tmp_path: Path) -> None:
    """In processes of their own, because libraries talk through loggers, warnings and bars of their own."""
    words = (model, "--data", text, "--tokens", TOKENS)
    quiet = process("prune", *words, tmp_path / "a", "--keep", 4, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    both = process("evaluate", *words, "--quiet", "--json")
    assert both.code == 0 and both.err == "" and both.json["tokens"] > 0
    loud = process("calibrate", *words, "--out", tmp_path / "s", "--json", NO_COLOR="1")
    assert loud.code == 0 and loud.json["tokens"] == TOKENS
    # not a terminal: one line per stage, no bars, no colour
    assert loud.err == "read text: done\ncalibrate: 3 layers done\n"
    assert "\x1b" not in process("inspect", model).out


def test_an_error_is_one_message_and_debug_gives_the_traceback(cli: Cli, tmp_path: Path) -> None:
    answer = cli("inspect", tmp_path / "none")
    assert answer.code == 1 and answer.out == ""
    lines = answer.err.splitlines()
    assert lines[0].startswith("error: there is no folder") and lines[-1].startswith("  next: ")
    assert "Traceback" not in answer.err
    debug = process("inspect", tmp_path / "none", "--debug")
    assert debug.code == 1 and "Traceback" in debug.err and "CheckpointError" in debug.err


def test_the_unforeseen_is_one_message_too(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr("moezip.report.overview.overview", broken)
    answer = cli("inspect", model)
    assert answer.code == 1 and "KeyError" in answer.err and "--debug" in answer.err and "Traceback" not in answer.err


def test_interrupted_calibration_ends_with_130_and_resumes(
    cli: Cli, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezip.calibrate import run as passes
    from moezip.calibrate.capture import Capture

    words = ("prune", model, tmp_path / "out", "--keep", 4, "--data", text, "--tokens", TOKENS)
    assert cli("prune", model, tmp_path / "straight", *words[3:]).code == 0

    watch = Capture.watch

    def stop_at_last_layer(self: Capture, index: int, layer: object) -> None:
        if index == 2:
            raise KeyboardInterrupt
        watch(self, index, layer)

    with monkeypatch.context() as patched:
        patched.setattr(Capture, "watch", stop_at_last_layer)
        lost = cli(*words)  # within the first minute nothing is saved, and it says so
        assert lost.code == 130 and "had not been saved yet" in lost.err and "--resume" not in lost.err
        assert not any(name.startswith(("out", ".out")) for name in tree(tmp_path))
        patched.setattr(passes.calibrate, "__kwdefaults__", {**passes.calibrate.__kwdefaults__, "save_every": 0.0})
        kept = cli(*words)
        assert kept.code == 130 and "2 of 3 layers are calibrated and saved" in kept.err and "--resume" in kept.err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.moezip-work/progress.json").is_file()

    done: list[int] = []

    def count(self: Capture, index: int, layer: object) -> None:
        done.append(index)
        watch(self, index, layer)

    monkeypatch.setattr(Capture, "watch", count)
    assert cli(*words, "--resume").code == 0
    assert done == [2]  # layers 0 and 1 were not run again
    assert model_files(tmp_path / "out") == model_files(tmp_path / "straight")
    assert not (tmp_path / "out.moezip-work").exists()


def test_interrupted_writing_keeps_the_statistics(
    cli: Cli, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moezip.checkpoint.writer import Staging

    def stop(self: Staging, name: str, content: bytes) -> None:
        raise KeyboardInterrupt  # after the shards, before config.json

    words = ("prune", model, tmp_path / "out", "--keep", 4, "--data", text, "--tokens", TOKENS)
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "add", stop)
        answer = cli(*words)
    assert answer.code == 130 and "statistics are kept" in answer.err and "--resume" in answer.err
    assert tree(tmp_path) == ["out.moezip-work", "out.moezip-work/statistics.safetensors", "words.jsonl"]
    with monkeypatch.context() as patched:
        patched.setattr("moezip.calibrate.run.calibrate", lambda *a, **k: pytest.fail("a second pass"))
        assert cli(*words, "--resume").code == 0
    assert cli("verify", tmp_path / "out").code == 0
    assert [name for name in tree(tmp_path) if "/" not in name] == ["out", "words.jsonl"]


def test_kept_statistics_of_other_text_are_not_taken(
    cli: Cli, model: Path, text: Path, tmp_path: Path, stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(stats, work / "statistics.safetensors")
    other = write_text(tmp_path / "other.jsonl", seed=5)
    words = ("--keep", 4, "--tokens", TOKENS, "--resume", "--workdir", work, "--json")
    answer = cli("prune", model, tmp_path / "out", "--data", other, *words)
    assert answer.json["statistics"] == {"other": TOKENS}


def test_ctrl_c_from_outside(model: Path, text: Path, tmp_path: Path) -> None:
    """A real signal, sent by the process to itself while shards are written."""
    before = (
        "import os, signal; from moezip.checkpoint import writer; store = writer.Staging._store\n"
        "def slow(self, name, *rest):\n"
        "    if name == 'config.json': os.kill(os.getpid(), signal.SIGINT)\n"
        "    store(self, name, *rest)\n"
        "writer.Staging._store = slow"
    )
    answer = process("prune", model, tmp_path / "out", "-m", "random", "--keep", 4, before=before)
    assert answer.code == 130 and answer.err.strip().splitlines()[-1].startswith("interrupted: no half-written")
    assert tree(tmp_path) == ["words.jsonl"]
