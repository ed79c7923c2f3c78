// Whether what modules' Python objects hold is still what it was at an earlier call: some eighty
// dictionary look-ups, which take 5 us in Python and half a microsecond here. See
// fused_mlp/modules/snapshot.py.
//
// Only functions of CPython's stable ABI, declared here, so that no Python header is needed and one
// library serves every Python. They are weak: a process without Python loads the library as well.

#include <cstddef>
#include <cstdint>
#include <vector>

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
FUSED_MLP_PYTHON Object* PyCapsule_New(void*, const char*, void (*)(Object*));
FUSED_MLP_PYTHON void* PyCapsule_GetPointer(Object*, const char*);
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

enum class Kind { kClass, kSame, kAbsent, kEmpty, kEmptyValue };

struct Entry {
  Kind kind;
  Object *object, *key, *value;
  Size place;  // where the key stood in the dictionary
};

Size place_of(Object* dict, Object* key) {
  Size place = 0;
  Object *found, *value;
  for (Size next = 0; PyDict_Next(dict, &next, &found, &value); place = next) {
    if (found == key) return place;
  }
  return 0;
}

// The value of a key, looked for first where the key stood: no hashing, a third of the time.
Object* value_of(const Entry& entry) {
  Size place = entry.place;
  Object *key, *value;
  if (PyDict_Next(entry.object, &place, &key, &value) && key == entry.key) return value;
  return PyDict_GetItemWithError(entry.object, entry.key);
}

// A snapshot as an array. References are borrowed: owned ones would hide circles from Python's
// garbage collector.
struct Watched {
  std::vector<Object*> children;
  std::vector<Entry> entries;
  std::vector<Object*> overrides, hooks;
};
constexpr char kName[] = "fused_mlp.Watched";

std::vector<Object*> items(Object* tuple) {
  std::vector<Object*> found;
  for (Size i = 0; i < PyTuple_Size(tuple); ++i) found.push_back(PyTuple_GetItem(tuple, i));
  return found;
}

bool is_of_class(Object* object, Object* type) {
  Object* actual = PyObject_Type(object);
  Py_DecRef(actual);
  return actual == type;
}

bool is_empty(Object* dict) { return dict != nullptr && PyDict_Size(dict) == 0; }

bool holds(const Entry& entry) {
  switch (entry.kind) {
    case Kind::kClass:
      return is_of_class(entry.object, entry.value);
    case Kind::kSame:
      return value_of(entry) == entry.value;
    case Kind::kAbsent:
      return PyDict_GetItemWithError(entry.object, entry.key) == nullptr;
    case Kind::kEmpty:
      return is_empty(entry.object);
    case Kind::kEmptyValue:
      return is_empty(value_of(entry));
  }
  return false;
}

bool holds_in_order(Object* dict, const std::vector<Object*>& values) {
  if (PyDict_Size(dict) != static_cast<Size>(values.size())) return false;
  Size position = 0;
  Object *key, *value;
  for (std::size_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    if (value != values[i]) return false;
  }
  return true;
}

bool runs_as_written(Object* container, const Watched& watched) {
  for (Object* key : watched.overrides) {
    if (PyDict_GetItemWithError(container, key) != nullptr) return false;
  }
  for (Object* key : watched.hooks) {
    if (!is_empty(PyDict_GetItemWithError(container, key))) return false;
  }
  return true;
}

// unchanged(modules, *containers)
Object* unchanged(Object* self, Object* const* arguments, Size count) {
  const auto* watched = static_cast<const Watched*>(PyCapsule_GetPointer(self, kName));
  bool same = watched != nullptr && count > 0 && holds_in_order(arguments[0], watched->children);
  for (std::size_t i = 0; same && i < watched->entries.size(); ++i)
    same = holds(watched->entries[i]);
  for (Size i = 1; same && i < count; ++i) same = runs_as_written(arguments[i], *watched);
  if (PyErr_Occurred() != nullptr) {  // something was no dictionary
    PyErr_Clear();
    same = false;
  }
  return PyBool_FromLong(same);
}

// watch(snapshot): the function `unchanged`.
Object* watch(Object*, Object* const* arguments, Size) {
  auto* watched = new Watched;
  const std::vector<Object*> parts = items(arguments[0]);
  watched->children = items(parts[0]);
  const auto add = [&](Kind kind, Object* part, std::size_t each) {
    const std::vector<Object*> flat = items(part);
    for (std::size_t i = 0; i + each <= flat.size(); i += each) {
      // (object), (dict, key) or (dict, key, value); (object, class) for kClass
      Object* second = each > 1 ? flat[i + 1] : nullptr;
      Object* third = each > 2 ? flat[i + 2] : second;
      const bool in_dict = kind == Kind::kSame || kind == Kind::kEmptyValue;
      const Size place = in_dict ? place_of(flat[i], second) : 0;
      watched->entries.push_back({kind, flat[i], second, third, place});
    }
  };
  // What changes most comes first.
  add(Kind::kSame, parts[2], 3);
  add(Kind::kClass, parts[1], 2);
  add(Kind::kAbsent, parts[3], 2);
  add(Kind::kEmpty, parts[4], 1);
  add(Kind::kEmptyValue, parts[5], 2);
  watched->overrides = items(parts[6]);
  watched->hooks = items(parts[7]);
  static MethodDef method = {"unchanged", unchanged, kFastCall, nullptr};
  Object* capsule = PyCapsule_New(watched, kName, [](Object* capsule) {
    delete static_cast<Watched*>(PyCapsule_GetPointer(capsule, kName));
  });
  Object* function = PyCFunction_NewEx(&method, capsule, nullptr);
  Py_DecRef(capsule);
  return function;
}

}  // namespace

// The function `watch`, as a new Python object.
extern "C" __attribute__((visibility("default"))) Object* fused_mlp_watch() {
  static MethodDef method = {"watch", watch, kFastCall, nullptr};
  return PyCFunction_NewEx(&method, nullptr, nullptr);
}
