// Device code of network.cu.
#pragma once

#include "common/philox.h"
#include "network.h"
#include "staging.cuh"

namespace fused_mlp::cuda::net {

// One block at work: its shared memory and what every phase needs.
template <class M>
struct Block {
  using T = typename M::T;
  using S = typename M::Storage;
  using A = typename M::A;

  const NetParameters& p;
  char* shared;

  FUSED_MLP_DEVICE S* storage(int at) const { return reinterpret_cast<S*>(shared + at); }
  FUSED_MLP_DEVICE A* sums(int at) const { return reinterpret_cast<A*>(shared + at); }
  FUSED_MLP_DEVICE int channels() const { return p.widths[p.layers - 1]; }
  FUSED_MLP_DEVICE int64_t first_row(int tile) const {
    return static_cast<int64_t>(tile) * p.tile_rows;
  }
  FUSED_MLP_DEVICE int valid_rows(int tile) const {
    const int64_t left = p.rows - first_row(tile);
    return left < p.tile_rows ? static_cast<int>(left) : p.tile_rows;
  }

  FUSED_MLP_DEVICE void stage_weights() const {
    for (int i = 0; i < p.layers; ++i) {
      const int rows = p.widths[i + 1], columns = p.widths[i];
      stage_matrix<M>(storage(p.at.weight[i]), p.at.ld[i], static_cast<const T*>(p.weight[i]),
                      columns, rows, round_up(rows, M::kRowPad), columns, p.at.pad[i]);
      A* bias = sums(p.at.bias[i]);
      for (int k = threadIdx.x; k < p.at.pad[i + 1]; k += blockDim.x)
        bias[k] = k < rows ? widen(static_cast<const T*>(p.bias[i])[k]) : A(0);
    }
  }

  FUSED_MLP_DEVICE void stage_rows(int tile) const {
    stage_matrix<M>(storage(p.at.activation[0]), p.at.ld[0],
                    static_cast<const T*>(p.x) + first_row(tile) * p.x_stride, p.x_stride,
                    valid_rows(tile), p.tile_rows, p.widths[0], p.at.pad[0]);
  }

  // One byte for eight columns of a row: which of them dropout keeps.
  FUSED_MLP_DEVICE void draw_mask(int layer, int tile) const {
    const uint32_t threshold = p.dropout_threshold[layer];
    if (threshold == 0) return;
    const philox::Stream stream = philox::make_stream(p.seed[0], p.seed[1], layer);
    const int groups = (p.at.pad[layer + 1] + 7) / 8;
    uint8_t* mask = reinterpret_cast<uint8_t*>(shared + p.at.mask);
    for (int k = threadIdx.x; k < p.tile_rows * groups; k += blockDim.x) {
      const int row = k / groups;
      const philox::Group bits =
          philox::draw(stream, first_row(tile) + row, static_cast<uint32_t>(k - row * groups));
      uint32_t byte = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        byte |= static_cast<uint32_t>(philox::keep(bits, j, threshold)) << j;
      mask[k] = static_cast<uint8_t>(byte);
    }
  }

  // The hidden layers before the last: activation[0] to activation[layers - 2]. Ends synchronised.
  FUSED_MLP_DEVICE void hidden_layers(int tile) const {
    draw_mask(0, tile);
    __syncthreads();
    for (int i = 0; i < p.layers - 2; ++i) {
      const A* bias = sums(p.at.bias[i]);
      const uint8_t* mask = reinterpret_cast<const uint8_t*>(shared + p.at.mask);
      const bool drops = p.dropout_threshold[i] != 0;
      const A scale = static_cast<A>(p.dropout_scale[i]);
      const int groups = (p.at.pad[i + 1] + 7) / 8, width = p.widths[i + 1];
      S* out = storage(p.at.activation[i + 1]);
      multiply_all<M, false, false>(
          storage(p.at.activation[i]), p.at.ld[i], storage(p.at.weight[i]), p.at.ld[i], p.tile_rows,
          width, p.widths[i], [&](int row, int column, auto values) {
            constexpr int W = sizeof(values) / sizeof(A);
            if (column >= p.at.pad[i + 1]) return;
#pragma unroll
            for (int r = 0; r < W; ++r) {
              A z = values.at[r] + bias[column + r];
              z = z < A(0) ? A(0) : z;  // NaN stays
              // A product, as torch's dropout: a NaN or an infinity that is dropped becomes NaN.
              const bool keep =
                  !drops || (mask[row * groups + (column + r) / 8] >> ((column + r) % 8) & 1);
              values.at[r] = z * (keep ? scale : A(0));
            }
            store_run<M, W>(out, p.at.ld[i + 1], row, column, width, values);
          });
      __syncthreads();
      if (i + 1 < p.layers - 2 && p.dropout_threshold[i + 1] != 0) {
        draw_mask(i + 1, tile);
        __syncthreads();
      }
    }
  }

