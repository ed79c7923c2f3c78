// The choice of instruction set, once, at the first kernel.

#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/blas.h"
#include "cpu/tensors.h"

namespace fused_mlp {
namespace {

#if defined(FUSED_MLP_HAS_AVX2)
bool avx2_runs() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

#if defined(FUSED_MLP_HAS_AVX512)
bool avx512_runs() {
  return avx2_runs() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#if defined(FUSED_MLP_HAS_AMX_BF16)
// The system hands out the tiles' registers to processes that ask for them.
bool amx_bf16_runs() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return avx512_runs() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// FUSED_MLP_CPU_ISA names the most to be used; more than the machine has is not given.
enum Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

Level most_wanted() {
  const char* wanted = std::getenv("FUSED_MLP_CPU_ISA");
  if (wanted == nullptr || *wanted == 0) return kAmxBf16;
  const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
  for (int level = kAmxBf16; level > kBaseline; --level) {
    if (std::strcmp(wanted, names[level]) == 0) return static_cast<Level>(level);
  }
  return kBaseline;
}

const Kernels& choose() {
  [[maybe_unused]] const Level most = most_wanted();
#if defined(FUSED_MLP_HAS_AMX_BF16)
  if (most >= kAmxBf16 && amx_bf16_runs()) return amx_bf16::kernels();
#endif
#if defined(FUSED_MLP_HAS_AVX512_BF16)
  if (most >= kAvx512Bf16 && avx512_runs() && __builtin_cpu_supports("avx512bf16")) {
    return avx512_bf16::kernels();
  }
#endif
#if defined(FUSED_MLP_HAS_AVX512)
  if (most >= kAvx512 && avx512_runs()) return avx512::kKernels;
#endif
#if defined(FUSED_MLP_HAS_AVX2)
  if (most >= kAvx2 && avx2_runs()) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fused_mlp

// Whether networks of any width run in one op, in float32 and float64 (fused_mlp/on_chip.py).
extern "C" __attribute__((visibility("default"))) bool fused_mlp_runs_wide() {
  return fused_mlp::kernels().wide;
}

// Whether they do in bfloat16.
extern "C" __attribute__((visibility("default"))) bool fused_mlp_runs_bfloat16() {
  return fused_mlp::kernels().bfloat16;
}

// Whether large products of wide layers are those of torch's BLAS, in float32 and float64.
extern "C" __attribute__((visibility("default"))) bool fused_mlp_runs_blas() {
  return fused_mlp::kernels().wide && fused_mlp::blas_is_faster();
}

// For `python -m fused_mlp doctor`.
extern "C" __attribute__((visibility("default"))) const char* fused_mlp_isa() {
  return fused_mlp::kernels().isa;
}
