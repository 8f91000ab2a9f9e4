// SPDX-License-Identifier: Apache-2.0
// Weights of 16-bit floats: every table gives the bits of isa/float/scalar.cpp in every tile, with buffers that end at a guard
// page; the layer is one chain of fma for each output with any number of threads and rows; packing is a permutation.
#include <cmath>
#include <limits>

#include "drivers/half/half_linear.h"
#include "drivers/half/half_pack.h"
#include "drivers/pack.h"
#include "registry/registry.h"
#include "support.h"
#include "threads.h"

namespace octavo::test {
namespace {

constexpr FloatType kHalves[] = {FloatType::bf16, FloatType::f16};
constexpr float kInf = std::numeric_limits<float>::infinity();

// Normal reals, or among them some that are zero, subnormal, Inf or NaN.
std::vector<float> reals(std::int64_t count, bool moderate, Random& random) {
  const float special[] = {0.0f, -0.0f, 1e-40f, -6e-8f, 3e38f, kInf, -kInf, std::nanf("")};
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) {
    const std::size_t pick = random() % 300;
    value = !moderate && pick < 8 ? special[pick] : normal(random);
  }
  return values;
}

std::vector<std::uint16_t> as_halves(const std::vector<float>& values, FloatType type) {
  const auto bytes = as_type(values, type);
  std::vector<std::uint16_t> halves(values.size());
  std::memcpy(halves.data(), bytes.data(), bytes.size());
  return halves;
}

template <class Buffer>
void fill(Buffer& buffer, const void* data) {
  std::memcpy(buffer.data(), data, buffer.size() * sizeof(buffer[0]));
}

bool same(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

// Each number of rows in a tile, each split of strips, tails of k. Only the last row and the last strip end at a guard page.
void test_products_equal_scalar(const FloatKernel& kernel) {
  Random random(1);
  for (const FloatType type : kHalves) {
    for (const std::int64_t k : {1, 2, 63, 512}) {
      for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25}) {
        const std::int64_t strips = rows % 2 ? 15 : 3;  // 8 + 4 + 2 + 1, or less in larger tiles
        const auto size = [](std::int64_t count) { return static_cast<std::size_t>(count); };
        Guarded<float> x(size((rows - 1) * kHalfRowDistance + k));
        Guarded<std::uint16_t> weight(size(strips * k * kStripColumns));
        Guarded<float> got(size(rows * strips * kStripColumns)), expected(got.size());
        fill(x, reals((rows - 1) * kHalfRowDistance + k, false, random).data());
        fill(weight, as_halves(reals(strips * k * kStripColumns, false, random), type).data());
        fill(expected, reals(rows * strips * kStripColumns, true, random).data());
        fill(got, expected.data());
        HalfProduct p{x.data(), weight.data(),   k * kStripColumns,     type, k, rows,
                      strips,   expected.data(), strips * kStripColumns};
        runnable_float_kernels().front()->multiply_half(p);
        p.sums = got.data();
        kernel.multiply_half(p);
        for (std::size_t i = 0; i < got.size(); ++i) {
          EXPECT(same(got[i], expected[i]), "%s %s: %ld rows, k = %ld, sum %zu is %.9g, not %.9g", kernel.name,
                 name_of(type), static_cast<long>(rows), static_cast<long>(k), i, static_cast<double>(got[i]),
                 static_cast<double>(expected[i]));
        }
      }
    }
  }
}

struct HalfLayer {
  HalfLayer(std::int64_t n_, std::int64_t k_, FloatType type_, Random& random) : n(n_), k(k_), type(type_) {
    weight = as_halves(reals(n * k, true, random), type);
    bias = reals(n, true, random);
    strips.resize(static_cast<std::size_t>(ceil_divide(n, kStripColumns) * k * kStripColumns));
    pack_half({weight.data(), n, k, k, 1}, strips.data());
  }

  // Exactly what linear_half is to give for one output.
  float output(const std::vector<std::uint8_t>& x, FloatType x_type, std::int64_t i, std::int64_t j) const {
    float sum = 0.0f;
    for (std::int64_t c = 0; c < k; ++c) {
      sum = std::fma(load_float(x.data(), x_type, i * k + c), load_float(weight.data(), type, j * k + c), sum);
    }
    return sum + bias[static_cast<std::size_t>(j)];
  }

