// A whole training step in one call: forward, loss, backward, clipping, update.
//
// Its arguments are some 50 tensors that hardly ever change, and handing them over takes as long as
// the step itself. So one op takes them and gives back a plan, and the other runs the plan.

#include <cmath>
#include <memory>

#include "cpu/ops.h"

namespace fused_mlp {
namespace {

// A tensor of the plan. Its address is read anew at every step, since `.data = ` and `.set_` move
// it; what else they could change must be as it was.
class Slot {
 public:
  explicit Slot(const Tensor& tensor)
      : tensor_(tensor), dtype_(tensor.scalar_type()), numel_(tensor.numel()) {
    STD_TORCH_CHECK(holds(), "train_step_plan: expected contiguous CPU tensors");
  }
  bool holds() const {
    return tensor_.numel() == numel_ && tensor_.scalar_type() == dtype_ &&
           tensor_.is_contiguous() && tensor_.is_cpu() &&
           (tensor_.const_data_ptr() != nullptr || numel_ == 0);
  }
  void* data() const { return tensor_.mutable_data_ptr(); }
  int64_t numel() const { return numel_; }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
  ScalarType dtype_;
  int64_t numel_;
};

using OptionalSlot = std::optional<Slot>;

OptionalSlot slot_of(const std::optional<Tensor>& tensor) {
  return tensor ? OptionalSlot(*tensor) : std::nullopt;
}
void* data_of(const OptionalSlot& slot) { return slot ? slot->data() : nullptr; }

// A parameter that the step changes: its place among all, its group of options, what the optimizer
// keeps for it, and its gradient where that outlives the step.
struct Trained {
  size_t place;
  int64_t group;
  std::vector<Slot> state;
  OptionalSlot kept;
  void* gradient = nullptr;
};

// The columns of `options`, a row for each group of parameters. fused_mlp/training/optimizers.py
// writes them.
enum SgdOption { kLr, kWeightDecay, kMaximize, kMomentum, kDampening, kNesterov };
enum AdamOption { kBeta1 = kMomentum, kBeta2, kEps, kDecoupled };
constexpr int64_t kOptions = 7;

constexpr int64_t kMagic = 0x706574735f70696c;

struct Plan {
  // What a handle shows of its plan. A copy of the handle shows the same numbers elsewhere.
  int64_t magic = kMagic;
  Plan* self = this;

  ResearchNetBackward net{};             // sizes and options; addresses are filled in at every step
  std::vector<OptionalSlot> parameters;  // weights, biases, bn_weight, bn_bias
  OptionalSlot running_mean, running_var, num_batches_tracked;
  std::vector<Trained> trained;
  bool adam = false;
  OptionalSlot options;
  bool cross_entropy = false, mean = false;
  OptionalSlot class_weight;
  int64_t ignore_index = 0;
  double label_smoothing = 0;
  OptionalSlot seed;
  OptionalSlot workspace;  // kept from step to step, grown for a larger batch

  size_t layers() const { return static_cast<size_t>(net.forward.layers); }
  int64_t out() const { return net.forward.widths[layers()]; }
  size_t element_size() const { return net.forward.dtype == DType::kFloat64 ? 8 : 4; }
  ScalarType dtype() const {
    return net.forward.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  }

