// SPDX-License-Identifier: Apache-2.0
// The contract between the driver of weights in groups and the instruction sets (csrc/isa/groups).
//
// A weight in groups has unsigned codes u and a scale for each group of k:
//
//   weight[n][k] = scale[n][group] * (u[n][k] - offset) + minimum[n][group]
//
// Activations are signed codes. k is cut into segments in which no scale changes and which have at most kMaxSegment elements,
// so that the sum over a segment is an exact int32, for 16-bit activations as well: 32,512 * 255 * 256 < 2^31. docs/numerics.md
// says how segments are added up; docs/packed_format.md draws how codes and scales lie in memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace octavo {

constexpr int kUnitK = 16;   // every group and every segment is a whole number of units of 16 k
constexpr int kBlockK = 32;  // packed codes of fewer than 8 bits can be read in blocks of 32 k
constexpr int kBlockLines = kBlockK / kLineK;
constexpr int kMaxSegment = 256;
constexpr int kTableSize = 16;

// What the numbers of an array are.
//
//   u8, s8       integers of a byte
//   low4, high4  the low and the high half of a byte, 0 .. 15
//   e8m0         a power of two, 2^(byte - 127); 2^-127 is 0
//   e4m3         4 bits of exponent, 3 of fraction, the sign is not read; 0x7f is 0
enum class Number : std::uint8_t { none, f32, bf16, f16, u8, s8, low4, high4, e8m0, e4m3 };

constexpr std::int64_t bytes_of(Number type) {
  return type == Number::none ? 0 : type == Number::f32 ? 4 : type == Number::bf16 || type == Number::f16 ? 2 : 1;
}

// The codes of a strip of 16 columns.
//   bits 1 .. 7  blocks of 32 k with `bits` lines of 64 bytes each
//   bits 8       lines of S16 (layout.h), signed: u = code + 128
//   bits 0       lines of S16 as unpack_strip has written them: u, or a signed number, if the kernel wants signed lines
struct GroupCodes {
  const std::uint8_t* strips;   // the first strip
  std::ptrdiff_t strip_stride;  // bytes
  int bits;
  const std::uint8_t* table;  // null, or kTableSize bytes: u = table[code]; only with 4 bits
  bool wide;                  // the table has values above 127; then groups are whole blocks
};

// Scales and minima of 16 columns and one group after the other: arrays [strip][group][16].
//
//   scale    1 if there is no array
//   minimum  u8 without `super`: zero points z, minimum = -(scale * z)
//   super    [strip][group / groups_in_super][super_rows][16], f32 or f16, or no array. The first 16 numbers are factors of
//            `scale`. The other ones, which are there if there are minima, are those of `minimum`: minimum = -(super * minimum)
struct GroupScales {
  const void *scale, *super, *minimum;
  Number scale_type, super_type, minimum_type;
  std::int64_t groups, supers, groups_in_super;

  int super_rows() const { return minimum_type == Number::none ? 1 : 2; }
};

// out[i][j] = fma(sum, row_factor[i] * column_scale[j], bias[j]), rounded to `type`, where the segments, in ascending order,
// are added to `sum` with one fma each. With t, the exact sum of a segment rounded once to float32:
//
//   row_scale is null   sum = fma(t, scale, sum)
//   otherwise           sum = fma(t * scale, row_scale, sum)
//
// and then, if there is a minimum, sum = fma(minimum, row_sum, sum).
struct GroupProduct {
  const void* rows;           // signed codes: bytes, or int16 where the kernel needs words; zeros beyond the last k
  std::ptrdiff_t row_stride;  // bytes
  bool planes;                // 16-bit codes in two rows of bytes, 256 * the first one + the second one

  // One number for each segment and row: those of a segment lie side by side.
  const float* row_scale;         // [segments][m] or null
  const std::int32_t* row_start;  // [segments][m]: what a sum begins with, -offset times the sum of the row's codes
  bool has_start;                 // false: all of row_start are 0
  const float* row_sum;           // [segments][m]; only read if there is a minimum
  std::ptrdiff_t segment_stride;  // elements from one segment of these three to the next

  GroupCodes codes;
  GroupScales scales;           // of the first strip
  std::int64_t units;           // how many units of 16 k there are
  int segment_units;            // units in a segment; the last segment may be shorter
  std::int64_t group_segments;  // segments in a group of the weight

  int m, strip_count;
  bool cold;  // the weight does not stay in the L2 cache; changes no result

  const float* row_factor;    // [m]
  const float* column_scale;  // [n] or null: 1
  const float* bias;          // [n] or null: 0
  int n;                      // output columns; the last one may lie inside a strip
  void* out;
  std::ptrdiff_t out_stride;  // elements
  FloatType type;
};

// The codes of a strip as lines of S16, with u - lowered_by in each byte: `units` units, which with fewer than 8 bits are whole
// blocks.
struct UnpackStrip {
  GroupCodes codes;
  std::int64_t units;
  int lowered_by;
  std::uint8_t* lines;
};

// A row as signed codes of 8 bits with a scale for each `group` elements, a multiple of kBlockK; the last group may be short.
// The rules are those of a symmetric row of kernel.h: scale = absmax / 127, or 1 below the smallest normal number.
struct QuantizeGroups {
  const void* x;
  FloatType type;
  std::int64_t count, group;
  float* scale;  // one for each group
  std::int8_t* codes;
};

struct GroupKernelFunctions {
  void (*multiply)(const GroupProduct&);
  void (*unpack_strip)(const UnpackStrip&);
  bool (*quantize_groups)(const QuantizeGroups&);  // false, and nothing is defined, if x holds NaN or Inf
  // sums[i], the sum of the codes of unit i, for whole units.
  void (*sum_units)(const std::int8_t* codes, std::int64_t units, std::int32_t* sums);
};

// One instruction set: a constant, as Kernel is one.
struct GroupKernel : GroupKernelFunctions {
  using Functions = GroupKernelFunctions;

  const char* name;
  int rank;
  std::uint32_t features;
  const GroupKernel* base;

  int min_rows;           // calls with fewer rows than this are faster with the kernel `base`
  bool signed_lines;      // unpacked lines that it multiplies are signed
  int largest_byte_code;  // with larger codes, of 8 bits, rows must be words
  int rows;               // the most rows of a tile
  int rows_of_planes;     // the same if rows have planes; 0: `base` takes such calls
  int panel_rows;         // from this many rows on, codes of fewer than 8 bits are unpacked before they are multiplied
  int panel_rows_of_bytes;  // the same for codes of 8 bits that rows of bytes multiply: their signs are flipped once
  void (*leave)();  // each thread calls it after its last multiply of a call; not inherited, null: nothing to tidy up
};

}  // namespace octavo
