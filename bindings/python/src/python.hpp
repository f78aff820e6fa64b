// What the module's files share: arrays from Python, arrays for Python, words, sentences.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

namespace nb = nanobind;

namespace moeroute_python {

// Caches of experts and placements (systems.cpp).
void bind_systems(nb::module_& m);
// Handlers for JAX, where its headers were found (jax.cpp).
void bind_jax(nb::module_& m);

[[noreturn]] inline void refuse(const std::string& sentence) {
  throw nb::value_error(sentence.c_str());
}

using read_array = nb::ndarray<nb::ro>;
using write_array = nb::ndarray<>;

inline std::string kind_of(nb::handle object) { return nb::type_name(object.type()).c_str(); }

// The array behind an object: kept as long as what is returned, so nobody frees it during a call.
inline read_array array_of(const char* where, const char* name, nb::handle object) {
  read_array array;
  if (!nb::try_cast(object, array, false))
    refuse(std::string("moeroute::") + where + ": " + name + " is " + kind_of(object) +
           ", expected an array (NumPy, or any with DLPack)");
  if (array.device_type() != nb::device::cpu::value)
    refuse(std::string("moeroute::") + where + ": " + name + " is not on the CPU");
  return array;
}

// A list of one kind of element, side by side.
template <class T>
std::span<const T> list_of(const char* where, const char* name, const char* kind,
                           const read_array& array) {
  const bool bytes = sizeof(T) == 1 && array.dtype().bits == 8 && array.dtype().lanes == 1;
  if (array.dtype() != nb::dtype<T>() && !bytes)
    refuse(std::string("moeroute::") + where + ": " + name +
           " has elements of another kind, expected " + kind);
  if (array.size() == 0) return {static_cast<const T*>(array.data()), 0};  // whatever strides say
  std::int64_t size = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) > 1 && array.stride(i) != size)
      refuse(std::string("moeroute::") + where + ": " + name +
             " has gaps, expected elements side by side");
    size *= static_cast<std::int64_t>(array.shape(i));
  }
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(size)};
}

template <class T>
std::span<const T> list_of(const char* where, const char* name, const char* kind,
                           const read_array& array, std::int64_t size) {
  const std::span<const T> list = list_of<T>(where, name, kind, array);
  if (std::ssize(list) != size)
    refuse(std::string("moeroute::") + where + ": " + name + " has " + std::to_string(list.size()) +
           " values, expected " + std::to_string(size));
  return list;
}

// An argument that may be None.
struct optional_array {
  read_array array;
  bool there = false;
  optional_array(const char* where, const char* name, nb::handle object) {
    if (object.is_none()) return;
    array = array_of(where, name, object);
    there = true;
  }
  template <class T>
  const T* list(const char* where, const char* name, const char* kind, std::int64_t size) const {
    return there ? list_of<T>(where, name, kind, array, size).data() : nullptr;
  }
};

// A new array of NumPy's with a copy of the values, or uninitialised.
template <class T>
nb::object new_array(std::initializer_list<std::size_t> shape, const T* from, std::size_t size) {
  auto memory = std::make_unique<T[]>(std::max<std::size_t>(size, 1));
  if (from != nullptr && size > 0) std::memcpy(memory.get(), from, size * sizeof(T));
  T* const data = memory.get();
  nb::capsule owner(memory.release(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(data, shape, owner).cast();
}

template <class T>
nb::object list_array(const T* from, std::int64_t size) {
  const auto n = static_cast<std::size_t>(from == nullptr ? 0 : size);
  return new_array<T>({n}, from, n);
}

template <class T>
nb::object matrix_array(const T* from, std::int64_t rows, std::int64_t cols) {
  const auto r = static_cast<std::size_t>(rows), c = static_cast<std::size_t>(cols);
  return new_array<T>({r, c}, from, r * c);
}

inline std::int32_t word(const char* where, const char* name, const std::string& given,
                         std::initializer_list<const char*> words) {
  std::string all;
  std::int32_t i = 0;
  for (const char* w : words) {
    if (given == w) return i;
    all += (i == 0 ? "" : ", ") + std::string(w);
    ++i;
  }
  refuse(std::string("moeroute::") + where + ": " + name + " is '" + given + "', expected one of " +
         all);
}

}  // namespace moeroute_python
