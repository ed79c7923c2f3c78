// Linear, ReLU and dropout: in one walk over the rows where the weight stays in a core's cache, as
// blocked products beyond. Where csrc/cpu/linear_relu.cpp takes torch's matrix product, only the
// passes at the end of this file.

#include "cpu/kernels/blocked_gemm.h"
#include "cpu/kernels/chunks.h"
#include "cpu/kernels/dropout.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/weight_grad.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

template <class S>
void forward(const LinearReLU& op) {
  using T = Compute<S>;
  const int64_t in = op.in_features, out = op.out_features;
  const int64_t room = round_up(out, kPanel<T>);
  Arena shared(Scratch::kCall, Arena::bytes<T>(packed_numel<T>(in, out)) + Arena::bytes<T>(room));
  T* weight = shared.take<T>(packed_numel<T>(in, out));
  T* bias = shared.take<T>(room);
  pack_transposed<T>(static_cast<const S*>(op.weight), op.weight_stride, in, out,
                     static_cast<const T*>(nullptr), weight);
  const DType dtype = op.dtype;
  copy_channels<T>({const_cast<void*>(op.bias), dtype}, out, room, 0, bias);
  const bool direct = std::is_same_v<S, T> && out % kLanes<T> == 0;
  const int64_t in_stride = padded<T>(in), out_stride = direct ? out : padded<T>(out);
  for_row_blocks(op.rows, in * out, [&](int64_t first, int64_t rows) {
    Arena own(Scratch::kTask, Arena::bytes<T>(rows * in_stride) +
                                  Arena::bytes<T>(rows * padded<T>(out)) +
                                  Arena::bytes<uint8_t>(rows * mask_bytes(out) + 64));
    T* block_in = own.take<T>(rows * in_stride);
    T* block_out = own.take<T>(rows * padded<T>(out));
    uint8_t* mask = own.take<uint8_t>(rows * mask_bytes(out) + 64);
    const S* input = static_cast<const S*>(op.input) + first * op.input_stride;
    S* output = static_cast<S*>(op.output) + first * out;
    Left<T> left = {block_in, in_stride, 1};
    if constexpr (std::is_same_v<S, T>) {
      left = {input, op.input_stride, 1};
      if (direct) block_out = output;
    } else {
      copy_in(input, op.input_stride, rows, in, block_in, in_stride);
    }
    multiply<T>(rows, out, in, left, packed(weight, in), block_out, out_stride, Start::kBias, bias,
                true);
    if (op.dropout.active()) {
      draw_mask(op.dropout, first, rows, 0, out, mask);
      apply_mask<T>(mask, static_cast<T>(op.dropout.scale()), rows, out, block_out, out_stride);
    }
    if (!direct) copy_out(block_out, out_stride, rows, out, output, out);
  });
}

// grad_output * scale where the output let it through, into a padded block. Both are
// [rows, columns] with `leading` elements a row.
template <class S>
void gate(const S* grad_output, const S* output, int64_t leading, Compute<S> scale, int64_t rows,
          int64_t columns, Compute<S>* to, int64_t stride) {
  using T = Compute<S>;
  for (int64_t row = 0; row < rows; ++row) {
    for_vectors<T>(columns, [&](int64_t c, int width) {
      const int64_t i = row * leading + c;
      const Vec<T> y = load_up_to(output + i, width);
      const Vec<T> grad = load_up_to(grad_output + i, width) * scale;
      store_raw(to + row * stride + c, select<T>(y <= Vec<T>{}, Vec<T>{}, grad));
    });
  }
}

