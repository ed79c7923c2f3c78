// Linear, an activation and dropout in one walk over the rows, where the weight stays in a core's
// cache. Beyond see linear_act_wide.cpp; where csrc/cpu/linear_act.cpp takes torch's matrix
// product, only the passes at the end of this file.

#include "cpu/kernels/linear_act.h"

#include <algorithm>

#include "cpu/kernels/activation.h"
#include "cpu/kernels/chunks.h"
#include "cpu/kernels/few_rows.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/weight_grad.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

template <class S>
void forward(const LinearAct& op) {
  using T = Compute<S>;
  const int64_t in = op.in_features, out = op.out_features;
  const int64_t room = round_up(out, kPanel<T>);
  Arena shared(Scratch::kCall, Arena::bytes<T>(packed_numel<T>(in, out)) + Arena::bytes<T>(room) +
                                   Arena::bytes<T>(norm_room<T>(op.norm, out)));
  T* weight = shared.take<T>(packed_numel<T>(in, out));
  T* bias = shared.take<T>(room);
  pack_transposed<T>(static_cast<const S*>(op.weight), op.weight_stride, in, out,
                     static_cast<const T*>(nullptr), weight);
  const DType dtype = op.dtype;
  copy_channels<T>({const_cast<void*>(op.bias), dtype}, out, room, 0, bias);
  const Norm<T> norm(op.norm, out, shared.take<T>(norm_room<T>(op.norm, out)), bias);
  const bool direct = std::is_same_v<S, T> && out % kLanes<T> == 0;
  const bool bare = !op.norm.active();  // the activation stands right behind the product
  const bool rectify = bare && op.act.activation == Activation::kReLU;
  const bool finished = direct && bare && !op.act.dropout.active() &&
                        (rectify || op.act.activation == Activation::kNone);
  const int64_t in_stride = padded<T>(in), out_stride = direct ? out : padded<T>(out);
  for_row_blocks(op.rows, in * out, [&](int64_t first, int64_t rows) {
    Arena own(Scratch::kTask, Arena::bytes<T>(rows * in_stride) +
                                  Arena::bytes<T>(rows * padded<T>(out)) +
                                  Arena::bytes<uint8_t>(mask_room(rows, out)));
    T* block_in = own.take<T>(rows * in_stride);
    T* block_out = own.take<T>(rows * padded<T>(out));
    uint8_t* mask = own.take<uint8_t>(mask_room(rows, out));
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
                rectify);
    if (op.seen) {
      copy_out(block_out, out_stride, rows, out, static_cast<S*>(op.seen) + first * out, out);
    }
    if (finished) return;
    finish_act<S>(norm.get(), op.act, first, rows, 0, out, block_out, out_stride, output, out,
                  mask);
  });
}

template <class S>
void backward(const LinearActBackward& op) {
  using T = Compute<S>;
  const LinearAct& net = op.forward;
  const int64_t in = net.in_features, out = net.out_features;
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
    Arena own(Scratch::kTask, Arena::bytes<T>(most * grad_stride) +
                                  2 * Arena::bytes<T>(most * in_stride) +
                                  Arena::bytes<uint8_t>(mask_room(most, out)));
    T* block_grad = own.take<T>(most * grad_stride);
    T* block_in = own.take<T>(most * in_stride);
    T* block_grad_in = own.take<T>(most * in_stride);
    uint8_t* mask = own.take<uint8_t>(mask_room(most, out));
    T* sums = partial + chunk * grad.numel();
    grad.clear(sums, begin < end);
    for_blocks(begin, end, [&](const RowBlock& block) {
      const int64_t first = block.first, rows = block.rows;
      gate<S>(net.act, first, rows, out, rows_from<S>(op.grad_output, first, out), out,
              rows_from<S>(op.kept, first, out), block_grad, grad_stride, mask);
      if (op.grad_weight) {
        copy_in(static_cast<const S*>(net.input) + first * net.input_stride, net.input_stride, rows,
                in, block_in, in_stride);
      }
      grad.add_bias(rows, block_grad, grad_stride, sums);
      grad.add_weight(block.begins, rows, block_grad, grad_stride, block_in, in_stride, sums);
      if (op.grad_input) {
        multiply<T>(rows, in, out, {block_grad, grad_stride, 1}, packed(weight, out), block_grad_in,
                    in_stride, Start::kZero);
        copy_out(block_grad_in, in_stride, rows, in, static_cast<S*>(op.grad_input) + first * in,
                 in);
      }
    });
  });
  grad.template merge<S>(partial, chunks, static_cast<S*>(op.grad_weight),
                         static_cast<S*>(op.grad_bias));
}

// ------------------------------------------------------------ passes beside a library's product

