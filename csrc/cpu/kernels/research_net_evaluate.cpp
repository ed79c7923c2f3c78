// The whole network with constant statistics: its rows walk through all layers as transposed
// panels (panels.h), a few panels at a time. Where there are too few rows for all threads, the
// threads share the features of one layer after the other. A handful of rows is not worth a panel.

#include "cpu/kernels/few_rows.h"
#include "cpu/kernels/network.h"
#include "cpu/kernels/panels.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Panels that walk together through a wide network: its weights are read once for all of them.
// Four are 3 % slower, sixteen as fast.
constexpr int64_t kWidePanels = 8;
// A wide network of up to this many rows a thread runs layer by layer.
constexpr int64_t kLeastWalk = 64;

template <class S>
struct Evaluation {
  using T = Compute<S>;
  const ResearchNet& op;
  Shape<T> shape;
  int64_t widest = 0, room, bias_numel = 0;
  bool drops = false;
  Affine<T> affine;
  const T* biases[kMaxLayers];

  explicit Evaluation(const ResearchNet& net)
      : op(net), shape(net), room(round_up(shape.channels, kPanel<T>)) {
    for (int l = 0; l <= op.layers; ++l) widest = larger(widest, op.widths[l]);
    for (int l = 0; l < op.layers; ++l) {
      bias_numel += round_up(op.widths[l + 1], kLanes<T>);
      drops = drops || op.dropout[l].active();
    }
  }

  size_t bytes() const { return 5 * Arena::bytes<T>(room) + Arena::bytes<T>(bias_numel); }

  // The coefficients of the batch norm; mean and rstd go into `saved` if there is one.
  void take(Arena& arena) {
    const int64_t channels = shape.channels;
    T* mean = arena.take<T>(room);
    T* rstd = arena.take<T>(room);
    affine = {arena.take<T>(room), arena.take<T>(room), arena.take<T>(room)};
    running_statistics<T>(op, channels, mean, rstd);
    make_affine<T>(mean, rstd, op.bn_weight, op.bn_bias, channels, room, affine);
    if (op.saved != nullptr) {
      std::memcpy(op.saved, mean, static_cast<size_t>(channels) * sizeof(T));
      std::memcpy(static_cast<T*>(op.saved) + channels, rstd,
                  static_cast<size_t>(channels) * sizeof(T));
    }
    T* converted = arena.take<T>(bias_numel);
    for (int l = 0; l < op.layers; ++l) {
      const S* bias = static_cast<const S*>(op.biases[l]);
      if constexpr (std::is_same_v<S, T>) {
        biases[l] = bias;
      } else {
        biases[l] = converted;
        copy_in(bias, 0, 1, op.widths[l + 1], converted, 0);
        converted += round_up(op.widths[l + 1], kLanes<T>);
      }
    }
  }

  const S* weight(int l) const { return static_cast<const S*>(op.weights[l]); }
  const S* input(int64_t row) const {
    return static_cast<const S*>(op.input) + row * op.input_stride;
  }
  S* output(int64_t row) const { return static_cast<S*>(op.output) + row * shape.out; }

  // ------------------------------------------------------------------------------- panels

  static size_t task_bytes(int64_t widest) {
    return Arena::bytes<T>(kPanelRoom<T>) +
           Arena::bytes<uint8_t>(kPanel<T> * mask_bytes(widest) + 64);
  }
  struct Task {
    T* room;
    uint8_t* mask;

    Task(int64_t widest, Arena& arena) {
      room = arena.take<T>(kPanelRoom<T>);
      mask = arena.take<uint8_t>(kPanel<T> * mask_bytes(widest) + 64);
    }
  };

  // Features first … first + features - 1 of layer l, for the panels of rows row … row + rows - 1.
  void run_layer(int l, int64_t first, int64_t features, int64_t row, int64_t rows, const T* before,
                 T* after, const Task& task) const {
    const int64_t in = op.widths[l], stride = op.widths[l + 1] * kPanel<T>;
    T* to = after + first * kPanel<T>;
    multiply_panels<S>(weight(l) + first * in, biases[l] + first, in, features, rows, before, to,
                       stride, l < op.layers - 2, task.room);
    const bool dropped = l < op.layers - 2 && op.dropout[l].active();
    if (!dropped && l != op.layers - 2) return;
    for (int64_t done = 0; done < rows; done += kPanel<T>, to += stride) {
      if (dropped) {
        drop_transposed(op.dropout[l], row + done, smaller(kPanel<T>, rows - done), first, features,
                        task.mask, to);
      } else {
        normalize_transposed(affine, first, features, static_cast<T>(op.negative_slope), to);
      }
    }
  }
  void read(int64_t row, int64_t rows, T* panels) const {
    for (int64_t done = 0; done < rows; done += kPanel<T>, panels += op.widths[0] * kPanel<T>) {
      read_transposed(input(row + done), op.input_stride, smaller(kPanel<T>, rows - done),
                      op.widths[0], panels);
    }
  }
  void write(int64_t row, int64_t rows, const T* panels) const {
    for (int64_t done = 0; done < rows; done += kPanel<T>, panels += shape.out * kPanel<T>) {
      write_transposed(panels, smaller(kPanel<T>, rows - done), shape.out, output(row + done));
    }
  }

