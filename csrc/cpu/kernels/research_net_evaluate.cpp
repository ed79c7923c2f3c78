// The whole network with constant statistics: one walk of its rows through all layers. A handful of
// rows is not worth a panel.

#include "cpu/kernels/few_rows.h"
#include "cpu/kernels/panel_walk.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

template <class S, int kRows>
void evaluate_few(const PanelWalk<S>& net, Arena& arena) {
  using T = Compute<S>;
  const ResearchNet& op = net.op;
  const int64_t stride = round_up(net.widest, kLanes<T>);
  const Vec<T> slope = splat(static_cast<T>(op.negative_slope));
  T* before = arena.take<T>(kFewRows * stride);
  T* after = arena.take<T>(kFewRows * stride);
  copy_in(static_cast<const S*>(op.input), op.input_stride, op.rows, op.widths[0], before, stride);
  for (int l = 0; l < op.layers; ++l) {
    const int64_t in = op.widths[l];
    net.share_features(l, [&](int64_t first, int64_t features) {
      few_rows_layer<S, kRows>(
          net.weight(l) + first * in, net.biases[l] + first, in, features, op.rows, before, stride,
          [&](int64_t row, int64_t feature, int width, Vec<T> z) {
            const int64_t f = first + feature;
            if (l < op.layers - 2) {
              z = relu<T>(z);
            } else if (l == op.layers - 2) {
              z = (z - load_raw(net.affine.mean + f)) * load_raw(net.affine.scale + f) +
                  load_raw(net.affine.shift + f);
              z = leaky_relu<T>(z, slope);
            }
            store_up_to(after + row * stride + f, z, width);
          });
    });
    std::swap(before, after);
  }
  copy_out(before, stride, op.rows, net.shape.out, static_cast<S*>(op.output), net.shape.out);
}

}  // namespace

template <class S>
void evaluate(const ResearchNet& op) {
  using T = Compute<S>;
  PanelWalk<S> net(op);
  const int64_t channels = net.shape.channels;
  bool few = op.rows <= kFewRows;
  for (int l = 0; l < net.shape.hidden; ++l) few = few && !op.dropout[l].active();
  const int64_t row = few ? round_up(net.widest, kLanes<T>) : 0;
  Arena arena(Scratch::kCall,
              net.bytes() + 2 * Arena::bytes<T>(channels) + 2 * Arena::bytes<T>(kFewRows * row));
  net.take(arena);
  T* mean = arena.take<T>(channels);
  T* rstd = arena.take<T>(channels);
  running_statistics<T>(op, channels, mean, rstd);
  net.set_affine(mean, rstd);
  if (op.saved != nullptr) {
    std::memcpy(net.shape.mean(), mean, static_cast<size_t>(channels) * sizeof(T));
    std::memcpy(net.shape.rstd(), rstd, static_cast<size_t>(channels) * sizeof(T));
  }
  if (!few) return net.run(0, op.layers);
  if (op.rows <= 1) return evaluate_few<S, 1>(net, arena);
  if (op.rows <= 2) return evaluate_few<S, 2>(net, arena);
  evaluate_few<S, 4>(net, arena);
}

template void evaluate<float>(const ResearchNet&);
template void evaluate<double>(const ResearchNet&);
template void evaluate<BFloat16>(const ResearchNet&);
template void evaluate<Float16>(const ResearchNet&);

}  // namespace fused_mlp::FUSED_MLP_ISA
