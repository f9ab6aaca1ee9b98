// What stands between packed matrices when a model takes a few tokens: matrices that are not packed, RMS norms, and the
// attention of one query. All of it is memory that is read once, so the widest reads count and little else.
#include "simd.h"

namespace moezip {
namespace MOEZIP_ISA {

// -- numbers of a row, some at a time -----------------------------------------------------------------------------

// Columns that one multiplication takes: a vector of floats, or one of pairs of bf16 where the processor sums these.
#if defined(__AVX512BF16__)
template <int DTYPE>
constexpr int64_t STEP = DTYPE == BF16 ? 2 * LANES : LANES;
#else
template <int DTYPE>
constexpr int64_t STEP = LANES;
#endif

template <int DTYPE>
static inline const uint8_t* at(const void* from, int64_t column) {
  return static_cast<const uint8_t*>(from) + column * (DTYPE == BF16 ? 2 : 4);
}

typedef uint32_t anywhere __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

template <int DTYPE>
static inline uvec read(const uint8_t* from) {
  if constexpr (DTYPE == BF16 && STEP<DTYPE> == LANES)
    return widened(reinterpret_cast<const uint16_t*>(from)) << 16;
  return *reinterpret_cast<const anywhere*>(from);  // a row of an odd number of halves begins at no word
}

// The first `left` columns, fewer than a step, and zeros.
template <int DTYPE>
static inline uvec read_some(const uint8_t* from, int64_t left) {
  alignas(64) uint8_t filled[4 * LANES] = {};
  memcpy(filled, from, (size_t)(left * (DTYPE == BF16 ? 2 : 4)));
  return read<DTYPE>(filled);
}

template <int DTYPE>
static inline vec times(vec sum, uvec one, uvec other) {
#if defined(__AVX512BF16__)
  if constexpr (DTYPE == BF16)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)one, (__m512bh)(__m512i)other);
#endif
  return fused_more((vec)one, (vec)other, sum);
}

// -- a matrix times some tokens -----------------------------------------------------------------------------------

// Products of one row with TOKENS tokens, out[rows t]. Rows are read one after the other, and asked for ahead: two side
// by side would take twice as long.
template <int DTYPE, int TOKENS>
static void dense_row(const Dense& job, const uint8_t* row, const uint8_t* x, int64_t rows, float* out) {
  constexpr int CHAINS = TOKENS == 1 ? 8 : TOKENS == 2 ? 4 : 2;
  constexpr int64_t WIDE = CHAINS * STEP<DTYPE>;
  const int64_t pitch = job.columns * (DTYPE == BF16 ? 2 : 4);
  vec sum[TOKENS][CHAINS] = {};
  int64_t column = 0;
  for (; column + WIDE <= job.columns; column += WIDE) {
MOEZIP_UNROLLED
    for (int c = 0; c < CHAINS; ++c) {
      const uint8_t* from = at<DTYPE>(row, column + c * STEP<DTYPE>);
      __builtin_prefetch(from + DENSE_AHEAD);
      const uvec weight = read<DTYPE>(from);
MOEZIP_UNROLLED
      for (int t = 0; t < TOKENS; ++t)
        sum[t][c] = times<DTYPE>(sum[t][c], weight, read<DTYPE>(at<DTYPE>(x + t * pitch, column + c * STEP<DTYPE>)));
    }
  }
  for (; column < job.columns; column += STEP<DTYPE>) {
    const int64_t left = job.columns - column;
    const bool whole = left >= STEP<DTYPE>;
    const uvec weight = whole ? read<DTYPE>(at<DTYPE>(row, column)) : read_some<DTYPE>(at<DTYPE>(row, column), left);
    for (int t = 0; t < TOKENS; ++t) {
      const uint8_t* from = at<DTYPE>(x + t * pitch, column);
      sum[t][0] = times<DTYPE>(sum[t][0], weight, whole ? read<DTYPE>(from) : read_some<DTYPE>(from, left));
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int c = CHAINS / 2; c; c /= 2)
      for (int i = 0; i < c; ++i) sum[t][i] += sum[t][i + c];
    out[rows * t] = sum_of(sum[t][0]);
  }
}

