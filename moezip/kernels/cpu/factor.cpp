// The factor that GPTQ needs: H = R' R with R upper triangular, then U = inv(R).
//
// Both halves are products of panels. R is kept in panels, panel j its columns [j PANEL, (j + 1) PANEL) down to the
// diagonal; a block of rows of it comes from those above (Cholesky, looking left), a block of rows of U from U R = I.
#include "panels.h"

namespace moezip {
namespace MOEZIP_ISA {

constexpr int64_t BLOCK_SIZE = PANEL * PANEL;

static inline float* panel_at(float* panels, int64_t j) { return panels + BLOCK_SIZE * (j * (j + 1) / 2); }

// to[PANEL, PANEL] = sum over `steps` rows of above' beside.
static void product(const float* above, const float* beside, int64_t steps, float* to) {
  for (int64_t at = 0; at < PANEL; at += ROWS_AT_ONCE) {
    vec sums[ROWS_AT_ONCE][ACROSS];
    some_rows<false>(above + at, beside, steps, sums);
    for (int m = 0; m < ROWS_AT_ONCE; ++m)
      for (int v = 0; v < ACROSS; ++v) store(to + (at + m) * PANEL + v * LANES, sums[m][v]);
  }
}

static void transpose(const float* from, float* to) {
  for (int64_t r = 0; r < PANEL; ++r)
    for (int64_t c = 0; c < PANEL; ++c) to[c * PANEL + r] = from[r * PANEL + c];
}

// The matrix in the order of its places, damped, and filled up to whole panels by the identity.
static void fetch_panels(const Factor& job, int64_t count, float* panels) {
  for (int64_t j = 0; j < count; ++j) {
    float* to = panel_at(panels, j);
    for (int64_t k = 0; k < (j + 1) * PANEL; ++k, to += PANEL) {
      const float* row = k < job.columns ? job.hessian + job.order[k] * job.columns : nullptr;
      for (int64_t c = 0; c < PANEL; ++c) {
        const int64_t place = j * PANEL + c;
        const bool inside = row && place < job.columns;
        to[c] = (inside ? row[job.order[place]] : 0.0f) + (k != place ? 0.0f : inside ? job.damping : 1.0f);
      }
    }
  }
}

// Cholesky factor of a block in its upper half, and its inverse. False where the block is not positive definite.
static bool factor_block(float* block, float* inverse) {
  for (int64_t i = 0; i < PANEL; ++i) {
    float* row = block + i * PANEL;
    if (!(row[i] > 0 && row[i] < __builtin_inff())) return false;
    const vec over = splat(1.0f / __builtin_sqrtf(row[i]));
    for (int v = 0; v < ACROSS; ++v) store(row + v * LANES, load(row + v * LANES) * over);
    for (int64_t k = i + 1; k < PANEL; ++k) {
      const vec share = splat(row[k]);
      float* other = block + k * PANEL;
      for (int v = 0; v < ACROSS; ++v)
        store(other + v * LANES, fused_less(load(row + v * LANES), share, load(other + v * LANES)));
    }
  }
  for (int64_t i = PANEL - 1; i >= 0; --i) {
    float* row = inverse + i * PANEL;
    memset(row, 0, sizeof(float) * (size_t)PANEL);
    row[i] = 1;
    for (int64_t k = i + 1; k < PANEL; ++k) {
      const vec share = splat(block[i * PANEL + k]);
      for (int v = 0; v < ACROSS; ++v)
        store(row + v * LANES, fused_less(load(inverse + k * PANEL + v * LANES), share, load(row + v * LANES)));
    }
    const vec over = splat(1.0f / block[i * PANEL + i]);
    for (int v = 0; v < ACROSS; ++v) store(row + v * LANES, load(row + v * LANES) * over);
  }
  return true;
}

// H = R' R, in place; `inverses` gets those of the blocks on the diagonal.
static bool factor_panels(int64_t count, float* panels, float* inverses, float* scratch) {
  for (int64_t p = 0; p < count; ++p) {
    const float* above = panel_at(panels, p);
    float* inverse = inverses + p * BLOCK_SIZE;
    for (int64_t j = p; j < count; ++j) {
      float* beside = panel_at(panels, j);
      float* block = beside + p * BLOCK_SIZE;
      product(above, beside, p * PANEL, scratch);
      for (int64_t i = 0; i < BLOCK_SIZE; i += LANES) store(block + i, load(block + i) - load(scratch + i));
      if (j == p) {
        if (!factor_block(block, inverse)) return false;
      } else {
        product(inverse, block, PANEL, scratch);
        memcpy(block, scratch, sizeof(float) * (size_t)BLOCK_SIZE);
      }
    }
  }
  return true;
}

// A block of U to its place in the row-major result; what lies beyond the last column is left out.
static void give_block(const Factor& job, int64_t p, int64_t j, const float* block) {
  const int64_t left = job.columns - j * PANEL, width = left < PANEL ? left : PANEL;
  for (int64_t i = 0; i < PANEL && p * PANEL + i < job.columns; ++i)
    memcpy(job.factor + (p * PANEL + i) * job.columns + j * PANEL, block + i * PANEL, sizeof(float) * (size_t)width);
}

// Block row p of U = inv(R), from left to right: U_pj = -(sum_k U_pk R_kj) inv(R_jj). `row` holds it transposed.
static void invert_row(const Factor& job, int64_t p, int64_t count, float* panels, const float* inverses, float* row,
                       float* scratch) {
  float* turned = scratch + BLOCK_SIZE;
  transpose(inverses + p * BLOCK_SIZE, row);
  give_block(job, p, p, inverses + p * BLOCK_SIZE);
  for (int64_t j = p + 1; j < count; ++j) {
    product(row, panel_at(panels, j) + p * BLOCK_SIZE, (j - p) * PANEL, scratch);
    transpose(scratch, turned);
    product(turned, inverses + j * BLOCK_SIZE, PANEL, scratch);
    for (int64_t i = 0; i < BLOCK_SIZE; i += LANES) store(scratch + i, -load(scratch + i));
    give_block(job, p, j, scratch);
    transpose(scratch, row + (j - p) * BLOCK_SIZE);
  }
  for (int64_t i = p * PANEL; i < (p + 1) * PANEL && i < job.columns; ++i)
    memset(job.factor + i * job.columns, 0, sizeof(float) * (size_t)(p * PANEL));
}

int factor(const Factor& job) {
  const int64_t count = (job.columns + PANEL - 1) / PANEL;
  // one piece of memory: panels, inverses of the diagonal blocks, a block row of U, two blocks
  float* panels = floats(BLOCK_SIZE * (count * (count + 1) / 2 + count + count + 2));
  if (!panels) return NO_MEMORY;
  float* inverses = panel_at(panels, count);
  float* row = inverses + count * BLOCK_SIZE;
  float* scratch = row + count * BLOCK_SIZE;
  fetch_panels(job, count, panels);
  const bool definite = factor_panels(count, panels, inverses, scratch);
  for (int64_t p = 0; definite && p < count; ++p) invert_row(job, p, count, panels, inverses, row, scratch);
  free(panels);
  return definite ? OK : NOT_DEFINITE;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
