// linear_relu in bfloat16: blocked products at any width.

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

}  // namespace

void linear_relu_bfloat16(const LinearAct& op) {
  const int64_t in = op.in_features, out = op.out_features, room = round_up(out, kPairPanel);
  PairPanels weight(op.weight, op.weight_stride, in, out, true);
  const int64_t packed_size = weight.packed_size(op.rows);
  Arena shared(Scratch::kCall, Arena::bytes<Pair>(packed_size) + Arena::bytes<float>(room));
  if (packed_size > 0) weight.pack_all(shared.take<Pair>(packed_size));
  float* bias = shared.take<float>(room);
  copy_channels<float>({const_cast<void*>(op.bias), op.dtype}, out, room, 0, bias);
  blocked_product(op.rows, weight, bias,
                  load_pairs(static_cast<const BFloat16*>(op.input), op.input_stride),
                  [&](int64_t row, int64_t rows, int64_t column, int64_t columns, float* block,
                      int64_t stride) {
                    store_relu_dropout(op.act.dropout, row, rows, column, columns, block, stride,
                                       static_cast<BFloat16*>(op.output) + row * out + column, out);
                  });
}

void linear_relu_bfloat16_backward(const LinearActBackward& op) {
  const LinearAct& net = op.forward;
  const int64_t in = net.in_features, out = net.out_features;
  const BFloat16* grad = static_cast<const BFloat16*>(op.grad_output);
  const BFloat16* output = static_cast<const BFloat16*>(op.kept);
  // What dropout scales by is left to the sums: the gradients themselves need no rounding.
  const float scale = static_cast<float>(net.act.dropout.scale());
  const auto load_grad = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, Pair* to,
                             int64_t stride) {
    for (int64_t r = 0; r < rows; r += 2, to += stride) {
      const int64_t start = (row + r) * out + column;
      for (int64_t c = 0; c < columns; c += kLanes<float>) {
        const auto gated = [&](int64_t i) {
          return pass_positive(load_half(grad + i + c, columns - c),
                               load_half(output + i + c, columns - c));
        };
        const __m256i second = r + 1 < rows ? gated(start + out) : _mm256_setzero_si256();
        _mm512_storeu_si512(to + c, make_pairs(gated(start), second));
      }
    }
  };
  blocked_pair_grad(net.rows, in, out, scale, load_grad,
                    load_row_pairs(static_cast<const BFloat16*>(net.input), net.input_stride),
                    op.grad_weight, op.grad_bias);
  if (op.grad_input == nullptr) return;
  PairPanels weight(net.weight, net.weight_stride, out, in, false);
  const int64_t packed_size = weight.packed_size(net.rows);
  Arena shared(Scratch::kCall, Arena::bytes<Pair>(packed_size));
  if (packed_size > 0) weight.pack_all(shared.take<Pair>(packed_size));
  const auto load_rows_of_grad = [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                                     BFloat16* to, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r, to += stride) {
      const int64_t i = (row + r) * out + column;
      for (int64_t c = 0; c < round_up(columns, kVectorElements); c += kLanes<float>) {
        const int64_t left = larger(0, columns - c);
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(to + c),
            pass_positive(load_half(grad + i + c, left), load_half(output + i + c, left)));
      }
    }
  };
  blocked_product(net.rows, weight, nullptr, load_rows_of_grad,
                  [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                      const float* block, int64_t stride) {
                    BFloat16* to = static_cast<BFloat16*>(op.grad_input) + row * in + column;
                    for_block(block, stride, rows, columns,
                              [&](Vec<float> sum, int64_t r, int64_t c, int width) {
                                store_sixteen(to + r * in + c, sum * scale, width);
                              });
                  });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
