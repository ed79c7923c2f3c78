// What batch_norm_act and research_net share: statistics to coefficients and back.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/rows.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {

// u = (x - mean) * scale + shift, one of each a channel. Not folded into x * scale + (shift - mean
// * scale): that would lose the digits of data far from zero.
template <class T>
struct Affine {
  T* mean;
  T* scale;
  T* shift;
};

// Training: turns means and m2s of `count` values into mean and rstd and updates the running
// statistics. `Op` is BatchNormAct or ResearchNet.
template <class T, class Op>
inline void finish_statistics(const Op& op, int64_t channels, double count, const double* mean,
                              const double* m2, T* out_mean, T* out_rstd) {
  for (int64_t c = 0; c < channels; ++c) {
    out_mean[c] = static_cast<T>(mean[c]);
    // No rows have no variance; their gradients are zeros, not NaN.
    out_rstd[c] = static_cast<T>(1 / std::sqrt((count > 0 ? m2[c] / count : 0) + op.eps));
  }
  if (op.num_batches_tracked) *op.num_batches_tracked += 1;
  if (count == 0) return;
  const auto update = [&](ChannelVector running, const double* fresh, double factor) {
    if (running.data == nullptr) return;
    const double momentum = op.momentum;
    for_channels(running, channels, [&](int64_t c, auto& value) {
      using S = std::remove_reference_t<decltype(value)>;
      const double old = static_cast<double>(widen(value));
      value =
          narrow<S>(static_cast<Compute<S>>((1 - momentum) * old + momentum * (fresh[c] * factor)));
    });
  };
  update(op.running_mean, mean, 1);
  update(op.running_var, m2, 1 / (count - 1));  // the unbiased variance
}

// Evaluation: mean and rstd of the running statistics.
template <class T, class Op>
inline void running_statistics(const Op& op, int64_t channels, T* out_mean, T* out_rstd) {
  copy_channels<T>(op.running_mean, channels, channels, T(0), out_mean);
  copy_channels<T>(op.running_var, channels, channels, T(1), out_rstd);
  for (int64_t c = 0; c < channels; ++c) {
    out_rstd[c] = static_cast<T>(1 / std::sqrt(static_cast<double>(out_rstd[c]) + op.eps));
  }
}

// The coefficients of a batch norm; `room` >= channels elements of each are written.
template <class T>
inline void make_affine(const T* mean, const T* rstd, ChannelVector weight, ChannelVector bias,
                        int64_t channels, int64_t room, Affine<T> to) {
  copy_channels<T>(weight, channels, room, T(1), to.scale);
  copy_channels<T>(bias, channels, room, T(0), to.shift);
  for (int64_t c = 0; c < channels; ++c) {
    to.mean[c] = mean[c];
    to.scale[c] *= rstd[c];
  }
  for (int64_t c = channels; c < room; ++c) to.mean[c] = to.scale[c] = 0;
}

template <class T>
FUSED_MLP_INLINE Vec<T> normalized(Vec<T> x, const Affine<T>& affine, int64_t c) {
  return (x - load_raw(affine.mean + c)) * load_raw(affine.scale + c) + load_raw(affine.shift + c);
}

// The coefficients of a batch norm in evaluation, in three arrays of `room` >= channels elements.
// Behind a product that adds `bias`, unless it is null, the mean is taken off that: a large one
// then costs the product no digits.
template <class T>
inline Affine<T> evaluated(const EvaluatedNorm& norm, int64_t channels, int64_t room, T* arrays,
                           T* bias) {
  const Affine<T> affine = {arrays, arrays + room, arrays + 2 * room};
  Temporary<T> rstd(channels);
  running_statistics<T>(norm, channels, affine.mean, rstd.data());
  make_affine<T>(affine.mean, rstd.data(), norm.weight, norm.bias, channels, room, affine);
  for (int64_t c = 0; bias && c < channels; ++c) {
    bias[c] -= affine.mean[c];
    affine.mean[c] = 0;
  }
  return affine;
}

// The input gradient's coefficients: dx = k1 * du - k2 - (x - mean) * k3, from the sums of du and
// of du * (x - mean) over `count` values. In evaluation the statistics are constants: k2 = k3 = 0.
template <class T>
inline void input_grad_coefficients(bool training, int64_t channels, double count,
                                    const double* sum, const double* sum_x, const T* rstd,
                                    const T* scale, T* k2, T* k3) {
  for (int64_t c = 0; c < channels; ++c) {
    const double r = static_cast<double>(rstd[c]), s = static_cast<double>(scale[c]);
    k2[c] = training ? static_cast<T>(s * sum[c] / count) : T(0);
    k3[c] = training ? static_cast<T>(s * r * r * sum_x[c] / count) : T(0);
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA
