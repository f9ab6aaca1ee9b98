// What the compilers' functions for AMX do, in plain C++, for machines without it: put before a source by `tests/amx.py`.
//
// Facts are from Intel's instruction set reference (TDPBF16PS, TILELOADD, ...): a tile has up to 16 rows of up to 64
// bytes, and a product of tiles adds, for each row of the first and each lane of the second, products of pairs of bf16.
// The processor flushes numbers below the normal ones to 0 and this does not; tests do not reach so far down.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace emulated {

struct Shapes {
  uint8_t palette, start, nothing[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static thread_local Shapes shapes;
static thread_local uint8_t tiles[8][16][64];

// An instruction on a tile without a shape, or on shapes that do not fit, is a fault on the processor too.
static inline void require(bool fine) {
  if (!fine) __builtin_trap();
}

static inline void load_config(const void* from) {
  memcpy(&shapes, from, sizeof(shapes));
  memset(tiles, 0, sizeof(tiles));
}
static inline void store_config(void* to) { memcpy(to, &shapes, sizeof(shapes)); }
static inline void release() { memset(&shapes, 0, sizeof(shapes)); }

static inline void zero(int tile) {
  require(shapes.rows[tile]);
  memset(tiles[tile], 0, sizeof(tiles[tile]));
}
static inline void load(int tile, const void* from, int64_t stride) {
  require(shapes.rows[tile] && shapes.bytes[tile]);
  memset(tiles[tile], 0, sizeof(tiles[tile]));
  for (int row = 0; row < shapes.rows[tile]; ++row)
    memcpy(tiles[tile][row], static_cast<const uint8_t*>(from) + row * stride, shapes.bytes[tile]);
}
static inline void store(int tile, void* to, int64_t stride) {
  require(shapes.rows[tile] && shapes.bytes[tile]);
  for (int row = 0; row < shapes.rows[tile]; ++row)
    memcpy(static_cast<uint8_t*>(to) + row * stride, tiles[tile][row], shapes.bytes[tile]);
}

static inline float widened(const uint8_t* half) {
  uint32_t bits = 0;
  memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, half, 2);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline void products(int sum, int left, int right) {
  const int rows = shapes.rows[left], pairs = shapes.bytes[left] / 4, lanes = shapes.bytes[right] / 4;
  require(rows && shapes.rows[sum] == rows && shapes.rows[right] == pairs && shapes.bytes[sum] == shapes.bytes[right]);
  for (int row = 0; row < rows; ++row)
    for (int pair = 0; pair < pairs; ++pair)
      for (int lane = 0; lane < lanes; ++lane) {
        const uint8_t *x = tiles[left][row] + 4 * pair, *y = tiles[right][pair] + 4 * lane;
        float value;
        memcpy(&value, tiles[sum][row] + 4 * lane, 4);
        value += widened(x) * widened(y);
        value += widened(x + 2) * widened(y + 2);
        memcpy(tiles[sum][row] + 4 * lane, &value, 4);
      }
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_storeconfig emulated::store_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::products
