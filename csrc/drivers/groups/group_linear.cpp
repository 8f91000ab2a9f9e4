// SPDX-License-Identifier: Apache-2.0
// A call takes its activation rows a block at a time, as linear.cpp does: it quantizes them into scratch memory, then
// multiplies them by four strips of the weight after the other. Where many rows read the same strips, the strips are unpacked
// once into scratch that stays in the L2 cache.
#include "group_linear.h"

#include <numeric>

#include "base/parallel.h"
#include "base/scratch.h"
#include "drivers/pack.h"
#include "drivers/tiles.h"
#include "group_rows.h"
#include "registry/registry.h"

namespace octavo {
namespace {

constexpr std::int64_t kBlockBytes = 1000000;  // of codes in one block of rows: they stay in the L2 cache
constexpr int kTileStrips = 4;
constexpr int kMaxTileRows = 32;

// The calling thread's memory: codes of a block of rows, and what belongs to their segments.
thread_local Scratch codes_scratch, segments_scratch;
// Each thread's memory: one row on its way from bytes to words; unpacked strips.
thread_local Scratch bytes_scratch, units_scratch, panel_scratch;

// Rows of one block as the kernel reads them.
struct GroupBlock {
  std::uint8_t* codes;
  float *scale, *sum, *factor;  // scale, sum and start are [segments][rows]
  std::int32_t* start;
  std::int64_t rows;

  GroupRow row(std::int64_t i, const GroupCut& cut) const {
    return {codes + i * cut.rows_of_codes() * cut.row_stride(), scale + i, sum + i, start + i, rows, factor + i};
  }
};

GroupBlock make_block(const GroupCut& cut, std::int64_t rows) {
  const std::int64_t values = rows * cut.segments;
  auto* const numbers = reinterpret_cast<float*>(segments_scratch.get((3 * values + rows) * 4));
  return {codes_scratch.get(rows * cut.rows_of_codes() * cut.row_stride()),
          numbers,
          numbers + values,
          numbers + 3 * values,
          reinterpret_cast<std::int32_t*>(numbers + 2 * values),
          rows};
}

// Kernels with large tiles are wasted on very few rows, and not every one multiplies planes: their base takes such calls.
const GroupKernel& kernel_for(std::int64_t rows, GroupInput input) {
  const GroupKernel* kernel = &active_group_kernel();
  const auto passes_on = [&] { return rows < kernel->min_rows || (input.bits == 16 && kernel->rows_of_planes == 0); };
  while (kernel->base && passes_on()) kernel = kernel->base;
  return *kernel;
}

// Everything about one call.
struct GroupCall {
  const Kernel& rows_kernel = active_kernel();
  const GroupKernel& kernel;
  const GroupWeight& weight;
  GroupCut cut;
  Output out;
  bool panel;  // strips are unpacked before they are multiplied

  GroupCall(const GroupWeight& weight_, GroupInput input, Output out_, std::int64_t rows)
      : kernel(kernel_for(rows, input)), weight(weight_), out(out_) {
    const int bits = weight.codes.bits;
    cut.k = weight.k;
    cut.input = input;
    cut.segment_units = octavo::segment_units(weight.group_size, input.group_size);
    const bool whole_blocks = bits < 8 && cut.segment_units % 2 == 0;
    cut.units = whole_blocks ? 2 * ceil_divide(cut.k, kBlockK) : ceil_divide(cut.k, kUnitK);
    cut.segments = ceil_divide(cut.units, cut.segment_units);
    cut.words = bits == 8 && kernel.largest_byte_code < 255;
    const bool readable = whole_blocks && bits >= 2 && bits <= 4;
    panel = bits < 8 ? !readable || rows >= kernel.panel_rows : !cut.words && rows >= kernel.panel_rows_of_bytes;
  }

  // What is subtracted from codes when they are unpacked. For a kernel of signed lines it is the offset, unless 8 bits with
  // another offset than 128 would not fit; rows have to make up for what is left of the offset.
  int lowered_by() const {
    if (!panel || !kernel.signed_lines) return 0;
    return weight.codes.bits == 8 ? 128 : std::min(weight.offset, 127);
  }
  std::int32_t row_offset() const {
    if (cut.words) return weight.offset - 128;  // words multiply codes of 8 bits as they are, signed
    return weight.offset - lowered_by();
  }

