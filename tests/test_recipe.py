"""Recipes: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moezip import demo
from moezip.errors import RecipeError
from moezip.recipe import Evaluate, Prune, dump, load

SMALL = """\
version: 1
model: demo
calibration:
  code: {data: code.txt, tokens: 512}
jobs:
  half:
    steps:
      - prune:
          method: easy-ep
          ratio: 0.5
          calibration: code
      - evaluate: {data: code.txt, against: source}
"""


@pytest.fixture
def write(tmp_path: Path):
    """Writes a recipe, with the text file that SMALL calibrates on beside it."""

    def written(text: str) -> Path:
        folder = tmp_path / "recipes"
        folder.mkdir(exist_ok=True)
        (folder / "code.txt").write_text("x = 1\n")
        path = folder / "r.yaml"
        path.write_text(text)
        return path

    return written


def refusal(path: Path, overrides: dict[str, str] | None = None) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    return caught.value


# -- what is read -------------------------------------------------------------------------------------------


def test_the_shipped_recipe_reads():
    recipe = load(demo.recipe())
    assert recipe.model == str(demo.checkpoint())
    assert list(recipe.jobs) == ["easy-ep", "random", "int4", "easy-ep-int4"]
    prune, evaluate = (step.action for step in recipe.jobs["easy-ep"].steps)
    assert isinstance(prune, Prune) and prune.ratio == 0.5 and prune.calibration == ("python",)
    assert isinstance(evaluate, Evaluate) and evaluate.data == (demo.data("heldout"),)
    assert evaluate.against == recipe.model and evaluate.seq_len == recipe.seq_len == 256


def test_paths_are_relative_to_the_recipe_but_to_the_current_folder_when_they_come_from_set(
    write, tmp_path, monkeypatch
):
    path = write(SMALL)
    (tmp_path / "here.txt").write_text("y = 2\n")
    monkeypatch.chdir(tmp_path)
    assert load(path).calibration["code"].data == (path.parent / "code.txt",)
    moved = load(path, {"calibration.code.data": "here.txt", "output": "out"})
    assert moved.calibration["code"].data == (tmp_path / "here.txt",)
    assert moved.output == tmp_path / "out"


def test_the_output_is_relative_to_the_current_folder(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(write("output: out\n" + SMALL)).output == tmp_path / "out"


def test_demo_words_mean_the_packaged_files(write):
    recipe = load(write(SMALL), {"calibration.code.data": "demo:calib/python.jsonl"})
    assert recipe.calibration["code"].data == (demo.data("calib") / "python.jsonl",)


def test_a_hub_id_stays_as_it_is(write):
    assert load(write(SMALL), {"model": "owner/name"}).model == "owner/name"


def test_a_folder_beside_the_recipe_wins_over_a_hub_id(write):
    path = write(SMALL.replace("model: demo", "model: owner/name"))
    (path.parent / "owner" / "name").mkdir(parents=True)
    assert load(path).model == str(path.parent / "owner" / "name")


def test_set_reaches_lists_and_new_keys(write):
    recipe = load(write(SMALL), {"jobs.half.steps.0.prune.ratio": "0.25", "seed": "7"})
    assert recipe.jobs["half"].steps[0].action.ratio == 0.25
    assert recipe.seed == 7


def test_set_reaches_only_the_use_of_an_anchor_that_it_names(write):
    text = SMALL.replace("  half:\n    steps:\n", "  half:\n    steps: &all\n") + "  again: {steps: *all}\n"
    recipe = load(write(text), {"jobs.again.steps.0.prune.ratio": "0.25"})
    assert [recipe.jobs[name].steps[0].action.ratio for name in ("half", "again")] == [0.5, 0.25]


def test_a_prune_without_calibration_uses_all_of_them(write):
    recipe = load(write(SMALL.replace("          calibration: code\n", "")))
    assert recipe.jobs["half"].steps[0].action.calibration == ("code",)


def test_what_is_dumped_reads_back_equal(write, tmp_path):
    for path in (write(SMALL), demo.recipe()):
        recipe = load(path)
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(dump(recipe))
        assert load(resolved) == recipe


def test_a_dump_of_packaged_files_names_no_folder_of_this_machine():
    text = dump(load(demo.recipe(), {"output": "null"}))
    assert "model: demo\n" in text and "demo:calib/python.jsonl" in text
    assert str(demo.checkpoint().parent) not in text


def test_needs_order_the_jobs_and_otherwise_the_file_does(write):
    jobs = "".join(
        f"  {name}: {{{needs}steps: [{{evaluate: {{data: code.txt}}}}]}}\n"
        for name, needs in (("a", "needs: c, "), ("b", ""), ("c", "needs: [d], "), ("d", ""))
    )
    # a needs c needs d, so d, c, a come first; b has no needs and stays behind a, as in the file.
    assert load(write("version: 1\nmodel: demo\njobs:\n" + jobs)).order() == ["d", "c", "a", "b"]


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("ratio: 0.5", "ration: 0.5", 10, ["unknown key 'ration'", "did you mean 'ratio'?", "steps.0.prune.ration"]),
        ("tokens: 512", "token: 512", 4, ["unknown key 'token'", "did you mean 'tokens'?", "calibration.code.token"]),
        ("version: 1\n", "version: 1\nsede: 3\n", 2, ["unknown key 'sede'", "did you mean 'seed'?"]),
        ("version: 1", "version: 2", 1, ["version is 2", "it should be 1"]),
        ("version: 1\n", "", 1, ["the key 'version' is missing"]),
        ("tokens: 512", "tokens: many", 4, ["tokens is 'many'", "integer"]),
        ("tokens: 512", "tokens: true", 4, ["tokens is True", "integer"]),
        ("tokens: 512", "tokens: 0", 4, ["tokens is 0", "greater than or equal to 1"]),
        ("ratio: 0.5", "ratio: 1.0", 10, ["ratio is 1.0", "less than 1"]),
        ("ratio: 0.5", "ratio: .nan", 10, ["ratio is nan", "finite"]),
        ("ratio: 0.5", "ratio: 0.5\n          keep: 4", 8, ["either keep", "or ratio"]),
        ("          ratio: 0.5\n", "", 8, ["either keep", "or ratio"]),
        ("method: easy-ep", "method: easy-eb", 9, ["unknown pruning method 'easy-eb'", "did you mean 'easy-ep'?"]),
        ("ratio: 0.5", "ratio: 0.5\n          settings: {temperature: 2}", 11, ["setting of easy-ep 'temperature'"]),
        ("ratio: 0.5", "ratio: 0.5\n          settings: {seed: [1]}", 11, ["a number, a text, true or false"]),
        ("calibration: code", "calibration: cod", 11, ["no calibration is called 'cod'", "did you mean 'code'?"]),
        ("data: code.txt, tokens", "data: kode.txt, tokens", 4, ["there is no file or folder", "kode.txt"]),
        ("data: code.txt, tokens", "data: demo:calb, tokens", 4, ["no text called 'calb'", "did you mean 'calib'?"]),
        ("data: code.txt, tokens", "data: demo:calib/pyton.jsonl, tokens", 4, ["did you mean 'python.jsonl'?"]),
        ("data: code.txt, tokens", "data: demo:calib/../../x, tokens", 4, ["no calib file '../../x'"]),
        ("data: code.txt, tokens", "data: [], tokens", 4, ["data is []", "at least 1"]),
        ("model: demo", "model: ./nowhere", 2, ["there is no checkpoint at", "nowhere"]),
        ("{data: code.txt, against: source}", "{against: source}", 12, ["evaluate needs data or tasks"]),
        ("  half:\n", "  half:\n    needs: [other]\n", 7, ["needs 'other', which is not there"]),
        ("  half:\n", "  half:\n    needs: [half]\n", 7, ["half -> half"]),
        ("  half:\n", "  ../half:\n", 6, ["'../half' cannot be a name", "names of folders"]),
        ("      - evaluate:", "      - fit:", 12, ["'fit' comes in a later version"]),
        ("      - evaluate:", "      - evalute:", 12, ["unknown key 'evalute'", "did you mean 'evaluate'?"]),
        ("          ratio: 0.5\n", "          ratio: 0.5\n          ratio: 0.25\n", 11, ["is there twice", "line 10"]),
        ("  code: {data: code.txt, tokens: 512}\n", "  {}\n", 11, ["no calibration is called 'code'"]),
        ("        calibration: code\n", "        calibration: []\n", 8, ["easy-ep reads statistics"]),
        ("steps:", "steps: &me\n      - *me\n      -", 7, ["anchor that contains itself"]),
        ("version: 1", "version: [1", None, ["not valid YAML"]),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_line(write, old, new, line, words):
    assert old in SMALL
    message = str(refusal(write(SMALL.replace(old, new))))
    for word in words:
        assert word in message
    if line is not None:
        assert re.search(rf"line {line}\b", message.split("where:")[1])


def test_several_faults_are_counted(write):
    message = str(refusal(write(SMALL.replace("ratio:", "ration:").replace("tokens", "token"))))
    assert "'token'" in message and "line 4" in message
    assert "1 more to mend" in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("jobs.half.steps.0.prune.kep", "4", ["unknown key 'kep'", "did you mean 'keep'?", "--set jobs.half"]),
        ("jobs.half.steps.9.prune.keep", "4", ["jobs.half.steps is a list of 2", "from 0 to 1"]),
        ("model.name", "x", ["model holds one value"]),
        ("seed", "[1", ["is not a YAML value"]),
        ("seed", "x", ["seed is 'x'", "--set seed"]),
        ("jobs..steps", "x", ["an empty part"]),
    ],
)  # fmt: skip
def test_a_fault_of_set_is_told_as_such(write, key, value, words):
    message = str(refusal(write(SMALL), {key: value}))
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_what_is_not_a_mapping_is_refused(write, text):
    assert "a recipe is a mapping" in str(refusal(write(text)))


def test_a_missing_file_is_told(tmp_path):
    assert "cannot read the recipe" in str(refusal(tmp_path / "none.yaml"))


def test_a_fault_is_told_with_its_column(write):
    for old, new, column in (
        ("ratio: 0.5", "ration: 0.5", 11),
        ("{data: code.txt, tokens: 512}", "{data: code.txt, token: 512}", 26),
        ("version: 1\n", "version: 1\n  model: [\n", 8),
    ):
        assert re.search(rf"line \d+, column {column}\b", str(refusal(write(SMALL.replace(old, new)))))


# -- sweeps -------------------------------------------------------------------------------------------------

SWEEP = """\
version: 1
model: demo
calibration:
  code: {data: code.txt, tokens: 512}
  math: {data: code.txt, tokens: 512}
