// Threads and scratch memory for the kernels, without a torch header: the kernels are compiled for
// several instruction sets, and inline functions of a shared header could be merged across them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_mlp {

// Calls body(begin, end, context) over [0, count) on torch's threads; `grain` or fewer per call
// run on the calling thread.
void parallel_for_impl(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                       void* context);

template <class Body>
inline void parallel_for(int64_t count, int64_t grain, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  grain = 1;  // the tests' small shapes shall take several threads as well
#endif
  if (count <= grain) {  // spares a small call the way through torch, 0.2 us
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  parallel_for_impl(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// Asks the system to back memory with large pages. It takes large blocks back when they are freed,
// and faulting a fresh one in by 4 KiB takes 1 us each, ten times as long as writing it: a copy
// into 400 MB of fresh memory took 116 ms, with large pages 21.
void advise_large_pages(void* memory, size_t bytes);

// The number of threads torch would use here; 1 inside a parallel region.
int64_t thread_count();

// Memory that lives until the same thread asks again: kCall for what the threads of a call share
// (asked for by the calling thread), kTask for the private blocks of a task, kPartial for the
// partial sums of a reduction inside a call. 64-byte aligned.
enum class Scratch { kCall, kTask, kPartial };
void* scratch(Scratch use, size_t bytes);

// Hands out consecutive 64-byte aligned arrays of one scratch area. Count first, then take.
class Arena {
 public:
  explicit Arena(Scratch use, size_t bytes) : next_(static_cast<char*>(scratch(use, bytes))) {}

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return array;
  }

  template <class T>
  static size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* next_;
};

// An uninitialized array for the length of a call, where scratch memory would be kept for too long.
void* allocate(size_t bytes);
void release(void* memory);

template <class T>
class Temporary {
 public:
  Temporary() = default;
  explicit Temporary(int64_t count)
      : data_(count > 0 ? static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)))
                        : nullptr) {}
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  ~Temporary() { release(data_); }

  void swap(Temporary& other) {
    T* mine = data_;
    data_ = other.data_;
    other.data_ = mine;
  }

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace fused_mlp
