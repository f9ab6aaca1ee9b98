// What every instruction set's copy of the kernels offers to library.cpp, and the jobs that go between them.
//
// The files that include simd.h are compiled once per instruction set. They use no C++ library: an inline function of it
// could be emitted by the AVX-512 copy, merged with the baseline's by the linker, and then run where it must not.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moezip {

enum { OK = 0, NO_MEMORY = 1, NO_THREAD = 2, NOT_DEFINITE = 3, NO_EXPERT = 4 };

// How the scales of a group are searched; see clip_search in kernels/__init__.py.
struct Search {
  int64_t group;
  int bits;
  bool symmetric;
  int dropped;              // bits cut off a scale's fp32 significand to store it: 0, 13 (fp16) or 16 (bf16)
  const float* candidates;  // [shares], the first one kept where several are as good
  int64_t shares;
  const float* importance;  // [columns]
};

struct Gptq {
  const float* weight;  // [rows, columns]
  int64_t rows, columns;
  const float* factor;  // [columns, columns], upper triangle, rows `stride` floats apart
  int64_t stride;
  const int32_t* groups;  // [columns] of the weight; not read when refitting
  int64_t count;          // groups
  float* scales;          // [rows, count]: read, or written when refitting
  float* zeros;           // [rows, count]
  int bits;
  const int32_t* order;  // [columns]: place -> column of the weight
  const Search* refit;   // null: scales are given
  uint8_t* codes;        // [rows, columns] of the weight
  float* errors;         // [rows, columns] by place
  float* loss;           // [rows]
};

struct Factor {
  const float* hessian;  // [columns, columns], symmetric
  int64_t columns;
  const int32_t* order;  // [columns]: place -> column of the matrix
  float damping;         // added to the diagonal
  float* factor;         // [columns, columns] by place
};

struct Descent {
  const float* weight;  // [rows, columns]
  int64_t rows, columns;
  const float* hessian;  // [columns, columns], symmetric
  float damping;         // added to its diagonal
  int64_t group, count;  // columns of a group, groups
  float* step;           // [rows, count], changed in place unless they stand still
  const float* zero;     // [rows, count]
  int bits;
  bool steps;   // move steps too
  int dropped;  // bits cut off a stored scale's significand, as in Search
  uint8_t* codes;  // [rows, columns], changed in place
  double* gain;    // [rows]
};

struct Clip {
  const float* weight;
  int64_t rows, columns;
  Search search;
  float* scales;
  float* zeros;
};

struct Codes {
  int64_t rows, columns, words, group;
  int bits;
  const float* weight;
  const float* scales;
  const float* zeros;
  uint8_t* codes;
  uint32_t* packed;
  float* values;
  uint16_t* halves;  // bf16; one of values and halves
};

struct Moment {
  const float* values;     // [tokens, columns], or
  const uint16_t* halves;  // the same in bf16
  const float* weights;    // [tokens] or null
  int64_t tokens, columns;
  float* out;           // [columns, columns]
  int64_t first, last;  // the tokens of this round
  float* left;          // panels of columns, tokens in order: weighted
  float* right;         // not weighted; the same memory where there are no weights
};

// -- products with packed matrices --------------------------------------------------------------------------------
//
// Layout of a packed matrix at run time. Rows come in blocks of 16, filled up with rows of zeros; columns in units of
// 32, all of one group, where a group that is no multiple of 32 is filled up with columns that meet activations of 0. A
// unit of a block is `bits` lines of 64 bytes, 4 for each row: the code's highest 4 bits in 4 lines if the width has a
// 4, its next 2 in 2 lines if it has a 2, its lowest in one if it has a 1; 8 bits are 8 lines. Byte b of a row's word
// holds columns 8 b to 8 b + 7 of the unit, in the order of lines and, within a line, from the lowest bit up. So column
// s + 8 b is at the same place of every byte b: one shift brings up four columns, or two for lanes of 16 bits.
constexpr int64_t BLOCK_ROWS = 16, UNIT = 32, LINE = 64;

