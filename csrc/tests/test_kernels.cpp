// SPDX-License-Identifier: Apache-2.0
// Every kernel that can run here gives the bits of isa/integer/scalar.cpp, in every function of its table, for sizes around
// every edge of a tile or a vector, with buffers that end at a guard page. Two kernels are also tested where the CPU cannot run
// them: AMX on a software model of the tile instructions, AVX-VNNI in EVEX encoding.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "drivers/saturating.h"
#include "registry/registry.h"
#include "support.h"

namespace octavo {
#ifdef OCTAVO_TEST_AMX_MODEL
extern const Kernel kernel_amx_model;
#endif
#ifdef OCTAVO_TEST_AVX_VNNI_EVEX
extern const Kernel kernel_avx_vnni_evex;
#endif
}  // namespace octavo

namespace octavo::test {
namespace {

const Kernel& scalar() { return *built_kernels().front(); }

const char* name_of(CodePattern mode) {
  return mode == CodePattern::random ? "random" : mode == CodePattern::extremes ? "extremes" : "alternating";
}

// Rows of m activations in the form the kernel reads, the last one ending at the guard page.
struct ActivationRows {
  ActivationRows(const Kernel& kernel, const std::vector<std::uint8_t>& codes, int m, std::int64_t k)
      : bytes_per_code(kernel.form == RowForm::s16 ? 2 : 1),
        stride(k * bytes_per_code + 64),
        memory(static_cast<std::size_t>((m - 1) * stride + k * bytes_per_code)) {
    for (int i = 0; i < m; ++i) {
      if (kernel.form == RowForm::s16) {
        std::vector<std::int16_t> wide(static_cast<std::size_t>(k));
        kernel.widen_row(codes.data() + i * k, k, wide.data());
        const auto* const bytes = reinterpret_cast<const std::uint8_t*>(wide.data());
        std::copy_n(bytes, 2 * k, memory.data() + i * stride);
      } else {
        std::copy_n(codes.data() + i * k, k, memory.data() + i * stride);
      }
    }
  }
  std::int64_t bytes_per_code, stride;
  Guarded<std::uint8_t> memory;
};

void multiply_equals_scalar(const Kernel& kernel, TileShape shape, int m, int strips, std::int64_t k_tiles,
                            CodePattern mode) {
  Random random(static_cast<unsigned>(m * 1000 + strips * 100) + static_cast<unsigned>(k_tiles));
  const std::int64_t k = k_tiles * kTileK;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(m * k));
  Guarded<std::int8_t> weight(static_cast<std::size_t>(strips * k * kStripColumns));
  fill_codes(codes, mode, random);
  fill_codes(weight, mode, random);
  const auto list = list_saturating(weight.data(), strips * kStripColumns, k);
  const SaturatingWords words =
      words_in("test", list.data(), static_cast<std::int64_t>(list.size()), strips * kStripColumns);
  const std::size_t outputs = static_cast<std::size_t>(m * strips * kStripColumns);
  std::vector<std::int32_t> expected(outputs, 1);
  Guarded<std::int32_t> got(outputs);