  int tile_rows() const { return cut.planes() ? kernel.rows_of_planes : kernel.rows; }

  std::int64_t rows_within(std::int64_t bytes, std::int64_t m) const {
    const std::int64_t most = std::max<std::int64_t>(tile_rows(), bytes / (cut.row_stride() * cut.rows_of_codes()));
    return ceil_divide(m, ceil_divide(m, most));
  }

  // The codes of `strips` strips from `first` on: where they are, or unpacked.
  GroupCodes codes_of(std::int64_t first, int strips) const {
    GroupCodes codes = weight.codes;
    codes.strips += first * codes.strip_stride;
    if (!panel) return codes;
    const std::int64_t strip_bytes = cut.whole_tiles() * kStripColumns;
    std::uint8_t* const lines = panel_scratch.get(strips * strip_bytes + kTileBytes);  // a kernel may read beyond
    for (int s = 0; s < strips; ++s) {
      kernel.unpack_strip({codes, (cut.units + 1) / 2 * 2, lowered_by(), lines + s * strip_bytes});
      codes.strips += codes.strip_stride;
    }
    return {lines, strip_bytes, 0, nullptr, false};
  }

  GroupScales scales_of(std::int64_t strip) const {
    GroupScales scales = weight.scales;
    const auto moved = [&](const void* data, Number type, std::int64_t count) {
      return data ? static_cast<const char*>(data) + strip * count * kStripColumns * bytes_of(type) : nullptr;
    };
    scales.scale = moved(scales.scale, scales.scale_type, scales.groups);
    scales.minimum = moved(scales.minimum, scales.minimum_type, scales.groups);
    scales.super = moved(scales.super, scales.super_type, scales.super_rows() * scales.supers);
    return scales;
  }

