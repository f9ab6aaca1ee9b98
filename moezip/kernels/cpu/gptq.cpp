// GPTQ of some rows, which are independent of each other: a tile of them lies in the lanes of a few vectors, one place
// of the factor after the other, so that every step of the algorithm is plain vector arithmetic.
//
// In the tile, a place that is done holds its error instead of its weight. Before a block of places is quantized, it is
// paid all that the places after it owe, one sum per place held in registers; inside the block, each place pays the
// others at once. Both subtract in the same order, so the size of the block changes nothing.
#include "scales.h"

namespace moezip {
namespace MOEZIP_ISA {

// Rows of a tile: with fewer, the factor is read from memory too often; with more, the tile leaves the second cache.
constexpr int64_t TILE = WIDE * LANES < 32 ? 32 : WIDE * LANES;
constexpr int VECTORS = TILE / LANES;
constexpr int64_t BLOCK = 48;
constexpr int TOGETHER = 6;  // places paid at once: TOGETHER * WIDE sums, all in registers

// Pays COUNT places from `place` on for the errors at the places from `done` on, for WIDE vectors of rows.
template <int COUNT>
static inline void pay_some(float* tile, int64_t place, int64_t done, int64_t columns, const float* factor, int64_t stride) {
  vec sums[COUNT][WIDE];
  const float* row = factor + place * stride;
  MOEZIP_UNROLLED
  for (int j = 0; j < COUNT; ++j)
    MOEZIP_UNROLLED
    for (int v = 0; v < WIDE; ++v) sums[j][v] = load(tile + (place + j) * TILE + v * LANES);
  for (int64_t i = columns - 1; i >= done; --i) {
    vec errors[WIDE];
    MOEZIP_UNROLLED
    for (int v = 0; v < WIDE; ++v) errors[v] = load(tile + i * TILE + v * LANES);
    MOEZIP_UNROLLED
    for (int j = 0; j < COUNT; ++j) {
      vec share = splat(row[j * stride + i]);
      MOEZIP_UNROLLED
      for (int v = 0; v < WIDE; ++v) sums[j][v] = fused_less(errors[v], share, sums[j][v]);
    }
  }
  MOEZIP_UNROLLED
  for (int j = 0; j < COUNT; ++j)
    MOEZIP_UNROLLED
    for (int v = 0; v < WIDE; ++v) store(tile + (place + j) * TILE + v * LANES, sums[j][v]);
}

template <int COUNT>
static inline void pay(float* tile, int64_t place, int64_t done, int64_t columns, const float* factor, int64_t stride) {
  for (int64_t at = 0; at < TILE; at += WIDE * LANES) pay_some<COUNT>(tile + at, place, done, columns, factor, stride);
}

// Transposed copies in small squares, so that both sides stay in the first cache.
constexpr int64_t SQUARE = 16;

static void fetch(const Gptq& job, int64_t first, int64_t rows, float* tile) {
  for (int64_t at = 0; at < job.columns; at += SQUARE) {
    int64_t end = at + SQUARE < job.columns ? at + SQUARE : job.columns;
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = job.weight + (first + r) * job.columns;
      for (int64_t p = at; p < end; ++p) tile[p * TILE + r] = row[job.order[p]];
    }
    for (int64_t p = at; p < end; ++p)
      for (int64_t r = rows; r < TILE; ++r) tile[p * TILE + r] = 0;
  }
}

static void give(const Gptq& job, int64_t first, int64_t rows, const float* tile, const uint8_t* codes) {
  for (int64_t at = 0; at < job.columns; at += SQUARE) {
    int64_t end = at + SQUARE < job.columns ? at + SQUARE : job.columns;
    for (int64_t r = 0; r < rows; ++r) {
      float* errors = job.errors + (first + r) * job.columns;
      uint8_t* out = job.codes + (first + r) * job.columns;
      for (int64_t p = at; p < end; ++p) {
        errors[p] = tile[p * TILE + r];
        out[job.order[p]] = codes[p * TILE + r];
      }
    }
  }
}

// Scales, zeros and the scales' reciprocals of the tile's rows, by group.
struct Steps {
  float *scale, *zero, *inverse;  // [groups, TILE]
};

static void fetch_steps(const Gptq& job, int64_t first, int64_t rows, const Steps& steps) {
  for (int64_t g = 0; g < job.count; ++g)
    for (int64_t r = 0; r < TILE; ++r) {
      int64_t from = (first + r) * job.count + g, to = g * TILE + r;
      steps.scale[to] = r < rows ? job.scales[from] : 1.0f;
      steps.zero[to] = r < rows ? job.zeros[from] : 0.0f;
      steps.inverse[to] = 1.0f / steps.scale[to];
    }
}

static void refit(const Gptq& job, int64_t first, int64_t rows, const float* tile, int64_t start, float* importance,
                  const Steps& steps) {
  const Search& search = *job.refit;
  int64_t group = job.order[start] / search.group;
  for (int64_t i = 0; i < search.group; ++i) importance[i] = search.importance[job.order[start + i]];
  for (int64_t at = 0; at < TILE; at += PAIR) {
    Found found = search_scales(tile + start * TILE + at, TILE, importance, search);
    for (int v = 0; v < 2; ++v) {
      int64_t to = group * TILE + at + v * LANES;
      store(steps.scale + to, found.scale[v]);
      store(steps.zero + to, found.zero[v]);
      store(steps.inverse + to, 1.0f / found.scale[v]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    job.scales[(first + r) * job.count + group] = steps.scale[group * TILE + r];
    job.zeros[(first + r) * job.count + group] = steps.zero[group * TILE + r];
  }
}

// Quantizes the places [start, end) of a tile from the last to the first. square: their part of the factor,
// transposed, row i the shares of place i's error.
static void quantize_block(const Gptq& job, float* tile, uint8_t* codes, int64_t start, int64_t end,
                           const float* square, const Steps& steps, vec* loss) {
  const int64_t size = end - start;
  const vec top = splat((float)((1 << job.bits) - 1));
  for (int64_t i = size - 1; i >= 0; --i) {
    float* here = tile + (start + i) * TILE;
    const float* shares = square + i * size;
    const int64_t column = job.order[start + i];
    const int64_t group = (job.refit ? column / job.refit->group : job.groups[column]) * TILE;
    const float over = 1.0f / shares[i];
    vec errors[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      vec weight = load(here + v * LANES), zero = load(steps.zero + group + v * LANES);
      vec code = quantized(weight, load(steps.inverse + group + v * LANES), zero, top);
      errors[v] = (weight - load(steps.scale + group + v * LANES) * (code - zero)) * over;
      loss[v] += errors[v] * errors[v];
      store(here + v * LANES, errors[v]);
      store_bytes(codes + (start + i) * TILE + v * LANES, code);
    }
    for (int64_t j = 0; j < i; ++j) {
      float* other = tile + (start + j) * TILE;
      const vec share = splat(shares[j]);
      for (int v = 0; v < VECTORS; ++v) store(other + v * LANES, fused_less(errors[v], share, load(other + v * LANES)));
    }
  }
}

int gptq(const Gptq& job, int64_t first, int64_t last) {
  const int64_t columns = job.columns, block = job.refit ? job.refit->group : BLOCK;
  // one piece of memory: tile, three times the steps, a square of the factor, importance, codes
  const int64_t steps_size = job.count * TILE;
  float* memory = floats(columns * TILE + 3 * steps_size + block * block + block + columns * TILE / 4 + 16);
  if (!memory) return NO_MEMORY;
  float* tile = memory;
  Steps steps = {tile + columns * TILE, tile + columns * TILE + steps_size, tile + columns * TILE + 2 * steps_size};
  float* square = steps.inverse + steps_size;
  float* importance = square + block * block;
  uint8_t* codes = reinterpret_cast<uint8_t*>(importance + block);
  for (int64_t row = first; row < last; row += TILE) {
    const int64_t rows = last - row < TILE ? last - row : TILE;
    fetch(job, row, rows, tile);
    if (!job.refit) fetch_steps(job, row, rows, steps);
    vec loss[VECTORS] = {};
    for (int64_t end = columns, start; end > 0; end = start) {
      start = end > block ? end - block : 0;
      int64_t place = start;
      for (; place + TOGETHER <= end; place += TOGETHER)
        pay<TOGETHER>(tile, place, end, columns, job.factor, job.stride);
      for (; place < end; ++place) pay<1>(tile, place, end, columns, job.factor, job.stride);
      if (job.refit) refit(job, row, rows, tile, start, importance, steps);
      const int64_t size = end - start;
      for (int64_t j = 0; j < size; ++j)
        for (int64_t i = j; i < size; ++i) square[i * size + j] = job.factor[(start + j) * job.stride + start + i];
      quantize_block(job, tile, codes, start, end, square, steps, loss);
    }
    give(job, row, rows, tile, codes);
    for (int64_t r = 0; r < rows; ++r) job.loss[row + r] = loss[r / LANES][r % LANES];
  }
  free(memory);
  return OK;
}

int clip(const Clip& job, int64_t first, int64_t last) {
  const int64_t group = job.search.group, count = job.columns / group;
  float* tile = floats(group * PAIR);
  if (!tile) return NO_MEMORY;
  for (int64_t row = first; row < last; row += PAIR) {
    const int64_t rows = last - row < PAIR ? last - row : PAIR;
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t at = 0; at < group; at += SQUARE) {
        int64_t end = at + SQUARE < group ? at + SQUARE : group;
        for (int64_t r = 0; r < PAIR; ++r) {
          const float* from = job.weight + (row + r) * job.columns + g * group;
          for (int64_t c = at; c < end; ++c) tile[c * PAIR + r] = r < rows ? from[c] : 0.0f;
        }
      }
      Found found = search_scales(tile, PAIR, job.search.importance + g * group, job.search);
      for (int64_t r = 0; r < rows; ++r) {
        job.scales[(row + r) * count + g] = found.scale[r / LANES][r % LANES];
        job.zeros[(row + r) * count + g] = found.zero[r / LANES][r % LANES];
      }
    }
  }
  free(tile);
  return OK;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