enum { SCALE_F16 = 0, SCALE_BF16 = 1, SCALE_F32 = 2, SCALE_U8 = 3 };
enum { F32 = 0, BF16 = 1 };
// What activations are in a product: fp32; bf16 as it is; or whole numbers of 8 bits with a step for each unit.
enum { FLOATS = 0, HALVES = 1, BYTES = 2 };

// Eleven numbers each, as kernels/native.py lays them down.
struct Matrix {
  int64_t codes;   // address, [blocks, units, bits, 16] words
  int64_t scales;  // address, [blocks, groups, 16]
  int64_t zeros;   // address of uint8 [blocks, groups, 16]; 0: all are 2^(bits - 1), at one bit 1/2
  int64_t steps;   // address of fp32 [16 blocks], what U8 scales count; else 0
  int64_t bias;    // address of fp32 [16 blocks] or 0
  int64_t rows, columns, groups, bits, kind;
  int64_t layout;  // matrices of one layout take the same prepared activations
};

// One token's activations as products read them.
struct Token {
  const uint32_t* values;  // by unit: 32 floats, 16 words of bf16 (columns p and p + 16), or 8 of bytes (s + 8 b)
  const float* sums;       // by group: of what `values` stands for
  const float* evens;      // by group: of what every other word stands for, from the first on; of bf16 as it is
  const float* steps;      // by unit: of bytes
};

struct Prepare {
  const void* from;  // [tokens, stride], of which `columns` are read
  int dtype, path;
  int64_t columns, groups;
  int64_t stride;       // elements from token to token
  uint32_t* values;     // [tokens, pitch]
  float *sums, *evens, *steps;  // [tokens, units], of sums and evens the first groups
  int64_t pitch, units;
};

struct Relay {
  const int32_t* packed;  // [rows, words], or what to decode into ...
  int64_t rows, words, columns, groups;
  int bits;
  uint32_t* codes;   // the layout
  uint8_t* plain;    // [rows, columns]
};

struct Plain {
  Matrix matrix;
  int dtype;
  void* out;  // [columns, rows]
};

// -- what is not packed ---------------------------------------------------------------------------------------------

// Five numbers each, as kernels/native.py lays them down; numbers of the weight and the bias are of the dtype of x.
struct Either {
  int64_t packed;  // address of a Matrix; then the rest is not read
  int64_t weight;  // address, [rows, columns]
  int64_t rows, columns;
  int64_t bias;  // address, [rows], or 0
};

struct Dense {
  const void* weight;  // [rows, columns] of dtype
  int dtype;
  int64_t columns;
  const void* x;  // [tokens, columns] of dtype
  int64_t tokens;
};
constexpr int64_t DENSE_AHEAD = 8192;  // as AHEAD of packed matrices

struct Norm {
  const void* x;  // [tokens, columns] of dtype, tokens `stride` numbers apart
  int dtype;
  int64_t tokens, columns, stride;
  const void* weight;  // [columns] of dtype
  float epsilon;
  void* out;  // [tokens, columns] of dtype
  bool once;  // bf16 is rounded after the weight alone; else before it too
};

// The experts of some tokens, by the softmax of their logits; all in bf16 but `scores` of F32, and ids.
struct Route {
  const void *weight, *x;  // [experts, columns], [tokens, columns]
  int64_t experts, columns, tokens, top_k;
  bool normalise;  // scores of a token add up to 1
  int dtype;       // of scores
  uint16_t* logits;  // [tokens, experts]
  void* scores;      // [tokens, top_k], the best first
  int64_t* ids;      // [tokens, top_k]
};

// What attention does before the cache, with a token of each sequence; all in bf16.
struct Heads {
  const Either* matrices;  // of queries, keys and values
  const uint16_t* x;       // [batch, columns]
  const uint16_t* norm;    // [columns], of an RMS norm of x before all else; or null
  float epsilon;
  int64_t batch, width;    // numbers of a head
  const uint16_t* weights[2];  // of RMS norms of queries and keys, or null: [width] of each head, or
  int whole;                   // of all heads of a token as one
  float epsilons[2];
  const uint16_t *cosine, *sine;
  int64_t turned, stride;  // as Turn has them
  uint16_t* out[3];
};

