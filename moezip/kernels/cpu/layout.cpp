// From the layout on disk to the one of products (kernels.h) and back to codes, and to plain numbers.
#include "decode.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moezip {
namespace MOEZIP_ISA {

// Eight codes, side by side in BITS bytes, to the bytes that a row's words get of them, in the order of lines.
template <int BITS>
static inline uint64_t planes(uint64_t codes) {
  if (BITS == 8 || BITS == 4 || BITS == 2 || BITS == 1) return codes;
  constexpr uint64_t EVERY =  // the lowest bit of each code
      1ull | 1ull << BITS | 1ull << 2 * BITS | 1ull << 3 * BITS | 1ull << 4 * BITS | 1ull << 5 * BITS |
      1ull << 6 * BITS | 1ull << 7 * BITS;
  uint64_t found = 0;
  int to = 0;
#if defined(__BMI2__)
  if (BITS & 4) found |= _pext_u64(codes, EVERY * 15 << (BITS - 4)), to += 32;
  if (BITS & 2) found |= _pext_u64(codes, EVERY * 3 << (BITS & 1)) << to, to += 16;
  if (BITS & 1) found |= _pext_u64(codes, EVERY) << to;
#else
  (void)EVERY;
  const uint64_t apart = spread(codes, BITS), each = 0x0101010101010101u;
  if (BITS & 4) found |= squeezed((apart >> (BITS - 4)) & each * 15, 4), to += 32;
  if (BITS & 2) found |= squeezed((apart >> (BITS & 1)) & each * 3, 2) << to, to += 16;
  if (BITS & 1) found |= squeezed(apart & each, 1) << to;
#endif
  return found;
}

// The inverse: the codes, a byte each.
template <int BITS>
static inline uint64_t codes_of(uint64_t found) {
  if (BITS == 8 || BITS == 4 || BITS == 2 || BITS == 1) return spread(found, BITS);
  uint64_t apart = 0;
  if (BITS & 4) apart |= spread(found & 0xFFFFFFFFu, 4) << (BITS - 4), found >>= 32;
  if (BITS & 2) apart |= spread(found & 0xFFFF, 2) << (BITS & 1), found >>= 16;
  if (BITS & 1) apart |= spread(found & 0xFF, 1);
  return apart;
}

// Rows that are laid out side by side: single words take twice as long to write as those of four rows.
constexpr int RELAID = 4;

// The four chunks of a unit of a row; reads up to 8 bytes of each where `whole` says that they are there.
template <int BITS>
static inline void read_chunks(const uint8_t* from, bool whole, uint64_t chunks[4]) {
MOEZIP_UNROLLED
  for (int b = 0; b < 4; ++b) {
    chunks[b] = 0;
    if (whole) memcpy(chunks + b, from + b * BITS, 8);
    else memcpy(chunks + b, from + b * BITS, BITS);
    chunks[b] = planes<BITS>(chunks[b]);
  }
}

// Byte i of each of a row's chunks to its word in line i.
template <int BITS>
static inline void relay_unit(const uint8_t* const* from, int64_t at, bool whole, uint8_t* out) {
#if defined(__x86_64__)
  __m128i words[2][RELAID];  // of lines 0 to 3, and 4 to 7
MOEZIP_UNROLLED
  for (int row = 0; row < RELAID; ++row) {
    uint64_t chunks[4];
    read_chunks<BITS>(from[row] + at, whole, chunks);
    __m128i chunk[4];
MOEZIP_UNROLLED
    for (int b = 0; b < 4; ++b) chunk[b] = _mm_cvtsi64_si128((int64_t)chunks[b]);
    const __m128i first = _mm_unpacklo_epi8(chunk[0], chunk[1]), second = _mm_unpacklo_epi8(chunk[2], chunk[3]);
    words[0][row] = _mm_unpacklo_epi16(first, second), words[1][row] = _mm_unpackhi_epi16(first, second);
  }
MOEZIP_UNROLLED
  for (int half = 0; half < 2; ++half) {
    const __m128i* row = words[half];
    const __m128i low = _mm_unpacklo_epi32(row[0], row[1]), low2 = _mm_unpacklo_epi32(row[2], row[3]);
    const __m128i high = _mm_unpackhi_epi32(row[0], row[1]), high2 = _mm_unpackhi_epi32(row[2], row[3]);
    const __m128i lines[4] = {_mm_unpacklo_epi64(low, low2), _mm_unpackhi_epi64(low, low2),
                              _mm_unpacklo_epi64(high, high2), _mm_unpackhi_epi64(high, high2)};
MOEZIP_UNROLLED
    for (int line = 0; line < 4; ++line)
      if (4 * half + line < BITS)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + LINE * (4 * half + line)), lines[line]);
  }
