// Products of several tokens on the processor's matrix unit (AMX), for activations in bf16.
//
// A decoded unit of a block is a tile as that unit takes it: 16 rows of the matrix in the lanes, one pair of columns
// above the other. The same unit of up to 16 tokens, one above the other, is the other tile. So one instruction does
// what `many_tokens` does in 16 for every token.
#pragma once
#include "decode.h"

#if defined(__AMX_BF16__)

namespace moezip {
namespace MOEZIP_ISA {

constexpr int TILE_TOKENS = 16, MOST_IN_TILES = 2 * TILE_TOKENS;
static_assert(LANES == (int)BLOCK_ROWS, "a tile is a block wide");

// Rows and bytes per row of the eight tiles: sums are 0 to 3 (by tokens, then by blocks), tokens 4 and 5, blocks 6 and 7.
struct alignas(64) Tiles {
  uint8_t palette, start, nothing[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Compilers do not know what tiles read and write.
static inline void settle() { asm volatile("" ::: "memory"); }

static void shape_tiles(int tokens) {
  const uint8_t first = (uint8_t)(tokens < TILE_TOKENS ? tokens : TILE_TOKENS), second = (uint8_t)(tokens - first);
  Tiles tiles = {};
  tiles.palette = 1;
  const uint8_t rows[8] = {first, first, second, second, first, second, 16, 16};
  for (int i = 0; i < 8; ++i) {
    tiles.rows[i] = rows[i];
    tiles.bytes[i] = rows[i] ? 64 : 0;
  }
  settle();
  _tile_loadconfig(&tiles);
}

// One or two blocks by one or two tiles of tokens.
template <int BITS, int SETS, int BLOCKS>
static void in_tiles(const Matrix& m, int tokens, int64_t block, const Token* x, float* out) {
  constexpr int PARTS = BITS == 8 ? 2 : 1;
  const int64_t group = m.columns / m.groups, per = (group + UNIT - 1) / UNIT, size = m.groups * per * LINE * BITS;
  const uint8_t* lines = reinterpret_cast<const uint8_t*>(m.codes) + block * size;
  const int64_t pitch = x[1].values - x[0].values;
  bool even = true;
  for (int t = 2; t < tokens; ++t) even = even && x[t].values - x[t - 1].values == pitch;
  uvec values[2][BLOCKS][MOST_VALUES];  // of two units in turns, so that one is decoded while the other is multiplied
  alignas(64) uint32_t gathered[2][MOST_IN_TILES][16];
  alignas(64) float found[SETS][BLOCKS][TILE_TOKENS][BLOCK_ROWS];
  vec sum[BLOCKS][MOST_IN_TILES] = {};
  shape_tiles(tokens);
  for (int64_t g = 0; g < m.groups; ++g) {
    _tile_zero(0);
    if (BLOCKS == 2) _tile_zero(1);
    if (SETS == 2) _tile_zero(2);
    if (SETS == 2 && BLOCKS == 2) _tile_zero(3);
    for (int64_t u = g * per; u < (g + 1) * per; ++u) {
      auto& now = values[u % 2];
      for (int r = 0; r < BLOCKS; ++r) decode_unit<HALVES, BITS>(lines + r * size + u * LINE * BITS, now[r]);
      const uint32_t *first = x[0].values + 16 * u, *second = SETS == 2 ? x[TILE_TOKENS].values + 16 * u : nullptr;
      int64_t stride = 4 * pitch;
      if (!even) {
        for (int t = 0; t < tokens; ++t) store_words(gathered[u % 2][t], load_words(x[t].values + 16 * u));
        first = gathered[u % 2][0], second = gathered[u % 2][TILE_TOKENS], stride = 64;
      }
      settle();
      _tile_loadd(4, first, stride);
      if (SETS == 2) _tile_loadd(5, second, stride);
      for (int part = 0; part < PARTS; ++part) {
        _tile_loadd(6, now[0] + 16 * part, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (SETS == 2) _tile_dpbf16ps(2, 5, 6);
        if (BLOCKS == 2) {
          _tile_loadd(7, now[BLOCKS - 1] + 16 * part, 64);
          _tile_dpbf16ps(1, 4, 7);
          if (SETS == 2) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, found[0][0], 64);
    if (BLOCKS == 2) _tile_stored(1, found[0][BLOCKS - 1], 64);
    if (SETS == 2) _tile_stored(2, found[SETS - 1][0], 64);
    if (SETS == 2 && BLOCKS == 2) _tile_stored(3, found[SETS - 1][BLOCKS - 1], 64);
    settle();
    for (int r = 0; r < BLOCKS; ++r) {
      const int64_t at = ((block + r) * m.groups + g) * BLOCK_ROWS;
      const vec scale = scale_of(m, at), zero = zero_of(m, at);
      for (int t = 0; t < tokens; ++t)
        sum[r][t] = with_scale<HALVES, BITS>(sum[r][t], scale, zero, load(found[t / TILE_TOKENS][r][t % TILE_TOKENS]),
                                             x[t].sums[g]);
    }
  }
  for (int r = 0; r < BLOCKS; ++r)
    for (int t = 0; t < tokens; ++t)
      finish<BITS>(m, (block + r) * BLOCK_ROWS, sum[r][t], out + (r * tokens + t) * BLOCK_ROWS);
}

template <int BITS>
static void in_tiles_of(const Matrix& m, int tokens, int64_t block, int blocks, const Token* x, float* out) {
  if (tokens > TILE_TOKENS)
    blocks == 2 ? in_tiles<BITS, 2, 2>(m, tokens, block, x, out) : in_tiles<BITS, 2, 1>(m, tokens, block, x, out);
  else
    blocks == 2 ? in_tiles<BITS, 1, 2>(m, tokens, block, x, out) : in_tiles<BITS, 1, 1>(m, tokens, block, x, out);
}

// `blocks` blocks, 1 or 2, from `block` on, by 2 to MOST_IN_TILES tokens.
static void tiles_product(const Matrix& m, int tokens, int64_t block, int blocks, const Token* x, float* out) {
  Tiles before;
  _tile_storeconfig(&before);
  switch (m.bits) {
    case 1: in_tiles_of<1>(m, tokens, block, blocks, x, out); break;
    case 2: in_tiles_of<2>(m, tokens, block, blocks, x, out); break;
    case 3: in_tiles_of<3>(m, tokens, block, blocks, x, out); break;
    case 4: in_tiles_of<4>(m, tokens, block, blocks, x, out); break;
    case 5: in_tiles_of<5>(m, tokens, block, blocks, x, out); break;
    case 6: in_tiles_of<6>(m, tokens, block, blocks, x, out); break;
    case 7: in_tiles_of<7>(m, tokens, block, blocks, x, out); break;
    default: in_tiles_of<8>(m, tokens, block, blocks, x, out);
  }
  settle();
  if (before.palette) _tile_loadconfig(&before);  // oneDNN may count on the shapes that it left
  else _tile_release();
}

}  // namespace MOEZIP_ISA
}  // namespace moezip

#endif
