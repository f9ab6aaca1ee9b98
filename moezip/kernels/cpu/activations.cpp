// Activations as products read them, and what joins the products with gate and up.
#include "decode.h"

namespace moezip {
namespace MOEZIP_ISA {

// -- activations as products read them ----------------------------------------------------------------------------

static inline float half_to_float(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return bits >> 16 | 0x40;  // NaN stays one
  return (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
}

static void prepare_bytes(const float* from, uint32_t* values, float* sum, float* step) {
  constexpr int COUNT = (int)UNIT / LANES;
  vec x[COUNT], largest = {};
  for (int i = 0; i < COUNT; ++i) {
    x[i] = load(from + LANES * i);
    largest = larger((vec)((uvec)x[i] & 0x7FFFFFFFu), largest);
  }
  float top = 0;
  for (int lane = 0; lane < LANES; ++lane) top = largest[lane] > top ? largest[lane] : top;
  const float size = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
  vec count = {};
  alignas(64) int32_t whole[UNIT];
  for (int i = 0; i < COUNT; ++i) {
    x[i] = nearest(x[i] * inverse);
    count += x[i];
    store_words(whole + LANES * i, (uvec)__builtin_convertvector(x[i], ivec));
  }
  float all = 0;
  for (int lane = 0; lane < LANES; ++lane) all += count[lane];
  *sum = size * all;
  *step = size;
  if (BYTES_TOO) {
    for (int s = 0; s < 8; ++s)
      values[s] = (uint32_t)(whole[s] & 255) | (uint32_t)(whole[s + 8] & 255) << 8 |
                  (uint32_t)(whole[s + 16] & 255) << 16 | (uint32_t)whole[s + 24] << 24;
  } else {
    for (int i = 0; i < COUNT; ++i) store(reinterpret_cast<float*>(values) + LANES * i, x[i] * size);
  }
}

void prepare(const Prepare& job, int64_t first, int64_t last) {
  const int64_t group = job.columns / job.groups, per = (group + UNIT - 1) / UNIT;
  for (int64_t token = first; token < last; ++token) {
    uint32_t* values = job.values + token * job.pitch;
    for (int64_t g = 0; g < job.groups; ++g)
      for (int64_t u = 0; u < per; ++u) {
        const int64_t unit = g * per + u, column = token * job.stride + g * group + u * UNIT;
        const int64_t there = group - u * UNIT < UNIT ? group - u * UNIT : UNIT;
        float* sum = job.sums + token * job.units + unit;
        if (job.path == HALVES && job.dtype == BF16) {
          uint16_t filled[UNIT] = {};
          const uint16_t* from = reinterpret_cast<const uint16_t*>(job.from) + column;
          if (there < UNIT) from = static_cast<uint16_t*>(memcpy(filled, from, (size_t)(2 * there)));
          vec all = {};
          for (int p = 0; p < 16; p += LANES) {
            const uvec low = widened(from + p), high = widened(from + 16 + p) << 16;
            store_words(values + 16 * unit + p, low | high);
            all += (vec)(low << 16) + (vec)high;
          }
          float total = 0;
          for (int lane = 0; lane < LANES; ++lane) total += all[lane];
          *sum = total;
          continue;
        }
        float filled[UNIT] = {};
        if (job.dtype == BF16) {
          const uint16_t* from = reinterpret_cast<const uint16_t*>(job.from) + column;
          if (there == UNIT) {
            for (int i = 0; i < UNIT; i += LANES) store(filled + i, (vec)(widened(from + i) << 16));
          } else {
            for (int64_t i = 0; i < there; ++i) filled[i] = half_to_float(from[i]);
          }
        } else {
          memcpy(filled, reinterpret_cast<const float*>(job.from) + column, (size_t)(4 * there));
        }
        if (job.path == BYTES) {
          prepare_bytes(filled, values + (BYTES_TOO ? 8 : UNIT) * unit, sum, job.steps + token * job.units + unit);
          continue;
        }
        float total = 0;
        if (job.path == HALVES) {
          for (int p = 0; p < 16; ++p) {
            const uint32_t low = float_to_half(filled[p]), high = float_to_half(filled[p + 16]);
            values[16 * unit + p] = low | high << 16;
            total += half_to_float((uint16_t)low) + half_to_float((uint16_t)high);
          }
        } else {
          memcpy(values + UNIT * unit, filled, sizeof(filled));
          for (int i = 0; i < UNIT; ++i) total += filled[i];
        }
        *sum = total;
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
