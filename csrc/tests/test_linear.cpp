// SPDX-License-Identifier: Apache-2.0
// The drivers: int8_mm equals int64 sums; linear layers give the same bits on every kernel, with every thread count and
// every way of cutting the batch; non-finite rows stay alone; k beyond int32 stays exact.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "drivers/linear.h"
#include "int8_layer.h"
#include "registry/registry.h"
#include "support.h"
#include "threads.h"

namespace octavo::test {
namespace {

std::vector<float> normal_reals(std::int64_t count, unsigned seed) {
  Random random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> reals(static_cast<std::size_t>(count));
  for (float& real : reals) real = normal(random);
  return reals;
}

enum class Form { symmetric, affine, fixed, weight_only };
constexpr Form kForms[] = {Form::symmetric, Form::affine, Form::fixed, Form::weight_only};
constexpr RowQParams kFixed{0.05f, -3};  // codes for -6.25 .. 6.5, which holds normal_reals

std::vector<float> run(const Int8Layer& layer, const std::vector<float>& x, Form form,
                       Activation activation = Activation::none) {
  const std::int64_t m = layer.k ? static_cast<std::int64_t>(x.size()) / layer.k : 1;
  std::vector<float> out(static_cast<std::size_t>(m * layer.n));
  const Activations activations{x.data(), FloatType::f32, m};
  const Output output{out.data(), FloatType::f32, activation};
  if (form == Form::weight_only) {
    linear_weight_only(activations, layer.weight(), output);
  } else if (form == Form::fixed) {
    linear_static(activations, layer.weight(), kFixed, output);
  } else {
    linear_dynamic(activations, layer.weight(), form == Form::symmetric, output);
  }
  return out;
}

void expect_bits(const std::vector<float>& got, const std::vector<float>& expected, const char* what) {
  EXPECT(got.size() == expected.size(), "%s", what);
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT(bits_of(got[i]) == bits_of(expected[i]), "%s: output %zu is %.9g, not %.9g (%s)", what, i,
           static_cast<double>(got[i]), static_cast<double>(expected[i]), active_kernel().name);
  }
}

void test_same_bits_on_every_kernel_and_thread_count() {
  for (const auto& [m, n, k] : {LayerShape{1, 16, 64},
                                {2, 17, 65},
                                {7, 129, 383},
                                {5, 40, 1025},
                                {49, 100, 200},
                                {300, 80, 70},
                                {13, 1025, 1024}}) {  // the last one's weights exceed kCachedBytes: tall tiles
    const Int8Layer layer(n, k, 7);
    const auto x = normal_reals(m * k, 8);
    for (const Form form : kForms) {
      use_kernel("scalar");
      set_thread_count(1);
      const auto expected = run(layer, x, form);
      for (const Kernel* kernel : runnable_kernels()) {
        use_kernel(kernel->name);
        for (const int threads : {1, 2, 3}) {
          set_thread_count(threads);
          expect_bits(run(layer, x, form), expected, "kernels and threads");
          expect_bits(run(layer.without_list(), x, form), expected, "without a list of words");
        }
      }
    }
  }
  set_thread_count(1);
  use_kernel("");
}

void test_an_activation_inside_is_the_one_outside() {
  constexpr std::int64_t m = 61, n = 70, k = 130;
  const Int8Layer layer(n, k, 11);
  const auto x = normal_reals(m * k, 12);
  for (const Kernel* kernel : runnable_kernels()) {
    use_kernel(kernel->name);
    for (const Form form : kForms) {
      auto expected = run(layer, x, form);
      float* const data = expected.data();
      active_float_kernel().activate({Activation::gelu, data, 0, FloatType::f32, 1, m * n, data, 0, FloatType::f32});
      expect_bits(run(layer, x, form, Activation::gelu), expected, "activation");
    }
  }
  use_kernel("");
}

void test_a_row_does_not_depend_on_its_batch() {
  constexpr std::int64_t m = 61, n = 70, k = 130;
  const Int8Layer layer(n, k, 9);
  const auto x = normal_reals(m * k, 10);
  for (const Form form : kForms) {
    const auto whole = run(layer, x, form);
    for (const std::int64_t part : {1, 2, 5, 13}) {
      for (std::int64_t first = 0; first < m; first += part) {
        const std::int64_t rows = std::min(part, m - first);
        const std::vector<float> piece(x.begin() + first * k, x.begin() + (first + rows) * k);
        const std::vector<float> expected(whole.begin() + first * n, whole.begin() + (first + rows) * n);
        expect_bits(run(layer, piece, form), expected, "batch split");
      }
    }
  }
}

// 1 MB of codes is quantized at a time, 7500 rows here or 3847 of int16; the rows where blocks meet are like any other.
void test_a_batch_longer_than_the_scratch() {
  constexpr std::int64_t m = 150000, n = 3, k = 60;
  const Int8Layer layer(n, k, 22);
  const auto x = normal_reals(m * k, 23);
  for (const Form form : kForms) {
    const auto whole = run(layer, x, form);
    for (const std::int64_t row :
         {std::int64_t{0}, std::int64_t{3846}, std::int64_t{3847}, std::int64_t{7499}, std::int64_t{7500}, m - 1}) {
      const std::vector<float> piece(x.begin() + row * k, x.begin() + (row + 1) * k);
      const std::vector<float> expected(whole.begin() + row * n, whole.begin() + (row + 1) * n);
      expect_bits(run(layer, piece, form), expected, "a long batch");
    }
  }
}

void test_error_is_within_the_scales() {
  // |y - exact| <= sum over k of (row scale / 2) * |w| + float rounding of a sum of k terms.
  constexpr std::int64_t m = 5, n = 40, k = 300;
  const Int8Layer layer(n, k, 11);
  const auto x = normal_reals(m * k, 12);
  for (const Form form : kForms) {
    const auto y = run(layer, x, form);
    for (std::int64_t i = 0; i < m; ++i) {
      float low = 0, high = 0;
      for (std::int64_t c = 0; c < k; ++c) {
        low = std::min(low, x[static_cast<std::size_t>(i * k + c)]);
        high = std::max(high, x[static_cast<std::size_t>(i * k + c)]);
      }
      const double largest = std::max(-low, high);
      const double step = form == Form::symmetric ? largest / 127
                          : form == Form::affine  ? (static_cast<double>(high) - low) / 255
                          : form == Form::fixed   ? static_cast<double>(kFixed.scale)
                                                  : largest / kMax16;
      for (std::int64_t j = 0; j < n; ++j) {
        double exact = 0, weight_sum = 0;
        for (std::int64_t c = 0; c < k; ++c) {
          const double w = layer.codes[static_cast<std::size_t>(j * k + c)] *
                           static_cast<double>(layer.scale[static_cast<std::size_t>(j)]);
          exact += x[static_cast<std::size_t>(i * k + c)] * w;
          weight_sum += std::fabs(w);
        }
        exact += layer.bias[static_cast<std::size_t>(j)];
        // Half a step for rounding; in affine form zero_point * scale may leave the range by another half step.
        const double steps = form == Form::affine ? 1.0 : 0.5;
        const double bound = steps * step * weight_sum * (1 + 1e-6) + 1e-6 * largest * weight_sum;
        const double error = std::fabs(y[static_cast<std::size_t>(i * n + j)] - exact);
        EXPECT(error <= bound, "output %ld %ld: error %g, bound %g", static_cast<long>(i), static_cast<long>(j), error,
               bound);
      }
    }
  }
}

void test_non_finite_rows_stay_alone() {
  constexpr std::int64_t m = 9, n = 33, k = 100;
  const Int8Layer layer(n, k, 13);
  auto x = normal_reals(m * k, 14);
  for (const Form form : kForms) {
    const auto clean = run(layer, x, form);
    for (const float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity()}) {
      auto poisoned = x;
      poisoned[3 * k + 99] = poison;
      const auto y = run(layer, poisoned, form);
      for (std::int64_t i = 0; i < m * n; ++i) {
        const auto at = static_cast<std::size_t>(i);
        if (i / n == 3) {
          EXPECT(std::isnan(y[at]), "output %ld of the poisoned row is %g", static_cast<long>(i),
                 static_cast<double>(y[at]));
        } else {
          EXPECT(bits_of(y[at]) == bits_of(clean[at]), "another row changed, output %ld", static_cast<long>(i));
        }
      }
    }
  }
}

