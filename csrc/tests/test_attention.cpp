// SPDX-License-Identifier: Apache-2.0
// Attention of any length, with products of floats and of codes: within a bound of float64, the same bits on every kernel
// and with every thread count, nothing read or written past the ends of tensors and masks, hidden keys without influence.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "drivers/attention.h"
#include "registry/registry.h"
#include "support.h"
#include "threads.h"

namespace octavo::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Two heads of queries that share one head of keys. All tensors end at a guard page.
struct Problem {
  Problem(std::int64_t queries, std::int64_t keys, std::int64_t dimension, unsigned seed)
      : shape{1, 2, 1, queries, keys, dimension},
        q(size(2 * queries * dimension)),
        k(size(keys * dimension)),
        v(size(keys * dimension)),
        add(size(keys)),
        look(size(keys)) {
    Random random(seed);
    std::normal_distribution<float> normal;
    for (auto* reals : {&q, &k, &v, &add}) {
      for (float& real : *reals) real = normal(random);
    }
    for (std::int64_t j = 0; j < keys; ++j) {
      for (std::int64_t d = 0; d < dimension; ++d) k[size(j * dimension + d)] *= 1.0f + static_cast<float>(j) / 200.0f;
      look[size(j)] = j % 5 != 3;
    }
  }

  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

  HeadTensor tensor(Guarded<float>& reals, std::int64_t length) const {
    const std::int64_t row = shape.dimension * 4;
    return {{reals.data(), FloatType::f32, length * row, row}, 0};
  }

  std::vector<float> run(MaskKind kind, bool causal, Precision precision, float scale = 0.25f) {
    Guarded<float> out(q.size());
    AttentionTensors t{};
    t.q = tensor(q, shape.queries);
    t.k = tensor(k, shape.keys);
    t.v = tensor(v, shape.keys);
    t.mask_kind = kind;
    const void* const mask = kind == MaskKind::add ? static_cast<void*>(add.data()) : static_cast<void*>(look.data());
    t.mask = {{mask, FloatType::f32, 0, 0}, 0};
    t.out = out.data();
    attention(shape, t, causal, scale, precision);
    return {out.begin(), out.end()};
  }

  bool sees(std::int64_t i, std::int64_t j, MaskKind kind, bool causal) {
    return (kind != MaskKind::look || look[size(j)]) && (!causal || j <= i + shape.keys - shape.queries);
  }

  AttentionShape shape;
  Guarded<float> q, k, v, add;
  Guarded<std::uint8_t> look;
};

// The row of `out` against float64, with (45) to (47) of docs/numerics.md taken at their largest.
void expect_row(Problem& p, std::int64_t head, std::int64_t i, MaskKind kind, bool causal, const float* out,
                double rounded, double polynomial) {
  const std::int64_t keys = p.shape.keys, dimension = p.shape.dimension;
  const float* const q = p.q.data() + (head * p.shape.queries + i) * dimension;
  std::vector<double> scores(Problem::size(keys), -kInfinity);
  double largest = -kInfinity, magnitude = 0, least = kInfinity, added = 0, total = 0, value = 0;
  for (std::int64_t j = 0; j < keys; ++j) {
    if (!p.sees(i, j, kind, causal)) continue;
    double score = 0, size = 0;
    for (std::int64_t d = 0; d < dimension; ++d) {
      const double product = 0.25 * q[d] * p.k[Problem::size(j * dimension + d)];
      score += product;
      size += std::fabs(product);
      value = std::max(value, std::fabs(static_cast<double>(p.v[Problem::size(j * dimension + d)])));
    }
    if (kind == MaskKind::add) score += p.add[Problem::size(j)];
    if (kind == MaskKind::add) added = std::max(added, std::fabs(static_cast<double>(p.add[Problem::size(j)])));
    scores[Problem::size(j)] = score;
    largest = std::max(largest, score);
    least = std::min(least, score);
    magnitude = std::max(magnitude, size);
  }
  if (largest == -kInfinity) {
    EXPECT(std::all_of(out, out + dimension, [](float y) { return y == 0.0f; }), "query %d sees nothing",
           static_cast<int>(i));
    return;
  }
  for (const double score : scores) total += score > -kInfinity ? std::exp(score - largest) : 0;
  const double u = std::ldexp(1, -24), n = static_cast<double>(keys), blocks = n / 256 + 1;
  const double error = (2 * rounded + static_cast<double>(dimension + 3) * u) * magnitude +
                       u * (2 * added + std::max(std::fabs(largest), std::fabs(least)) + 2 * (largest - least)) +
                       polynomial + blocks * (1.5e-7 + 2 * u);
  const double bound = 1.05 * (2 * error + 2 * rounded + (n + n / 16 + 12) * u) * value + 2 * u * value + 1e-30;
  for (std::int64_t d = 0; d < dimension; ++d) {
    double exact = 0;
    for (std::int64_t j = 0; j < keys; ++j) {
      if (scores[Problem::size(j)] == -kInfinity) continue;
      exact += std::exp(scores[Problem::size(j)] - largest) / total * p.v[Problem::size(j * dimension + d)];
    }
    EXPECT(std::fabs(out[d] - exact) <= bound, "query %lld of %lld, key count %lld: %.9g, not %.9g within %g (%s)",
           static_cast<long long>(i), static_cast<long long>(p.shape.queries), static_cast<long long>(keys),
           static_cast<double>(out[d]), exact, bound, active_float_kernel().name);
  }
}

