// SPDX-License-Identifier: Apache-2.0
// The build lists the files of isa/integer in OCTAVO_ISAS, as X(scalar) X(avx2) ..., the files of isa/float in
// OCTAVO_FLOAT_ISAS and the files of isa/groups in OCTAVO_GROUP_ISAS. Reading the table of an instruction set runs none of the instruction set's code.
#include "registry.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <type_traits>

#include "base/check.h"
#include "detect.h"

namespace octavo {

#define X(name) extern const Kernel kernel_##name;
OCTAVO_ISAS
#undef X
#define X(name) extern const FloatKernel float_kernel_##name;
OCTAVO_FLOAT_ISAS
#undef X
#define X(name) extern const GroupKernel group_kernel_##name;
OCTAVO_GROUP_ISAS
#undef X

namespace {

// Puts the base's function in the place of each null one. Both structs hold pointers to functions and nothing else, and
// these all have one size, so that the pointers can be copied without knowing their names.
template <class Functions>
void inherit(Functions& functions, const Functions& base) {
  using Pointer = void (*)();
  static_assert(std::is_trivially_copyable_v<Functions> && sizeof(Functions) % sizeof(Pointer) == 0);
  constexpr std::size_t kCount = sizeof(Functions) / sizeof(Pointer);
  Pointer own[kCount], inherited[kCount];
  std::memcpy(own, &functions, sizeof own);
  std::memcpy(inherited, &base, sizeof inherited);
  for (std::size_t i = 0; i < kCount; ++i) {
    if (!own[i]) own[i] = inherited[i];
  }
  std::memcpy(&functions, own, sizeof own);
}

template <class Table>
const Table* find(const std::vector<const Table*>& tables, const std::string& name) {
  for (const Table* table : tables) {
    if (name == table->name) return table;
  }
  return nullptr;
}

// The tables in ascending order of rank, complete: null functions are replaced by functions of the base, and `base` points to a
// complete table.
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

  // The fastest runnable table whose rank is `rank` or lower.
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
    inherit<typename Table::Functions>(table, base);
    return table;
  }

  std::deque<Table> resolved_;  // a deque, because tables point to each other and must not move
  std::vector<const Table*> built_, runnable_;
};

class Registry {
 public:
  const std::vector<const Kernel*>& built() const { return kernels_.built(); }
  const std::vector<const Kernel*>& runnable() const { return kernels_.runnable(); }
  const std::vector<const FloatKernel*>& runnable_float() const { return float_kernels_.runnable(); }
  const std::vector<const GroupKernel*>& runnable_groups() const { return group_kernels_.runnable(); }
  const Kernel& active() const { return *active_.load(std::memory_order_relaxed); }
  const FloatKernel& active_float() const { return *active_float_.load(std::memory_order_relaxed); }

  const GroupKernel& active_groups() const { return *active_groups_.load(std::memory_order_relaxed); }

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
    make_active(*kernel);
    reason_ = "chosen with use_isa";
  }

 private:
  void make_active(const Kernel& kernel) {
    active_ = &kernel;
    active_float_ = float_kernels_.within(kernel.rank);
    active_groups_ = group_kernels_.within(kernel.rank);
  }

  void choose_automatic() {
    const char* const cap = std::getenv("OCTAVO_MAX_ISA");
    make_active(*runnable().back());
    reason_ = "the fastest that this CPU can run";
    if (!cap || !*cap) return;
    const Kernel* const limit = find(built(), cap);
    require(limit != nullptr, "OCTAVO_MAX_ISA: there is no ISA '", cap, "'; known are ", names(built()));
    if (limit->rank >= runnable().back()->rank) return;
    make_active(*kernels_.within(limit->rank));
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
  const Tables<GroupKernel> group_kernels_{{
#define X(name) &group_kernel_##name,
                                               OCTAVO_GROUP_ISAS
#undef X
                                           },
                                           features_};
  std::atomic<const Kernel*> active_{nullptr};
  std::atomic<const FloatKernel*> active_float_{nullptr};
  std::atomic<const GroupKernel*> active_groups_{nullptr};
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
const std::vector<const GroupKernel*>& runnable_group_kernels() { return registry().runnable_groups(); }
const GroupKernel& active_group_kernel() { return registry().active_groups(); }
const FloatKernel& active_float_kernel() { return registry().active_float(); }
void use_kernel(const std::string& name) { registry().use(name); }
std::string active_reason() { return registry().reason(); }

}  // namespace octavo