void test_k_beyond_int32_is_exact() {
  // All codes 127 and -128 in turn by column: sums of 127 * (+-)127 * k pass 2^31 in the uint8 form of the codes.
  const std::int64_t k = 200000, n = 3;
  Int8Layer layer(n, k, 15);
  for (std::size_t i = 0; i < layer.codes.size(); ++i)
    layer.codes[i] = static_cast<std::int8_t>(i / static_cast<std::size_t>(k) % 2 ? -128 : 127);
  pack_weight(layer.codes.data(), n, k, k, 1, layer.strips.data(), layer.column_sum.data());
  layer.scale.assign(static_cast<std::size_t>(n), 1.0f);
  layer.bias.assign(static_cast<std::size_t>(n), 0.0f);
  const std::vector<float> x(static_cast<std::size_t>(k), 127.0f);
  for (const Kernel* kernel : runnable_kernels()) {
    use_kernel(kernel->name);
    const auto symmetric = run(layer, x, Form::symmetric), sixteen = run(layer, x, Form::weight_only);
    for (std::size_t j = 0; j < 3; ++j) {
      const auto exact = static_cast<float>(127 * k * (j % 2 ? -128 : 127));
      EXPECT(symmetric[j] == exact, "%s: %.9g, exact %.9g", kernel->name, static_cast<double>(symmetric[j]),
             static_cast<double>(exact));
      // 16 bits: every code is 32,512, and the row scale, the sum and the output are each rounded once.
      EXPECT(std::fabs(sixteen[j] - exact) <= 3 * 6e-8f * std::fabs(exact), "%s: %.9g", kernel->name,
             static_cast<double>(sixteen[j]));
    }
  }
  use_kernel("");
}

// An integer bias is added to the exact sum, which is rounded once. The codes of x are known here, because the scale is 1.
void integer_bias_is_exact(const Int8Layer& layer, std::int64_t m, const std::vector<std::int32_t>& bias) {
  Random random(24);
  std::uniform_int_distribution<int> code(-128, 127);
  constexpr RowQParams input{1.0f, -3};
  std::vector<float> x(static_cast<std::size_t>(m * layer.k)), got(static_cast<std::size_t>(m * layer.n)), expected;
  for (float& value : x) value = static_cast<float>(code(random) - input.zero_point);
  PackedWeight weight = layer.weight();
  weight.bias = nullptr;
  weight.integer_bias = bias.data();
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < layer.n; ++j) {
      std::int64_t sum = bias[static_cast<std::size_t>(j)];
      for (std::int64_t c = 0; c < layer.k; ++c) {
        sum += static_cast<std::int64_t>(x[static_cast<std::size_t>(i * layer.k + c)]) *
               layer.codes[static_cast<std::size_t>(j * layer.k + c)];
      }
      expected.push_back(static_cast<float>(sum) * layer.scale[static_cast<std::size_t>(j)]);
    }
  }
  for (const Kernel* kernel : runnable_kernels()) {
    use_kernel(kernel->name);
    for (const int threads : {1, 3}) {
      set_thread_count(threads);
      linear_static({x.data(), FloatType::f32, m}, weight, input, {got.data(), FloatType::f32});
      expect_bits(got, expected, "integer bias");
    }
  }
  set_thread_count(1);
  use_kernel("");
}

void test_an_integer_bias_is_part_of_the_exact_sum() {
  Random random(25);
  for (const auto& [m, n, k] : {LayerShape{1, 17, 65}, {49, 100, 200}, {3, 129, 383}, {2, 3, kMaxExactK}}) {
    const Int8Layer layer(n, k, 26);
    const auto room = static_cast<std::int32_t>(std::numeric_limits<std::int32_t>::max() - std::int64_t{255 * 128} * k);
    std::vector<std::int32_t> bias(static_cast<std::size_t>(n));
    for (auto& value : bias) value = std::uniform_int_distribution<std::int32_t>(-room, room)(random);
    bias.front() = room;
    bias.back() = -room;
    integer_bias_is_exact(layer, m, bias);
  }
}

