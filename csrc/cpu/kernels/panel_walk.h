// Rows that walk through the layers of a network as transposed panels (panels.h), a few panels at a
// time. Where there are too few rows for all threads, the threads share the features of one layer
// after the other. Many rows of a wide network may go by BLAS instead (blas_walk.h).
#pragma once

#include "cpu/kernels/blas_walk.h"
#include "cpu/kernels/network.h"
#include "cpu/kernels/panels.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Panels that walk together through a wide network: its weights are read once for all of them. Four
// are 3 % slower, sixteen as fast.
constexpr int64_t kWidePanels = 8;
// A wide network of up to this many rows a thread runs layer by layer.
constexpr int64_t kLeastWalk = 32;

template <class S>
class PanelWalk {
 public:
  using T = Compute<S>;

  const ResearchNet& op;
  const Shape<T> shape;
  Affine<T> affine;          // of the batch norm
  T* kept[kMaxLayers] = {};  // where outputs of layers go, [rows, widths[l + 1]], or null
  const T* biases[kMaxLayers];
  int64_t widest = 0, narrowest;

  explicit PanelWalk(const ResearchNet& net) : op(net), shape(net), narrowest(op.widths[0]) {
    for (int l = 0; l <= op.layers; ++l) {
      widest = larger(widest, op.widths[l]);
      narrowest = smaller(narrowest, op.widths[l]);
    }
    for (int l = 0; l < op.layers; ++l) bias_numel_ += round_up(op.widths[l + 1], kLanes<T>);
    together_ = shape.wide && op.rows <= kLeastWalk * thread_count();
  }

  // What `take` needs of the call's scratch memory.
  size_t bytes() const {
    return 3 * Arena::bytes<T>(room()) + Arena::bytes<T>(bias_numel_) +
           2 * Arena::bytes<T>(together_numel());
  }
  void take(Arena& arena) {
    affine = {arena.take<T>(room()), arena.take<T>(room()), arena.take<T>(room())};
    T* converted = arena.take<T>(bias_numel_);
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
    before_ = arena.take<T>(together_numel());
    after_ = arena.take<T>(together_numel());
  }
  void set_affine(const T* mean, const T* rstd) {
    make_affine<T>(mean, rstd, op.bn_weight, op.bn_bias, shape.channels, room(), affine);
  }
  const S* weight(int l) const { return static_cast<const S*>(op.weights[l]); }

  // Layers first … last - 1. The batch norm is applied behind layer layers - 2; where that layer's
  // output is kept, a run ends there, and one from the next layer on begins with what was kept.
  void run(int first, int last) const {
    if constexpr (std::is_same_v<S, T>) {
      if (widest > kCacheWidth && op.rows >= kBlasWalk &&
          takes_blas(op.rows, narrowest, widest, op.input_stride)) {
        return BlasWalk<T>{op, biases, kept, affine, widest}.run(first, last);
      }
    }
    if (together_) {
      run_together(first, last);
    } else {
      walk(first, last);
    }
  }

  // Calls body(first, features) for the features of layer l, shared out among threads.
  template <class Body>
  void share_features(int l, const Body& body) const {
    const int64_t unit = 4 * kLanes<T>, units = ceil_div(op.widths[l + 1], unit);
    const int64_t grain = ceil_div(kThreadWork, larger(1, op.rows * op.widths[l] * unit));
    parallel_for(units, units < 2 * grain ? units : grain, [&](int64_t begin, int64_t end) {
      body(begin * unit, smaller(op.widths[l + 1], end * unit) - begin * unit);
    });
  }

 private:
  // A thread's room: a copied block of a weight and the mask of a panel.
  struct Task {
    T* room;
    uint8_t* mask;

    static size_t bytes(int64_t widest) {
      return Arena::bytes<T>(kPanelRoom<S>) +
             Arena::bytes<uint8_t>(kPanel<T> * mask_bytes(widest) + 64);
    }
    Task(int64_t widest, Arena& arena) {
      room = arena.take<T>(kPanelRoom<S>);
      mask = arena.take<uint8_t>(kPanel<T> * mask_bytes(widest) + 64);
    }
  };

  int64_t room() const { return round_up(shape.channels, kPanel<T>); }
  int64_t together_numel() const { return together_ ? widest * round_up(op.rows, kPanel<T>) : 0; }
  T slope() const { return static_cast<T>(op.negative_slope); }

