// Backward of the whole network: a pass for the sums the batch norm needs of all rows, a pass for
// everything below it. Evaluation's statistics are constants, so there both are one pass.

#include "cpu/kernels/moments.h"
#include "cpu/kernels/network.h"
#include "cpu/kernels/weight_grad.h"

#include <new>

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// One call: what all tasks share.
template <class S>
struct Backward {
  using T = Compute<S>;
  const ResearchNetBackward& op;
  const ResearchNet& net;
  Shape<T> shape;
  Forward<T> forward;               // the layers that are computed again
  const T* transposed[kMaxLayers];  // packed weights of grad @ weight
  Affine<T> affine;
  T *k2, *k3;
  Vec<T> slope;

  explicit Backward(const ResearchNetBackward& call)
      : op(call),
        net(call.forward),
        shape(call.forward),
        slope(splat(static_cast<T>(call.forward.negative_slope))) {}

  // The layers computed again: in training none or the first, in evaluation all up to the norm.
  int recomputed_layers() const {
    if (!net.training) return net.layers - 1;
    return shape.hidden > 0 && shape.recomputed(0) ? 1 : 0;
  }
};

template <class S>
struct Task {
  using T = Compute<S>;
  Block<S> block;
  T *z, *hidden, *grad_out, *grad, *grad_next;

  static size_t bytes(const Backward<S>& call, int64_t rows) {
    return Block<S>::bytes(call.net, rows) + 5 * Arena::bytes<T>(rows * call.shape.widest);
  }
  Task(const Backward<S>& call, int64_t rows, Arena& arena) : block(call.net, rows, arena) {
    const auto take = [&] { return arena.take<T>(rows * call.shape.widest); };
    z = take();
    hidden = take();
    grad_out = take();
    grad = take();
    grad_next = take();
  }
};

// The block's inputs of every layer up to the batch norm, read back or computed again.
template <class S>
void restore_hidden(const Backward<S>& call, int64_t first, int64_t rows, Task<S>& task) {
  using T = Compute<S>;
  const ResearchNet& net = call.net;
  Left<T> in = task.block.copied_input(net, first, rows);
  for (int l = 0; l < call.shape.hidden; ++l) {
    const int64_t width = net.widths[l + 1], stride = padded<T>(width);
    T* hidden = task.block.hidden[l];
    if (!call.shape.recomputed(l)) {
      copy_in(call.shape.activation(l, first), width, rows, width, hidden, stride);
      continue;
    }
    call.forward.multiply_layer(net, l, rows, task.block.before(net, l, in), hidden, stride, true);
    if (!net.dropout[l].active()) continue;
    if (net.training) {
      std::memcpy(task.block.mask, call.shape.mask(l, first),
                  static_cast<size_t>(rows * mask_bytes(width)));
    } else {
      draw_mask(net.dropout[l], first, rows, 0, width, task.block.mask);
    }
    apply_mask<T>(task.block.mask, static_cast<T>(net.dropout[l].scale()), rows, width, hidden,
                  stride);
  }
}

// What the batch norm saw of a block: read where it was kept, or computed again.
template <class T>
struct Seen {
  const T* z;
  int64_t stride;
};

template <class S>
Seen<Compute<S>> restore_z(const Backward<S>& call, int64_t first, int64_t rows, Task<S>& task) {
  using T = Compute<S>;
  if (call.net.training) return {call.shape.z(first), call.shape.channels};
  const int l = call.net.layers - 2;
  const int64_t stride = padded<T>(call.shape.channels);
  const Left<T> in = {task.block.input, padded<T>(call.net.widths[0]), 1};
  call.forward.multiply_layer(call.net, l, rows, task.block.before(call.net, l, in), task.z, stride,
                              false);
  return {task.z, stride};
}

// The gradient of LeakyReLU's output, in task.grad.
template <class S>
void grad_of_hidden(const Backward<S>& call, int64_t first, int64_t rows, Task<S>& task) {
  using T = Compute<S>;
  const int64_t out = call.shape.out, stride = padded<T>(out);
  copy_in(static_cast<const S*>(call.op.grad_output) + first * out, out, rows, out, task.grad_out,
          stride);
  multiply<T>(rows, call.shape.channels, out, {task.grad_out, stride, 1},
              packed(call.transposed[call.net.layers - 1], out), task.grad,
              padded<T>(call.shape.channels), Start::kZero);
}

