// The search for scales, for as many rows side by side as two vectors hold; see clip_search in kernels/__init__.py.
#pragma once
#include "simd.h"

namespace moezip {
namespace MOEZIP_ISA {

constexpr float SMALLEST = 0x1p-126f;  // its reciprocal is finite
constexpr float SMALLEST_SIGN = 0x1p-24f;
constexpr int PAIR = 2 * LANES;

struct Found {
  vec scale[2], zero[2];
};

// One group of one bit: twice the weighted mean of |w|, zero at one half.
static inline Found sign_scale(const float* tile, int64_t stride, const float* importance, const Search& search) {
  vec total[2] = {}, plain[2] = {};
  float mass = 0;
  for (int64_t at = 0; at < search.group; ++at) {
    mass += importance[at];
    for (int v = 0; v < 2; ++v) {
      vec w = load(tile + at * stride + v * LANES);
      vec size = w < 0.0f ? -w : w;
      total[v] += importance[at] * size;
      plain[v] += size;
    }
  }
  Found found;
  for (int v = 0; v < 2; ++v) {
    vec mean = mass > 0 ? total[v] / mass : plain[v] / (float)search.group;
    vec scale = stored(mean > SMALLEST ? mean : splat(SMALLEST_SIGN), search.dropped);
    found.scale[v] = scale + scale;
    found.zero[v] = splat(0.5f);
  }
  return found;
}

// tile: column c of the group, for PAIR rows, at tile + c * stride. importance: of the group's columns.
static inline Found search_scales(const float* tile, int64_t stride, const float* importance, const Search& search) {
  if (search.bits == 1) return sign_scale(tile, stride, importance, search);
  const vec top = splat((float)((1 << search.bits) - 1));
  const vec middle = splat((float)(1 << (search.bits - 1)));
  vec low[2] = {}, high[2] = {};
  for (int64_t at = 0; at < search.group; ++at)
    for (int v = 0; v < 2; ++v) {
      vec w = load(tile + at * stride + v * LANES);
      low[v] = smaller(w, low[v]);
      high[v] = larger(w, high[v]);
    }
  if (search.symmetric)
    for (int v = 0; v < 2; ++v) high[v] = larger(high[v], -low[v]);

  Found found = {};
  vec best[2] = {}, lower[2] = {}, upper[2] = {};
  auto trial = [&](const vec* low_share, const vec* high_share, bool first) {
    vec scale[2], zero[2], inverse[2], loss[2] = {};
    for (int v = 0; v < 2; ++v) {
      vec width = search.symmetric ? high[v] * high_share[v] / (top / 2.0f)
                                   : (high[v] * high_share[v] - low[v] * low_share[v]) / top;
      scale[v] = stored(width > SMALLEST ? width : splat(SMALLEST), search.dropped);
      scale[v] = high[v] > low[v] ? scale[v] : splat(1.0f);
      inverse[v] = 1.0f / scale[v];
      zero[v] = search.symmetric ? middle : quantized(-(low[v] * low_share[v]), inverse[v], vec{}, top);
    }
    for (int64_t at = 0; at < search.group; ++at)
      for (int v = 0; v < 2; ++v) {
        vec w = load(tile + at * stride + v * LANES);
        vec away = w - scale[v] * (quantized(w, inverse[v], zero[v], top) - zero[v]);
        loss[v] += importance[at] * (away * away);
      }
    for (int v = 0; v < 2; ++v) {
      if (first) {
        best[v] = loss[v], lower[v] = low_share[v], upper[v] = high_share[v];
        found.scale[v] = scale[v], found.zero[v] = zero[v];
        continue;
      }
      auto better = loss[v] < best[v];
      best[v] = better ? loss[v] : best[v];
      found.scale[v] = better ? scale[v] : found.scale[v];
      found.zero[v] = better ? zero[v] : found.zero[v];
      lower[v] = better ? low_share[v] : lower[v];
      upper[v] = better ? high_share[v] : upper[v];
    }
  };
  for (int64_t k = 0; k < search.shares; ++k) {
    vec share[2] = {splat(search.candidates[k]), splat(search.candidates[k])};
    trial(share, share, k == 0);
  }
  if (!search.symmetric && search.shares > 1) {
    for (int64_t k = 0; k < search.shares; ++k) {
      vec share[2] = {splat(search.candidates[k]), splat(search.candidates[k])}, other[2] = {upper[0], upper[1]};
      trial(share, other, false);
    }
    for (int64_t k = 0; k < search.shares; ++k) {
      vec share[2] = {splat(search.candidates[k]), splat(search.candidates[k])}, other[2] = {lower[0], lower[1]};
      trial(other, share, false);
    }
  }
  return found;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
