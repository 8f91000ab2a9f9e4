// SPDX-License-Identifier: Apache-2.0
// The module's NumPy functions, and what the CPU can run. This file includes pybind11 and no torch header. Arrays are taken as
// they are: pybind11 would convert and copy other dtypes silently, and noconvert forbids it. The GIL is released around the
// kernels. Threads are torch's, by way of base/parallel.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fstream>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "base/parallel.h"
#include "bindings/arguments.h"
#include "drivers/linear.h"
#include "drivers/quantize.h"
#include "registry/registry.h"

namespace py = pybind11;

namespace octavo {
namespace {

template <class T>
using Array =
    py::array_t<T, py::array::c_style>;  // without forcecast, so that nothing is converted behind the caller's back

Rows rows_of(const char* op, const char* name, const py::array& array) {
  require(array.ndim() == 2, op, ": ", name, " must have 2 dimensions [rows, columns], has ", array.ndim());
  return {array.shape(0), array.shape(1)};
}

void check_qparams(const char* op, const Array<float>& scale, const Array<std::int32_t>& zero_point,
                   std::int64_t rows) {
  require(scale.ndim() == 1 && scale.size() == rows, op, ": scale must have one value for each of the ", rows, " rows");
  require(zero_point.ndim() == 1 && zero_point.size() == rows, op, ": zero_point must have one value for each of the ",
          rows, " rows");
}

template <class F>
void without_gil(const F& f) {
  const py::gil_scoped_release nogil;
  f();
}

py::tuple choose_qparams_array(const Array<float>& x, std::int64_t qmin, std::int64_t qmax, bool symmetric) {
  const Rows shape = rows_of("choose_qparams", "x", x);
  check_qparams_range(qmin, qmax, symmetric);
  Array<float> scale(shape.rows);
  Array<std::int32_t> zero_point(shape.rows);
  const CodeRange range{static_cast<std::int32_t>(qmin), static_cast<std::int32_t>(qmax)};
  without_gil([&] {
    choose_qparams(x.data(), FloatType::f32, shape, range, symmetric, scale.mutable_data(), zero_point.mutable_data());
  });
  return py::make_tuple(scale, zero_point);
}

template <class Code>
py::array quantize_array(const Array<float>& x, const Array<float>& scale, const Array<std::int32_t>& zero_point,
                         std::int64_t qmin, std::int64_t qmax) {
  const Rows shape = rows_of("quantize", "x", x);
  check_code_range("quantize", qmin, qmax, std::numeric_limits<Code>::min(), std::numeric_limits<Code>::max());
  check_qparams("quantize", scale, zero_point, shape.rows);
  Array<Code> codes({shape.rows, shape.columns});
  const CodeRange range{static_cast<std::int32_t>(qmin), static_cast<std::int32_t>(qmax)};
  without_gil([&] {
    quantize(x.data(), FloatType::f32, shape, range, scale.data(), zero_point.data(),
             reinterpret_cast<std::uint8_t*>(codes.mutable_data()));
  });
  return codes;
}

template <class Code>
Array<float> dequantize_array(const Array<Code>& codes, const Array<float>& scale,
                              const Array<std::int32_t>& zero_point) {
  const Rows shape = rows_of("dequantize", "codes", codes);
  check_qparams("dequantize", scale, zero_point, shape.rows);
  Array<float> real({shape.rows, shape.columns});
  without_gil([&] {
    dequantize(reinterpret_cast<const std::uint8_t*>(codes.data()), std::is_signed_v<Code>, shape, scale.data(),
               zero_point.data(), real.mutable_data(), FloatType::f32);
  });
  return real;
}

template <class Code>
Array<std::int32_t> int8_mm_array(const Array<Code>& a, const Array<std::int8_t>& b) {
  const Rows a_shape = rows_of("int8_mm", "a", a), b_shape = rows_of("int8_mm", "b", b);
  require(a_shape.columns == b_shape.rows, "int8_mm: a has ", a_shape.columns, " columns, b has ", b_shape.rows,
          " rows; they must be equal");
  const std::int64_t m = a_shape.rows, n = b_shape.columns, k = b_shape.rows;
  Array<std::int32_t> c({m, n});
  without_gil([&] { int8_mm({a.data(), std::is_signed_v<Code>, b.data(), m, n, k, c.mutable_data()}); });
  return c;
}

std::vector<std::string> names(const std::vector<const Kernel*>& kernels) {
  std::vector<std::string> result;
  for (const Kernel* kernel : kernels) result.emplace_back(kernel->name);
  return result;
}

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(": ") + 2);
  }
  return "unknown CPU";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto scale = py::arg("scale").noconvert(), zero_point = py::arg("zero_point").noconvert();
  const auto codes = py::arg("codes").noconvert(), a = py::arg("a").noconvert(), b = py::arg("b").noconvert();
  m.def("choose_qparams", choose_qparams_array, py::arg("x").noconvert(), py::arg("qmin"), py::arg("qmax"),
        py::arg("symmetric"));
  m.def(
      "quantize",
      [](const Array<float>& x, const Array<float>& scale, const Array<std::int32_t>& zero_point, std::int64_t qmin,
         std::int64_t qmax, bool is_signed) {
        const auto quantize_as = is_signed ? quantize_array<std::int8_t> : quantize_array<std::uint8_t>;
        return quantize_as(x, scale, zero_point, qmin, qmax);
      },
      py::arg("x").noconvert(), scale, zero_point, py::arg("qmin"), py::arg("qmax"), py::arg("signed"));
  m.def("dequantize", dequantize_array<std::int8_t>, codes, scale, zero_point);
  m.def("dequantize", dequantize_array<std::uint8_t>, codes, scale, zero_point);
  m.def("int8_mm", int8_mm_array<std::int8_t>, a, b);
  m.def("int8_mm", int8_mm_array<std::uint8_t>, a, b);
  m.def("built_isas", [] { return names(built_kernels()); });
  m.def("runnable_isas", [] { return names(runnable_kernels()); });
  m.def("active_isa", [] { return std::string(active_kernel().name); });
  m.def("active_reason", active_reason);
  m.def("use_isa", use_kernel, py::arg("name"));
  m.def("thread_count", thread_count);
  m.def("cpu_model", cpu_model);
}

}  // namespace octavo
