// The second moment X' diag(w) X, upper half. A round of tokens is copied into panels of columns, token after token, so
// that the inner loop reads memory in order; a block of the result stays in registers for the whole round.
#include "panels.h"

namespace moezip {
namespace MOEZIP_ISA {

#if defined(__AVX512BF16__)
constexpr bool EXACT_HALVES = true;
#else
constexpr bool EXACT_HALVES = false;
#endif

static inline float widened(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static bool in_pairs(const Moment& job) { return EXACT_HALVES && job.halves && !job.weights; }

// Panels [first, last) of this round's tokens. In pairs, a lane holds one column of two tokens in bf16.
int moment_panel(const Moment& job, int64_t first, int64_t last) {
  const int64_t tokens = job.last - job.first;
  for (int64_t p = first; p < last; ++p) {
    const int64_t column = p * PANEL;
    const int64_t width = job.columns - column < PANEL ? job.columns - column : PANEL;
    if (in_pairs(job)) {
      const int64_t pairs = (tokens + 1) / 2;
      uint16_t* to = reinterpret_cast<uint16_t*>(job.right + p * PANEL * pairs);
      for (int64_t t = 0; t < pairs; ++t, to += 2 * PANEL) {
        const uint16_t* even = job.halves + (job.first + 2 * t) * job.columns + column;
        const bool whole = 2 * t + 1 < tokens;
        for (int64_t c = 0; c < width; ++c) {
          to[2 * c] = even[c];
          to[2 * c + 1] = whole ? even[job.columns + c] : 0;
        }
        memset(to + 2 * width, 0, (size_t)(4 * (PANEL - width)));
      }
      continue;
    }
    float* right = job.right + p * PANEL * tokens;
    float* left = job.left + p * PANEL * tokens;
    for (int64_t t = 0; t < tokens; ++t, right += PANEL, left += PANEL) {
      const int64_t from = (job.first + t) * job.columns + column;
      if (job.halves)
        for (int64_t c = 0; c < width; ++c) right[c] = widened(job.halves[from + c]);
      else
        memcpy(right, job.values + from, (size_t)(4 * width));
      memset(right + width, 0, (size_t)(4 * (PANEL - width)));
      if (job.weights)
        for (int64_t c = 0; c < PANEL; ++c) left[c] = right[c] * job.weights[job.first + t];
    }
  }
  return OK;
}

// Blocks of the upper half whose rows are the columns of panels [first, last).
int moment_block(const Moment& job, int64_t first, int64_t last) {
  const bool pairs = in_pairs(job);
  const int64_t tokens = job.last - job.first, steps = pairs ? (tokens + 1) / 2 : tokens;
  const int64_t panels = (job.columns + PANEL - 1) / PANEL;
  const float* left = job.weights ? job.left : job.right;
  for (int64_t p = first; p < last; ++p)
    for (int64_t q = p; q < panels; ++q) {
      const int64_t column = q * PANEL, width = job.columns - column < PANEL ? job.columns - column : PANEL;
      for (int64_t at = 0; at < PANEL && p * PANEL + at < job.columns; at += ROWS_AT_ONCE) {
        vec sums[ROWS_AT_ONCE][ACROSS];
        const float* above = left + p * PANEL * steps + at;
        const float* beside = job.right + q * PANEL * steps;
        if (pairs)
          some_rows<true>(above, beside, steps, sums);
        else
          some_rows<false>(above, beside, steps, sums);
        for (int m = 0; m < ROWS_AT_ONCE && p * PANEL + at + m < job.columns; ++m) {
          float* out = job.out + (p * PANEL + at + m) * job.columns + column;
          if (width == PANEL)
            for (int v = 0; v < ACROSS; ++v) store(out + v * LANES, load(out + v * LANES) + sums[m][v]);
          else
            for (int64_t c = 0; c < width; ++c) out[c] += sums[m][c / LANES][c % LANES];
        }
      }
    }
  return OK;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
