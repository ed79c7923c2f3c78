// The whole network in one kernel: forward once or twice, backward twice, then one that sums.
//
// Shared memory holds every weight, the activations of one tile of rows and, backward, the sums of
// the weights' gradients. What the forward pass computed is computed again backward, dropout masks
// included, so nothing the size of the activations is ever written. No atomics: blocks write
// partial results that the next launch merges in the order of blocks.
#include <algorithm>

#include "arithmetics.cuh"
#include "network.cuh"

namespace fused_mlp::cuda::net {
extern __shared__ __align__(16) char shared_memory[];

template <class M>
FUSED_MLP_DEVICE void forward_block(const NetParameters& p) {
  Block<M>{p, shared_memory}.forward();
}
template <class M>
FUSED_MLP_DEVICE void backward_block(const NetParameters& p) {
  Block<M>{p, shared_memory}.backward();
}

// A row of 32 threads walks 32 neighbouring parameters over every eighth block's gradients.
constexpr int kReduceRows = 8;

template <class T>
FUSED_MLP_DEVICE void reduce_block(const NetReduceParameters& p) {
  using A = Acc<T>;
  __shared__ A shared[kReduceRows][32];
  const int64_t k = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  A sum = 0;
  if (k < p.parameters)
    for (int block = threadIdx.y; block < p.blocks; block += kReduceRows)
      sum += static_cast<const A*>(p.gradients)[block * p.gradient_stride + k];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || k >= p.parameters) return;
  for (int row = 1; row < kReduceRows; ++row) sum += shared[row][threadIdx.x];
  for (int s = 0; s < p.segments; ++s)
    if (k >= p.begin[s] && k < p.begin[s + 1] && p.target[s])
      static_cast<T*>(p.target[s])[k - p.begin[s]] = narrow<T>(sum);
}
}  // namespace fused_mlp::cuda::net

#define FUSED_MLP_NET_KERNELS(suffix, on, ...)                                                    \
  extern "C" __global__ void __launch_bounds__(256, 1)                                            \
      fused_mlp_net_forward_##suffix(const __grid_constant__ fused_mlp::cuda::NetParameters p) {  \
    on(fused_mlp::cuda::net::forward_block<__VA_ARGS__>(p));                                      \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(256, 1)                                            \
      fused_mlp_net_backward_##suffix(const __grid_constant__ fused_mlp::cuda::NetParameters p) { \
    on(fused_mlp::cuda::net::backward_block<__VA_ARGS__>(p));                                     \
  }

FUSED_MLP_EACH_ARITHMETIC(FUSED_MLP_NET_KERNELS)

#define FUSED_MLP_NET_REDUCE(suffix, T)                                            \
  extern "C" __global__ void __launch_bounds__(256) fused_mlp_net_reduce_##suffix( \
      const __grid_constant__ fused_mlp::cuda::NetReduceParameters p) {            \
    fused_mlp::cuda::net::reduce_block<T>(p);                                      \
  }

FUSED_MLP_NET_REDUCE(f32, float)
FUSED_MLP_NET_REDUCE(f64, double)
FUSED_MLP_NET_REDUCE(bf16, __nv_bfloat16)
FUSED_MLP_NET_REDUCE(f16, __half)

