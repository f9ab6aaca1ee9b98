// The library's face: plain C functions over plain arrays, threads, and the choice of the instruction set.
//
// Every function takes the number of an instruction set (moezip_best() names the best one here) and of threads, keeps
// no state, and returns 0, or 1 where memory or 2 where a thread could not be had, 3 where a matrix is not positive
// definite. Arguments are not checked here.
#include "kernels.h"

#include <dlfcn.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#if defined(MOEZIP_AMX)
#include <cpuid.h>
#endif
#if defined(MOEZIP_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MOEZIP_API extern "C" __attribute__((visibility("default")))

namespace moezip {

namespace baseline {
extern const Kernels kernels;
}
#if defined(MOEZIP_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
#if defined(MOEZIP_AMX)
namespace amx {
extern const Kernels kernels;
}
#endif
static const Kernels* const SETS[] = {
    &baseline::kernels, &avx2::kernels, &avx512::kernels, &avx512bf16::kernels,
#if defined(MOEZIP_AMX)
    &amx::kernels,
#endif
};
#else
static const Kernels* const SETS[] = {&baseline::kernels};
#endif

#if defined(MOEZIP_AMX)
// Whether there are tiles of bf16, and Linux lets the process use them, which has to be asked for.
static bool has_tiles() {
#if defined(MOEZIP_TILES_EMULATED)  // tests/amx.py
  return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA);
#else
  return false;
#endif
}
#endif

static int best() {
#if defined(MOEZIP_X86)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#if defined(MOEZIP_AMX)
  if (bf16 && has_tiles()) return 4;
#endif
  if (bf16) return 3;
  if (avx512) return 2;
  if (avx2) return 1;
#endif
  return 0;
}

// Calls work(first, last) over [0, items) in pieces, from as many threads as there is work for. The pieces are few and
// large, and taken one after the other, so that a thread that loses its core delays the others by one piece at most.
template <class Work>
static int share(int threads, int64_t items, int64_t least, const Work& work) {
  if (items <= 0) return OK;
  const int64_t most = (items + least - 1) / least;
  if (threads > most) threads = (int)most;
  if (threads <= 1) return work(0, items);
  int64_t piece = items / (8 * (int64_t)threads);
  piece = piece < least ? least : piece / least * least;
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{OK};
  auto run = [&] {
    for (;;) {
      const int64_t first = next.fetch_add(piece);
      if (first >= items || failed.load()) return;
      const int result = work(first, first + piece < items ? first + piece : items);
      if (result) failed.store(result);
    }
  };
  try {
    std::vector<std::thread> others;
    others.reserve((size_t)threads - 1);
    try {
      while ((int)others.size() < threads - 1) others.emplace_back(run);
    } catch (const std::exception&) {
      // fewer threads than asked for: those there are do all of the work
    }
    run();
    for (auto& other : others) other.join();
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return failed.load();
}

// The same for the short calls of a running model, by the threads that torch has for its own operations, where it runs
// on GNU's OpenMP: they are awake, and no others compete with them for the cores. Else by new threads. Every thread
// begins with a run of items of its own, since what it asks of memory ahead is then what it reads next, and helps the
// others when it is done.
constexpr int MOST_RUNS = 64;

template <class Work>
static int together(int threads, int64_t items, int64_t least, const Work& work) {
  typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
  if (threads <= 1 || items <= least) return items > 0 ? work(0, items) : (int)OK;
  static std::atomic<Parallel> known{nullptr};
  Parallel parallel = known.load(std::memory_order_relaxed);
  if (!parallel) {
    parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    known.store(parallel, std::memory_order_relaxed);
  }
  if (!parallel) return share(threads, items, least, work);
  const int64_t most = (items + least - 1) / least;
  if (threads > most) threads = (int)most;
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    const Work& work;
    int64_t piece;
    int runs;
    std::atomic<int> present, failed;
    Run run[MOST_RUNS];
  };
  int64_t piece = items / (8 * (int64_t)threads);
  piece = piece < least ? least : piece;
  Shared shared = {work, piece, threads < MOST_RUNS ? threads : MOST_RUNS, {0}, {OK}, {}};
  for (int i = 0; i < shared.runs; ++i) {
    shared.run[i].next.store(items * i / shared.runs, std::memory_order_relaxed);
    shared.run[i].end = items * (i + 1) / shared.runs;
  }
  parallel(
      [](void* data) {
        Shared& all = *static_cast<Shared*>(data);
        const int own = all.present.fetch_add(1);
        for (int i = 0; i < all.runs; ++i) {
          Run& run = all.run[(own + i) % all.runs];
          for (;;) {
            const int64_t first = run.next.fetch_add(all.piece);
            if (first >= run.end || all.failed.load()) break;
            const int result = all.work(first, first + all.piece < run.end ? first + all.piece : run.end);
            if (result) all.failed.store(result);
          }
        }
      },
      &shared, (unsigned)threads, 0);
  return shared.failed.load();
}

