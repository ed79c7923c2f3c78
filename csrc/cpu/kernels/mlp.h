// What forward and backward of a chain of Linear layers share.
#pragma once

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/few_rows.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

void linear_act(const LinearAct& op);
void linear_act_backward(const LinearActBackward& op);

// The size of a chain.
struct ChainSize {
  int64_t rows = 0;
  int64_t work = 0;      // multiply-adds of a row
  int64_t widest = 0;    // of inputs and outputs
  bool in_cache = true;  // each weight lies in a core's cache
  bool keeps = false;    // all outputs are wanted

  void add(const LinearAct& layer) {
    rows = layer.rows;
    work += layer.in_features * layer.out_features;
    widest = larger(widest, larger(layer.in_features, layer.out_features));
    in_cache = widest <= kCacheWidth;
  }
  // Else one layer runs after the other: a handful of rows reads each weight once, and threads
  // share the features of a wide layer.
  bool walks() const { return in_cache && rows > kFewRows; }
};

}  // namespace fused_mlp::FUSED_MLP_ISA
