// Mean and sum of squared deviations, exact to the last bits of the compute type.
//
// A block that lies in the cache is read twice, for its mean and for the deviations from it; blocks
// are merged in double by the formula of Chan, Golub & LeVeque (1979), in a fixed order. So data at
// 1e4 +- 1e-2 loses nothing, and every run gives the same bits.
#pragma once

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  FUSED_MLP_INLINE void merge(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    m2 += other_m2 + delta * delta * (count * other_count / total);
    count = total;
  }
};

// Whether a sum of squares lost nothing to the ends of float's range, 1e-38 and 3e38: deviations of
// 1e30 overflow when they are squared, and those of 1e-30 vanish.
template <class T>
FUSED_MLP_INLINE bool in_range(T squares) {
  return std::is_same_v<T, double> || (squares > T(1e-25) && squares < T(1e38));
}

// The moments of values that are not, in double.
template <class S>
Moments moments_in_double(const S* x, int64_t stride, int64_t n) {
  const auto value = [&](int64_t i) { return static_cast<double>(widen(x[i * stride])); };
  double sum = 0, square = 0, rest = 0;
  for (int64_t i = 0; i < n; ++i) sum += value(i);
  const double count = static_cast<double>(n), mean = sum / count;
  for (int64_t i = 0; i < n; ++i) {
    const double d = value(i) - mean;
    square += d * d;
    rest += d;
  }
  return {count, mean + rest / count, square - rest * rest / count};
}

// Values of a span read at a time: 16 kB of floats, half of an L1 cache.
constexpr int64_t kSpan = 4096;

// Whether the values are all the same, as zeros often are: their deviations are 0 in any range.
template <class S>
bool all_equal(const S* x, int64_t n) {
  using T = Compute<S>;
  const T first = widen(x[0]);
  Vec<T> differs = {};
  for_vectors<T>(n, [&](int64_t c, int width) {
    const Vec<T> value = width == kLanes<T> ? load(x + c) : load_some(x + c, width, first);
    differs = select<T>(value == splat(first), differs, splat(T(1)));
  });
  return sum_lanes<T>(differs) == 0;
}

// Asks for `count` values in a row: what comes after those that are read twice now. add_block reads
// down columns besides, and where a page holds several of its rows, the processor does not see what
// is coming: without this, 4096 x 512 took twice as long.
template <class S>
inline void prefetch(const S* x, int64_t count) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(x + i);
}

// Adds `count` values in a row.
template <class S>
inline void add_span(const S* x, int64_t count, Moments& moments) {
  using T = Compute<S>;
  constexpr int64_t kStep = 4 * kLanes<T>;  // four sums hide the latency of an addition
  for (; count > 0; x += kSpan, count -= kSpan) {
    const int64_t n = smaller(count, kSpan);
    prefetch(x + n, smaller(count - n, kSpan));
    Vec<T> sum[4] = {};
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      for (int j = 0; j < 4; ++j) sum[j] += load(x + i + j * kLanes<T>);
    }
    for_vectors<T>(n - i, [&](int64_t c, int width) { sum[0] += load_up_to(x + i + c, width); });
    const T mean = sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<T>(n);
    Vec<T> square[4] = {}, rest[4] = {};
    for (i = 0; i + kStep <= n; i += kStep) {
      for (int j = 0; j < 4; ++j) {
        const Vec<T> d = load(x + i + j * kLanes<T>) - mean;
        square[j] += d * d;
        rest[j] += d;
      }
    }
    for_vectors<T>(n - i, [&](int64_t c, int width) {
      const Vec<T> d =
          (width == kLanes<T> ? load(x + i + c) : load_some(x + i + c, width, mean)) - mean;
      square[0] += d * d;
      rest[0] += d;
    });
    // The mean was rounded; the deviations from it say by how much.
    const double slip = sum_lanes<T>((rest[0] + rest[1]) + (rest[2] + rest[3]));
    const T m2 = sum_lanes<T>((square[0] + square[1]) + (square[2] + square[3]));
    if (!in_range(m2) && !all_equal(x, n)) {
      const Moments exact = moments_in_double(x, 1, n);
      moments.merge(exact.count, exact.mean, exact.m2);
      continue;
    }
    moments.merge(static_cast<double>(n), mean + slip / static_cast<double>(n),
                  static_cast<double>(m2) - slip * slip / static_cast<double>(n));
  }
}

