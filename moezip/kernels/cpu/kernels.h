// What every instruction set's copy of the kernels offers to library.cpp, and the jobs that go between them.
//
// The files that include simd.h are compiled once per instruction set. They use no C++ library: an inline function of it
// could be emitted by the AVX-512 copy, merged with the baseline's by the linker, and then run where it must not.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moezip {

enum { OK = 0, NO_MEMORY = 1, NO_THREAD = 2, NOT_DEFINITE = 3 };

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
};

}  // namespace moezip
