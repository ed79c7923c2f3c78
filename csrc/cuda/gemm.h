// Host interface of gemm.cu: linear_act's own products, and its element-wise ends around a
// library's products. linear_relu's are those of ReLU, in kernels that know no other activation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "launch.h"
#include "network.h"

namespace fused_mlp::cuda {

enum class Product : int32_t {
  kLayer = 0,           // y = dropout(activation(norm(x W^T + b)))  [rows, out]
  kInputGradient = 1,   // gate(g, kept) W                           [rows, in]
  kWeightGradient = 2,  // gate(g, kept)^T x and column sums  [out, in], [out], a set for each split
};

// Batch norm of running statistics, by column; without one `mean` is null.
struct EvaluatedNorm {
  const void* mean;
  const void* var;
  const void* weight;  // or null, as is bias
  const void* bias;
  double eps;
  int32_t wide;  // NormFlags
  int32_t padding;
};
enum NormFlags : int32_t {  // these are float whatever the input's type is
  kNormWideMean = 1,
  kNormWideVar = 2,
  kNormWideWeight = 4,
  kNormWideBias = 8,
};

// What stands behind a product.
struct Behind {
  EvaluatedNorm norm;
  const int64_t* seed;  // or null
  double scale, slope;
  uint32_t threshold;
  int32_t kept_input;  // not 0 where a tanh, with dropout behind it, keeps what it saw
  Activation activation;
};

struct GemmParameters {
  const void* x;       // [rows, in]
  const void* weight;  // [out, in]
  const void* bias;    // or null
  const void* g;       // [rows, out]
  const void* kept;    // [rows, out]: what the activation's derivative comes from, or null
  void* result;
  void* seen;  // [rows, out]: what the activation saw, or null
  Behind behind;
  int64_t rows, x_stride, g_stride, gradient_stride, rows_per_split;
  int32_t in, out;
  Product product;
  int32_t splits;
};

// Element-wise, on packed matrices: y = dropout(activation(norm(z + bias))) or dz = gate(g, kept).
struct ElementParameters {
  const void* bias;  // or null
  const void* g;     // [rows, columns] with rows g_stride apart, or null: the forward pass
  const void* from;  // forward: a product; backward: what was kept, or null
  void* result;      // forward: may be `from`
  void* seen;        // forward: z + bias, or null; may be `from`
  Behind behind;
  int64_t rows, g_stride;
  int32_t columns;
  int32_t vectors;  // rows are whole 16-byte packs; filled in at launch
};

// The rule that chooses between our product and a library's: ours up to so many
// multiply-adds, while launches and not arithmetic take the time.
//
// One launch of ours replaces the library's product and, with dropout, a second launch, so the
// limit is higher there. The limits are estimates from an A100's figures (2.5 us a launch, 20
// TFLOP/s of plain FMA at a third of its peak), not measurements.
bool uses_own_product(int64_t rows, int64_t in, int64_t out, bool dropout);

// What can be computed with ReLU alone behind the product runs in the kernels of that.
void linear_act_layer(Math math, DType dtype, GemmParameters parameters, cudaStream_t stream);
void linear_act_input_gradient(Math math, DType dtype, GemmParameters parameters,
                               cudaStream_t stream);
// How many sets of sums linear_act_weight_gradient writes to `result`.
int weight_gradient_splits(const GemmParameters& parameters, const Device& device);
void linear_act_weight_gradient(Math math, DType dtype, GemmParameters parameters,
                                NetReduceParameters reduce, cudaStream_t stream);
void act_elements(DType dtype, ElementParameters parameters, cudaStream_t stream);

}  // namespace fused_mlp::cuda