void expect_close(Problem& p, MaskKind kind, bool causal, const std::vector<float>& out, double rounded,
                  double polynomial) {
  for (std::int64_t head = 0; head < 2; ++head) {
    for (std::int64_t i = 0; i < p.shape.queries; ++i) {
      const std::int64_t row = (i * 2 + head) * p.shape.dimension;
      expect_row(p, head, i, kind, causal, out.data() + row, rounded, polynomial);
    }
  }
}

// The scores of one query in float64, and by how much (55) allows each score to be off with products of codes.
struct CodeRow {
  CodeRow(Problem& p, std::int64_t head, std::int64_t i, MaskKind kind, bool causal)
      : scores(Problem::size(p.shape.keys), -kInfinity), errors(scores.size()) {
    const std::int64_t dimension = p.shape.dimension;
    const double u = std::ldexp(1, -24), sizes = static_cast<double>(dimension);
    const float* const q = p.q.data() + (head * p.shape.queries + i) * dimension;
    const auto [q_largest, q_total] = magnitudes(q, dimension);
    for (std::int64_t j = 0; j < p.shape.keys; ++j) {
      if (!p.sees(i, j, kind, causal)) continue;
      const float* const k = p.k.data() + j * dimension;
      const auto [k_largest, k_total] = magnitudes(k, dimension);
      const double added = kind == MaskKind::add ? p.add[Problem::size(j)] : 0;
      double score = added;
      for (std::int64_t d = 0; d < dimension; ++d) score += 0.25 * q[d] * k[d];
      const double q_step = 0.25 * q_largest / 127, k_step = k_largest / 127;
      const double rounded = q_step * k_total + k_step * 0.25 * q_total + q_step * k_step * sizes / 2;
      scores[Problem::size(j)] = score;
      errors[Problem::size(j)] = (0.5 + std::ldexp(1, -13)) * rounded + 1.1e-4 +
                                 u * ((sizes + 3) * 0.25 * q_largest * k_total + 2 * std::fabs(added));
      largest = std::max(largest, score);
      least = std::min(least, score);
    }
    const double blocks = static_cast<double>(p.shape.keys) / 256 + 1, spread = largest - least;
    for (double& error : errors) {
      error += u * (std::max(std::fabs(largest), std::fabs(least)) + 2 * spread) + blocks * (1.5e-7 + 2 * u);
      farthest = std::max(farthest, error);
    }
  }

  // The largest and the sum.
  static std::pair<double, double> magnitudes(const float* x, std::int64_t count) {
    double most = 0, total = 0;
    for (std::int64_t d = 0; d < count; ++d) {
      most = std::max(most, std::fabs(static_cast<double>(x[d])));
      total += std::fabs(static_cast<double>(x[d]));
    }
    return {most, total};
  }

  double weight(std::size_t j) const { return std::exp(scores[j] - largest); }
  double lost(std::size_t j) const { return weight(j) * std::expm1(errors[j]) + std::exp(farthest) / 510; }

  std::vector<double> scores, errors;
  double largest = -kInfinity, least = kInfinity, farthest = 0;
};

// The row of `out` with products of codes against float64, within (57) of docs/numerics.md.
void expect_code_row(Problem& p, const CodeRow& row, const float* out) {
  const std::int64_t keys = p.shape.keys, dimension = p.shape.dimension;
  double total = 0, least_total = 0;
  for (std::size_t j = 0; j < row.scores.size(); ++j) {
    if (row.scores[j] == -kInfinity) continue;
    total += row.weight(j);
    least_total += row.weight(j) - row.lost(j);
  }
  least_total = std::max(least_total, std::exp(-row.farthest));
  for (std::int64_t d = 0; d < dimension; ++d) {
    const auto value = [&](std::size_t j) {
      return static_cast<double>(p.v[j * Problem::size(dimension) + Problem::size(d)]);
    };
    double exact = 0, off = 0, largest = 0;
    for (std::size_t j = 0; j < row.scores.size(); ++j) {
      if (row.scores[j] > -kInfinity) exact += row.weight(j) / total * value(j);
      largest = std::max(largest, std::fabs(value(j)));
    }
    for (std::size_t j = 0; j < row.scores.size(); ++j) {
      if (row.scores[j] > -kInfinity) off += row.lost(j) / least_total * std::fabs(value(j) - exact);
    }
    const double rounding = std::ldexp(5.0 * static_cast<double>(keys) / 256 + 15, -24);
    const double bound = off + largest * (1.0 / 254 * (1 + std::ldexp(1, -13)) + rounding);
    EXPECT(std::fabs(out[d] - exact) <= bound, "int8, %lld keys: %.9g, not %.9g within %g",
           static_cast<long long>(keys), static_cast<double>(out[d]), exact, bound);
  }
}

