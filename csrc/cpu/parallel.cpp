#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace fused_mlp {

namespace {

// ThreadSanitizer sees no barrier of torch's OpenMP, which is not compiled for it, and has to be
// told the order they make: what the caller did comes before its tasks, and they before what it
// does next. One task and another have none, hence a mark for each: with one alone, the end of a
// task would seem to come before the beginning of a later one. Of a mark only the address counts.
#if defined(__SANITIZE_THREAD__)
void comes_before(const char& mark) { __tsan_release(const_cast<char*>(&mark)); }
void comes_after(const char& mark) { __tsan_acquire(const_cast<char*>(&mark)); }
#else
void comes_before(const char&) {}
void comes_after(const char&) {}
#endif

struct Tasks {
  void (*body)(int64_t, int64_t, void*);
  void* context;
  char begun = 0, ended = 0;

  void operator()(int64_t begin, int64_t end) const {
    comes_after(begun);  // the members are read behind it: the caller wrote them
    body(begin, end, context);
    comes_before(ended);
  }
};

}  // namespace

void parallel_for_impl(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                       void* context) {
  const Tasks tasks{body, context};
  comes_before(tasks.begun);
  torch::stable::parallel_for(0, count, grain, tasks);
  comes_after(tasks.ended);
}

void advise_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLarge = size_t{4} << 20;  // at least one whole large page of 2 MiB
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  // No matter if it is refused.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Buffer {
  std::unique_ptr<void, Free> memory;
  size_t size = 0;
};

// A few small blocks are kept for the next call: faulting their pages in again took a tenth of a
// backward of (128,[256,256],10) at 256 rows.
constexpr size_t kKeptBytes = size_t{2} << 20;
constexpr size_t kHeader = 64;  // before a block: its size
thread_local Buffer kept[4];

}  // namespace

void* allocate(size_t bytes) {
  const size_t size = (bytes + 63) / 64 * 64 + kHeader;
  for (Buffer& buffer : kept) {
    if (buffer.size < size) continue;
    buffer.size = 0;
    return static_cast<char*>(buffer.memory.release()) + kHeader;
  }
  char* memory = static_cast<char*>(std::aligned_alloc(64, size));
  if (memory == nullptr) throw std::bad_alloc();
  std::memcpy(memory, &size, sizeof(size));
  advise_large_pages(memory, size);
  return memory + kHeader;
}

void release(void* memory) {
  if (memory == nullptr) return;
  std::unique_ptr<void, Free> block(static_cast<char*>(memory) - kHeader);
  size_t size;
  std::memcpy(&size, block.get(), sizeof(size));
  for (Buffer& buffer : kept) {
    if (size > kKeptBytes || buffer.size >= size) continue;
    buffer.memory.swap(block);
    std::swap(buffer.size, size);
    return;
  }
}

void* scratch(Scratch use, size_t bytes) {
  thread_local Buffer buffers[3];
  Buffer& buffer = buffers[static_cast<int>(use)];
  // A quarter more than asked, so that a growing batch does not allocate at every step.
  if (bytes > buffer.size) {
    const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.memory.reset();
    buffer.size = 0;
    buffer.memory.reset(std::aligned_alloc(64, size));
    if (!buffer.memory) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.memory.get();
}

}  // namespace fused_mlp