template <int DTYPE>
static void dense_rows(const Dense& job, int64_t first, int64_t rows, float* out) {
  const int64_t pitch = job.columns * (DTYPE == BF16 ? 2 : 4);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = at<DTYPE>(job.weight, (first + r) * job.columns);
    const uint8_t* x = static_cast<const uint8_t*>(job.x);
    int64_t token = 0;
    for (; token + 4 <= job.tokens; token += 4) dense_row<DTYPE, 4>(job, row, x + token * pitch, rows, out + rows * token + r);
    for (; token + 2 <= job.tokens; token += 2) dense_row<DTYPE, 2>(job, row, x + token * pitch, rows, out + rows * token + r);
    if (token < job.tokens) dense_row<DTYPE, 1>(job, row, x + token * pitch, rows, out + rows * token + r);
  }
}

void dense(const Dense& job, int64_t first, int64_t rows, float* out) {
  if (job.dtype == BF16) return dense_rows<BF16>(job, first, rows, out);
  dense_rows<F32>(job, first, rows, out);
}

// -- RMS norms ----------------------------------------------------------------------------------------------------

static inline vec number(const void* from, int dtype, int64_t column) {
  if (dtype == BF16) return (vec)(widened(static_cast<const uint16_t*>(from) + column) << 16);
  return load(static_cast<const float*>(from) + column);
}

void norm(const Norm& job, int64_t first, int64_t last) {
  const int64_t size = job.dtype == BF16 ? 2 : 4, whole = job.columns / LANES * LANES, left = job.columns - whole;
  alignas(64) uint8_t weights[4 * LANES] = {};
  if (left) memcpy(weights, static_cast<const uint8_t*>(job.weight) + whole * size, (size_t)(left * size));
  for (int64_t token = first; token < last; ++token) {
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + token * job.stride * size;
    uint8_t* out = static_cast<uint8_t*>(job.out) + token * job.columns * size;
    alignas(64) uint8_t rest[4 * LANES] = {};
    if (left) memcpy(rest, x + whole * size, (size_t)(left * size));
    vec sum[4] = {};
    int64_t column = 0;
    for (; column + 4 * LANES <= whole; column += 4 * LANES)
MOEZIP_UNROLLED
      for (int i = 0; i < 4; ++i) {
        const vec one = number(x, job.dtype, column + i * LANES);
        sum[i] = fused_more(one, one, sum[i]);
      }
    for (; column < whole; column += LANES) {
      const vec one = number(x, job.dtype, column);
      sum[0] = fused_more(one, one, sum[0]);
    }
    const vec tail = number(rest, job.dtype, 0);
    sum[1] = fused_more(tail, tail, sum[1]);
    const float mean = sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)job.columns;
    const vec scale = splat(1.0f / __builtin_sqrtf(mean + job.epsilon));
    auto normed = [&](const void* from, const void* weight, int64_t from_column) {
      const vec one = number(from, job.dtype, from_column) * scale;
      return number(weight, job.dtype, from_column) * (job.dtype == BF16 && !job.once ? (vec)rounded_halves(one) : one);
    };
    auto put = [&](void* to, vec one) {
      if (job.dtype == BF16) store_upper(static_cast<uint16_t*>(to), rounded_halves(one));
      else store(static_cast<float*>(to), one);
    };
    for (column = 0; column < whole; column += LANES) put(out + column * size, normed(x, job.weight, column));
    if (!left) continue;
    put(rest, normed(rest, weights, 0));
    memcpy(out + whole * size, rest, (size_t)(left * size));
  }
}

// -- heads, turned by their positions -----------------------------------------------------------------------------

static inline vec halves_some(const uint16_t* from, int64_t left) {
  if (left >= LANES) return (vec)(widened(from) << 16);
  uint16_t filled[LANES] = {};
  memcpy(filled, from, (size_t)(2 * left));
  return (vec)(widened(filled) << 16);
}

