// Host interface of gemm.cu: linear_relu's own products, and its element-wise ends around a
// library's products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "network.h"

namespace fused_mlp::cuda {

enum class Product : int32_t {
  kLayer = 0,          // y = dropout(relu(x W^T + b))        [rows, out]
  kInputGradient = 1,  // gate(g, y) W                        [rows, in]
  kWeightGradient =
      2,  // gate(g, y)^T x and column sums      [out, in], [out], a set for each split
};

struct GemmParameters {
  const void* x;       // [rows, in]
  const void* weight;  // [out, in]
  const void* bias;    // or null
  const void* g;       // [rows, out]
  const void* output;  // [rows, out]
  void* result;
  const int64_t* seed;  // or null
  int64_t rows, x_stride, g_stride, gradient_stride, rows_per_split;
  double scale;
  int32_t in, out;
  uint32_t threshold;
  Product product;
  int32_t splits;
  int32_t padding;
};

// Element-wise, on packed matrices: y = dropout(relu(y + bias)) in place, or dz = gate(g, y).
struct ElementParameters {
  const void* bias;    // or null
  const void* g;       // [rows, columns] with rows g_stride apart, or null: the forward pass
  const void* output;  // of the forward pass
  void* result;        // forward: in place
  const int64_t* seed;
  int64_t rows, g_stride;
  double scale;
  int32_t columns;
  uint32_t threshold;
  int32_t vectors;  // rows are whole 16-byte packs; filled in at launch
  int32_t padding;
};

// The rule that chooses between our product and a library's: ours up to so many
// multiply-adds, while launches and not arithmetic take the time.
//
// One launch of ours replaces the library's product and, with dropout, a second launch, so the
// limit is higher there. The limits are estimates from an A100's figures (2.5 us a launch, 20
// TFLOP/s of plain FMA at a third of its peak), not measurements.
bool uses_own_product(int64_t rows, int64_t in, int64_t out, bool dropout);

void linear_relu_layer(Math math, DType dtype, GemmParameters parameters, cudaStream_t stream);
void linear_relu_input_gradient(Math math, DType dtype, GemmParameters parameters,
                                cudaStream_t stream);
// How many sets of sums linear_relu_weight_gradient writes to `result`.
int weight_gradient_splits(const GemmParameters& parameters, const Device& device);
void linear_relu_weight_gradient(Math math, DType dtype, GemmParameters parameters,
                                 NetReduceParameters reduce, cudaStream_t stream);
void relu_dropout(DType dtype, const ElementParameters& parameters, cudaStream_t stream);
void relu_gate(DType dtype, const ElementParameters& parameters, cudaStream_t stream);

}  // namespace fused_mlp::cuda