  // The product before BatchNorm, with its bias.
  template <class Visit>
  FUSED_MLP_DEVICE void before_norm(Visit visit) const {
    const int i = p.layers - 2;
    const A* bias = sums(p.at.bias[i]);
    multiply_all<M, false, false>(storage(p.at.activation[i]), p.at.ld[i], storage(p.at.weight[i]),
                                  p.at.ld[i], p.tile_rows, p.widths[i + 1], p.widths[i],
                                  [&](int row, int column, auto values) {
                                    constexpr int W = sizeof(values) / sizeof(A);
                                    if (column >= p.at.pad[i + 1]) return;
#pragma unroll
                                    for (int r = 0; r < W; ++r) values.at[r] += bias[column + r];
                                    visit(row, column, values);
                                  });
  }

  // ---- statistics of columns: `slot_parts` threads share a column, each has a slot
  FUSED_MLP_DEVICE A* slot(int which, int k) const {
    return sums(p.at.slots) + which * p.at.slot_parts * channels() + k;
  }

  template <class Visit>
  FUSED_MLP_DEVICE void each_slot(Visit visit) const {
    const int width = channels(), slots = p.at.slot_parts * width;
    for (int k = threadIdx.x; k < slots; k += blockDim.x) visit(k, k % width, k / width);
  }

  FUSED_MLP_DEVICE void clear_slots() const {
    each_slot([&](int k, int, int) { *slot(0, k) = *slot(1, k) = *slot(2, k) = A(0); });
  }

  // Adds the tile's rows of `hidden` to the moments in the slots.
  FUSED_MLP_DEVICE void add_moments(int rows) const {
    const A* hidden = sums(p.at.hidden);
    each_slot([&](int k, int column, int part) {
      A sum = 0, m2 = 0;
      int count = 0;
      for (int row = part; row < rows; row += p.at.slot_parts, ++count)
        sum += hidden[row * p.at.hidden_ld + column];
      if (count == 0) return;
      const A mean = sum / static_cast<A>(count);
      for (int row = part; row < rows; row += p.at.slot_parts) {
        const A delta = hidden[row * p.at.hidden_ld + column] - mean;
        m2 = fused(delta, delta, m2);
      }
      const Moments<A> all = merge(Moments<A>{*slot(0, k), *slot(1, k), *slot(2, k)},
                                   Moments<A>{static_cast<A>(count), mean, m2});
      *slot(0, k) = all.count;
      *slot(1, k) = all.mean;
      *slot(2, k) = all.m2;
    });
  }

  // How many rows a block of a measuring launch saw.
  FUSED_MLP_DEVICE int64_t rows_of(int block) const {
    const int tiles = (p.tiles - block + p.measured_blocks - 1) / p.measured_blocks;
    int64_t rows = static_cast<int64_t>(tiles) * p.tile_rows;
    if ((p.tiles - 1) % p.measured_blocks == block) rows -= p.tile_rows - valid_rows(p.tiles - 1);
    return rows;
  }

  FUSED_MLP_DEVICE Moments<A> column_moments(int column) const {
    Moments<A> m = {};
    for (int part = 0; part < p.at.slot_parts; ++part) {
      const int k = part * channels() + column;
      m = merge(m, Moments<A>{*slot(0, k), *slot(1, k), *slot(2, k)});
    }
    return m;
  }

  // Partial results lie as [2][blocks][width].
  FUSED_MLP_DEVICE A* partial(int which, int block) const {
    return static_cast<A*>(p.partials) +
           (static_cast<int64_t>(which) * p.measured_blocks + block) * channels();
  }