template <class T>
FUSED_MLP_INLINE bool all_in_range(Vec<T> squares, int width) {
  if constexpr (std::is_same_v<T, double>) return true;
  if (width < kLanes<T>) {
    bool all = true;
    for (int lane = 0; lane < width; ++lane) all = all && in_range<T>(squares[lane]);
    return all;
  }
  const Vec<T> out = select<T>(squares < splat(T(1e38)), Vec<T>{}, splat(T(1)));
  return sum_lanes<T>(select<T>(squares > splat(T(1e-25)), out, splat(T(1)))) == 0;
}

// As add_block does it, where some column's squares are out of range and the column is not
// constant; else does nothing and returns false.
template <class S>
[[gnu::noinline]] bool merge_in_double(const S* x, int64_t stride, int64_t rows,
                                       Vec<Compute<S>> squares, int width, double weight,
                                       double cross, double* mean, double* m2) {
  using T = Compute<S>;
  const Vec<T> first = load_up_to(x, width);
  Vec<T> differs = {};
  for (int64_t row = 1; row < rows; ++row) {
    const Vec<T> value = load_up_to(x + row * stride, width);
    differs = select<T>(value == first, differs, splat(T(1)));
  }
  bool constant = true;
  for (int c = 0; c < width; ++c) {
    constant = constant && (in_range<T>(squares[c]) || differs[c] == 0);
  }
  if (constant) return false;
  for (int c = 0; c < width; ++c) {
    const Moments exact = moments_in_double(x + c, stride, rows);
    const double delta = exact.mean - mean[c];
    mean[c] += delta * weight;
    m2[c] += exact.m2 + delta * delta * cross;
  }
  return true;
}

// Merges the columns of a block of `rows` rows into means and m2s that stand for `count` rows.
template <class S>
inline void add_block(const S* x, int64_t stride, int64_t rows, int64_t columns, double count,
                      double* mean, double* m2) {
  using T = Compute<S>;
  const T inverse = T(1) / static_cast<T>(rows);
  const double height = static_cast<double>(rows);
  const double total = count + static_cast<double>(rows);
  const double weight = height / total, share = 1 / height;
  const double cross = count * weight;
  for_vectors<T>(columns, [&](int64_t c, int width) {
    // Rows in turns of four sums, which hide the latency of an addition.
    Vec<T> sums[4] = {}, squares[4] = {}, rests[4] = {};
    const auto for_rows = [&](const auto& body) {
      const S* from = x + c;
      int64_t row = 0;
      for (; row + 4 <= rows; row += 4, from += 4 * stride) {
        for (int i = 0; i < 4; ++i) body(i, load_up_to(from + i * stride, width));
      }
      for (; row < rows; ++row, from += stride) body(0, load_up_to(from, width));
    };
    for_rows([&](int i, Vec<T> value) { sums[i] += value; });
    const Vec<T> centre = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * inverse;
    for_rows([&](int i, Vec<T> value) {
      const Vec<T> d = value - centre;
      squares[i] += d * d;
      rests[i] += d;
    });
    const Vec<T> squared = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    if (!all_in_range<T>(squared, width) &&
        merge_in_double(x + c, stride, rows, squared, width, weight, cross, mean + c, m2 + c)) {
      return;
    }
    T centres[kLanes<T>], square[kLanes<T>], rest[kLanes<T>];
    store_raw(centres, centre);
    store_raw(square, squared);
    store_raw(rest, (rests[0] + rests[1]) + (rests[2] + rests[3]));
    const auto merge = [&](int lanes) {
      for (int lane = 0; lane < lanes; ++lane) {
        const double slip = static_cast<double>(rest[lane]) * share;
        const double delta = static_cast<double>(centres[lane]) + slip - mean[c + lane];
        mean[c + lane] += delta * weight;
        m2[c + lane] +=
            static_cast<double>(square[lane]) - slip * slip * height + delta * delta * cross;
      }
    };
    if (width == kLanes<T>) {  // a number the compiler knows: in vectors
      merge(kLanes<T>);
    } else {
      merge(width);
    }
  });
}

