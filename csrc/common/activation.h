// The numbers of the activations, as fused_mlp/activations.py gives them to the ops.
#pragma once

#include <cstdint>

namespace fused_mlp {

enum class Activation : int64_t { kNone, kReLU, kLeakyReLU, kGELU, kGELUTanh, kSiLU, kTanh };

}  // namespace fused_mlp
