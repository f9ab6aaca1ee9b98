"""A checkpoint with a rule for run-time skipping in its config, and every tensor as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.checkpoint.source import Source, TensorSpec
from moezip.runtime.skipping import KEY, Skipping

if TYPE_CHECKING:
    import torch


class WithSkipping:
    """``source`` with ``skipping`` in its config: a Source like any other. A rule that it had is replaced."""

    def __init__(self, source: Source, skipping: Skipping):
        self._source, self.skipping = source, skipping

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def config(self) -> dict[str, Any]:
        return {**self._source.config, KEY: self.skipping.to_config()}

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def names(self) -> list[str]:
        return self._source.names()

    def metadata(self, file: str) -> dict[str, str]:
        return self._source.metadata(file)

    def raw_header(self, file: str) -> bytes | None:
        return self._source.raw_header(file)

    def spec(self, name: str) -> TensorSpec:
        return self._source.spec(name)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        return self._source.read(name, rows)

    def chunks(self, name: str, rows: range | None = None) -> Iterator[memoryview]:
        yield from self._source.chunks(name, rows)


def explained(skipping: Skipping) -> list[str]:
    """Lines of the model card: what the rule is, and how to see what it saves."""
    layers = len(skipping.thresholds) or len(skipping.layers)
    rule = {
        "naee": "an expert is dropped where its gate is small beside the token's best",
        "odp": "an expert is dropped where its gate is small beside the token's best; the tokens that matter most keep "
        "all of theirs",
        "otp": "a small network per layer says for each token how many of its experts run",
    }[skipping.rule]
    return [
        f"It skips calls of experts as it runs, in {layers} layers ({skipping.rule}): {rule}. The weights are those of "
        f"the source; the rule is `{KEY}` in `config.json`. A model that `moezip.load` gave counts the calls that it "
        "saves in `model.moezip_skipping`.",
    ]
