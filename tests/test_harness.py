"""EleutherAI's lm-eval, in memory and streamed, beside our own scores of the same questions."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moezip import demo
from moezip.calibrate.data import tokenizer_of
from moezip.calibrate.stream import Stream
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import DataError, MoezipError, UsageError
from moezip.evaluate.harness import resolved, run_harness
from moezip.evaluate.loss import evaluate
from tests.command import Cli, write_text

Tiny = Callable[..., Path]
# The same numbers from a model that is whole and padded on the right, and from one that is streamed, in float32.
PLAIN = 1e-3

try:
    importlib.metadata.version("lm_eval")
    HERE = True
except importlib.metadata.PackageNotFoundError:
    HERE = False
needs_harness = pytest.mark.skipif(not HERE, reason="lm-eval is not installed: pip install 'moezip[lm-eval]'")

MULTIPLE_CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[answer]}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def questions() -> list[dict[str, Any]]:
    """Continuations of the demo's held-out sums with four choices of equally many tokens.

    Ours compares means over tokens, lm-eval sums, so that both must find the same only where lengths are equal.
    """
    tokenizer, rows = tokenizer_of(demo.checkpoint()), []
    for line in (demo.data("tasks") / "scripture.jsonl").read_text().splitlines():
        row = json.loads(line)
        choices = [tokenizer(choice, add_special_tokens=False).input_ids for choice in row["choices"]]
        cut = [tokenizer.decode(ids[:4], clean_up_tokenization_spaces=False) for ids in choices]
        context = row["context"].rstrip()  # lm-eval moves spaces at the end to the continuation

        def after(choice: str, context: str = context) -> list[int]:
            texts = (context, context + choice)
            before, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
            return whole[len(before) :] if whole[: len(before)] == before else []

        if all(len(after(choice)) == 4 for choice in cut) and len(set(cut)) == 4:
            rows.append({"context": context, "choices": cut, "answer": row["answer"]})
    assert len(rows) >= 10
    return rows[:10]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two task files and their questions; datasets keeps its copies there too."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows, folder = questions(), tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(MULTIPLE_CHOICE.replace("FILE", str(tmp_path / "sums.jsonl")))
    (folder / "writing.yaml").write_text(WRITING.replace("FILE", str(tmp_path / "sums.jsonl")))
    return folder


@needs_harness
def test_accuracy_is_our_own_in_memory_and_streamed(task: Path) -> None:
    source = Checkpoint.open(demo.checkpoint())
    own = evaluate(source, tasks=[task.parent / "sums.jsonl"]).tasks["sums"]
    assert 0.2 < own.accuracy < 1
    for mode in ("memory", "streamed"):
        found = run_harness(source, [str(task / "sums.yaml")], mode=mode)  # type: ignore[arg-type]
        assert found.mode == mode and found.version == importlib.metadata.version("lm_eval")
        assert found.tasks["sums"]["acc,none"] == own.accuracy
        assert found.tasks["sums"]["n"] == own.n == 10


@needs_harness
def test_streamed_log_likelihoods_are_those_in_memory(task: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from moezip.evaluate.harness_model import Streamed
    from moezip.runtime.load import load

    folder = demo.checkpoint()
    tokenizer = tokenizer_of(folder)
    whole = HFLM(pretrained=load(folder, dtype=torch.float32), tokenizer=tokenizer, batch_size=4)
    stream = Stream(Checkpoint.open(folder), dtype=torch.float32)
    ours = Streamed(stream, tokenizer, None, None)
    pairs = [(row["context"], choice) for row in questions()[:3] for choice in row["choices"]]
    long = "In the beginning " * 500  # more than the model's maximum: the beginning of the context is cut off
    pairs += [("", "In the beginning"), ("In the ", "beginning"), (long, " God")]
    asked = [SimpleNamespace(args=pair) for pair in pairs]
    expected = whole.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    assert [each for each, _ in found] == pytest.approx([each for each, _ in expected], abs=PLAIN)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [SimpleNamespace(args=(text,)) for text in (long, "In the beginning God")]
    rolled = whole.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolled, rel=1e-5)
    with pytest.raises(DataError, match="must have 1 to 1024"):
        ours.loglikelihood([SimpleNamespace(args=("a", long))])


@needs_harness
def test_what_generates_text_needs_the_model_in_memory(cli: Cli, task: Path) -> None:
    source = Checkpoint.open(demo.checkpoint())
    found = run_harness(source, [str(task / "writing.yaml")], mode="memory")
    assert 0 <= found.tasks["writing"]["exact_match,none"] <= 1
    with pytest.raises(MoezipError, match="has to be streamed"):
        run_harness(source, [str(task / "writing.yaml")], mode="streamed")


@needs_harness
def test_the_command(cli: Cli, tiny: Tiny, task: Path) -> None:
    # a folder stands for all tasks in it, and the reference answers them too
    answer = cli("evaluate", "demo", "--against", "demo", "--lm-eval", task, "--json")
    assert answer.code == 0, answer.err
    told = answer.json["lm_eval"]
    assert set(told["tasks"]) == {"sums", "writing"} and told["against"] == told["tasks"]
    # a ceiling below the whole model: streamed
    answer = cli("evaluate", "demo", "--lm-eval", task / "sums.yaml", "--max-memory", "604MiB")
    assert answer.code == 0, answer.err
    assert "streamed" in answer.out and "sums" in answer.out


@needs_harness
def test_tasks_that_do_not_exist(tmp_path: Path) -> None:
    source = Checkpoint.open(demo.checkpoint())
    with pytest.raises(UsageError, match="no such task file"):
        run_harness(source, [str(tmp_path / "absent.yaml")])
    with pytest.raises(UsageError, match="holds no task"):
        run_harness(source, [str(tmp_path)])
    # lm-eval's own list takes it seconds to read
    with pytest.raises(UsageError, match="did you mean arc_easy"):
        resolved("arc_eazy", SimpleNamespace(all_tasks=["arc_easy", "mmlu"]))


@needs_harness
def test_data_that_is_not_here(task: Path) -> None:
    (task / "sums.yaml").write_text(MULTIPLE_CHOICE.replace("FILE", str(task / "absent.jsonl")))
    with pytest.raises(DataError, match="lm-eval could not run the task"):
        run_harness(Checkpoint.open(demo.checkpoint()), [str(task / "sums.yaml")])


def test_without_the_package_a_clear_error(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    answer = cli("evaluate", "demo", "--data", write_text(tmp_path / "text.jsonl"), "--lm-eval", "arc_easy")
    assert answer.code == 2 and "pip install 'moezip[lm-eval]'" in answer.err
    assert "evaluate model" not in answer.err  # nothing was measured for nothing