void expect_close_codes(Problem& p, MaskKind kind, bool causal, const std::vector<float>& out) {
  for (std::int64_t head = 0; head < 2; ++head) {
    for (std::int64_t i = 0; i < p.shape.queries; ++i) {
      expect_code_row(p, CodeRow(p, head, i, kind, causal), out.data() + (i * 2 + head) * p.shape.dimension);
    }
  }
}

void expect_bits(const std::vector<float>& got, const std::vector<float>& expected, const char* what) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT(bits_of(got[i]) == bits_of(expected[i]), "%s: output %zu is %.9g, not %.9g (%s)", what, i,
           static_cast<double>(got[i]), static_cast<double>(expected[i]), active_float_kernel().name);
  }
}

void test_problem(Problem& p, MaskKind kind, bool causal) {
  use_kernel("scalar");
  const std::vector<float> expected = p.run(kind, causal, Precision::float32);
  expect_close(p, kind, causal, expected, 0, 1.5e-7);
  const std::vector<float> expected_int8 = p.run(kind, causal, Precision::int8);
  expect_close_codes(p, kind, causal, expected_int8);
  for (const Kernel* kernel : runnable_kernels()) {
    use_kernel(kernel->name);
    for (const int threads : {1, 3}) {
      set_thread_count(threads);
      expect_bits(p.run(kind, causal, Precision::float32), expected, "float32");
      expect_bits(p.run(kind, causal, Precision::int8), expected_int8, "int8");
    }
    if (!active_float_kernel().attention_bfloat16) continue;
    expect_close(p, kind, causal, p.run(kind, causal, Precision::bfloat16), std::ldexp(1, -8), 1.1e-4);
  }
  use_kernel("");
}

void test_every_length() {
  for (const std::int64_t keys : {1, 2, 15, 16, 17, 63, 64, 65, 197, 513}) {
    for (const std::int64_t queries : {1, 3, 13, 30}) {
      Problem p(queries, keys, keys % 2 ? 32 : 80, static_cast<unsigned>(keys + queries));
      for (const MaskKind kind : {MaskKind::none, MaskKind::look, MaskKind::add}) {
        test_problem(p, kind, false);
        test_problem(p, kind, true);
      }
    }
  }
}

// Values that no query sees may be anything.
void test_hidden_values_have_no_influence() {
  for (const std::int64_t queries : {2, 30}) {
    Problem p(queries, 300, 64, 7);
    for (const Kernel* kernel : runnable_kernels()) {
      use_kernel(kernel->name);
      const std::vector<float> expected = p.run(MaskKind::look, false, Precision::float32);
      std::vector<float> saved(p.v.begin(), p.v.end());
      for (std::size_t d = 0; d < 64; ++d) p.v[3 * 64 + d] = p.v[298 * 64 + d] = d % 2 ? NAN : kInfinity;
      expect_bits(p.run(MaskKind::look, false, Precision::float32), expected, "hidden values");
      std::copy(saved.begin(), saved.end(), p.v.begin());
    }
  }
  use_kernel("");
}

// Scores are powers 0, -0.83, -1.66 ... of two and values whole numbers up to 127, so that every code is known.
void test_known_codes() {
  constexpr float kLn2 = 0.69314718f;
  Problem p(8, 12, 16, 3);
  std::fill(p.q.begin(), p.q.end(), 0.0f);
  std::fill(p.k.begin(), p.k.end(), 0.0f);
  for (std::size_t row = 0; row < 16; ++row) p.q[16 * row] = 127.0f;
  double total = 0;
  std::vector<double> sums(16);
  for (std::size_t key = 0; key < 12; ++key) {
    p.k[16 * key] = -0.83f * static_cast<float>(key) / 127.0f;
    const double weight = std::nearbyint(255 * std::exp2(-0.83 * static_cast<double>(key)));
    total += weight;
    for (std::size_t d = 0; d < 16; ++d) {
      const std::size_t code = (37 * key + 11 * d) % 255;
      p.v[16 * key + d] = static_cast<float>(code) - 127.0f;
      if (key == 11) p.v[16 * key + d] = d % 2 ? 127.0f : -127.0f;
      sums[d] += weight * static_cast<double>(p.v[16 * key + d]);
    }
  }
  for (const Kernel* kernel : runnable_kernels()) {
    use_kernel(kernel->name);
    const std::vector<float> out = p.run(MaskKind::none, false, Precision::int8, kLn2);
    for (std::size_t i = 0; i < out.size(); ++i) {
      const double exact = sums[i % 16] / total;  // the reciprocal of the total and a product: three roundings
      EXPECT(std::fabs(out[i] - exact) <= std::ldexp(3 * std::fabs(exact), -24), "%zu is %.9g, not %.9g (%s)", i,
             static_cast<double>(out[i]), exact, active_float_kernel().name);
    }
  }
  use_kernel("");
}

}  // namespace
}  // namespace octavo::test

int main() {
  octavo::test::test_every_length();
  octavo::test::test_hidden_values_have_no_influence();
  octavo::test::test_known_codes();
  return 0;
}
