// SPDX-License-Identifier: Apache-2.0
#include "float_ops.h"

#include "cpu.h"
#include "parallel.h"
#include "quantize.h"

namespace octavo {
namespace {

constexpr std::int64_t kElementGrain = 1 << 14;  // elements, some us, that do not pay for waking a second thread

}  // namespace

void activate(const Activate& all) {
  const FloatKernel& kernel = active_float_kernel();
  constexpr std::int64_t kChunk = 1024;
  parallel((all.count + kChunk - 1) / kChunk, kElementGrain / kChunk, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * kChunk, last = end * kChunk < all.count ? end * kChunk : all.count;
    Activate part = all;
    part.x = static_cast<const char*>(all.x) + first * bytes_of(all.x_type);
    part.out = static_cast<char*>(all.out) + first * bytes_of(all.type);
    part.count = last - first;
    kernel.activate(part);
  });
}

}  // namespace octavo
