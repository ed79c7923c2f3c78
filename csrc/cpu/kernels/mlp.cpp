// A chain of Linear layers with what stands behind them. Where the weights fit a core's cache, a
// block of rows walks through all layers while it lies there; else, and for a handful of rows, one
// layer runs after the other (linear_act.cpp).

#include "cpu/kernels/mlp.h"

#include <vector>

#include "cpu/kernels/activation.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/linear_act.h"
#include "cpu/kernels/panels.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// A layer's bias and batch norm in the compute type.
template <class T>
struct Layer {
  const LinearAct& op;
  T* bias;
  Norm<T> norm;

  static size_t bytes(const LinearAct& op) {
    return Arena::bytes<T>(round_up(op.out_features, kPanel<T>)) +
           Arena::bytes<T>(norm_room<T>(op.norm, op.out_features));
  }
  Layer(const LinearAct& layer, Arena& arena)
      : op(layer),
        bias(copied_bias(layer, arena.take<T>(round_up(layer.out_features, kPanel<T>)))),
        norm(op.norm, op.out_features, arena.take<T>(norm_room<T>(op.norm, op.out_features)),
             bias) {}

  // Whether the product writes no value below zero: nothing stands between it and a ReLU.
  bool rectifies() const {
    return !op.norm.active() && !op.seen && op.act.activation == Activation::kReLU;
  }
  // What is left to do behind the product.
  ActDropout behind() const {
    ActDropout act = op.act;
    if (rectifies()) act.activation = Activation::kNone;
    return act;
  }

 private:
  static T* copied_bias(const LinearAct& op, T* to) {
    copy_channels<T>({const_cast<void*>(op.bias), op.dtype}, op.out_features,
                     round_up(op.out_features, kPanel<T>), 0, to);
    return to;
  }
};

template <class T>
std::vector<Layer<T>> take_layers(const LinearAct* chain, int layers, Arena& arena) {
  std::vector<Layer<T>> taken;
  taken.reserve(static_cast<size_t>(layers));
  for (int l = 0; l < layers; ++l) taken.emplace_back(chain[l], arena);
  return taken;
}

// ------------------------------------------------------------------------------------ as panels

// The panel `after` of rows first … first + rows - 1 from the panel before it.
template <class T>
void run_panel(const Layer<T>& layer, int64_t first, int64_t rows, const T* before, T* after,
               uint8_t* mask) {
  const LinearAct& op = layer.op;
  const int64_t out = op.out_features;
  const auto keep = [&](void* to) {
    if (to) write_transposed(after, rows, out, static_cast<T*>(to) + first * out, out);
  };
  multiply_panels<T>(static_cast<const T*>(op.weight), op.weight_stride, layer.bias, op.in_features,
                     out, rows, before, after, out * kPanel<T>, layer.rectifies(), nullptr);
  keep(op.seen);
  finish_panel<T>(layer.norm.get(), layer.behind(), first, rows, out, after, mask);
  keep(op.output);
}

// Rows as transposed panels (panels.h), for which no weight is packed.
template <class T>
void walk_panels(const std::vector<Layer<T>>& layers, const ChainSize& size) {
  const LinearAct& head = layers.front().op;
  const int64_t room = size.widest * kPanel<T>;
  // As in panel_walk.h: threads share whole vectors of rows.
  const int64_t vectors = ceil_div(size.rows, kLanes<T>);
  const int64_t grain = ceil_div(kThreadWork, larger(1, size.work * kLanes<T>));
  parallel_for(vectors, vectors < 2 * grain ? vectors : grain, [&](int64_t begin, int64_t end) {
    Arena own(Scratch::kTask,
              2 * Arena::bytes<T>(room) + Arena::bytes<uint8_t>(mask_room(kPanel<T>, size.widest)));
    T *before = own.take<T>(room), *after = own.take<T>(room);
    uint8_t* mask = own.take<uint8_t>(mask_room(kPanel<T>, size.widest));
    const int64_t last = smaller(size.rows, end * kLanes<T>);
    for (int64_t row = begin * kLanes<T>; row < last; row += kPanel<T>) {
      const int64_t rows = smaller(kPanel<T>, last - row);
      read_transposed(static_cast<const T*>(head.input) + row * head.input_stride,
                      head.input_stride, rows, head.in_features, before);
      for (const Layer<T>& layer : layers) {
        run_panel(layer, row, rows, before, after, mask);
        std::swap(before, after);
      }
    }
  });
}

// -------------------------------------------------------------------------------------- as rows

// Whether panels or rows take less. As panels the input and all that is written are transposed; as
// rows the weights are packed, and products are whole vectors wide.
template <class T>
bool walks_panels(const LinearAct* chain, int layers) {
  // What an element that is transposed or packed costs in multiply-adds. (17,[256,256],6) with
  // outputs kept takes 14 us as panels and 21 as rows at 32 rows, 1430 and 1290 at 4096;
  // (4,[64,64],2) 3.8 and 4.2 at 32, 126 and 108 at 4096; in evaluation (8,[128],8) 54 and 74
  // there, (32,[64],32) 94 and 78.
  constexpr int64_t kElement = 12;
  int64_t panels = kElement * chain[0].in_features, rows = 0, weights = 0;
  for (int l = 0; l < layers; ++l) {
    const int64_t in = chain[l].in_features, out = chain[l].out_features;
    const int64_t written = (chain[l].output != nullptr) + (chain[l].seen != nullptr);
    panels += in * out + kElement * written * out;
    rows += in * round_up(out, kLanes<T>);
    weights += in * out;
  }
  return panels <= rows + kElement * weights / chain[0].rows;
}

