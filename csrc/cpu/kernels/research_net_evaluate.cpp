// The whole network with constant statistics, in one pass over the rows.
//
// Activations are transposed: a block of rows is one panel, with a row of features under each
// other, and every layer is weight @ block. Weights are then the left operand of the products,
// which is read where it lies: nothing is packed, so nothing needs to be kept from call to call,
// and a call of few rows costs what its products cost. A handful of rows is not worth a panel:
// there each weight is read once, in whole vectors. Both sum in the same order.

#include "cpu/kernels/network.h"
#include "cpu/kernels/transpose.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Up to this many rows need no panel, in a network of kShort multiply-adds a row or less half as
// many. A panel costs what 6 rows do at (128,[256,256],10) on AVX-512.
constexpr int64_t kFewRows = 4;
constexpr int64_t kShort = 8192;

// The coefficients of the batch norm; mean and rstd go into `saved` if there is one.
template <class T>
Affine<T> fixed_affine(const ResearchNet& op, int64_t room, Arena& arena) {
  const int64_t channels = op.widths[op.layers - 1];
  T* mean = arena.take<T>(room);
  T* rstd = arena.take<T>(room);
  const Affine<T> affine = {arena.take<T>(room), arena.take<T>(room), arena.take<T>(room)};
  running_statistics<T>(op, channels, mean, rstd);
  make_affine<T>(mean, rstd, op.bn_weight, op.bn_bias, channels, room, affine);
  if (op.saved != nullptr) {
    std::memcpy(op.saved, mean, static_cast<size_t>(channels) * sizeof(T));
    std::memcpy(static_cast<T*>(op.saved) + channels, rstd,
                static_cast<size_t>(channels) * sizeof(T));
  }
  return affine;
}

// --------------------------------------------------------------------------- a handful of rows

// sums[row] += the products of each row with the weights of kLanes features, whose last one is
// read again where there are fewer. Term after term, as a panel sums them: a row gives the same
// bits alone and in a batch.
template <class S, int kRows>
FUSED_MLP_INLINE void add_products(const S* weight, int64_t in, int64_t features,
                                   const Compute<S>* rows, int64_t stride, Vec<Compute<S>>* sums) {
  using T = Compute<S>;
  const S* from[kLanes<T>];
  for (int j = 0; j < kLanes<T>; ++j) from[j] = weight + smaller(j, features - 1) * in;
  Vec<T> sum[kRows];
  for (int row = 0; row < kRows; ++row) sum[row] = sums[row];
  for_vectors<T>(in, [&](int64_t k, int width) {
    Vec<T> square[kLanes<T>];
    for (int j = 0; j < kLanes<T>; ++j) square[j] = load_up_to(from[j] + k, width);
    transpose<T>(square);
    const T* x[kRows];
    for (int row = 0; row < kRows; ++row) x[row] = rows + row * stride + k;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i == width) break;
      for (int row = 0; row < kRows; ++row) sum[row] += square[i] * splat(x[row][i]);
    }
  });
  for (int row = 0; row < kRows; ++row) sums[row] = sum[row];
}

template <class S, int kRows>
void add_products_of(int64_t count, const S* weight, int64_t in, int64_t features,
                     const Compute<S>* rows, int64_t stride, Vec<Compute<S>>* sums) {
  if (count == kRows) {
    add_products<S, kRows>(weight, in, features, rows, stride, sums);
  } else if constexpr (kRows > 1) {
    add_products_of<S, kRows - 1>(count, weight, in, features, rows, stride, sums);
  }
}

