// One instruction set's copy of all kernels: this file is compiled once for each, with its flags and MOEZIP_ISA its name.
#include "codes.cpp"
#include "gptq.cpp"
#include "descent.cpp"
#include "factor.cpp"
#include "moment.cpp"
#include "activations.cpp"
#include "product.cpp"
#include "layout.cpp"
#include "unpacked.cpp"

namespace moezip {
namespace MOEZIP_ISA {

#define MOEZIP_TEXT(NAME) MOEZIP_QUOTED(NAME)
#define MOEZIP_QUOTED(NAME) #NAME

extern const Kernels kernels;
const Kernels kernels = {MOEZIP_TEXT(MOEZIP_ISA), TILE,    PANEL, EXACT_HALVES, gptq,   clip,
                         factor,                  descend, round, pack,         unpack, dequantize,
                         moment_panel,            moment_block, HALVES_TOO, BYTES_TOO, take, prepare, product,
                         gate,                    relay,   unrelay, plain, dense, norm, turn, attend};

}  // namespace MOEZIP_ISA
}  // namespace moezip