static inline void store_halves_some(uint16_t* to, vec v, int64_t left) {
  if (left >= LANES) return store_upper(to, rounded_halves(v));
  uint16_t filled[LANES];
  store_upper(filled, rounded_halves(v));
  memcpy(to, filled, (size_t)(2 * left));
}

static inline vec rounded(vec v) { return (vec)rounded_halves(v); }

// Products and sums are rounded one by one, as the models have them.
void turn(const Turn& job, int64_t first, int64_t last) {
  uint16_t head[WIDEST_HEAD];
  const int64_t half = job.turned / 2;
  for (int64_t item = first; item < last; ++item) {
    const uint16_t* x = job.x + item * job.width;
    uint16_t* out = job.out + item * job.width;
    if (job.weight) {
      norm({x, BF16, 1, job.width, job.width, job.weight, job.epsilon, head, false}, 0, 1);
      x = head;
    }
    const uint16_t* cosine = job.cosine + item / job.heads * job.stride;
    const uint16_t* sine = job.sine + item / job.heads * job.stride;
    for (int64_t at = 0; at < half; at += LANES) {
      const int64_t left = half - at;
      const vec low = halves_some(x + at, left), high = halves_some(x + half + at, left);
      const vec low_sine = halves_some(sine + at, left), high_sine = halves_some(sine + half + at, left);
      const vec low_cosine = halves_some(cosine + at, left), high_cosine = halves_some(cosine + half + at, left);
      store_halves_some(out + at, rounded(low * low_cosine) + rounded(-high * low_sine), left);
      store_halves_some(out + half + at, rounded(high * high_cosine) + rounded(low * high_sine), left);
    }
    memcpy(out + job.turned, x + job.turned, (size_t)(2 * (job.width - job.turned)));
  }
}

// -- attention of one query ---------------------------------------------------------------------------------------

// Products of QUERIES heads with every key: scores [QUERIES, pitch].
template <int QUERIES>
static void score(const Attend& job, const uint16_t* query, const uint16_t* key, int64_t pitch, float* scores) {
  const int64_t whole = job.width / STEP<BF16> * STEP<BF16>;
  for (int64_t s = 0; s < job.length; ++s, key += job.key_token) {
    vec sum[QUERIES] = {};
    for (int64_t column = 0; column < job.width; column += STEP<BF16>) {
      const uint8_t* from = at<BF16>(key, column);
      const bool all = column < whole;
      const uvec one = all ? read<BF16>(from) : read_some<BF16>(from, job.width - whole);
MOEZIP_UNROLLED
      for (int q = 0; q < QUERIES; ++q) {
        const uint8_t* other = at<BF16>(query + q * job.query_head, column);
        sum[q] = times<BF16>(sum[q], one, all ? read<BF16>(other) : read_some<BF16>(other, job.width - whole));
      }
    }
MOEZIP_UNROLLED
    for (int q = 0; q < QUERIES; ++q) scores[q * pitch + s] = sum_of(sum[q]) * job.scaling;
  }
}

static float masked(const Attend& job, int64_t at, int64_t s) {
  switch (job.mask_kind) {
    case LOOKS: return static_cast<const uint8_t*>(job.mask)[at + s] ? 0.0f : -__builtin_inff();
    case ADDED_BF16: {
      const uint32_t bits = (uint32_t)static_cast<const uint16_t*>(job.mask)[at + s] << 16;
      float value;
      memcpy(&value, &bits, 4);
      return value;
    }
    default: return static_cast<const float*>(job.mask)[at + s];
  }
}

// Scores as weights that add up to what is returned; 0 where there is nothing to look at.
static float weigh(const Attend& job, int64_t mask, float* scores) {
  const float nothing = -__builtin_inff();
  const int64_t pitch = (job.length + LANES - 1) / LANES * LANES;
  if (job.mask_kind != NO_MASK)
    for (int64_t s = 0; s < job.length; ++s) scores[s] += masked(job, mask, s);
  for (int64_t s = job.length; s < pitch; ++s) scores[s] = nothing;
  vec most = splat(nothing), sum = {};
  for (int64_t s = 0; s < pitch; s += LANES) most = larger(load(scores + s), most);
  const float top = largest_of(most);
  for (int64_t s = 0; s < pitch; s += LANES) {
    const vec score = load(scores + s), found = exponential(score - top);
    const vec weight = score > nothing ? found : score == nothing ? vec{} : score;  // NaN stays one
    store(scores + s, weight);
    sum += weight;
  }
  return sum_of(sum);
}