namespace fused_mlp::cuda {
namespace {

#define FUSED_MLP_BY_MATH(name)                                           \
  {                                                                       \
      FUSED_MLP_KERNEL(name##_f32),    FUSED_MLP_KERNEL(name##_f64),      \
      FUSED_MLP_KERNEL(name##_tf32),   FUSED_MLP_KERNEL(name##_bf16),     \
      FUSED_MLP_KERNEL(name##_f16),    FUSED_MLP_KERNEL(name##_bf16_fma), \
      FUSED_MLP_KERNEL(name##_f16_fma)}

const Kernel<NetParameters> kForward[kMaths] = FUSED_MLP_BY_MATH(fused_mlp_net_forward);
const Kernel<NetParameters> kBackward[kMaths] = FUSED_MLP_BY_MATH(fused_mlp_net_backward);
const Kernel<NetReduceParameters> kReduce[kDTypes] = {
    FUSED_MLP_KERNEL(fused_mlp_net_reduce_f32), FUSED_MLP_KERNEL(fused_mlp_net_reduce_f64),
    FUSED_MLP_KERNEL(fused_mlp_net_reduce_bf16), FUSED_MLP_KERNEL(fused_mlp_net_reduce_f16)};

// What the plan must know of a math: how its matrices lie.
struct MathLayout {
  int storage, accumulator, pad, row_pad;
  int (*leading)(int);
  int (*gradient_leading)(int);
};

template <class M>
MathLayout layout_of_math() {
  return {sizeof(typename M::Storage), sizeof(typename M::A), M::kPad, M::kRowPad, &M::leading,
          &M::gradient_leading};
}

MathLayout layout_of(Math math) {
  switch (math) {
    case Math::kFloat64:
      return layout_of_math<Fma<double, double>>();
    case Math::kTf32:
      return layout_of_math<Tf32>();
    case Math::kBFloat16:
      return layout_of_math<Mma16<__nv_bfloat16>>();
    case Math::kFloat16:
      return layout_of_math<Mma16<__half>>();
    default:
      return layout_of_math<Fma<float, float>>();
  }
}

constexpr int kMostTileRows = 64;
constexpr int64_t kOneBlockRows = 64;  // as many as one block measures and applies in one launch
constexpr int kReservedShared = 1024;  // the system takes this much of every block's shared memory

// Hands out shared memory, 16-byte aligned.
struct Allocator {
  int64_t used = 0;
  int32_t take(int64_t bytes) {
    const int64_t at = used;
    used += (bytes + 15) / 16 * 16;
    return static_cast<int32_t>(std::min<int64_t>(at, INT32_MAX));
  }
};

// Lays out shared memory; the bytes may exceed what a block can have.
int64_t lay_out(const NetShape& shape, bool backward, int rows, int threads, NetMemory* m) {
  const MathLayout math = layout_of(shape.math);
  const int layers = shape.layers, channels = shape.widths[layers - 1];
  Allocator shared;
  *m = {};
  for (int i = 0; i <= layers; ++i) {
    m->ld[i] = math.leading(shape.widths[i]);
    m->pad[i] = round_up(shape.widths[i], math.pad);
  }
  for (int i = 0; i < layers; ++i) {
    m->weight[i] =
        shared.take(int64_t{round_up(shape.widths[i + 1], math.row_pad)} * m->ld[i] * math.storage);
    m->bias[i] = shared.take(int64_t{m->pad[i + 1]} * math.accumulator);
  }
  m->slot_parts = std::max(1, std::min(threads / channels, rows));
  m->slots = shared.take(int64_t{3} * m->slot_parts * channels * math.accumulator);
  m->transform = shared.take(int64_t{5} * m->pad[layers - 1] * math.accumulator);
  int most_groups = 0;
  for (int i = 0; i < layers - 2; ++i) most_groups = std::max(most_groups, (m->pad[i + 1] + 7) / 8);
  m->mask = shared.take(int64_t{rows} * most_groups);
  const auto matrix = [&](int ld) { return int64_t{rows} * ld * math.storage; };
  // A measuring and an applying launch share this layout, so it has room for both.
  m->hidden_ld = m->pad[layers - 1] + (math.pad == 16 ? 8 : 4);
  if (math.pad == 16)
    m->hidden_ld = round_up(m->pad[layers - 1], 32) + 8;
  else
    m->hidden_ld = math.leading(shape.widths[layers - 1]);
  const int64_t hidden = int64_t{rows} * m->hidden_ld * math.accumulator;
  m->hidden = shared.take(hidden);
  if (!backward) {
    int64_t even = 0, odd = 0;  // activations take turns
    for (int i = 0; i < layers; ++i)
      (i % 2 ? odd : even) = std::max(i % 2 ? odd : even, matrix(m->ld[i]));
    const int32_t buffers[2] = {shared.take(even), shared.take(odd)};
    for (int i = 0; i < layers; ++i) m->activation[i] = buffers[i % 2];
    m->stage = shared.take(int64_t{rows} * shape.widths[layers] * math.accumulator);
    m->bytes = static_cast<int32_t>(std::min<int64_t>(shared.used, INT32_MAX));
    return shared.used;
  }
  int widest = 0;
  for (int i = 0; i < layers; ++i) {
    m->activation[i] = shared.take(matrix(m->ld[i]));
    if (i > 0) widest = std::max(widest, m->ld[i]);
    m->grad_ld[i] = math.gradient_leading(shape.widths[i]);
    m->grad_weight[i] =
        shared.take(int64_t{shape.widths[i + 1]} * m->grad_ld[i] * math.accumulator);
    m->grad_bias[i] = shared.take(int64_t{shape.widths[i + 1]} * math.accumulator);
  }
  m->delta[0] = shared.take(matrix(widest));
  m->delta[1] = layers > 2 ? shared.take(matrix(widest)) : m->delta[0];
  m->grad_output = shared.take(matrix(m->ld[layers]));
  m->stage = shared.take(std::max(hidden, int64_t{rows} * shape.widths[0] * math.accumulator));
  m->bytes = static_cast<int32_t>(std::min<int64_t>(shared.used, INT32_MAX));
  return shared.used;
}

DType accumulator_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

Extent matrix_extent(const void* data, int64_t rows, int64_t stride, int64_t columns, DType dtype,
                     Extent::Use use) {
  return {data, data ? ((rows - 1) * stride + columns) * size_of(dtype) : 0, use};
}

// Launches with the extents of everything the parameters point to.
void launch_net(const Kernel<NetParameters>& kernel, const NetPlan& plan, int blocks, bool backward,
                DType dtype, const NetParameters& p, cudaStream_t stream) {
  const int channels = p.widths[p.layers - 1];
  const int64_t accumulator = size_of(accumulator_dtype(dtype));
  const bool applies = p.phase & kNetApply;
  const auto parameter = [&](const void* data, int32_t wide, Extent::Use use) -> Extent {
    return {data, data ? channels * (p.flags & wide ? 4 : size_of(dtype)) : 0, use};
  };
  const auto layer = [&](const void* const* list, int i, bool is_bias) -> Extent {
    if (i >= p.layers) return {nullptr, 0, Extent::kRead};
    return {list[i], p.widths[i + 1] * (is_bias ? 1 : p.widths[i]) * size_of(dtype), Extent::kRead};
  };
  const Extent::Use running = p.flags & kNetGivenStatistics ? Extent::kRead : Extent::kReadWrite;
  static_assert(kMaxLayers == 8, "one entry a layer below");
  const int y_width = backward ? p.widths[0] : p.widths[p.layers];
  launch(kernel, dim3(blocks), dim3(plan.threads), plan.memory.bytes, stream, p,
         {matrix_extent(p.x, p.rows, p.x_stride, p.widths[0], dtype, Extent::kRead),
          matrix_extent(applies ? p.y : nullptr, p.rows, y_width, y_width, dtype, Extent::kWrite),
          matrix_extent(backward ? p.g : nullptr, p.rows, p.g_stride, p.widths[p.layers], dtype,
                        Extent::kRead),
          layer(p.weight, 0, false),
          layer(p.weight, 1, false),
          layer(p.weight, 2, false),
          layer(p.weight, 3, false),
          layer(p.weight, 4, false),
          layer(p.weight, 5, false),
          layer(p.weight, 6, false),
          layer(p.weight, 7, false),
          layer(p.bias, 0, true),
          layer(p.bias, 1, true),
          layer(p.bias, 2, true),
          layer(p.bias, 3, true),
          layer(p.bias, 4, true),
          layer(p.bias, 5, true),
          layer(p.bias, 6, true),
          layer(p.bias, 7, true),
          parameter(p.bn_weight, kNetWideWeight, Extent::kRead),
          parameter(p.bn_bias, kNetWideBias, Extent::kRead),
          parameter(p.running_mean, kNetWideRunningMean, running),
          parameter(p.running_var, kNetWideRunningVar, running),
          {p.batches_tracked, p.batches_tracked ? 8 : 0, Extent::kReadWrite},
          {p.saved, backward || applies ? 2 * channels * accumulator : 0,
           backward ? Extent::kRead : Extent::kWrite},
          {p.partials, p.partials ? 2 * p.measured_blocks * channels * accumulator : 0,
           p.phase == kNetMeasure ? Extent::kWrite : Extent::kRead},
          {p.gradients, applies && p.gradients ? blocks * p.gradient_stride * accumulator : 0,
           Extent::kWrite},
          parameter(applies ? p.grad_bn_weight : nullptr, kNetWideWeight, Extent::kWrite),
          parameter(applies ? p.grad_bn_bias : nullptr, kNetWideBias, Extent::kWrite),
          {p.seed, p.seed ? 16 : 0, Extent::kRead}});
}

void fill_in(const NetShape& shape, const NetPlan& plan, NetParameters* p) {
  p->rows = shape.rows;
  p->layers = shape.layers;
  std::copy(shape.widths, shape.widths + kMaxLayers + 1, p->widths);
  p->tile_rows = plan.tile_rows;
  p->tiles = plan.tiles;
  p->measured_blocks = plan.measure_blocks;
  p->at = plan.memory;
}

}  // namespace

Math choose_math(DType dtype, const Device& device, bool tf32) {
  const bool tensor_cores = device.capability >= 80;
  switch (dtype) {
    case DType::kFloat64:
      return Math::kFloat64;
    case DType::kBFloat16:
      return tensor_cores ? Math::kBFloat16 : Math::kBFloat16Fma;
    case DType::kFloat16:
      return tensor_cores ? Math::kFloat16 : Math::kFloat16Fma;
    default:
      return tf32 && tensor_cores ? Math::kTf32 : Math::kFloat32;
  }
}

NetPlan plan_research_net(const NetShape& shape, bool backward, const Device& device) {
  NetPlan plan = {};
  if (shape.layers < 2 || shape.layers > kMaxLayers) return plan;
  int widest = 0;
  for (int i = 0; i <= shape.layers; ++i) {
    if (shape.widths[i] < 1 || shape.widths[i] > 4096) return plan;
    if (i > 0) widest = std::max(widest, shape.widths[i]);
  }
  plan.threads = widest <= 64 ? 128 : 256;
  const int limit = device.shared_bytes_per_block;
  // The most rows a tile can have, and no more than leave work for every multiprocessor.
  plan.one_launch = shape.rows <= kOneBlockRows;
  int wanted = kMostTileRows;
  if (!plan.one_launch)
    while (wanted > 16 && shape.rows <= int64_t{wanted} * device.multiprocessors) wanted /= 2;
  else
    while (wanted > 16 && wanted / 2 >= shape.rows) wanted /= 2;
  for (plan.tile_rows = wanted; plan.tile_rows >= 16; plan.tile_rows /= 2) {
    if (lay_out(shape, backward, plan.tile_rows, plan.threads, &plan.memory) > limit) continue;
    const int64_t tiles = (shape.rows + plan.tile_rows - 1) / plan.tile_rows;
    if (tiles > INT32_MAX) return plan;
    plan.fits = 1;
    plan.tiles = static_cast<int32_t>(tiles);
    const int resident = std::clamp(
        device.shared_bytes_per_multiprocessor / (plan.memory.bytes + kReservedShared), 1, 4);
    const int64_t most = plan.one_launch ? 1 : device.multiprocessors;
    plan.measure_blocks = static_cast<int32_t>(std::min(tiles, most));
    // A block more a multiprocessor costs a set of weight gradients backward, little forward.
    plan.apply_blocks =
        static_cast<int32_t>(std::min(tiles, backward || plan.one_launch ? most : most * resident));
    return plan;
  }
  return plan;
}

void research_net_forward(const NetShape& shape, const NetPlan& plan, NetParameters p, DType dtype,
                          cudaStream_t stream) {
  fill_in(shape, plan, &p);
  const Kernel<NetParameters>& kernel = kForward[static_cast<int>(shape.math)];
  if (p.flags & kNetGivenStatistics) {
    p.partials = nullptr;
    p.phase = kNetApply;
    launch_net(kernel, plan, plan.apply_blocks, false, dtype, p, stream);
  } else if (plan.one_launch) {
    p.partials = nullptr;
    p.phase = kNetMeasure | kNetApply;
    launch_net(kernel, plan, 1, false, dtype, p, stream);
  } else {
    p.phase = kNetMeasure;
    launch_net(kernel, plan, plan.measure_blocks, false, dtype, p, stream);
    p.phase = kNetApply;
    launch_net(kernel, plan, plan.apply_blocks, false, dtype, p, stream);
  }
}

void research_net_backward(const NetShape& shape, const NetPlan& plan, NetParameters p,
                           NetReduceParameters reduce, DType dtype, bool measures,
                           cudaStream_t stream) {
  fill_in(shape, plan, &p);
  const Kernel<NetParameters>& kernel = kBackward[static_cast<int>(shape.math)];
  p.phase = kNetApply;
  if (measures && plan.one_launch) {
    p.phase |= kNetMeasure;
  } else if (measures) {
    p.phase = kNetMeasure;
    launch_net(kernel, plan, plan.measure_blocks, true, dtype, p, stream);
    p.phase = kNetApply;
  }
  if (!measures || plan.one_launch) p.partials = nullptr;
  launch_net(kernel, plan, plan.apply_blocks, true, dtype, p, stream);

  reduce.gradients = p.gradients;
  reduce.parameters = p.parameters;
  reduce.gradient_stride = p.gradient_stride;
  reduce.blocks = plan.apply_blocks;
  reduce_gradients(dtype, reduce, stream);
}

void reduce_gradients(DType dtype, const NetReduceParameters& p, cudaStream_t stream) {
  const auto target = [&](int s) -> Extent {
    if (s >= p.segments || !p.target[s]) return {nullptr, 0, Extent::kWrite};
    return {p.target[s], (p.begin[s + 1] - p.begin[s]) * size_of(dtype), Extent::kWrite};
  };
  launch(kReduce[static_cast<int>(dtype)], dim3(static_cast<unsigned>((p.parameters + 31) / 32)),
         dim3(32, net::kReduceRows), 0, stream, p,
         {{p.gradients, p.blocks * p.gradient_stride * accumulator_size(dtype), Extent::kRead},
          target(0),
          target(1),
          target(2),
          target(3),
          target(4),
          target(5),
          target(6),
          target(7),
          target(8),
          target(9),
          target(10),
          target(11),
          target(12),
          target(13),
          target(14),
          target(15)});
}

}  // namespace fused_mlp::cuda
