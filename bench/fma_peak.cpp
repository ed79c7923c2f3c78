// Prints the fp32 multiply-adds a second of so many threads, in GFLOP/s: the ceiling of every
// kernel. usage: fma_peak THREADS. Compiled by bench/peaks.py with the flags of the kernels' ISA.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int bytes = 64;
#elif defined(__AVX__)
constexpr int bytes = 32;
#else
constexpr int bytes = 16;
#endif
typedef float Vector __attribute__((vector_size(bytes)));

// A multiply-add takes 4 cycles and 2 start in each: 12 chains keep the units full and leave
// registers for the two factors even where there are 16.
constexpr int chains = 12;

static float run(long turns, float scale, float shift) {
  Vector sums[chains];
  for (int i = 0; i < chains; ++i) sums[i] = Vector{} + static_cast<float>(i);
  const Vector factor = Vector{} + scale, term = Vector{} + shift;
  for (long turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sums[i] = sums[i] * factor + term;
  }
  Vector total = Vector{};
  for (int i = 0; i < chains; ++i) total += sums[i];
  return total[0];
}

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::max(1, std::atoi(arguments[1])) : 1;
  const long turns = 20'000'000;
  const double operations = 2.0 * (bytes / sizeof(float)) * chains * turns * threads;
  std::vector<float> results(threads);
  double best = 0;
  for (int attempt = 0; attempt < 7; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i)
      workers.emplace_back([&, i] { results[i] = run(turns, 0.999f, 0.001f * (count + i)); });
    for (auto& worker : workers) worker.join();
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    best = std::max(best, operations / spent.count() / 1e9);
  }
  volatile float used = 0;  // so that no work is left out
  for (float result : results) used = used + result;
  std::printf("%.1f\n", best);
}