// Weighted sums of VECTORS vectors of every value, for QUERIES heads: onto out [QUERIES, out_width].
template <int QUERIES, int VECTORS>
static void gather(const Attend& job, const uint16_t* value, int64_t left, const float* weights, int64_t pitch,
                   const float* inverse, uint16_t* out) {
  vec sum[QUERIES][VECTORS] = {};
  for (int64_t s = 0; s < job.length; ++s, value += job.value_token) {
    vec one[VECTORS];
MOEZIP_UNROLLED
    for (int v = 0; v < VECTORS; ++v)
      one[v] = VECTORS == 1 ? halves_some(value, left) : (vec)(widened(value + v * LANES) << 16);
MOEZIP_UNROLLED
    for (int q = 0; q < QUERIES; ++q) {
      const vec weight = splat(weights[q * pitch + s]);
MOEZIP_UNROLLED
      for (int v = 0; v < VECTORS; ++v) sum[q][v] = fused_more(weight, one[v], sum[q][v]);
    }
  }
  for (int q = 0; q < QUERIES; ++q)
    for (int v = 0; v < VECTORS; ++v) {
      uint16_t* to = out + q * job.out_width + v * LANES;
      store_halves_some(to, sum[q][v] * inverse[q], VECTORS > 1 ? LANES : left);
    }
}

template <int QUERIES>
static void attend_some(const Attend& job, int64_t n, int64_t head, int64_t shared, float* scores) {
  constexpr int VECTORS = LANES == 16 ? 4 : 2;
  const int64_t pitch = (job.length + LANES - 1) / LANES * LANES;
  score<QUERIES>(job, job.query + n * job.query_batch + head * job.query_head,
                 job.key + n * job.key_batch + shared * job.key_head, pitch, scores);
  float inverse[QUERIES];
  for (int q = 0; q < QUERIES; ++q) {
    const float sum = weigh(job, n * job.mask_batch + (head + q) * job.mask_head, scores + q * pitch);
    inverse[q] = sum > 0 ? 1.0f / sum : sum;
  }
  const uint16_t* value = job.value + n * job.value_batch + shared * job.value_head;
  uint16_t* out = job.out + (n * job.heads + head) * job.out_width;
  int64_t column = 0;
  for (; column + VECTORS * LANES <= job.out_width; column += VECTORS * LANES)
    gather<QUERIES, VECTORS>(job, value + column, 0, scores, pitch, inverse, out + column);
  for (; column < job.out_width; column += LANES)
    gather<QUERIES, 1>(job, value + column, job.out_width - column, scores, pitch, inverse, out + column);
}

// Items are HEADS_AT_ONCE heads, or those left, that share keys.
int attend(const Attend& job, int64_t first, int64_t last) {
  const int64_t per = job.heads / job.shared, runs = (per + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
  float* scores = floats(HEADS_AT_ONCE * ((job.length + LANES - 1) / LANES * LANES));
  if (!scores) return NO_MEMORY;
  for (int64_t item = first; item < last; ++item) {
    const int64_t n = item / (job.shared * runs), shared = item / runs % job.shared, run = item % runs;
    const int64_t head = shared * per + run * HEADS_AT_ONCE, left = per - run * HEADS_AT_ONCE;
    switch (left) {
      case 1: attend_some<1>(job, n, head, shared, scores); break;
      case 2: attend_some<2>(job, n, head, shared, scores); break;
      case 3: attend_some<3>(job, n, head, shared, scores); break;
      default: attend_some<4>(job, n, head, shared, scores); break;
    }
  }
  free(scores);
  return OK;
}

}  // namespace MOEZIP_ISA
}  // namespace moezip