// The output of a block of rows, `block` or, where it is kept, there.
template <class T>
Left<T> run_rows(const Layer<T>& layer, const T* weight, int64_t first, int64_t rows, Left<T> input,
                 T* block, uint8_t* mask) {
  const LinearAct& op = layer.op;
  const int64_t out = op.out_features;
  const bool kept = op.output != nullptr, direct = kept && out % kLanes<T> == 0;
  const Left<T> stored = {static_cast<T*>(op.output) + (kept ? first * out : 0), out, 1};
  const Left<T> padded_block = {block, padded<T>(out), 1};
  const Left<T> product = direct ? stored : padded_block, result = kept ? stored : padded_block;
  T *from = const_cast<T*>(product.data), *to = const_cast<T*>(result.data);
  multiply<T>(rows, out, op.in_features, input, packed(weight, op.in_features), from, product.row,
              Start::kBias, layer.bias, layer.rectifies());
  if (op.seen) copy_out(from, product.row, rows, out, static_cast<T*>(op.seen) + first * out, out);
  const ActDropout act = layer.behind();
  const bool finished =
      !op.norm.active() && act.activation == Activation::kNone && !act.dropout.active();
  if (finished && from == to) return result;
  finish_act<T>(layer.norm.get(), act, first, rows, 0, out, from, product.row, to, result.row,
                mask);
  return result;
}

template <class T>
void walk_rows(const std::vector<Layer<T>>& layers, const T* const* weights,
               const ChainSize& size) {
  const int64_t stride = padded<T>(size.widest);
  for_row_blocks(size.rows, size.work, [&](int64_t first, int64_t rows) {
    Arena own(Scratch::kTask, 2 * Arena::bytes<T>(rows * stride) +
                                  Arena::bytes<uint8_t>(mask_room(rows, size.widest)));
    T *block = own.take<T>(rows * stride), *next = own.take<T>(rows * stride);
    uint8_t* mask = own.take<uint8_t>(mask_room(rows, size.widest));
    const LinearAct& head = layers.front().op;
    Left<T> before = {static_cast<const T*>(head.input) + first * head.input_stride,
                      head.input_stride, 1};
    for (size_t l = 0; l < layers.size(); ++l) {
      before = run_rows(layers[l], weights[l], first, rows, before, block, mask);
      std::swap(block, next);
    }
  });
}

template <class T>
void walk(const LinearAct* chain, int layers, const ChainSize& size) {
  const bool panels = walks_panels<T>(chain, layers);
  size_t bytes = 0;
  for (int l = 0; l < layers; ++l) {
    bytes += Layer<T>::bytes(chain[l]);
    if (!panels)
      bytes += Arena::bytes<T>(packed_numel<T>(chain[l].in_features, chain[l].out_features));
  }
  Arena shared(Scratch::kCall, bytes);
  const std::vector<Layer<T>> taken = take_layers<T>(chain, layers, shared);
  if (panels) return walk_panels(taken, size);
  const T* weights[kMaxLayers];
  for (int l = 0; l < layers; ++l) {
    const int64_t in = chain[l].in_features, out = chain[l].out_features;
    T* weight = shared.take<T>(packed_numel<T>(in, out));
    pack_transposed<T>(static_cast<const T*>(chain[l].weight), chain[l].weight_stride, in, out,
                       static_cast<const T*>(nullptr), weight);
    weights[l] = weight;
  }
  walk_rows(taken, weights, size);
}

// ------------------------------------------------------------------------------- layer by layer

// What is not kept goes into memory of the call.
template <class T>
void run_layers(const LinearAct* chain, int layers, const ChainSize& size) {
  const bool keeps = layers == 1 || chain[0].output != nullptr;
  const int64_t room = keeps ? 0 : size.rows * size.widest;
  Temporary<T> block(room), next(room);
  const void* before = chain[0].input;
  for (int l = 0; l < layers; ++l) {
    LinearAct layer = chain[l];
    layer.input = before;
    if (layer.output == nullptr) layer.output = block.data();
    linear_act(layer);
    before = layer.output;
    block.swap(next);
  }
}

}  // namespace

void walk_chain(const LinearAct* chain, int layers) {
  const ChainSize size(chain, layers);
  dispatch_single_or_double(chain[0].dtype,
                            [&](auto element) { walk<decltype(element)>(chain, layers, size); });
}

void mlp(const LinearAct* chain, int layers) {
  const ChainSize size(chain, layers);
  if (size.walks() && !size.is_one_product()) return walk_chain(chain, layers);
  dispatch_single_or_double(
      chain[0].dtype, [&](auto element) { run_layers<decltype(element)>(chain, layers, size); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
