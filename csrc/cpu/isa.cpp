// The choice of instruction set, once, at the first kernel.

#include <cstdlib>
#include <cstring>

#include "cpu/tensors.h"

namespace fused_mlp {
namespace {

bool avx2_runs() {
#if defined(FUSED_MLP_HAS_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool avx512_runs() {
#if defined(FUSED_MLP_HAS_AVX512)
  return avx2_runs() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

// FUSED_MLP_CPU_ISA=baseline|avx2|avx512 asks for less than the machine has; more is not given.
const Kernels& choose() {
  const char* wanted = std::getenv("FUSED_MLP_CPU_ISA");
  const auto allowed = [&](const char* isa) {
    return wanted == nullptr || *wanted == 0 || std::strcmp(wanted, isa) == 0;
  };
#if defined(FUSED_MLP_HAS_AVX512)
  if (avx512_runs() && allowed("avx512")) return avx512::kKernels;
#endif
#if defined(FUSED_MLP_HAS_AVX2)
  if (avx2_runs() && (allowed("avx2") || allowed("avx512"))) return avx2::kKernels;
#endif
  (void)avx512_runs;
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fused_mlp

// Whether networks of any width run in one op, in float32 and float64 (fused_mlp/backends.py).
extern "C" __attribute__((visibility("default"))) bool fused_mlp_runs_wide() {
  return fused_mlp::kernels().wide;
}

// For `python -m fused_mlp doctor`.
extern "C" __attribute__((visibility("default"))) const char* fused_mlp_isa() {
  return fused_mlp::kernels().isa;
}
