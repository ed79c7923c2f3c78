// The whole bfloat16 network with constant statistics, in one pass over the rows, as in
// ../research_net_evaluate.cpp: activations are transposed, 32 rows a panel, with the pairs of two
// features under each other; weights are the left operand and read where they lie.

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/bfloat16/blocked.h"
#include "cpu/kernels/bfloat16/left_weight.h"
#include "cpu/kernels/transpose.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Weights of more elements are read from beyond the L2 cache at every call.
constexpr int64_t kCachedWeights = int64_t{1} << 20;

struct Layers {
  LeftWeight weights[kMaxLayers];
  const float* biases[kMaxLayers];  // in float32, zeros behind them up to a whole panel
};

// What stands behind layer l's product.
enum class After { kNothing, kReLU, kNorm };

After after(const ResearchNet& op, int l) {
  return l < op.layers - 2 ? After::kReLU : l == op.layers - 2 ? After::kNorm : After::kNothing;
}

FUSED_MLP_INLINE Vec<float> finished(After what, Vec<float> z, const Affine<float>& affine,
                                     int64_t feature, Vec<float> slope) {
  if (what == After::kReLU) return relu<float>(z);
  if (what == After::kNothing) return z;
  const Vec<float> u = (z - splat(affine.mean[feature])) * splat(affine.scale[feature]) +
                       splat(affine.shift[feature]);
  return leaky_relu<float>(u, slope);
}

// Rows of the result are features: two make a row of pairs.
struct PanelEnds {
  const float* bias;
  After what;
  const Affine<float>& affine;
  int64_t feature;
  Vec<float> slope;
  Pair* to;

  // The same from row i on, which is even.
  FUSED_MLP_INLINE PanelEnds below(int i) const {
    return {bias + i, what, affine, feature + i, slope, to + i / 2 * kPairPanel};
  }
  FUSED_MLP_INLINE Vec<float> start(int i, int) const { return splat(bias[i]); }
  template <int kRows, int kVectors>
  FUSED_MLP_INLINE void finish(const Vec<float> (&sum)[kRows][kVectors]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i += 2) {
      for (int j = 0; j < kVectors; ++j) {
        const Vec<float> first = finished(what, sum[i][j], affine, feature + i, slope);
        const Vec<float> second = i + 1 < kRows ? finished(what, sum[i + 1 < kRows ? i + 1 : i][j],
                                                           affine, feature + i + 1, slope)
                                                : Vec<float>{};
        _mm512_storeu_si512(to + i / 2 * kPairPanel + j * kLanes<float>, make_pairs(first, second));
      }
    }
  }
};

// rows[count, columns] into a panel; lanes behind `count` are zeros up to a whole vector.
void read_panel(const BFloat16* rows, int64_t stride, int64_t count, int64_t columns, Pair* panel) {
  for (int64_t row = 0; row < count; row += kLanes<float>) {
    const int64_t height = smaller(kLanes<float>, count - row);
    for (int64_t c = 0; c < columns; c += kVectorElements) {
      Vec<float> square[kLanes<float>];
      for (int i = 0; i < kLanes<float>; ++i) {
        square[i] = i < height
                        ? (Vec<float>)load_elements(rows + (row + i) * stride + c, columns - c)
                        : Vec<float>{};
      }
      transpose<float>(square);
      const int64_t pairs = smaller(kLanes<float>, padded_pairs(columns - c));
      for (int64_t i = 0; i < pairs; ++i) {
        std::memcpy(panel + (c / 2 + i) * kPairPanel + row, &square[i], sizeof(square[i]));
      }
    }
  }
}

// The first `count` lanes of a panel into rows[count, columns].
void write_panel(const Pair* panel, int64_t count, int64_t columns, BFloat16* rows) {
  for (int64_t row = 0; row < count; row += kLanes<float>) {
    const int64_t height = smaller(kLanes<float>, count - row);
    for (int64_t c = 0; c < columns; c += kVectorElements) {
      const int64_t pairs = smaller(kLanes<float>, pairs_of(columns - c));
      Vec<float> square[kLanes<float>] = {};
      for (int64_t i = 0; i < pairs; ++i) {
        std::memcpy(&square[i], panel + (c / 2 + i) * kPairPanel + row, sizeof(square[i]));
      }
      transpose<float>(square);
      for (int i = 0; i < height; ++i) {
        _mm512_mask_storeu_epi16(rows + (row + i) * columns + c, first_elements(columns - c),
                                 (__m512i)square[i]);
      }
    }
  }
}