  // Calls body(row, count, panel) for the panels of rows begin … begin + rows - 1, `features` each.
  template <class Body>
  static void each_panel(int64_t begin, int64_t rows, int64_t features, T* panels,
                         const Body& body) {
    for (int64_t done = 0; done < rows; done += kPanel<T>, panels += features * kPanel<T>) {
      body(begin + done, smaller(kPanel<T>, rows - done), panels);
    }
  }

  // What layer l reads.
  void read(int l, int64_t begin, int64_t rows, T* panels) const {
    const int64_t width = op.widths[l];
    each_panel(begin, rows, width, panels, [&](int64_t row, int64_t count, T* panel) {
      if (l == 0) {
        const S* from = static_cast<const S*>(op.input) + row * op.input_stride;
        read_transposed(from, op.input_stride, count, width, panel);
      } else {
        read_transposed<T>(kept[l - 1] + row * width, width, count, width, panel);
        normalize_transposed(affine, count, 0, width, slope(), panel);
      }
    });
  }
  // Features first … first + features - 1 of layer l.
  void run_layer(int l, int64_t first, int64_t features, int64_t begin, int64_t rows,
                 const T* before, T* after, const Task& task) const {
    const int64_t in = op.widths[l], width = op.widths[l + 1];
    const bool hidden = l < op.layers - 2, dropped = hidden && op.dropout[l].active();
    multiply_panels<S>(weight(l) + first * in, in, biases[l] + first, in, features, rows, before,
                       after + first * kPanel<T>, width * kPanel<T>, hidden, task.room);
    if (l == op.layers - 1 || (hidden && !dropped && kept[l] == nullptr)) return;
    each_panel(begin, rows, width, after, [&](int64_t row, int64_t count, T* panel) {
      panel += first * kPanel<T>;
      if (dropped) drop_transposed(op.dropout[l], row, count, first, features, task.mask, panel);
      if (kept[l]) {
        write_transposed<T>(panel, count, features, kept[l] + row * width + first, width);
      } else if (!hidden) {
        normalize_transposed(affine, count, first, features, slope(), panel);
      }
    });
  }
  void write(int last, int64_t begin, int64_t rows, T* panels) const {
    if (last < op.layers) return;
    each_panel(begin, rows, shape.out, panels, [&](int64_t row, int64_t count, T* panel) {
      write_transposed(panel, count, shape.out, static_cast<S*>(op.output) + row * shape.out,
                       shape.out);
    });
  }

  void walk(int first_layer, int last_layer) const {
    int64_t work = 0;
    for (int l = first_layer; l < last_layer; ++l) work += op.widths[l] * op.widths[l + 1];
    // Threads share whole vectors of rows: half a vector costs as much as one. A second thread must
    // get as much as the first keeps: waking it costs 3 us, as much as kThreadWork.
    const int64_t vectors = ceil_div(op.rows, kLanes<T>);
    const int64_t grain = ceil_div(kThreadWork, larger(1, work * kLanes<T>));
    parallel_for(vectors, vectors < 2 * grain ? vectors : grain, [&](int64_t begin, int64_t end) {
      const int64_t last = smaller(op.rows, end * kLanes<T>);
      const Parts groups(last - begin * kLanes<T>, (shape.wide ? kWidePanels : 1) * kPanel<T>,
                         kPanel<T>);
      const int64_t most = groups.size;
      Arena own(Scratch::kTask, Task::bytes(widest) + 2 * Arena::bytes<T>(widest * most));
      const Task task(widest, own);
      T* before = own.take<T>(widest * most);
      T* after = own.take<T>(widest * most);
      for (int64_t row = begin * kLanes<T>; row < last; row += most) {
        const int64_t rows = smaller(most, last - row);
        read(first_layer, row, rows, before);
        for (int l = first_layer; l < last_layer; ++l) {
          run_layer(l, 0, op.widths[l + 1], row, rows, before, after, task);
          std::swap(before, after);
        }
        write(last_layer, row, rows, before);
      }
    });
  }

  void run_together(int first_layer, int last_layer) const {
    T *before = before_, *after = after_;
    read(first_layer, 0, op.rows, before);
    for (int l = first_layer; l < last_layer; ++l) {
      share_features(l, [&](int64_t first, int64_t features) {
        Arena own(Scratch::kTask, Task::bytes(widest));
        run_layer(l, first, features, 0, op.rows, before, after, Task(widest, own));
      });
      std::swap(before, after);
    }
    write(last_layer, 0, op.rows, before);
  }

  int64_t bias_numel_ = 0;
  bool together_;
  T *before_, *after_;
};

}  // namespace fused_mlp::FUSED_MLP_ISA