// Matrices of fewer columns are read as ones of more. From this many on a shorter last vector costs
// less than coefficients that fill the cache.
constexpr int64_t kFoldedColumns = 64;

// A matrix of few columns read as one of whole vectors: `fold` rows make one wide row, and what is
// left over makes a last, shorter one. Column c of the wide matrix is channel c % channels.
struct Folded {
  int64_t channels, rows, columns, tail;

  template <class T>
  static Folded of(int64_t rows, int64_t channels) {
    int64_t fold = 1;
    if (channels < kFoldedColumns && channels % kLanes<T> != 0) {
      while (channels * fold % kLanes<T> != 0) fold *= 2;
      while (channels * fold < kFoldedColumns) fold *= 2;
    }
    return {channels, rows / fold, channels * fold, rows % fold * channels};
  }

  // Rows of the wide matrix, the shorter one included.
  int64_t all_rows() const { return rows + (tail > 0); }
  int64_t width(int64_t row) const { return row < rows ? columns : tail; }
};

// One value a channel, repeated over the columns of the wide matrix.
template <class T>
inline void repeat(const T* from, const Folded& shape, T* to) {
  for (int64_t start = 0; start < shape.columns; start += shape.channels) {
    for (int64_t c = 0; c < shape.channels; ++c) to[start + c] = from[c];
  }
}

// Mean and m2 of every channel of x[rows, channels], contiguous.
template <class S>
inline void column_moments(const S* x, int64_t rows, int64_t channels, double* mean, double* m2) {
  const Folded shape = Folded::of<Compute<S>>(rows, channels);
  const int64_t chunks = chunk_count(shape.rows, shape.columns * kPassCost, kLeastRows);
  const int64_t room = 2 * shape.columns;
  // Rows of a block: 16 kB of floats, but at least 8 so that merging stays a small part.
  const int64_t block_rows = larger(8, smaller(kBlockRows, kSpan / larger(1, shape.columns)));
  Arena arena(Scratch::kPartial, Arena::bytes<double>(chunks * room));
  double* partial = arena.take<double>(chunks * room);
  for_chunks(shape.rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    double* chunk_mean = partial + chunk * room;
    double* chunk_m2 = chunk_mean + shape.columns;
    for (int64_t i = 0; i < room; ++i) chunk_mean[i] = 0;
    for (int64_t row = begin; row < end; row += block_rows) {
      prefetch(x + (row + block_rows) * shape.columns,
               smaller(block_rows, end - row - block_rows) * shape.columns);
      add_block(x + row * shape.columns, shape.columns, smaller(block_rows, end - row),
                shape.columns, static_cast<double>(row - begin), chunk_mean, chunk_m2);
    }
  });
  if (shape.columns == channels) {  // all channels of a chunk at once, in vectors
    double count = 0;
    for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* chunk_mean = partial + chunk * room;
      const double* chunk_m2 = chunk_mean + channels;
      const double more = static_cast<double>(chunk_begin(shape.rows, chunks, chunk + 1) -
                                              chunk_begin(shape.rows, chunks, chunk));
      if (more == 0) continue;
      if (count == 0) {
        for (int64_t c = 0; c < channels; ++c) mean[c] = chunk_mean[c], m2[c] = chunk_m2[c];
        count = more;
        continue;
      }
      const double weight = more / (count + more), cross = count * weight;
      for (int64_t c = 0; c < channels; ++c) {
        const double delta = chunk_mean[c] - mean[c];
        mean[c] += delta * weight;
        m2[c] += chunk_m2[c] + delta * delta * cross;
      }
      count += more;
    }
    return;
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    Moments total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double count = static_cast<double>(chunk_begin(shape.rows, chunks, chunk + 1) -
                                               chunk_begin(shape.rows, chunks, chunk));
      const double* chunk_mean = partial + chunk * room;
      for (int64_t c = channel; c < shape.columns; c += channels) {
        total.merge(count, chunk_mean[c], chunk_mean[shape.columns + c]);
      }
    }
    const S* tail = x + shape.rows * shape.columns;
    for (int64_t c = channel; c < shape.tail; c += channels) {
      total.merge(1, static_cast<double>(widen(tail[c])), 0);
    }
    mean[channel] = total.mean;
    m2[channel] = total.m2;
  }
}

