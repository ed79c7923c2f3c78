// The network in training where its widths exceed the cache: a walk of panels up to what the batch
// norm sees, and one from there on. Every layer's output is kept.

#include "cpu/kernels/moments.h"
#include "cpu/kernels/panel_walk.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

template <class T>
void train(const ResearchNet& op) {
  PanelWalk<T> net(op);
  const Shape<T>& shape = net.shape;
  const int64_t channels = shape.channels;
  Arena arena(Scratch::kCall, net.bytes() + Arena::bytes<double>(2 * channels));
  net.take(arena);
  double* mean = arena.take<double>(2 * channels);
  double* m2 = mean + channels;
  for (int l = 0; l < shape.hidden; ++l) net.kept[l] = shape.activation(l, 0);
  net.kept[op.layers - 2] = shape.z(0);
  net.run(0, op.layers - 1);
  for (int64_t c = 0; c < 2 * channels; ++c) mean[c] = 0;
  if (op.rows > 0) column_moments(shape.z(0), op.rows, channels, mean, m2);
  finish_statistics<T>(op, channels, static_cast<double>(op.rows), mean, m2, shape.mean(),
                       shape.rstd());
  net.set_affine(shape.mean(), shape.rstd());
  net.run(op.layers - 1, op.layers);
}

}  // namespace

void research_net_wide_train(const ResearchNet& op) {
  dispatch_single_or_double(op.dtype, [&](auto element) { train<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
