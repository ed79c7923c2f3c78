// The passes before and behind a Linear's product where csrc/cpu/linear_act.cpp takes torch's:
// batch norm, activation and dropout, and their gradient.

#include "cpu/kernels/activation.h"
#include "cpu/kernels/chunks.h"
#include "cpu/kernels/linear_act.h"
#include "cpu/kernels/rows.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

template <class S>
void forward(const ActDropoutPass& op) {
  using T = Compute<S>;
  const int64_t columns = op.columns, stride = padded<T>(columns);
  Arena shared(Scratch::kCall, Arena::bytes<T>(norm_room<T>(op.norm, columns)));
  const Norm<T> norm(op.norm, columns, shared.take<T>(norm_room<T>(op.norm, columns)), nullptr);
  for_row_blocks(op.rows, columns * kPassCost, [&](int64_t begin, int64_t count) {
    for_some_rows(begin, begin + count, columns, [&](int64_t first, int64_t rows) {
      Arena own(Scratch::kTask,
                Arena::bytes<T>(rows * stride) + Arena::bytes<uint8_t>(mask_room(rows, columns)));
      uint8_t* mask = own.take<uint8_t>(mask_room(rows, columns));
      S* to = static_cast<S*>(op.output) + first * columns;
      const S* from = rows_from<S>(op.input, first, columns);
      if constexpr (std::is_same_v<S, T>) {
        finish_act<S>(norm.get(), op.act, first, rows, 0, columns, from, columns, to, columns,
                      mask);
      } else {
        T* block = own.take<T>(rows * stride);
        copy_in(from, columns, rows, columns, block, stride);
        finish_act<S>(norm.get(), op.act, first, rows, 0, columns, block, stride, to, columns,
                      mask);
      }
    });
  });
}

template <class S>
void backward(const ActDropoutPassBackward& op) {
  using T = Compute<S>;
  const int64_t columns = op.columns, room = padded<T>(columns);
  const int64_t chunks = chunk_count(op.rows, columns * kPassCost, kLeastRows);
  Arena shared(Scratch::kCall, Arena::bytes<T>(chunks * room));
  T* partial = shared.take<T>(chunks * room);
  for_chunks(op.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    T* sums = partial + chunk * room;
    for (int64_t c = 0; c < room; ++c) sums[c] = 0;
    for_some_rows(begin, end, columns, [&](int64_t first, int64_t rows) {
      Arena own(Scratch::kTask,
                Arena::bytes<T>(rows * room) + Arena::bytes<uint8_t>(mask_room(rows, columns)));
      T* block = own.take<T>(rows * room);
      gate<S>(op.act, first, rows, columns, rows_from<S>(op.grad_output, first, columns), columns,
              rows_from<S>(op.kept, first, columns), block, room,
              own.take<uint8_t>(mask_room(rows, columns)));
      add_column_sums(block, room, rows, columns, sums);
      copy_out(block, room, rows, columns, static_cast<S*>(op.grad) + first * columns, columns);
    });
  });
  if (op.grad_bias == nullptr) return;
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t c = 0; c < columns; ++c) partial[c] += partial[chunk * room + c];
  }
  copy_out(partial, room, 1, columns, static_cast<S*>(op.grad_bias), columns);
}

}  // namespace

void act_dropout(const ActDropoutPass& op) {
  dispatch(op.dtype, [&](auto element) { forward<decltype(element)>(op); });
}
void act_dropout_backward(const ActDropoutPassBackward& op) {
  dispatch(op.dtype, [&](auto element) { backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
