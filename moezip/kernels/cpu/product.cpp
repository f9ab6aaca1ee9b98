// Products of activations with packed matrices, 16 rows at a time: rows lie in the lanes, activations are broadcast.
//
// A code q of B bits is made a number without a conversion: its bits, OR-ed into the significand of 1, are 1 + q / 2^B,
// in fp32 as in bf16. Scale, zero and that 1 act on the sum of a group. So a product costs a shift, an AND-OR and a
// multiplication for every vector of codes, and tokens beyond the first cost the multiplication alone.
#include "simd.h"

#include <cmath>

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

// Bytes ahead of its use that a line is asked for: the memory answers after about as many.
constexpr int64_t AHEAD = 4096;

// -- codes as numbers ---------------------------------------------------------------------------------------------

static inline uvec moved(uvec x, int from, int to) { return to >= from ? x << (to - from) : x >> (from - to); }

// The lines of a unit, read once: left alone, the compiler reads one again for each of its fields, and reading is what
// is scarce.
template <int BITS>
struct Unit {
  uvec line[BITS];
  explicit inline Unit(const uint8_t* lines) {
MOEZIP_UNROLLED
    for (int i = 0; i < BITS; ++i) {
      __builtin_prefetch(lines + AHEAD + LINE * i);
      line[i] = load_words(lines + LINE * i);
#if defined(__AVX512F__)
      asm("" : "+v"(line[i]));
#endif
    }
  }
};

// Bits of the code at step s of the byte that begins at bit `at` of each lane, so that the code's lowest bit is at bit
// `low`; `every` repeats the masks over the parts of a lane.
template <int BITS>
static inline uvec field(const Unit<BITS>& unit, int s, int at, int low, uint32_t every, uvec into) {
  if constexpr (BITS == 8) return (moved(unit.line[s], at, low) & every * (0xFFu << low)) | into;
  if constexpr (BITS & 4) {
    const int to = low + BITS - 4;
    into |= moved(unit.line[s / 2], at + 4 * (s % 2), to) & (every * (15u << to));
  }
  if constexpr (BITS & 2) {
    const int to = low + (BITS & 1);
    into |= moved(unit.line[(BITS & 4) + s / 4], at + 2 * (s % 4), to) & (every * (3u << to));
  }
  if constexpr ((BITS & 1) != 0) into |= moved(unit.line[BITS & 6], at + s, low) & (every * (1u << low));
  return into;
}

// -- scales and zeros ---------------------------------------------------------------------------------------------

static inline vec scale_of(const Matrix& m, int64_t at) {
  switch (m.kind) {
    case SCALE_F16:  // no negative ones: the exponent is moved by a product, which does for the smallest too
      return (vec)(widened(reinterpret_cast<const uint16_t*>(m.scales) + at) << 13) * 0x1p112f;
    case SCALE_BF16: return (vec)(widened(reinterpret_cast<const uint16_t*>(m.scales) + at) << 16);
    case SCALE_F32: return load(reinterpret_cast<const float*>(m.scales) + at);
    default: return to_floats(widened(reinterpret_cast<const uint8_t*>(m.scales) + at));
  }
}

static inline vec zero_of(const Matrix& m, int64_t at) {
  if (!m.zeros) return splat(m.bits == 1 ? 0.5f : (float)(1 << (m.bits - 1)));
  return to_floats(widened(reinterpret_cast<const uint8_t*>(m.zeros) + at));
}

// -- the sum over a group -----------------------------------------------------------------------------------------
//
// For one token, codes are made numbers and multiplied at once, whatever the width: `one_token`. For several, a unit is
// made numbers first, which depends on the width and not on the tokens (`decode_unit`), and multiplied then, which
// depends on the tokens and not on the width (`many_tokens`): far less code, and a unit's numbers stay near.

static inline const float* as_floats(const uint32_t* words) { return reinterpret_cast<const float*>(words); }

template <int BITS>
static inline uvec floats_value(const Unit<BITS>& unit, int s, int b) {
  return field<BITS>(unit, s, 8 * b, 23 - BITS, 1, uvec{} + 0x3F800000u);
}