  std::vector<std::uint8_t> run(const std::vector<std::uint8_t>& x, FloatType x_type, std::int64_t m,
                                Activation activation = Activation::none) const {
    std::vector<std::uint8_t> out(static_cast<std::size_t>(m * n * bytes_of(x_type)));
    linear_half({x.data(), x_type, m}, {strips.data(), type, bias.data(), n, k}, {out.data(), x_type, activation});
    return out;
  }

  std::int64_t n, k;
  FloatType type;
  std::vector<std::uint16_t> weight, strips;
  std::vector<float> bias;
};

struct Shape {
  std::int64_t m, n, k;
};

// 130 rows are two blocks, 150 columns two panels and a strip that is not full, and k = 1100 three stretches.
void test_a_layer_is_one_chain_of_fma_for_each_output() {
  Random random(2);
  for (const auto& [m, n, k] :
       {Shape{1, 1, 1}, {1, 300, 1100}, {7, 33, 64}, {130, 150, 513}, {260, 17, 3}, {3, 5, 0}}) {
    for (const FloatType type : kHalves) {
      const HalfLayer layer(n, k, type, random);
      for (const FloatType x_type : kTypes) {
        const auto x = as_type(reals(m * k, true, random), x_type);
        std::vector<std::uint8_t> expected(static_cast<std::size_t>(m * n * bytes_of(x_type)));
        for (std::int64_t i = 0; i < m * n; ++i) {
          store_float(expected.data(), x_type, i, layer.output(x, x_type, i / n, i % n));
        }
        for (const Kernel* kernel : runnable_kernels()) {
          use_kernel(kernel->name);
          for (const int threads : {1, 2}) {
            set_thread_count(threads);
            EXPECT(layer.run(x, x_type, m) == expected, "%s, %d threads: %ld x %ld x %ld of %s and %s", kernel->name,
                   threads, static_cast<long>(m), static_cast<long>(n), static_cast<long>(k), name_of(x_type),
                   name_of(type));
          }
        }
      }
    }
  }
  set_thread_count(1);
  use_kernel("");
}

void test_an_activation_inside_is_the_one_outside() {
  constexpr std::int64_t m = 5, n = 40, k = 70;
  Random random(3);
  const HalfLayer layer(n, k, FloatType::bf16, random);
  const auto x = as_type(reals(m * k, true, random), FloatType::f32);
  for (const Kernel* kernel : runnable_kernels()) {
    use_kernel(kernel->name);
    auto expected = layer.run(x, FloatType::f32, m);
    void* const data = expected.data();
    active_float_kernel().activate({Activation::silu, data, 0, FloatType::f32, 1, m * n, data, 0, FloatType::f32});
    EXPECT(layer.run(x, FloatType::f32, m, Activation::silu) == expected, "%s", kernel->name);
  }
  use_kernel("");
}

void test_packing_is_a_permutation() {
  Random random(4);
  for (const auto& [m, n, k] : {Shape{0, 1, 1}, {0, 16, 64}, {0, 33, 130}, {0, 5, 0}}) {
    for (const int threads : {1, 3}) {
      set_thread_count(threads);
      const HalfLayer layer(n, k, FloatType::f16, random);
      for (std::int64_t i = 0; i < static_cast<std::int64_t>(layer.strips.size()); ++i) {
        const std::int64_t column =
            i / kStripColumns / std::max<std::int64_t>(k, 1) * kStripColumns + i % kStripColumns;
        const std::int64_t c = i / kStripColumns % std::max<std::int64_t>(k, 1);
        const std::uint16_t expected = column < n ? layer.weight[static_cast<std::size_t>(column * k + c)] : 0;
        EXPECT(layer.strips[static_cast<std::size_t>(i)] == expected, "value %ld", static_cast<long>(i));
      }
      std::vector<std::uint16_t> restored(layer.weight.size());
      unpack_half(layer.strips.data(), n, k, restored.data());
      EXPECT(restored == layer.weight, "n=%ld k=%ld", static_cast<long>(n), static_cast<long>(k));
    }
  }
  set_thread_count(1);
}

}  // namespace
}  // namespace octavo::test

int main() {
  using namespace octavo::test;
  for (const octavo::FloatKernel* kernel : octavo::runnable_float_kernels()) test_products_equal_scalar(*kernel);
  test_a_layer_is_one_chain_of_fma_for_each_output();
  test_an_activation_inside_is_the_one_outside();
  test_packing_is_a_permutation();
  return 0;
}
