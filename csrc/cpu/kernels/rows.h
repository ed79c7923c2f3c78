// Passes over the rows of a block: copies with conversion, dropout, the ReLU gate.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vec.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Calls body(S{}) with the element type of `dtype`.
template <class Body>
FUSED_MLP_INLINE void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

// The types that blocked products and networks layer by layer serve. Half precision walks through
// the cache at any width; beyond it the ops prefer the library's product.
FUSED_MLP_INLINE bool is_single_or_double(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

template <class Body>
FUSED_MLP_INLINE void dispatch_single_or_double(DType dtype, const Body& body) {
  dtype == DType::kFloat64 ? body(double{}) : body(float{});
}

// Calls body(column, width) over the vectors of a row; width is kLanes<T> but for a last shorter
// one.
template <class T, class Body>
FUSED_MLP_INLINE void for_vectors(int64_t columns, const Body& body) {
  int64_t column = 0;
  for (; column + kLanes<T> <= columns; column += kLanes<T>) body(column, kLanes<T>);
  if (column < columns) body(column, static_cast<int>(columns - column));
}

template <class S>
FUSED_MLP_INLINE Vec<Compute<S>> load_up_to(const S* p, int width) {
  return width == kLanes<Compute<S>> ? load(p) : load_some(p, width);
}

template <class S>
FUSED_MLP_INLINE void store_up_to(S* p, Vec<Compute<S>> v, int width) {
  if (width == kLanes<Compute<S>>) {
    store(p, v);
  } else {
    store_some(p, v, width);
  }
}

// Neighbouring vectors of one value a column.
template <class T, int kCount>
struct Group {
  Vec<T> vectors[kCount];

  static FUSED_MLP_INLINE Group load(const T* from) {
    Group group;
    for (int j = 0; j < kCount; ++j) group[j] = load_raw(from + j * kLanes<T>);
    return group;
  }
  FUSED_MLP_INLINE void store(T* to) const {
    for (int j = 0; j < kCount; ++j) store_raw(to + j * kLanes<T>, vectors[j]);
  }
  FUSED_MLP_INLINE Vec<T>& operator[](int j) { return vectors[j]; }
  FUSED_MLP_INLINE const Vec<T>& operator[](int j) const { return vectors[j]; }
};

// Calls body(j, offset) for the vectors of a group.
template <class T, int kCount, class Body>
FUSED_MLP_INLINE void for_each_vector(Group<T, kCount>, const Body& body) {
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) body(j, int64_t{j} * kLanes<T>);
}

// Calls body(Group<T, n>{}, column, width) over the columns by groups of four vectors, of two and
// of one for what is left over. A pass down the rows of a group keeps its coefficients in registers
// and still reads 256 bytes in a row: by single vectors it took up to twice as long.
template <class T, class Body>
FUSED_MLP_INLINE void for_groups(int64_t columns, const Body& body) {
  constexpr int64_t kPair = 2 * kLanes<T>;
  int64_t start = 0;
  for (; start + 2 * kPair <= columns; start += 2 * kPair) body(Group<T, 4>{}, start, kLanes<T>);
  for (; start + kPair <= columns; start += kPair) body(Group<T, 2>{}, start, kLanes<T>);
  for_vectors<T>(columns - start,
                 [&](int64_t column, int width) { body(Group<T, 1>{}, start + column, width); });
}

// Into a padded block of the compute type; the last vector of a row is filled up with zeros.
template <class S>
inline void copy_in(const S* from, int64_t from_stride, int64_t rows, int64_t columns,
                    Compute<S>* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    for_vectors<Compute<S>>(
        columns, [&](int64_t c, int width) { store_raw(to + c, load_up_to(from + c, width)); });
  }
}

template <class S>
inline void copy_out(const Compute<S>* from, int64_t from_stride, int64_t rows, int64_t columns,
                     S* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    for_vectors<Compute<S>>(
        columns, [&](int64_t c, int width) { store_up_to(to + c, load_raw(from + c), width); });
  }
}

// Calls body(c, element) for the elements of a channel vector that is not null; neighbouring ones
// in vectors.
template <class Body>
FUSED_MLP_INLINE void for_channels(ChannelVector vector, int64_t channels, const Body& body) {
  dispatch(vector.dtype, [&](auto element) {
    using S = decltype(element);
    S* values = static_cast<S*>(vector.data);
    if (vector.stride == 1) {
      for (int64_t c = 0; c < channels; ++c) body(c, values[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) body(c, values[c * vector.stride]);
    }
  });
}

// The elements of a channel vector in the compute type, padded with `none`; all `none` for null.
template <class T>
inline void copy_channels(ChannelVector vector, int64_t channels, int64_t room, T none, T* to) {
  if (vector.data == nullptr) channels = 0;
  for (int64_t c = channels; c < room; ++c) to[c] = none;
  if (channels > 0) {
    for_channels(vector, channels,
                 [&](int64_t c, const auto& from) { to[c] = static_cast<T>(widen(from)); });
  }
}

template <class T>
inline void write_channels(const T* from, int64_t channels, ChannelVector vector) {
  if (vector.data == nullptr) return;
  for_channels(vector, channels, [&](int64_t c, auto& to) {
    using S = std::remove_reference_t<decltype(to)>;
    to = narrow<S>(static_cast<Compute<S>>(from[c]));
  });
}

// sums[c] += the column sums of a block whose rows are padded to whole vectors. Four sums a column
// hide the latency of an addition.
template <class T>
inline void add_column_sums(const T* block, int64_t stride, int64_t rows, int64_t columns,
                            T* sums) {
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    Vec<T> sum[4] = {load_raw(sums + c)};
    const T* from = block + c;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4, from += 4 * stride) {
      for (int i = 0; i < 4; ++i) sum[i] += load_raw(from + i * stride);
    }
    for (; row < rows; ++row, from += stride) sum[0] += load_raw(from);
    store_raw(sums + c, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA
