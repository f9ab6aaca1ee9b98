"""What the compiler makes of the Triton kernels, without a GPU: `make gpu-check`, guarded by triton_static.json.

    python -m tests.triton_static            compares; ends with 1 where something got worse
    python -m tests.triton_static --write    writes the table anew

Nothing here is a time. Instructions per weight are those of the main loop (nvdisasm), for one thread: at decode an H100
reads 4-bit weights at full bandwidth if it spends at most 4.6 on each, 2-bit weights 2.4. Every kernel is compiled for
sm_80, sm_90 and sm_100; that it compiles is checked along the way.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
ARCHITECTURES = (80, 90, 100)

# How much worse a figure may be than in the table. The same compiler gives the same figures; these leave room for edits
# that do not matter. Spills (bytes of a thread's stack) and the kind of matrix instruction have none.
MORE_INSTRUCTIONS = 1.05
MORE_REGISTERS = 8
MORE_SHARED = 1024

_POINTERS = {
    "codes_ptr": "*i16", "scales_ptr": "*fp16", "zeros_ptr": "*u8", "rows_ptr": "*i32", "tiles_ptr": "*i32",
    "slots_ptr": "*i32", "codes_at_ptr": "*i64", "scales_at_ptr": "*i64", "sizes_ptr": "*i32",
    "experts_ptr": "*i64", "widths_ptr": "*i32", "weights_ptr": "*fp32",
}  # fmt: skip
_HALVES = ("x_ptr", "h_ptr", "out_ptr")  # in the dtype of the inputs; other pointers are fp32
_FLOATS = ("limit", "alpha")
_ODD = ("sums_stride", "choices", "experts", "N")  # numbers that need not be multiples of 16


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel as ``triton_experts`` launches it. ``bits`` 0: not a product. ``tile``: decode or prefill."""

    architecture: int
    kernel: str
    dtype: str = "bf16"
    bits: int = 0
    tile: str = "decode"
    group: int = 128
    fast: bool = True

    def __str__(self) -> str:
        what = f"{self.bits} bits g{self.group} {self.tile} " if self.bits else ""
        return f"sm_{self.architecture} {self.kernel} {what}{self.dtype}"


@dataclass(frozen=True, slots=True)
class Figures:
    """Registers and bytes of stack of a thread, bytes of shared memory of a program, the matrix instruction; and
    instructions per weight in the main loop, 0 where there are no weights."""

    registers: int
    spilled: int
    shared: int
    product: str
    instructions: float


def cases() -> Iterator[Case]:
    for architecture in ARCHITECTURES:
        for bits in range(1, 9):
            yield Case(architecture, "grouped", bits=bits)
        for bits in (2, 4, 7):
            yield Case(architecture, "grouped", bits=bits, tile="prefill")
        yield Case(architecture, "grouped", "fp16", bits=4)
        yield Case(architecture, "grouped", bits=4, group=32)
        for kernel in ("sums", "gate", "combine"):
            yield Case(architecture, kernel)