// Rows that are worth a thread of their own when a row costs `columns` cheap steps.
static int64_t worth(int64_t columns) { return columns > 0 ? (1 << 17) / columns + 1 : 1; }

}  // namespace moezip

#include "run.cpp"

using namespace moezip;

MOEZIP_API const char* moezip_source() { return MOEZIP_SOURCE; }
MOEZIP_API int moezip_best() { return best(); }
MOEZIP_API int moezip_sets() { return (int)(sizeof(SETS) / sizeof(SETS[0])); }
MOEZIP_API const char* moezip_name(int set) { return SETS[set]->name; }

MOEZIP_API int moezip_gptq(int set, int threads, const float* weight, int64_t rows, int64_t columns,
                           const float* factor, int64_t stride, const int32_t* groups, int64_t count, float* scales,
                           float* zeros, int bits, const int32_t* order, int64_t group, int symmetric, int dropped,
                           const float* candidates, int64_t shares, const float* importance, uint8_t* codes,
                           float* errors, float* loss) {
  // no candidates: the scales are given
  const Search search = {group, bits, symmetric != 0, dropped, candidates, shares, importance};
  const Gptq job = {weight, rows,  columns, factor,                        stride, groups, count, scales,
                    zeros,  bits,  order,   candidates ? &search : nullptr, codes,  errors, loss};
  const Kernels& use = *SETS[set];
  return share(threads, rows, use.tile, [&](int64_t first, int64_t last) { return use.gptq(job, first, last); });
}

MOEZIP_API int moezip_clip(int set, int threads, const float* weight, int64_t rows, int64_t columns, int64_t group,
                           int bits, int symmetric, int dropped, const float* candidates, int64_t shares,
                           const float* importance, float* scales, float* zeros) {
  const Clip job = {weight, rows, columns, {group, bits, symmetric != 0, dropped, candidates, shares, importance},
                    scales, zeros};
  const Kernels& use = *SETS[set];
  return share(threads, rows, use.tile, [&](int64_t first, int64_t last) { return use.clip(job, first, last); });
}

MOEZIP_API int moezip_factor(int set, const float* hessian, int64_t columns, const int32_t* order, float damping,
                             float* out) {
  return SETS[set]->factor({hessian, columns, order, damping, out});
}

MOEZIP_API int moezip_descend(int set, int threads, const float* weight, int64_t rows, int64_t columns,
                              const float* hessian, float damping, int64_t group, int64_t count, float* step,
                              const float* zero, int bits, int steps, int dropped, uint8_t* codes, double* gain) {
  const Descent job = {weight, rows, columns, hessian,    damping, group, count, step,
                       zero,   bits, steps != 0, dropped, codes,   gain};
  const Kernels& use = *SETS[set];
  return share(threads, rows, use.tile, [&](int64_t first, int64_t last) { return use.descend(job, first, last); });
}

MOEZIP_API int moezip_round(int set, int threads, const float* weight, int64_t rows, int64_t columns,
                            const float* scales, const float* zeros, int64_t group, int bits, uint8_t* codes) {
  Codes job = {};
  job.rows = rows, job.columns = columns, job.group = group, job.bits = bits;
  job.weight = weight, job.scales = scales, job.zeros = zeros, job.codes = codes;
  const Kernels& use = *SETS[set];
  return share(threads, rows, worth(columns),
               [&](int64_t first, int64_t last) { return use.round(job, first, last); });
}

MOEZIP_API int moezip_pack(int set, int threads, uint8_t* codes, int64_t rows, int64_t columns, int bits,
                           uint32_t* packed, int64_t words) {
  Codes job = {};
  job.rows = rows, job.columns = columns, job.words = words, job.bits = bits, job.codes = codes, job.packed = packed;
  const Kernels& use = *SETS[set];
  return share(threads, rows, worth(columns), [&](int64_t first, int64_t last) { return use.pack(job, first, last); });
}

MOEZIP_API int moezip_unpack(int set, int threads, uint32_t* packed, int64_t rows, int64_t words, int bits,
                             int64_t columns, uint8_t* codes) {
  Codes job = {};
  job.rows = rows, job.columns = columns, job.words = words, job.bits = bits, job.codes = codes, job.packed = packed;
  const Kernels& use = *SETS[set];
  return share(threads, rows, worth(columns),
               [&](int64_t first, int64_t last) { return use.unpack(job, first, last); });
}

MOEZIP_API int moezip_dequantize(int set, int threads, uint32_t* packed, int64_t rows, int64_t words,
                                 const float* scales, const float* zeros, int64_t group, int bits, int64_t columns,
                                 float* values, uint16_t* halves) {
  Codes job = {};
  job.rows = rows, job.columns = columns, job.words = words, job.group = group, job.bits = bits;
  job.scales = scales, job.zeros = zeros, job.packed = packed, job.values = values, job.halves = halves;
  const Kernels& use = *SETS[set];
  return share(threads, rows, worth(columns),
               [&](int64_t first, int64_t last) { return use.dequantize(job, first, last); });
}

MOEZIP_API int moezip_moment(int set, int threads, const float* values, const uint16_t* halves, const float* weights,
                             int64_t tokens, int64_t columns, float* out) {
  const Kernels& use = *SETS[set];
  const int64_t round = 512;  // tokens whose products are summed before they meet the result
  const int64_t panels = (columns + use.panel - 1) / use.panel;
  const int64_t longest = tokens < round ? tokens : round;
  const size_t size = (size_t)(panels * use.panel) * (size_t)(longest + 1) * 4;
  float* right = static_cast<float*>(malloc(size + 64));
  float* left = weights ? static_cast<float*>(malloc(size + 64)) : right;
  int result = right && left ? OK : NO_MEMORY;
  for (int64_t first = 0; first < tokens && !result; first += round) {
    const Moment job = {values, halves, weights, tokens, columns, out, first,
                        first + round < tokens ? first + round : tokens, left, right};
    result = share(threads, panels, 8, [&](int64_t a, int64_t b) { return use.moment_panel(job, a, b); });
    if (!result) result = share(threads, panels, 1, [&](int64_t a, int64_t b) { return use.moment_block(job, a, b); });
  }
  const int64_t square = 32;
  for (int64_t i = 0; i < columns && !result; i += square)
    for (int64_t j = 0; j <= i; j += square)
      for (int64_t a = i; a < columns && a < i + square; ++a)
        for (int64_t b = j; b < a && b < j + square; ++b) out[a * columns + b] = out[b * columns + a];
  if (weights) free(left);
  free(right);
  return result;
}

