// SPDX-License-Identifier: Apache-2.0
// cpuid says what the CPU has, xgetbv what the OS saves at a context switch, and for AMX Linux must also be asked for
// permission. The build lists the isa/ files in OCTAVO_ISAS, as X(scalar) X(avx2) ...
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <mutex>

#include "check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo {

#define X(name) extern const Kernel kernel_##name;
OCTAVO_ISAS
#undef X

namespace {

#if defined(__x86_64__)

std::uint64_t xcr0() {
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KB of tile registers on request. It may refuse (old kernel, a small signal stack somewhere in
// the process): then there is no AMX, and that is all.
bool os_grants_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::uint32_t detect_features() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const auto bit = [](std::uint32_t word, int i) { return (word >> i & 1u) != 0; };
  const bool fma = bit(c, 12), f16c = bit(c, 29);
  if (!bit(c, 27)) return 0;  // no xgetbv
  const std::uint64_t state = xcr0();
  const bool os_ymm = (state & 0x6) == 0x6, os_zmm = (state & 0xe6) == 0xe6, os_tiles = (state & 0x60000) == 0x60000;
  std::uint32_t a1 = 0, b1 = 0, c1 = 0, d1 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);

  std::uint32_t features = 0;
  const auto add = [&](bool has, Feature feature) { features |= has ? feature : 0u; };
  add(os_ymm && bit(b, 5), kFeatureAvx2);
  add(os_ymm && fma, kFeatureFma);
  add(os_ymm && f16c, kFeatureF16c);
  add(os_ymm && bit(a1, 4), kFeatureAvxVnni);
  add(os_zmm && bit(b, 16), kFeatureAvx512f);
  add(os_zmm && bit(b, 30), kFeatureAvx512bw);
  add(os_zmm && bit(b, 17), kFeatureAvx512dq);
  add(os_zmm && bit(b, 31), kFeatureAvx512vl);
  add(os_zmm && bit(c, 11), kFeatureAvx512vnni);
  if (os_tiles && bit(d, 24) && bit(d, 25) && os_grants_amx()) features |= kFeatureAmxTile | kFeatureAmxInt8;
  return features;
}

#else

std::uint32_t detect_features() { return 0; }

#endif

template <class F>
void inherit(F& entry, F from) {
  if (!entry) entry = from;
}

// The tables with every null entry replaced by the base's, and every base pointing at such a table; slowest first.
class Registry {
 public:
  Registry() {
    std::vector<const Kernel*> tables = {
#define X(name) &kernel_##name,
        OCTAVO_ISAS
#undef X
    };
    std::sort(tables.begin(), tables.end(), [](auto* a, auto* b) { return a->rank < b->rank; });
    const std::uint32_t features = detect_features();
    for (const Kernel* table : tables) {
      built_.push_back(&add(*table));
      if ((table->features & ~features) == 0) runnable_.push_back(built_.back());
    }
    choose_automatic();
  }

  const std::vector<const Kernel*>& built() const { return built_; }
  const std::vector<const Kernel*>& runnable() const { return runnable_; }
  const Kernel& active() const { return *active_.load(std::memory_order_relaxed); }

  std::string reason() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return reason_;
  }

  void use(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (name.empty()) return choose_automatic();
    const Kernel* const kernel = find(runnable_, name);
    require(kernel != nullptr, "use_isa: ", find(built_, name) ? "this CPU cannot run '" : "there is no ISA '", name,
            "'; it can run ", names(runnable_));
    active_ = kernel;
    reason_ = "chosen with use_isa";
  }

 private:
  Kernel& add(const Kernel& table) {
    Kernel& kernel = resolved_.emplace_back(table);
    if (!table.base) return kernel;
    const Kernel& base = *find(built_, table.base->name);
    kernel.base = &base;
    inherit(kernel.multiply, base.multiply);
    inherit(kernel.epilogue, base.epilogue);
    inherit(kernel.widen_row, base.widen_row);
    inherit(kernel.absmax, base.absmax);
    inherit(kernel.min_max, base.min_max);
    inherit(kernel.quantize_row, base.quantize_row);
    inherit(kernel.split_row, base.split_row);
    inherit(kernel.dequantize_row, base.dequantize_row);
    return kernel;
  }

  void choose_automatic() {
    const char* const cap = std::getenv("OCTAVO_MAX_ISA");
    active_ = runnable_.back();
    reason_ = "the fastest that this CPU can run";
    if (!cap || !*cap) return;
    const Kernel* const limit = find(built_, cap);
    require(limit != nullptr, "OCTAVO_MAX_ISA: there is no ISA '", cap, "'; known are ", names(built_));
    if (limit->rank >= runnable_.back()->rank) return;
    for (const Kernel* kernel : runnable_) {
      if (kernel->rank <= limit->rank) active_ = kernel;
    }
    reason_ = "capped by OCTAVO_MAX_ISA=" + std::string(cap);
  }

  static const Kernel* find(const std::vector<const Kernel*>& kernels, const std::string& name) {
    for (const Kernel* kernel : kernels) {
      if (name == kernel->name) return kernel;
    }
    return nullptr;
  }

  static std::string names(const std::vector<const Kernel*>& kernels) {
    std::string text;
    for (const Kernel* kernel : kernels) text += (text.empty() ? "" : ", ") + std::string(kernel->name);
    return text;
  }

  std::deque<Kernel> resolved_;  // a deque, because the tables point at each other
  std::vector<const Kernel*> built_, runnable_;
  std::atomic<const Kernel*> active_{nullptr};
  std::mutex mutex_;
  std::string reason_;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

const std::vector<const Kernel*>& built_kernels() { return registry().built(); }
const std::vector<const Kernel*>& runnable_kernels() { return registry().runnable(); }
const Kernel& active_kernel() { return registry().active(); }
void use_kernel(const std::string& name) { registry().use(name); }
std::string active_reason() { return registry().reason(); }

}  // namespace octavo
