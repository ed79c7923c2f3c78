// The kernels behind normalize and batch_norm_act, and how they are launched. Each is there twice,
// with LeakyReLU or nothing behind the affine map and with ReLU and dropout as well.
//
// Forward: measure the moments of each group, then apply y = act((x - mean) * scale + shift).
// Backward: measure the two sums, then apply dx = a du + b (x - mean) + c. A group that one block
// can see is measured and applied in one launch; larger ones are cut into chunks, measured in a
// first launch and merged in a fixed order by every block of the second. No atomics.
#include <algorithm>

#include "standardize_columns.cuh"
#include "standardize_rows.cuh"

#define FUSED_MLP_STANDARDIZE_KERNEL(name, ...)                                \
  extern "C" __global__ void __launch_bounds__(256, 2)                         \
      name(const __grid_constant__ fused_mlp::cuda::StandardizeParameters p) { \
    using namespace fused_mlp::cuda;                                           \
    __VA_ARGS__                                                                \
  }
#define FUSED_MLP_STANDARDIZE_KERNELS(act, any, suffix, T)                                  \
  FUSED_MLP_STANDARDIZE_KERNEL(fused_mlp_columns##act##_forward_##suffix,                   \
                               if (p.vectors)                                               \
                                   standardize::columns_forward<T, kPackWidth<T>, any>(p);  \
                               else standardize::columns_forward<T, 1, any>(p);)            \
  FUSED_MLP_STANDARDIZE_KERNEL(fused_mlp_columns##act##_backward_##suffix,                  \
                               if (p.vectors)                                               \
                                   standardize::columns_backward<T, kPackWidth<T>, any>(p); \
                               else standardize::columns_backward<T, 1, any>(p);)           \
  FUSED_MLP_STANDARDIZE_KERNEL(fused_mlp_rows##act##_forward_##suffix,                      \
                               standardize::rows_forward<T, any>(p);)                       \
  FUSED_MLP_STANDARDIZE_KERNEL(fused_mlp_rows##act##_backward_##suffix,                     \
                               standardize::rows_backward<T, any>(p);)

FUSED_MLP_STANDARDIZE_KERNELS(, false, f32, float)
FUSED_MLP_STANDARDIZE_KERNELS(, false, f64, double)
FUSED_MLP_STANDARDIZE_KERNELS(, false, bf16, __nv_bfloat16)
FUSED_MLP_STANDARDIZE_KERNELS(, false, f16, __half)
FUSED_MLP_STANDARDIZE_KERNELS(_act, true, f32, float)
FUSED_MLP_STANDARDIZE_KERNELS(_act, true, f64, double)
FUSED_MLP_STANDARDIZE_KERNELS(_act, true, bf16, __nv_bfloat16)
FUSED_MLP_STANDARDIZE_KERNELS(_act, true, f16, __half)

