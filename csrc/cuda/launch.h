// Kernel launches: the one place where a grid, a block, shared memory and arguments meet a kernel.
//
// Every kernel takes one parameter, a struct by value. `launch` starts it on a stream, or hands
// the launch to a hook if one is set: tests and tools set one to execute or to count exactly what
// production would run, without a GPU (see docs/cuda.md).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

namespace fused_mlp::cuda {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDTypes = 4;

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Bytes of the type that sums are kept in.
inline int64_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// A piece of memory that a launch touches, for the hook: what a checker may let it read and write.
struct Extent {
  enum Use : int64_t { kRead = 0, kWrite = 1, kReadWrite = 2 };
  const void* data;
  int64_t bytes;
  int64_t use;
};

// One launch as the hook sees it. Plain C layout; ctypes reads it.
struct Launch {
  const char* kernel;
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  uint32_t parameter_bytes;
  const void* parameters;
  const Extent* extents;
  int64_t extent_count;
};

// What launch plans need to know of a device.
struct Device {
  int32_t multiprocessors;
  int32_t shared_bytes_per_block;  // with opt-in
  int32_t shared_bytes_per_multiprocessor;
  int32_t capability;  // 10 * major + minor
};

// Returns 0, or anything else to make the launch fail.
using LaunchHook = int (*)(const Launch*);

// The device's properties (read once a device), or the hook's.
const Device& device(int index);

// Whether launches go to a hook, on memory of the host.
bool simulated();

// A kernel under the name that profilers, reports and hooks see.
template <class Parameters>
struct Kernel {
  const char* name;
  void (*function)(Parameters);
};

// Throws std::runtime_error naming the kernel if the launch is refused.
void launch_raw(const Launch& launch, const void* function, cudaStream_t stream);

template <class Parameters>
void launch(const Kernel<Parameters>& kernel, dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const Parameters& parameters,
            std::initializer_list<Extent> extents) {
  const Launch record = {kernel.name,
                         {grid.x, grid.y, grid.z},
                         {block.x, block.y, block.z},
                         static_cast<uint32_t>(shared_bytes),
                         static_cast<uint32_t>(sizeof(Parameters)),
                         &parameters,
                         extents.begin(),
                         static_cast<int64_t>(extents.size())};
  launch_raw(record, reinterpret_cast<const void*>(kernel.function), stream);
}

}  // namespace fused_mlp::cuda

// The name and address of an extern "C" kernel.
#define FUSED_MLP_KERNEL(name) {#name, &name}

extern "C" {
// Sends launches to `hook` instead of a GPU, on a device with these properties; null undoes it.
void fused_mlp_cuda_set_launch_hook(fused_mlp::cuda::LaunchHook hook,
                                    const fused_mlp::cuda::Device* device);
}