// Dropout of a panel of rows first … first + count - 1, where it is on beside constant statistics.
void drop_panel(const Dropout& dropout, int64_t first, int64_t count, int64_t features,
                uint8_t* mask, Pair* panel) {
  const float scale = static_cast<float>(dropout.scale());
  draw_mask(dropout, first, count, 0, features, mask);
  BFloat16* values = reinterpret_cast<BFloat16*>(panel);
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t row = 0; row < count; ++row) {
      const bool keep = mask[row * mask_bytes(features) + f / 8] >> (f % 8) & 1;
      BFloat16& value = values[(f / 2 * kPairPanel + row) * 2 + f % 2];
      value = to_bfloat16(to_float(value) * (keep ? scale : 0.0f));
    }
  }
}

// Features [begin, end) of layer l, `begin` a multiple of kProductRows, for so many panels of up to
// 32 rows.
void multiply_panels(const ResearchNet& op, const Layers& layers, const Affine<float>& affine,
                     int l, int64_t begin, int64_t end, int64_t rows, const Pair* before,
                     Pair* behind, int64_t panel_stride) {
  const Vec<float> slope = splat(static_cast<float>(op.negative_slope));
  layers.weights[l].for_blocks(begin, end, [&](int64_t feature, const auto& block) {
    for (int64_t row = 0; row < rows; row += kPairPanel) {
      const int64_t panel = row / kPairPanel * panel_stride;
      block.multiply(rows - row > kLanes<float> ? 2 : 1, before + panel,
                     PanelEnds{layers.biases[l] + feature, after(op, l), affine, feature, slope,
                               behind + panel + feature / 2 * kPairPanel});
    }
  });
}

struct Blocks {
  Pair* blocks[2];
  uint8_t* mask;
  int64_t panel_stride;

  static size_t bytes(int64_t widest, int64_t panels) {
    return 2 * Arena::bytes<Pair>(panels * padded_pairs(widest) * kPairPanel) +
           Arena::bytes<uint8_t>(kPairPanel * mask_bytes(widest) + 64);
  }
  Blocks(int64_t widest, int64_t panels, Arena& arena)
      : panel_stride(padded_pairs(widest) * kPairPanel) {
    for (Pair*& block : blocks) block = arena.take<Pair>(panels * panel_stride);
    mask = arena.take<uint8_t>(kPairPanel * mask_bytes(widest) + 64);
  }
};

// Rows first … first + rows - 1; each layer's features by run(features, unit, body).
template <class Run>
void walk(const ResearchNet& op, const Layers& layers, const Affine<float>& affine, int64_t first,
          int64_t rows, Blocks& memory, const Run& run) {
  Pair *before = memory.blocks[0], *behind = memory.blocks[1];
  const auto for_panels = [&](const auto& body) {
    for (int64_t row = 0; row < rows; row += kPairPanel) {
      body(row, smaller(kPairPanel, rows - row), row / kPairPanel * memory.panel_stride);
    }
  };
  for_panels([&](int64_t row, int64_t count, int64_t panel) {
    read_panel(static_cast<const BFloat16*>(op.input) + (first + row) * op.input_stride,
               op.input_stride, count, op.widths[0], before + panel);
  });
  for (int l = 0; l < op.layers; ++l) {
    const int64_t out = op.widths[l + 1];
    run(out, op.widths[l] * larger(rows, kReadRows), [&](int64_t begin, int64_t end) {
      multiply_panels(op, layers, affine, l, begin, end, rows, before, behind, memory.panel_stride);
    });
    if (l < op.layers - 2 && op.dropout[l].active()) {
      for_panels([&](int64_t row, int64_t count, int64_t panel) {
        drop_panel(op.dropout[l], first + row, count, out, memory.mask, behind + panel);
      });
    }
    std::swap(before, behind);
  }
  const int64_t out = op.widths[op.layers];
  for_panels([&](int64_t row, int64_t count, int64_t panel) {
    write_panel(before + panel, count, out,
                static_cast<BFloat16*>(op.output) + (first + row) * out);
  });
}

}  // namespace

