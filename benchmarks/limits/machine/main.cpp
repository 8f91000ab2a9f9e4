// SPDX-License-Identifier: Apache-2.0
// What this machine can do at best, as JSON: integer operations per second of each instruction set that it can run, and
// bytes per second read and copied where the data lies in a cache or in memory.
//
// Usage: ceilings [threads]. Every thread works on its own part of the data; the best of several rounds counts. AMX is
// left out: its tiles are fed from the L1 cache, and registers alone would promise what no kernel can reach.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <thread>
#include <vector>

#include "ceilings.h"

volatile int sink = 0;

namespace {

using Work = std::function<double(int thread)>;  // returns what it did: operations or bytes

// Many short rounds: some of them fall between the neighbours' time slices.
constexpr int kRounds = 40;
constexpr double kSeconds = 0.004;
constexpr std::size_t kSizes[] = {256u << 10, 4u << 20, 16u << 20, 512u << 20};
constexpr std::size_t kHugePage = 2u << 20;

// Of this thread alone: while another has the core, no time passes.
double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// One thread's work per second, repeated for kSeconds.
double speed(const Work& work, int thread) {
  work(thread);
  double done = 0, seconds = 0;
  const double start = cpu_seconds();
  while (seconds < kSeconds) {
    done += work(thread);
    seconds = cpu_seconds() - start;
  }
  return done / seconds;
}

// All threads' work per second, in 10^9: the best round.
double best(int thread_count, const Work& work) {
  double fastest = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<double> speeds(static_cast<std::size_t>(thread_count));
    std::vector<std::thread> threads;
    for (int i = 1; i < thread_count; ++i) threads.emplace_back([&, i] { speeds[i] = speed(work, i); });
    speeds[0] = speed(work, 0);
    for (std::thread& thread : threads) thread.join();
    double sum = 0;
    for (double part : speeds) sum += part;
    fastest = std::max(fastest, sum);
  }
  return fastest / 1e9;
}

char* allocate(std::size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = std::aligned_alloc(kHugePage, bytes);
  if (data == nullptr) std::exit(1);
  madvise(data, bytes, MADV_HUGEPAGE);
  std::memset(data, 1, bytes);
  return static_cast<char*>(data);
}

struct Product {
  const char* isa;
  bool is_there;
  double (*multiply)();
};

void print_products(const char* name, int threads, const std::vector<Product>& products) {
  const char* separator = "";
  std::printf(" \"%s\": {", name);
  for (const Product& product : products) {
    if (!product.is_there) continue;
    std::printf("%s\"%s\": %.1f", separator, product.isa, best(threads, [&](int) { return product.multiply(); }));
    separator = ", ";
  }
  std::printf("},\n");
}

// Half of the data to the other half: `bytes` are read and written in all.
double copy(char* data, std::size_t bytes) {
  std::memcpy(data + bytes / 2, data, bytes / 2);
  return static_cast<double>(bytes);
}

double read(const char* data, std::size_t bytes) {
  sink = sink + (__builtin_cpu_supports("avx512f") ? read_avx512(data, bytes) : read_avx2(data, bytes));
  return static_cast<double>(bytes);
}

void print_bandwidth(const char* name, int threads, double (*work)(char*, std::size_t)) {
  const char* separator = "";
  std::printf(" \"%s\": {", name);
  for (std::size_t size : kSizes) {
    char* data = allocate(size);
    const std::size_t part = size / static_cast<std::size_t>(threads) / 2048 * 2048;
    const double gbs = best(threads, [=](int thread) { return work(data + part * thread, part); });
    std::printf("%s\"%zu\": %.1f", separator, size, gbs);
    separator = ", ";
    std::free(data);
  }
  std::printf("}");
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::max(1, std::atoi(arguments[1])) : 1;
  std::printf("{\"threads\": %d,\n", threads);
  const bool avx2 = __builtin_cpu_supports("avx2"), avx512 = __builtin_cpu_supports("avx512f");
  print_products("gops", threads,
                 {{"avx2", avx2, multiply_avx2},
                  {"avx_vnni", __builtin_cpu_supports("avxvnni") != 0, multiply_avx_vnni},
                  {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0, multiply_avx512_vnni}});
  print_products("gflops", threads,
                 {{"avx2", avx2 && __builtin_cpu_supports("fma"), multiply_float_avx2},
                  {"avx512", avx512, multiply_float_avx512},
                  {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0, multiply_bfloat16_avx512}});
  if (avx2) {
    print_bandwidth("read_gbs", threads, [](char* data, std::size_t bytes) { return read(data, bytes); });
    std::printf(",\n");
  }
  print_bandwidth("copy_gbs", threads, copy);
  std::printf("}\n");
  return 0;
}
