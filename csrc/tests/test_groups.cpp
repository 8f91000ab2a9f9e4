// SPDX-License-Identifier: Apache-2.0
// Weights in groups: packing is a permutation; every instruction set gives the bits of the scalar one, for every width of
// codes, kind of scales and of activations, with every thread count and every way of cutting the batch; rows that are not
// finite stay alone; nothing is read beyond the end of an array.
#include <cmath>
#include <limits>

#include "drivers/groups/group_linear.h"
#include "drivers/groups/planes.h"
#include "drivers/pack.h"
#include "registry/registry.h"
#include "support.h"
#include "threads.h"

namespace octavo::test {
namespace {

// Which numbers stand beside the codes.
enum class Scales { per_channel, plain, zero_points, minima, two_levels, table };
constexpr Scales kScales[] = {Scales::per_channel, Scales::plain,      Scales::zero_points,
                              Scales::minima,      Scales::two_levels, Scales::table};

struct Layer {
  Layer(std::int64_t n_, std::int64_t k_, int bits_, std::int64_t group_, Scales scales_, unsigned seed)
      : n(n_),
        k(k_),
        bits(bits_),
        group(group_),
        scales(scales_),
        groups(group ? ceil_divide(k, group) : 1),
        packed(static_cast<std::size_t>(bits == 8 ? packed_bytes(n, k)
                                                  : ceil_divide(n, 16) * strip_bytes_of_planes(k, bits))),
        floats(static_cast<std::size_t>(ceil_divide(n, 16) * groups * 16)),
        integers(floats.size()),
        super(static_cast<std::size_t>(ceil_divide(n, 16) * 32)),
        table(kTableSize),
        bias(static_cast<std::size_t>(n)) {
    Random random(seed);
    std::uniform_int_distribution<int> code(0, (1 << bits) - 1), byte(0, 63), small(0, 127);
    std::uniform_real_distribution<float> real(0.01f, 0.02f), any(-1.0f, 1.0f);
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(n * k));
    for (auto& each : codes) each = static_cast<std::uint8_t>(code(random));
    if (bits == 8) {
      std::vector<std::int32_t> column_sum(static_cast<std::size_t>(n));
      std::vector<std::int8_t> padded(packed.size());
      pack_weight(reinterpret_cast<const std::int8_t*>(codes.data()), n, k, k, 1, padded.data(), column_sum.data());
      std::memcpy(packed.data(), padded.data(), padded.size());
    } else {
      pack_planes(codes.data(), n, k, bits, packed.data());
      std::vector<std::uint8_t> unpacked(codes.size());
      unpack_planes(packed.data(), n, k, bits, unpacked.data());
      EXPECT(unpacked == codes, "codes of %d bits come back", bits);
    }
    for (auto& each : floats) each = real(random);
    for (auto& each : integers) each = static_cast<std::uint8_t>(byte(random));
    for (auto& each : super) each = real(random);
    for (auto& each : table) each = static_cast<std::uint8_t>(small(random));
    for (auto& each : bias) each = any(random);
  }

  GroupWeight weight() {
    GroupWeight w{};
    w.codes = {packed.data(), static_cast<std::ptrdiff_t>(packed.size() / static_cast<std::size_t>(ceil_divide(n, 16))),
               bits, scales == Scales::table ? table.data() : nullptr, false};
    w.scales.groups = groups;
    if (scales != Scales::per_channel) {
      w.scales.scale = floats.data();
      w.scales.scale_type = Number::f32;
    } else {
      w.column_scale = bias.data();
    }
    if (scales == Scales::zero_points || scales == Scales::two_levels) {
      w.scales.minimum = integers.data();
      w.scales.minimum_type = Number::u8;
    }
    if (scales == Scales::minima) {
      w.scales.minimum = floats.data();
      w.scales.minimum_type = Number::f32;
    }
    if (scales == Scales::two_levels) {
      w.scales.scale = integers.data();
      w.scales.scale_type = Number::u8;
      w.scales.super = super.data();
      w.scales.super_type = Number::f32;
      w.scales.supers = 1;
      w.scales.groups_in_super = groups;
    }
    w.group_size = group >= k ? 0 : group;
    w.offset = scales == Scales::zero_points ? 0 : 1 << (bits - 1);
    w.bias = bias.data();
    w.n = n;
    w.k = k;
    return w;
  }

  std::int64_t n, k;
  int bits;
  std::int64_t group;
  Scales scales;
  std::int64_t groups;
  Guarded<std::uint8_t> packed;
  Guarded<float> floats;
  Guarded<std::uint8_t> integers;
  Guarded<float> super;
  Guarded<std::uint8_t> table;
  Guarded<float> bias;
};

std::vector<float> reals(std::int64_t count, unsigned seed) {
  Random random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& each : x) each = normal(random);
  return x;
}

