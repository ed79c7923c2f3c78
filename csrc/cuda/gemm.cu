// linear_relu's kernels: products with bias, ReLU and dropout on the way out or the backward gate
// on the way in, and the same ends alone for use around a library's products.
#include "gemm.cuh"

namespace fused_mlp::cuda::gemm {
extern __shared__ __align__(16) char shared_memory[];

template <class M>
FUSED_MLP_DEVICE void run(const GemmParameters& p) {
  Block<M>{p, shared_memory}.run();
}
}  // namespace fused_mlp::cuda::gemm

// As in network.cu: empty on chips that another math serves.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FUSED_MLP_ON_NEW(...) __VA_ARGS__
#define FUSED_MLP_ON_OLD(...)
#else
#define FUSED_MLP_ON_NEW(...)
#define FUSED_MLP_ON_OLD(...) __VA_ARGS__
#endif
#define FUSED_MLP_ON_ALL(...) __VA_ARGS__

#define FUSED_MLP_GEMM_KERNEL(suffix, on, ...)                                             \
  extern "C" __global__ void __launch_bounds__(256, 2)                                     \
      fused_mlp_gemm_##suffix(const __grid_constant__ fused_mlp::cuda::GemmParameters p) { \
    on(fused_mlp::cuda::gemm::run<__VA_ARGS__>(p));                                        \
  }

FUSED_MLP_GEMM_KERNEL(f32, FUSED_MLP_ON_ALL, fused_mlp::cuda::Fma<float, float>)
FUSED_MLP_GEMM_KERNEL(f64, FUSED_MLP_ON_ALL, fused_mlp::cuda::Fma<double, double>)
FUSED_MLP_GEMM_KERNEL(tf32, FUSED_MLP_ON_NEW, fused_mlp::cuda::Tf32)
FUSED_MLP_GEMM_KERNEL(bf16, FUSED_MLP_ON_NEW, fused_mlp::cuda::Mma16<__nv_bfloat16>)
FUSED_MLP_GEMM_KERNEL(f16, FUSED_MLP_ON_NEW, fused_mlp::cuda::Mma16<__half>)
FUSED_MLP_GEMM_KERNEL(bf16_fma, FUSED_MLP_ON_OLD, fused_mlp::cuda::Fma<__nv_bfloat16, float>)
FUSED_MLP_GEMM_KERNEL(f16_fma, FUSED_MLP_ON_OLD, fused_mlp::cuda::Fma<__half, float>)

#define FUSED_MLP_ELEMENT_KERNEL(suffix, T)                                           \
  extern "C" __global__ void __launch_bounds__(256) fused_mlp_relu_elements_##suffix( \
      const __grid_constant__ fused_mlp::cuda::ElementParameters p) {                 \
    using namespace fused_mlp::cuda;                                                  \
    if (p.vectors)                                                                    \
      gemm::elements<T, kPackWidth<T>>(p);                                            \
    else                                                                              \
      gemm::elements<T, 1>(p);                                                        \
  }

FUSED_MLP_ELEMENT_KERNEL(f32, float)
FUSED_MLP_ELEMENT_KERNEL(f64, double)
FUSED_MLP_ELEMENT_KERNEL(bf16, __nv_bfloat16)
FUSED_MLP_ELEMENT_KERNEL(f16, __half)

