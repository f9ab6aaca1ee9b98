"""Questions with one right answer: multiple choice by log-likelihood, exact match by greedy decoding."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezip.calibrate.data import domain_names
from moezip.calibrate.hidden import HiddenStates
from moezip.calibrate.stream import Stream
from moezip.errors import DataError
from moezip.evaluate.forward import Group, Item, batches, logits, targets
from moezip.evaluate.result import Score

# New tokens beyond those of the right answer: a leading space or another way to cut the same text into tokens.
MARGIN = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """Multiple choice: the context, the texts that may follow it, and which one does."""

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str


@dataclass(frozen=True, slots=True)
class Match:
    """Exact match: the prompt, and the line that must follow it."""

    prompt: str
    answer: str
    where: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model predicts for one item: per position the log-probability of the token that stands there
    (nats; meaningless where none does) and the likeliest token."""

    logprobs: tuple[float, ...]
    likeliest: tuple[int, ...]


def load(paths: Sequence[Path]) -> dict[str, list[Choice | Match]]:
    """The questions of each ``--tasks`` file, under its stem; a folder stands for its ``.jsonl`` files.

    Raises:
        DataError: no such file, no question in it, or a row that is not a question (named by file and line).
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file() or found[0].suffix != ".jsonl":
            raise DataError("there is no .jsonl task file", where=path, next="check the --tasks path")
        files += found
    return {name: _read(file) for file, name in zip(files, domain_names(files), strict=True)}


def _read(file: Path) -> list[Choice | Match]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as fault:
        raise DataError("the file is not UTF-8 text", where=file, next="convert it to UTF-8") from fault
    found = [_question(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError("the task file holds no question", where=file, next=_SHAPES)
    return found


_SHAPES = 'write {"context", "choices", "answer": index} or {"prompt", "answer": text} rows'


def _question(line: str, where: str) -> Choice | Match:
    def refuse(what: str) -> DataError:
        return DataError(what, where=where, next=_SHAPES)

    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise refuse(f"not JSON: {fault}") from fault
    if not isinstance(row, dict) or ("choices" in row) == ("prompt" in row):
        raise refuse('the row has neither "choices" nor "prompt", or both')
    answer = row.get("answer")
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not isinstance(answer, str) or not answer.strip():
            raise refuse('"prompt" and "answer" must be texts, the answer not blank')
        if "\n" in answer.strip():
            raise refuse("the answer has several lines, but decoding stops at the end of a line")
        return Match(row["prompt"], answer.strip(), where)
    context, choices = row.get("context"), row["choices"]
    if not isinstance(context, str):
        raise refuse('"context" must be a text')
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise refuse('"choices" must be two or more texts, none of them empty')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise refuse(f'"answer" must be the index of a choice, 0 to {len(choices) - 1}, not {answer!r}')
    return Choice(context, tuple(choices), answer, where)


class Encoder:
    """Contexts and continuations as tokens.

    Args:
        longest: the model's maximum, in tokens; None if it has none.
    """

    def __init__(self, tokenizer: Any, longest: int | None):
        self.tokenizer, self.longest = tokenizer, longest
        bos = tokenizer.bos_token_id
        self.start = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def pair(self, context: str, continuation: str, where: str) -> tuple[list[int], list[int]]:
        """Tokens of the context and of what follows it.

        The boundary is that of the context alone. Where the tokens of the joined text do not begin with the
        context's (a merge across the boundary), the continuation is tokenised by itself. An empty context is the
        end-of-text token, as before a document of a window.

        Raises:
            DataError: a continuation of no tokens, nothing to stand for an empty context, or more tokens than the
                model's maximum.
        """
        before, whole = self._ids(context), self._ids(context + continuation)
        after = whole[len(before) :] if whole[: len(before)] == before else self._ids(continuation)
        before = self.start + before
        if not before and self.tokenizer.eos_token_id is not None:
            before = [self.tokenizer.eos_token_id]
        if not before or not after:
            raise DataError("context or answer gives no tokens", where=where, next="remove or complete the row")
        if self.longest is not None and len(before) + len(after) > self.longest:
            raise DataError(
                f"the question takes {len(before) + len(after)} tokens, the model's maximum is {self.longest}",
                where=where, next="shorten its context",
            )  # fmt: skip
        return before, after


class Greedy:
    """Greedy decoding of many prompts together, one pass of the model per round.

    Each prompt's expected continuation rides along: as far as the model's own choices agree with it, one pass yields
    them all, and the choice at the first disagreement as well (speculative decoding with a given draft, arXiv
    2211.17192, for greedy choices). The tokens are those of decoding one by one.

    Args:
        prompts: tokens of each.
        drafts: the expected continuations; empty ones decode one token per round.
        done: (prompt's index, its new tokens so far) -> whether to stop there.
    """

    def __init__(
        self, prompts: Sequence[list[int]], drafts: Sequence[list[int]], done: Callable[[int, list[int]], bool]
    ):
        self.prompts, self.drafts, self.done = prompts, [list(draft) for draft in drafts], done
        self.new: list[list[int]] = [[] for _ in prompts]
        self.unfinished = list(range(len(prompts)))

    def items(self) -> list[Item]:
        """What the next pass has to run: one item per unfinished prompt, in that order."""
        return [
            Item([*self.prompts[i], *self.new[i], *self.drafts[i]], len(self.prompts[i]) + len(self.new[i]), beyond=1)
            for i in self.unfinished
        ]

    def take(self, outcomes: Sequence[Outcome]) -> None:
        """Adds what the pass predicted for those items."""
        rest = []
        for i, outcome in zip(self.unfinished, outcomes, strict=True):
            draft, self.drafts[i] = self.drafts[i], []
            for token, expected in zip(outcome.likeliest, [*draft, -1], strict=True):
                self.new[i].append(token)
                if self.done(i, self.new[i]):
                    break
                if token != expected:
                    rest.append(i)
                    break
        self.unfinished = rest


class Tasks:
    """All questions of all files as items for the model, and the scores that come of its predictions."""

    def __init__(self, questions: dict[str, list[Choice | Match]], tokenizer: Any, config: dict[str, Any]):
        maximum = config.get("max_position_embeddings")
        encoder = Encoder(tokenizer, None if maximum is None else int(maximum))
        self.tokenizer, self.names = tokenizer, list(questions)
        self.choices: list[tuple[str, Choice]] = []
        self.matches: list[tuple[str, Match]] = []
        self.fixed: list[Item] = []
        prompts, drafts = [], []
        for name, rows in questions.items():
            for row in rows:
                if isinstance(row, Choice):
                    self.choices.append((name, row))
                    for text in row.choices:
                        before, after = encoder.pair(row.context, text, row.where)
                        self.fixed.append(Item([*before, *after], len(before)))
                else:
                    self.matches.append((name, row))
                    before, after = encoder.pair(row.prompt, row.answer, row.where)
                    prompts.append(before)
                    drafts.append(after)
        self.limits = [len(draft) + MARGIN for draft in drafts]
        self.ends = ends_of(tokenizer, config)
        self.greedy = Greedy(prompts, drafts, self._done)
        self.fixed_outcomes: list[Outcome] = []

    def items(self) -> list[Item]:
        """What the first pass has to run."""
        return [*self.fixed, *self.greedy.items()]

    def take(self, outcomes: Sequence[Outcome]) -> None:
        """Adds the first pass's predictions; ``greedy`` may need more passes."""
        self.fixed_outcomes = list(outcomes[: len(self.fixed)])
        self.greedy.take(outcomes[len(self.fixed) :])

    def answer(self, match: int) -> str:
        """The decoded answer so far: up to end-of-text or the end of the line, without surrounding space."""
        tokens = [token for token in self.greedy.new[match] if token not in self.ends]
        text = str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        return text.split("\n")[0].strip()

    def _done(self, match: int, new: list[int]) -> bool:
        text = str(self.tokenizer.decode(new, clean_up_tokenization_spaces=False))
        if new[-1] in self.ends or "\n" in text or len(new) >= self.limits[match]:
            return True
        # More tokens only lengthen the text (an unfinished character at its end aside), so a text that the right
        # answer does not begin with can never become it.
        return not self.matches[match][1].answer.startswith(text.rstrip("\ufffd").strip())

    def scores(self) -> dict[str, Score]:
        """What was answered rightly per file, once nothing is unfinished."""
        right: dict[str, list[bool]] = {name: [] for name in self.names}
        position = 0
        for name, choice in self.choices:
            logprobs = [found.logprobs for found in self.fixed_outcomes[position : position + len(choice.choices)]]
            position += len(choice.choices)
            right[name].append(best_choice(logprobs) == choice.answer)
        for i, (name, match) in enumerate(self.matches):
            right[name].append(self.answer(i) == match.answer)
        return {name: Score(tuple(found)) for name, found in right.items()}


def best_choice(logprobs: Sequence[Sequence[float]]) -> int:
    """The choice with the largest mean log-probability per token; the first of equals."""
    means = [sum(found) / len(found) for found in logprobs]
    return means.index(max(means))


def ends_of(tokenizer: Any, config: dict[str, Any]) -> set[int]:
    """The tokens that end a text: the tokenizer's, and the config's one or several."""
    named = config.get("eos_token_id")
    return {
        int(token)
        for token in [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        if token is not None
    }


def outcomes(
    stream: Stream, items: Sequence[Item], groups: Sequence[Group], states: Sequence[HiddenStates]
) -> list[Outcome]:
    """The predictions of every item, a chunk of positions at a time. The head must be loaded."""
    logprobs: list[list[float]] = [[] for _ in items]
    likeliest: list[list[int]] = [[] for _ in items]
    for batch in batches(items, groups, max(stream.head_chunk() // 2, 1)):
        scores = logits(stream, items, states, batch)
        tokens = targets(items, batch, scores.device).clamp_min(0)[:, None]
        found = (scores.gather(1, tokens)[:, 0] - scores.logsumexp(-1)).tolist()
        best = scores.argmax(-1).tolist()
        at = 0
        for piece in batch:
            length = piece.stop - piece.start
            logprobs[piece.item] += found[at : at + length]
            likeliest[piece.item] += best[at : at + length]
            at += length
    return [Outcome(tuple(a), tuple(b)) for a, b in zip(logprobs, likeliest, strict=True)]
