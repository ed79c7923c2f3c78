// The dropout mask: a pure function of (seed, stream, row, column), the same on every backend.
//
// Philox4x32-10 (Salmon et al., SC 2011) with
//     key     = (lo32(seed[0]), hi32(seed[0]))
//     counter = (lo32(row), hi32(row), column / 8, lo32(seed[1] + stream))
// gives four words for eight neighbouring columns: column 8 g + j takes word j / 2, its low half
// for even j and its high half for odd j. An element is kept when its 16-bit number reaches
// threshold(p) = round_half_even(p * 65536).
//
// Host and device. Everything has internal linkage, because the file is compiled into translation
// units of different instruction sets and the linker must never merge their copies.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_MLP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_MLP_HOST_DEVICE inline
#endif

namespace fused_mlp::philox {

constexpr uint32_t kMultiplier0 = 0xD2511F53u;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;
constexpr int kColumnsPerGroup = 8;

// What is common to every element of one dropout layer of one call.
struct Stream {
  uint32_t key0, key1;  // the two halves of seed[0]
  uint32_t counter3;    // lo32(seed[1] + stream)
};

// The random bits of eight neighbouring columns of one row.
struct Group {
  uint32_t words[4];
};

// The stream of layer `stream` (0 for linear_relu) under the two numbers of the seed tensor.
static FUSED_MLP_HOST_DEVICE Stream make_stream(int64_t key, int64_t offset, uint32_t stream) {
  const uint64_t bits = static_cast<uint64_t>(key);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
          static_cast<uint32_t>(static_cast<uint64_t>(offset)) + stream};
}

// One round-ten Philox block.
static FUSED_MLP_HOST_DEVICE Group block(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                         uint32_t k0, uint32_t k1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The bits of columns 8 group … 8 group + 7 of a row.
static FUSED_MLP_HOST_DEVICE Group draw(const Stream& stream, int64_t row, uint32_t group) {
  const uint64_t bits = static_cast<uint64_t>(row);
  return block(static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), group,
               stream.counter3, stream.key0, stream.key1);
}

// The 16-bit number of column j (0 … 7) of a group.
static FUSED_MLP_HOST_DEVICE uint32_t number(const Group& group, int j) {
  return (group.words[j >> 1] >> (16 * (j & 1))) & 0xFFFFu;
}

// Whether column j (0 … 7) of a group survives.
static FUSED_MLP_HOST_DEVICE bool keep(const Group& group, int j, uint32_t threshold) {
  return number(group, j) >= threshold;
}

// The 16-bit threshold of a dropout probability in [0, 1]: 0 keeps all, 65536 none. Host only;
// nearbyint rounds halves to even in the default rounding mode, as Python's round() does.
static inline uint32_t threshold(double probability) {
  return static_cast<uint32_t>(std::nearbyint(probability * 65536.0));
}

}  // namespace fused_mlp::philox