template <class S>
void evaluate_few_rows(const ResearchNet& op, const Affine<Compute<S>>& affine, int64_t widest,
                       Arena& arena) {
  using T = Compute<S>;
  const int64_t stride = round_up(widest, kLanes<T>);
  const Vec<T> slope = splat(static_cast<T>(op.negative_slope));
  T* before = arena.take<T>(op.rows * stride);
  T* after = arena.take<T>(op.rows * stride);
  copy_in(static_cast<const S*>(op.input), op.input_stride, op.rows, op.widths[0], before, stride);
  for (int l = 0; l < op.layers; ++l) {
    const int64_t in = op.widths[l], out = op.widths[l + 1];
    const S* bias = static_cast<const S*>(op.biases[l]);
    for_vectors<T>(out, [&](int64_t f, int features) {
      const S* weight = static_cast<const S*>(op.weights[l]) + f * in;
      Vec<T> sums[kFewRows];
      for (int64_t row = 0; row < op.rows; ++row) sums[row] = load_up_to(bias + f, features);
      add_products_of<S, kFewRows>(op.rows, weight, in, features, before, stride, sums);
      for (int64_t row = 0; row < op.rows; ++row) {
        Vec<T> z = sums[row];
        if (l < op.layers - 2) {
          z = relu<T>(z);
        } else if (l == op.layers - 2) {
          z = (z - load_raw(affine.mean + f)) * load_raw(affine.scale + f) +
              load_raw(affine.shift + f);
          z = leaky_relu<T>(z, slope);
        }
        T* to = after + row * stride + f;
        if (features < kLanes<T>) store_raw(to, Vec<T>{});  // the next layer reads whole vectors
        store_up_to(to, z, features);
      }
    });
    std::swap(before, after);
  }
  copy_out(before, stride, op.rows, op.widths[op.layers], static_cast<S*>(op.output),
           op.widths[op.layers]);
}

// ------------------------------------------------------------------------------ blocks of rows

// A block of up to kPanel rows, transposed: `features` rows of kPanel.
template <class T>
void drop_transposed(const Dropout& dropout, int64_t first, int64_t rows, int64_t features,
                     uint8_t* mask, T* block) {
  const T scale = static_cast<T>(dropout.scale());
  draw_mask(dropout, first, rows, 0, features, mask);
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t row = 0; row < rows; ++row) {
      const bool keep = mask[row * mask_bytes(features) + f / 8] >> (f % 8) & 1;
      block[f * kPanel<T> + row] *= keep ? scale : T(0);
    }
  }
}

// rows[count, columns] into a block; lanes behind `count` are zeros up to a whole vector.
template <class S>
void read_transposed(const S* rows, int64_t stride, int64_t count, int64_t columns,
                     Compute<S>* block) {
  using T = Compute<S>;
  for (int64_t row = 0; row < count; row += kLanes<T>) {
    const int64_t height = smaller(kLanes<T>, count - row);
    for_vectors<T>(columns, [&](int64_t c, int width) {
      Vec<T> square[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        square[i] = i < height ? load_up_to(rows + (row + i) * stride + c, width) : Vec<T>{};
      }
      transpose<T>(square);
      for (int i = 0; i < width; ++i) store_raw(block + (c + i) * kPanel<T> + row, square[i]);
    });
  }
}

// The first `count` lanes of a block into rows[count, columns].
template <class S>
void write_transposed(const Compute<S>* block, int64_t count, int64_t columns, S* rows) {
  using T = Compute<S>;
  for (int64_t row = 0; row < count; row += kLanes<T>) {
    const int64_t height = smaller(kLanes<T>, count - row);
    for_vectors<T>(columns, [&](int64_t c, int width) {
      Vec<T> square[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        square[i] = i < width ? load_raw(block + (c + i) * kPanel<T> + row) : Vec<T>{};
      }
      transpose<T>(square);
      for (int i = 0; i < height; ++i) {
        store_up_to(rows + (row + i) * columns + c, square[i], width);
      }
    });
  }
}

template <class T>
FUSED_MLP_INLINE void normalize_transposed(const Affine<T>& affine, int64_t channels, T slope,
                                           T* block) {
  for (int64_t c = 0; c < channels; ++c, block += kPanel<T>) {
    const Vec<T> mean = splat(affine.mean[c]), scale = splat(affine.scale[c]),
                 shift = splat(affine.shift[c]);
    for (int v = 0; v < kTileVectors; ++v) {
      T* at = block + v * kLanes<T>;
      store_raw(at, leaky_relu<T>((load_raw(at) - mean) * scale + shift, splat(slope)));
    }
  }
}

// Weights and biases in the compute type.
template <class T>
struct Layers {
  const T* weights[kMaxLayers];
  const T* biases[kMaxLayers];
};

template <class S>
struct Panel {
  using T = Compute<S>;
  T* blocks[2];
  uint8_t* mask;

  static size_t bytes(int64_t widest) {
    return 2 * Arena::bytes<T>(widest * kPanel<T>) +
           Arena::bytes<uint8_t>(kPanel<T> * mask_bytes(widest) + 64);
  }

