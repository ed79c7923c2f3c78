// One loop an activation, forward and backward; the products before and after know none of them.

#include "cpu/kernels/activation.h"

#include "cpu/kernels/panels.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Calls body(act) with the Act of an activation.
template <class T, class Body>
FUSED_MLP_INLINE void dispatch_act(const ActDropout& act, const Body& body) {
  const Vec<T> slope = splat(static_cast<T>(act.negative_slope));
  switch (act.activation) {
    case Activation::kNone:
      return body(Act<T, Activation::kNone>{slope});
    case Activation::kReLU:
      return body(Act<T, Activation::kReLU>{slope});
    case Activation::kLeakyReLU:
      return body(Act<T, Activation::kLeakyReLU>{slope});
    case Activation::kGELU:
      return body(Act<T, Activation::kGELU>{slope});
    case Activation::kGELUTanh:
      return body(Act<T, Activation::kGELUTanh>{slope});
    case Activation::kSiLU:
      return body(Act<T, Activation::kSiLU>{slope});
    case Activation::kTanh:
      return body(Act<T, Activation::kTanh>{slope});
  }
}

}  // namespace

template <class S>
void finish_act(const Affine<Compute<S>>* norm, const ActDropout& act, int64_t row, int64_t rows,
                int64_t column, int64_t columns, const Compute<S>* block, int64_t stride, S* to,
                int64_t leading, uint8_t* mask) {
  using T = Compute<S>;
  const bool drop = act.dropout.active();
  const Vec<T> kept = splat(static_cast<T>(act.dropout.scale()));
  if (drop) draw_mask(act.dropout, row, rows, column, columns, mask);
  dispatch_act<T>(act, [&](const auto& f) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* bits = drop ? mask + r * mask_bytes(columns) : nullptr;
      for_vectors<T>(columns, [&](int64_t c, int width) {
        Vec<T> x = load_up_to(block + r * stride + c, width);
        if (norm) x = normalized(x, *norm, column + c);
        Vec<T> y = f.value(x);
        if (drop) y *= select<T>(mask_lanes<T>(bits, c), kept, Vec<T>{});
        store_up_to(to + r * leading + c, y, width);
      });
    }
  });
}

template <class T>
void finish_panel(const Affine<T>* norm, const ActDropout& act, int64_t row, int64_t rows,
                  int64_t features, T* panel, uint8_t* mask) {
  if (norm || act.activation != Activation::kNone) {
    const int64_t used = round_up(rows, kLanes<T>);
    dispatch_act<T>(act, [&](const auto& f) {
      for (int64_t c = 0; c < features; ++c) {
        for (int64_t lane = 0; lane < used; lane += kLanes<T>) {
          T* at = panel + c * kPanel<T> + lane;
          Vec<T> x = load_raw(at);
          if (norm) {
            x = (x - splat(norm->mean[c])) * splat(norm->scale[c]) + splat(norm->shift[c]);
          }
          store_raw(at, f.value(x));
        }
      }
    });
  }
  if (act.dropout.active()) {
    drop_transposed(act.dropout, row, rows, 0, features, mask, panel);
  }
}

template <class S>
void gate(const ActDropout& act, int64_t row, int64_t rows, int64_t columns, const S* grad_output,
          int64_t leading, const S* kept, Compute<S>* to, int64_t stride, uint8_t* mask) {
  using T = Compute<S>;
  const bool drop = act.masks_gradient();
  const T scale = static_cast<T>(act.dropout.active() ? act.dropout.scale() : 1);
  const Vec<T> passes = splat(scale);
  if (drop) draw_mask(act.dropout, row, rows, 0, columns, mask);
  dispatch_act<T>(act, [&](const auto& f) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* bits = drop ? mask + r * mask_bytes(columns) : nullptr;
      for_vectors<T>(columns, [&](int64_t c, int width) {
        Vec<T> grad = load_up_to(grad_output + r * leading + c, width);
        grad *= drop ? select<T>(mask_lanes<T>(bits, c), passes, Vec<T>{}) : passes;
        Vec<T> seen = {};
        if (kept) seen = load_up_to(kept + r * columns + c, width);
        if (drop && act.activation == Activation::kTanh) seen = f.value(seen);
        store_raw(to + r * stride + c, f.gradient(grad, seen));
      });
    }
  });
}

#define FUSED_MLP_INSTANTIATE(S)                                                                   \
  template void finish_act<S>(const Affine<Compute<S>>*, const ActDropout&, int64_t, int64_t,      \
                              int64_t, int64_t, const Compute<S>*, int64_t, S*, int64_t,           \
                              uint8_t*);                                                           \
  template void gate<S>(const ActDropout&, int64_t, int64_t, int64_t, const S*, int64_t, const S*, \
                        Compute<S>*, int64_t, uint8_t*);
FUSED_MLP_INSTANTIATE(float)
FUSED_MLP_INSTANTIATE(double)
FUSED_MLP_INSTANTIATE(BFloat16)
FUSED_MLP_INSTANTIATE(Float16)
#undef FUSED_MLP_INSTANTIATE
template void finish_panel<float>(const Affine<float>*, const ActDropout&, int64_t, int64_t,
                                  int64_t, float*, uint8_t*);
template void finish_panel<double>(const Affine<double>*, const ActDropout&, int64_t, int64_t,
                                   int64_t, double*, uint8_t*);

}  // namespace fused_mlp::FUSED_MLP_ISA
