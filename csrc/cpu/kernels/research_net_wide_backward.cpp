// Backward of the network layer by layer: two products a layer, with the gates and the batch norm's
// sums done on the blocks of the result.

#include "cpu/kernels/panel_walk.h"
#include "cpu/kernels/wide.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Evaluation keeps no activations: they are computed again.
template <class T>
void restore(Wide<T>& wide, Temporary<T>* buffers) {
  const ResearchNet& op = wide.op;
  if (op.training) {
    for (int l = 0; l < wide.shape.hidden; ++l) wide.hidden[l] = wide.shape.activation(l, 0);
    wide.z = wide.shape.z(0);
    return;
  }
  PanelWalk<T> net(op);
  Arena arena(Scratch::kPartial, net.bytes());
  net.take(arena);
  for (int l = 0; l < op.layers - 1; ++l) {
    Temporary<T>(op.rows * op.widths[l + 1]).swap(buffers[l]);
    wide.hidden[l] = net.kept[l] = buffers[l].data();
  }
  wide.z = wide.hidden[wide.shape.hidden];
  net.run(0, op.layers - 1);
}

// du, the gradient of what LeakyReLU saw, and of every block of rows the sums of du and of
// du * (z - mean).
template <class T>
void grad_of_norm(Wide<T>& wide, const T* grad_output, T* du, double* sums) {
  const int64_t out = wide.shape.out, channels = wide.shape.channels;
  const int64_t size = gemm_row_parts(wide.op.rows).size;
  const Vec<T> slope = splat(static_cast<T>(wide.op.negative_slope));
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                          const T* block, int64_t stride) {
    double* sum = sums + row / size * 2 * channels + column;
    const T* z = wide.z + row * channels + column;
    T* to = du + row * padded<T>(channels) + column;
    for_vectors<T>(columns, [&](int64_t c, int width) {
      const Vec<T> mean = load_raw(wide.affine.mean + column + c);
      const Vec<T> scale = load_raw(wide.affine.scale + column + c);
      const Vec<T> shift = load_raw(wide.affine.shift + column + c);
      Vec<T> first = {}, second = {};
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<T> centred = load_up_to(z + r * channels + c, width) - mean;
        const Vec<T> u = centred * scale + shift, g = load_raw(block + r * stride + c);
        const Vec<T> gated = select<T>(u > Vec<T>{}, g, g * slope);
        first += gated;
        second += gated * centred;
        store_up_to(to + r * padded<T>(channels) + c, gated, width);
      }
      for (int lane = 0; lane < width; ++lane) {
        sum[c + lane] = static_cast<double>(first[lane]);
        sum[channels + c + lane] = static_cast<double>(second[lane]);
      }
    });
  };
  multiply_and_finish<T>(wide.op.rows, grad_output, out, wide.weight(wide.op.layers - 1), du,
                         finish);
}

// du becomes dz in place.
template <class T>
void grad_below_norm(const Wide<T>& wide, const T* k2, const T* k3, T* grad) {
  const int64_t channels = wide.shape.channels;
  for_row_blocks(wide.op.rows, channels * kPassCost, [&](int64_t first, int64_t rows) {
    for (int64_t row = first; row < first + rows; ++row) {
      const T* z = wide.z + row * channels;
      T* to = grad + row * padded<T>(channels);
      for_vectors<T>(channels, [&](int64_t c, int width) {
        const Vec<T> centred = load_up_to(z + c, width) - load_raw(wide.affine.mean + c);
        const Vec<T> scaled = load_raw(to + c) * load_raw(wide.affine.scale + c);
        store_raw(to + c, scaled - load_raw(k2 + c) - centred * load_raw(k3 + c));
      });
    }
  });
}

