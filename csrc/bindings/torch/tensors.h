// SPDX-License-Identifier: Apache-2.0
// What the torch operators share: new outputs, dtypes, pointers to data. Only LibTorch's stable ABI is used, so that the module
// keeps working when torch is upgraded; TORCH_TARGET_VERSION makes any other torch header a compile error.
//
// Outputs come from the C shim, which takes 0.15 us. torch::stable::empty takes 0.6 us, because it looks its operator up by
// name.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/memory.h"
#include "bindings/arguments.h"
#include "contract/float_kernel.h"
#include "drivers/ids.h"
#include "drivers/pack.h"

namespace octavo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<std::int64_t>;

inline std::string joined(const Sizes& sizes) {
  std::string text;
  for (const std::int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return text;
}

// Asks for 2 MB pages under a large output that will be written whole, as NumPy does for its arrays. Touching 2 MB for the
// first time then costs one page fault instead of 512: dequantizing to 256 MB of new memory takes 34 ms instead of 144.
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

inline std::int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Char:
    case ScalarType::Byte: return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 4;
  }
}

// A new tensor. It is contiguous unless `distance` is given: then its rows, along the last axis, lie `distance` elements apart.
inline Tensor empty(const Sizes& sizes, ScalarType dtype, std::int64_t distance = 0) {
  Sizes strides(sizes.size());
  std::int64_t step = 1, bytes = bytes_of(dtype);
  bool fits = true;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    const std::int64_t size = std::max<std::int64_t>(sizes[d], 1);
    const bool is_last = distance && d + 1 == sizes.size();
    fits = fits && !__builtin_mul_overflow(step, is_last ? distance : size, &step) &&
           !__builtin_mul_overflow(bytes, is_last ? distance : size, &bytes);
  }
  require(fits, "a result of shape [", joined(sizes), "] is too large: bytes from one element to another exceed int64");
  AtenTensorHandle handle = nullptr;
  const auto code = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  if (aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(), code,
                               aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS) {
    throw OutOfMemory(bytes, ("a result of shape [" + joined(sizes) + "]").c_str());
  }
  const Tensor out(handle);
  advise_huge_pages(out);
  return out;
}

inline Tensor contiguous_copy(const Tensor& t) {
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {  // LibTorch passes on that it failed and not why; for dense CPU tensors it is this
    throw OutOfMemory(saturating_product({t.numel(), static_cast<std::int64_t>(t.element_size())}),
                      "a contiguous copy of an argument");
  }
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : contiguous_copy(t); }

// How many rows the axes before `axis` hold together.
inline std::int64_t rows_before(const Tensor& t, std::int64_t axis) {
  std::int64_t rows = 1;
  for (std::int64_t d = 0; d < axis; ++d) rows = saturating_product({rows, t.size(d)});
  return rows;
}

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

inline void check_packed(const char* op, const Tensor& packed, std::int64_t n, std::int64_t k) {
  require(packed.scalar_type() == ScalarType::Char && packed.dim() == 4 &&
              packed.size(0) == ceil_divide(n, kStripColumns) && packed.size(1) == ceil_divide(k, kTileK) &&
              packed.size(2) == kTileBytes / kLineBytes && packed.size(3) == kLineBytes,
          op, ": packed does not hold a weight of ", n, " x ", k, "; need int8 [", ceil_divide(n, kStripColumns), ", ",
          ceil_divide(k, kTileK), ", 16, 64] as pack_weight makes it");
}

// python/octavo/ops/activations.py turns names into these numbers.
inline Activation activation_of(const char* op, std::int64_t activation) {
  require(activation >= 0 && activation <= static_cast<std::int64_t>(Activation::silu), op,
          ": activation must be 0 (none), 1 (relu), 2 (gelu), 3 (gelu_tanh) or 4 (silu), is ", activation);
  return static_cast<Activation>(activation);
}

// A vector of `count` floats as float32: the tensor's data, or a widened copy of them.
class FloatVector {
 public:
  FloatVector(const char* op, const char* name, const Tensor& any, std::int64_t count) : tensor_(dense(any)) {
    require(any.dim() == 1 && any.size(0) == count, op, ": ", name, " must have ", count, " values");
    const FloatType from = float_type(op, name, any.scalar_type());
    if (from == FloatType::f32) return;
    widened_ = zeros<float>(count, "a vector as float32");
    if (from == FloatType::bf16) {
      std::copy_n(octavo::data<torch::headeronly::BFloat16>(tensor_), count, widened_.begin());
    } else {
      std::copy_n(octavo::data<torch::headeronly::Half>(tensor_), count, widened_.begin());
    }
  }

  const float* data() const { return widened_.empty() ? octavo::data<float>(tensor_) : widened_.data(); }

 private:
  Tensor tensor_;
  std::vector<float> widened_;
};

// A tensor [..., columns] as rows that lie at one distance and whose elements are adjacent: the tensor itself, or a contiguous
// copy of it.
struct RowView {
  Tensor tensor;
  std::int64_t rows, columns, stride;

  explicit RowView(const Tensor& any) : tensor(is_rows(any) ? any : dense(any)) {
    const std::int64_t axes = tensor.dim();
    columns = tensor.size(axes - 1);
    rows = rows_before(tensor, axes - 1);
    stride = axes > 1 ? tensor.stride(axes - 2) : columns;
  }

  static bool is_rows(const Tensor& t) {
    const std::int64_t axes = t.dim();
    if (t.stride(axes - 1) != 1) return false;
    for (std::int64_t d = 0; d + 2 < axes; ++d) {
      if (t.stride(d) != t.size(d + 1) * t.stride(d + 1)) return false;
    }
    return true;
  }
};

// The numbers of rows that an embedding is asked for. One that is no row is an IndexError in Python, as torch's is.
struct IdsArgument {
  Tensor tensor;
  Ids ids;

  IdsArgument(const char* op, const Tensor& any, std::int64_t rows) : tensor(dense(any)) {
    const bool wide = any.scalar_type() == ScalarType::Long;
    require(wide || any.scalar_type() == ScalarType::Int, op, ": ids must be int64 or int32");
    ids = {tensor.const_data_ptr(), wide, tensor.numel()};
    for (std::int64_t i = 0; i < ids.count; ++i) {
      if (ids[i] >= 0 && ids[i] < rows) continue;
      throw std::out_of_range(std::string(op) + ": ids holds " + std::to_string(ids[i]) + ", the weight has " +
                              std::to_string(rows) + " rows: ids from 0 to " + std::to_string(rows - 1));
    }
  }

  // [..., k] for ids [...].
  Tensor rows(std::int64_t k, ScalarType dtype) const {
    Sizes sizes(tensor.sizes().begin(), tensor.sizes().end());
    sizes.push_back(k);
    return empty(sizes, dtype);
  }
};

}  // namespace octavo