// LeakyReLU's output into task.hidden; of du, the gradient of what it saw, sum += du and
// sum_x += du * (z - mean). The next block is asked for meanwhile.
template <class S>
void add_norm_sums(const Backward<S>& call, Seen<Compute<S>> seen, int64_t rows, Task<S>& task,
                   double* sum, double* sum_x) {
  using T = Compute<S>;
  const int64_t stride = padded<T>(call.shape.channels);
  for_groups<T>(call.shape.channels, [&](auto group, int64_t c, int width) {
    using Vectors = decltype(group);
    const auto mean = Vectors::load(call.affine.mean + c);
    const auto scale = Vectors::load(call.affine.scale + c);
    const auto shift = Vectors::load(call.affine.shift + c);
    const Vec<T> slope = call.slope;
    Vectors sums = {}, sums_x = {};
    for (int64_t row = 0; row < rows; ++row) {
      for_each_vector(group, [&](int j, int64_t of) {
        const T* z = seen.z + row * seen.stride + c + of;
        __builtin_prefetch(z + rows * seen.stride, 0, 2);
        const Vec<T> centred = load_up_to(z, width) - mean[j];
        const Vec<T> u = centred * scale[j] + shift[j];
        const Vec<T> g = load_raw(task.grad + row * stride + c + of);
        const Vec<T> du = select<T>(u > Vec<T>{}, g, g * slope);
        store_raw(task.hidden + row * stride + c + of, leaky_relu<T>(u, slope));
        sums[j] += du;
        sums_x[j] += du * centred;
      });
    }
    for_each_vector(group, [&](int j, int64_t of) {
      for (int lane = 0; lane < width; ++lane) {
        sum[c + of + lane] += static_cast<double>(sums[j][lane]);
        sum_x[c + of + lane] += static_cast<double>(sums_x[j][lane]);
      }
    });
  });
}

// task.grad: from the gradient of LeakyReLU's output to that of what the batch norm saw; bias +=
// its column sums.
template <class S>
void grad_through_norm(const Backward<S>& call, Seen<Compute<S>> seen, int64_t rows, Task<S>& task,
                       Compute<S>* bias) {
  using T = Compute<S>;
  const int64_t stride = padded<T>(call.shape.channels);
  for_groups<T>(call.shape.channels, [&](auto group, int64_t c, int width) {
    using Vectors = decltype(group);
    const auto mean = Vectors::load(call.affine.mean + c);
    const auto scale = Vectors::load(call.affine.scale + c);
    const auto shift = Vectors::load(call.affine.shift + c);
    const auto k2 = Vectors::load(call.k2 + c), k3 = Vectors::load(call.k3 + c);
    const Vec<T> slope = call.slope;
    auto sums = Vectors::load(bias + c);
    for (int64_t row = 0; row < rows; ++row) {
      for_each_vector(group, [&](int j, int64_t of) {
        T* grad = task.grad + row * stride + c + of;
        const Vec<T> centred = load_up_to(seen.z + row * seen.stride + c + of, width) - mean[j];
        const Vec<T> u = centred * scale[j] + shift[j], g = load_raw(grad);
        const Vec<T> du = select<T>(u > Vec<T>{}, g, g * slope);
        const Vec<T> dz = du * scale[j] - k2[j] - centred * k3[j];
        store_raw(grad, dz);
        sums[j] += dz;
      });
    }
    sums.store(bias + c);
  });
}

// task.grad, the gradient of a hidden layer's output, becomes that of its product: `scale` times
// itself where the output let it through; bias += its column sums.
template <class S>
void grad_through_gate(const Compute<S>* hidden, int64_t rows, int64_t width, Compute<S> factor,
                       Compute<S>* grad, Compute<S>* bias) {
  using T = Compute<S>;
  const int64_t stride = padded<T>(width);
  const Vec<T> scale = splat(factor);
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    Vec<T> sums[2] = {load_raw(bias + c)};
    const auto change = [&](int64_t i, int which) {
      const Vec<T> g =
          select<T>(load_raw(hidden + i) <= Vec<T>{}, Vec<T>{}, load_raw(grad + i) * scale);
      store_raw(grad + i, g);
      sums[which] += g;
    };
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) {
      change(row * stride + c, 0);
      change((row + 1) * stride + c, 1);
    }
    if (row < rows) change(row * stride + c, 0);
    store_raw(bias + c, sums[0] + sums[1]);
  }
}

