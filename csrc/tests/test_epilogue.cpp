// SPDX-License-Identifier: Apache-2.0
// From exact sums to outputs: the epilogue of every kernel that can run here gives the bits of isa/integer/scalar.cpp, also
// where product and epilogue are one function, for columns around every edge of a vector and buffers that end at a guard page.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "registry/registry.h"
#include "support.h"

namespace octavo::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const Kernel& scalar() { return *built_kernels().front(); }

template <class T>
bool same_bytes(Guarded<T>& got, const std::vector<T>& expected) {
  return std::memcmp(got.data(), expected.data(), expected.size() * sizeof(T)) == 0;
}

void epilogue_equals_scalar(const Kernel& kernel, FloatType type, int n, Sums sums, bool with_bias) {
  constexpr int m = 3;
  Random random(static_cast<unsigned>(n));
  const std::ptrdiff_t acc_stride = (n + 15) / 16 * 16;
  const auto values = static_cast<std::size_t>((sums == Sums::planes ? 2 * m : m) * acc_stride);
  Guarded<std::int32_t> acc(values), column_sum(static_cast<std::size_t>(n));
  Guarded<double> wide(values);
  Guarded<float> column_scale(static_cast<std::size_t>(n)), bias(static_cast<std::size_t>(n));
  for (auto& value : acc) value = std::uniform_int_distribution<std::int32_t>(-2000000000, 2000000000)(random);
  for (auto& value : wide) value = std::nearbyint(std::uniform_real_distribution<double>(-1e14, 1e14)(random));
  for (auto& value : column_sum) value = std::uniform_int_distribution<std::int32_t>(-500000, 500000)(random);
  for (auto& value : column_scale) value = std::uniform_real_distribution<float>(1e-6f, 1e-2f)(random);
  for (auto& value : bias) value = std::uniform_real_distribution<float>(-1.0f, 1.0f)(random);
  const RowQParams rows[m] = {{0.01f, 128}, {3.5e-9f, 17}, {kNan, 0}};
  const std::size_t bytes = static_cast<std::size_t>(m * n * bytes_of(type));
  std::vector<std::uint8_t> expected(bytes);
  Guarded<std::uint8_t> got(bytes);
  Epilogue e{sums,
             acc.data(),
             wide.data(),
             acc_stride,
             m,
             n,
             rows,
             column_sum.data(),
             column_scale.data(),
             with_bias ? bias.data() : nullptr,
             expected.data(),
             n,
             type};
  scalar().epilogue(e);
  e.out = got.data();
  kernel.epilogue(e);
  EXPECT(same_bytes(got, expected), "%s epilogue of %d columns to %s: not what scalar gives", kernel.name, n,
         name_of(type));
}

void test_epilogue(const Kernel& kernel) {
  for (const FloatType type : kTypes) {
    for (const int n : {1, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64}) {
      for (const Sums sums : {Sums::plain, Sums::planes, Sums::wide}) {
        for (const bool with_bias : {false, true}) epilogue_equals_scalar(kernel, type, n, sums, with_bias);
      }
    }
  }
}

// multiply and epilogue in one give the bits of one after the other: rows of one zero point and of several,
// columns that end inside a strip, outputs that are part of longer rows.
void multiply_to_float_equals_scalar(const Kernel& kernel, int m, int n, std::int64_t k_tiles, bool with_bias) {
  Random random(static_cast<unsigned>(m * 1000 + n * 10) + static_cast<unsigned>(k_tiles));
  const std::int64_t k = k_tiles * kTileK;
  const int strips = (n + kStripColumns - 1) / kStripColumns;
  const std::ptrdiff_t acc_stride = strips * kStripColumns, out_stride = n + 3;
  Guarded<std::uint8_t> codes(static_cast<std::size_t>(m * k));
  Guarded<std::int8_t> weight(static_cast<std::size_t>(acc_stride * k));
  Guarded<std::int32_t> column_sum(static_cast<std::size_t>(n));
  Guarded<float> column_scale(static_cast<std::size_t>(n)), bias(static_cast<std::size_t>(n));
  fill_codes(codes, CodePattern::random, random);
  fill_codes(weight, CodePattern::random, random);
  for (auto& value : column_sum) value = std::uniform_int_distribution<std::int32_t>(-500000, 500000)(random);
  for (auto& value : column_scale) value = std::uniform_real_distribution<float>(1e-6f, 1e-2f)(random);
  for (auto& value : bias) value = std::uniform_real_distribution<float>(-1.0f, 1.0f)(random);
  std::vector<RowQParams> rows_qparams(static_cast<std::size_t>(m), {0.01f, 128});
  if (m % 2 == 1) rows_qparams.back() = {3.5e-9f, 17};
  const std::size_t outputs = static_cast<std::size_t>((m - 1) * out_stride + n);
  std::vector<float> expected(outputs, 7.0f);
  Guarded<float> got(outputs);
  std::fill_n(got.data(), outputs, 7.0f);

  Epilogue e{};
  e.acc_stride = acc_stride;
  e.m = m;
  e.n = n;
  e.rows = rows_qparams.data();
  e.column_sum = column_sum.data();
  e.column_scale = column_scale.data();
  e.bias = with_bias ? bias.data() : nullptr;
  e.out_stride = out_stride;
  e.type = FloatType::f32;
  TileProduct product{codes.data(),     k,       weight.data(), k * kStripColumns, k_tiles, m, strips,
                      k_tiles % 2 == 1, nullptr, acc_stride};
  e.out = got.data();
  kernel.multiply_to_float(product, e);

  std::vector<std::int32_t> acc(static_cast<std::size_t>(m * acc_stride));
  product.acc = acc.data();
  kernel.multiply(product);  // which test_kernels holds to scalar's
  e.acc = acc.data();
  e.out = expected.data();
  scalar().epilogue(e);
  EXPECT(same_bytes(got, expected), "%s multiply_to_float m=%d n=%d k=%ld: not what multiply and epilogue give",
         kernel.name, m, n, static_cast<long>(k));
}

void test_multiply_to_float(const Kernel& kernel) {
  if (!kernel.multiply_to_float) return;
  for (const TileShape shape : {kernel.tile, kernel.tall_tile}) {
    for (int m = 1; m <= shape.rows; ++m) {
      for (const int n : {1, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64}) {
        if (n > shape.strips * kStripColumns) continue;
        for (const std::int64_t k_tiles : {0, 1, 2, 5}) {
          for (const bool with_bias : {false, true}) multiply_to_float_equals_scalar(kernel, m, n, k_tiles, with_bias);
        }
      }
    }
  }
}

int run() {
  for (const Kernel* kernel : runnable_kernels()) {
    test_epilogue(*kernel);
    test_multiply_to_float(*kernel);
  }
  return 0;
}

}  // namespace
}  // namespace octavo::test

int main() { return octavo::test::run(); }