// bf16 has 7 bits. Of 8, the upper 7 go on top of 1, and the lowest on top of 1/128, as a number of its own.
template <int BITS>
static inline uvec halves_value(const Unit<BITS>& unit, int s, int h) {
  if (BITS == 8) return (moved(unit.line[s], 8 * h + 1, 0) & 0x007F007Fu) | 0x3F803F80u;
  return field<BITS>(unit, s, 8 * h, 7 - BITS, 0x10001u, uvec{} + 0x3F803F80u);
}
template <int BITS>
static inline uvec halves_lowest(const Unit<BITS>& unit, int s, int h) {
  return (moved(unit.line[s % BITS], 8 * h, 6) & 0x00400040u) | 0x3C003C00u;
}

#if defined(__AVX512VNNI__)
constexpr bool WHOLE_BYTES = true;
#else
constexpr bool WHOLE_BYTES = false;  // two products of 8 bits by 7 do not fit into 16 with their sign: half a byte each
#endif

template <int BITS>
static inline uvec bytes_value(const Unit<BITS>& unit, int s) {
  return field<BITS>(unit, s, 0, 0, 0x01010101u, uvec{});
}

#if defined(__AVX512BF16__)
static inline vec dot_halves(vec sum, uvec value, uint32_t pair) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)value, (__m512bh)_mm512_set1_epi32((int)pair));
}
#endif

// Sums of four products of a code with a whole number each.
#if defined(__AVX512VNNI__)
static inline uvec dot_bytes(uvec sum, uvec codes, uint32_t four) {
  return (uvec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32((int)four));
}
#elif defined(__AVX512F__)
static inline uvec dot_bytes(uvec sum, uvec codes, uint32_t four) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32((int)four));
  return sum + (uvec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVX2__)