// What layer l read of the block of rows behind `at`.
template <class S>
Ahead before_ahead(const Backward<S>& call, int l, const RowBlock& at) {
  const ResearchNet& net = call.net;
  if (l == 0) return rows_ahead<S>(net.input, net.input_stride, at);
  if (call.shape.recomputed(l - 1)) return {};
  return rows_ahead<Compute<S>>(call.shape.activation(l - 1, 0), net.widths[l], at);
}

// The rest of a block: through the batch norm and down all layers before it.
template <class S>
void grad_below(const Backward<S>& call, const WeightGrad<Compute<S>>* weight_grads,
                Compute<S>* const* sums, Seen<Compute<S>> seen, const RowBlock& at, Task<S>& task) {
  using T = Compute<S>;
  const int64_t rows = at.rows;
  const ResearchNet& net = call.net;
  int l = net.layers - 2;
  grad_through_norm<S>(call, seen, rows, task, weight_grads[l].bias_of(sums[l]));
  const Left<T> in = {task.block.input, padded<T>(net.widths[0]), 1};
  for (; l >= 0; --l) {
    const int64_t width = net.widths[l + 1], below = net.widths[l];
    const Left<T> before = task.block.before(net, l, in);
    weight_grads[l].add_weight(at.begins, rows, task.grad, padded<T>(width), before.data,
                               before.row, sums[l], before_ahead(call, l, at));
    if (l == 0 && call.op.grad_input == nullptr) return;
    const bool reads_z = net.training && l == net.layers - 2;
    multiply<T>(rows, below, width, {task.grad, padded<T>(width), 1},
                packed(call.transposed[l], width), task.grad_next, padded<T>(below), Start::kZero,
                nullptr, false, Operands::kNear,
                reads_z ? rows_ahead<T>(call.shape.z(0), width, at) : Ahead{});
    T* swapped = task.grad;
    task.grad = task.grad_next;
    task.grad_next = swapped;
    if (l == 0) break;
    const Dropout& dropout = net.dropout[l - 1];
    grad_through_gate<S>(before.data, rows, below,
                         static_cast<T>(dropout.active() ? dropout.scale() : 1.0), task.grad,
                         weight_grads[l - 1].bias_of(sums[l - 1]));
  }
  copy_out(task.grad, padded<T>(net.widths[0]), rows, net.widths[0],
           static_cast<S*>(call.op.grad_input) + at.first * net.widths[0], net.widths[0]);
}

