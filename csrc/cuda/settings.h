// What the library asks of torch's settings.
#pragma once

namespace fused_mlp::cuda {

// Whether float32 products may round their operands to tf32: torch's float32_matmul_precision is
// not "highest".
bool allow_tf32();

}  // namespace fused_mlp::cuda
