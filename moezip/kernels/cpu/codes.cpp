// Rounding, packing and what undoes them. Rows are streams of bits, lowest bit first, padded to words of 32 bits.
// Little-endian machines only: eight codes are looked at as one number of 64 bits.
#include "simd.h"

namespace moezip {
namespace MOEZIP_ISA {

int round(const Codes& job, int64_t first, int64_t last) {
  const int64_t count = job.columns / job.group;
  const vec top = splat((float)((1 << job.bits) - 1));
  for (int64_t row = first; row < last; ++row)
    for (int64_t g = 0; g < count; ++g) {
      const float* from = job.weight + row * job.columns + g * job.group;
      uint8_t* to = job.codes + row * job.columns + g * job.group;
      const vec zero = splat(job.zeros[row * count + g]), inverse = splat(1.0f / job.scales[row * count + g]);
      int64_t c = 0;
      for (; c + LANES <= job.group; c += LANES) store_bytes(to + c, quantized(load(from + c), inverse, zero, top));
      if (c == job.group) continue;
      float rest[LANES] = {};
      uint8_t codes[LANES];
      memcpy(rest, from + c, (size_t)(4 * (job.group - c)));
      store_bytes(codes, quantized(load(rest), inverse, zero, top));
      memcpy(to + c, codes, (size_t)(job.group - c));
    }
  return OK;
}

// Eight bytes with `bits` bits each, to 8 * bits bits side by side: neighbours are joined to pairs, fours, eight.
static inline uint64_t squeezed(uint64_t x, int bits) {
  x = (x & 0x00FF00FF00FF00FFu) | ((x & 0xFF00FF00FF00FF00u) >> (8 - bits));
  x = (x & 0x0000FFFF0000FFFFu) | ((x & 0xFFFF0000FFFF0000u) >> (16 - 2 * bits));
  return (x & 0x00000000FFFFFFFFu) | ((x & 0xFFFFFFFF00000000u) >> (32 - 4 * bits));
}

static inline uint64_t spread(uint64_t x, int bits) {
  const uint64_t four = (1ull << (4 * bits)) - 1, two = (1ull << (2 * bits)) - 1, one = (1ull << bits) - 1;
  x = (x & four) | ((x & (four << (4 * bits))) << (32 - 4 * bits));
  x = (x & (two | two << 32)) | ((x & ((two | two << 32) << (2 * bits))) << (16 - 2 * bits));
  const uint64_t ones = one | one << 16 | one << 32 | one << 48;
  return (x & ones) | ((x & (ones << bits)) << (8 - bits));
}

template <int BITS>
static void pack_row(const uint8_t* codes, int64_t columns, uint8_t* out, int64_t bytes) {
  int64_t at = 0, to = 0;
  for (; at + 8 <= columns && to + 8 <= bytes; at += 8, to += BITS) {
    uint64_t x;
    memcpy(&x, codes + at, 8);
    x = squeezed(x, BITS);
    memcpy(out + to, &x, 8);  // what is too much is written over by the next one
  }
  memset(out + to, 0, (size_t)(bytes - to));
  for (; at < columns; at += 8, to += BITS) {
    uint64_t x = 0;
    memcpy(&x, codes + at, (size_t)(columns - at < 8 ? columns - at : 8));
    x = squeezed(x, BITS);
    memcpy(out + to, &x, (size_t)(bytes - to < BITS ? bytes - to : BITS));
  }
}

template <int BITS>
static void unpack_row(const uint8_t* in, int64_t bytes, uint8_t* codes, int64_t columns) {
  int64_t at = 0, from = 0;
  for (; at + 8 <= columns && from + 8 <= bytes; at += 8, from += BITS) {
    uint64_t x;
    memcpy(&x, in + from, 8);
    x = spread(x, BITS);
    memcpy(codes + at, &x, 8);
  }
  for (; at < columns; at += 8, from += BITS) {
    uint64_t x = 0;
    memcpy(&x, in + from, (size_t)(bytes - from < BITS ? bytes - from : BITS));
    x = spread(x, BITS);
    memcpy(codes + at, &x, (size_t)(columns - at < 8 ? columns - at : 8));
  }
}

// The widths as constants, so that shifts and masks are.
#define MOEZIP_BY_BITS(CALL) \
  switch (job.bits) {        \
    case 1: CALL(1); break;  \
    case 2: CALL(2); break;  \
    case 3: CALL(3); break;  \
    case 4: CALL(4); break;  \
    case 5: CALL(5); break;  \
    case 6: CALL(6); break;  \
    case 7: CALL(7); break;  \
    default: CALL(8);        \
  }

int pack(const Codes& job, int64_t first, int64_t last) {
#define CALL(BITS)                                                 \
  for (int64_t row = first; row < last; ++row)                     \
  pack_row<BITS>(job.codes + row * job.columns, job.columns,       \
                 reinterpret_cast<uint8_t*>(job.packed + row * job.words), 4 * job.words)
  MOEZIP_BY_BITS(CALL)
#undef CALL
  return OK;
}

int unpack(const Codes& job, int64_t first, int64_t last) {
#define CALL(BITS)                                                                                          \
  for (int64_t row = first; row < last; ++row)                                                              \
  unpack_row<BITS>(reinterpret_cast<const uint8_t*>(job.packed + row * job.words), 4 * job.words,           \
                   job.codes + row * job.columns, job.columns)
  MOEZIP_BY_BITS(CALL)
#undef CALL
  return OK;
}

int dequantize(const Codes& job, int64_t first, int64_t last) {
  const int64_t count = job.columns / job.group;
  uint8_t* codes = reinterpret_cast<uint8_t*>(floats(job.columns / 4 + 1));
  if (!codes) return NO_MEMORY;
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* words = reinterpret_cast<const uint8_t*>(job.packed + row * job.words);
#define CALL(BITS) unpack_row<BITS>(words, 4 * job.words, codes, job.columns)
    MOEZIP_BY_BITS(CALL)
#undef CALL
    for (int64_t g = 0; g < count; ++g) {
      const uint8_t* from = codes + g * job.group;
      const int64_t to = row * job.columns + g * job.group;
      const float scale = job.scales[row * count + g], zero = job.zeros[row * count + g];
      if (job.values) {
        float* values = job.values + to;
        for (int64_t c = 0; c < job.group; ++c) values[c] = scale * ((float)from[c] - zero);
        continue;
      }
      uint16_t* halves = job.halves + to;
      for (int64_t c = 0; c < job.group; ++c) {
        const float value = scale * ((float)from[c] - zero);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        halves[c] = (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
      }
    }
  }
  free(codes);
  return OK;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
