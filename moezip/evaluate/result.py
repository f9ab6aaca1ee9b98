"""What an evaluation found, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moezip.evaluate.confidence import Interval, Paired, Rise, share_interval

if TYPE_CHECKING:
    from moezip.evaluate.generation import Generation
    from moezip.evaluate.harness import Harness
    from moezip.evaluate.routing import Routing
    from moezip.evaluate.speed import Speed


@dataclass(frozen=True, slots=True)
class Loss:
    """Negative log-likelihood of a text.

    Attributes:
        nll: mean over the scored tokens, nats per token.
        tokens: how many tokens were scored (the first of each window is not).
        interval: of ``nll``, by the bootstrap over windows; None where there are too few.
    """

    nll: float
    tokens: int
    interval: Interval | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that is beyond a float."""
        return math.exp(self.nll) if self.nll < 709 else math.inf

    def to_json(self) -> dict[str, Any]:
        """``nll``, ``perplexity`` (null where infinite), ``tokens``; ``nll_low``, ``nll_high`` (null without)."""
        perplexity, interval = self.perplexity, self.interval
        return {
            "nll": self.nll,
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "tokens": self.tokens,
            "nll_low": None if interval is None else interval.low,
            "nll_high": None if interval is None else interval.high,
        }


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model is from a reference on the same tokens.

    Attributes:
        kl: mean KL(reference || model), nats per token.
        top1_agreement: share of tokens for which both find the same token likeliest.
        nll: the reference's own loss, nats per token.
        rise: how much larger the model's is.
    """

    kl: float
    top1_agreement: float
    nll: float
    rise: Rise

    def to_json(self) -> dict[str, Any]:
        """``kl``, ``top1_agreement``, ``nll``; ``rise``, ``rise_low``, ``rise_high``, ``significant``."""
        return {"kl": self.kl, "top1_agreement": self.top1_agreement, "nll": self.nll, **self.rise.to_json()}


@dataclass(frozen=True, slots=True)
class Score:
    """Questions of one file.

    Attributes:
        right: whether each was answered rightly, in the file's order.
        against: how the reference answered them; None without one.
    """

    right: tuple[bool, ...]
    against: Paired | None = None

    @property
    def n(self) -> int:
        """How many questions there are."""
        return len(self.right)

    @property
    def accuracy(self) -> float:
        """The share answered rightly."""
        return sum(self.right) / self.n

    @property
    def interval(self) -> Interval:
        """Of the accuracy, by Wilson's formula."""
        return share_interval(sum(self.right), self.n)

    def to_json(self) -> dict[str, Any]:
        """``accuracy``, ``n``, ``low`` and ``high`` (95 %), ``against`` (``Paired.to_json``, null without)."""
        interval, against = self.interval, None if self.against is None else self.against.to_json()
        return {
            "accuracy": self.accuracy,
            "n": self.n,
            "low": interval.low,
            "high": interval.high,
            "against": against,
        }


@dataclass(frozen=True, slots=True)
class Skipped:
    """What a rule for run-time skipping saved while the model was measured.

    Attributes:
        rule: its name.
        calls: per MoE layer, expert calls that the router asked for.
        dropped: of these, those that were not made.
    """

    rule: str
    calls: Mapping[int, int]
    dropped: Mapping[int, int]

    @property
    def share(self) -> float:
        """Of all calls, those that were not made."""
        return sum(self.dropped.values()) / max(sum(self.calls.values()), 1)

    def to_json(self) -> dict[str, Any]:
        """``rule``, ``share``, ``calls``, ``by_layer`` {layer: share}."""
        by_layer = {str(layer): self.dropped[layer] / max(calls, 1) for layer, calls in sorted(self.calls.items())}
        return {"rule": self.rule, "share": self.share, "calls": sum(self.calls.values()), "by_layer": by_layer}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a printed table: a file, or all of them. What was not measured is None."""

    name: str
    loss: Loss
    divergence: Divergence | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Losses, divergences and scores of one model.

    Attributes:
        loss: over all files, each token counting once; None if no text was given.
        by_file: per file, under its stem.
        against: over all files; None without a reference.
        against_by_file: per file; empty without a reference.
        tasks: per task file, under its stem.
        seq_len: tokens per window.
        skipped: what a rule of the checkpoint's config skipped; None where it has none.
        routing: how far it chooses the experts that the reference chose; None without a reference or without text.
        generation, lm_eval, speed: what it writes, what lm-eval finds, how fast it is; None where not asked for.
    """

    loss: Loss | None
    seq_len: int
    by_file: Mapping[str, Loss] = field(default_factory=dict)
    against: Divergence | None = None
    against_by_file: Mapping[str, Divergence] = field(default_factory=dict)
    tasks: Mapping[str, Score] = field(default_factory=dict)
    skipped: Skipped | None = None
    routing: Routing | None = None
    generation: Generation | None = None
    lm_eval: Harness | None = None
    speed: Speed | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON of ``moezip evaluate --json``; ``against`` and the loss are null where not measured."""
        loss = {"nll": None, "perplexity": None, "tokens": 0} if self.loss is None else self.loss.to_json()
        against = None
        if self.against is not None:
            by_file = {name: found.to_json() for name, found in self.against_by_file.items()}
            routing = None if self.routing is None else self.routing.to_json()
            against = {**self.against.to_json(), "by_file": by_file, "routing": routing}
        return {
            **loss,
            "seq_len": self.seq_len,
            "by_file": {name: found.to_json() for name, found in self.by_file.items()},
            "against": against,
            "tasks": {name: found.to_json() for name, found in self.tasks.items()},
            "skipped": None if self.skipped is None else self.skipped.to_json(),
            "generation": None if self.generation is None else self.generation.to_json(),
            "lm_eval": None if self.lm_eval is None else self.lm_eval.to_json(),
            "speed": None if self.speed is None else self.speed.to_json(),
        }

    def rows(self) -> list[Row]:
        """For a table: one line per file and, where there are several, one named ``all``."""
        found = [Row(name, loss, self.against_by_file.get(name)) for name, loss in self.by_file.items()]
        if len(found) > 1 and self.loss is not None:
            found.append(Row("all", self.loss, self.against))
        return found
