// Activations as products read them, and what joins the products with gate and up.
#include "decode.h"

namespace moezip {
namespace MOEZIP_ISA {

// -- activations as products read them ----------------------------------------------------------------------------

// Lanes of even numbers; 0 in the others.
static inline vec evenly(vec v) {
  typedef uint64_t pairs __attribute__((vector_size(4 * LANES)));
  return (vec)((pairs)v & 0xFFFFFFFFu);
}

constexpr int UNIT_VECTORS = (int)UNIT / LANES;

// Columns s, s + 8, s + 16 and s + 24 side by side in word s; whole numbers of 8 bits.
static inline void store_fours([[maybe_unused]] uint32_t* to, [[maybe_unused]] const uvec* whole) {
#if defined(__AVX512F__)
  const __m512i twos = (__m512i)((whole[0] & 255) | (whole[1] & 255) << 16);
  const __m256i fours = _mm256_or_si256(_mm512_castsi512_si256(twos),
                                        _mm256_slli_epi32(_mm512_extracti64x4_epi64(twos, 1), 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), fours);
#elif defined(__AVX2__)
  store_words(to, (whole[0] & 255) | (whole[1] & 255) << 8 | (whole[2] & 255) << 16 | whole[3] << 24);
#endif
}

// A unit as whole numbers of 8 bits and their step; returns the sum of what they stand for.
static inline float prepare_bytes(const vec* x, uint32_t* values, float* step) {
  vec largest = {}, count = {};
MOEZIP_UNROLLED
  for (int i = 0; i < UNIT_VECTORS; ++i) largest = larger((vec)((uvec)x[i] & 0x7FFFFFFFu), largest);
  const float top = largest_of(largest), size = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
  uvec whole[UNIT_VECTORS];
MOEZIP_UNROLLED
  for (int i = 0; i < UNIT_VECTORS; ++i) {
    const vec near = nearest(x[i] * inverse);
    count += near;
    whole[i] = (uvec)__builtin_convertvector(near, ivec);
    if (!BYTES_TOO) store(reinterpret_cast<float*>(values) + LANES * i, near * size);
  }
  if (BYTES_TOO) store_fours(values, whole);
  *step = size;
  return size * sum_of(count);
}

// A unit in bf16, columns p and p + 16 side by side in word p; returns its sum, and adds that of even words to `evens`.
static inline float prepare_pairs(const vec* x, uint32_t* values, float* evens) {
  constexpr int HALF = UNIT_VECTORS / 2;
  uvec halves[UNIT_VECTORS];
MOEZIP_UNROLLED
  for (int i = 0; i < UNIT_VECTORS; ++i) {
    const uvec bits = (uvec)x[i];
    halves[i] = (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x400000u : rounded_halves(x[i]);  // NaN stays one
  }
  vec all = {};
MOEZIP_UNROLLED
  for (int i = 0; i < HALF; ++i) {
    const uvec low = halves[i] >> 16, high = halves[HALF + i] & 0xFFFF0000u;
    store_words(values + LANES * i, low | high);
    all += (vec)(low << 16) + (vec)high;
  }
  *evens += sum_of(evenly(all));
  return sum_of(all);
}

// One unit of one token, of which `there` columns are in the group and the others 0; returns the sum of what `values`
// then stands for.
static inline float prepare_unit(const Prepare& job, int64_t column, int64_t there, uint32_t* values, float* evens,
                                 float* step) {
  const float* floats = reinterpret_cast<const float*>(job.from) + column;
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(job.from) + column;
  uint32_t filled[UNIT];
  if (there < UNIT) {
    memset(filled, 0, sizeof(filled));
    memcpy(filled, job.dtype == BF16 ? static_cast<const void*>(halves) : floats,
           (size_t)(job.dtype == BF16 ? 2 * there : 4 * there));
    floats = reinterpret_cast<const float*>(filled), halves = reinterpret_cast<const uint16_t*>(filled);
  }
  vec x[UNIT_VECTORS], all = {};
MOEZIP_UNROLLED
  for (int i = 0; i < UNIT_VECTORS; ++i)
    x[i] = job.dtype == BF16 ? (vec)(widened(halves + LANES * i) << 16) : load(floats + LANES * i);
  if (job.path == BYTES) return prepare_bytes(x, values, step);
  if (job.path == HALVES) return prepare_pairs(x, values, evens);
MOEZIP_UNROLLED
  for (int i = 0; i < UNIT_VECTORS; ++i) {
    store(reinterpret_cast<float*>(values) + LANES * i, x[i]);
    all += x[i];
  }
  return sum_of(all);
}

void prepare(const Prepare& job, int64_t first, int64_t last) {
  const int64_t group = job.columns / job.groups, per = (group + UNIT - 1) / UNIT;
  const int64_t words = job.path == HALVES ? 16 : job.path == BYTES && BYTES_TOO ? 8 : 32;
  for (int64_t token = first; token < last; ++token) {
    uint32_t* values = job.values + token * job.pitch;
    float *sums = job.sums + token * job.units, *evens = job.evens + token * job.units;
    float* steps = job.steps + token * job.units;
    for (int64_t g = 0; g < job.groups; ++g) {
      float all = 0, even = 0;
      for (int64_t u = 0; u < per; ++u, ++steps, values += words) {
        const int64_t left = group - u * UNIT;
        const int64_t column = token * job.stride + g * group + u * UNIT;
        all += prepare_unit(job, column, left < UNIT ? left : UNIT, values, &even, steps);
      }
      sums[g] = all, evens[g] = even;
    }
  }
}

// -- activation functions -----------------------------------------------------------------------------------------

// exp for x <= 88; 0 below -87. Relative error 2e-7: powers of two by the exponent, the rest by Taylor's polynomial of
// degree 7 over [-ln 2 / 2, ln 2 / 2].
static inline vec exponential(vec x) {
  x = larger(smaller(x, splat(88.0f)), splat(-87.3f));
  const vec whole = (x * 1.44269504f + SHIFT) - SHIFT;
  const vec rest = fused_less(whole, splat(-2.12194440e-4f), fused_less(whole, splat(0.693359375f), x));
  constexpr float PARTS[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  vec sum = splat(1.0f / 5040);
  for (int i = 0; i < 7; ++i) sum = fused_more(sum, rest, splat(PARTS[i]));
  return sum * (vec)((uvec)(__builtin_convertvector(whole, ivec) + 127) << 23);
}

static inline vec sigmoid(vec x) { return splat(1.0f) / (exponential(-x) + 1.0f); }

static inline vec magnitude(vec x) { return (vec)((uvec)x & 0x7FFFFFFFu); }

// Abramowitz and Stegun, 7.1.26: absolute error 1.5e-7.
static inline vec error_function(vec x) {
  const vec size = magnitude(x), t = splat(1.0f) / (size * 0.3275911f + 1.0f);
  constexpr float PARTS[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  vec sum = splat(1.061405429f);
  for (int i = 0; i < 4; ++i) sum = sum * t + PARTS[i];
  const vec positive = 1.0f - sum * t * exponential(-(size * size));
  return (vec)((uvec)positive | ((uvec)x & 0x80000000u));
}

enum { SILU = 0, GELU = 1, GELU_TANH = 2, CLAMPED = 3 };

static inline vec gated(int activation, float alpha, float limit, vec gate, vec up) {
  switch (activation) {
    case SILU: return gate * sigmoid(gate) * up;
    case GELU: return gate * 0.5f * (error_function(gate * 0.70710678f) + 1.0f) * up;
    case GELU_TANH: return gate * sigmoid(1.5957691f * (gate + 0.044715f * gate * gate * gate)) * up;
    default: {
      gate = smaller(gate, splat(limit));
      up = larger(smaller(up, splat(limit)), splat(-limit));
      return gate * sigmoid(gate * alpha) * (up + 1.0f);
    }
  }
}

void gate(int activation, float alpha, float limit, float* inner, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(inner + i, gated(activation, alpha, limit, load(inner + i), load(up + i)));
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
