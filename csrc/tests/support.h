// SPDX-License-Identifier: Apache-2.0
// What the test programs share: checks that end the program, buffers that end at a guard page, random data.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "contract/kernel.h"
#include "drivers/quantize.h"
#include "isa/common/half.h"

// Prints where and what, and fails the program.
#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

namespace octavo::test {

constexpr FloatType kTypes[] = {FloatType::f32, FloatType::bf16, FloatType::f16};

// QEMU loads a whole vector where a CPU's masked load reads only some lanes, and may fault. It gets some spare bytes.
inline std::size_t spare_bytes() {
  static const std::size_t spare = std::getenv("OCTAVO_TEST_EMULATED") ? 64 : 0;
  return spare;
}

// `count` values whose last byte touches a page that must not be read or written: an access past the end is a crash.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t count) : count_(count) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = count * sizeof(T) + spare_bytes();
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT(base_ != MAP_FAILED, "mmap of %zu bytes", mapped_);
    EXPECT(mprotect(base_ + mapped_ - page, page, PROT_NONE) == 0, "mprotect");
    data_ = reinterpret_cast<T*>(base_ + mapped_ - page - bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }

  T* data() { return data_; }
  T& operator[](std::size_t i) { return data_[i]; }
  std::size_t size() const { return count_; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }

 private:
  std::size_t count_, mapped_ = 0;
  char* base_ = nullptr;
  T* data_ = nullptr;
};

using Random = std::mt19937;

enum class CodePattern { random, extremes, alternating };

// Fills a buffer of int8 or uint8 with codes. The modes `extremes` and `alternating` reach the largest sums of either sign.
template <class Buffer>
void fill_codes(Buffer& buffer, CodePattern mode, Random& random) {
  using T = std::remove_reference_t<decltype(buffer[0])>;
  constexpr bool is_signed = std::is_signed_v<T>;
  const int low = is_signed ? -128 : 0, high = is_signed ? 127 : 255;
  std::size_t i = 0;
  for (T& code : buffer) {
    if (mode == CodePattern::random) {
      code = static_cast<T>(std::uniform_int_distribution<int>(low, high)(random));
    } else if (mode == CodePattern::extremes) {
      code = static_cast<T>(is_signed ? low : high);
    } else {
      code = static_cast<T>(i % 2 ? low : high);
    }
    ++i;
  }
}

inline const char* name_of(FloatType type) {
  return type == FloatType::f32 ? "f32" : type == FloatType::bf16 ? "bf16" : "f16";
}

// The values of `reals` in `type`, cut off and not rounded: tests need the same values everywhere, not the nearest ones.
inline std::vector<std::uint8_t> as_type(const std::vector<float>& reals, FloatType type) {
  std::vector<std::uint8_t> bytes(reals.size() * static_cast<std::size_t>(bytes_of(type)));
  for (std::size_t i = 0; i < reals.size(); ++i) {
    const std::uint32_t bits = bits_of(reals[i]);
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (type == FloatType::f16) {
      const std::int32_t exponent = static_cast<std::int32_t>(bits >> 23 & 255u) - 112;
      const std::uint32_t sign = bits >> 16 & 0x8000u, fraction = bits >> 13 & 0x3ffu;
      const std::uint32_t magnitude = exponent <= 0    ? fraction >> 5  // some subnormal
                                      : exponent >= 31 ? (0x7c00u | (bits & 0x7fffffu ? 0x200u : 0u))
                                                       : static_cast<std::uint32_t>(exponent) << 10 | fraction;
      half = static_cast<std::uint16_t>(sign | magnitude);
    }
    if (type == FloatType::f32) {
      std::memcpy(&bytes[4 * i], &bits, 4);
    } else {
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return bytes;
}

}  // namespace octavo::test