  const bool cold = k_tiles % 2 == 1;  // a hint that changes no sum
  const auto run = [&](const Kernel& with, TileShape shape, std::int32_t* acc) {
    ActivationRows rows(with, codes, m, k);
    const std::int64_t strip_stride = k * kStripColumns;
    for (int first = 0; first < m; first += shape.rows) {
      for (int strip = 0; strip < strips; strip += shape.strips) {
        with.multiply({rows.memory.data() + first * rows.stride,
                       rows.stride,
                       weight.data() + strip * strip_stride,
                       strip_stride,
                       k_tiles,
                       std::min(shape.rows, m - first),
                       std::min(shape.strips, strips - strip),
                       cold,
                       acc + first * strips * kStripColumns + strip * kStripColumns,
                       strips * kStripColumns,
                       {words.offsets ? words.offsets + strip : nullptr, words.words}});
      }
    }
    if (with.leave) with.leave();
  };
  run(scalar(), scalar().tile, expected.data());
  run(kernel, shape, got.data());
  for (std::size_t i = 0; i < outputs; ++i) {
    EXPECT(got[i] == expected[i], "%s m=%d strips=%d k=%ld %s: output %zu is %d, scalar gives %d", kernel.name, m,
           strips, static_cast<long>(k), name_of(mode), i, got[i], expected[i]);
  }
}

void test_multiply(const Kernel& kernel, std::int64_t longest_k = kMaxExactK) {
  for (const CodePattern mode : {CodePattern::random, CodePattern::extremes, CodePattern::alternating}) {
    for (const TileShape shape : {kernel.tile, kernel.tall_tile}) {
      for (int m = 1; shape.rows > 0 && m <= shape.rows + 1; ++m) {
        for (int strips = 1; strips <= shape.strips; ++strips) {
          for (const std::int64_t k_tiles : {0, 1, 2, 5}) {
            multiply_equals_scalar(kernel, shape, m, strips, k_tiles, mode);
          }
        }
      }
    }
    multiply_equals_scalar(kernel, kernel.tile, 1, 1, longest_k / kTileK, mode);  // the largest exact sums
  }
}

// All 65,536 pairs of adjacent codes, in both places of a word, times pairs of activations at which a sum just fits int16, just
// does not, and is farthest from it.
void test_all_pairs(const Kernel& kernel) {
  constexpr int kActivations[] = {0, 1, 127, 128, 129, 253, 254, 255}, kCount = 8;
  Guarded<std::int8_t> weight(kTileBytes);
  std::vector<std::uint8_t> codes(kCount * kCount * kTileK);
  for (const int place : {0, 2}) {
    std::memset(weight.data(), 0, weight.size());
    std::memset(codes.data(), 0, codes.size());
    for (int i = 0; i < kCount * kCount; ++i) {
      codes[static_cast<std::size_t>(i * kTileK + place)] = static_cast<std::uint8_t>(kActivations[i / kCount]);
      codes[static_cast<std::size_t>(i * kTileK + place + 1)] = static_cast<std::uint8_t>(kActivations[i % kCount]);
    }
    ActivationRows rows(kernel, codes, kCount * kCount, kTileK);
    for (int pair = 0; pair < 65536; pair += kStripColumns) {
      for (int j = 0; j < kStripColumns; ++j) {
        weight[static_cast<std::size_t>(j * kLineK + place)] = static_cast<std::int8_t>((pair + j) / 256 - 128);
        weight[static_cast<std::size_t>(j * kLineK + place + 1)] = static_cast<std::int8_t>((pair + j) % 256 - 128);
      }
      const auto list = list_saturating(weight.data(), kStripColumns, kTileK);
      const SaturatingWords words =
          words_in("test", list.data(), static_cast<std::int64_t>(list.size()), kStripColumns);
      for (int first = 0; first < kCount * kCount; first += kernel.tile.rows) {
        const int m = std::min(kernel.tile.rows, kCount * kCount - first);
        std::int32_t acc[kMaxTileOutputs];
        kernel.multiply({rows.memory.data() + first * rows.stride, rows.stride, weight.data(), kTileBytes, 1, m, 1,
                         false, acc, kStripColumns, words});
        for (int i = 0; i < m * kStripColumns; ++i) {
          const std::uint8_t* const a = codes.data() + (first + i / kStripColumns) * kTileK + place;
          const std::int8_t* const w = weight.data() + i % kStripColumns * kLineK + place;
          EXPECT(acc[i] == a[0] * w[0] + a[1] * w[1], "%s: %d * %d + %d * %d gave %d", kernel.name, a[0], w[0], a[1],
                 w[1], acc[i]);
        }
      }
    }
    if (kernel.leave) kernel.leave();
  }
}

constexpr std::int32_t kNothingListed[2] = {};  // a code beside zeros cannot saturate

// All 65,536 products of one activation code and one weight code, in each of the four places of a line.
void test_all_products(const Kernel& kernel) {
  std::vector<std::uint8_t> codes(256 * kTileK);
  Guarded<std::int8_t> weight(kTileBytes * 16);
  for (int place = 0; place < kLineK; ++place) {
    std::memset(codes.data(), 0, codes.size());
    std::memset(weight.data(), 0, weight.size());
    for (int a = 0; a < 256; ++a) codes[static_cast<std::size_t>(a * kTileK + place)] = static_cast<std::uint8_t>(a);
    for (int w = 0; w < 256; ++w) {
      weight[static_cast<std::size_t>(w / 16 * kTileBytes + w % 16 * kLineK + place)] =
          static_cast<std::int8_t>(w - 128);
    }
    ActivationRows rows(kernel, codes, 256, kTileK);
    std::int32_t acc[kStripColumns];
    for (int a = 0; a < 256; ++a) {
      for (int strip = 0; strip < 16; ++strip) {
        kernel.multiply({rows.memory.data() + a * rows.stride,
                         rows.stride,
                         weight.data() + strip * kTileBytes,
                         kTileBytes,
                         1,
                         1,
                         1,
                         false,
                         acc,
                         kStripColumns,
                         {kNothingListed, nullptr}});
        for (int column = 0; column < kStripColumns; ++column) {
          const int w = strip * 16 + column - 128;
          EXPECT(acc[column] == a * w, "%s: %d * %d gave %d", kernel.name, a, w, acc[column]);
        }
      }
    }
    if (kernel.leave) kernel.leave();
  }
}

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kCounts[] = {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130, 1000};

// Reals that a row function may meet: half steps and their neighbours, both zeros, subnormals, huge values and, if
// asked for, non-finite ones.
std::vector<float> awkward_reals(std::size_t count, bool finite, Random& random) {
  std::normal_distribution<float> normal(0.0f, 50.0f);
  std::vector<float> reals(count);
  const float special[] = {0.0f,
                           -0.0f,
                           0.5f,
                           -0.5f,
                           1.5f,
                           2.5f,
                           -2.5f,
                           127.5f,
                           -128.5f,
                           1e-40f,
                           -1e-40f,
                           6e4f,
                           -6e4f,
                           std::nextafter(0.5f, 1.0f),
                           std::nextafter(1.5f, 0.0f),
                           kInf,
                           -kInf,
                           kNan};
  const std::size_t specials = sizeof(special) / sizeof(*special) - (finite ? 3 : 0);
  for (float& real : reals) {
    const std::size_t pick = random() % (3 * specials);
    real = pick < specials ? special[pick] : normal(random);
  }
  return reals;
}

template <class T>
void expect_same(const Kernel& kernel, const char* what, Guarded<T>& got, const std::vector<T>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT(got[i] == expected[i], "%s %s of %zu: element %zu is %ld, scalar gives %ld", kernel.name, what,
           expected.size(), i, static_cast<long>(got[i]), static_cast<long>(expected[i]));
  }
}