// Calls body(first, rows) for blocks of rows that fill about 64 kB.
template <class Body>
void for_some_rows(int64_t begin, int64_t end, int64_t columns, const Body& body) {
  const int64_t most = larger(1, smaller(kBlockRows, (int64_t{1} << 14) / larger(1, columns)));
  for (int64_t first = begin; first < end; first += most) {
    body(first, smaller(most, end - first));
  }
}

template <class S>
void act_dropout(const ActDropoutPass& op) {
  using T = Compute<S>;
  const int64_t columns = op.columns, stride = padded<T>(columns);
  Arena shared(Scratch::kCall, Arena::bytes<T>(norm_room<T>(op.norm, columns)));
  const Norm<T> norm(op.norm, columns, shared.take<T>(norm_room<T>(op.norm, columns)), nullptr);
  for_row_blocks(op.rows, columns * kPassCost, [&](int64_t begin, int64_t count) {
    for_some_rows(begin, begin + count, columns, [&](int64_t first, int64_t rows) {
      Arena own(Scratch::kTask,
                Arena::bytes<T>(rows * stride) + Arena::bytes<uint8_t>(mask_room(rows, columns)));
      uint8_t* mask = own.take<uint8_t>(mask_room(rows, columns));
      S* to = static_cast<S*>(op.output) + first * columns;
      const S* from = rows_from<S>(op.input, first, columns);
      if constexpr (std::is_same_v<S, T>) {
        finish_act<S>(norm.get(), op.act, first, rows, 0, columns, from, columns, to, columns,
                      mask);
      } else {
        T* block = own.take<T>(rows * stride);
        copy_in(from, columns, rows, columns, block, stride);
        finish_act<S>(norm.get(), op.act, first, rows, 0, columns, block, stride, to, columns,
                      mask);
      }
    });
  });
}

template <class S>
void act_dropout_backward(const ActDropoutPassBackward& op) {
  using T = Compute<S>;
  const int64_t columns = op.columns, room = padded<T>(columns);
  const int64_t chunks = chunk_count(op.rows, columns * kPassCost, kLeastRows);
  Arena shared(Scratch::kCall, Arena::bytes<T>(chunks * room));
  T* partial = shared.take<T>(chunks * room);
  for_chunks(op.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    T* sums = partial + chunk * room;
    for (int64_t c = 0; c < room; ++c) sums[c] = 0;
    for_some_rows(begin, end, columns, [&](int64_t first, int64_t rows) {
      Arena own(Scratch::kTask,
                Arena::bytes<T>(rows * room) + Arena::bytes<uint8_t>(mask_room(rows, columns)));
      T* block = own.take<T>(rows * room);
      gate<S>(op.act, first, rows, columns, rows_from<S>(op.grad_output, first, columns), columns,
              rows_from<S>(op.kept, first, columns), block, room,
              own.take<uint8_t>(mask_room(rows, columns)));
      add_column_sums(block, room, rows, columns, sums);
      copy_out(block, room, rows, columns, static_cast<S*>(op.grad) + first * columns, columns);
    });
  });
  if (op.grad_bias == nullptr) return;
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < columns; ++c) partial[c] += partial[chunk * room + c];
  }
  copy_out(partial, room, 1, columns, static_cast<S*>(op.grad_bias), columns);
}

// ----------------------------------------------------------------------- a handful of rows

bool reads_weight_once(const LinearAct& op) {
  return is_single_or_double(op.dtype) && op.rows > 0 && op.rows <= kFewRows &&
         op.weight_stride == op.in_features;
}

// Packing a weight for a few rows takes longer than they do: 1 x 512 x 512 took twice eager's time.
// Sums run as in products of more rows, so a row gets the same bits.
template <class T, int kRows>
void few_rows_forward(const LinearAct& op) {
  const int64_t in = op.in_features, out = op.out_features;
  const int64_t stride = padded<T>(out), room = round_up(out, kPanel<T>);
  Arena shared(Scratch::kCall, Arena::bytes<T>(op.rows * stride) + Arena::bytes<T>(room) +
                                   Arena::bytes<T>(norm_room<T>(op.norm, out)) +
                                   Arena::bytes<uint8_t>(mask_room(op.rows, out)));
  T* block = shared.take<T>(op.rows * stride);
  T* bias = shared.take<T>(room);
  copy_channels<T>({const_cast<void*>(op.bias), op.dtype}, out, room, 0, bias);
  const Norm<T> norm(op.norm, out, shared.take<T>(norm_room<T>(op.norm, out)), bias);
  // Reading a weight takes as long as the multiply-adds of four rows.
  const int64_t unit = 4 * kLanes<T>, work = larger(1, (op.rows + 4) * in * unit);
  parallel_for(ceil_div(out, unit), ceil_div(kThreadWork, work), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * unit;
    few_rows_layer<T, kRows>(static_cast<const T*>(op.weight) + first * in, bias + first, in,
                             smaller(out, end * unit) - first, op.rows,
                             static_cast<const T*>(op.input), op.input_stride,
                             [&](int64_t row, int64_t feature, int width, Vec<T> z) {
                               store_up_to(block + row * stride + first + feature, z, width);
                             });
  });
  if (op.seen) copy_out(block, stride, op.rows, out, static_cast<T*>(op.seen), out);
  finish_act<T>(norm.get(), op.act, 0, op.rows, 0, out, block, stride, static_cast<T*>(op.output),
                out, shared.take<uint8_t>(mask_room(op.rows, out)));
}

