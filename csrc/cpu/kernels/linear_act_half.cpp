// Linear, an activation and dropout in half precision, in one walk over the rows: blocks are
// converted to float32 as they enter and rounded as they leave.

#include "cpu/kernels/activation.h"
#include "cpu/kernels/chunks.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/linear_act.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/weight_grad.h"

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
  copy_channels<T>({const_cast<void*>(op.bias), op.dtype}, out, room, 0, bias);
  const Norm<T> norm(op.norm, out, shared.take<T>(norm_room<T>(op.norm, out)), bias);
  const int64_t in_stride = padded<T>(in), out_stride = padded<T>(out);
  for_row_blocks(op.rows, in * out, [&](int64_t first, int64_t rows) {
    Arena own(Scratch::kTask, Arena::bytes<T>(rows * in_stride) +
                                  Arena::bytes<T>(rows * out_stride) +
                                  Arena::bytes<uint8_t>(mask_room(rows, out)));
    T* block_in = own.take<T>(rows * in_stride);
    T* block_out = own.take<T>(rows * out_stride);
    uint8_t* mask = own.take<uint8_t>(mask_room(rows, out));
    copy_in(static_cast<const S*>(op.input) + first * op.input_stride, op.input_stride, rows, in,
            block_in, in_stride);
    multiply<T>(rows, out, in, {block_in, in_stride, 1}, packed(weight, in), block_out, out_stride,
                Start::kBias, bias);
    if (op.seen) {
      copy_out(block_out, out_stride, rows, out, static_cast<S*>(op.seen) + first * out, out);
    }
    finish_act<S>(norm.get(), op.act, first, rows, 0, out, block_out, out_stride,
                  static_cast<S*>(op.output) + first * out, out, mask);
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

template <class Body>
void dispatch_half(DType dtype, const Body& body) {
  dtype == DType::kBFloat16 ? body(BFloat16{}) : body(Float16{});
}

}  // namespace

void linear_act_half(const LinearAct& op) {
  dispatch_half(op.dtype, [&](auto element) { forward<decltype(element)>(op); });
}
void linear_act_half_backward(const LinearActBackward& op) {
  dispatch_half(op.forward.dtype, [&](auto element) { backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