// What a decoder layer does after its attention, of the plain form: a norm, a router by softmax, and packed experts. Ten
// numbers, as kernels/native.py lays them down.
struct Block {
  int64_t norm;  // address, [hidden]
  int64_t hidden;
  int64_t router;  // address, [experts, hidden]
  int64_t experts, top_k, normalise, scores;  // as Route has them; scores: their dtype
  int64_t table;                              // address of Matrix [experts, 3]
  int64_t path, activation;
};

// Heads of queries or keys, normed and turned by their positions; all in bf16.
struct Turn {
  const uint16_t* x;  // [batch, heads, width]
  int64_t batch, heads, width;
  const uint16_t* weight;  // of an RMS norm of each head, [width]; or null
  float epsilon;
  const uint16_t *cosine, *sine;  // [batch or 1, turned]
  int64_t turned, stride;         // the first columns of a head, an even number; from sequence to sequence, or 0
  uint16_t* out;                  // [batch, heads, width]
};
constexpr int64_t WIDEST_HEAD = 1024;

enum { NO_MASK = 0, LOOKS = 1, ADDED_BF16 = 2, ADDED_F32 = 3 };
constexpr int64_t HEADS_AT_ONCE = 4;

// One query for each sequence of a batch; all in bf16. Numbers of a head or token lie side by side.
struct Attend {
  const uint16_t *query, *key, *value;
  int64_t batch, heads, shared, length;  // `shared` heads of keys and values
  int64_t width, out_width;              // of queries and keys, and of values
  int64_t query_batch, query_head;       // numbers from one to the next
  int64_t key_batch, key_head, key_token;
  int64_t value_batch, value_head, value_token;
  const void* mask;  // of mask_kind: bytes, not 0 where a token is looked at; or what is added to its score
  int mask_kind;
  int64_t mask_batch, mask_head;  // 0 where one is for all
  float scaling;
  uint16_t* out;  // [batch, heads, out_width]
};

// Functions over rows take [first, last); they return OK or NO_MEMORY.
struct Kernels {
  const char* name;
  int64_t tile;        // rows that gptq and clip take at once
  int64_t panel;       // columns of a panel of the second moment
  bool exact_halves;   // bf16 stays bf16 in panels: two tokens share a lane
  int (*gptq)(const Gptq&, int64_t first, int64_t last);
  int (*clip)(const Clip&, int64_t first, int64_t last);
  int (*factor)(const Factor&);
  int (*descend)(const Descent&, int64_t first, int64_t last);
  int (*round)(const Codes&, int64_t first, int64_t last);
  int (*pack)(const Codes&, int64_t first, int64_t last);
  int (*unpack)(const Codes&, int64_t first, int64_t last);
  int (*dequantize)(const Codes&, int64_t first, int64_t last);
  int (*moment_panel)(const Moment&, int64_t first, int64_t last);  // panels
  int (*moment_block)(const Moment&, int64_t first, int64_t last);  // rows of blocks, by panel
  bool halves, bytes;  // are there products of bf16 as it is, and of whole numbers
  int (*take)(int path, int64_t left);  // how many of the tokens that are left the next product takes, at most 32
  void (*prepare)(const Prepare&, int64_t first, int64_t last);  // tokens
  // out [blocks, tokens, 16] of one or two blocks
  void (*product)(const Matrix&, int path, int tokens, int64_t block, int blocks, const Token*, float* out);
  void (*gate)(int activation, float alpha, float limit, float* gate, const float* up, int64_t count);
  int (*relay)(const Relay&, int64_t first, int64_t last);    // blocks
  int (*unrelay)(const Relay&, int64_t first, int64_t last);  // blocks
  int (*plain)(const Plain&, int64_t first, int64_t last);      // pairs of blocks
  void (*dense)(const Dense&, int64_t first, int64_t rows, float* out);  // out [tokens, rows]
  void (*norm)(const Norm&, int64_t first, int64_t last);                // tokens
  void (*turn)(const Turn&, int64_t first, int64_t last);  // heads of all sequences
  int (*attend)(const Attend&, int64_t first, int64_t last);  // up to HEADS_AT_ONCE heads that share keys
};

}  // namespace moezip
