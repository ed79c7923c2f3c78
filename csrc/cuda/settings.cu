// See settings.h.
#include "settings.h"

#include <dlfcn.h>

namespace fused_mlp::cuda {
namespace {

// torch has no stable C interface to this setting, and what Python passed on would be out of date
// in a compiled graph. So at::globalContext().float32MatmulPrecision(), an int whose 0 has been
// "highest" ever since it exists, is looked up in the library that torch has loaded; in a torch
// that has it no more, products of float32 stay exact.
using GlobalContext = const void* (*)();
using MatmulPrecision = int (*)(const void*);

template <class Function>
Function find(const char* name) {
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
}

}  // namespace

bool allow_tf32() {
  static const auto context = find<GlobalContext>("_ZN2at13globalContextEv");
  static const auto precision = find<MatmulPrecision>("_ZNK2at7Context22float32MatmulPrecisionEv");
  if (context == nullptr || precision == nullptr) return false;
  try {
    return precision(context()) != 0;
  } catch (...) {  // torch refuses to answer where its old and new settings contradict each other
    return false;
  }
}

}  // namespace fused_mlp::cuda
