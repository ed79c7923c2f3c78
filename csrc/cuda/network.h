// Host interface of network.cu: a whole network in one kernel.
//
// layers - 2 times Linear+ReLU+Dropout, then Linear+BatchNorm1d+LeakyReLU, then Linear. A block
// keeps all weights in shared memory and walks the network with one tile of rows after another.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace fused_mlp::cuda {

constexpr int kMaxLayers = 8;

// How products are computed, and from what.
enum class Math : int32_t {
  kFloat32 = 0,      // float FMA
  kFloat64 = 1,      // double FMA
  kTf32 = 2,         // float rounded to tf32 in tensor cores
  kBFloat16 = 3,     // tensor cores
  kFloat16 = 4,      // tensor cores
  kBFloat16Fma = 5,  // float FMA for chips without bfloat16 tensor cores
  kFloat16Fma = 6,
};
constexpr int kMaths = 7;

enum NetFlags : int32_t {
  kNetGivenStatistics = 1,  // BatchNorm of running statistics: eval mode
  kNetWideWeight = 2,       // these BatchNorm tensors are float whatever the input is
  kNetWideBias = 4,
  kNetWideRunningMean = 8,
  kNetWideRunningVar = 16,
};

enum NetPhase : int32_t { kNetMeasure = 1, kNetApply = 2 };

// What shapes the launches: everything the plan depends on.
struct NetShape {
  int64_t rows;
  int32_t layers;
  int32_t widths[kMaxLayers + 1];  // input, every hidden, output
  Math math;
};

// Byte offsets in shared memory and leading dimensions; the same struct on host and device.
struct NetMemory {
  int32_t weight[kMaxLayers], bias[kMaxLayers];
  int32_t activation[kMaxLayers];                          // input of layer i, in storage type
  int32_t grad_weight[kMaxLayers], grad_bias[kMaxLayers];  // accumulators of a backward pass
  int32_t grad_ld[kMaxLayers];
  int32_t ld[kMaxLayers + 1];   // of a matrix with widths[i] columns
  int32_t pad[kMaxLayers + 1];  // columns that are computed with: the rest are zero
  int32_t hidden, hidden_ld;    // accumulators before BatchNorm
  int32_t delta[2];             // gradients on their way down, storage type
  int32_t grad_output;
  int32_t stage;  // rows on their way out, accumulators
  int32_t mask;
  int32_t slots, slot_parts;  // per-column statistics: slot_parts for each column
  int32_t transform;          // four vectors of the BatchNorm's width
  int32_t bytes;
};

struct NetParameters {
  const void* x;
  void* y;  // forward: output; backward: gradient of the input, or null
  const void* g;
  const void* weight[kMaxLayers];
  const void* bias[kMaxLayers];
  const void* bn_weight;
  const void* bn_bias;
  void* running_mean;
  void* running_var;
  int64_t* batches_tracked;
  void* saved;      // accumulators: mean, then rstd
  void* partials;   // accumulators [2][blocks * width] of a measuring launch
  void* gradients;  // accumulators [blocks][gradient_stride]
  void* grad_bn_weight;
  void* grad_bn_bias;
  const int64_t* seed;
  int64_t rows, x_stride, g_stride;
  int64_t parameters;       // elements of all weights and biases
  int64_t gradient_stride;  // the same, rounded up to whole sectors
  double momentum, eps, slope;
  double dropout_scale[kMaxLayers];
  uint32_t dropout_threshold[kMaxLayers];  // 0: no dropout
  int32_t widths[kMaxLayers + 1];
  int32_t layers, tile_rows, tiles, phase, flags, measured_blocks;
  NetMemory at;
};

// Elements from one block's gradients to the next one's.
inline int64_t gradient_stride(int64_t parameters) { return (parameters + 7) / 8 * 8; }

constexpr int kMaxSegments = 2 * kMaxLayers;

// Sums the blocks' gradients of each parameter and rounds them.
struct NetReduceParameters {
  const void* gradients;  // accumulators [blocks][gradient_stride]
  int64_t parameters, gradient_stride;
  int64_t begin[kMaxSegments + 1];
  void* target[kMaxSegments];  // null where nobody asks
  int32_t blocks, segments;
};

// How a network is launched: a pure function of the shape and the device.
struct NetPlan {
  int32_t fits;  // whether shared memory holds it; the rest is valid only then
  int32_t tile_rows, tiles, threads;
  int32_t measure_blocks, apply_blocks;
  int32_t one_launch;  // a single block measures and applies
  NetMemory memory;
};

NetPlan plan_research_net(const NetShape& shape, bool backward, const Device& device);

// Launches 1 (eval, or rows that one block takes) or 2 kernels.
void research_net_forward(const NetShape& shape, const NetPlan& plan, NetParameters parameters,
                          DType dtype, cudaStream_t stream);
// Launches 2 or 3 kernels. `measures`: the sums over the batch are needed, which they are in
// training and where BatchNorm's own parameters want gradients.
void research_net_backward(const NetShape& shape, const NetPlan& plan, NetParameters parameters,
                           NetReduceParameters reduce, DType dtype, bool measures,
                           cudaStream_t stream);

// Sums sets of gradients in their order and rounds them to the parameters' type.
void reduce_gradients(DType dtype, const NetReduceParameters& parameters, cudaStream_t stream);

// The math for a dtype on a device; `tf32` allows rounding float32 operands to tf32.
Math choose_math(DType dtype, const Device& device, bool tf32);

}  // namespace fused_mlp::cuda
