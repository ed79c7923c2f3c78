// The whole network in training, a block of rows at a time: a block walks through all layers while
// it lies in the cache. There are two passes, split where the batch norm needs the statistics of
// all rows; what it saw is kept, everything narrow is computed again.

#include "cpu/kernels/moments.h"
#include "cpu/kernels/network.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Returns what the next layer reads.
template <class S>
Left<Compute<S>> walk_hidden(const Shape<Compute<S>>& shape, const Forward<Compute<S>>& net,
                             Left<Compute<S>> in, int64_t first, int64_t rows, Block<S>& block) {
  using T = Compute<S>;
  const ResearchNet& op = shape.op;
  for (int l = 0; l < shape.hidden; ++l) {
    const int64_t width = op.widths[l + 1];
    // Rows of whole vectors are written straight to where they are kept, and read there.
    const bool kept = op.training && !shape.recomputed(l), direct = kept && width % kLanes<T> == 0;
    T* to = direct ? shape.activation(l, first) : block.hidden[l];
    const int64_t stride = direct ? width : padded<T>(width);
    net.multiply_layer(op, l, rows, in, to, stride, true);
    if (op.dropout[l].active()) {
      draw_mask(op.dropout[l], first, rows, 0, width, block.mask);
      apply_mask<T>(block.mask, static_cast<T>(op.dropout[l].scale()), rows, width, to, stride);
    }
    in = {to, stride, 1};
    if (direct) continue;
    if (kept) {
      copy_out(to, stride, rows, width, shape.activation(l, first), width);
    } else if (op.dropout[l].active()) {
      std::memcpy(shape.mask(l, first), block.mask, static_cast<size_t>(rows * mask_bytes(width)));
    }
  }
  return in;
}

// LeakyReLU of the normalized z into a block. The next block is asked for meanwhile.
template <class T>
void activate(const Shape<T>& shape, const Affine<T>& affine, int64_t first, int64_t rows,
              T* block) {
  const int64_t stride = padded<T>(shape.channels);
  for_groups<T>(shape.channels, [&](auto group, int64_t c, int width) {
    using Vectors = decltype(group);
    const auto mean = Vectors::load(affine.mean + c), scale = Vectors::load(affine.scale + c);
    const auto shift = Vectors::load(affine.shift + c);
    const Vec<T> slope = splat(static_cast<T>(shape.op.negative_slope));
    for (int64_t row = 0; row < rows; ++row) {
      for_each_vector(group, [&](int j, int64_t of) {
        const T* z = shape.z(first + row) + c + of;
        __builtin_prefetch(z + rows * shape.channels, 0, 2);
        const Vec<T> u = (load_up_to(z, width) - mean[j]) * scale[j] + shift[j];
        store_raw(block + row * stride + c + of, leaky_relu<T>(u, slope));
      });
    }
  });
}

// The last layer, from a block of activations to the rows of the result.
template <class S>
void write_output(const Shape<Compute<S>>& shape, const Forward<Compute<S>>& net, int64_t first,
                  int64_t rows, const Compute<S>* hidden, Compute<S>* block) {
  using T = Compute<S>;
  const int64_t stride = padded<T>(shape.out);
  net.multiply_layer(shape.op, shape.op.layers - 1, rows, {hidden, padded<T>(shape.channels), 1},
                     block, stride, false);
  copy_out(block, stride, rows, shape.out, static_cast<S*>(shape.op.output) + first * shape.out,
           shape.out);
}

template <class T>
Affine<T> take_affine(Arena& arena, int64_t room) {
  const auto take = [&] { return arena.take<T>(room); };
  return {take(), take(), take()};
}

template <class S>
void train(const ResearchNet& op) {
  using T = Compute<S>;
  const Shape<T> shape(op);
  shape.end_mask();
  const int64_t channels = shape.channels, room = round_up(channels, kPanel<T>);
  const int64_t chunks = product_chunk_count(op.rows, shape.work);
  Arena arena(Scratch::kCall, Forward<T>::bytes(op) + 3 * Arena::bytes<T>(room) +
                                  Arena::bytes<double>(chunks * 2 * channels));
  const Affine<T> affine = take_affine<T>(arena, room);
  double* moments = arena.take<double>(chunks * 2 * channels);
  Forward<T> net;
  net.template pack<S>(op, 0, op.layers, nullptr, arena);

  for_chunks(op.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    double* mean = moments + chunk * 2 * channels;
    for (int64_t c = 0; c < 2 * channels; ++c) mean[c] = 0;
    const int64_t most = smaller(kBlockRows, end - begin);
    Arena own(Scratch::kTask, Block<S>::bytes(op, most) + Arena::bytes<T>(most * shape.widest));
    Block<S> block(op, most, own);
    T* block_z = own.take<T>(most * shape.widest);
    const bool direct = channels % kLanes<T> == 0;
    const int64_t stride = direct ? channels : padded<T>(channels);
    for_blocks(begin, end, [&](const RowBlock& at) {
      const int64_t first = at.first, rows = at.rows;
      const Left<T> in =
          walk_hidden<S>(shape, net, block.input_rows(op, first, rows), first, rows, block);
      T* z = direct ? shape.z(first) : block_z;
      net.multiply_layer(op, op.layers - 2, rows, in, z, stride, false,
                         rows_ahead<S>(op.input, op.input_stride, at));
      add_block(z, stride, rows, channels, static_cast<double>(first - begin), mean,
                mean + channels);
      if (!direct) copy_out(z, stride, rows, channels, shape.z(first), channels);
    });
  });

  // Chunks in order into the first one.
  for (int64_t c = 0; c < channels; ++c) {
    Moments total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* mean = moments + chunk * 2 * channels;
      const int64_t count =
          chunk_begin(op.rows, chunks, chunk + 1) - chunk_begin(op.rows, chunks, chunk);
      total.merge(static_cast<double>(count), mean[c], mean[channels + c]);
    }
    moments[c] = total.mean;
    moments[channels + c] = total.m2;
  }
  finish_statistics<T>(op, channels, static_cast<double>(op.rows), moments, moments + channels,
                       shape.mean(), shape.rstd());
  make_affine<T>(shape.mean(), shape.rstd(), op.bn_weight, op.bn_bias, channels, room, affine);

  for_row_blocks(op.rows, channels * shape.out, [&](int64_t first, int64_t rows) {
    Arena own(Scratch::kTask, 2 * Arena::bytes<T>(rows * shape.widest));
    T* hidden = own.take<T>(rows * shape.widest);
    T* result = own.take<T>(rows * shape.widest);
    activate(shape, affine, first, rows, hidden);
    write_output<S>(shape, net, first, rows, hidden, result);
  });
}

template <class S>
void forward(const ResearchNet& op) {
  if (op.training) {
    train<S>(op);
  } else {
    evaluate<S>(op);
  }
}

}  // namespace

int64_t research_net_saved_numel(const ResearchNet& op) {
  int64_t numel = 0;
  dispatch(op.dtype,
           [&](auto element) { numel = Shape<Compute<decltype(element)>>(op).saved_numel; });
  return numel;
}
void research_net(const ResearchNet& op) {
  if (op.training && Shape<float>(op).wide) return research_net_wide_train(op);
  dispatch(op.dtype, [&](auto element) { forward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