  FUSED_MLP_DEVICE void load_moments() const {
    each_slot([&](int k, int column, int part) {
      Moments<A> m = {};
      for (int block = part; block < p.measured_blocks; block += p.at.slot_parts)
        m = merge(m, Moments<A>{static_cast<A>(rows_of(block)), partial(0, block)[column],
                                partial(1, block)[column]});
      *slot(0, k) = m.count;
      *slot(1, k) = m.mean;
      *slot(2, k) = m.m2;
    });
  }

  // Vectors over BatchNorm's channels: mean, scale, shift and, backward, the two mean terms.
  FUSED_MLP_DEVICE A* transform(int which) const {
    return sums(p.at.transform) + which * p.at.pad[p.layers - 1];
  }

  FUSED_MLP_DEVICE void set_transform(int column, A mean, A rstd) const {
    A scale = rstd, shift = 0;
    if (p.bn_weight) scale *= load_parameter<T>(p.bn_weight, p.flags & kNetWideWeight, column);
    if (p.bn_bias) shift = load_parameter<T>(p.bn_bias, p.flags & kNetWideBias, column);
    transform(0)[column] = mean;
    transform(1)[column] = scale;
    transform(2)[column] = shift;
  }

  // From the moments in the slots, or the running statistics. Block 0 keeps them. Ends
  // synchronised.
  FUSED_MLP_DEVICE void finish_statistics() const {
    __syncthreads();
    const bool writer = blockIdx.x == 0;
    for (int c = threadIdx.x; c < channels(); c += blockDim.x) {
      A mean, rstd;
      if (p.flags & kNetGivenStatistics) {
        mean = load_parameter<T>(p.running_mean, p.flags & kNetWideRunningMean, c);
        const A var = load_parameter<T>(p.running_var, p.flags & kNetWideRunningVar, c);
        rstd = A(1) / root(var + static_cast<A>(p.eps));
      } else {
        const Moments<A> m = column_moments(c);
        mean = m.mean;
        rstd = A(1) / root(m.m2 / m.count + static_cast<A>(p.eps));
        if (writer && p.running_mean) {
          const A momentum = static_cast<A>(p.momentum);
          const A old_mean = load_parameter<T>(p.running_mean, p.flags & kNetWideRunningMean, c);
          const A old_var = load_parameter<T>(p.running_var, p.flags & kNetWideRunningVar, c);
          const A freedom = m.count > A(1) ? m.count - A(1) : A(1);
          store_parameter<T>(p.running_mean, p.flags & kNetWideRunningMean, c,
                             fused(momentum, mean - old_mean, old_mean));
          store_parameter<T>(p.running_var, p.flags & kNetWideRunningVar, c,
                             fused(momentum, m.m2 / freedom - old_var, old_var));
        }
      }
      set_transform(c, mean, rstd);
      if (writer) {
        static_cast<A*>(p.saved)[c] = mean;
        static_cast<A*>(p.saved)[channels() + c] = rstd;
      }
    }
    if (writer && threadIdx.x == 0 && p.batches_tracked && !(p.flags & kNetGivenStatistics))
      *p.batches_tracked += 1;
    __syncthreads();
  }

  // BatchNorm of a number, before LeakyReLU.
  FUSED_MLP_DEVICE A normalised(int column, A h) const {
    return fused(h - transform(0)[column], transform(1)[column], transform(2)[column]);
  }
  FUSED_MLP_DEVICE A leaky(A u) const { return u > A(0) ? u : u * static_cast<A>(p.slope); }