template <class T>
void backward(const ResearchNetBackward& op) {
  const ResearchNet& net = op.forward;
  Wide<T> wide(net);
  const int64_t channels = wide.shape.channels, last = net.layers - 1;
  const int64_t parts = larger(1, gemm_row_parts(net.rows).count);
  const int64_t padded_channels = round_up(channels, kPanel<T>);
  Arena arena(Scratch::kCall, wide.bytes() + Arena::bytes<double>(parts * 2 * channels) +
                                  2 * Arena::bytes<T>(padded_channels));
  wide.take(arena);
  double* sums = arena.take<double>(parts * 2 * channels);
  T* k2 = arena.take<T>(padded_channels);
  T* k3 = arena.take<T>(padded_channels);
  for (int64_t i = 0; i < parts * 2 * channels; ++i) sums[i] = 0;
  for (int64_t c = 0; c < padded_channels; ++c) k2[c] = k3[c] = 0;
  wide.set_affine(wide.shape.mean(), wide.shape.rstd());
  Temporary<T> restored[kMaxLayers];
  restore(wide, restored);

  int64_t widest = channels;
  for (int l = 1; l < last; ++l) widest = larger(widest, net.widths[l]);
  // Padded rows: products read them where they lie.
  Temporary<T> grad(net.rows * padded<T>(widest));
  Temporary<T> next(wide.shape.hidden > 0 ? net.rows * padded<T>(widest) : 0);
  const T* grad_output = static_cast<const T*>(op.grad_output);
  grad_of_norm(wide, grad_output, grad.data(), sums);
  weight_grad<T>(net.rows, channels, wide.shape.out, grad_output, wide.shape.out,
                 wide.load_activated(), static_cast<T*>(op.grad_weights[last]),
                 static_cast<T*>(op.grad_biases[last]));
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += sums[part * 2 * channels + c];
  }
  double* sum_x = sums + channels;
  const T* rstd = wide.shape.rstd();
  input_grad_coefficients<T>(net.training, channels, static_cast<double>(net.rows), sums, sum_x,
                             rstd, wide.affine.scale, k2, k3);
  for (int64_t c = 0; c < channels; ++c) sum_x[c] *= static_cast<double>(rstd[c]);
  write_channels(sum_x, channels, op.grad_bn_weight);
  write_channels(sums, channels, op.grad_bn_bias);
  grad_below_norm(wide, k2, k3, grad.data());

  for (int l = static_cast<int>(last) - 1; l >= 0; --l) {
    const int64_t width = net.widths[l + 1], below = net.widths[l];
    const T* grad_rows = grad.data();
    wide.with_input(l, [&](const auto& load) {
      weight_grad<T>(net.rows, below, width, grad_rows, padded<T>(width), load,
                     static_cast<T*>(op.grad_weights[l]), static_cast<T*>(op.grad_biases[l]));
    });
    if (l == 0) {
      if (op.grad_input == nullptr) return;
      multiply_into<T>(net.rows, grad_rows, padded<T>(width), wide.weight(l),
                       static_cast<T*>(op.grad_input));
      return;
    }
    const Dropout& dropout = net.dropout[l - 1];
    const Vec<T> scale = splat(static_cast<T>(dropout.active() ? dropout.scale() : 1.0));
    multiply_and_finish<T>(net.rows, grad_rows, padded<T>(width), wide.weight(l), next.data(),
                           [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                               const T* block, int64_t stride) {
                             const int64_t leading = padded<T>(below);
                             const T* hidden = wide.hidden[l - 1] + row * below + column;
                             T* to = next.data() + row * leading + column;
                             finish_rows<T>(block, stride, rows, columns, to, leading,
                                            [&](Vec<T> g, int64_t r, int64_t c, int lanes) {
                                              const Vec<T> y =
                                                  load_up_to(hidden + r * below + c, lanes);
                                              return select<T>(y <= Vec<T>{}, Vec<T>{}, g * scale);
                                            });
                           });
    grad.swap(next);
  }
}

}  // namespace

void research_net_wide_backward(const ResearchNetBackward& op) {
  dispatch_single_or_double(op.forward.dtype,
                            [&](auto element) { backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
