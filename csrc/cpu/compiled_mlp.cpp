// A chain of Linear layers for compiled graphs: as for a whole network (compiled_research_net.cpp),
// few lists, numbers as a text, and what backward wants to know beside input, weights and output at
// the end of `saved`.

#include <cstring>
#include <iterator>
#include <utility>

#include "cpu/chain.h"
#include "cpu/ops.h"
#include "cpu/text.h"

namespace fused_mlp {
namespace {

// What the number of a layer says; fused_mlp/ops/compiled_mlp.py writes it.
enum Bits : int64_t {
  kActivation = 7,  // its number
  kBias = 8,        // the layer has one
  kDrops = 16,      // its dropout's probability is among the options
  kNorm = 32,       // a batch norm stands behind the product
  kTrains = 64,     // which takes the statistics of its batch
  kAffine = 128,    // and has weight and bias
  kOfNorm = kTrains | kAffine,
  kAll = 255,
};

// How the layers are built: a number each; and as options, of each layer in order, the slope of
// LeakyReLU, the dropout's probability, and momentum and eps of the batch norm, as far as it has
// them.
struct Plan {
  std::vector<int64_t> layers;
  std::vector<double> options;

  size_t words() const { return layers.size() + options.size(); }
};

bool is_leaky(int64_t layer) {
  return (layer & kActivation) == static_cast<int64_t>(Activation::kLeakyReLU);
}

size_t options_of(int64_t layer) {
  return size_t{is_leaky(layer)} + (layer & kDrops ? 1 : 0) + (layer & kNorm ? 2 : 0);
}

// Raises for numbers that stand for no layer.
void check_layer(int64_t layer) {
  STD_TORCH_CHECK((layer & ~kAll) == 0 && (layer & kNorm || !(layer & kOfNorm)),
                  "fused_mlp: mlp_compiled: no layer has the number ", layer);
  activation_of(layer & kActivation, layer & kNorm ? Activation::kLeakyReLU : Activation::kTanh);
}

void check_count(size_t layers) {
  STD_TORCH_CHECK(layers > 0 && layers <= kMaxLayers, "fused_mlp: mlp_compiled: expected 1 to ",
                  kMaxLayers, " layers");
}

// The first number says which of its graph's calls this is. Then comes that of each layer, with its
// options behind it.
Plan plan_of(const std::vector<double>& numbers) {
  STD_TORCH_CHECK(!numbers.empty(), "fused_mlp: mlp_compiled: layers is empty");
  Plan plan;
  for (auto number = numbers.begin() + 1; number != numbers.end();) {
    const bool fits = *number >= 0 && *number <= double{kAll};
    const auto layer = fits ? static_cast<int64_t>(*number) : -1;
    STD_TORCH_CHECK(static_cast<double>(layer) == *number,
                    "fused_mlp: mlp_compiled: no layer has the number ", *number);
    check_layer(layer);
    ++number;
    const auto options = static_cast<ptrdiff_t>(options_of(layer));
    STD_TORCH_CHECK(numbers.end() - number >= options, "fused_mlp: mlp_compiled: layer ", layer,
                    " has ", options, " options");
    plan.layers.push_back(layer);
    plan.options.insert(plan.options.end(), number, number + options);
    number += options;
  }
  check_count(plan.layers.size());
  return plan;
}

Plan plan_of(const std::string& layers) { return plan_of(numbers_of(layers)); }

// The chain but for its tensors.
Mlp without_tensors(const Plan& plan) {
  const size_t layers = plan.layers.size();
  Mlp mlp;
  mlp.biases.resize(layers);
  mlp.activations.resize(layers);
  mlp.negative_slopes.resize(layers);
  mlp.dropout_p.resize(layers);
  auto option = plan.options.begin();
  for (size_t l = 0; l < layers; ++l) {
    const int64_t layer = plan.layers[l];
    mlp.activations[l] = activation_of(layer & kActivation);
    if (is_leaky(layer)) mlp.negative_slopes[l] = *option++;
    if (layer & kDrops) mlp.dropout_p[l] = *option++;
    const double p = mlp.dropout_p[l];
    STD_TORCH_CHECK(p >= 0 && p <= 1,
                    "fused_mlp: mlp_compiled: dropout_p must be between 0 and 1, but got ", p);
    if (layer & kNorm) {
      const double momentum = *option++, eps = *option++;
      mlp.norms.push_back({l, {}, {}, {}, {}, {}, (layer & kTrains) != 0, momentum, eps});
    }
  }
  return mlp;
}

// What a plan says of the tensors that a call takes.
struct Counts {
  size_t parameters = 0, buffers = 0;
};

Counts count(const Plan& plan) {
  Counts counts;
  for (int64_t layer : plan.layers) {
    counts.parameters += 1 + (layer & kBias ? 1 : 0) + (layer & kAffine ? 2 : 0);
    counts.buffers += layer & kTrains ? 3 : layer & kNorm ? 2 : 0;
  }
  return counts;
}

using Taken = std::move_iterator<std::vector<Tensor>::iterator>;

// The chain of weights, biases, and weights and biases of the batch norms, as far as there are any.
// They are moved there, as in compiled_research_net.cpp.
Mlp mlp_of(const Plan& plan, Taken parameter, Taken buffer) {
  Mlp mlp = without_tensors(plan);
  const size_t layers = plan.layers.size();
  mlp.weights.assign(parameter, parameter + static_cast<ptrdiff_t>(layers));
  parameter += static_cast<ptrdiff_t>(layers);
  for (size_t l = 0; l < layers; ++l) {
    if (plan.layers[l] & kBias) mlp.biases[l] = *parameter++;
  }
  for (Norm& norm : mlp.norms) {
    if (plan.layers[norm.layer] & kAffine) {
      norm.weight = *parameter++;
      norm.bias = *parameter++;
    }
    norm.running_mean = *buffer++;
    norm.running_var = *buffer++;
    if (norm.training) norm.num_batches_tracked = *buffer++;
  }
  return mlp;
}

// The end of `saved`: weights and biases of the batch norms, each in the room of whole words; then
// the options and the layers' numbers. A word has 8 bytes.
constexpr int64_t kWord = sizeof(int64_t);

int64_t words_of(const LinearAct& layer, ScalarType dtype) {
  return (layer.out_features * size_of(dtype) + kWord - 1) / kWord;
}

int64_t tail_words(const Plan& plan, const Chain& chain) {
  auto words = static_cast<int64_t>(plan.words());
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    if (plan.layers[l] & kAffine) words += 2 * words_of(chain.layers[l], chain.dtype);
  }
  return words;
}

// The elements of `saved` that this is.
int64_t tail_numel(const Plan& plan, const Chain& chain) {
  return tail_words(plan, chain) * (kWord / size_of(chain.dtype));
}

char* end_of(const Tensor& saved) {
  return static_cast<char*>(const_cast<void*>(elements_of(saved))) +
         saved.numel() * size_of(saved.scalar_type());
}

// Calls visit(batch norm of the chain, its place, address) for weight and bias of each that has
// any.
template <class Visit>
char* for_affine(const Plan& plan, const Chain& chain, char* at, const Visit& visit) {
  for (size_t k = 0; k < chain.norms.size(); ++k) {
    const size_t l = chain.norms[k].layer;
    if (!(plan.layers[l] & kAffine)) continue;
    const int64_t bytes = kWord * words_of(chain.layers[l], chain.dtype);
    visit(k, at, at + bytes);
    at += 2 * bytes;
  }
  return at;
}

void keep(const Plan& plan, const Mlp& mlp, const Chain& chain, const Tensor& saved) {
  const auto copy = [&](const Tensor& vector, char* to) {
    const Tensor elements = as_contiguous(vector);
    std::memcpy(to, elements_of(elements),
                static_cast<size_t>(elements.numel() * size_of(chain.dtype)));
  };
  char* at = for_affine(plan, chain, end_of(saved) - kWord * tail_words(plan, chain),
                        [&](size_t k, char* weight, char* bias) {
                          copy(*mlp.norms[k].weight, weight);
                          copy(*mlp.norms[k].bias, bias);
                        });
  const auto append = [&](const auto& numbers) {
    const size_t bytes = numbers.size() * sizeof(numbers[0]);
    if (bytes > 0) std::memcpy(at, numbers.data(), bytes);
    at += bytes;
  };
  append(plan.options);
  append(plan.layers);
}

// What forward kept; raises for anything that it did not write.
Plan plan_in(const Tensor& saved, size_t layers) {
  const ScalarType dtype = saved.scalar_type();
  const bool has_elements =
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16;
  const auto check_words = [&](size_t words) {
    STD_TORCH_CHECK(has_elements && saved.is_cpu() && saved.is_contiguous() && layers > 0 &&
                        static_cast<size_t>(saved.numel() * size_of(dtype) / kWord) >= words,
                    "fused_mlp: mlp_compiled_backward: expected what forward saved");
  };
  check_words(layers);
  Plan plan;
  const auto read = [&](auto& numbers, size_t count, size_t words_from_end) {
    numbers.resize(count);
    if (count > 0) {
      std::memcpy(numbers.data(), end_of(saved) - kWord * static_cast<int64_t>(words_from_end),
                  count * sizeof(numbers[0]));
    }
  };
  read(plan.layers, layers, layers);
  check_count(layers);
  size_t options = 0;
  for (int64_t layer : plan.layers) {
    check_layer(layer);
    options += options_of(layer);
  }
  check_words(layers + options);
  read(plan.options, options, layers + options);
  return plan;
}

// The flags of all gradients: bits of input, weights, biases, and for each layer weight and bias of
// its batch norm.
std::vector<bool> flags_of(const Plan& plan, int64_t mask) {
  const size_t layers = plan.layers.size();
  const auto take = [&](size_t bit) {
    const int64_t flag = bit < 63 ? int64_t{1} << bit : 0;
    const bool wanted = (mask & flag) != 0;
    mask &= ~flag;
    return wanted;
  };
  std::vector<bool> flags;
  for (size_t bit = 0; bit < 1 + 2 * layers; ++bit) flags.push_back(take(bit));
  for (size_t l = 0; l < layers; ++l) {
    if (!(plan.layers[l] & kNorm)) continue;
    flags.push_back(take(1 + 2 * layers + 2 * l));
    flags.push_back(take(2 + 2 * layers + 2 * l));
  }
  STD_TORCH_CHECK(mask == 0,
                  "fused_mlp: mlp_compiled_backward: output_mask has a bit for a batch norm or a "
                  "layer that there is not");
  return flags;
}

}  // namespace