std::vector<float> run(Layer& layer, const std::vector<float>& x, GroupInput input) {
  const auto m = static_cast<std::int64_t>(x.size()) / layer.k;
  Guarded<float> rows(x.size()), out(static_cast<std::size_t>(m * layer.n));
  std::memcpy(rows.data(), x.data(), x.size() * 4);
  linear_groups({rows.data(), FloatType::f32, m}, layer.weight(), input, {out.data(), FloatType::f32});
  return {out.begin(), out.end()};
}

void expect_bits(const std::vector<float>& got, const std::vector<float>& expected, const Layer& layer,
                 GroupInput input) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT(bits_of(got[i]) == bits_of(expected[i]),
           "output %zu of %d bits, groups of %d, scales %d, input %d/%d on %s: %.9g, not %.9g", i, layer.bits,
           static_cast<int>(layer.group), static_cast<int>(layer.scales), input.bits,
           static_cast<int>(input.group_size), active_group_kernel().name, static_cast<double>(got[i]),
           static_cast<double>(expected[i]));
  }
}

void test_same_bits_on_every_kernel() {
  struct Shape {
    std::int64_t m, n, k, group;
  };
  constexpr GroupInput kInputs[] = {{8, 0}, {8, 32}, {8, 128}, {16, 0}};
  unsigned seed = 1;
  for (const auto& [m, n, k, group] :
       {Shape{1, 16, 64, 32}, {3, 70, 100, 0}, {8, 33, 130, 16}, {37, 130, 288, 96}, {2, 65, 544, 64}}) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (const Scales scales : kScales) {
        if (scales == Scales::table && bits != 4) continue;
        Layer layer(n, k, bits, group, scales, ++seed);
        const auto x = reals(m * k, seed);
        for (const GroupInput input : kInputs) {
          use_kernel("scalar");
          const auto expected = run(layer, x, input);
          for (const Kernel* kernel : runnable_kernels()) {
            use_kernel(kernel->name);
            expect_bits(run(layer, x, input), expected, layer, input);
          }
        }
      }
    }
  }
  use_kernel("");
}

void test_same_bits_for_every_thread_count_and_batch() {
  constexpr std::int64_t m = 301, n = 200, k = 192;
  for (const int bits : {4, 8}) {
    Layer layer(n, k, bits, 32, Scales::plain, 5);
    const auto x = reals(m * k, 6);
    for (const Kernel* kernel : runnable_kernels()) {
      if (std::strcmp(kernel->name, "scalar") == 0) continue;  // slow, and the walk is the same
      use_kernel(kernel->name);
      const auto expected = run(layer, x, {8, 32});
      for (const int threads : {2, 3}) {
        set_thread_count(threads);
        expect_bits(run(layer, x, {8, 32}), expected, layer, {8, 32});
      }
      set_thread_count(1);
      for (std::int64_t row = 0; row < m; row += 50) {
        const std::vector<float> one(x.begin() + row * k, x.begin() + (row + 1) * k);
        const std::vector<float> part(expected.begin() + row * n, expected.begin() + (row + 1) * n);
        expect_bits(run(layer, one, {8, 32}), part, layer, {8, 32});
      }
    }
  }
  use_kernel("");
}

void test_rows_that_are_not_finite_stay_alone() {
  constexpr std::int64_t m = 5, n = 40, k = 96;
  for (const Kernel* kernel : runnable_kernels()) {
    use_kernel(kernel->name);
    for (const GroupInput input : {GroupInput{8, 32}, {8, 0}, {16, 0}}) {
      Layer layer(n, k, 4, 32, Scales::minima, 9);
      auto x = reals(m * k, 10);
      const auto expected = run(layer, x, input);
      x[k + 7] = std::numeric_limits<float>::infinity();
      x[3 * k + 95] = std::numeric_limits<float>::quiet_NaN();
      const auto got = run(layer, x, input);
      for (std::size_t i = 0; i < got.size(); ++i) {
        const std::size_t row = i / n;
        EXPECT(row == 1 || row == 3 ? std::isnan(got[i]) : bits_of(got[i]) == bits_of(expected[i]), "output %zu", i);
      }
    }
  }
  use_kernel("");
}

}  // namespace
}  // namespace octavo::test

int main() {
  using namespace octavo::test;
  test_same_bits_on_every_kernel();
  test_same_bits_for_every_thread_count_and_batch();
  test_rows_that_are_not_finite_stay_alone();
  for (const octavo::Kernel* kernel : octavo::runnable_kernels()) std::printf("tested %s\n", kernel->name);
}
