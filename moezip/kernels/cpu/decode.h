// Packed codes as numbers, 16 rows at a time: rows lie in the lanes.
//
// A code q of B bits is made a number without a conversion: its bits, OR-ed into the significand of 1, are 1 + q / 2^B,
// in fp32 as in bf16. Scale, zero and that 1 act on the sum of a group.
#pragma once
#include "simd.h"

namespace moezip {
namespace MOEZIP_ISA {

constexpr int BLOCK_VECTORS = (int)BLOCK_ROWS / LANES;

#if defined(__AVX512BF16__)
constexpr bool HALVES_TOO = true;
#else
constexpr bool HALVES_TOO = false;
#endif

#if defined(__AVX512F__)
constexpr int TOKENS_AT_ONCE = 8;
constexpr bool BYTES_TOO = true;
#elif defined(__AVX2__)
constexpr int TOKENS_AT_ONCE = 4;
constexpr bool BYTES_TOO = true;
#else
constexpr int TOKENS_AT_ONCE = 2;
constexpr bool BYTES_TOO = false;
#endif

// Bytes ahead of its use that a line is asked for: the memory answers after about as many. Half as many are 7 % slower
// at 2 bits, none 20 %, and every other line is worse than none (Zen 5).
constexpr int64_t AHEAD = 8192;

// -- codes as numbers ---------------------------------------------------------------------------------------------

static inline uvec moved(uvec x, int from, int to) { return to >= from ? x << (to - from) : x >> (from - to); }

// (x & mask) | into, in the place of x, which is wanted no more: left to itself, the compiler copies `into` each time.
static inline uvec joined(uvec x, uint32_t mask, uvec into) {
#if defined(__AVX512F__)
  return (uvec)_mm512_ternarylogic_epi32((__m512i)x, _mm512_set1_epi32((int)mask), (__m512i)into, 0xEA);
#else
  return (x & mask) | into;
#endif
}

// The lines of a unit, read once: left alone, the compiler reads one again for each of its fields, and reading is what
// is scarce.
template <int BITS>
struct Unit {
  uvec line[BITS];
  explicit inline Unit(const uint8_t* lines) {
MOEZIP_UNROLLED
    for (int i = 0; i < BITS; ++i) {
      __builtin_prefetch(lines + AHEAD + LINE * i);
      uvec read = load_words(lines + LINE * i);
#if defined(__AVX512F__)
      asm("" : "+v"(read));  // of an element of the array it would be stored each time
#endif
      line[i] = read;
    }
  }
};

// Bits of the code at step s of the byte that begins at bit `at` of each lane, so that the code's lowest bit is at bit
// `low`, on top of `base`; `every` repeats base and masks over the parts of a lane.
template <int BITS, uint32_t BASE>
static inline uvec field(const Unit<BITS>& unit, int s, int at, int low, uint32_t every) {
  constexpr int HIGHEST = BITS == 8 ? 8 : BITS & 4 ? 4 : BITS & 2 ? 2 : 1;
  uvec found;
  auto plane = [&](int width, uvec line, int step, int to) {
    const uvec there = moved(line, at + width * step, to);
    const uint32_t mask = every * (((1u << width) - 1) << to);
    if (width < HIGHEST) found = joined(there, mask, found);
    else found = BASE ? joined(there, mask, uvec{} + every * BASE) : there & mask;
  };
  if constexpr (BITS == 8) plane(8, unit.line[s], 0, low);
  if constexpr (BITS < 8 && BITS & 4) plane(4, unit.line[s / 2], s % 2, low + BITS - 4);
  if constexpr (BITS < 8 && BITS & 2) plane(2, unit.line[(BITS & 4) + s / 4], s % 4, low + (BITS & 1));
  if constexpr ((BITS & 1) != 0) plane(1, unit.line[BITS & 6], s, low);
  return found;
}

// -- scales and zeros ---------------------------------------------------------------------------------------------

static inline vec scale_of(const Matrix& m, int64_t at) {
  switch (m.kind) {
#if defined(__AVX512F__)
    case SCALE_F16:
      return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(reinterpret_cast<const uint16_t*>(m.scales) + at)));
#else
    case SCALE_F16:  // no negative ones: the exponent is moved by a product, which does for the smallest too
      return (vec)(widened(reinterpret_cast<const uint16_t*>(m.scales) + at) << 13) * 0x1p112f;
#endif
    case SCALE_BF16: return (vec)(widened(reinterpret_cast<const uint16_t*>(m.scales) + at) << 16);
    case SCALE_F32: return load(reinterpret_cast<const float*>(m.scales) + at);
    default: return to_floats(widened(reinterpret_cast<const uint8_t*>(m.scales) + at));
  }
}