template <class S>
void backward(const LinearReLUBackward& op) {
  using T = Compute<S>;
  const LinearReLU& net = op.forward;
  const int64_t in = net.in_features, out = net.out_features;
  const T scale = static_cast<T>(net.dropout.scale());
  const int64_t chunks = product_chunk_count(net.rows, in * out);
  const WeightGrad<T> grad(in, out, op.grad_weight != nullptr);
  Arena shared(Scratch::kCall,
               Arena::bytes<T>(packed_numel<T>(out, in)) + Arena::bytes<T>(chunks * grad.numel()));
  T* weight = shared.take<T>(packed_numel<T>(out, in));
  T* partial = shared.take<T>(chunks * grad.numel());
  if (op.grad_input) pack<T>(static_cast<const S*>(net.weight), net.weight_stride, out, in, weight);
  const int64_t grad_stride = padded<T>(out), in_stride = padded<T>(in);
  for_chunks(net.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    const int64_t most = smaller(kBlockRows, end - begin);
    Arena own(Scratch::kTask,
              Arena::bytes<T>(most * grad_stride) + 2 * Arena::bytes<T>(most * in_stride));
    T* block_grad = own.take<T>(most * grad_stride);
    T* block_in = own.take<T>(most * in_stride);
    T* block_grad_in = own.take<T>(most * in_stride);
    T* sums = partial + chunk * grad.numel();
    grad.clear(sums);
    for (int64_t first = begin; first < end; first += kBlockRows) {
      const int64_t rows = smaller(kBlockRows, end - first);
      gate(static_cast<const S*>(op.grad_output) + first * out,
           static_cast<const S*>(net.output) + first * out, out, scale, rows, out, block_grad,
           grad_stride);
      if (op.grad_weight) {
        copy_in(static_cast<const S*>(net.input) + first * net.input_stride, net.input_stride, rows,
                in, block_in, in_stride);
      }
      grad.add_bias(rows, block_grad, grad_stride, sums);
      grad.add_weight(rows, block_grad, grad_stride, block_in, in_stride, sums);
      if (op.grad_input) {
        multiply<T>(rows, in, out, {block_grad, grad_stride, 1}, packed(weight, out), block_grad_in,
                    in_stride, Start::kZero);
        copy_out(block_grad_in, in_stride, rows, in, static_cast<S*>(op.grad_input) + first * in,
                 in);
      }
    }
  });
  grad.template merge<S>(partial, chunks, static_cast<S*>(op.grad_weight),
                         static_cast<S*>(op.grad_bias));
}

// ------------------------------------------------------------------------ beyond the cache

template <class S>
void wide_forward(const LinearReLU& op) {
  using T = Compute<S>;
  const int64_t in = op.in_features, out = op.out_features, room = round_up(out, kPanel<T>);
  Panels<S> weight(static_cast<const S*>(op.weight), op.weight_stride, in, out, true);
  const int64_t packed_size = weight.packed_size(op.rows);
  Arena shared(Scratch::kCall, Arena::bytes<T>(packed_size) + Arena::bytes<T>(room));
  if (packed_size > 0) weight.pack_all(shared.take<T>(packed_size));
  T* bias = shared.take<T>(room);
  copy_channels<T>({const_cast<void*>(op.bias), op.dtype}, out, room, 0, bias);
  blocked_gemm<S>(op.rows, weight, bias,
                  load_rows(static_cast<const S*>(op.input), op.input_stride),
                  [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const T* block,
                      int64_t stride) {
                    finish_relu_dropout<S>(op.dropout, row, rows, column, columns, block, stride,
                                           static_cast<S*>(op.output) + row * out + column, out);
                  });
}

template <class S>
void wide_backward(const LinearReLUBackward& op) {
  using T = Compute<S>;
  const LinearReLU& net = op.forward;
  const int64_t in = net.in_features, out = net.out_features;
  const T scale = static_cast<T>(net.dropout.scale());
  const auto load_grad = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, T* to,
                             int64_t stride) {
    const int64_t start = row * out + column;
    gate(static_cast<const S*>(op.grad_output) + start, static_cast<const S*>(net.output) + start,
         out, scale, rows, columns, to, stride);
  };
  blocked_weight_grad<S>(net.rows, in, out, load_grad,
                         load_rows(static_cast<const S*>(net.input), net.input_stride),
                         static_cast<S*>(op.grad_weight), static_cast<S*>(op.grad_bias));
  if (op.grad_input == nullptr) return;
  Panels<S> weight(static_cast<const S*>(net.weight), net.weight_stride, out, in, false);
  const int64_t packed_size = weight.packed_size(net.rows);
  Arena shared(Scratch::kCall, Arena::bytes<T>(packed_size));
  if (packed_size > 0) weight.pack_all(shared.take<T>(packed_size));
  blocked_gemm<S>(net.rows, weight, nullptr, load_grad,
                  [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const T* block,
                      int64_t stride) {
                    copy_out(block, stride, rows, columns,
                             static_cast<S*>(op.grad_input) + row * in + column, in);
                  });
}