  FUSED_MLP_DEVICE void forward() const {
    stage_weights();
    if (p.phase & kNetMeasure) {
      clear_slots();
      for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        stage_rows(tile);
        hidden_layers(tile);
        before_norm([&](int row, int column, auto values) {
          constexpr int W = sizeof(values) / sizeof(A);
          store_pack<W>(sums(p.at.hidden) + row * p.at.hidden_ld + column, values);
        });
        __syncthreads();
        add_moments(valid_rows(tile));
        __syncthreads();
      }
      if (!(p.phase & kNetApply)) {
        for (int c = threadIdx.x; c < channels(); c += blockDim.x) {
          const Moments<A> m = column_moments(c);
          partial(0, blockIdx.x)[c] = m.mean;
          partial(1, blockIdx.x)[c] = m.m2;
        }
        return;
      }
    } else if (!(p.flags & kNetGivenStatistics)) {
      load_moments();
    }
    finish_statistics();
    const int last = p.layers - 1, width = p.widths[p.layers];
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      stage_rows(tile);
      hidden_layers(tile);
      before_norm([&](int row, int column, auto values) {
        constexpr int W = sizeof(values) / sizeof(A);
#pragma unroll
        for (int r = 0; r < W; ++r)
          if (column + r < channels()) values.at[r] = leaky(normalised(column + r, values.at[r]));
        store_run<M, W>(storage(p.at.activation[last]), p.at.ld[last], row, column, channels(),
                        values);
      });
      __syncthreads();
      A* stage = sums(p.at.stage);
      const A* bias = sums(p.at.bias[last]);
      multiply_all<M, false, false>(
          storage(p.at.activation[last]), p.at.ld[last], storage(p.at.weight[last]), p.at.ld[last],
          p.tile_rows, width, p.widths[last], [&](int row, int column, auto values) {
            constexpr int W = sizeof(values) / sizeof(A);
#pragma unroll
            for (int r = 0; r < W; ++r)
              if (column + r < width)
                stage[row * width + column + r] = values.at[r] + bias[column + r];
          });
      __syncthreads();
      write_out<M>(static_cast<T*>(p.y) + first_row(tile) * width, stage, valid_rows(tile) * width);
    }
  }

  // ---- backward
  // Everything up to LeakyReLU, and du at its input in `stage` form: visit(row, column, du, h).
  FUSED_MLP_DEVICE void recompute(int tile, bool keep_output) const {
    const int last = p.layers - 1;
    stage_rows(tile);
    stage_matrix<M>(storage(p.at.grad_output), p.at.ld[p.layers],
                    static_cast<const T*>(p.g) + first_row(tile) * p.g_stride, p.g_stride,
                    valid_rows(tile), p.tile_rows, p.widths[p.layers], p.at.pad[p.layers]);
    hidden_layers(tile);
    before_norm([&](int row, int column, auto values) {
      constexpr int W = sizeof(values) / sizeof(A);
      store_pack<W>(sums(p.at.hidden) + row * p.at.hidden_ld + column, values);
      if (!keep_output) return;
#pragma unroll
      for (int r = 0; r < W; ++r)
        if (column + r < channels()) values.at[r] = leaky(normalised(column + r, values.at[r]));
      store_run<M, W>(storage(p.at.activation[last]), p.at.ld[last], row, column, channels(),
                      values);
    });
    __syncthreads();
  }

  // The gradient before LeakyReLU: visit(row, column, values of du) with h read beside it.
  template <class Visit>
  FUSED_MLP_DEVICE void gradient_before_activation(Visit visit) const {
    const int last = p.layers - 1;
    const A* hidden = sums(p.at.hidden);
    multiply_all<M, false, true>(
        storage(p.at.grad_output), p.at.ld[p.layers], storage(p.at.weight[last]), p.at.ld[last],
        p.tile_rows, channels(), p.widths[p.layers], [&](int row, int column, auto values) {
          constexpr int W = sizeof(values) / sizeof(A);
          if (column >= p.at.pad[last]) return;
          Pack<A, W> h = load_pack<W>(hidden + row * p.at.hidden_ld + column);
#pragma unroll
          for (int r = 0; r < W; ++r)
            if (column + r < channels() && !(normalised(column + r, h.at[r]) > A(0)))
              values.at[r] *= static_cast<A>(p.slope);
          visit(row, column, values, h);
        });
  }

  FUSED_MLP_DEVICE void measure_backward() const {
    clear_slots();
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      recompute(tile, false);
      A* du = sums(p.at.stage);
      gradient_before_activation([&](int row, int column, auto values, auto) {
        constexpr int W = sizeof(values) / sizeof(A);
        store_pack<W>(du + row * p.at.hidden_ld + column, values);
      });
      __syncthreads();
      const A* hidden = sums(p.at.hidden);
      const int rows = valid_rows(tile);
      each_slot([&](int k, int column, int part) {
        A sum = *slot(0, k), sum_x = *slot(1, k);
        for (int row = part; row < rows; row += p.at.slot_parts) {
          const A value = du[row * p.at.hidden_ld + column];
          sum += value;
          sum_x = fused(value, hidden[row * p.at.hidden_ld + column] - transform(0)[column], sum_x);
        }
        *slot(0, k) = sum;
        *slot(1, k) = sum_x;
      });
      __syncthreads();
    }
  }

  FUSED_MLP_DEVICE A column_sum(int which, int column) const {
    A sum = 0;
    for (int part = 0; part < p.at.slot_parts; ++part)
      sum += *slot(which, part * channels() + column);
    return sum;
  }

  FUSED_MLP_DEVICE void load_sums() const {
    each_slot([&](int k, int column, int part) {
      A sum = 0, sum_x = 0;
      for (int block = part; block < p.measured_blocks; block += p.at.slot_parts) {
        sum += partial(0, block)[column];
        sum_x += partial(1, block)[column];
      }
      *slot(0, k) = sum;
      *slot(1, k) = sum_x;
    });
  }

  // BatchNorm's backward is dh = scale * du + transform(3) * (h - mean) + transform(4).
  FUSED_MLP_DEVICE void finish_sums(bool measured) const {
    __syncthreads();
    for (int c = threadIdx.x; c < channels(); c += blockDim.x) {
      A slope = 0, offset = 0;
      if (measured) {
        const A sum = column_sum(0, c), sum_x = column_sum(1, c);
        const A rstd = static_cast<const A*>(p.saved)[channels() + c];
        if (!(p.flags & kNetGivenStatistics)) {
          const A n = static_cast<A>(p.rows);
          offset = -transform(1)[c] * (sum / n);
          slope = -transform(1)[c] * rstd * rstd * (sum_x / n);
        }
        if (blockIdx.x == 0 && p.grad_bn_weight)
          store_parameter<T>(p.grad_bn_weight, p.flags & kNetWideWeight, c, sum_x * rstd);
        if (blockIdx.x == 0 && p.grad_bn_bias)
          store_parameter<T>(p.grad_bn_bias, p.flags & kNetWideBias, c, sum);
      }
      transform(3)[c] = slope;
      transform(4)[c] = offset;
    }
    __syncthreads();
  }

  // grad_weight[layer] += delta^T input, grad_bias[layer] += column sums of delta.
  FUSED_MLP_DEVICE void add_parameter_gradients(int layer, const S* delta, int delta_ld) const {
    const int rows = p.widths[layer + 1], columns = p.widths[layer];
    A* gradient = sums(p.at.grad_weight[layer]);
    const int ld = p.at.grad_ld[layer];
    multiply_all<M, true, true>(delta, delta_ld, storage(p.at.activation[layer]), p.at.ld[layer],
                                rows, columns, p.tile_rows, [&](int row, int column, auto values) {
                                  constexpr int W = sizeof(values) / sizeof(A);
                                  if (row >= rows) return;
                                  A* to = gradient + row * ld + column;
                                  Pack<A, W> sum = load_pack<W>(to);
#pragma unroll
                                  for (int r = 0; r < W; ++r) sum.at[r] += values.at[r];
                                  store_pack<W>(to, sum);
                                });
    A* bias = sums(p.at.grad_bias[layer]);
    for (int c = threadIdx.x; c < rows; c += blockDim.x) {
      A sum = bias[c];
      for (int row = 0; row < p.tile_rows; ++row) sum += M::load(delta[M::at(row, c, delta_ld)]);
      bias[c] = sum;
    }
  }

  FUSED_MLP_DEVICE void clear_gradients() const {
    for (int i = 0; i < p.layers; ++i) {
      A* weight = sums(p.at.grad_weight[i]);
      for (int k = threadIdx.x; k < p.widths[i + 1] * p.at.grad_ld[i]; k += blockDim.x)
        weight[k] = A(0);
      A* bias = sums(p.at.grad_bias[i]);
      for (int k = threadIdx.x; k < p.widths[i + 1]; k += blockDim.x) bias[k] = A(0);
    }
  }

  FUSED_MLP_DEVICE void apply_backward() const {
    const int last = p.layers - 1;
    clear_gradients();
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      recompute(tile, true);
      const int rows = valid_rows(tile);
      S* delta = storage(p.at.delta[0]);
      gradient_before_activation([&](int row, int column, auto values, auto h) {
        constexpr int W = sizeof(values) / sizeof(A);
#pragma unroll
        for (int r = 0; r < W; ++r) {
          const int c = column + r;
          values.at[r] =
              row < rows && c < channels()
                  ? fused(transform(1)[c], values.at[r],
                          fused(transform(3)[c], h.at[r] - transform(0)[c], transform(4)[c]))
                  : A(0);
        }
        store_run<M, W>(delta, p.at.ld[last], row, column, channels(), values);
      });
      add_parameter_gradients(last, storage(p.at.grad_output), p.at.ld[p.layers]);
      __syncthreads();
      for (int i = last - 1; i >= 0; --i) {
        add_parameter_gradients(i, delta, p.at.ld[i + 1]);
        if (i == 0) break;
        S* next = storage(p.at.delta[(last - i) % 2]);
        const S* activation = storage(p.at.activation[i]);
        const A scale = static_cast<A>(p.dropout_scale[i - 1]);
        multiply_all<M, false, true>(
            delta, p.at.ld[i + 1], storage(p.at.weight[i]), p.at.ld[i], p.tile_rows, p.widths[i],
            p.widths[i + 1], [&](int row, int column, auto values) {
              constexpr int W = sizeof(values) / sizeof(A);
              if (column >= p.at.pad[i]) return;
#pragma unroll
              for (int r = 0; r < W; ++r)
                values.at[r] = M::load(activation[M::at(row, column + r, p.at.ld[i])]) <= A(0)
                                   ? A(0)
                                   : values.at[r] * scale;
              store_run<M, W>(next, p.at.ld[i], row, column, p.widths[i], values);
            });
        delta = next;
        __syncthreads();
      }
      if (p.y) {
        A* stage = sums(p.at.stage);
        const int width = p.widths[0];
        multiply_all<M, false, true>(delta, p.at.ld[1], storage(p.at.weight[0]), p.at.ld[0],
                                     p.tile_rows, width, p.widths[1],
                                     [&](int row, int column, auto values) {
                                       constexpr int W = sizeof(values) / sizeof(A);
#pragma unroll
                                       for (int r = 0; r < W; ++r)
                                         if (column + r < width)
                                           stage[row * width + column + r] = values.at[r];
                                     });
        __syncthreads();
        write_out<M>(static_cast<T*>(p.y) + first_row(tile) * width, stage, rows * width);
      }
      __syncthreads();
    }
    A* out = static_cast<A*>(p.gradients) + static_cast<int64_t>(blockIdx.x) * p.gradient_stride;
    for (int i = 0; i < p.layers; ++i) {
      const int columns = p.widths[i], count = p.widths[i + 1] * columns;
      for (int k = threadIdx.x; k < count; k += blockDim.x) {
        const int row = k / columns;
        out[k] = sums(p.at.grad_weight[i])[row * p.at.grad_ld[i] + k - row * columns];
      }
      out += count;
      for (int k = threadIdx.x; k < p.widths[i + 1]; k += blockDim.x)
        out[k] = sums(p.at.grad_bias[i])[k];
      out += p.widths[i + 1];
    }
  }

  FUSED_MLP_DEVICE void backward() const {
    stage_weights();
    for (int c = threadIdx.x; c < channels(); c += blockDim.x)
      set_transform(c, static_cast<const A*>(p.saved)[c],
                    static_cast<const A*>(p.saved)[channels() + c]);
    __syncthreads();
    const bool measured = p.phase & kNetMeasure || p.partials;
    if (p.phase & kNetMeasure) {
      measure_backward();
      if (!(p.phase & kNetApply)) {
        for (int c = threadIdx.x; c < channels(); c += blockDim.x) {
          partial(0, blockIdx.x)[c] = column_sum(0, c);
          partial(1, blockIdx.x)[c] = column_sum(1, c);
        }
        return;
      }
    } else if (p.partials) {
      load_sums();
    }
    finish_sums(measured);
    apply_backward();
  }
};

}  // namespace fused_mlp::cuda::net