  bool holds() const;
  std::optional<double> divisor(const Tensor& target, int64_t rows) const;
  void place(int64_t rows);
  void judge(const Tensor& target, double divisor, void* loss) const;
  void clip(double max_norm) const;
  void update() const;
};

bool holds_all(const std::vector<Slot>& slots) {
  for (const Slot& slot : slots) {
    if (!slot.holds()) return false;
  }
  return true;
}
bool holds_if_there(const OptionalSlot& slot) { return !slot || slot->holds(); }

bool Plan::holds() const {
  for (const OptionalSlot& slot : parameters) {
    if (!holds_if_there(slot)) return false;
  }
  for (const Trained& each : trained) {
    if (!holds_if_there(each.kept) || !holds_all(each.state)) return false;
  }
  return holds_if_there(running_mean) && holds_if_there(running_var) &&
         holds_if_there(num_batches_tracked) && holds_if_there(class_weight);
}

// What the sum of the rows' losses is divided by; nothing for a target that does not fit.
std::optional<double> Plan::divisor(const Tensor& target, int64_t rows) const {
  if (!target.is_cpu()) return std::nullopt;
  if (!cross_entropy) {
    if (target.scalar_type() != dtype() || target.dim() != 2 || target.size(0) != rows ||
        target.size(1) != out()) {
      return std::nullopt;
    }
    return mean ? static_cast<double>(rows * out()) : 1.0;
  }
  if (target.scalar_type() != ScalarType::Long || target.dim() != 1 || target.size(0) != rows) {
    return std::nullopt;
  }
  const auto* classes = static_cast<const int64_t*>(elements_of(target));
  const int64_t stride = target.stride(0), columns = out();
  int64_t wrong = 0, counted = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t c = classes[row * stride];
    wrong += (c < 0 || c >= columns) && c != ignore_index;
    counted += c != ignore_index;
  }
  if (wrong > 0) return std::nullopt;
  if (!mean) return 1.0;
  if (!class_weight) return static_cast<double>(counted);
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t c = classes[row * stride];
    if (c == ignore_index) continue;
    total += element_size() == 8 ? static_cast<const double*>(class_weight->data())[c]
                                 : static_cast<const float*>(class_weight->data())[c];
  }
  return total;
}

// Every address of a step: parameters, buffers, gradients and the workspace.
void Plan::place(int64_t rows) {
  ResearchNet& forward = net.forward;
  forward.rows = rows;
  for (size_t l = 0; l < layers(); ++l) {
    forward.weights[l] = parameters[l]->data();
    forward.biases[l] = parameters[layers() + l]->data();
  }
  const auto channels = [&](const OptionalSlot& slot) -> ChannelVector {
    return {data_of(slot), forward.dtype};
  };
  forward.bn_weight = channels(parameters[2 * layers()]);
  forward.bn_bias = channels(parameters[2 * layers() + 1]);
  forward.running_mean = channels(running_mean);
  forward.running_var = channels(running_var);
  forward.num_batches_tracked = static_cast<int64_t*>(data_of(num_batches_tracked));

  const size_t size = element_size();
  const auto padded = [&](int64_t numel) {
    return (static_cast<size_t>(numel) * size + 63) / 64 * 64;
  };
  const int64_t saved = kernels().research_net_saved_numel(forward);
  size_t bytes = 2 * padded(rows * out()) + padded(saved);
  for (const Trained& each : trained) {
    if (!each.kept) bytes += padded(parameters[each.place]->numel());
  }
  if (!workspace || static_cast<size_t>(workspace->numel()) < bytes) {
    workspace.emplace(new_empty_cpu({static_cast<int64_t>(bytes)}, ScalarType::Byte));
  }
  char* next = static_cast<char*>(workspace->data());
  const auto take = [&](int64_t numel) {
    void* address = next;
    next += padded(numel);
    return address;
  };
  forward.output = take(rows * out());
  net.grad_output = take(rows * out());
  forward.saved = take(saved);
  for (Trained& each : trained) {
    each.gradient = each.kept ? each.kept->data() : take(parameters[each.place]->numel());
    if (each.place < layers()) {
      net.grad_weights[each.place] = each.gradient;
    } else if (each.place < 2 * layers()) {
      net.grad_biases[each.place - layers()] = each.gradient;
    } else {
      (each.place == 2 * layers() ? net.grad_bn_weight : net.grad_bn_bias) = {each.gradient,
                                                                              forward.dtype};
    }
  }
}

void Plan::judge(const Tensor& target, double divisor, void* result) const {
  const ResearchNet& forward = net.forward;
  void* grad = const_cast<void*>(net.grad_output);
  if (cross_entropy) {
    kernels().cross_entropy({forward.dtype, forward.rows, out(), forward.output,
                             target.const_data_ptr<int64_t>(), target.stride(0),
                             data_of(class_weight), ignore_index, label_smoothing, divisor, grad,
                             result});
  } else {
    kernels().squared_error({forward.dtype, forward.rows, out(), forward.output,
                             elements_of(target), divisor, grad, result});
  }
}

// torch.nn.utils.clip_grad_norm_.
void Plan::clip(double max_norm) const {
  double squares = 0;
  for (const Trained& each : trained) {
    squares +=
        kernels().squared_norm(net.forward.dtype, parameters[each.place]->numel(), each.gradient);
  }
  const double factor = max_norm / (std::sqrt(squares) + 1e-6);
  if (factor >= 1) return;  // a NaN goes on and makes every gradient one, as in torch
  for (const Trained& each : trained) {
    kernels().scale(net.forward.dtype, parameters[each.place]->numel(), factor, each.gradient);
  }
}