jobs:
  grid:
    sweep:
      ratio: [0.25, 0.5]
      method: [reap, easy-ep]
    steps:
      - prune: {calibration: code}
      - quantize: {bits: 4}
  last:
    needs: grid
    steps: [{evaluate: {data: code.txt}}]
"""


def test_a_sweep_is_one_job_per_combination(write):
    recipe = load(write(SWEEP))
    names = ["grid-ratio0.25-reap", "grid-ratio0.25-easy-ep", "grid-ratio0.5-reap", "grid-ratio0.5-easy-ep"]
    assert list(recipe.jobs) == [*names, "last"]
    prunes = [recipe.jobs[name].steps[0].action for name in names]
    assert [(prune.ratio, prune.method) for prune in prunes] == [
        (0.25, "reap"), (0.25, "easy-ep"), (0.5, "reap"), (0.5, "easy-ep"),
    ]  # fmt: skip
    assert all(prune.calibration == ("code",) for prune in prunes)
    assert recipe.jobs["last"].needs == tuple(names) and recipe.sweeps == {"grid": tuple(names)}


@pytest.mark.parametrize(
    ("sweep", "names", "key", "values"),
    [
        ("{steps.1.quantize.bits: [4, 2.5]}", ["bits4", "bits2.5"], (1, "bits"), [4, 2.5]),
        ("{quantize.bits: [4]}", ["bits4"], (1, "bits"), [4]),
        ("{prune.calibration: [code, [code, math]]}", ["code", "code-math"], (0, "calibration"),
         [("code",), ("code", "math")]),
        ("{bits: {small: 2, large: 8}}", ["small", "large"], (1, "bits"), [2, 8]),
        ("[{bits: 4, method: reap}, {bits: 3, method: nats}]", ["bits4-reap", "bits3-nats"], (1, "bits"), [4, 3]),
        ("{quantize.settings.symmetric: [true, false]}", ["symmetric", "no-symmetric"], (1, "settings"),
         [{"symmetric": True}, {"symmetric": False}]),
    ],
)  # fmt: skip
def test_keys_and_values_of_a_sweep(write, sweep, names, key, values):
    text = SWEEP.replace("\n      ratio: [0.25, 0.5]\n      method: [reap, easy-ep]", f" {sweep}")
    text = text.replace("prune: {calibration: code}", "prune: {method: reap, ratio: 0.5, calibration: code}")
    recipe = load(write(text))
    assert list(recipe.jobs) == [*(f"grid-{name}" for name in names), "last"]
    step, field = key
    found = [getattr(recipe.jobs[name].steps[step].action, field) for name in recipe.sweeps["grid"]]
    assert found == values


def test_sizes_are_written_as_for_the_command(write):
    job = "  packed: {sweep: {size: [40%, 6GiB, 0.4, 1000]}, steps: [{quantize: {allocate: lp}}]}\n"
    recipe = load(write(SMALL.replace("jobs:\n", "jobs:\n" + job)))
    sizes = [recipe.jobs[name].steps[0].action.size for name in recipe.sweeps["packed"]]
    assert sizes == [0.4, 6 * 2**30, 0.4, 1000]
    assert recipe.sweeps["packed"] == ("packed-40", "packed-6GiB", "packed-size0.4", "packed-size1000")
    assert "'6Gib8' is no size" in str(
        refusal(write(SMALL.replace("jobs:\n", "jobs:\n" + job.replace("6GiB", "6Gib8"))))
    )


def test_what_a_sweep_dumps_reads_back_equal(write, tmp_path):
    recipe = load(write(SWEEP))
    (tmp_path / "resolved.yaml").write_text(dump(recipe))
    assert load(tmp_path / "resolved.yaml") == recipe


def test_whole_steps_can_be_swept_over(write):
    steps = "{steps.0: {cut: {prune: {method: reap, ratio: 0.5}}, joined: {merge: {method: m-smoe, ratio: 0.5}}}}"
    text = SWEEP.replace("\n      ratio: [0.25, 0.5]\n      method: [reap, easy-ep]", f" {steps}")
    recipe = load(write(text))
    assert [recipe.jobs[name].steps[0].verb for name in ("grid-cut", "grid-joined")] == ["prune", "merge"]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("ratio:", "ration:", 9, ["has a 'ration'", "did you mean 'ratio'?"]),
        ("ratio:", "prune.ration:", 9, ["has a 'ration'", "did you mean 'ratio'?"]),
        ("ratio:", "steps.0.prune.ration:", 9, ["'ration' of prune", "did you mean 'ratio'?"]),
        ("ratio:", "steps.0.pruen.ratio:", 9, ["no 'pruen'", "did you mean 'prune'?"]),
        ("ratio:", "steps.7.prune.ratio:", 9, ["has 2 steps", "from 0 to 1"]),
        ("ratio:", "settings:", 9, ["steps.0.prune.settings or steps.1.quantize.settings"]),
        ("[0.25, 0.5]", "[]", 9, ["has no values"]),
        ("[0.25, 0.5]", "0.25", 9, ["has no values", "ratio: [0.25, ...]"]),
        ("[0.25, 0.5]", "[0.25, 1.5]", 9, ["ratio is 1.5", "less than 1", "grid-ratio1.5-reap"]),
        ("[0.25, 0.5]", "[0.25, 0.25]", 8, ["two jobs would be called 'grid-ratio0.25-reap'"]),
        ("[reap, easy-ep]", "[reap, easy-eb]", 10, ["'easy-eb'", "did you mean 'easy-ep'?"]),
        ("[reap, easy-ep]", f"[{', '.join(f'm{i}' for i in range(251))}]", 8, ["makes 502 jobs (2 x 251)"]),
        ("{calibration: code}", "{calibratoin: code}", 12, ["'calibratoin'", "did you mean 'calibration'?"]),
        ("  last:", "  grid-ratio0.5-reap:", 8, ["two jobs would be called"]),
        ("    needs: grid\n", "    needs: gird\n", 15, ["'gird', which is not there"]),
        ("    needs: grid\n", "    model: job:grid\n", 15, ["is a sweep of 4 jobs", "grid-ratio0.25-reap"]),
    ],
)  # fmt: skip
def test_a_fault_in_a_sweep_is_told_where_it_stands(write, old, new, line, words):
    message = str(refusal(write(SWEEP.replace(old, new, 1))))
    for word in words:
        assert word in message
    assert re.search(rf"line {line}\b", message.split("where:")[1])


def test_set_reaches_a_sweep(write):
    recipe = load(write(SWEEP), {"jobs.grid.sweep.ratio": "[0.75]"})
    assert list(recipe.sweeps["grid"]) == ["grid-ratio0.75-reap", "grid-ratio0.75-easy-ep"]
    assert "--set jobs." in str(refusal(write(SWEEP), {"jobs.grid.sweep.ratio": "[7]"}))


# -- jobs on jobs, and exports ------------------------------------------------------------------------------


def test_a_job_can_work_on_what_another_made(write):
    after = "  packed: {model: job:half, steps: [{quantize: {bits: 4}}, {export: {to: gptq, for: vllm}}]}\n"
    again = "  again: {model: job:packed, steps: [{evaluate: {data: code.txt, against: source}}]}\n"
    recipe = load(write(SMALL.replace("jobs:\n", "jobs:\n" + again + after)))
    assert recipe.jobs["packed"].needs == ("half",) and recipe.order() == ["half", "packed", "again"]
    assert recipe.source_of("again") == recipe.model == recipe.jobs["again"].steps[0].action.against
    export = recipe.jobs["packed"].steps[1].action
    assert export.to == "gptq" and export.reader == "vllm"


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("{model: job:hafl, steps: [{quantize: {bits: 4}}]}", ["works on 'hafl'", "did you mean 'half'?"]),
        ("{model: job:more, steps: [{quantize: {bits: 4}}]}", ["more -> more"]),
        ("{steps: [{export: {to: gpqt}}]}", ["unknown format 'gpqt'", "did you mean 'gptq'?"]),
        ("{steps: [{export: {to: gptq, for: vlm}}]}", ["unknown reader 'vlm'", "did you mean 'vllm'?"]),
        ("{steps: [{export: {to: gptq}}, {export: {to: gptq}}]}", ["'more.gptq' in the output folder"]),
        ("{steps: [{export: {to: gptq, settings: {type: Q8_0}}}]}", ["to gptq has no settings"]),
        ("{steps: [{export: {to: gguf, settings: {tipe: Q8_0}}}]}", ["'tipe'", "did you mean 'type'?"]),
        ("{steps: [{export: {too: gptq}}]}", ["unknown key 'too'", "did you mean 'to'?"]),
        ("{steps: [{prune: {method: reap, ratio: 0.5, four: vllm}}]}", ["unknown key 'four'", "mean 'for'?"]),
    ],
)
def test_what_is_refused_of_jobs_on_jobs_and_exports(write, job, words):
    message = str(refusal(write(SMALL.replace("jobs:\n", f"jobs:\n  more: {job}\n"))))
    for word in words:
        assert word in message


def test_names_that_the_output_folder_needs_are_refused(write):
    for name in ("statistics", "work", "summary.csv", "half.evaluate.json"):
        text = SMALL.replace("jobs:\n", f"jobs:\n  {name}: {{steps: [{{evaluate: {{data: code.txt}}}}]}}\n")
        assert "in the output folder" in str(refusal(write(text)))
