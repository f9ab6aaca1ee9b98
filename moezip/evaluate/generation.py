"""What a model writes: whether it repeats itself, and whether it ends in a loop.

The loss does not tell: a model may predict the next token well and yet, on its own text, fall into a loop. Prompts are
the first tokens of documents; each is continued once greedily and once by sampling. Of the continuations' tokens:

- ``repetition``: 1 - (distinct 4-grams) / (all 4-grams) (seq-rep-4 of Welleck et al., arXiv 1908.04319), the mean over
  continuations that have a 4-gram.
- ``distinct_n``: distinct n-grams / all n-grams, n = 1, 2, 3, over all continuations together (Li et al., arXiv
  1510.03055). It falls as there is more text, so compare like with like.
- ``length``: mean number of new tokens, the end-of-text token not counted; ``ended``: share that came to that token.
- ``loops``: share that loops: see ``period``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezip.calibrate.data import documents, text_files
from moezip.errors import DataError

PROMPT_TOKENS = 32
NEW_TOKENS = 128
BATCH = 8
REPEATED = 4
# A loop: the same tokens at least three times in a row, and over at least so many tokens, up to the end.
TIMES, LOOP_TOKENS = 3, 24
# Shares of looping continuations from which on the model is said to loop.
LOOPS_OFTEN = 0.25


@dataclass(frozen=True, slots=True)
class Written:
    """Figures of some continuations; see the module."""

    repetition: float
    distinct: tuple[float, float, float]
    length: float
    ended: float
    loops: float

    def to_json(self) -> dict[str, float]:
        """``repetition``, ``distinct_1`` to ``distinct_3``, ``length``, ``ended``, ``loops``."""
        one, two, three = self.distinct
        return {
            "repetition": self.repetition,
            "distinct_1": one,
            "distinct_2": two,
            "distinct_3": three,
            "length": self.length,
            "ended": self.ended,
            "loops": self.loops,
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """What one model wrote.

    Attributes:
        prompts: how many. prompt_tokens, new_tokens: tokens of each prompt, and at most of each continuation.
        seed: of the sampling.
        against: what the reference wrote for the same prompts; None without one.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    greedy: Written
    sampled: Written
    against: Generation | None = None

    @property
    def loops(self) -> bool:
        """Whether the model is to be said to loop: it often does, and more often than its reference."""
        least = 0.0 if self.against is None else self.against.greedy.loops
        return self.greedy.loops >= LOOPS_OFTEN and self.greedy.loops > least

    def to_json(self) -> dict[str, Any]:
        """``prompts``, ``prompt_tokens``, ``new_tokens``, ``seed``, ``greedy``, ``sampled``, ``loops``, ``against``."""
        against = None
        if self.against is not None:
            against = {"greedy": self.against.greedy.to_json(), "sampled": self.against.sampled.to_json()}
        return {
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seed": self.seed,
            "greedy": self.greedy.to_json(),
            "sampled": self.sampled.to_json(),
            "loops": self.loops,
            "against": against,
        }


def prompts(data: Sequence[Path], tokenizer: Any, count: int) -> list[list[int]]:
    """The first ``PROMPT_TOKENS`` tokens of ``count`` documents, taken from the files in turn; fewer where there are
    fewer documents that are long enough.

    Raises:
        DataError: no document is.
    """
    files = [file for path in data for file in text_files(path)]
    by_file: list[list[list[int]]] = []
    for file in files:
        found: list[list[int]] = []
        for text in documents(file, tokenizer):
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:PROMPT_TOKENS]
            if len(ids) == PROMPT_TOKENS:
                found.append(list(ids))
            if len(found) == count:
                break
        by_file.append(found)
    turns = [found[turn] for turn in range(count) for found in by_file if turn < len(found)]
    if not turns:
        raise DataError(
            f"no document has {PROMPT_TOKENS} tokens, which is what a prompt takes", where=", ".join(map(str, data)),
            next="name text with longer documents",
        )  # fmt: skip
    return turns[:count]


def generate(
    model: Any,
    given: Sequence[Sequence[int]],
    *,
    ends: set[int],
    seed: int,
    longest: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Generation:
    """Continues every prompt greedily and by sampling at temperature 1, in batches (all prompts are of one length).

    Args:
        model: a transformers model.
        ends: end-of-text tokens.
        longest: the model's maximum in tokens, None if it has none.
        progress: called with (continuations done, in all).
    """
    import torch

    width = len(given[0])
    new = NEW_TOKENS if longest is None else min(NEW_TOKENS, longest - width)
    found: dict[bool, list[list[int]]] = {False: [], True: []}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for sample in (False, True):
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
            for start in range(0, len(given), BATCH):
                ids = torch.tensor([list(row) for row in given[start : start + BATCH]], device=model.device)
                with torch.inference_mode():
                    rows = model.generate(
                        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, eos_token_id=sorted(ends) or None,
                        pad_token_id=min(ends, default=0), **how,
                    )  # fmt: skip
                found[sample] += [row[width:].tolist() for row in rows]
                progress(len(found[False]) + len(found[True]), 2 * len(given))
    return Generation(len(given), width, new, seed, figures(found[False], ends), figures(found[True], ends))


def figures(continuations: Sequence[Sequence[int]], ends: set[int]) -> Written:
    """Figures of continuations, each cut at its first end-of-text token; what comes after is padding."""
    cut, ended = [], 0
    for tokens in continuations:
        stop = next((place for place, token in enumerate(tokens) if token in ends), None)
        ended += stop is not None
        cut.append((list(tokens[:stop]), stop is not None))
    rates = [1 - len(set(grams)) / len(grams) for tokens, _ in cut if (grams := ngrams(tokens, REPEATED))]
    distinct = []
    for n in (1, 2, 3):
        grams = [gram for tokens, _ in cut for gram in ngrams(tokens, n)]
        distinct.append(len(set(grams)) / len(grams) if grams else 0.0)
    # one that comes to its end is in no loop, however it repeated itself before
    looping = sum(period(tokens) is not None for tokens, stopped in cut if not stopped)
    one, two, three = distinct
    count = len(cut)
    return Written(
        sum(rates) / len(rates) if rates else 0.0,
        (one, two, three),
        sum(len(tokens) for tokens, _ in cut) / count,
        ended / count,
        looping / count,
    )


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of ``n`` neighbours."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def period(tokens: Sequence[int]) -> int | None:
    """The length of the loop that these tokens end in, None where they end in none.

    It is the smallest p for which the last ``max(TIMES * p, LOOP_TOKENS)`` tokens have period p (each is what stands p
    places before it): a piece of p tokens, at least three times in a row and over at least 24 tokens.
    """
    for p in range(1, len(tokens) // TIMES + 1):
        span = max(TIMES * p, LOOP_TOKENS)
        if span > len(tokens):  # as it is for all larger p
            return None
        tail = tokens[len(tokens) - span :]
        if all(tail[place] == tail[place - p] for place in range(p, span)):
            return p
    return None