void test_an_integer_bias_that_could_leave_int32_is_refused() {
  const Int8Layer layer(2, 64, 27);
  const std::vector<float> x(64);
  std::vector<float> out(2);
  for (const std::int32_t value : {std::numeric_limits<std::int32_t>::min(), std::numeric_limits<std::int32_t>::max(),
                                   std::numeric_limits<std::int32_t>::max() - 255 * 128 * 64 + 1}) {
    const std::int32_t bias[] = {0, value};
    PackedWeight weight = layer.weight();
    weight.integer_bias = bias;
    bool refused = false;
    try {
      linear_static({x.data(), FloatType::f32, 1}, weight, kFixed, {out.data(), FloatType::f32});
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    EXPECT(refused, "bias %d", value);
  }
}

void test_empty_shapes() {
  const Int8Layer no_k(5, 0, 16);
  for (const Form form : kForms) {
    expect_bits(run(no_k, {}, form), no_k.bias, "k = 0 gives the bias");
    const Int8Layer no_n(0, 8, 17);
    EXPECT(run(no_n, normal_reals(8, 18), form).empty(), "n = 0");
    const Int8Layer layer(4, 8, 19);
    EXPECT(run(layer, {}, form).empty(), "m = 0");
  }
}

void test_int8_mm_equals_int64() {
  Random random(20);
  for (const auto& [m, n, k] : {LayerShape{1, 1, 1}, {3, 17, 65}, {13, 70, 129}, {5, 3, 4097}}) {
    std::vector<std::int8_t> a(static_cast<std::size_t>(m * k)), b(static_cast<std::size_t>(k * n));
    std::vector<std::int32_t> c(static_cast<std::size_t>(m * n));
    for (const CodePattern mode : {CodePattern::random, CodePattern::extremes, CodePattern::alternating}) {
      fill_codes(a, mode, random);
      fill_codes(b, mode, random);
      for (const bool is_signed : {true, false}) {
        for (const Kernel* kernel : runnable_kernels()) {
          use_kernel(kernel->name);
          int8_mm({a.data(), is_signed, b.data(), m, n, k, c.data()});
          for (std::int64_t i = 0; i < m * n; ++i) {
            std::int64_t sum = 0;
            for (std::int64_t d = 0; d < k; ++d) {
              const std::int8_t code = a[static_cast<std::size_t>(i / n * k + d)];
              sum += (is_signed ? code : static_cast<std::uint8_t>(code)) *
                     static_cast<std::int64_t>(b[static_cast<std::size_t>(d * n + i % n)]);
            }
            EXPECT(c[static_cast<std::size_t>(i)] == sum, "%s k=%ld output %ld: %d, not %ld", kernel->name,
                   static_cast<long>(k), static_cast<long>(i), c[static_cast<std::size_t>(i)], static_cast<long>(sum));
          }
        }
      }
    }
  }
  use_kernel("");
}

void test_int8_mm_refuses_inexact_k() {
  std::vector<std::int8_t> a(kMaxExactK + 1), b(kMaxExactK + 1);
  std::int32_t c = 0;
  bool refused = false;
  try {
    int8_mm({a.data(), true, b.data(), 1, 1, kMaxExactK + 1, &c});
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  EXPECT(refused, "k = %ld", static_cast<long>(kMaxExactK + 1));
}

}  // namespace
}  // namespace octavo::test

int main() {
  using namespace octavo::test;
  test_int8_mm_equals_int64();
  test_int8_mm_refuses_inexact_k();
  test_same_bits_on_every_kernel_and_thread_count();
  test_an_activation_inside_is_the_one_outside();
  test_a_row_does_not_depend_on_its_batch();
  test_a_batch_longer_than_the_scratch();
  test_error_is_within_the_scales();
  test_non_finite_rows_stay_alone();
  test_k_beyond_int32_is_exact();
  test_an_integer_bias_is_part_of_the_exact_sum();
  test_an_integer_bias_that_could_leave_int32_is_refused();
  test_empty_shapes();
  return 0;
}
