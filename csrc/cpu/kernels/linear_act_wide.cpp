// Linear, an activation and dropout where the weight exceeds a core's cache: panels of rows that
// walk along the weight, and backward as blocked products.

#include "cpu/kernels/activation.h"
#include "cpu/kernels/linear_act.h"
#include "cpu/kernels/panels.h"
#include "cpu/kernels/products.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Rows that are multiplied together by a weight beyond the cache, which is read once for them all:
// up to 1024 inputs of them fit an L2 cache, where twice as many take 3 % longer.
template <class T>
int64_t wide_rows(int64_t in) {
  return in <= kInPlaceDepth<T> ? 144 : 288;
}

// As panels (panels.h): a weight that is used for a few hundred rows is not worth packing. Threads
// share the rows by whole vectors, each of them all features or, where rows are few, a part.
template <class T>
void forward(const LinearAct& op) {
  const int64_t in = op.in_features, out = op.out_features, room = round_up(out, kPanel<T>);
  Arena shared(Scratch::kCall, Arena::bytes<T>(room) + Arena::bytes<T>(norm_room<T>(op.norm, out)));
  T* bias = shared.take<T>(room);
  copy_channels<T>({const_cast<void*>(op.bias), op.dtype}, out, room, 0, bias);
  const Norm<T> norm(op.norm, out, shared.take<T>(norm_room<T>(op.norm, out)), bias);
  const bool rectify = !op.norm.active() && !op.seen && op.act.activation == Activation::kReLU;
  const bool finished = !op.norm.active() && !op.act.dropout.active() &&
                        (rectify || op.act.activation == Activation::kNone);
  const T *input = static_cast<const T*>(op.input), *weight = static_cast<const T*>(op.weight);
  T *output = static_cast<T*>(op.output), *seen = static_cast<T*>(op.seen);
  const BlasLayer<T> layer = {in, out, weight, op.weight_stride, bias, norm.get(), op.act};
  if (layer.takes_blas(op.rows, op.input_stride)) {
    return layer.run(0, op.rows, input, op.input_stride, seen, output);
  }

  // `features` features from `first` on of a panel's rows; `block` has room for them.
  constexpr int64_t kStride = kInPlaceRows + 64 / static_cast<int64_t>(sizeof(T));
  const auto finish = [&](const T* panel, int64_t row, int64_t rows, int64_t first,
                          int64_t features, T* block) {
    const int64_t start = row * out + first;
    if (seen) write_transposed(panel, rows, features, seen + start, out);
    if (finished) return write_transposed(panel, rows, features, output + start, out);
    alignas(64) uint8_t mask[kPanel<T> * kInPlaceRows / 8 + 64];
    write_transposed(panel, rows, features, block, kStride);
    finish_act<T>(norm.get(), op.act, row, rows, first, features, block, kStride, output + start,
                  out, mask);
  };

  // Features first … last - 1 of a group of rows, whose panels are `before`.
  const auto multiply_group = [&](int64_t row, int64_t rows, int64_t first, int64_t last,
                                  const T* before, T* after, T* block) {
    for (; first < last; first += kInPlaceRows) {
      const int64_t features = smaller(kInPlaceRows, last - first);
      multiply_panels<T>(weight + first * op.weight_stride, op.weight_stride, bias + first, in,
                         features, rows, before, after, kInPlaceRows * kPanel<T>, rectify, nullptr);
      for (int64_t r = 0; r < rows; r += kPanel<T>) {
        finish(after + r * kInPlaceRows, row + r, smaller(kPanel<T>, rows - r), first, features,
               block);
      }
    }
  };

  const double work = static_cast<double>(op.rows) * static_cast<double>(in * out);
  const int64_t threads = work > 2.0 * kThreadWork ? thread_count() : 1;
  const int64_t most_rows = wide_rows<T>(in), vectors = ceil_div(op.rows, kLanes<T>);
  const Parts ranges(vectors, ceil_div(vectors, smaller(threads, ceil_div(op.rows, most_rows))), 1);
  const Parts groups(ranges.size * kLanes<T>, most_rows, kPanel<T>);
  int64_t shares = 1;
  while (ranges.count * shares % threads && ranges.count * shares < 4 * threads) ++shares;
  const Parts parts(out, ceil_div(out, shares), 2 * kLanes<T>);
  const int64_t tasks = ranges.count * parts.count;
  parallel_for(tasks, threads > 1 ? 1 : tasks, [&](int64_t begin, int64_t end) {
    Arena own(Scratch::kTask, Arena::bytes<T>(in * groups.size) +
                                  Arena::bytes<T>(kInPlaceRows * groups.size) +
                                  Arena::bytes<T>(kPanel<T> * kStride));
    T* before = own.take<T>(in * groups.size);
    T* after = own.take<T>(kInPlaceRows * groups.size);
    T* block = own.take<T>(kPanel<T> * kStride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t range = task / parts.count, part = task % parts.count;
      const int64_t first_row = ranges.begin(range) * kLanes<T>;
      const int64_t last_row = smaller(op.rows, first_row + ranges.length(range) * kLanes<T>);
      const bool is_read = groups.count == 1 && task > begin && part > 0;
      for (int64_t row = first_row; row < last_row; row += groups.size) {
        const int64_t rows = smaller(groups.size, last_row - row);
        for (int64_t r = 0; r < rows && !is_read; r += kPanel<T>) {
          read_transposed(input + (row + r) * op.input_stride, op.input_stride,
                          smaller(kPanel<T>, rows - r), in, before + r * in);
        }
        const int64_t first = parts.begin(part);
        multiply_group(row, rows, first, first + parts.length(part), before, after, block);
      }
    }
  });
}

template <class T>
void backward(const LinearActBackward& op) {
  const LinearAct& net = op.forward;
  const int64_t in = net.in_features, out = net.out_features;
  const T* grad = static_cast<const T*>(op.grad_output);
  int64_t stride = out;
  Temporary<T> gated;
  // Once beforehand, since blocks of it are read several times.
  if (net.act.activation != Activation::kNone || net.act.dropout.active()) {
    stride = padded<T>(out);
    Temporary<T>(net.rows * stride).swap(gated);
    for_row_blocks(net.rows, out * kPassCost, [&](int64_t first, int64_t rows) {
      Arena own(Scratch::kTask, Arena::bytes<uint8_t>(mask_room(rows, out)));
      gate<T>(net.act, first, rows, out, grad + first * out, out, rows_from<T>(op.kept, first, out),
              gated.data() + first * stride, stride, own.take<uint8_t>(mask_room(rows, out)));
    });
    grad = gated.data();
  }
  weight_grad<T>(net.rows, in, out, grad, stride,
                 LoadRows<T>{static_cast<const T*>(net.input), net.input_stride},
                 static_cast<T*>(op.grad_weight), static_cast<T*>(op.grad_bias));
  if (op.grad_input == nullptr) return;
  Panels<T> weight(static_cast<const T*>(net.weight), net.weight_stride, out, in);
  const int64_t room = packed_size(weight, net.rows);
  Arena shared(Scratch::kCall, Arena::bytes<T>(room));
  if (room > 0) weight.pack_all(shared.take<T>(room));
  multiply_into<T>(net.rows, grad, stride, weight, static_cast<T*>(op.grad_input));
}

}  // namespace

void linear_act_wide(const LinearAct& op) {
  dispatch_single_or_double(op.dtype, [&](auto element) { forward<decltype(element)>(op); });
}
void linear_act_wide_backward(const LinearActBackward& op) {
  dispatch_single_or_double(op.forward.dtype,
                            [&](auto element) { backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
