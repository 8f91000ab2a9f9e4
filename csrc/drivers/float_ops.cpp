// SPDX-License-Identifier: Apache-2.0
#include "float_ops.h"

#include <algorithm>

#include "base/parallel.h"
#include "base/scratch.h"
#include "registry/registry.h"
#include "row.h"

namespace octavo {
namespace {

thread_local Scratch sum_scratch;  // each thread's memory for the sum of one row, where nobody wants it

constexpr std::int64_t kElementGrain = 1 << 14;  // so few elements (some us) do not pay for waking a second thread

const char* at(const void* data, std::int64_t i, FloatType type) {
  return static_cast<const char*>(data) + i * bytes_of(type);
}
char* at(void* data, std::int64_t i, FloatType type) { return static_cast<char*>(data) + i * bytes_of(type); }

// Calls f(begin, end) for ranges of rows.
template <class F>
void parallel_rows(std::int64_t rows, std::int64_t columns, const F& f) {
  parallel(rows, std::max<std::int64_t>(1, kElementGrain / std::max<std::int64_t>(1, columns)), f);
}

// Calls f(row, column, rows, columns) for parts of a matrix: some of its rows, or pieces of its only row.
template <class F>
void parallel_parts(std::int64_t rows, std::int64_t columns, const F& f) {
  if (rows != 1) {
    return parallel_rows(rows, columns,
                         [&](std::int64_t begin, std::int64_t end) { f(begin, 0, end - begin, columns); });
  }
  constexpr std::int64_t kPiece = 1024;
  parallel_rows((columns + kPiece - 1) / kPiece, kPiece, [&](std::int64_t begin, std::int64_t end) {
    f(0, begin * kPiece, 1, std::min(end * kPiece, columns) - begin * kPiece);
  });
}

Norm norm_of_row(const Norm& all, std::int64_t row) {
  Norm n = all;
  const std::int64_t first = row * all.count;
  n.x = at(all.x, first, all.type);
  n.y = at(all.y, first, all.type);
  if (all.residual) {
    n.residual = at(all.residual, first, all.type);
    n.sum =
        all.sum ? static_cast<void*>(at(all.sum, first, all.type)) : sum_scratch.get(all.count * bytes_of(all.type));
  }
  return n;
}

}  // namespace

void activate(const Activate& all) {
  const FloatKernel& kernel = active_float_kernel();
  parallel_parts(all.rows, all.columns, [&](auto row, auto column, auto rows, auto columns) {
    Activate part = all;
    part.x = at(all.x, row * all.x_stride + column, all.x_type);
    part.out = at(all.out, row * all.out_stride + column, all.type);
    part.rows = rows;
    part.columns = columns;
    kernel.activate(part);
  });
}

void silu_mul(const SiluMul& all) {
  const FloatKernel& kernel = active_float_kernel();
  parallel_parts(all.rows, all.columns, [&](auto row, auto column, auto rows, auto columns) {
    SiluMul part = all;
    part.gate = at(all.gate, row * all.gate_stride + column, all.type);
    part.up = at(all.up, row * all.up_stride + column, all.type);
    part.out = at(all.out, row * all.out_stride + column, all.type);
    part.rows = rows;
    part.columns = columns;
    kernel.silu_mul(part);
  });
}

void norm_rows(const Norm& n, std::int64_t rows) {
  const FloatKernel& kernel = active_float_kernel();
  parallel_rows(rows, n.count, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) kernel.norm(norm_of_row(n, i));
  });
}

void norm_rows_to_codes(const Norm& n, std::int64_t rows, const RowCodes& out) {
  const FloatKernel& kernel = active_float_kernel();
  const Kernel& integers = active_kernel();
  parallel_rows(rows, n.count, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Norm row = norm_of_row(n, i);
      kernel.norm(row);
      const Row codes{integers, row.y, n.type, n.count, out.codes + i * out.stride, 0};
      out.scale[i] = codes.quantize_dynamic(true).scale;
    }
  });
}

// One call to the kernel rotates the rows along the longer of two axes: the heads while decoding, the positions otherwise.
void rope(const Rope& all) {
  const FloatKernel& kernel = active_float_kernel();
  const bool by_heads = all.heads > all.length;
  const std::int64_t runs = by_heads ? all.length : all.heads, rows = by_heads ? all.heads : all.length;
  parallel_rows(all.batch * runs, rows * all.columns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t run = begin; run < end; ++run) {
      const std::int64_t batch = run / runs, other = run % runs;
      const std::int64_t head = by_heads ? 0 : other, position = by_heads ? other : 0;
      const std::int64_t angle = batch * all.angle_batch_stride + position * all.rotated;
      Rotate r{};
      r.x = at(all.x, batch * all.batch_stride + head * all.head_stride + position * all.row_stride, all.type);
      r.x_stride = by_heads ? all.head_stride : all.row_stride;
      r.type = all.type;
      r.cos = at(all.cos, angle, all.angle_type);
      r.sin = at(all.sin, angle, all.angle_type);
      r.angle_stride = by_heads ? 0 : all.rotated;
      r.angle_type = all.angle_type;
      r.rows = rows;
      r.columns = all.columns;
      r.rotated = all.rotated;
      r.out = at(all.out, ((batch * all.heads + head) * all.length + position) * all.columns, all.type);
      r.out_stride = by_heads ? all.length * all.columns : all.columns;
      kernel.rotate(r);
    }
  });
}

}  // namespace octavo
