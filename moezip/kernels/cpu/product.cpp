// Products of activations with packed matrices, 16 rows at a time: rows lie in the lanes, activations are broadcast.
// A product costs a shift, an AND-OR and a multiplication for every vector of codes, and tokens beyond the first cost the
// multiplication alone.
#include "tiles.h"

namespace moezip {
namespace MOEZIP_ISA {

// -- the sum over a group -----------------------------------------------------------------------------------------
//
// For one token, codes are made numbers and multiplied at once, whatever the width: `one_token`. For several, a unit is
// made numbers first, which depends on the width and not on the tokens (`decode_unit`), and multiplied then, which
// depends on the tokens and not on the width (`many_tokens`): far less code, and a unit's numbers stay near.

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

// The same with a word of memory that only one vector meets: the instruction can spread it over the lanes itself, of
// which g++ 12 makes two.
#if defined(__AVX512BF16__)
static inline vec dot_halves_at(vec sum, uvec value, const uint32_t* pair) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(value), "m"(*pair));
  return sum;
}
#endif
#if defined(__AVX512VNNI__)
static inline uvec dot_bytes_at(uvec sum, uvec codes, const uint32_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*four));
  return sum;
}
#elif defined(__AVX2__)
static inline uvec dot_bytes_at(uvec sum, uvec codes, const uint32_t* four) { return dot_bytes(sum, codes, *four); }
#endif

// Words of a unit of activations.
template <int PATH>
constexpr int64_t UNIT_WORDS = PATH == FLOATS ? 32 : PATH == HALVES ? 16 : 8;

// Whether codes at neighbouring places share a shift, so that one of them stays APART bits off its place: in bytes the
// odd one above it, in halves, whose sums are of 1 + q / 2^BITS, the even one below.
template <int PATH, int BITS>
constexpr bool PAIRED = PATH != FLOATS && (BITS <= 3 || (BITS == 4 && PATH == BYTES && WHOLE_BYTES));
template <int BITS>
constexpr int APART = BITS == 3 ? 2 : BITS;  // of 3 bits only the upper two share it

// Sum over `units` units of x (1 + q / 2^BITS), or of x q for bytes; where codes are paired, the 1 of even places counts
// 2^APART times. A sum of products waits for the one before it, several cycles, of which each begins two: hence eight
// sums side by side. Those of bytes begin anew with every unit, so that units run side by side.
template <int PATH, int BITS>
__attribute__((always_inline)) static inline vec one_token(const uint8_t* lines, int64_t units, const uint32_t* from,
                                                           [[maybe_unused]] const float* steps) {
  vec sum[8] = {};
  for (; units > 0; --units, lines += LINE * BITS, from += UNIT_WORDS<PATH>) {
    const Unit<BITS> unit(lines);
    if constexpr (PATH == FLOATS) {
MOEZIP_UNROLLED
      for (int s = 0; s < 8; ++s)
MOEZIP_UNROLLED
        for (int b = 0; b < 4; ++b) {
          vec& to = sum[4 * (s % 2) + b];
          to = fused_more((vec)floats_value<BITS>(unit, s, b), splat(as_floats(from)[s + 8 * b]), to);
        }
    }
#if defined(__AVX512BF16__)
    if constexpr (PATH == HALVES) {
MOEZIP_UNROLLED
      for (int s = 0; s < 8; ++s)
MOEZIP_UNROLLED
        for (int h = 0; h < 2; ++h) {
          vec& to = sum[2 * (s % 4) + h];
          const int low = PAIRED<PATH, BITS> && s % 2 == 0 ? 7 - BITS - APART<BITS> : 7 - BITS;
          to = dot_halves_at(to, halves_value<BITS>(unit, s, h, low), from + s + 8 * h);
          if (BITS == 8) to = dot_halves_at(to, halves_lowest<BITS>(unit, s, h), from + s + 8 * h);
        }
    }
#endif
#if defined(__AVX2__)
    if constexpr (PATH == BYTES) {
      uvec part[2] = {}, high = {};
MOEZIP_UNROLLED
      for (int s = 0; s < 8; ++s) {
        if (BITS == 8 && !WHOLE_BYTES) {
          const uvec word = unit.line[s % BITS];
          part[s % 2] = dot_bytes_at(part[s % 2], word & 0x0F0F0F0Fu, from + s);
          high = dot_bytes_at(high, (word >> 4) & 0x0F0F0F0Fu, from + s);
        } else {
          const int low = PAIRED<PATH, BITS> && s % 2 ? APART<BITS> : 0;
          part[s % 2] = dot_bytes_at(part[s % 2], bytes_value<BITS>(unit, s, low), from + s);
        }
      }
      if (PAIRED<PATH, BITS>) part[1] = (uvec)((ivec)part[1] >> APART<BITS>);
      sum[0] = fused_more(to_floats(part[0] + part[1] + (high << 4)), splat(*steps++), sum[0]);
    }
#endif
  }
  if (PATH == BYTES) return sum[0];
  if (PAIRED<PATH, BITS>) {
    const vec even = (sum[0] + sum[1]) + (sum[4] + sum[5]), odd = (sum[2] + sum[3]) + (sum[6] + sum[7]);
    return fused_more(even, splat(1 << APART<BITS>), odd);
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
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

template <int PATH, int BITS>
static void block_of_one(const Matrix& m, int64_t block, const Token& x, float* out) {
  const int64_t group = m.columns / m.groups, per = (group + UNIT - 1) / UNIT;
  const uint8_t* lines = reinterpret_cast<const uint8_t*>(m.codes) + block * m.groups * per * LINE * BITS;
  const uint32_t* values = x.values;
  const float* steps = x.steps;
  int64_t at = block * m.groups * BLOCK_ROWS;
  vec sum[BLOCK_VECTORS] = {};
  for (int64_t g = 0; g < m.groups; ++g) {
    ask_for_scales(m, at);
    float ones = x.sums[g];
    if (PAIRED<PATH, BITS>) ones += (float)((1 << APART<BITS>) - 1) * x.evens[g];
MOEZIP_UNROLLED
    for (int v = 0; v < BLOCK_VECTORS; ++v) {
      const vec found = one_token<PATH, BITS>(lines + 4 * LANES * v, per, values, steps);
      sum[v] = with_scale<PATH, BITS>(sum[v], scale_of(m, at + LANES * v), zero_of(m, at + LANES * v), found, x.sums[g],
                                      ones);
    }
    lines += per * LINE * BITS, values += per * UNIT_WORDS<PATH>, steps += per, at += BLOCK_ROWS;
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
          to = with_scale<PATH, BITS>(to, scale, zero, total[TOKENS_AT_ONCE * r + t], x[t].sums[g]);
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
#if defined(__AMX_BF16__)
  if (path == HALVES && tokens > 1) return tiles_product(m, tokens, block, blocks, x, out);
#endif
#if defined(__AVX512BF16__)
  if (path == HALVES) return by_bits<HALVES>(m, tokens, block, blocks, x, out);
#endif
#if defined(__AVX2__)
  if (path == BYTES) return by_bits<BYTES>(m, tokens, block, blocks, x, out);
#endif
  by_bits<FLOATS>(m, tokens, block, blocks, x, out);
}

// How many of `left` tokens the next product takes.
int take([[maybe_unused]] int path, int64_t left) {
#if defined(__AMX_BF16__)
  if (path == HALVES) return left < MOST_IN_TILES ? (int)left : MOST_IN_TILES;
#endif
  int some = TOKENS_AT_ONCE;
  while (some > left) some /= 2;
  return some;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