#else
  for (int row = 0; row < RELAID; ++row) {
    uint64_t chunks[4];
    read_chunks<BITS>(from[row] + at, whole, chunks);
    for (int b = 0; b < 4; ++b)
      for (int line = 0; line < BITS; ++line) out[LINE * line + 4 * row + b] = (uint8_t)(chunks[b] >> (8 * line));
  }
#endif
}

// A row whose groups are filled up to whole units, or one that is not there.
template <int BITS>
static const uint8_t* filled_row(const Relay& job, int64_t row, uint8_t* scratch) {
  const int64_t group = job.columns / job.groups, per = (group + UNIT - 1) / UNIT, units = job.groups * per;
  uint8_t *plain = scratch, *filled = scratch + job.columns + 64, *again = filled + units * UNIT + 64;
  if (row >= job.rows) return static_cast<uint8_t*>(memset(again, 0, (size_t)(units * 4 * BITS)));
  const uint8_t* from = reinterpret_cast<const uint8_t*>(job.packed + row * job.words);
  if (group % UNIT == 0) return from;
  unpack_row<BITS>(from, 4 * job.words, plain, job.columns);
  memset(filled, 0, (size_t)(units * UNIT));
  for (int64_t g = 0; g < job.groups; ++g) memcpy(filled + g * per * UNIT, plain + g * group, (size_t)group);
  pack_row<BITS>(filled, units * UNIT, again, units * 4 * BITS);
  return again;
}

template <int BITS>
static void relay_block(const Relay& job, int64_t block, uint8_t* scratch, int64_t row_scratch) {
  const int64_t group = job.columns / job.groups, units = job.groups * ((group + UNIT - 1) / UNIT);
  const int64_t end = units * 4 * BITS;
  for (int64_t row = 0; row < BLOCK_ROWS; row += RELAID) {
    const uint8_t* from[RELAID];
    for (int r = 0; r < RELAID; ++r)
      from[r] = filled_row<BITS>(job, block * BLOCK_ROWS + row + r, scratch + r * row_scratch);
    uint8_t* to = reinterpret_cast<uint8_t*>(job.codes) + block * units * LINE * BITS + 4 * row;
    for (int64_t unit = 0; unit < units; ++unit, to += LINE * BITS) {
      const int64_t at = 4 * BITS * unit;
      if constexpr (BITS == 1) {  // a row's word is as it was
        for (int r = 0; r < RELAID; ++r) memcpy(to + 4 * r, from[r] + at, 4);
      } else if (at + 3 * BITS + 8 <= end) {
        relay_unit<BITS>(from, at, true, to);
      } else {
        relay_unit<BITS>(from, at, false, to);
      }
    }
  }
}

int relay(const Relay& job, int64_t first, int64_t last) {
  const int64_t padded = job.columns + job.groups * UNIT, row = 3 * padded + 256;
  uint8_t* scratch = static_cast<uint8_t*>(malloc((size_t)(RELAID * row)));
  if (!scratch) return NO_MEMORY;
  for (int64_t block = first; block < last; ++block) {
#define CALL(BITS) relay_block<BITS>(job, block, scratch, row)
    MOEZIP_BY_BITS(CALL)
#undef CALL
  }
  free(scratch);
  return OK;
}