  Panel(int64_t widest, Arena& arena) {
    for (T*& block : blocks) block = arena.take<T>(widest * kPanel<T>);
    mask = arena.take<uint8_t>(kPanel<T> * mask_bytes(widest) + 64);
  }

  void evaluate(const ResearchNet& op, const Layers<T>& layers, const Affine<T>& affine,
                int64_t first, int64_t count) {
    T *before = blocks[0], *after = blocks[1];
    read_transposed(static_cast<const S*>(op.input) + first * op.input_stride, op.input_stride,
                    count, op.widths[0], before);
    for (int l = 0; l < op.layers; ++l) {
      const int64_t in = op.widths[l], out = op.widths[l + 1];
      multiply<T>(out, count, in, {layers.weights[l], in, 1}, packed<T>(before, in), after,
                  kPanel<T>, Start::kRowBias, layers.biases[l], l < op.layers - 2);
      if (l < op.layers - 2 && op.dropout[l].active()) {
        drop_transposed(op.dropout[l], first, count, out, mask, after);
      }
      if (l == op.layers - 2) {
        normalize_transposed(affine, out, static_cast<T>(op.negative_slope), after);
      }
      std::swap(before, after);
    }
    const int64_t out = op.widths[op.layers];
    write_transposed(before, count, out, static_cast<S*>(op.output) + first * out);
  }
};

}  // namespace

template <class S>
void evaluate(const ResearchNet& op) {
  using T = Compute<S>;
  constexpr bool kInPlace = std::is_same_v<S, T>;
  const int64_t room = round_up(op.widths[op.layers - 1], kPanel<T>);
  int64_t widest = op.widths[0], work = 0, numel = 0;
  bool drops = false;
  for (int l = 0; l < op.layers; ++l) {
    widest = larger(widest, op.widths[l + 1]);
    work += op.widths[l] * op.widths[l + 1];
    numel += (op.widths[l] + 1) * op.widths[l + 1] + 2 * kLanes<T>;
    drops = drops || op.dropout[l].active();
  }
  const bool few = op.rows <= (work <= kShort ? kFewRows / 2 : kFewRows) && !drops;
  const int64_t rest = few ? 2 * kFewRows * round_up(widest, kLanes<T>) : kInPlace ? 0 : numel;
  Arena arena(Scratch::kCall, 5 * Arena::bytes<T>(room) + Arena::bytes<T>(rest) + 2 * 64);
  const Affine<T> affine = fixed_affine<T>(op, room, arena);
  if (few) return evaluate_few_rows<S>(op, affine, widest, arena);

  T* widened = arena.take<T>(rest);
  const auto in_compute_type = [&](const void* values, int64_t count) -> const T* {
    if constexpr (kInPlace) {
      return static_cast<const T*>(values);
    } else {
      T* to = widened;
      widened += round_up(count, kLanes<T>);
      copy_in(static_cast<const S*>(values), count, 1, count, to, count);
      return to;
    }
  };
  Layers<T> layers;
  for (int l = 0; l < op.layers; ++l) {
    layers.weights[l] = in_compute_type(op.weights[l], op.widths[l] * op.widths[l + 1]);
    layers.biases[l] = in_compute_type(op.biases[l], op.widths[l + 1]);
  }
  // Threads share whole vectors of rows: half a vector costs as much as one. A second thread must
  // get as much as the first keeps: waking it costs 3 us, as much as kThreadWork.
  const int64_t vectors = ceil_div(op.rows, kLanes<T>);
  const int64_t grain = ceil_div(kThreadWork, larger(1, work * kLanes<T>));
  parallel_for(vectors, vectors < 2 * grain ? vectors : grain, [&](int64_t begin, int64_t end) {
    Arena own(Scratch::kTask, Panel<S>::bytes(widest));
    Panel<S> panel(widest, own);
    const int64_t last = smaller(op.rows, end * kLanes<T>);
    for (int64_t first = begin * kLanes<T>; first < last; first += kPanel<T>) {
      panel.evaluate(op, layers, affine, first, smaller(kPanel<T>, last - first));
    }
  });
}

template void evaluate<float>(const ResearchNet&);
template void evaluate<double>(const ResearchNet&);
template void evaluate<BFloat16>(const ResearchNet&);
template void evaluate<Float16>(const ResearchNet&);

}  // namespace fused_mlp::FUSED_MLP_ISA