// Asks for the scales and zeros of a block some groups ahead of `at`: they are too few for the processor to see that they
// are read in order.
static inline void ask_for_scales(const Matrix& m, int64_t at) {
  constexpr int64_t LATER = 16 * BLOCK_ROWS;
  const int64_t size = m.kind == SCALE_F32 ? 4 : m.kind == SCALE_U8 ? 1 : 2;
  __builtin_prefetch(reinterpret_cast<const void*>(m.scales + size * (at + LATER)));
  __builtin_prefetch(reinterpret_cast<const void*>(m.zeros + at + LATER));  // of no zeros: asks for nothing
}

static inline vec zero_of(const Matrix& m, int64_t at) {
  if (!m.zeros) return splat(m.bits == 1 ? 0.5f : (float)(1 << (m.bits - 1)));
  return to_floats(widened(reinterpret_cast<const uint8_t*>(m.zeros) + at));
}

// -- numbers of a unit --------------------------------------------------------------------------------------------

static inline const float* as_floats(const uint32_t* words) { return reinterpret_cast<const float*>(words); }

template <int BITS>
static inline uvec floats_value(const Unit<BITS>& unit, int s, int b) {
  return field<BITS, 0x3F800000u>(unit, s, 8 * b, 23 - BITS, 1);
}

// bf16 has 7 bits. Of 8, the upper 7 go on top of 1, and the lowest on top of 1/128, as a number of its own.
// `low`: where the code's lowest bit goes; 7 - BITS makes 1 + q / 2^BITS.
template <int BITS>
static inline uvec halves_value(const Unit<BITS>& unit, int s, int h, int low = 7 - BITS) {
  if (BITS == 8) return joined(moved(unit.line[s], 8 * h + 1, 0), 0x007F007Fu, uvec{} + 0x3F803F80u);
  return field<BITS, 0x3F80u>(unit, s, 8 * h, low, 0x10001u);
}
template <int BITS>
static inline uvec halves_lowest(const Unit<BITS>& unit, int s, int h) {
  return joined(moved(unit.line[s % BITS], 8 * h, 6), 0x00400040u, uvec{} + 0x3C003C00u);
}

#if defined(__AVX512VNNI__)
constexpr bool WHOLE_BYTES = true;
#else
constexpr bool WHOLE_BYTES = false;  // two products of 8 bits by 7 do not fit into 16 with their sign: half a byte each
#endif

template <int BITS>
static inline uvec bytes_value(const Unit<BITS>& unit, int s, int low = 0) {
  return field<BITS, 0>(unit, s, 0, low, 0x01010101u);
}

// Vectors of numbers that a unit becomes at most, and units that are decoded before they are multiplied.
constexpr int MOST_VALUES = 32, UNITS_AT_ONCE = 4;

template <int PATH, int BITS>
static inline void decode_unit(const uint8_t* lines, uvec* values) {
  const Unit<BITS> unit(lines);
  if constexpr (PATH == FLOATS) {
MOEZIP_UNROLLED
    for (int s = 0; s < 8; ++s)
MOEZIP_UNROLLED
      for (int b = 0; b < 4; ++b) values[s + 8 * b] = floats_value<BITS>(unit, s, b);
  }
  if constexpr (PATH == HALVES) {
MOEZIP_UNROLLED
    for (int s = 0; s < 8; ++s)
MOEZIP_UNROLLED
      for (int h = 0; h < 2; ++h) {
        values[s + 8 * h] = halves_value<BITS>(unit, s, h);
        if (BITS == 8) values[16 + s + 8 * h] = halves_lowest<BITS>(unit, s, h);
      }
  }
  if constexpr (PATH == BYTES) {
MOEZIP_UNROLLED
    for (int s = 0; s < 8; ++s) {
      values[s] = bytes_value<BITS>(unit, s);
      if (BITS == 8 && !WHOLE_BYTES) values[8 + s] = (values[s] >> 4) & 0x0F0F0F0Fu, values[s] &= 0x0F0F0F0Fu;
    }
  }
}

// -- what acts on sums --------------------------------------------------------------------------------------------

// Scale and zero upon the sum of a group, and the sum of its activations. `ones`: their sum as the codes' 1 counts it.
template <int PATH, int BITS>
static inline vec with_scale(vec sum, vec scale, vec zero, vec group, float activations, float ones) {
  constexpr float SPAN = (float)(1 << BITS);
  if (PATH == HALVES && BITS == 8) ones += ones / 128;
  const vec whole = PATH == BYTES ? group : (group - ones) * SPAN;
  return fused_more(scale, fused_less(zero, splat(activations), whole), sum);
}
template <int PATH, int BITS>
static inline vec with_scale(vec sum, vec scale, vec zero, vec group, float activations) {
  return with_scale<PATH, BITS>(sum, scale, zero, group, activations, activations);
}

// What the matrix adds when all groups are summed.
template <int BITS>
static inline void finish(const Matrix& m, int64_t at, vec value, float* out) {
  if (m.steps) value *= load(reinterpret_cast<const float*>(m.steps) + at);
  if (BITS == 1) value += value;  // a scale of one bit is half a step
  if (m.bias) value += load(reinterpret_cast<const float*>(m.bias) + at);
  store(out, value);
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
