// SPDX-License-Identifier: Apache-2.0
// Every table of float operators that can run here gives the bits of isa/float/scalar.cpp, for sizes around every edge of a
// vector and with buffers that end at a guard page. Activations and norms are within their bounds of results in double.
#include <algorithm>
#include <cmath>
#include <limits>

#include "registry/registry.h"
#include "support.h"

namespace octavo::test {
namespace {

constexpr int kCounts[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 79, 130, 1000};
constexpr Activation kActivations[] = {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu};

const FloatKernel& scalar() { return *runnable_float_kernels().front(); }

using Bytes = Guarded<std::uint8_t>;

// Normal reals in `type`; unless they are to be finite and moderate, some zero, subnormal, huge, Inf or NaN.
struct Reals : Bytes {
  Reals(std::int64_t count, FloatType type, bool moderate, Random& random)
      : Bytes(static_cast<std::size_t>(count * bytes_of(type))) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    const float special[] = {0.0f, -0.0f, 1e-40f, -3e38f, 11.5f, -11.5f, kInf, -kInf, std::nanf("")};
    std::normal_distribution<float> normal(0.0f, 2.0f);
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) {
      const std::size_t pick = random() % 40;
      value = !moderate && pick < 9 ? special[pick] : normal(random);
    }
    const auto bytes = as_type(values, type);
    std::copy(bytes.begin(), bytes.end(), data());
  }
};

void expect_same(const FloatKernel& kernel, const char* what, FloatType type, Bytes& got, Bytes& expected) {
  const auto is_nan = [&](Bytes& buffer, std::size_t i) {
    return std::isnan(load_float(buffer.data(), type, static_cast<std::int64_t>(i)));
  };
  const auto size = static_cast<std::size_t>(bytes_of(type));
  for (std::size_t i = 0; i < got.size() / size; ++i) {
    const bool same = std::memcmp(got.data() + i * size, expected.data() + i * size, size) == 0;
    EXPECT(same || (is_nan(got, i) && is_nan(expected, i)), "%s %s %s of %zu: element %zu", kernel.name, what,
           name_of(type), got.size() / size, i);
  }
}

void test_activate(const FloatKernel& kernel) {
  Random random(1);
  for (const FloatType from : kTypes) {
    for (const FloatType to : kTypes) {
      for (const int count : kCounts) {
        Reals x(count, from, false, random);
        Bytes got(static_cast<std::size_t>(count * bytes_of(to))), expected(got.size());
        for (const Activation activation : kActivations) {
          Activate a{activation, x.data(), 0, from, 1, count, expected.data(), 0, to};
          scalar().activate(a);
          a.out = got.data();
          kernel.activate(a);
          expect_same(kernel, "activate", to, got, expected);
        }
      }
    }
  }
}

// Column slices of one tensor: rows further apart than they are long.
void test_silu_mul(const FloatKernel& kernel) {
  Random random(2);
  constexpr std::int64_t rows = 3;
  for (const FloatType type : kTypes) {
    for (const int count : kCounts) {
      Reals both(rows * 2 * count, type, false, random);
      Bytes got(static_cast<std::size_t>(rows * count * bytes_of(type))), expected(got.size());
      SiluMul m{both.data(),     2 * count, both.data() + count * bytes_of(type), 2 * count, type, rows, count,
                expected.data(), count};
      scalar().silu_mul(m);
      m.out = got.data();
      kernel.silu_mul(m);
      expect_same(kernel, "silu_mul", type, got, expected);
    }
  }
}

void test_norm(const FloatKernel& kernel) {
  Random random(3);
  for (const FloatType type : kTypes) {
    for (const int count : kCounts) {
      Reals x(count, type, true, random), residual(count, type, true, random);
      Reals weight(count, FloatType::f32, true, random), bias(count, FloatType::f32, true, random);
      for (const int form : {0, 1, 2, 3}) {
        Bytes got(x.size()), expected(x.size()), sum(x.size()), expected_sum(x.size());
        Norm n{x.data(),
               form % 2 ? residual.data() : nullptr,
               type,
               reinterpret_cast<float*>(weight.data()),
               form % 2 ? reinterpret_cast<float*>(bias.data()) : nullptr,
               1e-5f,
               form / 2 == 1,
               count,
               expected_sum.data(),
               expected.data()};
        scalar().norm(n);
        n.sum = sum.data();
        n.y = got.data();
        kernel.norm(n);
        expect_same(kernel, "norm", type, got, expected);
        expect_same(kernel, "sum", type, sum, expected_sum);
      }
    }
  }
}