MOEZIP_API int moezip_relay(int set, int threads, const int32_t* packed, int64_t rows, int64_t words, int64_t columns,
                            int64_t groups, int bits, uint32_t* codes) {
  const Relay job = {packed, rows, words, columns, groups, bits, codes, nullptr};
  const Kernels& use = *SETS[set];
  return share(threads, (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, worth(columns * BLOCK_ROWS),
               [&](int64_t first, int64_t last) { return use.relay(job, first, last); });
}

MOEZIP_API int moezip_unrelay(int set, int threads, uint32_t* codes, int64_t rows, int64_t columns, int64_t groups,
                              int bits, uint8_t* plain) {
  const Relay job = {nullptr, rows, 0, columns, groups, bits, codes, plain};
  const Kernels& use = *SETS[set];
  return share(threads, (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, worth(columns * BLOCK_ROWS),
               [&](int64_t first, int64_t last) { return use.unrelay(job, first, last); });
}

MOEZIP_API int moezip_plain(int set, int threads, const Matrix* matrix, int dtype, void* out) {
  const Plain job = {*matrix, dtype, out};
  const Kernels& use = *SETS[set];
  return together(threads, (blocks_of(*matrix) + 1) / 2, worth(matrix->columns * 2 * BLOCK_ROWS),
                  [&](int64_t first, int64_t last) { return use.plain(job, first, last); });
}

MOEZIP_API int moezip_linear(int set, int threads, const Matrix* matrix, int path, const void* x, int dtype,
                             int64_t tokens, void* out) {
  const Either either = {reinterpret_cast<int64_t>(matrix), 0, 0, 0, 0};
  return multiply(*SETS[set], threads, &either, 1, path, x, dtype, tokens, &out);
}

MOEZIP_API int moezip_experts(int set, int threads, const Matrix* table, int64_t experts, int64_t top_k, int path,
                              int activation, float alpha, float limit, const void* x, int dtype, int64_t tokens,
                              int64_t hidden, const int64_t* ids, const void* weights, int weights_dtype, void* out) {
  const Layer job = {reinterpret_cast<const Matrix(*)[3]>(table), experts, top_k, tokens, hidden, path, dtype,
                     activation, alpha, limit, x, ids, weights, weights_dtype, out};
  try {
    return moezip::experts(*SETS[set], threads, job);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

MOEZIP_API int moezip_dense(int set, int threads, const void* weight, int dtype, int64_t rows, int64_t columns,
                            const void* bias, const void* x, int64_t tokens, void* out) {
  const Either either = {0, reinterpret_cast<int64_t>(weight), rows, columns, reinterpret_cast<int64_t>(bias)};
  return multiply(*SETS[set], threads, &either, 1, FLOATS, x, dtype, tokens, &out);
}

MOEZIP_API int moezip_norm(int set, int threads, const void* x, int dtype, int64_t tokens, int64_t columns,
                           int64_t stride, const void* weight, float epsilon, int once, void* out) {
  return moezip::norm(*SETS[set], threads, {x, dtype, tokens, columns, stride, weight, epsilon, out, once != 0});
}

MOEZIP_API int moezip_turn(int set, int threads, const uint16_t* x, int64_t batch, int64_t heads, int64_t width,
                           const uint16_t* weight, float epsilon, const uint16_t* cosine, const uint16_t* sine,
                           int64_t turned, int64_t stride, uint16_t* out) {
  return moezip::turn(*SETS[set], threads,
                      {x, batch, heads, width, weight, epsilon, cosine, sine, turned, stride, out});
}

MOEZIP_API int moezip_route(int set, int threads, const void* weight, const void* x, int64_t experts, int64_t columns,
                            int64_t tokens, int64_t top_k, int normalise, int dtype, uint16_t* logits, void* scores,
                            int64_t* ids) {
  try {
    return moezip::route(*SETS[set], threads, {weight, x, experts, columns, tokens, top_k, normalise != 0, dtype,
                                               logits, scores, ids});
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

MOEZIP_API int moezip_heads(int set, int threads, const Either* matrices, int path, const uint16_t* x,
                            const uint16_t* norm, float epsilon, int64_t batch, int64_t width, const uint16_t* query_weight, float query_epsilon,
                            const uint16_t* key_weight, float key_epsilon, int whole, const uint16_t* cosine,
                            const uint16_t* sine, int64_t turned, int64_t stride, uint16_t* query, uint16_t* key,
                            uint16_t* value) {
  const Heads job = {matrices, x, norm, epsilon, batch, width, {query_weight, key_weight}, whole, {query_epsilon, key_epsilon},
                     cosine, sine, turned, stride, {query, key, value}};
  return moezip::heads(*SETS[set], threads, job, path);
}

MOEZIP_API int moezip_attend(int set, int threads, const uint16_t* query, const uint16_t* key, const uint16_t* value,
                             int64_t batch, int64_t heads, int64_t shared, int64_t length, int64_t width,
                             int64_t out_width, int64_t query_batch, int64_t query_head, int64_t key_batch,
                             int64_t key_head, int64_t key_token, int64_t value_batch, int64_t value_head,
                             int64_t value_token, const void* mask, int mask_kind, int64_t mask_batch,
                             int64_t mask_head, float scaling, const Either* matrix, int path, const uint16_t* x,
                             const Block* block, float epsilon, float alpha, float limit, uint16_t* out) {
  const Attend job = {query,       key,        value,      batch,     heads,      shared,     length,   width,
                      out_width,   query_batch, query_head, key_batch, key_head,  key_token,  value_batch, value_head,
                      value_token, mask,       mask_kind,  mask_batch, mask_head, scaling,    out};
  if (!block) return moezip::attend(*SETS[set], threads, job, matrix, path);
  try {
    return finish(*SETS[set], threads, job, matrix, path, x, *block, epsilon, alpha, limit, out);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
