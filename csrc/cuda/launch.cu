// See launch.h.
#include "launch.h"

#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

namespace fused_mlp::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr uint32_t kSharedBytesWithoutOptIn = 48 * 1024;

std::atomic<LaunchHook> launch_hook{nullptr};
Device hook_device{132, 232448, 233472, 90};

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, index);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  return value;
}

void check(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here; it must not surface again in a later call
  throw std::runtime_error(std::string("fused_mlp: launching ") + kernel + ": " +
                           cudaGetErrorString(status));
}

}  // namespace

bool simulated() { return launch_hook.load(std::memory_order_relaxed) != nullptr; }

const Device& device(int index) {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> once;
  if (simulated()) return hook_device;
  if (index < 0 || index >= kMaxDevices) throw std::runtime_error("fused_mlp: bad device index");
  std::call_once(once[index], [index] {
    devices[index] = {attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
                      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                          attribute(cudaDevAttrComputeCapabilityMinor, index)};
  });
  return devices[index];
}

void launch_raw(const Launch& launch, const void* function, cudaStream_t stream) {
  if (const LaunchHook hook = launch_hook.load(std::memory_order_relaxed)) {
    if (hook(&launch) != 0)
      throw std::runtime_error(std::string("fused_mlp: the launch hook refused ") + launch.kernel);
    return;
  }
  if (launch.shared_bytes > kSharedBytesWithoutOptIn)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(launch.shared_bytes)),
          launch.kernel);
  void* arguments[] = {const_cast<void*>(launch.parameters)};
  check(cudaLaunchKernel(function, dim3(launch.grid[0], launch.grid[1], launch.grid[2]),
                         dim3(launch.block[0], launch.block[1], launch.block[2]), arguments,
                         launch.shared_bytes, stream),
        launch.kernel);
  check(cudaGetLastError(), launch.kernel);
}

}  // namespace fused_mlp::cuda

extern "C" __attribute__((visibility("default"))) void fused_mlp_cuda_set_launch_hook(
    fused_mlp::cuda::LaunchHook hook, const fused_mlp::cuda::Device* device) {
  if (device != nullptr) fused_mlp::cuda::hook_device = *device;
  fused_mlp::cuda::launch_hook.store(hook);
}
