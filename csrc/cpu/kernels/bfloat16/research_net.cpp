// The whole bfloat16 network: in training layer by layer, with ReLU, dropout, batch norm and
// statistics done on the blocks of each result.

#include "cpu/kernels/bfloat16/network.h"

namespace fused_mlp::FUSED_MLP_ISA {

void research_net_bfloat16_evaluate(const ResearchNet& op);

namespace {

void train(const ResearchNet& op) {
  PairNet net(op);
  const int64_t channels = net.channels;
  const Parts parts = pair_row_parts(op.rows);
  const int64_t numel = larger(1, parts.count) * 2 * channels;
  Arena arena(Scratch::kCall, net.bytes() + Arena::bytes<double>(numel));
  net.take(arena);
  double* moments = arena.take<double>(numel);
  for (int64_t i = 0; i < numel; ++i) moments[i] = 0;
  net.run_hidden([&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* block,
                     int64_t stride) {
    double* mean = moments + row / parts.size * 2 * channels + column;
    add_block(block, stride, rows, columns, 0.0, mean, mean + channels);
  });
  for (int64_t c = 0; c < channels; ++c) {
    Moments total;
    for (int64_t part = 0; part < parts.count; ++part) {
      const double* mean = moments + part * 2 * channels;
      total.merge(static_cast<double>(parts.length(part)), mean[c], mean[channels + c]);
    }
    moments[c] = total.mean;
    moments[channels + c] = total.m2;
  }
  finish_statistics<float>(op, channels, static_cast<double>(op.rows), moments, moments + channels,
                           net.mean(), net.rstd());
  net.set_affine(net.mean(), net.rstd());
  const Vec<float> slope = splat(static_cast<float>(op.negative_slope));
  const auto load_activated = [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                                  BFloat16* to, int64_t stride) {
    for (int64_t r = row; r < row + rows; ++r, to += stride) {
      for (int64_t c = 0; c < round_up(columns, kVectorElements); c += kLanes<float>) {
        const int64_t count = larger(0, smaller(kLanes<float>, columns - c));
        const Vec<float> y = count > 0 ? net.activated(r, column + c, count, slope) : Vec<float>{};
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c),
                            _mm256_maskz_mov_epi16(first_lanes(count), round_all(y)));
      }
    }
  };
  net.multiply_layer(op.layers - 1, load_activated,
                     [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                         const float* block, int64_t stride) {
                       BFloat16* to = static_cast<BFloat16*>(op.output) + row * net.out + column;
                       for_block(block, stride, rows, columns,
                                 [&](Vec<float> sum, int64_t r, int64_t c, int width) {
                                   store_sixteen(to + r * net.out + c, sum, width);
                                 });
                     });
}

}  // namespace

int64_t research_net_bfloat16_saved_numel(const ResearchNet& op) { return PairNet(op).saved_numel; }

void research_net_bfloat16(const ResearchNet& op) {
  op.training ? train(op) : research_net_bfloat16_evaluate(op);
}

}  // namespace fused_mlp::FUSED_MLP_ISA
