// Standardisation over groups of elements: what normalize and batch_norm_act have in common.
//
// Host interface of standardize.cu. A group is the set of elements that share a mean. In both
// layouts an element has three coordinates (outer, middle, inner) with stride 1 along inner:
//     rows     group = outer; its elements are all (middle, inner)
//     columns  group = (outer, inner); its elements are all middle
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace fused_mlp::cuda {

enum StandardizeFlags : int32_t {
  kNormalizes =
      1,  // 1 / (std + eps), std over count - correction; else BatchNorm's 1 / sqrt(var + eps)
  kGivenStatistics = 2,  // forward: from running_mean, running_var; backward: they are constants
  kWideWeight = 4,       // these are float whatever the input's type is
  kWideBias = 8,
  kWideRunningMean = 16,
  kWideRunningVar = 32,
  kRectifies = 64,  // ReLU in place of LeakyReLU
};

enum StandardizePhase : int32_t { kMeasure = 1, kApply = 2 };

// The one parameter of the kernels. Strides count elements.
struct StandardizeParameters {
  const void* x;
  const void* g;       // backward: gradient of the output
  void* y;             // forward: output; backward: gradient of x, or null
  void* partials;      // accumulators [3][chunks * groups], or null with one chunk
  void* mean;          // accumulators [groups]
  void* deviation;     // accumulators [groups]: std for normalize, rstd for BatchNorm
  const void* weight;  // [groups] or null, as are the next five
  const void* bias;
  void* running_mean;
  void* running_var;
  void* grad_weight;
  void* grad_bias;
  int64_t* batches_tracked;
  const int64_t* seed;  // or null: no dropout
  int64_t x_outer, x_middle, g_outer, g_middle, y_outer, y_middle;
  int64_t outer, middle, inner;
  int64_t per_chunk;    // rows layout: elements of a group in a chunk; columns: rows
  int64_t mask_length;  // a group's elements that share a row of dropout's mask; 0: rows of groups
  double eps, correction, momentum, slope;
  double dropout_scale;
  int32_t chunks, lanes, phase, flags;  // lanes: threads that share a row of columns, or a group
  int32_t vectors;     // columns: every row of every tensor starts at a multiple of 16 bytes
  uint32_t threshold;  // of dropout
};

// How a standardisation is cut into blocks: a pure function of the problem and the device.
struct StandardizePlan {
  int64_t blocks;
  int64_t per_chunk;
  int64_t workspace_bytes;  // for `partials`; 0 with one chunk
  int32_t chunks;
  int32_t lanes;
  int32_t threads;
  int32_t vectors;
};

StandardizePlan plan_standardize(DType dtype, bool columns, const StandardizeParameters& shape,
                                 const Device& device);

// One launch where a block sees all of its groups, else two. Fills in the plan's fields. ReLU and
// dropout have kernels of their own.
void standardize_forward(DType dtype, bool columns, const StandardizePlan& plan,
                         StandardizeParameters parameters, cudaStream_t stream);
void standardize_backward(DType dtype, bool columns, const StandardizePlan& plan,
                          StandardizeParameters parameters, cudaStream_t stream);

}  // namespace fused_mlp::cuda
