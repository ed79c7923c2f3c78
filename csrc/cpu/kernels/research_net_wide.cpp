// The network in training layer by layer, where its widths exceed the cache: each layer is one
// blocked product with its ReLU, dropout, batch norm and statistics done on the blocks of the
// result.

#include "cpu/kernels/wide.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

template <class S>
void write_output(Wide<S>& wide) {
  using T = Compute<S>;
  const ResearchNet& op = wide.op;
  const int64_t out = wide.shape.out;
  wide.multiply_layer(op.layers - 1, wide.load_activated(),
                      [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                          const T* block, int64_t stride) {
                        copy_out(block, stride, rows, columns,
                                 static_cast<S*>(op.output) + row * out + column, out);
                      });
}

template <class S>
void train(const ResearchNet& op) {
  using T = Compute<S>;
  Wide<S> wide(op);
  const Shape<T>& shape = wide.shape;
  const int64_t channels = shape.channels;
  const Parts parts = gemm_row_parts(op.rows);
  Arena arena(Scratch::kCall,
              wide.bytes() + Arena::bytes<double>(larger(1, parts.count) * 2 * channels));
  wide.take(arena);
  double* moments = arena.take<double>(larger(1, parts.count) * 2 * channels);
  for (int64_t i = 0; i < larger(1, parts.count) * 2 * channels; ++i) moments[i] = 0;
  for (int l = 0; l < shape.hidden; ++l) wide.hidden[l] = shape.activation(l, 0);
  wide.z = shape.z(0);
  wide.run_hidden([&](int64_t row, int64_t rows, int64_t column, int64_t columns, const T* block,
                      int64_t stride) {
    double* mean = moments + row / parts.size * 2 * channels + column;
    add_block(block, stride, rows, columns, 0.0, mean, mean + channels);
    copy_out(block, stride, rows, columns, wide.z + row * channels + column, channels);
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
  finish_statistics<T>(op, channels, static_cast<double>(op.rows), moments, moments + channels,
                       shape.mean(), shape.rstd());
  wide.set_affine(shape.mean(), shape.rstd());
  write_output(wide);
}

}  // namespace

void research_net_wide_train(const ResearchNet& op) {
  dispatch_single_or_double(op.dtype, [&](auto element) { train<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
