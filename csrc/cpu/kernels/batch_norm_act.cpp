// BatchNorm1d and ReLU or LeakyReLU, with slope 1 neither, over [N, C] or [N, C, L].

#include "cpu/kernels/batch_norm.h"

#include "cpu/kernels/moments.h"
#include "cpu/kernels/stream.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// The activation: ReLU or LeakyReLU.
template <class T>
struct Gate {
  bool rectify;
  Vec<T> slope, scale;

  explicit Gate(const BatchNormAct& op)
      : rectify(op.rectify),
        slope(splat(static_cast<T>(op.negative_slope))),
        scale(splat(static_cast<T>(op.scale))) {}
  FUSED_MLP_INLINE Vec<T> value(Vec<T> u) const {
    return (rectify ? relu<T>(u) : leaky_relu<T>(u, slope)) * scale;
  }
  // du, the gradient of what it saw; u is computed as forward did, so they agree.
  FUSED_MLP_INLINE Vec<T> gradient(Vec<T> u, Vec<T> grad) const {
    grad *= scale;
    return rectify ? select<T>(u <= Vec<T>{}, Vec<T>{}, grad)
                   : select<T>(u > Vec<T>{}, grad, grad * slope);
  }
};

template <class T>
struct Coefficients {
  Affine<T> affine;
  T *k2, *k3;
};

// Arrays of `room` elements each for everything the passes read per channel.
template <class T>
Coefficients<T> take_coefficients(Arena& arena, int64_t room) {
  const auto take = [&] { return arena.take<T>(room); };
  return {{take(), take(), take()}, take(), take()};
}

template <class T>
size_t coefficient_bytes(int64_t room) {
  return 5 * Arena::bytes<T>(room);
}

// The coefficients repeated over the columns of a folded matrix.
template <class T>
Coefficients<T> repeat_all(const Coefficients<T>& from, const Folded& shape, Arena& arena) {
  if (shape.columns == shape.channels) return from;
  const Coefficients<T> to = take_coefficients<T>(arena, round_up(shape.columns, kLanes<T>));
  repeat(from.affine.mean, shape, to.affine.mean);
  repeat(from.affine.scale, shape, to.affine.scale);
  repeat(from.affine.shift, shape, to.affine.shift);
  repeat(from.k2, shape, to.k2);
  repeat(from.k3, shape, to.k3);
  return to;
}

template <class S>
void channel_moments(const BatchNormAct& op, double* mean, double* m2) {
  const S* x = static_cast<const S*>(op.input);
  if (op.length == 1) return column_moments(x, op.batches, op.channels, mean, m2);
  const int64_t work = larger(1, op.batches * op.length * kPassCost);
  parallel_for(op.channels, larger(1, kThreadWork / work), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments total;
      for (int64_t n = 0; n < op.batches; ++n) {
        add_span(x + (n * op.channels + c) * op.length, op.length, total);
      }
      mean[c] = total.mean;
      m2[c] = total.m2;
    }
  });
}

template <class S>
void forward(const BatchNormAct& op) {
  using T = Compute<S>;
  const int64_t channels = op.channels;
  const Folded shape = Folded::of<T>(op.batches, channels);
  const int64_t room = round_up(larger(channels, shape.columns), kLanes<T>);
  Arena arena(Scratch::kCall, 2 * Arena::bytes<double>(channels) + 2 * coefficient_bytes<T>(room));
  double* sums = arena.take<double>(channels);
  double* m2 = arena.take<double>(channels);
  Coefficients<T> k = take_coefficients<T>(arena, room);
  T* mean = static_cast<T*>(op.mean);
  T* rstd = static_cast<T*>(op.rstd);
  if (op.training) {
    channel_moments<S>(op, sums, m2);
    finish_statistics<T>(op, channels,
                         static_cast<double>(op.batches) * static_cast<double>(op.length), sums, m2,
                         mean, rstd);
  } else {
    running_statistics<T>(op, channels, mean, rstd);
  }
  make_affine<T>(mean, rstd, op.weight, op.bias, channels, room, k.affine);
  const Gate<T> act(op);
  const S* x = static_cast<const S*>(op.input);
  S* y = static_cast<S*>(op.output);
  if (op.length == 1) {
    k = repeat_all(k, shape, arena);
    const bool past = goes_past_cache<S>(y, op.batches, channels);
    for_row_blocks(shape.all_rows(), shape.columns * kPassCost, [&](int64_t first, int64_t rows) {
      const Fence fence = {past};
      for (int64_t row = first; row < first + rows; ++row) {
        for_vectors<T>(shape.width(row), [&](int64_t c, int width) {
          const int64_t i = row * shape.columns + c;
          const Vec<T> u = normalized(load_up_to(x + i, width), k.affine, c);
          store_result(y + i, act.value(u), width, past);
        });
      }
    });
    return;
  }
  for_row_blocks(op.batches * channels, op.length * kPassCost, [&](int64_t first, int64_t rows) {
    for (int64_t row = first; row < first + rows; ++row) {
      const T centre = k.affine.mean[row % channels], scale = k.affine.scale[row % channels];
      const T shift = k.affine.shift[row % channels];
      for_vectors<T>(op.length, [&](int64_t c, int width) {
        const int64_t i = row * op.length + c;
        const Vec<T> u = (load_up_to(x + i, width) - centre) * scale + shift;
        store_up_to(y + i, act.value(u), width);
      });
    }
  });
}

