// A whole training step in one call: forward, loss, backward, clipping, update.
//
// Its arguments are some 50 tensors that hardly ever change, and handing them over takes as long as
// the step itself. So one op takes them and gives back a plan, and the other runs the plan.

#include <cmath>
#include <memory>

#include "cpu/handle.h"
#include "cpu/ops.h"
#include "cpu/step_network.h"

namespace fused_mlp {
namespace {

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

struct Plan {
  std::unique_ptr<StepNetwork> network;
  std::vector<Trained> trained;
  bool adam = false;
  OptionalSlot options;
  bool cross_entropy = false, mean = false;
  OptionalSlot class_weight;
  int64_t ignore_index = 0;
  double label_smoothing = 0;
  OptionalSlot workspace;  // kept from step to step, grown for a larger batch

  // Of the step at hand.
  int64_t rows = 0;
  void *output = nullptr, *grad_output = nullptr;

  int64_t out() const { return network->out_features; }
  const Slot& parameter(const Trained& each) const { return *network->parameters[each.place]; }
  size_t element_size() const { return network->dtype == DType::kFloat64 ? 8 : 4; }
  ScalarType dtype() const { return scalar_type_of(network->dtype); }

  bool holds() const;
  std::optional<double> divisor(const Tensor& target) const;
  void place();
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

bool Plan::holds() const {
  for (const Trained& each : trained) {
    if (!holds_if_there(each.kept) || !holds_all(each.state)) return false;
  }
  return network->holds() && holds_if_there(class_weight);
}

// What the sum of the rows' losses is divided by; nothing for a target that does not fit.
std::optional<double> Plan::divisor(const Tensor& target) const {
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

// What a step writes: output, its gradient, what backward needs, and the parameters' gradients.
void Plan::place() {
  const size_t size = element_size();
  const auto padded = [&](int64_t numel) {
    return (static_cast<size_t>(numel) * size + 63) / 64 * 64;
  };
  const int64_t saved = network->saved_numel();
  size_t bytes = 2 * padded(rows * out()) + padded(saved);
  for (const Trained& each : trained) {
    if (!each.kept) bytes += padded(parameter(each).numel());
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
  output = take(rows * out());
  grad_output = take(rows * out());
  network->place(take(saved), output);
  for (Trained& each : trained) {
    each.gradient = each.kept ? each.kept->data() : take(parameter(each).numel());
    network->set_gradient(each.place, each.gradient);
  }
}

void Plan::judge(const Tensor& target, double divisor, void* result) const {
  if (cross_entropy) {
    kernels().cross_entropy({network->dtype, rows, out(), output, target.const_data_ptr<int64_t>(),
                             target.stride(0), data_of(class_weight), ignore_index, label_smoothing,
                             divisor, grad_output, result});
  } else {
    kernels().squared_error(
        {network->dtype, rows, out(), output, elements_of(target), divisor, grad_output, result});
  }
}

// torch.nn.utils.clip_grad_norm_.
void Plan::clip(double max_norm) const {
  double squares = 0;
  for (const Trained& each : trained) {
    squares += kernels().squared_norm(network->dtype, parameter(each).numel(), each.gradient);
  }
  const double factor = max_norm / (std::sqrt(squares) + 1e-6);
  if (factor >= 1) return;  // a NaN goes on and makes every gradient one, as in torch
  for (const Trained& each : trained) {
    kernels().scale(network->dtype, parameter(each).numel(), factor, each.gradient);
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
    const Slot& parameter = this->parameter(each);
    const double* o = rows + each.group * kOptions;
    if (!adam) {
      kernels().sgd({network->dtype, parameter.numel(), parameter.data(), each.gradient,
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
    kernels().adam({network->dtype, parameter.numel(), parameter.data(), each.gradient,
                    each.state[1].data(), each.state[2].data(),
                    each.state.size() > 3 ? each.state[3].data() : nullptr, o[kLr], o[kWeightDecay],
                    beta1, beta2, o[kEps], correction1, correction2, o[kDecoupled] != 0,
                    o[kMaximize] != 0});
  }
}

}  // namespace

Tensor train_step_plan(const Tensor& network, bool cross_entropy, bool mean,
                       const std::optional<Tensor>& class_weight, int64_t ignore_index,
                       double label_smoothing, bool adam, const Tensor& options,
                       std::vector<int64_t> places, std::vector<int64_t> groups,
                       std::vector<int64_t> state_counts, std::vector<Tensor> state,
                       std::vector<Tensor> kept_grads) {
  auto plan = std::make_unique<Plan>();
  plan->network = step_network_of(network);
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
    STD_TORCH_CHECK(each.place < plan->network->parameters.size() &&
                        plan->network->parameters[each.place] &&
                        next + static_cast<size_t>(state_counts[i]) <= state.size() &&
                        (each.group + 1) * kOptions <= plan->options->numel() &&
                        (!adam || state_counts[i] >= 3),
                    "train_step_plan: place, group or count ", i, " is out of range");
    const int64_t numel = plan->parameter(each).numel();
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
  return hold(std::move(plan));
}

std::optional<Tensor> train_step(const Tensor& handle, const Tensor& input, const Tensor& target,
                                 double momentum, std::optional<double> max_norm) {
  Plan& plan = *held_in<std::unique_ptr<Plan>>(handle, "train_step_plan");
  StepNetwork& network = *plan.network;
  if (!plan.holds() || !input.is_cpu() || input.scalar_type() != plan.dtype() || input.dim() != 2 ||
      input.size(1) != network.in_features) {
    return std::nullopt;
  }
  plan.rows = input.size(0);
  if (!network.takes(plan.rows)) return std::nullopt;
  const std::optional<double> divisor = plan.divisor(target);
  if (!divisor) return std::nullopt;

  const bool dense = input.stride(1) == 1 && input.stride(0) >= input.size(1);
  const Tensor readable = dense ? input : as_contiguous(input);
  const Tensor dense_target = plan.cross_entropy ? target : as_contiguous(target);
  const Tensor loss = new_empty_cpu({}, plan.dtype());
  network.begin(readable, momentum);
  plan.place();
  network.forward();
  plan.judge(dense_target, *divisor, loss.mutable_data_ptr());
  network.backward(plan.grad_output);
  if (max_norm) plan.clip(*max_norm);
  plan.update();
  return loss;
}

}  // namespace fused_mlp