// ------------------------------------------------------------ passes beside a library's product

template <class S>
void relu_dropout(const ReLUDropout& op) {
  using T = Compute<S>;
  const int64_t columns = op.columns;
  const Vec<T> kept = splat(static_cast<T>(op.dropout.scale()));
  for_row_blocks(op.rows, columns * kPassCost, [&](int64_t first, int64_t rows) {
    uint8_t* mask = static_cast<uint8_t*>(
        scratch(Scratch::kTask, static_cast<size_t>(rows * mask_bytes(columns) + 64)));
    const bool drop = op.dropout.active();
    if (drop) draw_mask(op.dropout, first, rows, 0, columns, mask);
    for (int64_t row = 0; row < rows; ++row) {
      S* output = static_cast<S*>(op.output) + (first + row) * columns;
      const uint8_t* bits = mask + row * mask_bytes(columns);
      for_vectors<T>(columns, [&](int64_t c, int width) {
        Vec<T> y = relu<T>(load_up_to(output + c, width));
        if (drop) y *= select<T>(mask_lanes<T>(bits, c), kept, Vec<T>{});
        store_up_to(output + c, y, width);
      });
    }
  });
}

template <class S>
void relu_dropout_backward(const ReLUDropoutBackward& op) {
  using T = Compute<S>;
  const int64_t columns = op.columns, room = padded<T>(columns);
  const int64_t chunks = chunk_count(op.rows, columns * kPassCost, kLeastRows);
  Arena shared(Scratch::kCall, Arena::bytes<T>(chunks * room));
  T* partial = shared.take<T>(chunks * room);
  for_chunks(op.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    T* sums = partial + chunk * room;
    for (int64_t c = 0; c < room; ++c) sums[c] = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t start = row * columns;
      for_vectors<T>(columns, [&](int64_t c, int width) {
        const Vec<T> y = load_up_to(static_cast<const S*>(op.output) + start + c, width);
        Vec<T> grad = load_up_to(static_cast<const S*>(op.grad_output) + start + c, width);
        grad = select<T>(y <= Vec<T>{}, Vec<T>{}, grad * static_cast<T>(op.scale));
        store_up_to(static_cast<S*>(op.grad) + start + c, grad, width);
        store_raw(sums + c, load_raw(sums + c) + grad);
      });
    }
  });
  if (op.grad_bias == nullptr) return;
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < columns; ++c) partial[c] += partial[chunk * room + c];
  }
  copy_out(partial, room, 1, columns, static_cast<S*>(op.grad_bias), columns);
}

}  // namespace

void linear_relu(const LinearReLU& op) {
  if (is_single_or_double(op.dtype) && larger(op.in_features, op.out_features) > kCacheWidth) {
    dispatch_single_or_double(op.dtype, [&](auto e) { wide_forward<decltype(e)>(op); });
  } else {
    dispatch(op.dtype, [&](auto e) { forward<decltype(e)>(op); });
  }
}
void linear_relu_backward(const LinearReLUBackward& op) {
  const LinearReLU& net = op.forward;
  if (is_single_or_double(net.dtype) && larger(net.in_features, net.out_features) > kCacheWidth) {
    dispatch_single_or_double(net.dtype, [&](auto e) { wide_backward<decltype(e)>(op); });
  } else {
    dispatch(net.dtype, [&](auto e) { backward<decltype(e)>(op); });
  }
}
void relu_dropout(const ReLUDropout& op) {
  dispatch(op.dtype, [&](auto element) { relu_dropout<decltype(element)>(op); });
}
void relu_dropout_backward(const ReLUDropoutBackward& op) {
  dispatch(op.dtype, [&](auto element) { relu_dropout_backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