void test_rotate(const FloatKernel& kernel) {
  Random random(4);
  constexpr std::int64_t rows = 3;
  for (const FloatType type : kTypes) {
    for (const std::int64_t columns : {2, 16, 32, 48, 80, 128}) {
      for (const std::int64_t rotated : {columns, columns / 4 * 2}) {
        Reals x(rows * columns, type, true, random);
        Reals cos(rows * rotated, type, true, random), sin(rows * rotated, type, true, random);
        Bytes got(x.size()), expected(x.size());
        Rotate r{x.data(), columns, type,    cos.data(), sin.data(),      rotated,
                 type,     rows,    columns, rotated,    expected.data(), columns};
        scalar().rotate(r);
        r.out = got.data();
        kernel.rotate(r);
        expect_same(kernel, "rotate", type, got, expected);
      }
    }
  }
}

// docs/numerics.md, eq. 49: 2 ulp above -1 and 3e-7 below, for each 4999th float32 up to 100 in size.
void test_gelu_is_within_its_bound(const FloatKernel& kernel) {
  for (std::uint32_t bits = 0; bits < 0x42c80000u; bits += 4999) {
    for (const std::uint32_t sign : {0u, 0x80000000u}) {
      const float x = float_of(bits | sign);
      float y = 0.0f;
      kernel.activate({Activation::gelu, &x, 0, FloatType::f32, 1, 1, &y, 0, FloatType::f32});
      const double exact = x * std::erfc(-static_cast<double>(x) * std::sqrt(0.5)) / 2;
      int exponent = 0;
      std::frexp(std::max(std::fabs(exact), 0x1p-126), &exponent);
      const double bound = x > -1.0f ? std::ldexp(2.0, exponent - 24) : 3e-7;
      EXPECT(std::fabs(y - exact) <= bound, "%s: gelu(%.9g) is %.9g, not %.17g", kernel.name, static_cast<double>(x),
             static_cast<double>(y), exact);
    }
  }
}

// docs/numerics.md, eq. 52, with |t - mean| <= 2 max |t| and mean |t| <= max |t|.
void test_norm_is_within_its_bound(const FloatKernel& kernel) {
  Random random(5);
  for (const int count : kCounts) {
    const auto size = static_cast<std::size_t>(count);
    std::vector<float> t(size), weight(size), bias(size), y(size);
    std::normal_distribution<float> normal(1.0f, 2.0f);
    for (std::size_t i = 0; i < size; ++i) t[i] = normal(random), weight[i] = normal(random), bias[i] = normal(random);
    kernel.norm(
        {t.data(), nullptr, FloatType::f32, weight.data(), bias.data(), 1e-5f, false, count, nullptr, y.data()});
    double mean = 0.0, variance = 0.0, largest = 0.0;
    for (const float value : t) mean += static_cast<double>(value) / count;
    for (const float value : t) variance += (value - mean) * (value - mean) / count;
    for (const float value : t) largest = std::max(largest, std::fabs(static_cast<double>(value)));
    const double norm = std::sqrt(variance + static_cast<double>(1e-5f)), steps = count / 64 + 6;
    for (std::size_t i = 0; i < size; ++i) {
      const double exact = (t[i] - mean) / norm * weight[i] + bias[i];
      const double bound =
          0x1p-24 * (std::fabs(weight[i]) * largest / norm * (2 * steps + 22) + 2 * std::fabs(bias[i]));
      EXPECT(std::fabs(y[i] - exact) <= bound, "%s: norm of %d, element %zu is %.9g, not %.9g", kernel.name, count, i,
             static_cast<double>(y[i]), exact);
    }
  }
}

int run() {
  for (const FloatKernel* kernel : runnable_float_kernels()) {
    test_activate(*kernel);
    test_silu_mul(*kernel);
    test_norm(*kernel);
    test_rotate(*kernel);
    test_gelu_is_within_its_bound(*kernel);
    test_norm_is_within_its_bound(*kernel);
    std::printf("%-12s equals scalar\n", kernel->name);
  }
  return 0;
}

}  // namespace
}  // namespace octavo::test

int main() { return octavo::test::run(); }
