"""A streamed model as lm-eval sees it: all requests of a kind come together, and each layer is read once for them.

Imported only where lm-eval is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moezip.calibrate.data import default_seq_len
from moezip.calibrate.stream import Stream
from moezip.errors import DataError, MoezipError
from moezip.evaluate.forward import Item, Progress, close, forward, group
from moezip.evaluate.spill import inside, spill
from moezip.evaluate.tasks import outcomes

# Context and continuation as tokens; what stands before them is lm-eval's own key.
Request = tuple[Any, list[int], list[int]]


class Streamed(TemplateLM):  # type: ignore[misc]
    """Answers log-likelihood requests with one layer in memory at a time.

    Args:
        workdir: for hidden states that do not fit.
        progress: called with (``"lm-eval"``, layers done, layers in all).
    """

    def __init__(self, stream: Stream, tokenizer: Any, workdir: Path | None, progress: Progress | None):
        super().__init__()
        self.stream, self.tokenizer, self.workdir, self.progress = stream, tokenizer, workdir, progress
        self.max_length = int(stream.source.config.get("max_position_embeddings") or default_seq_len({}))
        bos = tokenizer.bos_token_id
        self._starts = bos is not None and tokenizer("a").input_ids[:1] == [bos]

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.stream.source.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = self._starts if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special, verbose=False).input_ids)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Per request the log-probability of the continuation, and whether greedy decoding would write it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Per request the log-probability of a whole text, in windows that do not overlap."""
        owners: list[int] = []
        windows: list[Request] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        raise MoezipError(
            "the task has the model generate text, and this model has to be streamed, which answers log-likelihood "
            "requests alone", where="--lm-eval",
            next="allow more --max-memory, or choose tasks of multiple choice",
        )  # fmt: skip

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        items = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"a continuation has {len(continuation)} tokens; it must have 1 to {self.max_length}, the model's "
                    "maximum", where="--lm-eval", next="shorten the task's choices or texts",
                )  # fmt: skip
            # too long a context loses its beginning, as it does everywhere in lm-eval; the last token is not read
            *ids, last = [*context, *continuation][-(self.max_length + 1) :]
            items.append(Item(ids, len(ids) + 1 - len(continuation), beyond=1, last=last))
        stream, groups = self.stream, group(items)
        need = sum(stream.hidden_bytes(each.rows) for each in groups)
        heads = stream.skeleton.bytes(stream.skeleton.head_targets())
        with spill([stream], need, heads, self.workdir) as folder:
            states = forward(
                stream, groups, folder=inside(folder, "lm-eval"), progress=self.progress, stage="lm-eval"
            )  # fmt: skip
            stream.load_head()
            found = outcomes(stream, items, groups, states)
            close(states)
            stream.free_head()
        pairs = zip(items, found, strict=True)
        return [(sum(each.logprobs), list(each.likeliest) == item.targets()) for item, each in pairs]