template <int BITS>
static void unrelay_block(const Relay& job, int64_t block) {
  const int64_t group = job.columns / job.groups, per = (group + UNIT - 1) / UNIT, units = job.groups * per;
  const uint8_t* from = reinterpret_cast<const uint8_t*>(job.codes) + block * units * LINE * BITS;
  for (int64_t row = 0; row < BLOCK_ROWS && block * BLOCK_ROWS + row < job.rows; ++row)
    for (int64_t unit = 0; unit < units; ++unit) {
      uint64_t apart[4];
      for (int b = 0; b < 4; ++b) {
        uint64_t found = 0;
        for (int line = 0; line < BITS; ++line)
          found |= (uint64_t)from[unit * LINE * BITS + LINE * line + 4 * row + b] << (8 * line);
        apart[b] = codes_of<BITS>(found);
      }
      const int64_t inside = unit % per * UNIT, there = group - inside < UNIT ? group - inside : UNIT;
      memcpy(job.plain + (block * BLOCK_ROWS + row) * job.columns + unit / per * group + inside, apart, (size_t)there);
    }
}

int unrelay(const Relay& job, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
#define CALL(BITS) unrelay_block<BITS>(job, block)
    MOEZIP_BY_BITS(CALL)
#undef CALL
  }
  return OK;
}

// -- plain numbers ------------------------------------------------------------------------------------------------

template <int BITS>
static void decode_floats(const uint8_t* lines, uvec* values) {
  decode_unit<FLOATS, BITS>(lines, values);
}

static void (*const DECODE[])(const uint8_t*, uvec*) = {decode_floats<1>, decode_floats<2>, decode_floats<3>,
                                                        decode_floats<4>, decode_floats<5>, decode_floats<6>,
                                                        decode_floats<7>, decode_floats<8>};

// One unit of one block, from row `row` of the result's columns on.
static void plain_unit(const Plain& job, int64_t block, int64_t unit, int64_t per) {
  const Matrix& m = job.matrix;
  const int64_t group = m.columns / m.groups, inside = unit % per * UNIT, g = unit / per;
  const int64_t there = group - inside < UNIT ? group - inside : UNIT;
  const int64_t left = m.rows - block * BLOCK_ROWS, rows = left < BLOCK_ROWS ? left : BLOCK_ROWS;
  const float span = (float)(1 << m.bits);
  const uint8_t* lines =
      reinterpret_cast<const uint8_t*>(m.codes) + (block * m.groups * per + unit) * LINE * m.bits;
  for (int v = 0; v < BLOCK_VECTORS && LANES * v < rows; ++v) {
    uvec values[MOST_VALUES];
    DECODE[m.bits - 1](lines + 4 * LANES * v, values);
    const int64_t at = (block * m.groups + g) * BLOCK_ROWS + LANES * v;
    vec scale = m.bits == 1 ? scale_of(m, at) * 2.0f : scale_of(m, at);
    if (m.steps) scale *= load(reinterpret_cast<const float*>(m.steps) + block * BLOCK_ROWS + LANES * v);
    const vec zero = zero_of(m, at);
    const int64_t some = rows - LANES * v < LANES ? rows - LANES * v : LANES;
    int64_t to = (g * group + inside) * m.rows + block * BLOCK_ROWS + LANES * v;
    for (int64_t k = 0; k < there; ++k, to += m.rows) {
      const vec value = scale * (((vec)values[k] * span - span) - zero);  // the code is exact
      if (job.dtype == F32) {
        if (some == LANES) store(static_cast<float*>(job.out) + to, value);
        else memcpy(static_cast<float*>(job.out) + to, &value, (size_t)(4 * some));
      } else {
        uint16_t halves[LANES];
        uint16_t* out = static_cast<uint16_t*>(job.out) + to;
        store_upper(some == LANES ? out : halves, rounded_halves(value));
        if (some < LANES) memcpy(out, halves, (size_t)(2 * some));
      }
    }
  }
}

// Two blocks at a time: 32 rows of bf16 fill a line of the result, those of one block half of one.
int plain(const Plain& job, int64_t first, int64_t last) {
  const Matrix& m = job.matrix;
  const int64_t blocks = (m.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, per = (m.columns / m.groups + UNIT - 1) / UNIT;
  for (int64_t pair = first; pair < last; ++pair)
    for (int64_t unit = 0; unit < m.groups * per; ++unit)
      for (int64_t block = 2 * pair; block < blocks && block < 2 * pair + 2; ++block) plain_unit(job, block, unit, per);
  return OK;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