namespace fused_mlp::cuda {
namespace {

// A block that reads this little measures and applies in one launch: about a microsecond of one
// multiprocessor, less than a second launch costs.
constexpr int64_t kOneLaunchBytes = 64 * 1024;
constexpr int64_t kLeastChunkBytes = 4 * 1024;  // one 16-byte pack a thread
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int64_t kShortRow = 512;  // elements that a warp or a part of it handles alone

using StandardizeKernel = Kernel<StandardizeParameters>;

#define FUSED_MLP_BY_DTYPE(name)                                                              \
  {FUSED_MLP_KERNEL(name##_f32), FUSED_MLP_KERNEL(name##_f64), FUSED_MLP_KERNEL(name##_bf16), \
   FUSED_MLP_KERNEL(name##_f16)}

// By layout, and whether ReLU or dropout follows.
const StandardizeKernel kForward[2][2][kDTypes] = {
    {FUSED_MLP_BY_DTYPE(fused_mlp_rows_forward), FUSED_MLP_BY_DTYPE(fused_mlp_rows_act_forward)},
    {FUSED_MLP_BY_DTYPE(fused_mlp_columns_forward),
     FUSED_MLP_BY_DTYPE(fused_mlp_columns_act_forward)}};
const StandardizeKernel kBackward[2][2][kDTypes] = {
    {FUSED_MLP_BY_DTYPE(fused_mlp_rows_backward), FUSED_MLP_BY_DTYPE(fused_mlp_rows_act_backward)},
    {FUSED_MLP_BY_DTYPE(fused_mlp_columns_backward),
     FUSED_MLP_BY_DTYPE(fused_mlp_columns_act_backward)}};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* pointer, int64_t outer, int64_t middle, int64_t width) {
  return pointer == nullptr || (reinterpret_cast<uintptr_t>(pointer) % 16 == 0 &&
                                outer % width == 0 && middle % width == 0);
}

// Memory from the first to the last element of a tensor.
Extent extent(const void* data, int64_t outer_stride, int64_t middle_stride,
              const StandardizeParameters& p, DType dtype, Extent::Use use) {
  const int64_t last = (p.outer - 1) * outer_stride + (p.middle - 1) * middle_stride + p.inner - 1;
  return {data, data == nullptr ? 0 : (last + 1) * size_of(dtype), use};
}

void launch_phases(const StandardizeKernel& kernel, bool columns, bool backward, DType dtype,
                   const StandardizePlan& plan, StandardizeParameters p, bool measures,
                   cudaStream_t stream) {
  p.chunks = plan.chunks;
  p.lanes = plan.lanes;
  p.per_chunk = plan.per_chunk;
  p.vectors = plan.vectors;
  const int64_t groups = columns ? p.outer * p.inner : p.outer;
  const int64_t accumulator = accumulator_size(dtype);
  const bool given = p.flags & kGivenStatistics;
  const auto parameter = [&](const void* data, int32_t wide, Extent::Use use) -> Extent {
    const int64_t size = p.flags & wide ? 4 : size_of(dtype);
    return {data, data == nullptr ? 0 : groups * size, use};
  };
  const auto start = [&](int32_t phase) {
    p.phase = phase;
    const bool applies = phase & kApply;
    const Extent::Use statistics = backward ? Extent::kRead : Extent::kWrite;
    const Extent::Use running = given ? Extent::kRead : Extent::kReadWrite;
    // What is not touched in this phase is left out, so a checker would object to it.
    launch(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(plan.threads), 0, stream, p,
           {extent(p.x, p.x_outer, p.x_middle, p, dtype, Extent::kRead),
            extent(backward ? p.g : nullptr, p.g_outer, p.g_middle, p, dtype, Extent::kRead),
            extent(applies ? p.y : nullptr, p.y_outer, p.y_middle, p, dtype, Extent::kWrite),
            {p.partials, p.partials == nullptr ? 0 : plan.workspace_bytes,
             phase == kMeasure ? Extent::kWrite : Extent::kRead},
            {p.mean, applies || backward ? groups * accumulator : 0, statistics},
            {p.deviation, applies || backward ? groups * accumulator : 0, statistics},
            parameter(p.weight, kWideWeight, Extent::kRead),
            parameter(p.bias, kWideBias, Extent::kRead),
            parameter(p.running_mean, kWideRunningMean, running),
            parameter(p.running_var, kWideRunningVar, running),
            parameter(p.grad_weight, kWideWeight, Extent::kWrite),
            parameter(p.grad_bias, kWideBias, Extent::kWrite),
            {p.batches_tracked, p.batches_tracked == nullptr ? 0 : 8, Extent::kReadWrite},
            {p.seed, p.seed == nullptr ? 0 : 16, Extent::kRead}});
  };
  if (!measures) {
    p.partials = nullptr;
    start(kApply);
  } else if (plan.chunks == 1) {
    p.partials = nullptr;
    start(kMeasure | kApply);
  } else {
    start(kMeasure);
    start(kApply);
  }
}

// Which of the two kernels. A dropout that keeps all may scale all the same.
bool general(const StandardizeParameters& p) { return p.flags & kRectifies || p.seed; }

}  // namespace

StandardizePlan plan_standardize(DType dtype, bool columns, const StandardizeParameters& p,
                                 const Device& device) {
  const int64_t size = size_of(dtype), width = 16 / size;
  const int64_t wanted = int64_t{kBlocksPerMultiprocessor} * device.multiprocessors;
  StandardizePlan plan = {};
  int64_t base, length, bytes;  // blocks without chunks; what is cut into chunks; bytes of a block
  if (columns) {
    plan.vectors = p.inner % width == 0 && aligned(p.x, p.x_outer, p.x_middle, width) &&
                   aligned(p.g, p.g_outer, p.g_middle, width) &&
                   aligned(p.y, p.y_outer, p.y_middle, width);
    const int64_t per_lane = plan.vectors ? width : 1;
    const auto tiles = [&] { return p.outer * divide_up(p.inner, plan.lanes * per_lane); };
    plan.lanes = 1;
    while (plan.lanes < standardize::most_lanes(plan.vectors) && plan.lanes * per_lane < p.inner)
      plan.lanes *= 2;
    // More blocks by narrower tiles first, by chunks after that: every block of a tile reads the
    // partial results of all of the tile's chunks. Whole sectors of memory are the narrowest.
    while (plan.lanes * per_lane * size > standardize::kSectorBytes &&
           tiles() < device.multiprocessors)
      plan.lanes /= 2;
    plan.threads = standardize::kThreads;
    base = tiles();
    length = p.middle;
    bytes = length * plan.lanes * per_lane * size;
  } else {
    base = p.outer;
    length = p.middle * p.inner;
    bytes = length * size;
    plan.threads = plan.lanes = standardize::kThreads;
    if (length <= kShortRow) {
      const bool packs = p.middle == 1 && p.inner % width == 0 && aligned(p.x, p.x_outer, 0, width);
      plan.lanes = 1;
      while (plan.lanes < 32 && plan.lanes * (packs ? width : 1) < length) plan.lanes *= 2;
      // Blocks of fewer warps where there would be too few for every multiprocessor.
      while (plan.threads > 32 &&
             divide_up(base * plan.lanes, plan.threads) < device.multiprocessors)
        plan.threads /= 2;
    }
  }
  int64_t chunks = 1;
  if (bytes > kOneLaunchBytes && base < device.multiprocessors)
    chunks = std::min(divide_up(wanted, base), divide_up(bytes, kLeastChunkBytes));
  plan.per_chunk = divide_up(length, chunks);
  if (!columns && plan.per_chunk % width) plan.per_chunk += width - plan.per_chunk % width;
  plan.chunks = static_cast<int32_t>(divide_up(length, plan.per_chunk));
  plan.blocks =
      columns ? base * plan.chunks : divide_up(base * plan.chunks * plan.lanes, plan.threads);
  const int64_t groups = columns ? p.outer * p.inner : p.outer;
  plan.workspace_bytes = plan.chunks > 1 ? 3 * plan.chunks * groups * accumulator_size(dtype) : 0;
  return plan;
}

void standardize_forward(DType dtype, bool columns, const StandardizePlan& plan,
                         StandardizeParameters p, cudaStream_t stream) {
  launch_phases(kForward[columns][general(p)][static_cast<int>(dtype)], columns, false, dtype, plan,
                p, !(p.flags & kGivenStatistics), stream);
}

void standardize_backward(DType dtype, bool columns, const StandardizePlan& plan,
                          StandardizeParameters p, cudaStream_t stream) {
  const bool sums = !(p.flags & kGivenStatistics) || p.grad_weight || p.grad_bias;
  launch_phases(kBackward[columns][general(p)][static_cast<int>(dtype)], columns, true, dtype, plan,
                p, sums, stream);
}

}  // namespace fused_mlp::cuda
