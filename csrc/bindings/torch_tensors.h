// SPDX-License-Identifier: Apache-2.0
// Tensors of the torch face: new outputs, dtypes, data. LibTorch's stable ABI only; TORCH_TARGET_VERSION makes any other
// torch header a compile error, and the module keeps working when torch is upgraded.
//
// Outputs come from the C shim: torch::stable::empty looks its operator up by name, 0.6 us against 0.15 us.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../kernel.h"
#include "arguments.h"

namespace octavo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<std::int64_t>;

// Asks for 2 MB pages under a large output that will be written whole, as NumPy does for its arrays. Its first touch costs
// one page fault for 2 MB instead of 512: dequantizing to 256 MB of new memory takes 34 ms instead of 144.
inline void advise_huge_pages([[maybe_unused]] const Tensor& out) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = 2 << 20;
  const auto bytes = static_cast<std::uintptr_t>(out.numel()) * out.element_size();
  if (bytes < 2 * kHugePage) return;  // may not hold a whole one
  const auto data = reinterpret_cast<std::uintptr_t>(out.data_ptr());
  const std::uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage,
                       end = (data + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: nothing is lost where it fails
#endif
}

inline Tensor empty(const Sizes& sizes, ScalarType dtype) {
  Sizes strides(sizes.size());
  std::int64_t step = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<std::int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  const auto code = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  const Tensor out(handle);
  advise_huge_pages(out);
  return out;
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline FloatType float_type(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return FloatType::f32;
    case ScalarType::BFloat16: return FloatType::bf16;
    case ScalarType::Half: return FloatType::f16;
    default: require(false, op, ": ", name, " must be float32, bfloat16 or float16");
  }
  return FloatType::f32;
}

inline bool is_code(ScalarType dtype) { return dtype == ScalarType::Char || dtype == ScalarType::Byte; }

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace octavo
