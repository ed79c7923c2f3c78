// Backward of the bfloat16 network, layer by layer: two products a layer, with the gates and the
// batch norm's sums done on the blocks of the result.

#include "cpu/kernels/bfloat16/network.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Gradients between layers of up to 4 MiB each are kept for the next call: faulting in fresh memory
// took a third of the time of a call of such a size.
constexpr int64_t kKeptNumel = int64_t{2} << 20;

// Evaluation keeps no activations: they are computed again.
void restore(PairNet& net, Temporary<BFloat16>* buffers) {
  if (net.op.training) return;
  for (int l = 0; l < net.hidden_layers; ++l) {
    Temporary<BFloat16>(net.op.rows * net.op.widths[l + 1]).swap(buffers[l]);
    net.hidden[l] = buffers[l].data();
  }
  Temporary<BFloat16>(net.op.rows * net.channels).swap(buffers[net.hidden_layers]);
  net.z = buffers[net.hidden_layers].data();
  net.run_hidden([](int64_t, int64_t, int64_t, int64_t, const float*, int64_t) {});
}

// du, the gradient of what LeakyReLU saw, and of every block of rows the sums of du and of
// du * (z - mean).
void grad_of_norm(PairNet& net, const BFloat16* grad_output, BFloat16* du, double* sums) {
  const int64_t channels = net.channels, size = pair_row_parts(net.op.rows).size;
  const Vec<float> slope = splat(static_cast<float>(net.op.negative_slope));
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                          const float* block, int64_t stride) {
    double* sum = sums + row / size * 2 * channels + column;
    const BFloat16* z = net.z + row * channels + column;
    BFloat16* to = du + row * channels + column;
    for_vectors<float>(columns, [&](int64_t c, int width) {
      const Vec<float> mean = load_raw(net.affine.mean + column + c);
      const Vec<float> scale = load_raw(net.affine.scale + column + c);
      const Vec<float> shift = load_raw(net.affine.shift + column + c);
      Vec<float> first = {}, second = {};
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<float> centred = load_sixteen(z + r * channels + c, width) - mean;
        const Vec<float> u = centred * scale + shift, g = load_raw(block + r * stride + c);
        const Vec<float> gated = rounded(select<float>(u > Vec<float>{}, g, g * slope));
        first += gated;
        second += gated * centred;
        store_sixteen(to + r * channels + c, gated, width);
      }
      for (int lane = 0; lane < width; ++lane) {
        sum[c + lane] = static_cast<double>(first[lane]);
        sum[channels + c + lane] = static_cast<double>(second[lane]);
      }
    });
  };
  blocked_product(net.op.rows, net.weight(net.op.layers - 1, false), nullptr,
                  load_pairs(grad_output, net.out), finish);
}

// du becomes dz in place.
void grad_below_norm(const PairNet& net, const float* k2, const float* k3, BFloat16* grad) {
  const int64_t channels = net.channels;
  for_row_blocks(net.op.rows, channels * kPassCost, [&](int64_t first, int64_t rows) {
    for (int64_t i = first * channels; i < (first + rows) * channels; i += channels) {
      for_vectors<float>(channels, [&](int64_t c, int width) {
        const Vec<float> centred =
            load_sixteen(net.z + i + c, width) - load_raw(net.affine.mean + c);
        const Vec<float> scaled =
            load_sixteen(grad + i + c, width) * load_raw(net.affine.scale + c);
        store_sixteen(grad + i + c, scaled - load_raw(k2 + c) - centred * load_raw(k3 + c), width);
      });
    }
  });
}

// Reads blocks of the last layer's input as pairs of rows.
auto load_activated(const PairNet& net, Vec<float> slope) {
  return [&net, slope](int64_t row, int64_t rows, int64_t column, int64_t columns, Pair* to,
                       int64_t stride) {
    for (int64_t r = row; r < row + rows; r += 2, to += stride) {
      for_vectors<float>(columns, [&](int64_t c, int width) {
        const Vec<float> first = net.activated(r, column + c, width, slope);
        const Vec<float> second =
            r + 1 < row + rows ? net.activated(r + 1, column + c, width, slope) : Vec<float>{};
        _mm512_storeu_si512(to + c, make_pairs(first, second));
      });
    }
  };
}

}  // namespace

