// See settings.h.
#include "settings.h"

#include <atomic>

namespace fused_mlp::cuda {
namespace {
std::atomic<bool> tf32_allowed{false};
}

bool allow_tf32() { return tf32_allowed.load(std::memory_order_relaxed); }

}  // namespace fused_mlp::cuda

extern "C" __attribute__((visibility("default"))) void fused_mlp_cuda_allow_tf32(int allowed) {
  fused_mlp::cuda::tf32_allowed.store(allowed != 0);
}
