"""``--for``: who is to read the output, and what a plan becomes for that reader."""

from __future__ import annotations

from moezip.arch.decoded import decoded
from moezip.arch.families import identify
from moezip.checkpoint.source import Source
from moezip.errors import PlanError, UsageError
from moezip.export.mone import Substituted
from moezip.formats.fp8_block import block_size
from moezip.plan.apply import Applied
from moezip.plan.factored import Factored
from moezip.plan.merged import Merged
from moezip.plan.packed import Values
from moezip.plan.plan import Plan
from moezip.plan.recoded import Recoded, in_fp8_blocks
from moezip.registry import lookup

# The readers' names as users type them, and as they are called.
READERS = {
    "transformers": "transformers without moezip", "vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp",
    "moezip": "moezip",
}  # fmt: skip
VLLM_NOTE = (
    "for vLLM 0.33 or later, unquantized and without expert parallelism (0.32 loads it and ignores what was dropped): "
    "written after its source code, not run in it. Routers still choose among all experts and a dropped one adds "
    "nothing, so the loss is not that of the same plan without --for; `moezip evaluate` measures it as vLLM runs it"
)
Planned = Applied | Substituted | Merged | Factored | Recoded


def check_reader(
    reader: str | None,
    *,
    counts_differ: bool = False,
    widths_differ: bool = False,
    remapped: bool = False,
    factored: bool = False,
) -> None:
    """What can be told of a reader before there is a plan.

    Args:
        reader: the word after ``--for``; None for any.
        counts_differ: layers may come to keep different numbers of experts.
        widths_differ: experts may come to keep different numbers of neurons.
        remapped: routers will have more rows than there are experts.
        factored: matrices will be stored as factors.

    Raises:
        UsageError: no such reader, or one that does not read such checkpoints.
    """
    if reader is None:
        return
    name = lookup(reader, READERS, "reader")
    if reader != "moezip" and widths_differ:
        raise UsageError(_refusal(name, "experts of different widths"), where=f"--for {reader}", next=_NEURONS)
    if reader != "moezip" and factored:
        raise UsageError(_refusal(name, "experts that are stored as factors"), where=f"--for {reader}", next=_FACTORS)
    if reader != "moezip" and remapped:
        raise UsageError(_refusal(name, _ROWS), where=f"--for {reader}", next=_ROUTERS)
    if reader not in ("moezip", "vllm") and counts_differ:
        raise UsageError(_refusal(name, _COUNTS), where=f"--for {reader}", next=_EXPERTS)


def planned(source: Source, plan: Plan, reader: str | None = None, values: Values | None = None) -> Planned:
    """``source`` through ``plan``, in the form that ``reader`` reads: a stock one wherever that can be.

    A plan that merges makes plain numbers of any stored codes but fp8 blocks, to which an average can be rounded.

    Args:
        values: the plan's solved values, if it has any.

    Raises:
        UsageError: no such reader.
        PlanError: a plan that does not fit the checkpoint, or a form that the reader does not know.
    """
    check_reader(reader)
    width = identify(source.config, source.folder).layer_facts(source.config)[0].width
    if plan.merges:
        differ = len({len(layer.picks) for layer in plan.layers}) > 1
        remapped = any(layer.router == "remap" for layer in plan.layers)
        if differ and reader == "vllm":
            raise PlanError(_refusal(READERS[reader], _COUNTS), where=f"--for {reader}", next=_EXPERTS)
        check_reader(reader, counts_differ=differ, remapped=remapped, factored=bool(plan.factors))
        if plan.factors:
            return Factored(Merged(decoded(source), plan, values, split=True), values)
        if in_fp8_blocks(source):
            kept = Applied(source, plan)
            return Recoded(kept, Merged(decoded(source), plan, values, block=block_size(source.config)))
        return Merged(decoded(source), plan, values)
    if reader is None or reader == "moezip" or not plan.ragged(width):
        return Applied(source, plan)
    if reader == "vllm":
        return Substituted(source, plan)
    name = READERS[reader]
    if len({len(layer.picks) for layer in plan.layers}) > 1:
        raise PlanError(_refusal(name, _COUNTS), where=f"--for {reader}", next=_EXPERTS)
    raise PlanError(_refusal(name, "experts of different widths"), where=f"--for {reader}", next=_NEURONS)


_COUNTS = "different numbers of experts in different layers"
_ROWS = "routers that have more rows than there are experts"
_ROUTERS = "give each merged expert one row (--set router=dominant or sum), or write it for moezip"
_FACTORS = "merge without the compression stage (--method m-smoe), or write it for moezip"
_EXPERTS = "keep the same number in every layer (--scope layer), or write it for vllm or moezip"
_NEURONS = "keep as many neurons of every expert (--set uniform=true), or write it for moezip"


def _refusal(reader: str, what: str) -> str:
    return f"{reader} does not read {what}"