namespace fused_mlp::cuda {
namespace {

struct GemmKernel {
  Kernel<GemmParameters> kernel;
  int shared_bytes;
};

const GemmKernel kGemm[kMaths] = {
    {FUSED_MLP_KERNEL(fused_mlp_gemm_f32), gemm::kSharedBytes<Fma<float, float>>},
    {FUSED_MLP_KERNEL(fused_mlp_gemm_f64), gemm::kSharedBytes<Fma<double, double>>},
    {FUSED_MLP_KERNEL(fused_mlp_gemm_tf32), gemm::kSharedBytes<Tf32>},
    {FUSED_MLP_KERNEL(fused_mlp_gemm_bf16), gemm::kSharedBytes<Mma16<__nv_bfloat16>>},
    {FUSED_MLP_KERNEL(fused_mlp_gemm_f16), gemm::kSharedBytes<Mma16<__half>>},
    {FUSED_MLP_KERNEL(fused_mlp_gemm_bf16_fma), gemm::kSharedBytes<Fma<__nv_bfloat16, float>>},
    {FUSED_MLP_KERNEL(fused_mlp_gemm_f16_fma), gemm::kSharedBytes<Fma<__half, float>>}};

const Kernel<ElementParameters> kElements[kDTypes] = {
    FUSED_MLP_KERNEL(fused_mlp_relu_elements_f32), FUSED_MLP_KERNEL(fused_mlp_relu_elements_f64),
    FUSED_MLP_KERNEL(fused_mlp_relu_elements_bf16), FUSED_MLP_KERNEL(fused_mlp_relu_elements_f16)};

constexpr int64_t kOwnProductLimit = int64_t{1} << 24;  // multiply-adds
constexpr int64_t kOwnProductLimitDropout = int64_t{1} << 25;
constexpr int kLeastRowsPerSplit = 128;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Extent rows_extent(const void* data, int64_t rows, int64_t stride, int64_t columns, DType dtype) {
  return {data, data ? ((rows - 1) * stride + columns) * size_of(dtype) : 0, Extent::kRead};
}

void launch_gemm(Math math, DType dtype, const GemmParameters& p, int64_t blocks,
                 int64_t result_bytes, cudaStream_t stream) {
  const GemmKernel& gemm = kGemm[static_cast<int>(math)];
  const bool layer = p.product == Product::kLayer;
  const bool reads_x = p.product != Product::kInputGradient;
  const bool reads_weight = p.product != Product::kWeightGradient;
  launch(gemm.kernel, dim3(static_cast<unsigned>(blocks)), dim3(gemm::kThreads), gemm.shared_bytes,
         stream, p,
         {rows_extent(reads_x ? p.x : nullptr, p.rows, p.x_stride, p.in, dtype),
          rows_extent(reads_weight ? p.weight : nullptr, p.out, p.in, p.in, dtype),
          rows_extent(layer ? p.bias : nullptr, 1, p.out, p.out, dtype),
          rows_extent(layer ? nullptr : p.g, p.rows, p.g_stride, p.out, dtype),
          rows_extent(layer ? nullptr : p.output, p.rows, p.out, p.out, dtype),
          {p.result, result_bytes, Extent::kWrite},
          {p.seed, p.seed ? 16 : 0, Extent::kRead}});
}

}  // namespace

bool uses_own_product(int64_t rows, int64_t in, int64_t out, bool dropout) {
  const double work =
      static_cast<double>(rows) * static_cast<double>(in) * static_cast<double>(out);
  return work <= static_cast<double>(dropout ? kOwnProductLimitDropout : kOwnProductLimit);
}

void linear_relu_layer(Math math, DType dtype, GemmParameters p, cudaStream_t stream) {
  p.product = Product::kLayer;
  launch_gemm(math, dtype, p, divide_up(p.rows, gemm::kTile) * divide_up(p.out, gemm::kTile),
              p.rows * p.out * size_of(dtype), stream);
}

void linear_relu_input_gradient(Math math, DType dtype, GemmParameters p, cudaStream_t stream) {
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

void linear_relu_weight_gradient(Math math, DType dtype, GemmParameters p,
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

void launch_elements(DType dtype, ElementParameters p, cudaStream_t stream) {
  const int64_t width = 16 / size_of(dtype);
  p.vectors = p.columns % width == 0 && p.g_stride % width == 0 && aligned(p.result) &&
              aligned(p.output) && aligned(p.g);
  const int64_t threads = p.rows * p.columns / (p.vectors ? width : 1);
  const int64_t bytes = p.rows * p.columns * size_of(dtype);
  const bool in_place = p.result == p.output;
  launch(kElements[static_cast<int>(dtype)], dim3(static_cast<unsigned>(divide_up(threads, 256))),
         dim3(256), 0, stream, p,
         {rows_extent(p.bias, 1, p.columns, p.columns, dtype),
          rows_extent(p.g, p.rows, p.g_stride, p.columns, dtype),
          {in_place ? nullptr : p.output, in_place ? 0 : bytes, Extent::kRead},
          {p.result, bytes, in_place ? Extent::kReadWrite : Extent::kWrite},
          {p.seed, p.seed ? 16 : 0, Extent::kRead}});
}

}  // namespace

void relu_dropout(DType dtype, const ElementParameters& p, cudaStream_t stream) {
  launch_elements(dtype, p, stream);
}
void relu_gate(DType dtype, const ElementParameters& p, cudaStream_t stream) {
  launch_elements(dtype, p, stream);
}

}  // namespace fused_mlp::cuda
