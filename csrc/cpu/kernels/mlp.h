// What forward and backward of a chain of Linear layers share.
#pragma once

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/few_rows.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

void linear_act(const LinearAct& op);
void linear_act_backward(const LinearActBackward& op);

// Blocks of rows through all layers, of at least one row, in float32 and float64.
void walk_chain(const LinearAct* chain, int layers);
void walk_chain_backward(const LinearActBackward* chain, int layers);

// Backward, few rows of a chain of that many multiply-adds a row run layer by layer as wide ones
// do: threads share the features, and no weight's gradient is merged. (17,[256,256],6) takes 33 us
// in place of 52 at 32 rows and as long at 64; (64,[128,128],10) 15.6 in place of 19.3;
// (4,[64,64],2) no less.
constexpr int64_t kLayeredRows = 63;
constexpr int64_t kLayeredWork = int64_t{1} << 14;

// The size of a chain.
struct ChainSize {
  template <class Op>
  ChainSize(const Op* chain, int count) : layers(count) {
    for (int l = 0; l < layers; ++l) add(layer_of(chain[l]));
  }

  int layers;
  int64_t rows = 0;
  int64_t work = 0;      // multiply-adds of a row
  int64_t widest = 0;    // of inputs and outputs
  bool in_cache = true;  // each weight lies in a core's cache

  // Else one layer runs after the other: a handful of rows reads each weight once, and threads
  // share the features of a wide layer.
  bool walks() const { return in_cache && rows > kFewRows; }
  // Forward, a layer by itself that just fits: 256 cubed by BLAS takes 0.9 of the time, 1024 rows
  // as long.
  bool is_one_product() const {
    constexpr int64_t kMost = 1023;
    return layers == 1 && work >= kCacheWidth * kCacheWidth && rows <= kMost &&
           rows >= kBlasForward && blas_is_faster();
  }
  // Backward.
  bool shares_features() const {
    return rows > kFewRows && rows <= kLayeredRows && work >= kLayeredWork;
  }

 private:
  static const LinearAct& layer_of(const LinearAct& op) { return op; }
  static const LinearAct& layer_of(const LinearActBackward& op) { return op.forward; }
  void add(const LinearAct& layer) {
    rows = layer.rows;
    work += layer.in_features * layer.out_features;
    widest = larger(widest, larger(layer.in_features, layer.out_features));
    in_cache = widest <= kCacheWidth;
  }
};

}  // namespace fused_mlp::FUSED_MLP_ISA
