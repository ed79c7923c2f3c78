// Host side of normalize and batch_norm_leaky_relu: from tensors to the kernels' layouts.
#if !defined(__CUDA_ARCH__)
#include <numeric>

#include "layout.h"
#include "tensor.h"

namespace fused_mlp::cuda {
namespace {

// Whether the elements fill their memory without gaps or overlap, in some order of dimensions.
bool dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t d : order) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool try_layout(const Tensor& x, const OptionalTensor& g, const Tensor& y,
                const std::vector<bool>& reduced, bool ordered, Layout* layout) {
  std::vector<std::vector<int64_t>> strides = {strides_of(x), strides_of(y)};
  if (g) strides.push_back(strides_of(*g));
  return find_layout(sizes_of(x), reduced, strides, ordered, layout);
}

}  // namespace

Standardization standardization(const Tensor& x, const OptionalTensor& g,
                                const std::vector<bool>& reduced, bool ordered) {
  Standardization s = {};
  s.x = x;
  s.g = g;
  const std::vector<int64_t> sizes = sizes_of(x);
  const std::vector<int64_t> strides = strides_of(x);
  s.y = dense(sizes, strides) ? new_strided(sizes, strides, x.scalar_type(), x)
                              : new_tensor(sizes, x.scalar_type(), x);
  Layout layout;
  bool found = try_layout(s.x, s.g, s.y, reduced, ordered, &layout);
  if (!found && s.g) {  // a gradient of other strides, as that of a sum, whose strides are zero
    Tensor copy = new_strided(sizes, strides_of(s.y), x.scalar_type(), x);
    torch::stable::copy_(copy, *s.g);
    s.g = copy;
    found = try_layout(s.x, s.g, s.y, reduced, ordered, &layout);
  }
  if (!found) {
    std::vector<int64_t> order;
    s.order.resize(sizes.size());
    for (const bool last : {false, true})
      for (size_t d = 0; d < sizes.size(); ++d)
        if (reduced[d] == last) order.push_back(static_cast<int64_t>(d));
    std::vector<bool> moved;
    for (size_t k = 0; k < order.size(); ++k) {
      s.order[order[k]] = static_cast<int64_t>(k);
      moved.push_back(reduced[order[k]]);
    }
    s.x = as_contiguous(permute(x, order));
    if (g) s.g = as_contiguous(permute(*g, order));
    s.y = new_tensor(sizes_of(s.x), x.scalar_type(), x);
    found = try_layout(s.x, s.g, s.y, moved, ordered, &layout);
    STD_TORCH_CHECK(found, "fused_mlp: no layout for a contiguous tensor");
  }
  s.columns = layout.columns;
  StandardizeParameters& p = s.parameters;
  p.x = s.x.data_ptr();
  p.y = s.y.data_ptr();
  p.g = data(s.g);
  p.outer = layout.outer;
  p.middle = layout.middle;
  p.inner = layout.inner;
  p.x_outer = layout.outer_stride[0];
  p.x_middle = layout.middle_stride[0];
  p.y_outer = layout.outer_stride[1];
  p.y_middle = layout.middle_stride[1];
  p.g_outer = layout.outer_stride[2];
  p.g_middle = layout.middle_stride[2];
  return s;
}

}  // namespace fused_mlp::cuda
#endif