// As in forward: packing took longer than the sums, and partial sums of one chunk were copied. One
// row of 256 x 256 took 18 us and takes 8, four take 9 in place of 20.
template <class T, int kRows>
void few_rows_backward(const LinearActBackward& op) {
  const LinearAct& net = op.forward;
  const int64_t in = net.in_features, out = net.out_features;
  const int64_t grad_stride = padded<T>(out), in_stride = padded<T>(in);
  Arena shared(Scratch::kCall, Arena::bytes<T>(kRows * grad_stride) +
                                   2 * Arena::bytes<T>(kRows * in_stride) +
                                   Arena::bytes<uint8_t>(mask_room(net.rows, out)));
  T* grad = shared.take<T>(kRows * grad_stride);
  T* input = shared.take<T>(kRows * in_stride);
  T* sums = shared.take<T>(kRows * in_stride);
  gate<T>(net.act, 0, net.rows, out, static_cast<const T*>(op.grad_output), out,
          static_cast<const T*>(op.kept), grad, grad_stride,
          shared.take<uint8_t>(mask_room(net.rows, out)));
  copy_in(static_cast<const T*>(net.input), net.input_stride, net.rows, in, input, in_stride);
  for (int64_t row = net.rows; row < kRows; ++row) {
    std::fill_n(grad + row * grad_stride, grad_stride, T{0});
    std::fill_n(input + row * in_stride, in_stride, T{0});
  }
  constexpr int64_t kUnit = 4 * kLanes<T>;
  const int64_t work = larger(1, (kRows + 4) * out * kUnit);
  parallel_for(ceil_div(in, kUnit), ceil_div(kThreadWork, work), [&](int64_t begin, int64_t end) {
    few_rows_gradients<T, kRows>(static_cast<const T*>(net.weight), static_cast<T*>(op.grad_weight),
                                 in, out, begin * kUnit, smaller(in, end * kUnit), grad,
                                 grad_stride, input, op.grad_input ? sums : nullptr, in_stride);
  });
  if (op.grad_input) {
    copy_out(sums, in_stride, net.rows, in, static_cast<T*>(op.grad_input), in);
  }
  if (op.grad_bias) {
    for (int64_t row = 1; row < net.rows; ++row) {
      for (int64_t c = 0; c < out; ++c) grad[c] += grad[row * grad_stride + c];
    }
    copy_out(grad, grad_stride, 1, out, static_cast<T*>(op.grad_bias), out);
  }
}

// Calls body(T{}, integral_constant of 1, 2 or 4 rows).
template <class Body>
void dispatch_few_rows(const LinearAct& op, const Body& body) {
  dispatch_single_or_double(op.dtype, [&](auto element) {
    if (op.rows <= 1) return body(element, std::integral_constant<int, 1>{});
    if (op.rows <= 2) return body(element, std::integral_constant<int, 2>{});
    body(element, std::integral_constant<int, 4>{});
  });
}

}  // namespace

void linear_act(const LinearAct& op) {
  if (reads_weight_once(op)) {
    return dispatch_few_rows(op, [&](auto element, auto rows) {
      few_rows_forward<decltype(element), decltype(rows)::value>(op);
    });
  }
  if (is_single_or_double(op.dtype) && larger(op.in_features, op.out_features) > kCacheWidth) {
    linear_act_wide(op);
  } else {
    dispatch(op.dtype, [&](auto e) { forward<decltype(e)>(op); });
  }
}
void linear_act_backward(const LinearActBackward& op) {
  const LinearAct& net = op.forward;
  if (reads_weight_once(net)) {
    return dispatch_few_rows(net, [&](auto element, auto rows) {
      few_rows_backward<decltype(element), decltype(rows)::value>(op);
    });
  }
  if (is_single_or_double(net.dtype) && larger(net.in_features, net.out_features) > kCacheWidth) {
    linear_act_wide_backward(op);
  } else {
    dispatch(net.dtype, [&](auto e) { backward<decltype(e)>(op); });
  }
}
void act_dropout(const ActDropoutPass& op) {
  dispatch(op.dtype, [&](auto element) { act_dropout<decltype(element)>(op); });
}
void act_dropout_backward(const ActDropoutPassBackward& op) {
  dispatch(op.dtype, [&](auto element) { act_dropout_backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
