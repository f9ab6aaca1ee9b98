"""The experts implementation of calibration: outputs and what is recorded of them, in one go.

Running the experts once for the output and once for the statistics would halve the speed, and hooks cannot see
single experts inside a fused module. transformers calls this function in place of its own (``eager`` and
``grouped_mm`` are the twins that the tests compare it with).

On the CPU experts are shared out over threads that compute alone, one expert at a time. Splitting every single
operation over the cores was tried first: the operations are short, every one ends in a barrier, and on a machine that
does anything else besides, the barriers took most of the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

from moezip.calibrate.trace import Trace, traced_forward

if TYPE_CHECKING:
    import torch

IMPLEMENTATION = "moezip"
# Tokens whose weighted outputs are gathered at a time.
CHUNK = 512
# The CPU's matrix library compiles a kernel for every number of rows that it meets: about 0.4 ms and 0.7 MB each
# (measured, bf16), and every expert has a number of tokens of its own. So rows are filled up, with rows that are
# computed and thrown away, to one of few numbers: multiples of an eighth of the power of two below, at least 16.
MIN_ROWS = 16
ROWS_PER_OCTAVE = 8


class Routed(threading.local):
    """What one call of an experts module leaves behind for the recorder; filled only if hung on the module.

    ``valid`` [T] bool goes in (False on padding, None without any), the rest comes out. Every thread sees its own,
    because micro-batches run side by side.
    """

    def __init__(self, valid: torch.Tensor | None = None):
        self.valid = valid

    ids: Any = None
    gates: Any = None
    norms: Any = None
    peaks: Any = None
    output: Any = None


class Taken(threading.local):
    """Hung on an experts module as ``_moezip_taken``: its input is kept, and zeros stand for its output.

    For whoever runs the experts himself, one at a time. Every thread sees its own micro-batch.

    Attributes:
        hidden: [T, D]. ids, gates: [T, k], as the router gave them.
    """

    hidden: Any = None
    ids: Any = None
    gates: Any = None


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Sum over the chosen experts of gate weight x expert output.

    Args:
        self: a transformers experts module (fused weights, and the flags that say how they lie), or a module that
            brings the method ``expert_linear(name, expert, value)`` (``moezip.arch.ragged``).
        hidden_states: [T, D]. top_k_index, top_k_weights: [T, k], from the model's own router.

    Returns:
        [T, D] in the dtype of ``hidden_states``; products and sums over the k experts are rounded as ``grouped_mm``
        rounds them. If ``self`` carries a ``Routed`` as ``_moezip_routed``, the norms and peaks of the unweighted
        outputs are left there; if it carries a ``Trace`` as ``_moezip_trace``, the pass is one with gradients.
    """
    import torch

    taken: Taken | None = getattr(self, "_moezip_taken", None)
    if taken is not None:
        taken.hidden, taken.ids, taken.gates = hidden_states, top_k_index, top_k_weights
        return torch.zeros_like(hidden_states)
    trace: Trace | None = getattr(self, "_moezip_trace", None)
    if trace is not None:
        return traced_forward(self, trace, _linear, padded_rows, hidden_states, top_k_index, top_k_weights)
    tokens, top_k = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()[: self.num_experts]
    routed: Routed | None = getattr(self, "_moezip_routed", None)
    valid = None if routed is None else routed.valid
    rows = order // top_k
    outputs = hidden_states.new_zeros(tokens * top_k, hidden_states.shape[1])
    sorted_norms = torch.zeros(tokens * top_k, dtype=torch.float32, device=flat.device)
    peaks = torch.zeros(self.num_experts, dtype=torch.float32, device=flat.device)

    def run(part: tuple[int, int, int]) -> None:
        expert, start, stop = part
        # the filling rows are the next expert's; there are fewer at the very end
        given = hidden_states[rows[start : start + padded_rows(stop - start)]]
        out = outputs[start:stop]
        out.copy_(expert_output(self, expert, given)[: stop - start])
        if routed is not None:
            seen = out.detach()
            torch.linalg.vector_norm(seen, dim=-1, dtype=torch.float32, out=sorted_norms[start:stop])
            real = seen if valid is None else seen[valid[rows[start:stop]]]
            if real.numel():
                low, high = torch.aminmax(real)
                peaks[expert] = torch.maximum(high, -low)

    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, start, start + count))
            start += count
    # the busiest experts first, so that no thread is left with one at the end
    _share_out(run, sorted(parts, key=lambda part: part[1] - part[2]), hidden_states)

    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    result = torch.empty_like(hidden_states)

    def gather(begin: int) -> None:
        end = min(begin + CHUNK, tokens)
        chosen = outputs[places[begin * top_k : end * top_k]].view(end - begin, top_k, -1)
        result[begin:end] = (chosen * top_k_weights[begin:end, :, None]).sum(dim=1)

    _share_out(gather, range(0, tokens, CHUNK), hidden_states)
    if routed is not None:
        routed.ids, routed.gates, routed.peaks, routed.output = top_k_index, top_k_weights, peaks, result
        routed.norms = sorted_norms[places].view(tokens, top_k)
    return result


def inner_activation(module: Any, expert: int, given: torch.Tensor) -> torch.Tensor:
    """The input of one expert's down projection, [n, F], for tokens [n, D]; the products are those of the forward."""
    count = given.shape[0]
    filled = given.new_zeros(padded_rows(max(count, 1)), given.shape[1])
    filled[:count] = given
    inner = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", expert, filled)
    result: torch.Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return result[:count]


def expert_output(module: Any, expert: int, given: torch.Tensor) -> torch.Tensor:
    """What one expert makes of ``given`` [n, D], before the gate weight: [n, D]."""
    inner = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", expert, given)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return _linear(module, "down_proj", expert, inner)


def padded_rows(count: int) -> int:
    """``count`` rounded up to one of few numbers, by an eighth at most beyond 128."""
    step = max((1 << (count.bit_length() - 1)) // ROWS_PER_OCTAVE, MIN_ROWS)
    return -(-count // step) * step


def _linear(module: Any, name: str, expert: int, value: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as F

    own = getattr(module, "expert_linear", None)
    if own is not None:
        result: torch.Tensor = own(name, expert, value)
        return result
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(value, weight.T if module.is_transposed else weight, bias)


def _share_out(work: Callable[[Any], None], items: Iterable[Any], like: torch.Tensor) -> None:
    """Runs ``work`` on every item: over threads on the CPU, in turn where gradients are wanted or on a device.

    Items write to places of their own, so the result does not depend on who does what.
    """
    import torch

    threads = torch.get_num_threads()
    if like.device.type != "cpu" or threads == 1 or torch.is_grad_enabled():
        for item in items:
            work(item)
        return
    queue, lock, inference = iter(items), threading.Lock(), torch.is_inference_mode_enabled()

    def drain() -> None:
        # grad modes are per thread, so every worker enters its own
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with lock:
                    item = next(queue, None)
                if item is None:
                    return
                work(item)

    for future in [_workers(threads).submit(drain) for _ in range(threads)]:
        future.result()


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Threads whose operations stay on one core each."""
    import torch

    return ThreadPoolExecutor(count, "moezip-expert", initializer=torch.set_num_threads, initargs=(1,))


def register() -> str:
    """Makes the implementation known to transformers; its name."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, experts_forward)
    return IMPLEMENTATION
