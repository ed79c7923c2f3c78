// What products of pairs take and put out, and how work is cut and shared: by dot products of
// vectors (dots.h) or by tiles (tiles.h).
#pragma once

#include <limits>

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/gemm.h"

namespace fused_mlp::FUSED_MLP_ISA {

// kPairGroup: pairs a product takes at a time. kRowGroup: rows it puts out. kProductRows: of a
// block of the result.
// kPairRows: rows of a block of a product, whole register tiles.
// kPairWork: multiply-adds worth handing to a second thread, 9 us of work. kElementCost: how many
// of them an element of an operand or a result costs.
// kMostPanels, kMostNumel: panels a weight is multiplied by at a time, and their elements a
// feature. kFeatureWork: multiply-adds of a call from which threads share the features of each
// layer. kReadRows: reading a weight beyond the caches takes as long as multiplying so many rows by
// it. kMostWeight: elements of a single layer's weight up to which the library's product is slower.
#if defined(__AMX_BF16__)
// A tile has 16 rows and takes 16 pairs; two by two of them make a block.
constexpr int64_t kPairGroup = 16, kRowGroup = 16, kProductRows = 32;
// With 128 rows, weights from beyond the L2 cache took a tenth to a sixth longer.
constexpr int64_t kPairRows = 256;
constexpr int64_t kPairWork = 16 * kThreadWork, kElementCost = 64;
// A quarter of an L2 cache of 2 MiB.
constexpr int64_t kMostPanels = 8, kMostNumel = 8192;
constexpr int64_t kFeatureWork = 8 * kPairWork, kReadRows = 64;
// 1024 x 1024 at 1024 rows: 0.7 to 1.6 times the library's speed; 2048 x 2048 at 2048: 0.9.
constexpr int64_t kMostWeight = int64_t{1} << 20;
#else
constexpr int64_t kPairGroup = 1, kRowGroup = 1, kProductRows = kTileRows;
// 230 kB of the left operand and 110 kB of the result are a third of an L2 cache.
constexpr int64_t kPairRows = 112;
// Twice as many multiply-adds as float32's take as long.
constexpr int64_t kPairWork = 2 * kThreadWork, kElementCost = 0;
// While a weight's rows lie in the L1 cache.
constexpr int64_t kMostPanels = 4, kMostNumel = 4096;
constexpr int64_t kFeatureWork = 16 * kPairWork, kReadRows = 0;
constexpr int64_t kMostWeight = std::numeric_limits<int64_t>::max();
#endif

}  // namespace fused_mlp::FUSED_MLP_ISA
