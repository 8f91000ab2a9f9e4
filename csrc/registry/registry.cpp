// SPDX-License-Identifier: Apache-2.0
// cpuid says what the CPU has, xgetbv what the OS saves at a context switch, and for AMX Linux must also be asked for
// permission. The build lists the isa/ files in OCTAVO_ISAS, as X(scalar) X(avx2) ..., float_isa/ in OCTAVO_FLOAT_ISAS.
#include "registry.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <mutex>

#include "base/check.h"

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
#define X(name) extern const FloatKernel float_kernel_##name;
OCTAVO_FLOAT_ISAS
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
  add(os_zmm && bit(a1, 5), kFeatureAvx512bf16);
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

void inherit_all(Kernel& kernel, const Kernel& base) {
  inherit(kernel.multiply, base.multiply);
  inherit(kernel.epilogue, base.epilogue);
  inherit(kernel.widen_row, base.widen_row);
  inherit(kernel.absmax, base.absmax);
  inherit(kernel.min_max, base.min_max);
  inherit(kernel.quantize_row, base.quantize_row);
  inherit(kernel.split_row, base.split_row);
  inherit(kernel.dequantize_row, base.dequantize_row);
}

void inherit_all(FloatKernel& kernel, const FloatKernel& base) {
  inherit(kernel.activate, base.activate);
  inherit(kernel.attention, base.attention);
  inherit(kernel.attention_few, base.attention_few);
  inherit(kernel.attention_bfloat16, base.attention_bfloat16);
  inherit(kernel.attention_int8, base.attention_int8);
  inherit(kernel.silu_mul, base.silu_mul);
  inherit(kernel.norm, base.norm);
  inherit(kernel.rotate, base.rotate);
}

template <class Table>
const Table* find(const std::vector<const Table*>& tables, const std::string& name) {
  for (const Table* table : tables) {
    if (name == table->name) return table;
  }
  return nullptr;
}

// Tables with every null entry replaced by the base's, and every base pointing at such a table; slowest first.
template <class Table>
class Tables {
 public:
  Tables(std::vector<const Table*> tables, std::uint32_t features) {
    std::sort(tables.begin(), tables.end(), [](auto* a, auto* b) { return a->rank < b->rank; });
    for (const Table* table : tables) {
      built_.push_back(&add(*table));
      if ((table->features & ~features) == 0) runnable_.push_back(built_.back());
    }
  }

  const std::vector<const Table*>& built() const { return built_; }
  const std::vector<const Table*>& runnable() const { return runnable_; }

  // The fastest runnable one of this rank or a lower one.
  const Table* within(int rank) const {
    const Table* fastest = nullptr;
    for (const Table* table : runnable_) {
      if (table->rank <= rank) fastest = table;
    }
    return fastest;
  }

 private:
  Table& add(const Table& given) {
    Table& table = resolved_.emplace_back(given);
    if (!given.base) return table;
    const Table& base = *find(built_, given.base->name);
    table.base = &base;
    inherit_all(table, base);
    return table;
  }

  std::deque<Table> resolved_;  // a deque, because the tables point at each other
  std::vector<const Table*> built_, runnable_;
};

class Registry {
 public:
  const std::vector<const Kernel*>& built() const { return kernels_.built(); }
  const std::vector<const Kernel*>& runnable() const { return kernels_.runnable(); }
  const std::vector<const FloatKernel*>& runnable_float() const { return float_kernels_.runnable(); }
  const Kernel& active() const { return *active_.load(std::memory_order_relaxed); }
  const FloatKernel& active_float() const { return *active_float_.load(std::memory_order_relaxed); }

  Registry() { choose_automatic(); }

  std::string reason() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return reason_;
  }

  void use(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (name.empty()) return choose_automatic();
    const Kernel* const kernel = find(runnable(), name);
    require(kernel != nullptr, "use_isa: ", find(built(), name) ? "this CPU cannot run '" : "there is no ISA '", name,
            "'; it can run ", names(runnable()));
    activate(*kernel);
    reason_ = "chosen with use_isa";
  }

 private:
  void activate(const Kernel& kernel) {
    active_ = &kernel;
    active_float_ = float_kernels_.within(kernel.rank);
  }

  void choose_automatic() {
    const char* const cap = std::getenv("OCTAVO_MAX_ISA");
    activate(*runnable().back());
    reason_ = "the fastest that this CPU can run";
    if (!cap || !*cap) return;
    const Kernel* const limit = find(built(), cap);
    require(limit != nullptr, "OCTAVO_MAX_ISA: there is no ISA '", cap, "'; known are ", names(built()));
    if (limit->rank >= runnable().back()->rank) return;
    activate(*kernels_.within(limit->rank));
    reason_ = "capped by OCTAVO_MAX_ISA=" + std::string(cap);
  }

  static std::string names(const std::vector<const Kernel*>& kernels) {
    std::string text;
    for (const Kernel* kernel : kernels) text += (text.empty() ? "" : ", ") + std::string(kernel->name);
    return text;
  }

  const std::uint32_t features_ = detect_features();
  const Tables<Kernel> kernels_{{
#define X(name) &kernel_##name,
                                    OCTAVO_ISAS
#undef X
                                },
                                features_};
  const Tables<FloatKernel> float_kernels_{{
#define X(name) &float_kernel_##name,
                                               OCTAVO_FLOAT_ISAS
#undef X
                                           },
                                           features_};
  std::atomic<const Kernel*> active_{nullptr};
  std::atomic<const FloatKernel*> active_float_{nullptr};
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
const std::vector<const FloatKernel*>& runnable_float_kernels() { return registry().runnable_float(); }
const Kernel& active_kernel() { return registry().active(); }
const FloatKernel& active_float_kernel() { return registry().active_float(); }
void use_kernel(const std::string& name) { registry().use(name); }
std::string active_reason() { return registry().reason(); }

}  // namespace octavo