template <class S>
void backward(const ResearchNetBackward& op) {
  using T = Compute<S>;
  Backward<S> call(op);
  const ResearchNet& net = op.forward;
  const int64_t channels = call.shape.channels, room = round_up(channels, kPanel<T>);
  const int64_t chunks = product_chunk_count(net.rows, 2 * call.shape.work);
  const int last = net.layers - 1;

  alignas(WeightGrad<T>) char storage[kMaxLayers * sizeof(WeightGrad<T>)];
  WeightGrad<T>* weight_grads = reinterpret_cast<WeightGrad<T>*>(storage);
  int64_t offsets[kMaxLayers + 1] = {0};
  size_t bytes = Forward<T>::bytes(net);
  for (int l = 0; l <= last; ++l) {
    new (weight_grads + l) WeightGrad<T>(net.widths[l], net.widths[l + 1], op.grad_weights[l]);
    offsets[l + 1] = offsets[l] + weight_grads[l].numel();
    bytes += Arena::bytes<T>(packed_numel<T>(net.widths[l + 1], net.widths[l]));
  }
  bytes += 5 * Arena::bytes<T>(room) + Arena::bytes<double>(chunks * 2 * channels) +
           Arena::bytes<T>(chunks * offsets[last + 1] + kPanel<T>);
  Arena arena(Scratch::kCall, bytes);
  const auto take = [&] { return arena.take<T>(room); };
  call.affine = {take(), take(), take()};
  call.k2 = take();
  call.k3 = take();
  double* norm_sums = arena.take<double>(chunks * 2 * channels);
  T* partial = arena.take<T>(chunks * offsets[last + 1] + kPanel<T>);
  const T* rstd = call.shape.rstd();
  make_affine<T>(call.shape.mean(), rstd, net.bn_weight, net.bn_bias, channels, room, call.affine);
  call.forward.template pack<S>(net, 0, call.recomputed_layers(), nullptr, arena);
  for (int l = op.grad_input ? 0 : 1; l <= last; ++l) {
    T* packed_weight = arena.take<T>(packed_numel<T>(net.widths[l + 1], net.widths[l]));
    pack<T>(static_cast<const S*>(net.weights[l]), net.widths[l], net.widths[l + 1], net.widths[l],
            packed_weight);
    call.transposed[l] = packed_weight;
  }
  for (int64_t c = 0; c < room; ++c) call.k2[c] = call.k3[c] = 0;
  // Partial sums of layer l: chunks of weight_grads[l].numel() elements, one behind the other.
  const auto partial_of = [&](int l, int64_t chunk) {
    return partial + chunks * offsets[l] + chunk * weight_grads[l].numel();
  };

  const auto pass = [&](bool above, bool below) {
    for_chunks(net.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      const int64_t most = smaller(kBlockRows, end - begin);
      Arena own(Scratch::kTask, Task<S>::bytes(call, most));
      Task<S> task(call, most, own);
      double* sums = norm_sums + chunk * 2 * channels;
      T* layer_sums[kMaxLayers];
      for (int l = 0; l <= last; ++l) layer_sums[l] = partial_of(l, chunk);
      for (int64_t c = 0; above && c < 2 * channels; ++c) sums[c] = 0;
      if (above) weight_grads[last].clear(layer_sums[last], begin < end);
      for (int l = 0; below && l < last; ++l) {
        weight_grads[l].clear(layer_sums[l], begin < end);
      }
      for_blocks(begin, end, [&](const RowBlock& at) {
        const int64_t first = at.first, rows = at.rows;
        if (below) restore_hidden<S>(call, first, rows, task);
        const Seen<T> seen = restore_z<S>(call, first, rows, task);
        grad_of_hidden<S>(call, first, rows, task);
        if (above) {
          add_norm_sums<S>(call, seen, rows, task, sums, sums + channels);
          const int64_t stride = padded<T>(call.shape.out);
          weight_grads[last].add_bias(rows, task.grad_out, stride, layer_sums[last]);
          weight_grads[last].add_weight(at.begins, rows, task.grad_out, stride, task.hidden,
                                        padded<T>(channels), layer_sums[last]);
        }
        if (below) grad_below<S>(call, weight_grads, layer_sums, seen, at, task);
      });
    });
  };

  if (net.training) {
    pass(true, false);
  } else {
    pass(true, true);
  }
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < 2 * channels; ++c) norm_sums[c] += norm_sums[chunk * 2 * channels + c];
  }
  double* sum_x = norm_sums + channels;
  input_grad_coefficients<T>(net.training, channels, static_cast<double>(net.rows), norm_sums,
                             sum_x, rstd, call.affine.scale, call.k2, call.k3);
  for (int64_t c = 0; c < channels; ++c) sum_x[c] *= static_cast<double>(rstd[c]);
  write_channels(sum_x, channels, op.grad_bn_weight);
  write_channels(norm_sums, channels, op.grad_bn_bias);
  if (net.training) pass(false, true);
  for (int l = 0; l <= last; ++l) {
    weight_grads[l].template merge<S>(partial_of(l, 0), chunks, static_cast<S*>(op.grad_weights[l]),
                                      static_cast<S*>(op.grad_biases[l]));
  }
}

}  // namespace

void research_net_backward(const ResearchNetBackward& op) {
  if (Shape<float>(op.forward).wide) return research_net_wide_backward(op);
  dispatch(op.forward.dtype, [&](auto element) { backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
