#include "cpu/chain.h"

#include <algorithm>

namespace fused_mlp {
namespace {

void describe_layers(const Mlp& mlp, const Tensor& input, const int64_t* seed, Chain& chain) {
  const DType dtype = dtype_of(input);
  int64_t features = input.size(input.dim() - 1), rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) rows *= input.size(d);
  chain.layers.resize(mlp.weights.size());
  for (size_t l = 0; l < chain.layers.size(); ++l) {
    LinearAct& layer = chain.layers[l];
    const Tensor& weight = mlp.weights[l];
    const std::optional<Tensor>& bias = mlp.biases[l];
    STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == features &&
                        dtype_of(weight) == dtype,
                    "fused_mlp: mlp: weights[", l, "] does not fit what comes before it");
    layer.dtype = dtype;
    layer.rows = rows;
    layer.in_features = features;
    layer.out_features = features = weight.size(0);
    STD_TORCH_CHECK(
        !bias || (bias->is_cpu() && bias->numel() == features && dtype_of(*bias) == dtype),
        "fused_mlp: mlp: biases[", l, "] does not fit its weight");
    layer.input_stride = layer.in_features;
    layer.weight = chain.contiguous_data(weight);
    layer.weight_stride = layer.in_features;
    layer.bias = bias ? chain.contiguous_data(*bias) : nullptr;
    layer.act = {mlp.activations[l],
                 mlp.negative_slopes[l],
                 {mlp.dropout_p[l], seed, static_cast<uint32_t>(l)}};
  }
  LinearAct& first = chain.layers.front();
  const bool rows_contiguous = input.dim() == 2 &&
                               (first.in_features <= 1 || input.stride(1) == 1) &&
                               input.stride(0) >= first.in_features;
  if (rows_contiguous) first.input_stride = input.stride(0);
  first.input = rows_contiguous ? elements_of(input) : chain.contiguous_data(input);
}

EvaluatedNorm folded(const Norm& norm, int64_t channels) {
  return {channels_of(norm.running_mean, channels, "running_mean"),
          channels_of(norm.running_var, channels, "running_var"),
          channels_of(norm.weight, channels, "weight"), channels_of(norm.bias, channels, "bias"),
          norm.eps};
}

// The batch norm as a step; its layer is left with the product.
NormStep separated(const Norm& norm, LinearAct& layer) {
  const int64_t channels = layer.out_features;
  NormStep step{norm.layer, batch_norm_of(layer.act), layer.act.dropout};
  step.dropout.scaled = false;  // by the batch norm's pass
  BatchNormAct& op = step.op;
  op.dtype = layer.dtype;
  op.batches = layer.rows;
  op.channels = channels;
  op.length = 1;
  op.weight = channels_of(norm.weight, channels, "weight");
  op.bias = channels_of(norm.bias, channels, "bias");
  op.running_mean = channels_of(norm.running_mean, channels, "running_mean");
  op.running_var = channels_of(norm.running_var, channels, "running_var");
  op.num_batches_tracked = norm.training ? counter_of(norm.num_batches_tracked) : nullptr;
  op.training = norm.training;
  op.momentum = norm.momentum;
  op.eps = norm.eps;
  layer.act = {};
  return step;
}

}  // namespace

bool Mlp::drops() const {
  return std::any_of(dropout_p.begin(), dropout_p.end(), [](double p) { return p > 0; });
}

bool Mlp::trains() const {
  return std::any_of(norms.begin(), norms.end(), [](const Norm& norm) { return norm.training; });
}

Kept kept(const ActDropout& act) {
  switch (act.activation) {
    case Activation::kNone:
      return Kept::kNothing;
    case Activation::kReLU:
      return Kept::kOutput;
    case Activation::kLeakyReLU:
      return act.negative_slope < 0 ? Kept::kInput : Kept::kOutput;
    case Activation::kTanh:
      return act.dropout.active() ? Kept::kInput : Kept::kOutput;
    default:
      return Kept::kInput;
  }
}

void*& Chain::output() {
  const bool normed = !norms.empty() && norms.back().layer + 1 == layers.size();
  return normed ? norms.back().op.output : layers.back().output;
}

Kept Chain::kept_of_last() const {
  return kept(layers.back().act);  // a batch norm needs its input alone, and left its layer no act
}

void Chain::set_seed(const int64_t* seed) {
  for (LinearAct& layer : layers) layer.act.dropout.seed = seed;
  for (NormStep& norm : norms) norm.dropout.seed = seed;
}

// Calls visit(pointer, numel) for all that is kept: the statistics of the batch norms first, which
// are float32 beside bfloat16; then of each layer what its activation saw, where the derivative
// comes from that, what its batch norm saw, and the output, but for the last.
template <class Visit>
void Chain::for_saved(const Visit& visit) {
  const int64_t elements = dtype == ScalarType::BFloat16 ? 2 : 1;
  for (NormStep& norm : norms) {
    visit(norm.op.mean, norm.op.channels * elements);
    visit(norm.op.rstd, norm.op.channels * elements);
  }
  size_t next_norm = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    LinearAct& layer = layers[l];
    const int64_t numel = layer.rows * layer.out_features;
    const bool last = l + 1 == layers.size();
    if (kept(layer.act) == Kept::kInput) visit(layer.seen, numel);
    if (next_norm < norms.size() && norms[next_norm].layer == l) {
      visit(layer.output, numel);
      if (!last) visit(norms[next_norm].op.output, numel);
      ++next_norm;
    } else if (!last) {
      visit(layer.output, numel);
    }
  }
}

int64_t Chain::saved_numel() {
  int64_t numel = 0;
  for_saved([&](void*, int64_t more) { numel += more; });
  return numel;
}

void Chain::place(void* saved) {
  char* next = static_cast<char*>(saved);
  for_saved([&](void*& at, int64_t numel) {
    at = next;
    next += numel * size_of(dtype);
  });
  for (size_t l = 1; l < layers.size(); ++l) layers[l].input = layers[l - 1].output;
  for (NormStep& norm : norms) {
    norm.op.input = layers[norm.layer].output;
    if (norm.layer + 1 < layers.size()) layers[norm.layer + 1].input = norm.op.output;
  }
}

Chain describe(const Mlp& mlp, const Tensor& input, const int64_t* seed, Pass pass) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() >= 1 && (mlp.norms.empty() || input.dim() == 2),
                  "fused_mlp: mlp: expected a CPU input, of two dimensions before a batch norm");
  const DType dtype = dtype_of(input);
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64 ||
                      (dtype == DType::kBFloat16 && kernels().bfloat16),
                  "fused_mlp: mlp: input must be float32 or float64, or bfloat16 where the "
                  "processor multiplies it");
  Chain chain;
  chain.dtype = input.scalar_type();
  describe_layers(mlp, input, seed, chain);
  for (const Norm& norm : mlp.norms) {
    LinearAct& layer = chain.layers[norm.layer];
    const bool has_statistics = pass == Pass::kBackward || (norm.running_mean && norm.running_var);
    STD_TORCH_CHECK(norm.training ? layer.rows > 1 && norm.eps > 0 : has_statistics,
                    "fused_mlp: mlp: a batch norm needs more than one row and an eps in training, "
                    "running statistics in evaluation");
    if (pass == Pass::kEvaluation) {
      layer.norm = folded(norm, layer.out_features);
    } else {
      chain.norms.push_back(separated(norm, layer));
    }
  }
  return chain;
}

}  // namespace fused_mlp