  bool is_cold() const { return weight.n * weight.k / 8 * std::max(weight.codes.bits, 1) > kCachedBytes; }
};

// The outputs of some rows and up to four strips; `p` lacks only rows and outputs.
void multiply_rows(const GroupCall& call, const GroupBlock& block, Range rows, std::int64_t first_column,
                   GroupProduct& p) {
  const GroupCut& cut = call.cut;
  const std::int64_t tiles = ceil_divide(rows.end - rows.begin, call.tile_rows());
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t count = rows.end - rows.begin;
    const std::int64_t begin = rows.begin + tile * count / tiles, end = rows.begin + (tile + 1) * count / tiles;
    const GroupRow row = block.row(begin, cut);
    p.rows = row.codes;
    p.row_scale = cut.input.group_size ? row.scale : nullptr;
    p.row_start = row.start;
    p.row_sum = row.sum;
    p.row_factor = row.factor;
    p.m = static_cast<int>(end - begin);
    p.out = static_cast<char*>(call.out.data) + (begin * call.weight.n + first_column) * bytes_of(call.out.type);
    p.out_stride = call.weight.n;
    p.type = call.out.type;
    if (call.out.activation == Activation::none) {
      call.kernel.multiply(p);
      continue;
    }
    // The function is applied in float32, so that each output is rounded to its type once.
    float reals[kMaxTileRows * kTileStrips * kStripColumns];
    Activate a{call.out.activation, p.out, p.out_stride, FloatType::f32, p.m, p.n, p.out, p.out_stride, p.type};
    if (p.type != FloatType::f32) {
      a.x = p.out = reals;
      a.x_stride = p.out_stride = p.n;
      p.type = FloatType::f32;
    }
    call.kernel.multiply(p);
    active_float_kernel().activate(a);
  }
}

// Rows of a block times the strips of some tiles of columns.
void multiply_columns(const GroupCall& call, const GroupBlock& block, Range rows, Range column_tiles) {
  const GroupWeight& weight = call.weight;
  for (std::int64_t tile = column_tiles.begin; tile < column_tiles.end; ++tile) {
    const std::int64_t strip = tile * kTileStrips, column = strip * kStripColumns;
    GroupProduct p{};
    p.n = static_cast<int>(std::min<std::int64_t>(kTileStrips * kStripColumns, weight.n - column));
    p.strip_count = static_cast<int>(ceil_divide(p.n, kStripColumns));
    p.row_stride = call.cut.row_stride();
    p.planes = call.cut.planes();
    p.segment_stride = block.rows;
    p.codes = call.codes_of(strip, p.strip_count);
    p.scales = call.scales_of(strip);
    p.has_start = call.row_offset() != 0;
    p.units = call.cut.units;
    p.segment_units = call.cut.segment_units;
    p.group_segments = weight.group_size ? weight.group_size / call.cut.segment_k() : call.cut.segments + 1;
    p.cold = call.is_cold();
    p.column_scale = weight.column_scale ? weight.column_scale + column : nullptr;
    p.bias = weight.bias ? weight.bias + column : nullptr;
    multiply_rows(call, block, rows, column, p);
  }
  if (call.kernel.leave) call.kernel.leave();
}

// Threads share out the rows if there are many, and otherwise the columns.
void multiply_block(const GroupCall& call, const GroupBlock& block, std::int64_t count) {
  const std::int64_t column_tiles = ceil_divide(call.weight.n, kTileStrips * kStripColumns);
  const std::int64_t work = std::max<std::int64_t>(1, count * call.cut.rows_of_codes() * call.weight.n * call.cut.k);
  const auto grain = [&](std::int64_t pieces) { return std::max<std::int64_t>(1, pieces * kSerialWork / work); };
  if (count >= kRowsToSplit * thread_count()) {
    parallel(count, grain(count),
             [&](auto begin, auto end) { multiply_columns(call, block, {begin, end}, {0, column_tiles}); });
  } else {
    parallel(column_tiles, grain(column_tiles),
             [&](auto begin, auto end) { multiply_columns(call, block, {0, count}, {begin, end}); });
  }
}

void quantize_block(const GroupCall& call, const Activations& x, std::int64_t first, std::int64_t count,
                    const GroupBlock& block) {
  const std::int64_t row_bytes = call.cut.k * bytes_of(x.type);
  const char* const data = static_cast<const char*>(x.data) + first * row_bytes;
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 15) / std::max<std::int64_t>(call.cut.k, 1));
  parallel(count, grain, [&](std::int64_t begin, std::int64_t end) {
    auto* const bytes =
        call.cut.words ? reinterpret_cast<std::int8_t*>(bytes_scratch.get(2 * call.cut.whole_tiles())) : nullptr;
    auto* const units = reinterpret_cast<std::int32_t*>(units_scratch.get(3 * call.cut.units * 4));
    auto* const scales = reinterpret_cast<float*>(units + 2 * call.cut.units);
    const GroupRowQuantizer quantizer{call.rows_kernel, call.kernel, call.cut, call.row_offset(),
                                      x.type,           bytes,       units,    scales};
    for (std::int64_t i = begin; i < end; ++i) quantizer.quantize(data + i * row_bytes, block.row(i, call.cut));
  });
}

}  // namespace

int segment_units(std::int64_t weight_group, std::int64_t input_group) {
  const std::int64_t both = std::gcd(weight_group, input_group) / kUnitK;  // gcd(a, 0) is a
  for (std::int64_t units = kMaxSegment / kUnitK; units > 1; --units) {
    if (both % units == 0) return static_cast<int>(units);
  }
  return 1;
}

void linear_groups(const Activations& x, const GroupWeight& weight, GroupInput input, Output out) {
  if (x.m == 0 || weight.n == 0) return;
  GroupCall call(weight, input, out, x.m);
  const std::int64_t rows_in_block = call.rows_within(kBlockBytes, x.m);
  const GroupBlock block = make_block(call.cut, rows_in_block);
  for (std::int64_t first = 0; first < x.m; first += rows_in_block) {
    const std::int64_t count = std::min(rows_in_block, x.m - first);
    quantize_block(call, x, first, count, block);
    call.out.data = static_cast<char*>(out.data) + first * weight.n * bytes_of(out.type);
    multiply_block(call, block, count);
  }
}

}  // namespace octavo
