// Whether what a module's Python objects hold is still what it was at an earlier call: some eighty
// dictionary look-ups, which take 5 us in Python and half a microsecond here.
//
// Only functions of CPython's stable ABI, declared here, so that no Python header is needed and one
// library serves every Python. They are weak: a process without Python loads the library as well.

#include <cstdint>

namespace {

struct Object;  // PyObject
using Size = intptr_t;

struct MethodDef {  // PyMethodDef
  const char* name;
  Object* (*function)(Object* self, Object* const* arguments, Size count);
  int flags;
  const char* doc;
};
constexpr int kFastCall = 0x0080;  // METH_FASTCALL

}  // namespace

extern "C" {
#define FUSED_MLP_PYTHON __attribute__((weak, visibility("default")))
FUSED_MLP_PYTHON Object* PyCFunction_NewEx(MethodDef*, Object*, Object*);
FUSED_MLP_PYTHON Object* PyBool_FromLong(long);
FUSED_MLP_PYTHON Object* PyTuple_GetItem(Object*, Size);
FUSED_MLP_PYTHON Size PyTuple_Size(Object*);
FUSED_MLP_PYTHON Object* PyDict_GetItemWithError(Object*, Object*);
FUSED_MLP_PYTHON Size PyDict_Size(Object*);
FUSED_MLP_PYTHON int PyDict_Next(Object*, Size*, Object**, Object**);
FUSED_MLP_PYTHON Object* PyObject_Type(Object*);
FUSED_MLP_PYTHON void Py_DecRef(Object*);
FUSED_MLP_PYTHON void PyErr_Clear();
FUSED_MLP_PYTHON Object* PyErr_Occurred();
#undef FUSED_MLP_PYTHON
}

namespace {

// Calls holds(first, second, …) on the entries of a flat tuple, kEach at a time, until one does
// not.
template <int kEach, class Holds>
bool all_hold(Object* entries, const Holds& holds) {
  const Size size = PyTuple_Size(entries);
  for (Size i = 0; i + kEach <= size; i += kEach) {
    Object* entry[kEach];
    for (int j = 0; j < kEach; ++j) entry[j] = PyTuple_GetItem(entries, i + j);
    if (!holds(entry)) return false;
  }
  return size >= 0;
}

bool holds_in_order(Object* dict, Object* values) {
  const Size count = PyTuple_Size(values);
  if (PyDict_Size(dict) != count) return false;
  Size position = 0;
  Object *key, *value;
  for (Size i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    if (value != PyTuple_GetItem(values, i)) return false;
  }
  return true;
}

bool is_of_type(Object* object, Object* type) {
  Object* actual = PyObject_Type(object);
  Py_DecRef(actual);
  return actual == type;
}

// unchanged(snapshot, modules): fused_mlp/modules/snapshot.py says what a snapshot holds.
Object* unchanged(Object*, Object* const* arguments, Size count) {
  if (count != 2) return PyBool_FromLong(0);
  Object* snapshot = arguments[0];
  const auto part = [&](Size i) { return PyTuple_GetItem(snapshot, i); };
  const bool same =
      holds_in_order(arguments[1], part(0)) &&
      all_hold<2>(part(1), [](Object** e) { return is_of_type(e[0], e[1]); }) &&
      all_hold<3>(part(2),
                  [](Object** e) { return PyDict_GetItemWithError(e[0], e[1]) == e[2]; }) &&
      all_hold<2>(part(3),
                  [](Object** e) { return PyDict_GetItemWithError(e[0], e[1]) == nullptr; }) &&
      all_hold<1>(part(4), [](Object** e) { return PyDict_Size(e[0]) == 0; }) &&
      all_hold<2>(part(5), [](Object** e) {
        Object* found = PyDict_GetItemWithError(e[0], e[1]);
        return found != nullptr && PyDict_Size(found) == 0;
      });
  if (PyErr_Occurred() != nullptr) {  // something was no dictionary
    PyErr_Clear();
    return PyBool_FromLong(0);
  }
  return PyBool_FromLong(same);
}

}  // namespace

// The function `unchanged`, as a new Python object.
extern "C" __attribute__((visibility("default"))) Object* fused_mlp_unchanged() {
  static MethodDef method = {"unchanged", unchanged, kFastCall, nullptr};
  return PyCFunction_NewEx(&method, nullptr, nullptr);
}