// Counts a step in the tensor that Adam keeps for this, float32 or float64.
double count_step(const Slot& slot) {
  if (slot.tensor().scalar_type() == ScalarType::Double) {
    return *static_cast<double*>(slot.data()) += 1;
  }
  return static_cast<double>(*static_cast<float*>(slot.data()) += 1);
}

void Plan::update() const {
  const double* rows = static_cast<const double*>(options->data());
  double step = -1, beta1 = 0, beta2 = 0, correction1 = 0, correction2 = 0;
  for (const Trained& each : trained) {
    const Slot& parameter = *parameters[each.place];
    const double* o = rows + each.group * kOptions;
    if (!adam) {
      kernels().sgd({net.forward.dtype, parameter.numel(), parameter.data(), each.gradient,
                     each.state.empty() ? nullptr : each.state[0].data(), o[kLr], o[kWeightDecay],
                     o[kMomentum], o[kDampening], o[kNesterov] != 0, o[kMaximize] != 0});
      continue;
    }
    const double now = count_step(each.state[0]);
    if (now != step || o[kBeta1] != beta1 || o[kBeta2] != beta2) {  // two powers take 0.1 us
      step = now;
      beta1 = o[kBeta1];
      beta2 = o[kBeta2];
      correction1 = 1 - std::pow(beta1, step);
      correction2 = 1 - std::pow(beta2, step);
    }
    kernels().adam({net.forward.dtype, parameter.numel(), parameter.data(), each.gradient,
                    each.state[1].data(), each.state[2].data(),
                    each.state.size() > 3 ? each.state[3].data() : nullptr, o[kLr], o[kWeightDecay],
                    beta1, beta2, o[kEps], correction1, correction2, o[kDecoupled] != 0,
                    o[kMaximize] != 0});
  }
}

Plan& plan_of(const Tensor& handle) {
  STD_TORCH_CHECK(handle.is_cpu() && handle.scalar_type() == ScalarType::Long &&
                      handle.dim() == 1 && handle.numel() == 2,
                  "research_net_train_step: expected what train_step_plan returned");
  Plan* plan = static_cast<Plan*>(handle.mutable_data_ptr());
  STD_TORCH_CHECK(plan->magic == kMagic && plan->self == plan,
                  "research_net_train_step: expected what train_step_plan returned, not a copy");
  return *plan;
}

}  // namespace

