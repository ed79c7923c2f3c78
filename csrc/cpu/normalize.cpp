// normalize on the CPU: any dimensions, brought into the form [outer, count, inner].

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace fused_mlp {
namespace {

using Dims = std::optional<std::vector<int64_t>>;

// How a call is seen by the kernels. `order` is empty where the tensor serves as it is; else its
// dimensions are permuted so that those normalized over come first.
struct View {
  int64_t outer = 1, count = 1, inner = 1;
  std::vector<int64_t> order, inverse;
  std::vector<int64_t> statistics;  // sizes of mean and std
};

View view_of(const Tensor& input, const Dims& dim) {
  View view;
  const int64_t rank = input.dim();
  if (!dim) {
    view.count = input.numel();
    return view;
  }
  std::vector<bool> reduced(static_cast<size_t>(rank), false);
  for (const int64_t d : *dim) {
    STD_TORCH_CHECK(d >= 0 && d < rank, "normalize: dimension out of range");
    reduced[d] = true;
  }
  int64_t first = rank, last = -1;
  for (int64_t d = 0; d < rank; ++d) {
    view.statistics.push_back(reduced[d] ? 1 : input.size(d));
    if (!reduced[d]) continue;
    first = d < first ? d : first;
    last = d;
  }
  bool adjacent = true;
  for (int64_t d = first; d <= last; ++d) adjacent = adjacent && reduced[d];
  for (int64_t d = 0; d < rank; ++d) {
    int64_t& extent = reduced[d] ? view.count : (adjacent && d < first) ? view.outer : view.inner;
    extent *= input.size(d);
  }
  if (adjacent) return view;
  for (const bool wanted : {true, false}) {
    for (int64_t d = 0; d < rank; ++d) {
      if (reduced[d] == wanted) view.order.push_back(d);
    }
  }
  view.inverse.resize(view.order.size());
  for (size_t i = 0; i < view.order.size(); ++i) view.inverse[view.order[i]] = i;
  return view;
}

// The tensor as the view orders it, contiguous.
Tensor arranged(const Tensor& tensor, const View& view) {
  return as_contiguous(view.order.empty() ? tensor : permute(tensor, view.order));
}

Normalize describe(const Tensor& input, const View& view, double correction, double eps) {
  STD_TORCH_CHECK(input.is_cpu(), "normalize: expected a CPU tensor");
  Normalize op{};
  op.dtype = dtype_of(input);
  op.outer = view.outer;
  op.count = view.count;
  op.inner = view.inner;
  op.correction = correction;
  op.eps = eps;
  return op;
}

// Returns the output; `op` says where mean and std go.
Tensor run(const Tensor& input, const View& view, Normalize& op) {
  const Tensor source = arranged(input, view);
  const Tensor output = new_empty_cpu(source.sizes(), input.scalar_type());
  op.input = elements_of(source);
  op.output = output.mutable_data_ptr();
  kernels().normalize(op);
  return view.order.empty() ? output : as_contiguous(permute(output, view.inverse));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input, Dims dim, double correction,
                                             double eps) {
  const View view = view_of(input, dim);
  Normalize op = describe(input, view, correction, eps);
  const Tensor mean = new_empty_cpu(view.statistics, accumulate_type(input));
  const Tensor std = new_empty_cpu(view.statistics, accumulate_type(input));
  op.mean = mean.mutable_data_ptr();
  op.std = std.mutable_data_ptr();
  const Tensor output = run(input, view, op);
  return {output, mean, std};
}

Tensor normalize_evaluate(const Tensor& input, Dims dim, double correction, double eps) {
  const View view = view_of(input, dim);
  Normalize op = describe(input, view, correction, eps);
  const int64_t groups = view.outer * view.inner;
  const Temporary<double> statistics(2 * groups);  // room for any dtype's
  op.mean = statistics.data();
  op.std = statistics.data() + groups;
  return run(input, view, op);
}

Tensor normalize_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                          const Tensor& std, Dims dim, double correction, double eps) {
  const View view = view_of(input, dim);
  NormalizeBackward op{};
  op.forward = describe(input, view, correction, eps);
  STD_TORCH_CHECK(grad_output.is_cpu() && grad_output.numel() == input.numel() &&
                      grad_output.dim() == input.dim() &&
                      grad_output.scalar_type() == input.scalar_type() &&
                      mean.numel() == view.outer * view.inner && std.numel() == mean.numel() &&
                      mean.scalar_type() == accumulate_type(input) &&
                      std.scalar_type() == accumulate_type(input),
                  "normalize_backward: grad_output, mean or std do not fit input");
  const Tensor source = arranged(input, view), grad = arranged(grad_output, view);
  const Tensor centre = as_contiguous(mean), deviation = as_contiguous(std);
  const Tensor result = new_empty_cpu(source.sizes(), input.scalar_type());
  op.forward.input = elements_of(source);
  op.forward.mean = const_cast<void*>(elements_of(centre));
  op.forward.std = const_cast<void*>(elements_of(deviation));
  op.grad_output = elements_of(grad);
  op.grad_input = result.mutable_data_ptr();
  kernels().normalize_backward(op);
  return view.order.empty() ? result : as_contiguous(permute(result, view.inverse));
}

}  // namespace fused_mlp