void research_net_bfloat16_evaluate(const ResearchNet& op) {
  const int64_t channels = op.widths[op.layers - 1], room = round_up(channels, kPairPanel);
  int64_t widest = op.widths[0], weights = 0, work = 0, edges = 0, biases = 0;
  for (int l = 0; l < op.layers; ++l) {
    const int64_t in = op.widths[l], out = op.widths[l + 1];
    widest = larger(widest, out);
    weights += in * out;
    work += product_work(1, in, out);
    edges += LeftWeight::edge_numel(in, out);
    biases += round_up(out, kPairPanel);
  }
  const int64_t panels = ceil_div(op.rows, kPairPanel);
  // Few panels of much work share out the features of each layer, many panels themselves.
  const int64_t least = weights > kCachedWeights ? kReadRows : 0;
  const bool by_features =
      op.rows <= kPairPanel * kMostPanels && larger(op.rows, least) * work > kFeatureWork;
  Arena arena(Scratch::kCall, 5 * Arena::bytes<float>(room) + Arena::bytes<BFloat16>(edges) +
                                  Arena::bytes<float>(biases) +
                                  (by_features ? Blocks::bytes(widest, panels) : 0));
  float* mean = arena.take<float>(room);
  float* rstd = arena.take<float>(room);
  const Affine<float> affine = {arena.take<float>(room), arena.take<float>(room),
                                arena.take<float>(room)};
  running_statistics<float>(op, channels, mean, rstd);
  make_affine<float>(mean, rstd, op.bn_weight, op.bn_bias, channels, room, affine);
  if (op.saved != nullptr) {
    std::memcpy(op.saved, mean, static_cast<size_t>(channels) * sizeof(float));
    std::memcpy(static_cast<float*>(op.saved) + channels, rstd,
                static_cast<size_t>(channels) * sizeof(float));
  }
  BFloat16* edge = arena.take<BFloat16>(edges);
  float* widened = arena.take<float>(biases);
  Layers layers;
  for (int l = 0; l < op.layers; ++l) {
    const int64_t in = op.widths[l], out = op.widths[l + 1];
    layers.weights[l] = LeftWeight(static_cast<const BFloat16*>(op.weights[l]), in, out, edge);
    edge += LeftWeight::edge_numel(in, out);
    layers.biases[l] = widened;
    copy_channels<float>({const_cast<void*>(op.biases[l]), op.dtype}, out,
                         round_up(out, kPairPanel), 0.0f, widened);
    widened += round_up(out, kPairPanel);
  }
  if (by_features) {
    Blocks memory(widest, panels, arena);
    walk(op, layers, affine, 0, op.rows, memory,
         [&](int64_t features, int64_t cost, const auto& body) {
           const int64_t blocks = ceil_div(features, kProductRows);
           const int64_t grain = larger(1, kPairWork / larger(1, cost * kProductRows));
           parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
             const TileConfiguration tiles;
             body(begin * kProductRows, smaller(features, end * kProductRows));
           });
         });
    return;
  }
  // Threads share whole vectors of rows, as in float32.
  const int64_t vectors = ceil_div(op.rows, kLanes<float>);
  const int64_t grain = ceil_div(kPairWork, larger(1, work * kLanes<float>));
  const int64_t block_rows = kPairPanel * larger(1, smaller(kMostPanels, kMostNumel / widest));
  parallel_for(vectors, vectors < 2 * grain ? vectors : grain, [&](int64_t begin, int64_t end) {
    Arena own(Scratch::kTask, Blocks::bytes(widest, block_rows / kPairPanel));
    Blocks memory(widest, block_rows / kPairPanel, own);
    const TileConfiguration tiles;
    const int64_t last = smaller(op.rows, end * kLanes<float>);
    for (int64_t first = begin * kLanes<float>; first < last; first += block_rows) {
      walk(op, layers, affine, first, smaller(block_rows, last - first), memory,
           [](int64_t features, int64_t, const auto& body) { body(0, features); });
    }
  });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
