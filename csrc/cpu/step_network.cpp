#include "cpu/step_network.h"

#include <algorithm>

#include "cpu/chain.h"
#include "cpu/handle.h"
#include "cpu/network.h"

namespace fused_mlp {
namespace {

// A seed that every step draws anew, if anything drops.
class Seed {
 public:
  explicit Seed(bool drops) {
    if (drops) drawn_.emplace(new_empty_cpu({2}, ScalarType::Long));
  }
  const int64_t* data() const { return drawn_ ? drawn_->const_data_ptr<int64_t>() : nullptr; }
  void draw() const {
    if (drawn_) random_(*drawn_);  // as draw_seed in fused_mlp/dropout.py
  }

 private:
  std::optional<Tensor> drawn_;
};

class ResearchNetStep : public StepNetwork {
 public:
  explicit ResearchNetStep(const Network& network) : seed_(network.drops()) {
    ResearchNet& net = op_.forward;
    const std::vector<Tensor>&weights = network.weights, &biases = network.biases;
    const size_t layers = weights.size();
    STD_TORCH_CHECK(layers >= 2 && layers <= kMaxLayers && biases.size() == layers &&
                        network.dropout_p.size() == layers - 2,
                    "train_step_plan: expected 2 to ", kMaxLayers,
                    " weights, as many biases and 2 fewer dropout probabilities");
    net.dtype = dtype = dtype_of(weights[0]);
    net.layers = static_cast<int>(layers);
    net.widths[0] = in_features = weights[0].size(1);
    for (size_t l = 0; l < layers; ++l) {
      STD_TORCH_CHECK(weights[l].size(1) == net.widths[l] && dtype_of(weights[l]) == dtype &&
                          biases[l].numel() == weights[l].size(0) && dtype_of(biases[l]) == dtype,
                      "train_step_plan: weights[", l, "] or biases[", l, "] do not fit");
      net.widths[l + 1] = weights[l].size(0);
      parameters.emplace_back(weights[l]);
    }
    out_features = net.widths[layers];
    const int64_t channels = net.widths[layers - 1];
    for (const auto* tensor :
         {&network.bn_weight, &network.bn_bias, &network.running_mean, &network.running_var}) {
      STD_TORCH_CHECK(!*tensor || ((*tensor)->numel() == channels && dtype_of(**tensor) == dtype),
                      "train_step_plan: a tensor of the batch norm does not fit");
    }
    counter_of(network.num_batches_tracked);
    for (const Tensor& bias : biases) parameters.emplace_back(bias);
    parameters.push_back(slot_of(network.bn_weight));
    parameters.push_back(slot_of(network.bn_bias));
    for (const auto* buffer :
         {&network.running_mean, &network.running_var, &network.num_batches_tracked}) {
      buffers.push_back(slot_of(*buffer));
    }
    net.training = network.training;
    net.eps = network.eps;
    net.negative_slope = network.negative_slope;
    for (size_t l = 0; l < network.dropout_p.size(); ++l) {
      if (network.dropout_p[l] <= 0) continue;
      net.dropout[l] = {network.dropout_p[l], seed_.data(), static_cast<uint32_t>(l)};
    }
  }

  bool takes(int64_t rows) const override { return rows >= (op_.forward.training ? 2 : 1); }

  void begin(const Tensor& input, double momentum) override {
    ResearchNet& net = op_.forward;
    net.rows = input.size(0);
    net.input = elements_of(input);
    net.input_stride = input.stride(0);
    net.momentum = momentum;
    for (size_t l = 0; l < layers(); ++l) {
      net.weights[l] = parameters[l]->data();
      net.biases[l] = parameters[layers() + l]->data();
    }
    net.bn_weight = {data_of(parameters[2 * layers()]), dtype};
    net.bn_bias = {data_of(parameters[2 * layers() + 1]), dtype};
    net.running_mean = {data_of(buffers[0]), dtype};
    net.running_var = {data_of(buffers[1]), dtype};
    net.num_batches_tracked = static_cast<int64_t*>(data_of(buffers[2]));
  }
  int64_t saved_numel() override { return kernels().research_net_saved_numel(op_.forward); }
  void place(void* saved, void* output) override {
    op_.forward.saved = saved;
    op_.forward.output = output;
  }
  void set_gradient(size_t place, void* gradient) override {
    if (place < layers()) {
      op_.grad_weights[place] = gradient;
    } else if (place < 2 * layers()) {
      op_.grad_biases[place - layers()] = gradient;
    } else {
      (place == 2 * layers() ? op_.grad_bn_weight : op_.grad_bn_bias) = {gradient, dtype};
    }
  }
  void forward() override {
    seed_.draw();
    kernels().research_net(op_.forward);
  }
  void backward(const void* grad_output) override {
    op_.grad_output = grad_output;
    kernels().research_net_backward(op_);
  }

 private:
  size_t layers() const { return static_cast<size_t>(op_.forward.layers); }

  Seed seed_;
  ResearchNetBackward op_{};  // addresses are filled in at every step
};

class ChainStep : public StepNetwork {
 public:
  explicit ChainStep(const Mlp& mlp) : mlp_(mlp), seed_(mlp.drops()) {
    dtype = dtype_of(mlp.weights[0]);
    in_features = mlp.weights.front().size(1);
    out_features = mlp.weights.back().size(0);
    for (const Tensor& weight : mlp.weights) parameters.emplace_back(weight);
    for (const auto& bias : mlp.biases) parameters.push_back(slot_of(bias));
    for (const Norm& norm : mlp.norms) {
      parameters.push_back(slot_of(norm.weight));
      parameters.push_back(slot_of(norm.bias));
      for (const auto* buffer :
           {&norm.running_mean, &norm.running_var, &norm.num_batches_tracked}) {
        buffers.push_back(slot_of(*buffer));
      }
    }
  }

  bool takes(int64_t rows) const override { return rows >= (mlp_.trains() ? 2 : 1); }

  void begin(const Tensor& input, double) override {
    chain_ = describe(mlp_, input, seed_.data(), Pass::kForward);
  }
  int64_t saved_numel() override { return chain_.saved_numel(); }
  void place(void* saved, void* output) override {
    chain_.output() = output;
    chain_.place(saved);
    gradients_.emplace(chain_);
    if (chain_.kept_of_last() == Kept::kOutput) gradients_->layers.back().kept = output;
  }
  void set_gradient(size_t place, void* gradient) override {
    const size_t layers = chain_.layers.size();
    if (place < layers) {
      gradients_->layers[place].grad_weight = gradient;
    } else if (place < 2 * layers) {
      gradients_->layers[place - layers].grad_bias = gradient;
    } else {
      const size_t k = (place - 2 * layers) / 2;
      BatchNormActBackward& norm = gradients_->norms[k];
      (place % 2 == 0 ? norm.grad_weight : norm.grad_bias) = {gradient, dtype};
    }
  }
  void forward() override {
    seed_.draw();
    run(chain_);
  }
  void backward(const void* grad_output) override {
    run_backward(chain_, grad_output, *gradients_);
  }

 private:
  const Mlp mlp_;
  Seed seed_;
  Chain chain_;
  std::optional<ChainGradients> gradients_;
};

}  // namespace

bool StepNetwork::holds() const {
  return std::all_of(parameters.begin(), parameters.end(), holds_if_there) &&
         std::all_of(buffers.begin(), buffers.end(), holds_if_there);
}

std::unique_ptr<StepNetwork> step_network_of(const Tensor& handle) {
  if (const Mlp* mlp = find_held<Mlp>(handle)) return std::make_unique<ChainStep>(*mlp);
  return std::make_unique<ResearchNetStep>(
      held_in<Network>(handle, "research_net_prepare or mlp_prepare"));
}

}  // namespace fused_mlp