static inline uvec dot_bytes(uvec sum, uvec codes, uint32_t four) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32((int)four));
  return sum + (uvec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif

// Sum over `units` units, from `first` on, of x (offset + q / 2^BITS), or of x q for bytes.
template <int PATH, int BITS>
static inline vec one_token(const uint8_t* lines, int64_t units, const Token& x, int64_t first) {
  vec sum[4] = {};
  for (int64_t u = first; u < first + units; ++u, lines += LINE * BITS) {
    const Unit<BITS> unit(lines);
    if constexpr (PATH == FLOATS) {
      const float* from = as_floats(x.values) + UNIT * u;
MOEZIP_UNROLLED
      for (int s = 0; s < 8; ++s)
MOEZIP_UNROLLED
        for (int b = 0; b < 4; ++b)
          sum[b] = fused_more((vec)floats_value<BITS>(unit, s, b), splat(from[s + 8 * b]), sum[b]);
    }
#if defined(__AVX512BF16__)
    if constexpr (PATH == HALVES) {
      const uint32_t* from = x.values + 16 * u;
MOEZIP_UNROLLED
      for (int s = 0; s < 8; ++s)
MOEZIP_UNROLLED
        for (int h = 0; h < 2; ++h) {
          vec& to = sum[2 * (s % 2) + h];
          to = dot_halves(to, halves_value<BITS>(unit, s, h), from[s + 8 * h]);
          if (BITS == 8) to = dot_halves(to, halves_lowest<BITS>(unit, s, h), from[s + 8 * h]);
        }
    }
#endif
#if defined(__AVX2__)
    if constexpr (PATH == BYTES) {
      const uint32_t* from = x.values + 8 * u;
      uvec part[2] = {}, high = {};
MOEZIP_UNROLLED
      for (int s = 0; s < 8; ++s) {
        if (BITS == 8 && !WHOLE_BYTES) {
          const uvec word = unit.line[s % BITS];
          part[s % 2] = dot_bytes(part[s % 2], word & 0x0F0F0F0Fu, from[s]);
          high = dot_bytes(high, (word >> 4) & 0x0F0F0F0Fu, from[s]);
        } else {
          part[s % 2] = dot_bytes(part[s % 2], bytes_value<BITS>(unit, s), from[s]);
        }
      }
      sum[u % 2] = fused_more(to_floats(part[0] + part[1] + (high << 4)), splat(x.steps[u]), sum[u % 2]);
    }
#endif
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
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

// A strip is one vector of rows. Two at a time share what is read of the activations.
#if defined(__AVX512F__)
constexpr int MOST_SUMS = 16;
#else
constexpr int MOST_SUMS = 8;
#endif

// Sums of a token in a strip that do not wait for each other: a sum takes several cycles, of which each begins two.
constexpr int chains(int sums) { return 4 * sums <= MOST_SUMS ? 4 : 2 * sums <= MOST_SUMS ? 2 : 1; }

// Adds the products of some units to `total` [STRIPS, TOKENS]. A unit has MOST_VALUES vectors of numbers, of which it
// uses some for each of `parts` parts; those of strips are STRIP_VALUES apart.
constexpr int STRIP_VALUES = UNITS_AT_ONCE * MOST_VALUES;

template <int PATH, int TOKENS, int STRIPS>
static void many_tokens(const uvec* values, int parts, int64_t units, const Token* x, int64_t unit, vec* total) {
  if constexpr (PATH == FLOATS || PATH == HALVES) {
    constexpr int PLACES = PATH == FLOATS ? 32 : 16, CHAINS = chains(STRIPS * TOKENS);
    vec sum[STRIPS][TOKENS][CHAINS] = {};
    const uint32_t* from[TOKENS];
    for (int t = 0; t < TOKENS; ++t) from[t] = x[t].values + PLACES * unit;
    for (int part = 0; part < parts; ++part)
      for (int64_t u = 0; u < units; ++u) {
        const uvec* value = values + MOST_VALUES * u + PLACES * part;
        const int64_t place = PLACES * u;
        for (int p = 0; p < PLACES; p += CHAINS)
          MOEZIP_UNROLLED
          for (int c = 0; c < CHAINS; ++c)
            MOEZIP_UNROLLED
            for (int t = 0; t < TOKENS; ++t) {
              if constexpr (PATH == FLOATS) {
                const vec one = splat(as_floats(from[t])[place + p + c]);
                MOEZIP_UNROLLED
                for (int r = 0; r < STRIPS; ++r)
                  sum[r][t][c] = fused_more((vec)value[STRIP_VALUES * r + p + c], one, sum[r][t][c]);
              }
#if defined(__AVX512BF16__)
              else {
                const uint32_t pair = from[t][place + p + c];
                MOEZIP_UNROLLED
                for (int r = 0; r < STRIPS; ++r)
                  sum[r][t][c] = dot_halves(sum[r][t][c], value[STRIP_VALUES * r + p + c], pair);
              }
#endif
            }
      }
    for (int r = 0; r < STRIPS; ++r)
      for (int t = 0; t < TOKENS; ++t)
        for (int c = 0; c < CHAINS; ++c) total[TOKENS_AT_ONCE * r + t] += sum[r][t][c];
  }
#if defined(__AVX2__)
  if constexpr (PATH == BYTES) {
    for (int64_t u = 0; u < units; ++u)
      for (int part = 0; part < parts; ++part) {
        const uvec* value = values + MOST_VALUES * u + 8 * part;
        uvec sum[STRIPS][TOKENS] = {};
        MOEZIP_UNROLLED
        for (int s = 0; s < 8; ++s)
          MOEZIP_UNROLLED
          for (int t = 0; t < TOKENS; ++t) {
            const uint32_t four = x[t].values[8 * (unit + u) + s];
            MOEZIP_UNROLLED
            for (int r = 0; r < STRIPS; ++r) sum[r][t] = dot_bytes(sum[r][t], value[STRIP_VALUES * r + s], four);
          }
        for (int r = 0; r < STRIPS; ++r)
          for (int t = 0; t < TOKENS; ++t) {
            vec& to = total[TOKENS_AT_ONCE * r + t];
            to = fused_more(to_floats(part ? sum[r][t] << 4 : sum[r][t]), splat(x[t].steps[unit + u]), to);
          }
      }
  }
#endif
}

template <int PATH, int STRIPS>
static inline void by_tokens(int tokens, const uvec* values, int parts, int64_t units, const Token* x, int64_t unit,
                             vec* total) {
  switch (tokens) {
#if defined(__AVX512F__)
    case 8: return many_tokens<PATH, 8, STRIPS>(values, parts, units, x, unit, total);
#endif
#if defined(__AVX2__)
    case 4: return many_tokens<PATH, 4, STRIPS>(values, parts, units, x, unit, total);
#endif
    default: return many_tokens<PATH, 2, STRIPS>(values, parts, units, x, unit, total);
  }
}

// -- a block of rows ----------------------------------------------------------------------------------------------

// Scale and zero upon the sum of a group, and the sums of its activations.
template <int PATH, int BITS>
static inline vec with_scale(vec sum, vec scale, vec zero, vec group, float activations) {
  constexpr float SPAN = (float)(1 << BITS);
  // what a code of 0 counts as before the zero is taken off
  constexpr float OFFSET = PATH == BYTES ? 0.0f : PATH == HALVES && BITS == 8 ? SPAN + SPAN / 128 : SPAN;
  const vec whole = PATH == BYTES ? group : group * SPAN;
  return fused_more(scale, fused_less(zero + OFFSET, splat(activations), whole), sum);
}

// What the matrix adds when all groups are summed.
template <int BITS>
static inline void finish(const Matrix& m, int64_t at, vec value, float* out) {
  if (m.steps) value *= load(reinterpret_cast<const float*>(m.steps) + at);
  if (BITS == 1) value += value;  // a scale of one bit is half a step
  if (m.bias) value += load(reinterpret_cast<const float*>(m.bias) + at);
  store(out, value);
}

template <int PATH, int BITS>
static void block_of_one(const Matrix& m, int64_t block, const Token& x, float* out) {
  const int64_t group = m.columns / m.groups, per = (group + UNIT - 1) / UNIT;
  const uint8_t* lines = reinterpret_cast<const uint8_t*>(m.codes) + block * m.groups * per * LINE * BITS;
  vec sum[BLOCK_VECTORS] = {};
  for (int64_t g = 0; g < m.groups; ++g, lines += per * LINE * BITS) {
    float all = 0;
#pragma GCC unroll 1
    for (int64_t u = g * per; u < (g + 1) * per; ++u) all += x.sums[u];
MOEZIP_UNROLLED
    for (int v = 0; v < BLOCK_VECTORS; ++v) {
      const int64_t at = (block * m.groups + g) * BLOCK_ROWS + LANES * v;
      const vec found = one_token<PATH, BITS>(lines + 4 * LANES * v, per, x, g * per);
      sum[v] = with_scale<PATH, BITS>(sum[v], scale_of(m, at), zero_of(m, at), found, all);
    }
  }
  for (int v = 0; v < BLOCK_VECTORS; ++v) finish<BITS>(m, block * BLOCK_ROWS + LANES * v, sum[v], out + LANES * v);
}

// `blocks` blocks, 1 or 2, from `block` on.
template <int PATH, int BITS>
static void blocks_of_many(const Matrix& m, int tokens, int64_t block, int blocks, const Token* x, float* out) {
  constexpr int PARTS = BITS == 8 && (PATH == HALVES || (PATH == BYTES && !WHOLE_BYTES)) ? 2 : 1;
  const int64_t group = m.columns / m.groups, per = (group + UNIT - 1) / UNIT, size = m.groups * per * LINE * BITS;
  const uint8_t* lines = reinterpret_cast<const uint8_t*>(m.codes) + block * size;
  const int strips = blocks * BLOCK_VECTORS;
  uvec values[2 * STRIP_VALUES];
  for (int first = 0; first < strips; first += 2) {
    const int some = strips - first < 2 ? 1 : 2;
    const uint8_t* from[2];
    int64_t row[2];
    for (int r = 0; r < some; ++r) {
      from[r] = lines + (first + r) / BLOCK_VECTORS * size + (first + r) % BLOCK_VECTORS * 4 * LANES;
      row[r] = (first + r) % BLOCK_VECTORS * LANES;
    }
    vec sum[2 * TOKENS_AT_ONCE] = {};
    for (int64_t g = 0; g < m.groups; ++g) {
      float all[TOKENS_AT_ONCE] = {};
      for (int64_t u = g * per; u < (g + 1) * per; ++u)
#pragma GCC unroll 1
        for (int t = 0; t < tokens; ++t) all[t] += x[t].sums[u];
      vec total[2 * TOKENS_AT_ONCE] = {};
      for (int64_t u = 0; u < per; u += UNITS_AT_ONCE) {
        const int64_t units = per - u < UNITS_AT_ONCE ? per - u : UNITS_AT_ONCE;
        for (int r = 0; r < some; ++r)
          for (int64_t i = 0; i < units; ++i, from[r] += LINE * BITS)
            decode_unit<PATH, BITS>(from[r], values + STRIP_VALUES * r + MOST_VALUES * i);
        if (some == 2) by_tokens<PATH, 2>(tokens, values, PARTS, units, x, g * per + u, total);
        else by_tokens<PATH, 1>(tokens, values, PARTS, units, x, g * per + u, total);
      }
      for (int r = 0; r < some; ++r) {
        const int64_t at = ((block + (first + r) / BLOCK_VECTORS) * m.groups + g) * BLOCK_ROWS + row[r];
        const vec scale = scale_of(m, at), zero = zero_of(m, at);
        for (int t = 0; t < tokens; ++t) {
          vec& to = sum[TOKENS_AT_ONCE * r + t];
          to = with_scale<PATH, BITS>(to, scale, zero, total[TOKENS_AT_ONCE * r + t], all[t]);
        }
      }
    }
    for (int r = 0; r < some; ++r) {
      const int64_t number = (first + r) / BLOCK_VECTORS;
      for (int t = 0; t < tokens; ++t)
        finish<BITS>(m, (block + number) * BLOCK_ROWS + row[r], sum[TOKENS_AT_ONCE * r + t],
                     out + (number * tokens + t) * BLOCK_ROWS + row[r]);
    }
  }
}

template <int PATH, int BITS>
static void product_of(const Matrix& m, int tokens, int64_t block, int blocks, const Token* x, float* out) {
  if (tokens > 1) return blocks_of_many<PATH, BITS>(m, tokens, block, blocks, x, out);
  for (int i = 0; i < blocks; ++i) block_of_one<PATH, BITS>(m, block + i, *x, out + BLOCK_ROWS * i);
}

template <int PATH>
static void by_bits(const Matrix& m, int tokens, int64_t block, int blocks, const Token* x, float* out) {
  switch (m.bits) {
    case 1: return product_of<PATH, 1>(m, tokens, block, blocks, x, out);
    case 2: return product_of<PATH, 2>(m, tokens, block, blocks, x, out);
    case 3: return product_of<PATH, 3>(m, tokens, block, blocks, x, out);
    case 4: return product_of<PATH, 4>(m, tokens, block, blocks, x, out);
    case 5: return product_of<PATH, 5>(m, tokens, block, blocks, x, out);
    case 6: return product_of<PATH, 6>(m, tokens, block, blocks, x, out);
    case 7: return product_of<PATH, 7>(m, tokens, block, blocks, x, out);
    default: return product_of<PATH, 8>(m, tokens, block, blocks, x, out);
  }
}

// Where an instruction set has no products of its own for bytes, tokens were prepared as the floats that bytes stand for.
void product(const Matrix& m, [[maybe_unused]] int path, int tokens, int64_t block, int blocks, const Token* x,
             float* out) {
#if defined(__AVX512BF16__)
  if (path == HALVES) return by_bits<HALVES>(m, tokens, block, blocks, x, out);
#endif
#if defined(__AVX2__)
  if (path == BYTES) return by_bits<BYTES>(m, tokens, block, blocks, x, out);
#endif
  by_bits<FLOATS>(m, tokens, block, blocks, x, out);
}

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
