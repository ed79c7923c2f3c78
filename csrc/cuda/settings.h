// What the Python layer tells the library.
#pragma once

namespace fused_mlp::cuda {

// Whether float32 products may round their operands to tf32: torch's float32_matmul_precision is
// not "highest". torch has no stable C interface to that setting, so Python passes it on (see
// fused_mlp_cuda_allow_tf32); without Python the default, "highest", stands.
bool allow_tf32();

}  // namespace fused_mlp::cuda

extern "C" {
void fused_mlp_cuda_allow_tf32(int allowed);
}