void test_ranges(const Kernel& kernel) {
  Random random(1);
  for (const FloatType type : kTypes) {
    for (const int count : kCounts) {
      for (const bool finite : {true, false}) {
        const auto bytes = as_type(awkward_reals(static_cast<std::size_t>(count), finite, random), type);
        Guarded<std::uint8_t> x(bytes.size());
        std::copy(bytes.begin(), bytes.end(), x.data());
        const float largest = kernel.absmax(x.data(), type, count);
        EXPECT(bits_of(largest) == bits_of(scalar().absmax(x.data(), type, count)), "%s absmax %s of %d: %g",
               kernel.name, octavo::test::name_of(type), count, static_cast<double>(largest));
        const RowRange range = kernel.min_max(x.data(), type, count);
        const RowRange expected = scalar().min_max(x.data(), type, count);
        const bool equal = range.min == expected.min && range.max == expected.max;
        EXPECT(equal || (std::isnan(expected.max) && std::isnan(range.max) && std::isnan(range.min)),
               "%s min_max %s of %d: %g %g", kernel.name, octavo::test::name_of(type), count,
               static_cast<double>(range.min), static_cast<double>(range.max));
      }
    }
  }
}

struct CodeForm {
  std::int32_t zero_point, qmin, qmax;
};
constexpr CodeForm kForms[] = {{0, -127, 127}, {-128, -128, 127}, {17, -128, 127}, {128, 1, 255},
                               {0, 0, 255},    {255, 0, 255},     {0, -7, 7}};

void test_codes(const Kernel& kernel) {
  Random random(2);
  for (const FloatType type : kTypes) {
    for (const int count : kCounts) {
      const auto size = static_cast<std::size_t>(count);
      const bool only_finite = count % 2 == 1;
      const auto bytes = as_type(awkward_reals(size, only_finite, random), type);
      Guarded<std::uint8_t> x(bytes.size());
      std::copy(bytes.begin(), bytes.end(), x.data());
      for (const float inverse : {1.0f, 0.37f, 1e-3f, 1e30f, 1e-30f}) {
        for (const CodeForm form : kForms) {
          std::vector<std::uint8_t> expected(size);
          Guarded<std::uint8_t> got(size);
          const bool expected_finite = scalar().quantize_row(
              {x.data(), type, count, inverse, form.zero_point, form.qmin, form.qmax, expected.data()});
          const bool finite =
              kernel.quantize_row({x.data(), type, count, inverse, form.zero_point, form.qmin, form.qmax, got.data()});
          expect_same(kernel, "quantize_row", got, expected);
          EXPECT(finite == expected_finite, "%s quantize_row of %d: finite is %d", kernel.name, count, finite);
        }
        std::vector<std::uint8_t> high(size), low(size);
        Guarded<std::uint8_t> got_high(size), got_low(size);
        scalar().split_row({x.data(), type, count, inverse, high.data(), low.data()});
        kernel.split_row({x.data(), type, count, inverse, got_high.data(), got_low.data()});
        expect_same(kernel, "split_row high", got_high, high);
        expect_same(kernel, "split_row low", got_low, low);
      }
    }
  }
}