void research_net_bfloat16_backward(const ResearchNetBackward& op) {
  const ResearchNet& call = op.forward;
  PairNet net(call);
  const int64_t rows = call.rows, channels = net.channels, last = call.layers - 1;
  const int64_t parts = larger(1, pair_row_parts(rows).count);
  const int64_t room = round_up(channels, kPairPanel);
  int64_t widest = channels;
  for (int l = 1; l < last; ++l) widest = larger(widest, call.widths[l]);
  const int64_t numel = rows * widest;
  const bool kept = numel <= kKeptNumel;
  Arena arena(Scratch::kCall, net.bytes() + Arena::bytes<double>(parts * 2 * channels) +
                                  2 * Arena::bytes<float>(room) +
                                  (kept ? 2 * Arena::bytes<BFloat16>(numel) : 0));
  net.take(arena);
  double* sums = arena.take<double>(parts * 2 * channels);
  float* k2 = arena.take<float>(room);
  float* k3 = arena.take<float>(room);
  for (int64_t i = 0; i < parts * 2 * channels; ++i) sums[i] = 0;
  for (int64_t c = 0; c < room; ++c) k2[c] = k3[c] = 0;
  net.set_affine(net.mean(), net.rstd());
  Temporary<BFloat16> restored[kMaxLayers];
  restore(net, restored);

  Temporary<BFloat16> fresh[2];
  BFloat16* grads[2];
  for (int i = 0; i < 2; ++i) {
    if (!kept) Temporary<BFloat16>(numel).swap(fresh[i]);
    grads[i] = kept ? arena.take<BFloat16>(numel) : fresh[i].data();
  }
  BFloat16 *grad = grads[0], *next = grads[1];
  const BFloat16* grad_output = static_cast<const BFloat16*>(op.grad_output);
  grad_of_norm(net, grad_output, grad, sums);
  blocked_pair_grad(rows, channels, net.out, 1, load_row_pairs(grad_output, net.out),
                    load_activated(net, splat(static_cast<float>(call.negative_slope))),
                    op.grad_weights[last], op.grad_biases[last]);
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += sums[part * 2 * channels + c];
  }
  double* sum_x = sums + channels;
  const float* rstd = net.rstd();
  input_grad_coefficients<float>(call.training, channels, static_cast<double>(rows), sums, sum_x,
                                 rstd, net.affine.scale, k2, k3);
  for (int64_t c = 0; c < channels; ++c) sum_x[c] *= static_cast<double>(rstd[c]);
  write_channels(sum_x, channels, op.grad_bn_weight);
  write_channels(sums, channels, op.grad_bn_bias);
  grad_below_norm(net, k2, k3, grad);

  for (int l = static_cast<int>(last) - 1; l >= 0; --l) {
    const int64_t width = call.widths[l + 1], below = call.widths[l];
    blocked_pair_grad(rows, below, width, 1, load_row_pairs(grad, width),
                      load_row_pairs(net.input(l), net.input_stride(l)), op.grad_weights[l],
                      op.grad_biases[l]);
    if (l == 0 && op.grad_input == nullptr) return;
    // What the layer below put out, to gate its gradient by; the network's input gates nothing.
    const BFloat16* seen = l > 0 ? net.hidden[l - 1] : nullptr;
    BFloat16* to = l > 0 ? next : static_cast<BFloat16*>(op.grad_input);
    const bool drops = l > 0 && call.dropout[l - 1].active();
    const Vec<float> scale = splat(static_cast<float>(drops ? call.dropout[l - 1].scale() : 1.0));
    blocked_product(rows, net.weight(l, false), nullptr, load_pairs(grad, width),
                    [&](int64_t row, int64_t height, int64_t column, int64_t columns,
                        const float* block, int64_t stride) {
                      const int64_t start = row * below + column;
                      for_block(block, stride, height, columns,
                                [&](Vec<float> g, int64_t r, int64_t c, int lanes) {
                                  const int64_t i = start + r * below + c;
                                  if (seen) {
                                    const Vec<float> y = load_sixteen(seen + i, lanes);
                                    g = select<float>(y <= Vec<float>{}, Vec<float>{}, g * scale);
                                  }
                                  store_sixteen(to + i, g, lanes);
                                });
                    });
    std::swap(grad, next);
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA
