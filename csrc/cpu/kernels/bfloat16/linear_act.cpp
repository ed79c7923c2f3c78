// linear_act in bfloat16: blocked products at any width.

#include "cpu/kernels/linear_act.h"

#include "cpu/kernels/activation.h"
#include "cpu/kernels/bfloat16/blocked.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// The elements of a gradient where the output let it through: 16 lanes of both.
FUSED_MLP_INLINE __m256i pass_positive(__m256i grad, __m256i output) {
  // Above zero, or NaN of either sign: what `output <= 0` is false for.
  const __m256i size = _mm256_and_si256(output, _mm256_set1_epi16(0x7FFF));
  const __mmask16 passes = _mm256_cmpgt_epi16_mask(output, _mm256_setzero_si256()) |
                           _mm256_cmpgt_epi16_mask(size, _mm256_set1_epi16(0x7F80));
  return _mm256_maskz_mov_epi16(passes, grad);
}

// A gradient's products: its rows by `load`, its pairs of rows by `load_pairs_of_rows`, all times
// `scale`.
template <class Load, class LoadPairs>
void multiply_gradient(const LinearActBackward& op, float scale, const Load& load,
                       const LoadPairs& load_pairs_of_rows) {
  const LinearAct& net = op.forward;
  const int64_t in = net.in_features, out = net.out_features;
  blocked_pair_grad(net.rows, in, out, scale, load_pairs_of_rows,
                    load_row_pairs(static_cast<const BFloat16*>(net.input), net.input_stride),
                    op.grad_weight, op.grad_bias);
  if (op.grad_input == nullptr) return;
  PairPanels weight(net.weight, net.weight_stride, out, in, false);
  const int64_t packed_size = weight.packed_size(net.rows);
  Arena shared(Scratch::kCall, Arena::bytes<Pair>(packed_size));
  if (packed_size > 0) weight.pack_all(shared.take<Pair>(packed_size));
  blocked_product(net.rows, weight, nullptr, load,
                  [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                      const float* block, int64_t stride) {
                    BFloat16* to = static_cast<BFloat16*>(op.grad_input) + row * in + column;
                    for_block(block, stride, rows, columns,
                              [&](Vec<float> sum, int64_t r, int64_t c, int width) {
                                store_sixteen(to + r * in + c, sum * scale, width);
                              });
                  });
}

// ReLU's gradient is gated as it is loaded. What dropout scales by is left to the sums: the
// gradients themselves need no rounding.
void relu_backward(const LinearActBackward& op) {
  const int64_t out = op.forward.out_features;
  const BFloat16* grad = static_cast<const BFloat16*>(op.grad_output);
  const BFloat16* output = static_cast<const BFloat16*>(op.kept);
  const auto gated = [=](int64_t i, int64_t count) {
    return pass_positive(load_half(grad + i, count), load_half(output + i, count));
  };
  multiply_gradient(
      op, static_cast<float>(op.forward.act.dropout.scale()),
      [&](int64_t row, int64_t rows, int64_t column, int64_t columns, BFloat16* to,
          int64_t stride) {
        for (int64_t r = 0; r < rows; ++r, to += stride) {
          const int64_t i = (row + r) * out + column;
          for (int64_t c = 0; c < round_up(columns, kVectorElements); c += kLanes<float>) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c),
                                gated(i + c, larger(0, columns - c)));
          }
        }
      },
      [&](int64_t row, int64_t rows, int64_t column, int64_t columns, Pair* to, int64_t stride) {
        for (int64_t r = 0; r < rows; r += 2, to += stride) {
          const int64_t i = (row + r) * out + column;
          for (int64_t c = 0; c < columns; c += kLanes<float>) {
            const __m256i second =
                r + 1 < rows ? gated(i + out + c, columns - c) : _mm256_setzero_si256();
            _mm512_storeu_si512(to + c, make_pairs(gated(i + c, columns - c), second));
          }
        }
      });
}

// The gradient of what the activation saw, rounded.
void gate_rows(const LinearActBackward& op, BFloat16* to) {
  const ActDropout& act = op.forward.act;
  const int64_t out = op.forward.out_features, stride = padded<float>(out);
  for_row_blocks(op.forward.rows, out * kPassCost, [&](int64_t first, int64_t rows) {
    Arena own(Scratch::kTask,
              Arena::bytes<float>(rows * stride) + Arena::bytes<uint8_t>(mask_room(rows, out)));
    float* block = own.take<float>(rows * stride);
    gate<BFloat16>(act, first, rows, out, rows_from<BFloat16>(op.grad_output, first, out), out,
                   rows_from<BFloat16>(op.kept, first, out), block, stride,
                   own.take<uint8_t>(mask_room(rows, out)));
    copy_out(block, stride, rows, out, to + first * out, out);
  });
}

}  // namespace

void linear_act_bfloat16(const LinearAct& op) {
  const int64_t in = op.in_features, out = op.out_features, room = round_up(out, kPairPanel);
  PairPanels weight(op.weight, op.weight_stride, in, out, true);
  const int64_t packed_size = weight.packed_size(op.rows);
  Arena shared(Scratch::kCall, Arena::bytes<Pair>(packed_size) + Arena::bytes<float>(room) +
                                   Arena::bytes<float>(norm_room<float>(op.norm, out)));
  if (packed_size > 0) weight.pack_all(shared.take<Pair>(packed_size));
  float* bias = shared.take<float>(room);
  copy_channels<float>({const_cast<void*>(op.bias), op.dtype}, out, room, 0, bias);
  const Norm<float> norm(op.norm, out, shared.take<float>(norm_room<float>(op.norm, out)), bias);
  BFloat16 *output = static_cast<BFloat16*>(op.output), *seen = static_cast<BFloat16*>(op.seen);
  const bool rectify = op.act.activation == Activation::kReLU && !op.norm.active() && !seen;
  const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* block,
                          int64_t stride) {
    const int64_t start = row * out + column;
    if (rectify) {
      return store_relu_dropout(op.act.dropout, row, rows, column, columns, block, stride,
                                output + start, out);
    }
    if (seen) copy_out(block, stride, rows, columns, seen + start, out);
    alignas(64) uint8_t mask[kPairRows * kResultWidth / 8 + 64];
    finish_act<BFloat16>(norm.get(), op.act, row, rows, column, columns, block, stride,
                         output + start, out, mask);
  };
  blocked_product(op.rows, weight, bias,
                  load_pairs(static_cast<const BFloat16*>(op.input), op.input_stride), finish);
}

void linear_act_bfloat16_backward(const LinearActBackward& op) {
  const LinearAct& net = op.forward;
  if (net.act.activation == Activation::kReLU) return relu_backward(op);
  const int64_t out = net.out_features;
  const BFloat16* grad = static_cast<const BFloat16*>(op.grad_output);
  Temporary<BFloat16> gated;
  if (net.act.activation != Activation::kNone || net.act.dropout.active()) {
    Temporary<BFloat16>(net.rows * out).swap(gated);
    gate_rows(op, gated.data());
    grad = gated.data();
  }
  multiply_gradient(op, 1, load_pairs(grad, out), load_row_pairs(grad, out));
}

}  // namespace fused_mlp::FUSED_MLP_ISA