void test_dequantize(const Kernel& kernel) {
  Random random(3);
  for (const FloatType type : kTypes) {
    for (const int count : kCounts) {
      Guarded<std::uint8_t> codes(static_cast<std::size_t>(count));
      fill_codes(codes, CodePattern::random, random);
      for (const bool is_signed : {true, false}) {
        for (const float scale : {1.0f, 0.0123f, 1e-38f, 3e37f}) {
          const std::size_t bytes = static_cast<std::size_t>(count * bytes_of(type));
          std::vector<std::uint8_t> expected(bytes);
          Guarded<std::uint8_t> got(bytes);
          const std::int32_t zero_point = is_signed ? -5 : 130;
          scalar().dequantize_row({codes.data(), is_signed, count, scale, zero_point, expected.data(), type});
          kernel.dequantize_row({codes.data(), is_signed, count, scale, zero_point, got.data(), type});
          expect_same(kernel, "dequantize_row", got, expected);
        }
      }
    }
  }
}

// Kernels that read int16 are exact for 16-bit activations, too, up to the longest stretch of k the drivers give them.
void test_multiply_16_bit(const Kernel& kernel) {
  if (kernel.form != RowForm::s16) return;
  Random random(4);
  constexpr std::int64_t k = kMaxExactK16;
  for (const bool extremes : {true, false}) {
    for (int m = 1; m <= kernel.tile.rows; ++m) {
      Guarded<std::int16_t> rows(static_cast<std::size_t>(m * k));
      Guarded<std::int8_t> weight(static_cast<std::size_t>(k * kStripColumns));
      for (auto& code : rows) {
        code =
            static_cast<std::int16_t>(extremes ? -kMax16 : std::uniform_int_distribution<int>(-kMax16, kMax16)(random));
      }
      fill_codes(weight, extremes ? CodePattern::extremes : CodePattern::random, random);
      std::vector<std::int32_t> acc(static_cast<std::size_t>(m * kStripColumns));
      kernel.multiply({rows.data(), 2 * k, weight.data(), 0, k / kTileK, m, 1, false, acc.data(), kStripColumns});
      for (std::size_t i = 0; i < acc.size(); ++i) {
        const std::int64_t row = static_cast<std::int64_t>(i) / kStripColumns, column = i % kStripColumns;
        std::int64_t sum = 0;
        for (std::int64_t at = 0; at < k; ++at) {
          const std::int64_t place = at / kLineK * kLineBytes + column * kLineK + at % kLineK;
          sum += rows[static_cast<std::size_t>(row * k + at)] * weight[static_cast<std::size_t>(place)];
        }
        EXPECT(acc[i] == sum, "%s 16 bit: output %zu is %d, not %ld", kernel.name, i, acc[i], static_cast<long>(sum));
      }
    }
  }
}

bool can_run(const std::string& name) {
  for (const Kernel* kernel : runnable_kernels()) {
    if (name == kernel->name) return true;
  }
  return false;
}

int run() {
  for (const Kernel* kernel : built_kernels()) {
    for (const TileShape shape : {kernel->tile, kernel->tall_tile}) {
      const int outputs = shape.rows * shape.strips * kStripColumns;
      EXPECT(outputs <= kMaxTileOutputs, "%s: a tile has %d outputs, the drivers' stack is smaller", kernel->name,
             outputs);
    }
  }
  for (const Kernel* kernel : runnable_kernels()) {
    test_multiply(*kernel);
    test_all_products(*kernel);
    test_all_pairs(*kernel);
    if (kernel->byte_kernel) {
      test_multiply(*kernel->byte_kernel, kMaxListedK);
      test_all_products(*kernel->byte_kernel);
      test_all_pairs(*kernel->byte_kernel);
    }
    test_multiply_16_bit(*kernel);
    test_ranges(*kernel);
    test_codes(*kernel);
    test_dequantize(*kernel);
    std::printf("%-12s equals scalar\n", kernel->name);
  }
#ifdef OCTAVO_TEST_AMX_MODEL
  test_multiply(kernel_amx_model);
  test_all_products(kernel_amx_model);
  std::printf("%-12s equals scalar on the software model of the tile instructions\n", kernel_amx_model.name);
#endif
#ifdef OCTAVO_TEST_AVX_VNNI_EVEX
  if (can_run("avx512_vnni")) {
    test_multiply(kernel_avx_vnni_evex);
    test_all_products(kernel_avx_vnni_evex);
    std::printf("%-12s equals scalar in EVEX encoding\n", kernel_avx_vnni_evex.name);
  }
#endif
  for (const Kernel* kernel : built_kernels()) {
    if (!can_run(kernel->name)) std::printf("%-12s not covered: this CPU lacks it\n", kernel->name);
  }
  return 0;
}

}  // namespace
}  // namespace octavo::test

int main() { return octavo::test::run(); }
