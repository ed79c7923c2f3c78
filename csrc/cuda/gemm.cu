// linear_act's and linear_relu's kernels: products with bias, activation and dropout on the way out
// or the backward gate on the way in, and the same ends alone for use around a library's products.
// Each is there twice, with ReLU alone behind the product and with whatever there is: linear_relu's
// keep their registers that way.
#include "arithmetics.cuh"
#include "gemm.cuh"

namespace fused_mlp::cuda::gemm {
extern __shared__ __align__(16) char shared_memory[];

template <class M, class Known>
FUSED_MLP_DEVICE void run(const GemmParameters& p) {
  Block<M, Known>{p, shared_memory}.run();
}
}  // namespace fused_mlp::cuda::gemm

#define FUSED_MLP_GEMM_KERNEL(name, known, on, ...)                         \
  extern "C" __global__ void __launch_bounds__(256, 2)                      \
      name(const __grid_constant__ fused_mlp::cuda::GemmParameters p) {     \
    on(fused_mlp::cuda::gemm::run<__VA_ARGS__, fused_mlp::cuda::known>(p)); \
  }
#define FUSED_MLP_GEMM_KERNELS(suffix, on, ...)                             \
  FUSED_MLP_GEMM_KERNEL(fused_mlp_gemm_##suffix, OnlyReLU, on, __VA_ARGS__) \
  FUSED_MLP_GEMM_KERNEL(fused_mlp_gemm_act_##suffix, AnyActivation, on, __VA_ARGS__)

FUSED_MLP_EACH_ARITHMETIC(FUSED_MLP_GEMM_KERNELS)

#define FUSED_MLP_ELEMENT_KERNEL(name, known, T)                           \
  extern "C" __global__ void __launch_bounds__(256)                        \
      name(const __grid_constant__ fused_mlp::cuda::ElementParameters p) { \
    fused_mlp::cuda::gemm::elements<fused_mlp::cuda::known, T>(p);         \
  }
#define FUSED_MLP_ELEMENT_KERNELS(suffix, T)                              \
  FUSED_MLP_ELEMENT_KERNEL(fused_mlp_relu_elements_##suffix, OnlyReLU, T) \
  FUSED_MLP_ELEMENT_KERNEL(fused_mlp_act_elements_##suffix, AnyActivation, T)

FUSED_MLP_ELEMENT_KERNELS(f32, float)
FUSED_MLP_ELEMENT_KERNELS(f64, double)
FUSED_MLP_ELEMENT_KERNELS(bf16, __nv_bfloat16)
FUSED_MLP_ELEMENT_KERNELS(f16, __half)

namespace fused_mlp::cuda {
namespace {

struct GemmKernel {
  Kernel<GemmParameters> kernel;
  int shared_bytes;
};

// By math; first with ReLU alone, then with any activation.
#define FUSED_MLP_GEMM(suffix, ...)                                                           \
  {                                                                                           \
    {FUSED_MLP_KERNEL(fused_mlp_gemm_##suffix), gemm::kSharedBytes<__VA_ARGS__, OnlyReLU>}, { \
      FUSED_MLP_KERNEL(fused_mlp_gemm_act_##suffix),                                          \
          gemm::kSharedBytes<__VA_ARGS__, AnyActivation>                                      \
    }                                                                                         \
  }
const GemmKernel kGemm[kMaths][2] = {FUSED_MLP_GEMM(f32, Fma<float, float>),
                                     FUSED_MLP_GEMM(f64, Fma<double, double>),
                                     FUSED_MLP_GEMM(tf32, Tf32),
                                     FUSED_MLP_GEMM(bf16, Mma16<__nv_bfloat16>),
                                     FUSED_MLP_GEMM(f16, Mma16<__half>),
                                     FUSED_MLP_GEMM(bf16_fma, Fma<__nv_bfloat16, float>),
                                     FUSED_MLP_GEMM(f16_fma, Fma<__half, float>)};

#define FUSED_MLP_ELEMENTS(suffix)                     \
  {FUSED_MLP_KERNEL(fused_mlp_relu_elements_##suffix), \
   FUSED_MLP_KERNEL(fused_mlp_act_elements_##suffix)}
const Kernel<ElementParameters> kElements[kDTypes][2] = {
    FUSED_MLP_ELEMENTS(f32), FUSED_MLP_ELEMENTS(f64), FUSED_MLP_ELEMENTS(bf16),
    FUSED_MLP_ELEMENTS(f16)};

constexpr int64_t kOwnProductLimit = int64_t{1} << 24;  // multiply-adds
constexpr int64_t kOwnProductLimitDropout = int64_t{1} << 25;
constexpr int kLeastRowsPerSplit = 128;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Extent rows_extent(const void* data, int64_t rows, int64_t stride, int64_t columns, DType dtype) {
  return {data, data ? ((rows - 1) * stride + columns) * size_of(dtype) : 0, Extent::kRead};
}

// Which of the two kernels: 1 where something else than ReLU and dropout stands behind.
int general(const Behind& behind, const void* seen) {
  return behind.activation != Activation::kReLU || behind.norm.mean || seen;
}

Extent vector_extent(const void* data, bool wide, int64_t columns, DType dtype) {
  return {data, data ? columns * (wide ? 4 : size_of(dtype)) : 0, Extent::kRead};
}

Extent seed_extent(const Behind& behind) {
  return {behind.seed, behind.seed ? 16 : 0, Extent::kRead};
}

void launch_gemm(Math math, DType dtype, const GemmParameters& p, int64_t blocks,
                 int64_t result_bytes, cudaStream_t stream) {
  const GemmKernel& gemm = kGemm[static_cast<int>(math)][general(p.behind, p.seen)];
  const EvaluatedNorm& norm = p.behind.norm;
  const bool layer = p.product == Product::kLayer;
  const bool reads_x = p.product != Product::kInputGradient;
  const bool reads_weight = p.product != Product::kWeightGradient;
  launch(gemm.kernel, dim3(static_cast<unsigned>(blocks)), dim3(gemm::kThreads), gemm.shared_bytes,
         stream, p,
         {rows_extent(reads_x ? p.x : nullptr, p.rows, p.x_stride, p.in, dtype),
          rows_extent(reads_weight ? p.weight : nullptr, p.out, p.in, p.in, dtype),
          vector_extent(layer ? p.bias : nullptr, false, p.out, dtype),
          vector_extent(norm.mean, norm.wide & kNormWideMean, p.out, dtype),
          vector_extent(norm.var, norm.wide & kNormWideVar, p.out, dtype),
          vector_extent(norm.weight, norm.wide & kNormWideWeight, p.out, dtype),
          vector_extent(norm.bias, norm.wide & kNormWideBias, p.out, dtype),
          rows_extent(layer ? nullptr : p.g, p.rows, p.g_stride, p.out, dtype),
          rows_extent(layer ? nullptr : p.kept, p.rows, p.out, p.out, dtype),
          {p.result, result_bytes, Extent::kWrite},
          {p.seen, p.seen ? result_bytes : 0, Extent::kWrite},
          seed_extent(p.behind)});
}

}  // namespace

bool uses_own_product(int64_t rows, int64_t in, int64_t out, bool dropout) {
  const double work =
      static_cast<double>(rows) * static_cast<double>(in) * static_cast<double>(out);
  return work <= static_cast<double>(dropout ? kOwnProductLimitDropout : kOwnProductLimit);
}

void linear_act_layer(Math math, DType dtype, GemmParameters p, cudaStream_t stream) {
  p.product = Product::kLayer;
  launch_gemm(math, dtype, p, divide_up(p.rows, gemm::kTile) * divide_up(p.out, gemm::kTile),
              p.rows * p.out * size_of(dtype), stream);
}

void linear_act_input_gradient(Math math, DType dtype, GemmParameters p, cudaStream_t stream) {
  p.product = Product::kInputGradient;
  launch_gemm(math, dtype, p, divide_up(p.rows, gemm::kTile) * divide_up(p.in, gemm::kTile),
              p.rows * p.in * size_of(dtype), stream);
}

int weight_gradient_splits(const GemmParameters& p, const Device& device) {
  const int64_t tiles = divide_up(p.out, gemm::kTile) * divide_up(p.in, gemm::kTile);
  const int64_t wanted = divide_up(device.multiprocessors, tiles);
  const int64_t most = divide_up(p.rows, kLeastRowsPerSplit);
  return static_cast<int>(wanted < most ? wanted : most);
}

void linear_act_weight_gradient(Math math, DType dtype, GemmParameters p,
                                NetReduceParameters reduce, cudaStream_t stream) {
  p.product = Product::kWeightGradient;
  p.rows_per_split = divide_up(divide_up(p.rows, p.splits), gemm::kTile) * gemm::kTile;
  const int64_t tiles = divide_up(p.out, gemm::kTile) * divide_up(p.in, gemm::kTile);
  p.splits = static_cast<int>(divide_up(p.rows, p.rows_per_split));
  launch_gemm(math, dtype, p, tiles * p.splits,
              p.splits * p.gradient_stride * accumulator_size(dtype), stream);
  reduce.gradients = p.result;
  reduce.gradient_stride = p.gradient_stride;
  reduce.blocks = p.splits;
  reduce_gradients(dtype, reduce, stream);
}

namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

void act_elements(DType dtype, ElementParameters p, cudaStream_t stream) {
  const int64_t width = 16 / size_of(dtype);
  p.vectors = p.columns % width == 0 && p.g_stride % width == 0 && aligned(p.result) &&
              aligned(p.from) && aligned(p.g) && aligned(p.seen);
  const int64_t threads = p.rows * p.columns / (p.vectors ? width : 1);
  const int64_t bytes = p.rows * p.columns * size_of(dtype);
  const EvaluatedNorm& norm = p.behind.norm;
  // A launch names no memory twice: what is read and written in the same place is one extent.
  const bool read = p.from && p.from != p.result && p.from != p.seen;
  const auto written = [&](const void* data) -> Extent {
    return {data, data ? bytes : 0, data == p.from ? Extent::kReadWrite : Extent::kWrite};
  };
  launch(kElements[static_cast<int>(dtype)][general(p.behind, p.seen)],
         dim3(static_cast<unsigned>(divide_up(threads, 256))), dim3(256), 0, stream, p,
         {vector_extent(p.bias, false, p.columns, dtype),
          vector_extent(norm.mean, norm.wide & kNormWideMean, p.columns, dtype),
          vector_extent(norm.var, norm.wide & kNormWideVar, p.columns, dtype),
          vector_extent(norm.weight, norm.wide & kNormWideWeight, p.columns, dtype),
          vector_extent(norm.bias, norm.wide & kNormWideBias, p.columns, dtype),
          rows_extent(p.g, p.rows, p.g_stride, p.columns, dtype),
          {read ? p.from : nullptr, read ? bytes : 0, Extent::kRead},
          written(p.result),
          written(p.seen),
          seed_extent(p.behind)});
}

}  // namespace fused_mlp::cuda