// sum = sum of du, sum_x = sum of du * (x - mean), a channel of [batches, channels, length] a task.
template <class S>
void channel_sums(const BatchNormAct& op, const S* grad, const Affine<Compute<S>>& affine,
                  const Gate<Compute<S>>& act, double* sum, double* sum_x) {
  using T = Compute<S>;
  const S* x = static_cast<const S*>(op.input);
  const int64_t work = larger(1, op.batches * op.length * 2 * kPassCost);
  parallel_for(op.channels, larger(1, kThreadWork / work), [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const T mean = affine.mean[channel], scale = affine.scale[channel];
      const T shift = affine.shift[channel];
      sum[channel] = sum_x[channel] = 0;
      for (int64_t n = 0; n < op.batches; ++n) {
        const int64_t start = (n * op.channels + channel) * op.length;
        for (int64_t first = 0; first < op.length; first += kSpan) {
          Vec<T> block = {}, block_x = {};
          for_vectors<T>(smaller(kSpan, op.length - first), [&](int64_t c, int width) {
            const int64_t i = start + first + c;
            const Vec<T> centred = load_up_to(x + i, width) - mean;
            const Vec<T> du = act.gradient(centred * scale + shift, load_up_to(grad + i, width));
            block += du;
            // Lanes past the end hold du = 0 but centred = -mean: their product is 0 but for an
            // infinite mean, which spoils the channel anyway.
            block_x += du * centred;
          });
          sum[channel] += static_cast<double>(sum_lanes<T>(block));
          sum_x[channel] += static_cast<double>(sum_lanes<T>(block_x));
        }
      }
    }
  });
}

template <class S>
void backward(const BatchNormActBackward& op) {
  using T = Compute<S>;
  const BatchNormAct& norm = op.forward;
  const int64_t channels = norm.channels;
  const Folded shape = Folded::of<T>(norm.batches, channels);
  const int64_t room = round_up(larger(channels, shape.columns), kLanes<T>);
  Arena arena(Scratch::kCall, 2 * Arena::bytes<double>(channels) + 2 * coefficient_bytes<T>(room));
  double* sum = arena.take<double>(channels);
  double* sum_x = arena.take<double>(channels);
  const Coefficients<T> k = take_coefficients<T>(arena, room);
  const T* rstd = static_cast<const T*>(norm.rstd);
  make_affine<T>(static_cast<const T*>(norm.mean), rstd, norm.weight, norm.bias, channels, room,
                 k.affine);
  const Gate<T> act(norm);
  const S* x = static_cast<const S*>(norm.input);
  const S* grad = static_cast<const S*>(op.grad_output);
  const bool flat = norm.length == 1;
  Coefficients<T> wide = flat ? repeat_all(k, shape, arena) : k;
  if (norm.training || op.grad_weight.data || op.grad_bias.data) {
    if (flat) {
      column_sums<T>(
          shape,
          [&](int64_t i, int64_t c, int width) -> Terms<T> {
            const Vec<T> value = load_up_to(x + i, width);
            const Vec<T> u = normalized(value, wide.affine, c);
            const Vec<T> du = act.gradient(u, load_up_to(grad + i, width));
            return {du, du * (value - load_raw(wide.affine.mean + c))};
          },
          sum, sum_x);
    } else {
      channel_sums(norm, grad, k.affine, act, sum, sum_x);
    }
  }
  const double count = static_cast<double>(norm.batches) * static_cast<double>(norm.length);
  input_grad_coefficients<T>(norm.training, channels, count, sum, sum_x, rstd, k.affine.scale, k.k2,
                             k.k3);
  for (int64_t c = 0; c < channels; ++c) sum_x[c] *= static_cast<double>(rstd[c]);
  write_channels(sum_x, channels, op.grad_weight);
  write_channels(sum, channels, op.grad_bias);
  if (op.grad_input == nullptr) return;
  S* dx = static_cast<S*>(op.grad_input);
  if (flat) {
    if (shape.columns != channels) {
      repeat(k.k2, shape, wide.k2);
      repeat(k.k3, shape, wide.k3);
    }
    const bool past = goes_past_cache<S>(dx, norm.batches, channels);
    for_row_blocks(shape.all_rows(), shape.columns * kPassCost, [&](int64_t first, int64_t rows) {
      const Fence fence = {past};
      for (int64_t row = first; row < first + rows; ++row) {
        for_vectors<T>(shape.width(row), [&](int64_t c, int width) {
          const int64_t i = row * shape.columns + c;
          const Vec<T> value = load_up_to(x + i, width);
          const Vec<T> du =
              act.gradient(normalized(value, wide.affine, c), load_up_to(grad + i, width));
          const Vec<T> centred = value - load_raw(wide.affine.mean + c);
          const Vec<T> result = du * load_raw(wide.affine.scale + c) - load_raw(wide.k2 + c) -
                                centred * load_raw(wide.k3 + c);
          store_result(dx + i, result, width, past);
        });
      }
    });
    return;
  }
  for_row_blocks(
      norm.batches * channels, norm.length * kPassCost, [&](int64_t first, int64_t rows) {
        for (int64_t row = first; row < first + rows; ++row) {
          const int64_t channel = row % channels;
          const T scale = k.affine.scale[channel], k2 = k.k2[channel], k3 = k.k3[channel];
          for_vectors<T>(norm.length, [&](int64_t c, int width) {
            const int64_t i = row * norm.length + c;
            const Vec<T> centred = load_up_to(x + i, width) - k.affine.mean[channel];
            const Vec<T> du = act.gradient(centred * scale + k.affine.shift[channel],
                                           load_up_to(grad + i, width));
            store_up_to(dx + i, du * scale - k2 - centred * k3, width);
          });
        }
      });
}

}  // namespace

void batch_norm_act(const BatchNormAct& op) {
  dispatch(op.dtype, [&](auto element) { forward<decltype(element)>(op); });
}
void batch_norm_act_backward(const BatchNormActBackward& op) {
  dispatch(op.forward.dtype, [&](auto element) { backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