std::tuple<Tensor, Tensor> mlp_compiled(const Tensor& input, std::vector<Tensor>& parameters,
                                        std::vector<Tensor>& buffers, const std::string& layers) {
  const Plan& plan = parsed<Plan, plan_of>(layers);
  const Counts counts = count(plan);
  STD_TORCH_CHECK(parameters.size() == counts.parameters && buffers.size() == counts.buffers,
                  "fused_mlp: mlp_compiled: expected ", counts.parameters, " parameters and ",
                  counts.buffers, " buffers for these layers, but got ", parameters.size(), " and ",
                  buffers.size());
  const Mlp mlp = mlp_of(plan, Taken(parameters.begin()), Taken(buffers.begin()));
  for (const Norm& norm : mlp.norms) {
    const bool fits = !norm.weight || (norm.weight->scalar_type() == input.scalar_type() &&
                                       norm.bias->scalar_type() == input.scalar_type());
    STD_TORCH_CHECK(fits, "fused_mlp: mlp_compiled: the batch norms must have the input's dtype");
  }
  Chain chain = describe(mlp, input, kAnySeed, Pass::kForward);
  std::tuple<Tensor, Tensor> results = run_and_draw(mlp, chain, input, tail_numel(plan, chain));
  keep(plan, mlp, chain, std::get<1>(results));
  return results;
}

StableIValue mlp_compiled_backward(const Tensor& grad_output, const Tensor& input,
                                   std::vector<Tensor>& weights,
                                   const std::optional<Tensor>& output, const Tensor& saved,
                                   int64_t output_mask) {
  const Plan plan = plan_in(saved, weights.size());
  Mlp mlp = without_tensors(plan);
  mlp.weights = std::move(weights);
  Chain chain = describe(mlp, input, kAnySeed, Pass::kBackward);
  const int64_t words = tail_words(plan, chain), more = tail_numel(plan, chain);
  STD_TORCH_CHECK(saved.scalar_type() == chain.dtype && saved.numel() >= more,
                  "fused_mlp: mlp_compiled_backward: expected what forward saved");
  const DType dtype = dtype_of(input);
  for_affine(plan, chain, end_of(saved) - kWord * words, [&](size_t k, char* weight, char* bias) {
    chain.norms[k].op.weight = {weight, dtype};
    chain.norms[k].op.bias = {bias, dtype};
  });
  return backward_of_drawn(mlp, chain, grad_output, input, output, saved, more,
                           flags_of(plan, output_mask));
}

Tensor mlp_compiled_evaluate(const Tensor& input, std::vector<Tensor>& tensors,
                             const std::string& layers) {
  const Plan& plan = parsed<Plan, plan_of>(layers);
  const Counts counts = count(plan);
  STD_TORCH_CHECK(tensors.size() == counts.parameters + counts.buffers,
                  "fused_mlp: mlp_compiled_evaluate: expected ", counts.parameters,
                  " parameters and ", counts.buffers, " buffers for these layers, but got ",
                  tensors.size(), " tensors");
  const Taken parameters(tensors.begin());
  return evaluate(mlp_of(plan, parameters, parameters + static_cast<ptrdiff_t>(counts.parameters)),
                  input);
}

}  // namespace fused_mlp
