// One pass of coordinate descent over the steps and codes of some rows; see descend in kernels/__init__.py. Rows lie in
// the lanes of vectors, a tile of them at a time, as in gptq.cpp, which is included before this file.
#include "simd.h"

namespace moezip {
namespace MOEZIP_ISA {

constexpr float LEAST_STEP = 0.3f;  // share of the old step that a new one must exceed
constexpr float LARGEST_HALF = 65504.0f;

static inline vec load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__) && defined(__FMA__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return vec{(float)from[0], (float)from[1], (float)from[2], (float)from[3]};
#endif
}

// COUNT sums at once: to[j] = damping * own[j] + sum over k of from[k] rows[j * stride + k], for WIDE vectors of rows.
template <int COUNT>
static inline void sum_some(float* to, const float* own, const float* from, int64_t steps, const float* rows,
                            int64_t stride, float damping) {
  vec sums[COUNT][WIDE];
  const vec damped = splat(damping);
  MOEZIP_UNROLLED
  for (int j = 0; j < COUNT; ++j)
    MOEZIP_UNROLLED
    for (int v = 0; v < WIDE; ++v) sums[j][v] = damped * load(own + j * TILE + v * LANES);
  for (int64_t k = 0; k < steps; ++k) {
    vec given[WIDE];
    MOEZIP_UNROLLED
    for (int v = 0; v < WIDE; ++v) given[v] = load(from + k * TILE + v * LANES);
    MOEZIP_UNROLLED
    for (int j = 0; j < COUNT; ++j) {
      const vec share = splat(rows[j * stride + k]);
      MOEZIP_UNROLLED
      for (int v = 0; v < WIDE; ++v) sums[j][v] = fused_more(given[v], share, sums[j][v]);
    }
  }
  MOEZIP_UNROLLED
  for (int j = 0; j < COUNT; ++j)
    MOEZIP_UNROLLED
    for (int v = 0; v < WIDE; ++v) store(to + j * TILE + v * LANES, sums[j][v]);
}

// to = from (H + damping), for `count` columns of H of which `rows` is the first row; own is their part of from.
static void sum_all(float* to, const float* own, const float* from, int64_t steps, const float* rows, int64_t count,
                    int64_t stride, float damping) {
  for (int64_t at = 0; at < TILE; at += WIDE * LANES) {
    int64_t j = 0;
    for (; j + TOGETHER <= count; j += TOGETHER)
      sum_some<TOGETHER>(to + j * TILE + at, own + j * TILE + at, from + at, steps, rows + j * stride, stride, damping);
    for (; j < count; ++j)
      sum_some<1>(to + j * TILE + at, own + j * TILE + at, from + at, steps, rows + j * stride, stride, damping);
  }
}

// What the format stores for a step, ties to even; 0 where it cannot. One bit stores half of it.
static inline vec stored_step(vec step, int bits, int dropped) {
  if (!dropped) return step;
  const float factor = bits == 1 ? 0.5f : 1.0f;
  const vec scale = step * factor;
  vec kept = stored(scale, dropped);
  if (dropped == 13) {  // fp16 has fixed steps of 2^-24 below 2^-14: those of fp32 around one half
    const vec fixed = (scale + 0.5f) - 0.5f;
    kept = scale < 0x1p-14f ? fixed : kept;
    kept = kept > LARGEST_HALF ? vec{} : kept;
  }
  return kept / factor;
}

struct Tile {
  float *change, *slope, *unit, *turned;  // [columns, TILE], and three times [group, TILE]
  uint8_t* codes;                         // [columns, TILE]
  vec step[VECTORS], zero[VECTORS];       // of the group in turn
  double gain[TILE];
};

// The best step of the group, given `unit` (codes less zero) and the slope of the error.
static void move_step(const Descent& job, Tile& tile, int64_t start) {
  sum_all(tile.turned, tile.unit, tile.unit, job.group, job.hessian + start * job.columns + start, job.group,
          job.columns, job.damping);
  vec moves[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    vec curve = {}, along = {};
    for (int64_t j = 0; j < job.group; ++j) {
      const vec unit = load(tile.unit + j * TILE + v * LANES);
      curve = fused_more(unit, load(tile.turned + j * TILE + v * LANES), curve);
      along = fused_more(unit, load(tile.slope + j * TILE + v * LANES), along);
    }
    const vec old = tile.step[v], one = splat(1.0f);
    vec best = curve > 0.0f ? old - along / (curve > 0.0f ? curve : one) : old;
    best = best > LEAST_STEP * old ? best : old;
    best = stored_step(best, job.bits, job.dropped);
    const vec move = best - old, gain = move * (2.0f * along + move * curve);
    const vec taken = (best > 0.0f) & (gain < 0.0f) ? move : vec{};
    moves[v] = taken;
    tile.step[v] = taken == 0.0f ? old : best;
    for (int lane = 0; lane < LANES; ++lane)
      if (taken[lane] != 0.0f) tile.gain[v * LANES + lane] += (double)gain[lane];
  }
  for (int64_t j = 0; j < job.group; ++j)
    for (int v = 0; v < VECTORS; ++v) {
      float* change = tile.change + (start + j) * TILE + v * LANES;
      float* slope = tile.slope + j * TILE + v * LANES;
      store(change, fused_more(moves[v], load(tile.unit + j * TILE + v * LANES), load(change)));
      store(slope, fused_more(moves[v], load(tile.turned + j * TILE + v * LANES), load(slope)));
    }
}

// The best codes of the group, column after column, in units of the step.
static void move_codes(const Descent& job, Tile& tile, int64_t start) {
  const vec top = splat((float)((1 << job.bits) - 1));
  vec inverse[VECTORS], gain[VECTORS] = {};
  for (int v = 0; v < VECTORS; ++v) inverse[v] = 1.0f / tile.step[v];
  for (int64_t j = 0; j < job.group; ++j)
    for (int v = 0; v < VECTORS; ++v) {
      float* slope = tile.slope + j * TILE + v * LANES;
      store(slope, load(slope) * inverse[v]);
    }
  for (int64_t j = 0; j < job.group; ++j) {
    const float* shares = job.hessian + (start + j) * job.columns + start;
    const float height = shares[j] + job.damping, over = height > 0 ? 1.0f / height : 0.0f;
    uint8_t* codes = tile.codes + (start + j) * TILE;
    vec moves[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      const vec code = load_bytes(codes + v * LANES), slope = load(tile.slope + j * TILE + v * LANES);
      const vec best = nearest(smaller(larger(code - slope * over, vec{}), top));
      moves[v] = best - code;
      gain[v] += moves[v] * (2.0f * slope + moves[v] * height);
      store_bytes(codes + v * LANES, best);
      float* change = tile.change + (start + j) * TILE + v * LANES;
      store(change, fused_more(moves[v], tile.step[v], load(change)));
    }
    for (int64_t k = j + 1; k < job.group; ++k) {
      const vec share = splat(shares[k]);
      float* slope = tile.slope + k * TILE;
      for (int v = 0; v < VECTORS; ++v) store(slope + v * LANES, fused_more(moves[v], share, load(slope + v * LANES)));
    }
  }
  for (int v = 0; v < VECTORS; ++v)
    for (int lane = 0; lane < LANES; ++lane) {
      const double step = (double)tile.step[v][lane];
      tile.gain[v * LANES + lane] += (double)gain[v][lane] * step * step;
    }
}

static void fetch_rows(const Descent& job, int64_t first, int64_t rows, Tile& tile) {
  for (int64_t at = 0; at < job.columns; at += SQUARE) {
    const int64_t end = at + SQUARE < job.columns ? at + SQUARE : job.columns;
    for (int64_t r = 0; r < TILE; ++r) {
      const int64_t row = first + r;
      for (int64_t c = at; c < end; ++c) {
        if (r >= rows) {
          tile.change[c * TILE + r] = 0, tile.codes[c * TILE + r] = 0;
          continue;
        }
        const int64_t group = row * job.count + c / job.group, from = row * job.columns + c;
        tile.change[c * TILE + r] =
            job.step[group] * ((float)job.codes[from] - job.zero[group]) - job.weight[from];
        tile.codes[c * TILE + r] = job.codes[from];
      }
    }
  }
}

int descend(const Descent& job, int64_t first, int64_t last) {
  const int64_t size = job.columns * TILE, part = job.group * TILE;
  float* memory = floats(size + 3 * part + size / 4);
  if (!memory) return NO_MEMORY;
  Tile tile;
  tile.change = memory, tile.slope = memory + size, tile.unit = tile.slope + part, tile.turned = tile.unit + part;
  tile.codes = reinterpret_cast<uint8_t*>(tile.turned + part);
  for (int64_t row = first; row < last; row += TILE) {
    const int64_t rows = last - row < TILE ? last - row : TILE;
    fetch_rows(job, row, rows, tile);
    for (int64_t r = 0; r < TILE; ++r) tile.gain[r] = 0;
    for (int64_t g = 0; g < job.count; ++g) {
      const int64_t start = g * job.group;
      for (int64_t r = 0; r < TILE; ++r) {
        tile.step[r / LANES][r % LANES] = r < rows ? job.step[(row + r) * job.count + g] : 1.0f;
        tile.zero[r / LANES][r % LANES] = r < rows ? job.zero[(row + r) * job.count + g] : 0.0f;
      }
      sum_all(tile.slope, tile.change + start * TILE, tile.change, job.columns, job.hessian + start * job.columns,
              job.group, job.columns, job.damping);
      if (job.steps) {
        for (int64_t j = 0; j < job.group; ++j)
          for (int v = 0; v < VECTORS; ++v)
            store(tile.unit + j * TILE + v * LANES, load_bytes(tile.codes + (start + j) * TILE + v * LANES) - tile.zero[v]);
        move_step(job, tile, start);
      }
      move_codes(job, tile, start);
      for (int64_t r = 0; r < rows; ++r) job.step[(row + r) * job.count + g] = tile.step[r / LANES][r % LANES];
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < job.columns; ++c) job.codes[(row + r) * job.columns + c] = tile.codes[c * TILE + r];
      job.gain[row + r] = tile.gain[r];
    }
  }
  free(memory);
  return OK;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