def compiled(case: Case) -> Figures:
    """Compiles, and counts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moezip.kernels import triton_experts, triton_grouped, triton_layout

    tl = triton_grouped.tl
    tile = triton_experts.DECODE
    if case.tile == "prefill":
        tile = triton_experts.PREFILL_90 if case.architecture == 90 else triton_experts.PREFILL
    dtype = tl.float16 if case.dtype == "fp16" else tl.bfloat16
    constants: dict[str, Any] = {
        "grouped": {"BITS": case.bits, "GROUP": case.group, "ZEROS": True, "DTYPE": dtype, "SPLITS": 4,
                    "BM": tile.tokens, "BN": tile.rows, "FAST": case.fast, "FP32": False},
        "sums": {"BLOCK": 256, "UNIT": 128},
        "gate": {"SPLITS": 4, "GATE": "silu", "BIAS": False, "BN": triton_experts.COLUMNS},
        "combine": {"SPLITS": 4, "BIAS": False, "BN": triton_experts.COLUMNS},
    }[case.kernel]  # fmt: skip
    kernel = getattr(triton_grouped, f"{case.kernel}_kernel")
    names = kernel.arg_names
    kinds = {name: _kind(name, case.dtype, constants) for name in names}
    even = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in kinds.items()
        if kind.startswith("*") or (kind == "i32" and name not in _ODD)
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages_at(case.bits)} if case.bits else {"num_warps": 4}
    made = triton.compile(
        ASTSource(kernel, kinds, constexprs=constants, attrs=even), GPUTarget("cuda", case.architecture, 32), options
    )
    registers, spilled = _resources(made.asm["cubin"])
    ptx, weights = made.asm["ptx"], 0.0
    product = next((word for word in ("tcgen05.mma", "wgmma.mma", "mma.sync") if word in ptx), "none")
    if case.bits:
        weights = tile.rows * triton_layout.block_inputs(case.bits) / (tile.warps * 32)
    each = round(sum(_main_loop(made.asm["cubin"]).values()) / weights, 3) if weights else 0.0
    return Figures(registers, spilled, made.metadata.shared, product.partition(".")[0], each)


def _kind(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return f"*{dtype}" if name in _HALVES else _POINTERS.get(name, "*fp32")
    return "fp32" if name in _FLOATS else "i32"


def _tool(name: str, cubin: bytes, *options: str) -> str:
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(nvidia.__file__).parent / "bin" / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", cubin, "-res-usage"))
    if found is None:
        raise SystemExit("cuobjdump tells no registers")
    return int(found[1]), int(found[2])


def _main_loop(cubin: bytes) -> collections.Counter[str]:
    """Instructions of the longest loop, by name: from the target of a branch back to that branch."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    text = _tool("nvdisasm", cubin, "-c")
    for found in re.finditer(r"(\.L_x_\d+):|/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);", text):
        if found[1]:
            labels[found[1]] = len(lines)
        else:
            lines.append((found[2], found[3]))
    first, last = 0, -1
    for number, (name, rest) in enumerate(lines):
        target = re.search(r"\.L_x_\d+", rest) if name.startswith("BRA") else None
        begin = labels.get(target[0], number) if target else number
        if number - begin > last - first:
            first, last = begin, number
    return collections.Counter(name.partition(".")[0] for name, _ in lines[first : last + 1])


def worse(found: Figures, kept: Figures) -> list[str]:
    """What is worse than it was, beyond the allowances."""
    limits = {
        "instructions": kept.instructions * MORE_INSTRUCTIONS,
        "registers": kept.registers + MORE_REGISTERS,
        "shared": kept.shared + MORE_SHARED,
        "spilled": kept.spilled,
    }
    told = [
        f"{name} {getattr(found, name)}, was {getattr(kept, name)}"
        for name, limit in limits.items()
        if getattr(found, name) > limit
    ]
    return told + ([f"product {found.product}, was {kept.product}"] if found.product != kept.product else [])


def _measured() -> dict[str, Figures]:
    wanted = list(cases())
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return {str(case): figures for case, figures in zip(wanted, pool.map(compiled, wanted))}


def main() -> int:
    import triton

    found = _measured()
    if "--write" in sys.argv[1:]:
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(asdict(figures))}" for name, figures in found.items())
        TABLE.write_text(f'{{\n  "triton": {json.dumps(triton.__version__)},\n{rows}\n}}\n', encoding="utf-8")
        return 0
    kept = json.loads(TABLE.read_text(encoding="utf-8"))
    if kept.pop("triton") != triton.__version__:
        sys.stderr.write(f"{TABLE.name} is of another Triton than {triton.__version__}: write it anew\n")
        return 1
    if list(kept) != list(found):
        sys.stderr.write(f"{TABLE.name} has other kernels than there are: write it anew\n")
        return 1
    bad = 0
    for name, figures in found.items():
        for what in worse(figures, Figures(**kept[name])):
            sys.stderr.write(f"{name}: {what}\n")
            bad += 1
    sys.stdout.write(f"{len(found)} kernels compiled, {bad} figures worse than in {TABLE.name}\n")
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # products and sums in one rounding; Triton asks to be told
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        sys.exit(main())
