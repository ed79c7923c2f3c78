// How a tensor of any shape and strides maps to the two layouts that standardize.h knows.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace fused_mlp::cuda {

constexpr int kMaxTensors = 3;

// `columns` as in standardize.h; strides in elements, one a tensor.
struct Layout {
  bool columns;
  int64_t outer, middle, inner;
  std::array<int64_t, kMaxTensors> outer_stride, middle_stride;
};

// Finds a layout that serves all tensors at once. `reduced` says which dimensions a group spans;
// `strides` holds one list a tensor, at most three. False where there is none: then contiguous
// copies with the kept dimensions in front always have one. Group k of the layout is the k-th in
// row-major order of the kept dimensions; with `ordered` the elements of a group, those of the rows
// layout segment by segment, are in the order of the reduced ones.
inline bool find_layout(const std::vector<int64_t>& sizes, const std::vector<bool>& reduced,
                        const std::vector<std::vector<int64_t>>& strides, bool ordered,
                        Layout* layout) {
  struct Dimension {
    int64_t size;
    bool reduced;
    std::array<int64_t, kMaxTensors> stride;
    size_t index;
  };
  const size_t tensors = strides.size();
  std::vector<Dimension> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    Dimension dimension = {sizes[d], reduced[d], {}, d};
    for (size_t t = 0; t < tensors; ++t) dimension.stride[t] = strides[t][d];
    order.push_back(dimension);
  }
  std::stable_sort(order.begin(), order.end(), [](const Dimension& a, const Dimension& b) {
    return a.stride[0] > b.stride[0];
  });
  int64_t last[2] = {-1, -1};  // groups are numbered in logical order: kept ones must stay in it
  for (const Dimension& d : order) {
    if (d.reduced && !ordered) continue;
    if (static_cast<int64_t>(d.index) < last[d.reduced]) return false;
    last[d.reduced] = static_cast<int64_t>(d.index);
  }
  std::vector<Dimension> merged;
  for (const Dimension& d : order) {
    bool joins = !merged.empty() && merged.back().reduced == d.reduced;
    for (size_t t = 0; joins && t < tensors; ++t)
      joins = merged.back().stride[t] == d.stride[t] * d.size;
    if (joins) {
      merged.back().size *= d.size;
      merged.back().stride = d.stride;
    } else {
      merged.push_back(d);
    }
  }
  if (!merged.empty()) {
    for (size_t t = 0; t < tensors; ++t)
      if (merged.back().stride[t] != 1) return false;
  }
  // Between the dimension of stride 1 and the others, absent ones have size 1 and stride 0.
  *layout = {};
  layout->outer = layout->middle = layout->inner = 1;
  const auto set_outer = [&](const Dimension& d) {
    layout->outer = d.size;
    layout->outer_stride = d.stride;
  };
  const auto set_middle = [&](const Dimension& d) {
    layout->middle = d.size;
    layout->middle_stride = d.stride;
  };
  if (merged.empty()) return true;
  layout->inner = merged.back().size;
  layout->columns = !merged.back().reduced;
  merged.pop_back();
  // rows: one kept and one reduced dimension may lie outside, in any order. columns likewise.
  bool have_outer = false, have_middle = false;
  for (const Dimension& d : merged) {
    if (d.reduced ? have_middle : have_outer) return false;
    if (d.reduced) {
      set_middle(d);
      have_middle = true;
    } else {
      set_outer(d);
      have_outer = true;
    }
  }
  // Kept dimensions of the columns layout are numbered outer first.
  return true;
}

}  // namespace fused_mlp::cuda
