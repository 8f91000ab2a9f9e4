// SPDX-License-Identifier: Apache-2.0
// Work is cut into segments of rows, so that one huge row (a tensor with a single scale) uses all threads just as many short
// rows (groups) do. Non-temporal stores, which bypass the caches, were tried for large outputs and lost: 33 ms against 27 ms
// for 256 MB, because the OS has just zeroed the new pages and their lines are still in the cache.
#include "quantize.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "base/memory.h"
#include "base/parallel.h"
#include "pack.h"
#include "registry/registry.h"

namespace octavo {
namespace {

constexpr std::int64_t kSegment = 1 << 15;  // elements: the smallest piece of work that is worth a thread

const void* element(const void* x, FloatType type, std::int64_t i) {
  return static_cast<const char*>(x) + i * bytes_of(type);
}

void* element(void* x, FloatType type, std::int64_t i) { return static_cast<char*>(x) + i * bytes_of(type); }

std::int64_t segments_per_row(Rows shape) { return std::max<std::int64_t>(1, ceil_divide(shape.columns, kSegment)); }

// Calls f(segment, row, first element, count) for every segment.
template <class F>
void for_each_segment(Rows shape, const F& f) {
  const std::int64_t per_row = segments_per_row(shape);
  const std::int64_t grain = std::max<std::int64_t>(1, kSegment / std::max<std::int64_t>(shape.columns, 1));
  parallel(shape.rows * per_row, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t segment = begin; segment < end; ++segment) {
      const std::int64_t row = segment / per_row;
      const std::int64_t start = segment % per_row * kSegment;
      f(segment, row, row * shape.columns + start, std::min(kSegment, shape.columns - start));
    }
  });
}

}  // namespace

RowQParams row_qparams(RowRange range, CodeRange codes, bool symmetric) {
  if (symmetric) {
    const std::int32_t zero_point = (codes.qmin + codes.qmax) / 2;
    const float scale = std::max(-range.min, range.max) / static_cast<float>(codes.qmax - zero_point);
    return {scale >= FLT_MIN ? scale : 1.0f, zero_point};  // below FLT_MIN, 1 / scale may overflow
  }
  const float steps = static_cast<float>(codes.qmax - codes.qmin);
  const float width = range.max - range.min;
  const float scale = std::isfinite(width) ? width / steps : range.max / steps - range.min / steps;
  if (!(scale >= FLT_MIN)) return {1.0f, std::clamp(0, codes.qmin, codes.qmax)};
  const auto offset = static_cast<std::int32_t>(std::nearbyint(range.min / scale));
  return {scale, std::clamp(codes.qmin - offset, codes.qmin, codes.qmax)};
}

void choose_qparams(const void* x, FloatType type, Rows shape, CodeRange codes, bool symmetric, float* scale,
                    std::int32_t* zero_point) {
  const Kernel& kernel = active_kernel();
  const std::int64_t per_row = segments_per_row(shape);
  std::vector<RowRange> ranges = zeros<RowRange>(shape.rows * per_row, "choose_qparams: a range of each row");
  for_each_segment(shape, [&](std::int64_t segment, std::int64_t, std::int64_t first, std::int64_t count) {
    const void* const values = element(x, type, first);
    if (symmetric) {
      const float largest = kernel.absmax(values, type, count);
      ranges[static_cast<std::size_t>(segment)] = {-largest, largest};
    } else {
      ranges[static_cast<std::size_t>(segment)] = kernel.min_max(values, type, count);
    }
  });
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    RowRange range{0.0f, 0.0f};
    for (std::int64_t i = row * per_row; i < (row + 1) * per_row; ++i) {
      const RowRange part = ranges[static_cast<std::size_t>(i)];
      require(std::isfinite(part.max), "choose_qparams: x holds NaN or Inf in row ", row,
              "; only finite values have a scale (torch.nan_to_num replaces them)");
      range = {std::min(range.min, part.min), std::max(range.max, part.max)};
    }
    const RowQParams qparams = row_qparams(range, codes, symmetric);
    scale[row] = qparams.scale;
    zero_point[row] = qparams.zero_point;
  }
}

void quantize(const void* x, FloatType type, Rows shape, CodeRange range, const float* scale,
              const std::int32_t* zero_point, std::uint8_t* codes) {
  const Kernel& kernel = active_kernel();
  for_each_segment(shape, [&](std::int64_t, std::int64_t row, std::int64_t first, std::int64_t count) {
    kernel.quantize_row({element(x, type, first), type, count, 1.0f / scale[row], zero_point[row], range.qmin,
                         range.qmax, codes + first});
  });
}

void dequantize(const std::uint8_t* codes, bool is_signed, Rows shape, const float* scale,
                const std::int32_t* zero_point, void* out, FloatType type) {
  const Kernel& kernel = active_kernel();
  for_each_segment(shape, [&](std::int64_t, std::int64_t row, std::int64_t first, std::int64_t count) {
    kernel.dequantize_row(
        {codes + first, is_signed, count, scale[row], zero_point[row], element(out, type, first), type});
  });
}

}  // namespace octavo
