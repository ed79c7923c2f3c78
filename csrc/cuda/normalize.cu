// normalize: y = (x - mean) / (std + eps) over the whole tensor or some of its dimensions.
#if !defined(__CUDA_ARCH__)
#include <cmath>
#include <limits>

#include "ops.h"

namespace fused_mlp::cuda {
namespace {

std::vector<bool> reduced_dimensions(const Tensor& x,
                                     const std::optional<std::vector<int64_t>>& dim) {
  std::vector<bool> reduced(x.dim(), !dim);
  if (dim)
    for (const int64_t d : *dim) reduced[d < 0 ? d + x.dim() : d] = true;
  return reduced;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& x,
                                             std::optional<std::vector<int64_t>> dim,
                                             double correction, double eps) {
  const Context context(x);
  const std::vector<bool> reduced = reduced_dimensions(x, dim);
  std::vector<int64_t> kept;  // shape of the statistics
  if (dim)
    for (int64_t d = 0; d < x.dim(); ++d) kept.push_back(reduced[d] ? 1 : x.size(d));
  const ScalarType type = accumulator_type(dtype_of(x));
  Tensor mean = new_tensor(kept, type, x), std = new_tensor(kept, type, x);
  if (x.numel() == 0) {
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(std, std::numeric_limits<double>::quiet_NaN());
    return {torch::stable::empty_like(x), mean, std};
  }
  Standardization s = standardization(x, std::nullopt, reduced);
  s.parameters.mean = mean.data_ptr();
  s.parameters.deviation = std.data_ptr();
  s.parameters.flags = kNormalizes;
  s.parameters.correction = correction;
  s.parameters.eps = eps;
  run_forward(s, context);
  return {s.result(), mean, std};
}

Tensor normalize_backward(const Tensor& grad_output, const Tensor& x, const Tensor& mean,
                          const Tensor& std, std::optional<std::vector<int64_t>> dim,
                          double correction, double eps) {
  const Context context(x);
  if (x.numel() == 0) return torch::stable::empty_like(x);
  Standardization s = standardization(x, grad_output, reduced_dimensions(x, dim));
  const Tensor means = as_contiguous(mean), stds = as_contiguous(std);
  s.parameters.mean = means.data_ptr();
  s.parameters.deviation = stds.data_ptr();
  s.parameters.flags = kNormalizes;
  s.parameters.correction = correction;
  s.parameters.eps = eps;
  run_backward(s, context);
  return s.result();
}

}  // namespace fused_mlp::cuda
#endif
