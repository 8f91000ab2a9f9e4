// SPDX-License-Identifier: Apache-2.0
// Memory that may not be there, and sizes that int64 may not hold: errors that say how much was wanted.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace octavo {

// Arrives in Python as MemoryError with just this text.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(std::int64_t bytes, const char* purpose) {
    std::ostringstream text;
    text << "out of memory: " << purpose << " needs " << bytes << " bytes";
    text_ = text.str();
  }

  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// Of sizes, which are not negative. What int64 does not hold becomes the largest int64.
inline std::int64_t saturating_product(std::initializer_list<std::int64_t> sizes) {
  std::int64_t product = 1;
  bool overflows = false;
  for (const std::int64_t size : sizes) {
    if (size == 0) return 0;
    overflows |= __builtin_mul_overflow(product, size, &product);
  }
  return overflows ? std::numeric_limits<std::int64_t>::max() : product;
}

// `count` values of 0.
template <class T>
std::vector<T> zeros(std::int64_t count, const char* purpose) {
  try {
    return std::vector<T>(static_cast<std::size_t>(count));
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {
  }
  throw OutOfMemory(saturating_product({count, static_cast<std::int64_t>(sizeof(T))}), purpose);
}

}  // namespace octavo
