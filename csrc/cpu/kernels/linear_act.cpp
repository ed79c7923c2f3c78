// Linear, an activation and dropout. A handful of rows reads each weight once; other rows of
// float32 and float64 walk as a chain of one layer does (mlp.cpp), or where the weight exceeds a
// core's cache as linear_act_wide.cpp says, half precision as linear_act_half.cpp does.

#include "cpu/kernels/linear_act.h"

#include <algorithm>

#include "cpu/kernels/activation.h"
#include "cpu/kernels/chunks.h"
#include "cpu/kernels/few_rows.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/mlp.h"
#include "cpu/kernels/rows.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

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
  const int64_t block = kRows * in_stride;
  // Threads share outputs, not columns: halves of a row made 512 x 512 slower by two threads than
  // by one, since what a core reads ahead the other is writing.
  constexpr int64_t kMost = 4, kLeastOutputs = 4;
  const int64_t chunks = smaller(kMost, chunk_count(out, (kRows + 4) * in, kLeastOutputs));
  Arena shared(Scratch::kCall, Arena::bytes<T>(kRows * grad_stride) + Arena::bytes<T>(block) +
                                   Arena::bytes<T>(chunks * block) +
                                   Arena::bytes<uint8_t>(mask_room(net.rows, out)));
  T* grad = shared.take<T>(kRows * grad_stride);
  T* input = shared.take<T>(block);
  T* sums = shared.take<T>(chunks * block);
  T* grad_weight = static_cast<T*>(op.grad_weight);
  gate<T>(net.act, 0, net.rows, out, static_cast<const T*>(op.grad_output), out,
          static_cast<const T*>(op.kept), grad, grad_stride,
          shared.take<uint8_t>(mask_room(net.rows, out)));
  copy_in(static_cast<const T*>(net.input), net.input_stride, net.rows, in, input, in_stride);
  for (int64_t row = net.rows; row < kRows; ++row) {
    std::fill_n(grad + row * grad_stride, grad_stride, T{0});
    std::fill_n(input + row * in_stride, in_stride, T{0});
  }
  for_chunks(out, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    few_rows_gradients<T, kRows>(static_cast<const T*>(net.weight) + begin * in,
                                 grad_weight ? grad_weight + begin * in : nullptr, in, end - begin,
                                 grad + begin, grad_stride, input,
                                 op.grad_input ? sums + chunk * block : nullptr, in_stride);
  });
  if (op.grad_input) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t i = 0; i < block; ++i) sums[i] += sums[chunk * block + i];
    }
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
  if (op.rows == 0) return;
  if (reads_weight_once(op)) {
    return dispatch_few_rows(op, [&](auto element, auto rows) {
      few_rows_forward<decltype(element), decltype(rows)::value>(op);
    });
  }
  if (!is_single_or_double(op.dtype)) return linear_act_half(op);
  const ChainSize size(&op, 1);
  size.in_cache && !size.is_one_product() ? walk_chain(&op, 1) : linear_act_wide(op);
}
void linear_act_backward(const LinearActBackward& op) {
  const LinearAct& net = op.forward;
  if (reads_weight_once(net)) {
    return dispatch_few_rows(net, [&](auto element, auto rows) {
      few_rows_backward<decltype(element), decltype(rows)::value>(op);
    });
  }
  if (!is_single_or_double(net.dtype)) return linear_act_half_backward(op);
  const ChainSize size(&op, 1);
  size.in_cache && !size.shares_features() ? walk_chain_backward(&op, 1)
                                           : linear_act_wide_backward(op);
}

}  // namespace fused_mlp::FUSED_MLP_ISA