// Two vectors, of which backward passes keep running sums.
template <class T>
struct Terms {
  Vec<T> first, second;
};

// Sums terms(i, c, width) over the rows of every channel: i counts the elements of the folded
// matrix and c its columns. Rows go in order, as memory likes them. Short ones and those of a page
// or more go by fours, since sums in memory are read and written each time: a fifth less time, but
// a third more where four rows share a page. The sums of 64 rows go on in double.
template <class T, class Body>
inline void column_sums(const Folded& shape, const Body& terms, double* first, double* second) {
  const int64_t rows = shape.all_rows(), columns = round_up(shape.columns, kLanes<T>);
  const int64_t chunks = chunk_count(rows, shape.columns * 2 * kPassCost, kLeastRows);
  Arena arena(Scratch::kPartial,
              chunks * (Arena::bytes<double>(2 * columns) + Arena::bytes<T>(2 * columns)));
  double* partial = arena.take<double>(chunks * 2 * columns);
  T* blocks = arena.take<T>(chunks * 2 * columns);
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
  const bool by_fours = bytes <= 128 || bytes >= 4096;
  for_chunks(rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    double* total = partial + chunk * 2 * columns;
    T* block = blocks + chunk * 2 * columns;
    for (int64_t i = 0; i < 2 * columns; ++i) total[i] = 0;
    for (int64_t start = begin; start < end; start += kBlockRows) {
      for (int64_t i = 0; i < 2 * columns; ++i) block[i] = 0;
      const auto add = [&](int64_t row, auto many) {
        for_vectors<T>(shape.width(row), [&](int64_t c, int width) {
          Vec<T> sum = load_raw(block + c), sum_x = load_raw(block + columns + c);
          for (int64_t i = 0; i < many(); ++i) {
            const Terms<T> term = terms((row + i) * shape.columns + c, c, width);
            sum += term.first;
            sum_x += term.second;
          }
          store_raw(block + c, sum);
          store_raw(block + columns + c, sum_x);
        });
      };
      const int64_t stop = smaller(end, start + kBlockRows);
      const int64_t whole = by_fours ? smaller(stop, shape.rows) : 0;
      int64_t row = start;
      for (; row + 4 <= whole; row += 4) add(row, std::integral_constant<int64_t, 4>{});
      for (; row < stop; ++row) add(row, std::integral_constant<int64_t, 1>{});
      for (int64_t i = 0; i < 2 * columns; ++i) total[i] += static_cast<double>(block[i]);
    }
  });
  for (int64_t c = 0; c < shape.channels; ++c) first[c] = second[c] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double* total = partial + chunk * 2 * columns;
    for (int64_t start = 0; start < shape.columns; start += shape.channels) {
      for (int64_t c = 0; c < shape.channels; ++c) {
        first[c] += total[start + c];
        second[c] += total[columns + start + c];
      }
    }
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA
