// Vectors of the widest kind that this copy of the code may use. MOEZIP_ISA names the copy.
//
// Compiled with -ffp-contract=off: a multiplication and an addition are fused only where fused() says so, so that codes
// and scales do not depend on the instruction set.
#pragma once
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

// Loops over vectors that must end up in registers, whatever the compiler thinks that is worth.
#if defined(__clang__)
#define MOEZIP_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define MOEZIP_UNROLLED _Pragma("GCC unroll 8")
#endif

namespace moezip {
namespace MOEZIP_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4, ROWS_AT_ONCE = 8;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, WIDE = 2, ROWS_AT_ONCE = 4;
#else
constexpr int LANES = 4, WIDE = 2, ROWS_AT_ONCE = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float* from) { return *reinterpret_cast<const loose*>(from); }
static inline void store(float* to, vec v) { *reinterpret_cast<loose*>(to) = v; }

typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t loose_words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline uvec load_words(const void* from) { return *reinterpret_cast<const loose_words*>(from); }
static inline void store_words(void* to, uvec v) { *reinterpret_cast<loose_words*>(to) = v; }
// Written out, because compilers take a general conversion apart into single lanes.
static inline uvec widened(const uint16_t* from) {
#if defined(__AVX512F__)
  return (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return uvec{from[0], from[1], from[2], from[3]};
#endif
}
static inline uvec widened(const uint8_t* from) {
#if defined(__AVX512F__)
  return (uvec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (uvec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return uvec{from[0], from[1], from[2], from[3]};
#endif
}
// The upper half of each lane.
static inline void store_upper(uint16_t* to, uvec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_srli_epi32((__m256i)v, 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
  for (int lane = 0; lane < LANES; ++lane) to[lane] = (uint16_t)(v[lane] >> 16);
#endif
}
static inline vec to_floats(uvec whole) { return __builtin_convertvector((ivec)whole, vec); }

// The nearest bf16, ties to even, in the upper half of each lane. NaN is not looked after.
static inline uvec rounded_halves(vec x) { return ((uvec)x + 0x7FFF + (((uvec)x >> 16) & 1)) & 0xFFFF0000u; }

static inline vec splat(float x) {
#if defined(__AVX512F__)
  return (vec)_mm512_set1_ps(x);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vec)_mm256_set1_ps(x);
#else
  return vec{x, x, x, x};
#endif
}

// sum - a * b and sum + a * b, rounded once where the hardware can.
static inline vec fused_less(vec a, vec b, vec sum) {
#if defined(__AVX512F__)
  return (vec)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vec)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum - a * b;
#endif
}

static inline vec fused_more(vec a, vec b, vec sum) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

static inline vec smaller(vec a, vec b) { return a < b ? a : b; }  // b if a is NaN
static inline vec larger(vec a, vec b) { return a > b ? a : b; }

// Nearest integer, ties to even, for numbers from 0 to 2^22: adding 1.5 * 2^23 leaves no bits after the point.
constexpr float SHIFT = 12582912.0f;
static inline vec nearest(vec x) { return (x + SHIFT) - SHIFT; }

// clamp(rint(weight / scale + zero), 0, top), with inverse = 1 / scale.
static inline vec quantized(vec weight, vec inverse, vec zero, vec top) {
  return nearest(smaller(larger(weight * inverse + zero, vec{}), top));
}

// Whole numbers from 0 to 255, as LANES bytes.
static inline void store_bytes(uint8_t* to, vec whole) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)whole)));
#elif defined(__AVX2__) && defined(__FMA__)
  const __m256i wide = _mm256_cvtps_epi32((__m256)whole);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  for (int lane = 0; lane < LANES; ++lane) to[lane] = (uint8_t)(int32_t)whole[lane];
#endif
}

// Significand cut to what is stored, ties to even.
static inline vec stored(vec scale, int dropped) {
  if (!dropped) return scale;
  uvec bits = (uvec)scale;
  bits += ((1u << (dropped - 1)) - 1) + ((bits >> dropped) & 1);
  return (vec)(bits & ~((1u << dropped) - 1));
}

// Sum and largest of the lanes, by halves.
static inline float sum_of(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

static inline float largest_of(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
  const float even = v[0] > v[2] ? v[0] : v[2], odd = v[1] > v[3] ? v[1] : v[3];
  return even > odd ? even : odd;
#endif
}

static inline float* floats(int64_t count) {
  return static_cast<float*>(aligned_alloc(64, (static_cast<size_t>(count) * 4 + 63) / 64 * 64 + 64));
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
