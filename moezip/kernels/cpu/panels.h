// Products of panels: pieces of matrices PANEL columns wide whose rows lie one behind the other, so that the inner loop
// reads memory in order and a block of the result stays in registers.
#pragma once
#include "simd.h"

namespace moezip {
namespace MOEZIP_ISA {

constexpr int ACROSS = 3;  // vectors of a panel
constexpr int64_t PANEL = ACROSS * LANES;
static_assert(PANEL % ROWS_AT_ONCE == 0, "blocks of rows must fill a panel");

static inline vec times(vec a, float b, vec sum) { return fused_more(a, splat(b), sum); }

// In pairs, a lane holds two neighbouring rows of one column in bf16.
#if defined(__AVX512BF16__)
static inline vec times_pair(vec a, float b, vec sum) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)splat(b));
}
#else
static inline vec times_pair(vec, float, vec sum) { return sum; }
#endif

// ROWS_AT_ONCE rows of above' beside: columns of `above` from the one that it points at, all columns of `beside`, summed
// over `steps` rows of both.
template <bool PAIRS>
static inline void some_rows(const float* above, const float* beside, int64_t steps, vec sums[ROWS_AT_ONCE][ACROSS]) {
  MOEZIP_UNROLLED
  for (int m = 0; m < ROWS_AT_ONCE; ++m)
    MOEZIP_UNROLLED
    for (int v = 0; v < ACROSS; ++v) sums[m][v] = vec{};
  for (int64_t t = 0; t < steps; ++t, above += PANEL, beside += PANEL) {
    vec b[ACROSS];
    MOEZIP_UNROLLED
    for (int v = 0; v < ACROSS; ++v) b[v] = load(beside + v * LANES);
    MOEZIP_UNROLLED
    for (int m = 0; m < ROWS_AT_ONCE; ++m)
      MOEZIP_UNROLLED
      for (int v = 0; v < ACROSS; ++v)
        sums[m][v] = PAIRS ? times_pair(b[v], above[m], sums[m][v]) : times(b[v], above[m], sums[m][v]);
  }
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
