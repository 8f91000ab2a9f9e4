// SPDX-License-Identifier: Apache-2.0
// The contract between the drivers and the instruction sets (csrc/isa/integer).
//
// An instruction set is one file that fills one Kernel table with plain functions over raw pointers. Everything that such
// a file may know stands here and in layout.h: the packed weight, the arguments of each function, the CPU features that it
// may ask for. All functions are exact in the integers, and their floats have the same bits as the floats
// of isa/integer/scalar.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

// Stands before loops over arrays that must become registers.
#define OCTAVO_UNROLL _Pragma("GCC unroll 32")

namespace octavo {

// The longest k for which a sum of uint8 x int8 products fits int32: 255 * 128 * 65,793 = 2^31 - 128.
constexpr std::int64_t kMaxExactK = 65793;

// 16-bit activations are multiples of absmax / 32,512 = absmax / (127 * 256), so that the high byte of every value lies
// in [-127, 127].
constexpr int kMax16 = 127 * 256;

// The longest k for which a sum of 16-bit x int8 products fits int32: 32,512 * 128 * 512 < 2^31. A multiple of a tile's.
constexpr std::int64_t kMaxExactK16 = 512;

// No tile has more outputs than this, so that the accumulators of one tile fit on the stack.
constexpr int kMaxTileOutputs = 48 * 32;

enum class FloatType : std::uint8_t { f32, bf16, f16 };

constexpr std::int64_t bytes_of(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

// One bit for each CPU feature that the compile flags of some file in csrc/isa switch on. registry/detect.cpp finds out which
// of them the CPU and the OS have.
enum Feature : std::uint32_t {
  kFeatureAvx2 = 1u << 0,
  kFeatureFma = 1u << 1,
  kFeatureF16c = 1u << 2,
  kFeatureAvxVnni = 1u << 3,
  kFeatureAvx512f = 1u << 4,
  kFeatureAvx512bw = 1u << 5,
  kFeatureAvx512dq = 1u << 6,
  kFeatureAvx512vl = 1u << 7,
  kFeatureAvx512vnni = 1u << 8,
  kFeatureAmxTile = 1u << 9,
  kFeatureAmxInt8 = 1u << 10,
  kFeatureAvx512bf16 = 1u << 11,
};

// How a kernel reads activation rows.
//   u8   8-bit rows are uint8 codes; a 16-bit row is two rows of bytes (planes), first the high bytes + 128, then the low bytes
//   s16  all rows are int16
enum class RowForm : std::uint8_t { u8, s16 };

// acc[i][j] = sum over k of rows[i][k] * weight[k][j], exact in int32, for m rows and strip_count * 16 columns. m and
// strip_count are at least 1 and do not exceed the kernel's tile or tall_tile.
struct TileProduct {
  const void* rows;             // first activation row, in the kernel's RowForm, k padded to 64
  std::ptrdiff_t row_stride;    // bytes
  const std::int8_t* strips;    // where the first tile of the first strip begins
  std::ptrdiff_t strip_stride;  // bytes from one strip to the next
  std::int64_t k_tiles;         // how many tiles of 64 k to add up
  int m, strip_count;
  bool cold;                   // the whole weight is larger than the L2 cache; changes no sum
  std::int32_t* acc;           // [m][strip_count * 16]
  std::ptrdiff_t acc_stride;   // elements
  SaturatingWords words = {};  // from the first strip on; only for kernels that are the `byte_kernel` of another one
};

struct RowQParams {
  float scale;
  std::int32_t zero_point;
};

// Which exact sum an output has:
//   plain    acc[i][j] - zero_point[i] * column_sum[j]
//   planes   256 * (acc[2 i][j] - 128 * column_sum[j]) + acc[2 i + 1][j]: two rows of accumulators for each row of outputs
//   wide     wide[i][j], which the driver has added up and corrected because k is too long for int32
enum class Sums : std::uint8_t { plain, planes, wide };

// Turns exact sums into real outputs. With t, the sum rounded once to float32:
//   out[i][j] = fma(t, scale[i] * column_scale[j], bias[j]), rounded to `type`.
struct Epilogue {
  Sums sums;
  const std::int32_t* acc;    // each row has whole strips
  const double* wide;         // each row has whole strips; the values are integers below 2^53
  std::ptrdiff_t acc_stride;  // elements, of acc and wide
  int m;                      // output rows
  int n;                      // output columns; the last one may lie inside a strip
  const RowQParams* rows;
  const std::int32_t* column_sum;
  const float* column_scale;
  const float* bias;  // null: none
  void* out;
  std::ptrdiff_t out_stride;  // elements
  FloatType type;
};

// codes[i] = clamp(round_half_even(x[i] * inverse_scale), qmin - zero_point, qmax - zero_point) + zero_point, of which the
// low byte is stored: one function makes both int8 and uint8 codes. NaN becomes zero_point. The function returns whether all
// x are finite.
struct QuantizeRow {
  const void* x;
  FloatType type;
  std::int64_t count;
  float inverse_scale;
  std::int32_t zero_point;
  std::int32_t qmin;
  std::int32_t qmax;
  std::uint8_t* codes;
};

// q = round_half_even(x[i] * inverse_scale) clamped to +-kMax16 (NaN becomes 0), q = 256 * (high - 128) + low.
struct SplitRow {
  const void* x;
  FloatType type;
  std::int64_t count;
  float inverse_scale;
  std::uint8_t* high;
  std::uint8_t* low;
};

// out[i] = scale * (code[i] - zero_point), rounded to `type`.
struct DequantizeRow {
  const std::uint8_t* codes;
  bool is_signed;
  std::int64_t count;
  float scale;
  std::int32_t zero_point;
  void* out;
  FloatType type;
};

struct RowRange {
  float min;  // of the row and 0
  float max;  // of the row and 0; both NaN if the row holds NaN or Inf
};

// The largest TileProduct that a kernel takes.
struct TileShape {
  int rows;
  int strips;
};

// The functions that an instruction set may leave out. A null one is inherited: the registry puts the function of `base` in
// its place. This struct holds pointers to functions and nothing else, so that the registry needs no list of them.
struct KernelFunctions {
  void (*multiply)(const TileProduct&);
  void (*epilogue)(const Epilogue&);
  void (*widen_row)(const std::uint8_t* codes, std::int64_t count, std::int16_t* out);  // only for RowForm::s16

  float (*absmax)(const void* x, FloatType type, std::int64_t count);  // NaN or Inf if the row holds one
  RowRange (*min_max)(const void* x, FloatType type, std::int64_t count);
  bool (*quantize_row)(const QuantizeRow&);
  void (*split_row)(const SplitRow&);
  void (*dequantize_row)(const DequantizeRow&);
};

// One instruction set: a constant, filled at compile time, so that none of the instruction set's code runs before the
// registry has found that this CPU can run it. What is not set is 0 or null.
struct Kernel : KernelFunctions {
  using Functions = KernelFunctions;

  const char* name;
  int rank;                // faster instruction sets have the higher rank
  std::uint32_t features;  // the CPU and the OS must have all of these
  const Kernel* base;      // the table to inherit from; null only for scalar

  RowForm form;
  TileShape tile;       // the fastest tile while weights come from the L2 cache
  TileShape tall_tile;  // more rows for each byte of weights, for weights from beyond the L2 cache; {0, 0}: none
  int min_rows;         // calls with fewer rows than this are faster with the kernel `base`

  // The same functions with another `multiply`: faster, for 8-bit rows in RowForm::u8 and weights whose saturating words are
  // listed. Not inherited, null: this instruction set has no use for the list.
  const Kernel* byte_kernel;

  // multiply and epilogue in one, for plain sums and float32 outputs: sums go from registers to outputs, and neither `acc` is
  // touched. Not inherited: where it is null, drivers call multiply and then epilogue.
  void (*multiply_to_float)(const TileProduct&, const Epilogue&);
  void (*leave)();  // each thread calls it after its last multiply of a call; not inherited, null: nothing to tidy up
};

}  // namespace octavo
