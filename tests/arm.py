"""Compiles the C++ kernels for 64-bit Arm and, where there is an emulator, compares its bits: `make arm-check`.

Arm has one copy of the kernels, the baseline, of which the compiler makes NEON. Sums and products are fused nowhere in
it, so that it gives the same bits everywhere. A small program multiplies matrices of all widths; what it prints when
run by qemu has to be what it prints when built for this machine. Needs aarch64-linux-gnu-g++, and qemu-aarch64 to run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from moezip.kernels import build

COMPILER = "aarch64-linux-gnu-g++"

PROGRAM = r"""
#include <cstdint>
#include <cstdio>
#include <vector>
typedef void* P;
typedef int64_t L;
extern "C" {
int moezip_pack(int, int, P, L, L, int, P, L);
int moezip_relay(int, int, P, L, L, L, L, int, P);
int moezip_linear(int, int, P, int, P, int, L, P);
int moezip_experts(int, int, P, L, L, int, int, float, float, P, int, L, L, P, P, int, P);
int moezip_plain(int, int, P, int, P);
int moezip_dense(int, int, P, int, L, L, P, P, L, P);
int moezip_heads(int, int, P, int, P, P, float, L, L, P, float, P, float, int, P, P, L, L, P, P, P);
int moezip_attend(int, int, P, P, P, L, L, L, L, L, L, L, L, L, L, L, L, L, L, P, int, L, L, float, P, int,
                  P, P, float, float, float, P);
}
static uint32_t state = 1;
static uint32_t drawn() { return state = state * 1664525u + 1013904223u; }
static float number() { return (int32_t)drawn() * 0x1p-31f; }
static uint64_t sum(const void* from, size_t bytes) {
  uint64_t hash = 1469598103934665603u;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(from)[i]) * 1099511628211u;
  return hash;
}
struct Matrix {
  std::vector<uint32_t> lines;
  std::vector<float> scales;
  std::vector<uint8_t> zeros;
  L words[11];
  Matrix(L rows, L columns, L groups, int bits) {
    std::vector<uint8_t> codes((size_t)(rows * columns));
    for (auto& code : codes) code = (uint8_t)(drawn() >> (32 - bits));
    const L count = (columns * bits + 31) / 32, blocks = (rows + 15) / 16, per = (columns / groups + 31) / 32;
    std::vector<uint32_t> packed((size_t)(rows * count));
    moezip_pack(0, 1, codes.data(), rows, columns, bits, packed.data(), count);
    lines.resize((size_t)(blocks * groups * per * bits * 16 + 16));
    uint32_t* at = lines.data() + (64 - (uintptr_t)lines.data() % 64) % 64 / 4;
    moezip_relay(0, 1, packed.data(), rows, count, columns, groups, bits, at);
    scales.resize((size_t)(blocks * groups * 16));
    zeros.resize(scales.size());
    for (auto& scale : scales) scale = 0.01f + 0.01f * number() * number();
    for (auto& zero : zeros) zero = (uint8_t)(drawn() >> (32 - bits));
    const L all[] = {(L)at, (L)scales.data(), bits == 1 ? 0 : (L)zeros.data(), 0, 0, rows, columns, groups, bits, 2, 0};
    for (int i = 0; i < 11; ++i) words[i] = all[i];
  }
};
int main() {
  std::vector<float> x(9 * 96), out(40 * 96);
  for (auto& each : x) each = number();
  for (int bits = 1; bits <= 8; ++bits) {
    for (L groups : {1, 3, 8}) {
      Matrix m(40, 96, groups, bits);
      for (L tokens : {1, 2, 9})
        for (int path : {0, 2}) {
          if (moezip_linear(0, 1, m.words, path, x.data(), 0, tokens, out.data())) return 1;
          printf("%d bits, %d groups, %d tokens, path %d: %016llx\n", bits, (int)groups, (int)tokens, path,
                 (unsigned long long)sum(out.data(), (size_t)(4 * tokens * 40)));
        }
      if (moezip_plain(0, 1, m.words, 1, out.data())) return 1;
      printf("plain: %016llx\n", (unsigned long long)sum(out.data(), 2 * 40 * 96));
    }
    Matrix gate(32, 96, 3, bits), up(32, 96, 1, bits), down(96, 32, 1, bits);
    L table[3][11];
    for (int i = 0; i < 11; ++i) table[0][i] = gate.words[i], table[1][i] = up.words[i], table[2][i] = down.words[i];
    table[1][10] = 1;  // other groups than those of gate
    L ids[9] = {};
    float weights[9] = {1, 0.5f, 0.25f, 1, 1, 0.125f, 1, 1, 1};
    for (int activation = 0; activation < 4; ++activation) {
      if (moezip_experts(0, 1, table, 1, 1, 0, activation, 1.5f, 0.5f, x.data(), 0, 9, 96, ids, weights, 0, out.data()))
        return 1;
      printf("a layer, gate %d: %016llx\n", activation, (unsigned long long)sum(out.data(), 4 * 9 * 96));
    }
  }
  if (moezip_dense(0, 1, x.data(), 0, 9, 95, nullptr, x.data(), 9, out.data())) return 1;
  printf("a plain matrix: %016llx\n", (unsigned long long)sum(out.data(), 4 * 9 * 9));
  std::vector<uint16_t> halves(4096), heads(2 * 3 * 32), found(2 * 96);
  for (auto& each : halves) each = (uint16_t)(0x3F80 ^ (drawn() >> 17 & 0x80FF));
  Matrix query(64, 96, 3, 4);
  const L table[3][5] = {{(L)query.words}, {0, (L)halves.data(), 32, 96, 0}, {0, (L)(halves.data() + 7), 32, 96, 0}};
  uint16_t* to[3] = {heads.data(), heads.data() + 128, heads.data() + 160};
  if (moezip_heads(0, 1, (P)table, 0, halves.data(), nullptr, 0, 1, 32, halves.data() + 5, 1e-6f, nullptr, 0, 0,
                   halves.data(), halves.data() + 32, 30, 0, to[0], to[1], to[2]))
    return 1;
  printf("heads: %016llx\n", (unsigned long long)sum(heads.data(), 2 * heads.size()));
  const L out_matrix[5] = {0, (L)halves.data(), 20, 64, 0};
  if (moezip_attend(0, 1, to[0], halves.data(), halves.data() + 100, 1, 2, 1, 9, 32, 32, 64, 32, 0, 0, 32, 0, 0, 32,
                    nullptr, 0, 0, 0, 0.2f, (P)out_matrix, 0, nullptr, nullptr, 0, 0, 0, found.data()))
    return 1;
  printf("attention: %016llx\n", (unsigned long long)sum(found.data(), 2 * 20));
}
"""


def compiled(tool: str, work: Path, more: list[str]) -> Path:
    """The program with the baseline's kernels, linked into one file."""
    folder = Path(tempfile.mkdtemp(dir=work))
    (folder / "main.cpp").write_text(PROGRAM)
    files = [build.SOURCES / "variant.cpp", build.SOURCES / "library.cpp", folder / "main.cpp"]
    define = ["-DMOEZIP_ISA=baseline", '-DMOEZIP_SOURCE="arm"']
    subprocess.run(
        [tool, *build.FLAGS, *define, *more, *map(str, files), "-o", str(folder / "program"), "-pthread", "-ldl"],
        check=True,
    )
    return folder / "program"


def main() -> int:
    if not shutil.which(COMPILER):
        sys.stdout.write(f"no {COMPILER}: nothing was compiled for Arm\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="moezip-arm-") as folder:
        arm = compiled(COMPILER, Path(folder), ["-static"])
        emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if not emulator:
            sys.stdout.write("compiled for 64-bit Arm; no qemu-aarch64 to run it\n")
            return 0
        here = compiled(build.compiler(), Path(folder), [])
        texts = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            for command in ([str(here)], [emulator, str(arm)])
        ]
    other, count = [one for one, two in zip(*texts) if one != two], len(texts[0])
    sys.stdout.write(f"64-bit Arm, emulated: {count - len(other)} of {count} results have the same bits\n")
    sys.stdout.write("".join(f"differs: {line}\n" for line in other[:5]))
    return int(bool(other) or not count or count != len(texts[1]))


if __name__ == "__main__":
    sys.exit(main())