  void walk() const {
    // Threads share whole vectors of rows: half a vector costs as much as one. A second thread must
    // get as much as the first keeps: waking it costs 3 us, as much as kThreadWork.
    const int64_t vectors = ceil_div(op.rows, kLanes<T>);
    const int64_t grain = ceil_div(kThreadWork, larger(1, shape.work * kLanes<T>));
    parallel_for(vectors, vectors < 2 * grain ? vectors : grain, [&](int64_t begin, int64_t end) {
      const int64_t last = smaller(op.rows, end * kLanes<T>);
      const Parts groups(last - begin * kLanes<T>, (shape.wide ? kWidePanels : 1) * kPanel<T>,
                         kPanel<T>);
      const int64_t most = groups.size;
      Arena own(Scratch::kTask, task_bytes(widest) + 2 * Arena::bytes<T>(widest * most));
      const Task task(widest, own);
      T* before = own.take<T>(widest * most);
      T* after = own.take<T>(widest * most);
      for (int64_t row = begin * kLanes<T>; row < last; row += most) {
        const int64_t rows = smaller(most, last - row);
        read(row, rows, before);
        for (int l = 0; l < op.layers; ++l) {
          run_layer(l, 0, op.widths[l + 1], row, rows, before, after, task);
          std::swap(before, after);
        }
        write(row, rows, before);
      }
    });
  }

  // ------------------------------------------------------------------------ layer by layer

  // Calls body(first, features) for the features of a layer, shared out among threads.
  template <class Body>
  void share_features(int l, const Body& body) const {
    const int64_t unit = 2 * kPanel<T>, units = ceil_div(op.widths[l + 1], unit);
    const int64_t grain = ceil_div(kThreadWork, larger(1, op.rows * op.widths[l] * unit));
    parallel_for(units, units < 2 * grain ? units : grain, [&](int64_t begin, int64_t end) {
      body(begin * unit, smaller(op.widths[l + 1], end * unit) - begin * unit);
    });
  }

  void run_together(Arena& arena) const {
    const int64_t numel = widest * round_up(op.rows, kPanel<T>);
    T* before = arena.take<T>(numel);
    T* after = arena.take<T>(numel);
    read(0, op.rows, before);
    for (int l = 0; l < op.layers; ++l) {
      share_features(l, [&](int64_t first, int64_t features) {
        Arena own(Scratch::kTask, task_bytes(widest));
        run_layer(l, first, features, 0, op.rows, before, after, Task(widest, own));
      });
      std::swap(before, after);
    }
    write(0, op.rows, before);
  }

  template <int kRows>
  void run_few(Arena& arena) const {
    const int64_t stride = round_up(widest, kLanes<T>);
    const Vec<T> slope = splat(static_cast<T>(op.negative_slope));
    T* before = arena.take<T>(kFewRows * stride);
    T* after = arena.take<T>(kFewRows * stride);
    copy_in(input(0), op.input_stride, op.rows, op.widths[0], before, stride);
    for (int l = 0; l < op.layers; ++l) {
      const int64_t in = op.widths[l];
      const auto layer = [&](int64_t first, int64_t features) {
        few_rows_layer<S, kRows>(
            weight(l) + first * in, biases[l] + first, in, features, op.rows, before, stride,
            [&](int64_t row, int64_t feature, int width, Vec<T> z) {
              const int64_t f = first + feature;
              if (l < op.layers - 2) {
                z = relu<T>(z);
              } else if (l == op.layers - 2) {
                z = (z - load_raw(affine.mean + f)) * load_raw(affine.scale + f) +
                    load_raw(affine.shift + f);
                z = leaky_relu<T>(z, slope);
              }
              store_up_to(after + row * stride + f, z, width);
            });
      };
      share_features(l, layer);
      std::swap(before, after);
    }
    copy_out(before, stride, op.rows, shape.out, output(0), shape.out);
  }
};

}  // namespace

template <class S>
void evaluate(const ResearchNet& op) {
  using T = Compute<S>;
  Evaluation<S> evaluation(op);
  const int64_t widest = evaluation.widest;
  const bool few = op.rows <= kFewRows && !evaluation.drops;
  const bool together = !few && evaluation.shape.wide && op.rows <= kLeastWalk * thread_count();
  const int64_t rest = few        ? kFewRows * round_up(widest, kLanes<T>)
                       : together ? widest * round_up(op.rows, kPanel<T>)
                                  : 0;
  Arena arena(Scratch::kCall, evaluation.bytes() + 2 * Arena::bytes<T>(rest));
  evaluation.take(arena);
  if (!few) return together ? evaluation.run_together(arena) : evaluation.walk();
  if (op.rows <= 1) return evaluation.template run_few<1>(arena);
  if (op.rows <= 2) return evaluation.template run_few<2>(arena);
  evaluation.template run_few<4>(arena);
}

template void evaluate<float>(const ResearchNet&);
template void evaluate<double>(const ResearchNet&);
template void evaluate<BFloat16>(const ResearchNet&);
template void evaluate<Float16>(const ResearchNet&);

}  // namespace fused_mlp::FUSED_MLP_ISA
