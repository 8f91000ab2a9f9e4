// SPDX-License-Identifier: Apache-2.0
// cpuid says what the CPU has, xgetbv which registers the OS saves at a context switch. For AMX, Linux must also be asked
// for permission.
#include "detect.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo {

#if defined(__x86_64__)

namespace {

std::uint64_t xcr0() {
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux lets a process use the 8 KB of tile registers on request. It may refuse, for instance because the kernel is old or
// some thread has a small signal stack. AMX then counts as missing.
bool os_grants_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

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

}  // namespace octavo
