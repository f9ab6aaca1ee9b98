"""How much each token is attended to: what ODP (arXiv 2410.06270) protects tokens by.

The importance of token j is the L1 norm of what its experts are given, times the attention that it receives, mean over
the heads and over the tokens that may look at it. (The authors' code sums attention over the axis along which it adds
up to 1, so that nothing of it is left but 1 / (L - j); this is the paper's formula.)

Attention is computed as ever; the sums are computed beside it, a chunk of queries at a time. This module imports torch,
so it is imported where a model is built and nowhere else.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moezip.errors import ArchitectureError
from moezip.runtime import one_query

# By the name of an attention implementation: that of its twin which leaves the sums behind.
TWINS = {"sdpa": "moezip_sdpa", "eager": "moezip_eager"}
_LEAVES_HERE = "_moezip_attended"
# Bytes of attention weights, float32, that exist at a time.
CHUNK = 64 * 2**20


class Attended(threading.local):
    """Hung on a decoder layer's modules; every thread sees its own micro-batch.

    Attributes:
        received: [n, S], the mean attention that each token of each window receives; None while single tokens follow
            others that are in a cache, and where a layer has no attention.
    """

    received: torch.Tensor | None = None


def watch(layer: Any, block: Any) -> Attended:
    """Has the attention of a decoder layer leave its sums in what is returned; ``block`` is its MoE block."""
    attended, inside = Attended(), set(map(id, block.modules()))
    for module in layer.modules():
        if id(module) not in inside:
            setattr(module, _LEAVES_HERE, attended)
    return attended


def use_twins(model: Any) -> None:
    """Sets the model's attention to the twin of what it is.

    Raises:
        ArchitectureError: an implementation without one.
    """
    now = model.config._attn_implementation
    now = "sdpa" if now == one_query.NAME else now
    if now in TWINS.values():
        return
    if now not in TWINS:
        raise ArchitectureError(
            f"tokens are protected by the attention that they receive, which {now!r} does not tell",
            where="attn_implementation",
            next='load the model with attn_implementation="sdpa" or "eager"',
        )
    ALL_ATTENTION_FUNCTIONS.register(TWINS["sdpa"], _sdpa)
    ALL_ATTENTION_FUNCTIONS.register(TWINS["eager"], _eager)
    ALL_MASK_ATTENTION_FUNCTIONS.register(TWINS["sdpa"], sdpa_mask)
    ALL_MASK_ATTENTION_FUNCTIONS.register(TWINS["eager"], eager_mask)
    model.set_attn_implementation(TWINS[now])


def _sdpa(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **more: Any) -> Any:
    attended: Attended | None = getattr(module, _LEAVES_HERE, None)
    if attended is not None:
        whole = 1 < query.shape[2] == key.shape[2]
        attended.received = received(query, key, attention_mask, more.get("scaling")) if whole else None
    return one_query.attention(module, query, key, value, attention_mask, **more)


def _eager(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **more: Any) -> Any:
    output, weights = sys.modules[type(module).__module__].eager_attention_forward(
        module, query, key, value, attention_mask, **more
    )
    attended: Attended | None = getattr(module, _LEAVES_HERE, None)
    if attended is not None:
        attended.received = None
        if 1 < query.shape[2] == key.shape[2]:
            looks = _lookers(attention_mask, 0, query.shape[2], query.shape[2], query.device)
            attended.received = weights.detach().float().mean(1).sum(1) / looks.sum(1).clamp_min(1)
    return output, weights


def received(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
    """Mean attention that each of S tokens receives from those that may look at it, itself among them: [n, S] float32.

    Args:
        query: [n, H, S, d]. key: [n, H', S, d], H' a divisor of H.
        mask: [n or 1, 1, S, S], False or very negative where a row's token may not look; None where all look back.
        scaling: of the products; None for 1 / sqrt(d).
    """
    batch, heads, length, width = query.shape
    query, key = query.detach(), key.detach()
    scaling = width**-0.5 if scaling is None else scaling
    sums = torch.zeros(batch, length, dtype=torch.float32, device=query.device)
    lookers = torch.zeros_like(sums)
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], length, width)
    step = max(CHUNK // (4 * batch * heads * length), 1)
    for start in range(0, length, step):
        stop = min(start + step, length)
        looks = _lookers(mask, start, stop, length, query.device)  # [n or 1, rows, S]
        products = torch.einsum("nghsd,ngtd->nghst", grouped[..., start:stop, :], key).float() * scaling
        weights = products.masked_fill_(~looks[:, None, None], -torch.inf).softmax(-1)
        # padding that may look at nothing has no weights
        sums += weights.nan_to_num_(0.0).mean((1, 2)).sum(1)
        lookers += looks.sum(1)
    return sums / lookers.clamp_min(1)


def _lookers(mask: torch.Tensor | None, start: int, stop: int, length: int, device: torch.device) -> torch.Tensor:
    """Whether the tokens ``start`` to ``stop`` may look at each token: [n or 1, rows, S]."""
    if mask is None:
        places = torch.arange(length, device=device)
        return (places <= places[start:stop, None])[None]
    part = mask[:, 0, start:stop, :length]
    return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2


def important(received: torch.Tensor, hidden: torch.Tensor, share: float) -> torch.Tensor:
    """The ``share`` of each window's tokens, rounded up, that matter most: [n * S] bool.

    Args:
        received: [n, S]. hidden: [n * S, D], what the experts are given.
    """
    import math

    windows, length = received.shape
    value = received * hidden.detach().float().abs().sum(-1).view(windows, length)
    found = torch.zeros(windows, length, dtype=torch.bool, device=value.device)
    found.scatter_(1, value.topk(min(math.ceil(share * length), length), dim=1).indices, True)
    return found.reshape(-1)
