// Running packed models: one linear layer, or all experts of a layer, in one call. Included by library.cpp.
//
// Between the parts of a call every thread waits for all others. The parts share out their work in pieces (share), and
// no two pieces write to the same place, so the result does not depend on who does what.

namespace moezip {

// Memory of one call, cut into parts.
struct Scratch {
  uint8_t* memory = nullptr;
  size_t used = 0, size;
  explicit Scratch(size_t bytes) : memory(static_cast<uint8_t*>(aligned_alloc(64, (bytes + 127) / 64 * 64))), size(bytes) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(memory); }
  static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
  template <class T>
  T* take(size_t count) {
    T* found = reinterpret_cast<T*>(memory + used);
    used += rounded(count * sizeof(T));
    return found;
  }
};

// Blocks are multiplied in pairs, always the same ones: sums then run in the same order whoever does what.
constexpr int PAIR = 2;
static int64_t pairs_of(int64_t rows) { return (rows + PAIR * BLOCK_ROWS - 1) / (PAIR * BLOCK_ROWS); }
static int64_t blocks_of(const Matrix& m) { return (m.rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
static int64_t units_of(const Matrix& m) { return m.groups * ((m.columns / m.groups + UNIT - 1) / UNIT); }

// Words of a unit of a prepared token.
static int64_t unit_words(const Kernels& use, int path) {
  return path == HALVES ? 16 : path == BYTES && use.bytes ? 8 : 32;
}

// Activations of some tokens as products read them.
struct Prepared {
  int64_t units = 0, pitch = 0;
  uint32_t* values = nullptr;
  float *sums = nullptr, *evens = nullptr, *steps = nullptr;

  // An odd number of lines from token to token, so that tokens do not all fall on the same sets of the cache.
  static int64_t pitch_of(int64_t units, int64_t words) { return (units * words + 31) / 32 * 32 + 16; }
  static size_t bytes(int64_t units, int64_t words, int64_t tokens) {
    return Scratch::rounded((size_t)(4 * tokens * pitch_of(units, words))) +
           3 * Scratch::rounded((size_t)(4 * tokens * units));
  }
  Prepared() = default;
  Prepared(Scratch& scratch, int64_t units, int64_t words, int64_t tokens)
      : units(units), pitch(pitch_of(units, words)) {
    values = scratch.take<uint32_t>((size_t)(tokens * pitch));
    sums = scratch.take<float>((size_t)(tokens * units));
    evens = scratch.take<float>((size_t)(tokens * units));
    steps = scratch.take<float>((size_t)(tokens * units));
  }
  Prepare job(const void* from, int dtype, int path, const Matrix& like, int64_t stride) const {
    return {from, dtype, path, like.columns, like.groups, stride, values, sums, evens, steps, pitch, units};
  }
  Token token(int64_t number) const {
    return {values + number * pitch, sums + number * units, evens + number * units, steps + number * units};
  }
};

constexpr int MOST_TOKENS = 32;

// Calls take(first, some) over `count` tokens, as many at once as products take.
template <class Take>
static void in_products(const Kernels& use, int path, int64_t count, const Take& take) {
  for (int64_t first = 0; first < count;) {
    const int some = use.take(path, count - first);
    take(first, some);
    first += some;
  }
}

static uint16_t to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

static void put(void* out, int dtype, int64_t at, const float* values, int64_t count) {
  if (dtype == F32) {
    memcpy(static_cast<float*>(out) + at, values, (size_t)(4 * count));
    return;
  }
  for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[at + i] = to_half(values[i]);
}

// Pairs of blocks that are worth a thread of their own, where each is multiplied by as many tokens.
static int64_t least_pairs(int64_t units, int64_t tokens) { return (1 << 13) / (units * (32 + 16 * tokens) + 1) + 1; }

// Asks for where the reading of a matrix begins, while there is something else to do. From there on products ask.
static void ask_for(const Matrix& m) {
  for (int64_t at = 0; at < 8192; at += LINE) __builtin_prefetch(reinterpret_cast<const void*>(m.codes + at));
  for (int64_t at = 0; at < 512; at += LINE) __builtin_prefetch(reinterpret_cast<const void*>(m.scales + at));
  for (int64_t at = 0; at < 256; at += LINE) __builtin_prefetch(reinterpret_cast<const void*>(m.zeros + at));
}

static float from_half(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static const Matrix& packed(const Either& e) { return *reinterpret_cast<const Matrix*>(e.packed); }
static int64_t rows_of(const Either& e) { return e.packed ? packed(e).rows : e.rows; }
static int64_t columns_of(const Either& e) { return e.packed ? packed(e).columns : e.columns; }

// Rows of a plain matrix, as many as a pair of blocks has.
static void plain_rows(const Kernels& use, const Either& e, int64_t row, const void* x, int dtype, int64_t tokens,
                       void* out) {
  alignas(64) float y[PAIR * MOST_TOKENS * BLOCK_ROWS];
  const int64_t left = e.rows - row, rows = left < PAIR * BLOCK_ROWS ? left : PAIR * BLOCK_ROWS;
  const int64_t size = dtype == BF16 ? 2 : 4;
  for (int64_t from = 0; from < tokens; from += MOST_TOKENS) {
    const int64_t some = tokens - from < MOST_TOKENS ? tokens - from : MOST_TOKENS;
    use.dense({reinterpret_cast<const void*>(e.weight), dtype, e.columns,
               static_cast<const uint8_t*>(x) + from * e.columns * size, some}, row, rows, y);
    for (int64_t t = 0; t < some; ++t) {
      if (e.bias)
        for (int64_t r = 0; r < rows; ++r)
          y[rows * t + r] += dtype == BF16 ? from_half(reinterpret_cast<const uint16_t*>(e.bias)[row + r])
                                           : reinterpret_cast<const float*>(e.bias)[row + r];
      put(out, dtype, (from + t) * e.rows + row, y + rows * t, rows);
    }
  }
}

// A pair of blocks of a packed matrix.
static void packed_rows(const Kernels& use, const Matrix& m, int path, int64_t pair, const Prepared& prepared,
                        int dtype, int64_t tokens, void* out) {
  alignas(64) float y[PAIR * MOST_TOKENS * BLOCK_ROWS];
  Token some_tokens[MOST_TOKENS];
  const int64_t block = PAIR * pair;
  const int blocks = blocks_of(m) - block < PAIR ? 1 : PAIR;
  in_products(use, path, tokens, [&](int64_t from, int some) {
    for (int t = 0; t < some; ++t) some_tokens[t] = prepared.token(from + t);
    use.product(m, path, some, block, blocks, some_tokens, y);
    for (int i = 0; i < blocks; ++i) {
      const int64_t row = (block + i) * BLOCK_ROWS, rows = m.rows - row < BLOCK_ROWS ? m.rows - row : BLOCK_ROWS;
      for (int t = 0; t < some; ++t) put(out, dtype, (from + t) * m.rows + row, y + BLOCK_ROWS * (some * i + t), rows);
    }
  });
}

constexpr int MOST_MATRICES = 3;

// Matrices of as many columns times the same tokens, in one go: `out` has an address for each.
static int multiply(const Kernels& use, int threads, const Either* matrices, int count, int path, const void* x,
                    int dtype, int64_t tokens, void* const* out) {
  if (path == HALVES && !use.halves) path = FLOATS;
  const int64_t words = unit_words(use, path);
  size_t bytes = 0;
  for (int i = 0; i < count; ++i)
    if (matrices[i].packed) bytes += Prepared::bytes(units_of(packed(matrices[i])), words, tokens);
  Scratch scratch(bytes);
  if (!scratch.memory) return NO_MEMORY;
  Prepared prepared[MOST_MATRICES];
  int64_t pairs[MOST_MATRICES + 1] = {}, least = 1 << 30;
  for (int i = 0; i < count; ++i) {
    const Either& e = matrices[i];
    pairs[i + 1] = pairs[i] + pairs_of(rows_of(e));
    if (!e.packed) {
      // as many rows as are read while a thread starts
      const int64_t own = (1 << 17) / (PAIR * BLOCK_ROWS * e.columns * (dtype == BF16 ? 2 : 4) + 1) + 1;
      least = own < least ? own : least;
      continue;
    }
    const Matrix& m = packed(e);
    const int64_t own = least_pairs(units_of(m), tokens);
    least = own < least ? own : least;
    if (!i) ask_for(m);
    for (int j = 0; j < i && !prepared[i].values; ++j)
      if (matrices[j].packed && packed(matrices[j]).groups == m.groups) prepared[i] = prepared[j];
    if (prepared[i].values) continue;
    prepared[i] = Prepared(scratch, units_of(m), words, tokens);
    const Prepare job = prepared[i].job(x, dtype, path, m, m.columns);
    const int result = together(threads, tokens, (1 << 15) / (m.columns + 1) + 1, [&](int64_t first, int64_t last) {
      use.prepare(job, first, last);
      return (int)OK;
    });
    if (result) return result;
  }
  return together(threads, pairs[count], least, [&](int64_t first, int64_t last) {
    int number = 0;
    for (int64_t pair = first; pair < last; ++pair) {
      while (pair >= pairs[number + 1]) ++number;
      const Either& e = matrices[number];
      const int64_t at = pair - pairs[number];
      if (e.packed) packed_rows(use, packed(e), path, at, prepared[number], dtype, tokens, out[number]);
      else plain_rows(use, e, PAIR * BLOCK_ROWS * at, x, dtype, tokens, out[number]);
    }
    return (int)OK;
  });
}

// -- all experts of a layer ---------------------------------------------------------------------------------------

constexpr int MOST_LAYOUTS = 8;

struct Layer {
  const Matrix (*table)[3];  // [experts]: gate, up, down; an expert without rows is its down bias, or nothing
  int64_t experts, top_k, tokens, hidden;
  int path, dtype, activation;
  float alpha, limit;
  const void* x;         // [tokens, hidden]
  const int64_t* ids;   // [tokens, top_k]; those below 0 are left out, and `experts`, which stands for nobody
  const void* weights;  // [tokens, top_k]
  int weights_dtype;
  void* out;             // [tokens, hidden]
};

// The tokens of one expert: a run of `places`, which count tokens x top_k.
struct Visit {
  const Matrix* matrices;
  int64_t first, count, item;  // its run; the first of its pairs of blocks among those of all visits
};

static int experts(const Kernels& use, int threads, const Layer& job) {
  const int path = job.path == HALVES && !use.halves ? (int)FLOATS : job.path;
  const int64_t words = unit_words(use, path), slots = job.tokens * job.top_k;
  std::vector<Visit> visits;
  std::vector<int64_t> starts((size_t)job.experts + 1), places((size_t)slots);
  for (int64_t slot = 0; slot < slots; ++slot)
    if (job.ids[slot] > job.experts) return NO_EXPERT;
    else if (job.ids[slot] >= 0 && job.ids[slot] < job.experts) ++starts[(size_t)job.ids[slot] + 1];
  for (size_t e = 0; e < (size_t)job.experts; ++e) starts[e + 1] += starts[e];
  {
    std::vector<int64_t> next(starts);
    for (int64_t slot = 0; slot < slots; ++slot)
      if (job.ids[slot] >= 0 && job.ids[slot] < job.experts) places[(size_t)next[(size_t)job.ids[slot]]++] = slot;
  }
  const int64_t assigned = starts[(size_t)job.experts];
  std::vector<float> weights((size_t)slots);
  for (int64_t slot = 0; slot < slots; ++slot)
    weights[(size_t)slot] = job.weights_dtype == BF16 ? from_half(static_cast<const uint16_t*>(job.weights)[slot])
                                                      : static_cast<const float*>(job.weights)[slot];
  int64_t items = 0, width = 0, up_units = 0, down_units = 0, most = 0;
  const Matrix* like[MOST_LAYOUTS] = {};
  for (int64_t e = 0; e < job.experts; ++e) {
    const int64_t first = starts[(size_t)e], count = starts[(size_t)e + 1] - first;
    const Matrix* m = job.table[e];
    if (!count) continue;
    visits.push_back({m, first, count, items});
    if (!m[0].rows) continue;
    items += pairs_of(m[0].rows);
    like[m[0].layout] = &m[0], like[m[1].layout] = &m[1];
    up_units = units_of(m[0]) > up_units ? units_of(m[0]) : up_units;
    width = blocks_of(m[0]) * BLOCK_ROWS > width ? blocks_of(m[0]) * BLOCK_ROWS : width;
    down_units = units_of(m[2]) > down_units ? units_of(m[2]) : down_units;
    most = count > most ? count : most;
  }
  size_t bytes = Scratch::rounded((size_t)(4 * assigned * width)) + Prepared::bytes(down_units, words, assigned) +
                 Scratch::rounded((size_t)(4 * job.tokens * job.hidden));
  for (const Matrix* each : like)
    if (each) bytes += Prepared::bytes(units_of(*each), words, job.tokens);
  Scratch scratch(bytes);
  if (!scratch.memory) return NO_MEMORY;
  float* inner = scratch.take<float>((size_t)(assigned * width));
  float* sums = scratch.take<float>((size_t)(job.tokens * job.hidden));
  const Prepared between(scratch, down_units, words, assigned);

  // the input, once for each layout
  Prepared given[MOST_LAYOUTS];
  for (int layout = 0; layout < MOST_LAYOUTS; ++layout) {
    if (!like[layout]) continue;
    given[layout] = Prepared(scratch, units_of(*like[layout]), words, job.tokens);
    const Prepare prepare = given[layout].job(job.x, job.dtype, path, *like[layout], job.hidden);
    const int result = together(threads, job.tokens, (1 << 15) / (job.hidden + 1) + 1, [&](int64_t a, int64_t b) {
      use.prepare(prepare, a, b);
      return (int)OK;
    });
    if (result) return result;
  }

  // gate and up, with the activation in between
  int result = together(threads, items, least_pairs(2 * up_units, 1), [&](int64_t first, int64_t last) {
    alignas(64) float gate[PAIR * MOST_TOKENS * BLOCK_ROWS], up[PAIR * MOST_TOKENS * BLOCK_ROWS];
    Token tokens[MOST_TOKENS];
    size_t number = visits.size() - 1;
    while (number && (visits[number].item > first || !visits[number].matrices[0].rows)) --number;
    for (int64_t item = first; item < last; ++item) {
      while (!visits[number].matrices[0].rows || item >= visits[number].item + pairs_of(visits[number].matrices[0].rows))
        ++number;
      const Visit& visit = visits[number];
      const int64_t block = PAIR * (item - visit.item);
      const int blocks = blocks_of(visit.matrices[0]) - block < PAIR ? 1 : PAIR;
      in_products(use, path, visit.count, [&](int64_t from, int some) {
        for (int which = 0; which < 2; ++which) {
          const Matrix& m = visit.matrices[which];
          for (int t = 0; t < some; ++t)
            tokens[t] = given[m.layout].token(places[(size_t)(visit.first + from + t)] / job.top_k);
          use.product(m, path, some, block, blocks, tokens, which ? up : gate);
        }
        use.gate(job.activation, job.alpha, job.limit, gate, up, blocks * some * BLOCK_ROWS);
        for (int i = 0; i < blocks; ++i)
          for (int t = 0; t < some; ++t)
            memcpy(inner + (visit.first + from + t) * width + (block + i) * BLOCK_ROWS,
                   gate + BLOCK_ROWS * (some * i + t), 4 * BLOCK_ROWS);
      });
    }
    return (int)OK;
  });
  if (result) return result;

  // what the down projections read
  result = together(threads, (int64_t)visits.size(), (1 << 15) / (width * (most + 1) + 1) + 1,
                    [&](int64_t first, int64_t last) {
    for (int64_t number = first; number < last; ++number) {
      const Visit& visit = visits[(size_t)number];
      if (!visit.matrices[0].rows) continue;
      Prepare prepare = between.job(inner, F32, path, visit.matrices[2], width);
      use.prepare(prepare, visit.first, visit.first + visit.count);
    }
    return (int)OK;
  });
  if (result) return result;

  // the down projections, one expert after the other, onto the sums of the tokens
  return together(threads, pairs_of(job.hidden), least_pairs((int64_t)visits.size() * down_units, 1), [&](int64_t first, int64_t last) {
    alignas(64) float y[PAIR * MOST_TOKENS * BLOCK_ROWS];
    Token tokens[MOST_TOKENS];
    const int64_t begin = first * PAIR * BLOCK_ROWS;
    const int64_t end = last * PAIR * BLOCK_ROWS < job.hidden ? last * PAIR * BLOCK_ROWS : job.hidden;
    for (int64_t t = 0; t < job.tokens; ++t) memset(sums + t * job.hidden + begin, 0, (size_t)(4 * (end - begin)));
    for (const Visit& visit : visits) {
      const Matrix& m = visit.matrices[2];
      const float* constant = visit.matrices[0].rows ? nullptr : reinterpret_cast<const float*>(m.bias);
      if (!visit.matrices[0].rows && !constant) continue;
      for (int64_t block = PAIR * first; BLOCK_ROWS * block < end; block += PAIR) {
        const int blocks = end - BLOCK_ROWS * block <= BLOCK_ROWS ? 1 : PAIR;
        in_products(use, path, visit.count, [&](int64_t from, int some) {
          if (!constant) {
            for (int t = 0; t < some; ++t) tokens[t] = between.token(visit.first + from + t);
            use.product(m, path, some, block, blocks, tokens, y);
          }
          for (int i = 0; i < blocks; ++i) {
            const int64_t row = (block + i) * BLOCK_ROWS, rows = end - row < BLOCK_ROWS ? end - row : BLOCK_ROWS;
            for (int t = 0; t < some; ++t) {
              const int64_t slot = places[(size_t)(visit.first + from + t)];
              float* sum = sums + slot / job.top_k * job.hidden + row;
              const float* add = constant ? constant + row : y + BLOCK_ROWS * (some * i + t);
              const float weight = weights[(size_t)slot];
              for (int64_t lane = 0; lane < rows; ++lane) sum[lane] += weight * add[lane];
            }
          }
        });
      }
    }
    for (int64_t t = 0; t < job.tokens; ++t)
      put(job.out, job.dtype, t * job.hidden + begin, sums + t * job.hidden + begin, end - begin);
    return (int)OK;
  });
}

// -- between the products -----------------------------------------------------------------------------------------

static int norm(const Kernels& use, int threads, const Norm& job) {
  return together(threads, job.tokens, (1 << 16) / (job.columns + 1) + 1, [&](int64_t first, int64_t last) {
    use.norm(job, first, last);
    return (int)OK;
  });
}

static int turn(const Kernels& use, int threads, const Turn& job) {
  return together(threads, job.batch * job.heads, (1 << 16) / (job.width + 1) + 1, [&](int64_t first, int64_t last) {
    use.turn(job, first, last);
    return (int)OK;
  });
}

static int route(const Kernels& use, int threads, const Route& job) {
  const Either matrix = {0, reinterpret_cast<int64_t>(job.weight), job.experts, job.columns, 0};
  void* const out[1] = {job.logits};
  const int failed = multiply(use, threads, &matrix, 1, FLOATS, job.x, BF16, job.tokens, out);
  if (failed) return failed;
  std::vector<float> logits((size_t)job.experts), scores((size_t)job.top_k);
  for (int64_t t = 0; t < job.tokens; ++t) {
    for (int64_t e = 0; e < job.experts; ++e) logits[(size_t)e] = from_half(job.logits[t * job.experts + e]);
    float most = logits[0], sum = 0, chosen = 0;
    for (const float each : logits) most = each > most ? each : most;
    for (const float each : logits) sum += expf(each - most);
    int64_t* ids = job.ids + t * job.top_k;
    for (int64_t k = 0; k < job.top_k; ++k) {
      int64_t best = -1;  // of equal ones, and where all are NaN, the first
      for (int64_t e = 0; e < job.experts; ++e) {
        bool taken = false;
        for (int64_t j = 0; j < k; ++j) taken = taken || ids[j] == e;
        if (!taken && (best < 0 || logits[(size_t)e] > logits[(size_t)best])) best = e;
      }
      ids[k] = best;
      scores[(size_t)k] = expf(logits[(size_t)best] - most) / sum;
      chosen += scores[(size_t)k];
    }
    if (job.normalise)
      for (float& score : scores) score /= chosen;
    put(job.scores, job.dtype, t * job.top_k, scores.data(), job.top_k);
  }
  return OK;
}

static int heads(const Kernels& use, int threads, const Heads& job, int path) {
  const int64_t rows[2] = {rows_of(job.matrices[0]), rows_of(job.matrices[1])};
  const int64_t columns = columns_of(job.matrices[0]);
  Scratch scratch(Scratch::rounded((size_t)(2 * job.batch * rows[0])) +
                  Scratch::rounded((size_t)(2 * job.batch * rows[1])) +
                  Scratch::rounded((size_t)(2 * job.batch * columns)));
  if (!scratch.memory) return NO_MEMORY;
  const uint16_t* x = job.x;
  if (job.norm) {
    uint16_t* normed = scratch.take<uint16_t>((size_t)(job.batch * columns));
    const int failed = norm(use, threads, {x, BF16, job.batch, columns, columns, job.norm, job.epsilon, normed, false});
    if (failed) return failed;
    x = normed;
  }
  uint16_t* straight[2] = {scratch.take<uint16_t>((size_t)(job.batch * rows[0])),
                           scratch.take<uint16_t>((size_t)(job.batch * rows[1]))};
  void* const out[3] = {straight[0], straight[1], job.out[2]};
  int result = multiply(use, threads, job.matrices, 3, path, x, BF16, job.batch, out);
  for (int i = 0; i < 2 && !result; ++i) {
    const bool whole = job.whole && job.weights[i];
    if (whole)  // in place: a number is read before it is written
      result = norm(use, threads, {straight[i], BF16, job.batch, rows[i], rows[i], job.weights[i], job.epsilons[i],
                                   straight[i], false});
    if (!result)
      result = turn(use, threads, {straight[i], job.batch, rows[i] / job.width, job.width,
                                   whole ? nullptr : job.weights[i], job.epsilons[i], job.cosine, job.sine,
                                   job.turned, job.stride, job.out[i]});
  }
  return result;
}

// With a matrix, the heads of a token are multiplied by it, and that is what `out` of the job gets.
static int attend(const Kernels& use, int threads, Attend job, const Either* matrix, int path) {
  const int64_t per = job.heads / job.shared, runs = (per + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
  const int64_t least = (1 << 17) / (job.length * (job.width + job.out_width) * HEADS_AT_ONCE + 1) + 1;
  Scratch scratch(matrix ? (size_t)(2 * job.batch * job.heads * job.out_width) : 0);
  if (!scratch.memory) return NO_MEMORY;
  void* const out[1] = {job.out};
  if (matrix) job.out = scratch.take<uint16_t>((size_t)(job.batch * job.heads * job.out_width));
  const int result = together(threads, job.batch * job.shared * runs, least,
                              [&](int64_t first, int64_t last) { return use.attend(job, first, last); });
  return result || !matrix ? result : multiply(use, threads, matrix, 1, path, job.out, BF16, job.batch, out);
}

// Sums, rounded to bf16.
static void add(const uint16_t* one, const uint16_t* other, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_half(from_half(one[i]) + from_half(other[i]));
}

// The rest of a decoder layer from its attention on, of tokens x [batch, hidden].
static int finish(const Kernels& use, int threads, const Attend& attention, const Either* matrix, int path,
                  const uint16_t* x, const Block& block, float epsilon, float alpha, float limit, uint16_t* out) {
  const int64_t tokens = attention.batch, count = tokens * block.hidden, slots = tokens * block.top_k;
  const size_t line = Scratch::rounded((size_t)(2 * count));
  Scratch scratch(3 * line + Scratch::rounded((size_t)(2 * tokens * block.experts)) +
                  Scratch::rounded((size_t)(4 * slots)) + Scratch::rounded((size_t)(8 * slots)));
  if (!scratch.memory) return NO_MEMORY;
  uint16_t* part = scratch.take<uint16_t>((size_t)count);
  uint16_t* sum = scratch.take<uint16_t>((size_t)count);
  uint16_t* normed = scratch.take<uint16_t>((size_t)count);
  uint16_t* logits = scratch.take<uint16_t>((size_t)(tokens * block.experts));
  float* scores = scratch.take<float>((size_t)slots);
  int64_t* ids = scratch.take<int64_t>((size_t)slots);
  Attend job = attention;
  job.out = part;
  int failed = attend(use, threads, job, matrix, path);
  if (failed) return failed;
  add(x, part, count, sum);
  failed = norm(use, threads, {sum, BF16, tokens, block.hidden, block.hidden,
                               reinterpret_cast<const void*>(block.norm), epsilon, normed, false});
  if (failed) return failed;
  failed = route(use, threads, {reinterpret_cast<const void*>(block.router), normed, block.experts, block.hidden, tokens,
                                block.top_k, block.normalise != 0, (int)block.scores, logits, scores, ids});
  if (failed) return failed;
  failed = experts(use, threads, {reinterpret_cast<const Matrix(*)[3]>(block.table), block.experts, block.top_k, tokens,
                                  block.hidden, (int)block.path, BF16, (int)block.activation, alpha, limit, normed, ids,
                                  scores, (int)block.scores, part});
  if (failed) return failed;
  add(sum, part, count, out);
  return OK;
}

}  // namespace moezip
