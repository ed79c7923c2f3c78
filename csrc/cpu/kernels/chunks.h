// How rows are shared out.
//
// Where partial sums are merged, rows are cut into chunks whose number depends on the size alone,
// never on the threads, so that every run gives the same bits on any number of them. Where rows
// are independent, blocks go to whichever thread is free.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/vec.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Rows worked on at a time, whole register tiles: with 256 columns a block is 60 kB, a few of them
// fit a core's L2.
constexpr int64_t kBlockRows = 64 / tile_rows(kTileVectors) * tile_rows(kTileVectors);
// Up to this width a layer's weight and a block of its rows lie in the cache together. Wider layers
// are cut into blocks (blocked_gemm.h), a network with one runs layer by layer.
constexpr int64_t kCacheWidth = 256;
// Multiply-adds worth handing to a second thread: about 8 us of work, against 2 us to wake it.
constexpr int64_t kThreadWork = int64_t{1} << 18;
// One element of a pass over memory costs about as much as this many multiply-adds.
constexpr int64_t kPassCost = 16;
constexpr int64_t kMaxChunks = 16;
// Fewest rows of a chunk that sums a value a column: merging the sums of 4 rows of 4096 columns
// took as long as adding them up.
constexpr int64_t kLeastRows = 16;

// Chunks for `rows` rows of `work` multiply-adds each: a power of two, so two threads share evenly,
// of at least `least` rows, so that merging their sums stays a small part.
FUSED_MLP_INLINE int64_t chunk_count(int64_t rows, int64_t work, int64_t least) {
  int64_t chunks = 1;
  while (chunks < kMaxChunks && rows >= 2 * chunks * least &&
         static_cast<double>(rows) * static_cast<double>(work) >= 2.0 * chunks * kThreadWork) {
    chunks *= 2;
  }
  return chunks;
}

// Chunks of rows that are multiplied by weights. Each has sums of every weight's gradient of its
// own, which cost as much to write and to merge as 10 to 20 rows: (128,[256,256],10) goes backward
// through 4096 rows in 3.6 ms by 16 chunks and in 3.4 by 8. Two threads are worth that from 32 rows
// each on, c chunks from 32 c^2 rows in all.
FUSED_MLP_INLINE int64_t product_chunk_count(int64_t rows, int64_t work) {
  const int64_t most = chunk_count(rows, work, 32);
  int64_t chunks = smaller(2, most);
  while (2 * chunks <= most && rows >= 128 * chunks * chunks) chunks *= 2;
  return chunks;
}

// The first row of a chunk; chunks differ by at most one row.
FUSED_MLP_INLINE int64_t chunk_begin(int64_t rows, int64_t chunks, int64_t chunk) {
  return rows / chunks * chunk + smaller(rows % chunks, chunk);
}

// Calls body(chunk, begin, end) for every chunk of the rows.
template <class Body>
inline void for_chunks(int64_t rows, int64_t chunks, const Body& body) {
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, chunk_begin(rows, chunks, chunk), chunk_begin(rows, chunks, chunk + 1));
    }
  });
}

// A block of rows, how many rows the one behind it has, and whether it is the first.
struct RowBlock {
  int64_t first, rows, next;
  bool begins;

  int64_t end() const { return first + rows; }
};

// Calls body(block) for the blocks of rows begin … end - 1.
template <class Body>
FUSED_MLP_INLINE void for_blocks(int64_t begin, int64_t end, const Body& body) {
  for (int64_t first = begin; first < end; first += kBlockRows) {
    const int64_t rows = smaller(kBlockRows, end - first);
    body(RowBlock{first, rows, smaller(kBlockRows, end - first - rows), first == begin});
  }
}

// Calls body(first, rows) for blocks of independent rows of `work` multiply-adds each.
template <class Body>
inline void for_row_blocks(int64_t rows, int64_t work, const Body& body) {
  const int64_t grain = larger(1, kThreadWork / larger(1, work));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for_blocks(begin, end, [&](const RowBlock& block) { body(block.first, block.rows); });
  });
}

// Calls body(first, rows) for blocks of rows that fill about 64 kB.
template <class Body>
FUSED_MLP_INLINE void for_some_rows(int64_t begin, int64_t end, int64_t columns, const Body& body) {
  const int64_t most = larger(1, smaller(kBlockRows, (int64_t{1} << 14) / larger(1, columns)));
  for (int64_t first = begin; first < end; first += most) {
    body(first, smaller(most, end - first));
  }
}

// The same for a second pass over rows of `bytes` bytes: what the first one read last is still in
// the cache, so a thread's last rows come first. By 1 MiB, since shorter jumps back lose what the
// processor reads ahead: normalize of 10^7 elements took 2.1 ms in place of 1.45 by 16 KiB.
template <class Body>
inline void for_rows_backwards(int64_t rows, int64_t bytes, int64_t work, const Body& body) {
  const int64_t run = larger(1, (int64_t{1} << 20) / larger(1, bytes));
  parallel_for(rows, larger(1, kThreadWork / larger(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t last = end; last > begin; last -= run) {
      const int64_t first = larger(begin, last - run);
      body(first, last - first);
    }
  });
}

}  // namespace fused_mlp::FUSED_MLP_ISA