Tensor train_step_plan(std::vector<Tensor> weights, std::vector<Tensor> biases,
                       const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
                       const std::optional<Tensor>& running_mean,
                       const std::optional<Tensor>& running_var,
                       const std::optional<Tensor>& num_batches_tracked, bool training,
                       std::vector<double> dropout_p, double eps, double negative_slope,
                       bool cross_entropy, bool mean, const std::optional<Tensor>& class_weight,
                       int64_t ignore_index, double label_smoothing, bool adam,
                       const Tensor& options, std::vector<int64_t> places,
                       std::vector<int64_t> groups, std::vector<int64_t> state_counts,
                       std::vector<Tensor> state, std::vector<Tensor> kept_grads) {
  auto plan = std::make_unique<Plan>();
  ResearchNet& net = plan->net.forward;
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers >= 2 && layers <= kMaxLayers && biases.size() == layers &&
                      dropout_p.size() == layers - 2,
                  "train_step_plan: expected 2 to ", kMaxLayers,
                  " weights, as many biases and 2 fewer dropout probabilities");
  net.dtype = dtype_of(weights[0]);
  net.layers = static_cast<int>(layers);
  net.widths[0] = weights[0].size(1);
  for (size_t l = 0; l < layers; ++l) {
    STD_TORCH_CHECK(weights[l].size(1) == net.widths[l] && biases[l].numel() == weights[l].size(0),
                    "train_step_plan: weights[", l, "] or biases[", l, "] do not fit");
    net.widths[l + 1] = weights[l].size(0);
    plan->parameters.emplace_back(weights[l]);
  }
  for (const Tensor& bias : biases) plan->parameters.emplace_back(bias);
  plan->parameters.push_back(slot_of(bn_weight));
  plan->parameters.push_back(slot_of(bn_bias));
  plan->running_mean = slot_of(running_mean);
  plan->running_var = slot_of(running_var);
  plan->num_batches_tracked = slot_of(num_batches_tracked);
  net.training = training;
  net.eps = eps;
  net.negative_slope = negative_slope;
  for (size_t l = 0; l < dropout_p.size(); ++l) {
    if (dropout_p[l] <= 0) continue;
    if (!plan->seed) plan->seed.emplace(new_empty_cpu({2}, ScalarType::Long));
    net.dropout[l] = {dropout_p[l], plan->seed->tensor().const_data_ptr<int64_t>(),
                      static_cast<uint32_t>(l)};
  }

  plan->cross_entropy = cross_entropy;
  plan->mean = mean;
  plan->class_weight = slot_of(class_weight);
  STD_TORCH_CHECK(!class_weight || (class_weight->numel() == plan->out() &&
                                    class_weight->scalar_type() == plan->dtype()),
                  "train_step_plan: class_weight does not fit the output");
  plan->ignore_index = ignore_index;
  plan->label_smoothing = label_smoothing;
  plan->adam = adam;
  plan->options.emplace(options);
  STD_TORCH_CHECK(groups.size() == places.size() && state_counts.size() == places.size() &&
                      (kept_grads.empty() || kept_grads.size() == places.size()),
                  "train_step_plan: expected a group and a count for every place");
  size_t next = 0;
  for (size_t i = 0; i < places.size(); ++i) {
    Trained each{static_cast<size_t>(places[i]), groups[i], {}, {}};
    STD_TORCH_CHECK(each.place < plan->parameters.size() && plan->parameters[each.place] &&
                        next + static_cast<size_t>(state_counts[i]) <= state.size() &&
                        (each.group + 1) * kOptions <= plan->options->numel() &&
                        (!adam || state_counts[i] >= 3),
                    "train_step_plan: place, group or count ", i, " is out of range");
    const int64_t numel = plan->parameters[each.place]->numel();
    for (int64_t k = 0; k < state_counts[i]; ++k) {
      each.state.emplace_back(state[next++]);
      STD_TORCH_CHECK(each.state.back().numel() == (adam && k == 0 ? 1 : numel),
                      "train_step_plan: the state of place ", i, " does not fit");
    }
    if (!kept_grads.empty()) {
      each.kept.emplace(kept_grads[i]);
      STD_TORCH_CHECK(each.kept->numel() == numel, "train_step_plan: a gradient does not fit");
    }
    plan->trained.push_back(std::move(each));
  }
  const int64_t size = 2, stride = 1;
  return torch::stable::from_blob(plan.release(), {&size, 1}, {&stride, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Long,
                                  [](void* data) { delete static_cast<Plan*>(data); });
}

std::optional<Tensor> research_net_train_step(const Tensor& handle, const Tensor& input,
                                              const Tensor& target, double momentum,
                                              std::optional<double> max_norm) {
  Plan& plan = plan_of(handle);
  ResearchNet& net = plan.net.forward;
  if (!plan.holds() || !input.is_cpu() || input.scalar_type() != plan.dtype() || input.dim() != 2 ||
      input.size(1) != net.widths[0]) {
    return std::nullopt;
  }
  const int64_t rows = input.size(0);
  if (rows < (net.training ? 2 : 1)) return std::nullopt;
  const std::optional<double> divisor = plan.divisor(target, rows);
  if (!divisor) return std::nullopt;

  const bool dense = input.stride(1) == 1 && input.stride(0) >= input.size(1);
  const Tensor readable = dense ? input : as_contiguous(input);
  const Tensor dense_target = plan.cross_entropy ? target : as_contiguous(target);
  const Tensor loss = new_empty_cpu({}, plan.dtype());
  plan.place(rows);
  net.input = elements_of(readable);
  net.input_stride = readable.stride(0);
  net.momentum = momentum;
  if (plan.seed) random_(plan.seed->tensor());  // as draw_seed in fused_mlp/dropout.py
  kernels().research_net(net);
  plan.judge(dense_target, *divisor, loss.mutable_data_ptr());
  kernels().research_net_backward(plan.net);
  if (max_norm) plan.clip(*max_norm);
  plan.update();
  return loss;
}

}  // namespace fused_mlp
