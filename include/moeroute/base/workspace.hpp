// Memory: `buffer` (one array that only grows), `scratch` (the tape that measures and carves) and
// `workspace`.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include <moeroute/base/config.hpp>
#include <moeroute/base/contract.hpp>
#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void fail_memory(index_t n, index_t size) {
  fail("buffer",
       {"room for ", n, " values of ", size, " bytes is asked for, more than any machine has"});
}

// What a buffer does whatever its values are: once in a program.
class buffer_memory {
 public:
  buffer_memory() = default;
  buffer_memory(const buffer_memory&) = delete;
  buffer_memory(buffer_memory&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  buffer_memory& operator=(const buffer_memory&) = delete;
  MOEROUTE_OUT_OF_LINE buffer_memory& operator=(buffer_memory&& other) noexcept {
    buffer_memory taken(std::move(other));
    std::swap(memory_, taken.memory_);
    std::swap(size_, taken.size_);
    std::swap(capacity_, taken.capacity_);
    return *this;
  }
  ~buffer_memory() { release(); }

  // Not cold: whoever owns a buffer would be, since its life ends here.
  MOEROUTE_OUT_OF_LINE void release() noexcept {
    ::operator delete(memory_, std::align_val_t{alignment});
    memory_ = nullptr;
    size_ = capacity_ = 0;
  }
  // Room for n values instead of what there is.
  MOEROUTE_COLD void grow(index_t n, index_t value_bytes) {
    release();  // what is left if there is no memory: an empty array
    const index_t bytes = size_product(n, value_bytes);
    if (bytes > max_bytes) fail_memory(n, value_bytes);
    memory_ = ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{alignment});
    capacity_ = n;
  }

  void* memory_ = nullptr;
  index_t size_ = 0;
  index_t capacity_ = 0;
};

}  // namespace detail

/// An aligned array of plain values that grows and never shrinks, so that a warm call allocates
/// nothing.
///
/// Cost: resize() allocates only where n exceeds every earlier n; contents are lost when it does.
template <class T>
class buffer {
  static_assert(std::is_trivially_copyable_v<T>, "[moeroute::buffer] holds plain values only");

 public:
  buffer() = default;
  explicit buffer(index_t n) { resize(n); }
  buffer(const buffer& other) { *this = other; }
  buffer(buffer&& other) noexcept = default;
  buffer& operator=(const buffer& other) {
    if (this != &other) {
      resize(other.size());
      std::copy_n(other.data(), other.size(), data());
    }
    return *this;
  }
  buffer& operator=(buffer&& other) noexcept = default;

  /// Makes room for n values, their contents unspecified. Throws: std::bad_alloc where there is no
  /// memory for them, error where no machine has so much; the buffer is empty then.
  void resize(index_t n) {
    MOEROUTE_EXPECTS(n >= 0);
    if (n > held_.capacity_) [[unlikely]]
      held_.grow(n, sizeof(T));
    held_.size_ = n;
  }

  T* data() { return static_cast<T*>(held_.memory_); }
  const T* data() const { return static_cast<const T*>(held_.memory_); }
  index_t size() const { return held_.size_; }
  index_t capacity() const { return held_.capacity_; }
  T& operator[](index_t i) { return data()[i]; }
  const T& operator[](index_t i) const { return data()[i]; }
  operator std::span<T>() { return {data(), static_cast<std::size_t>(size())}; }
  operator std::span<const T>() const { return {data(), static_cast<std::size_t>(size())}; }

 private:
  detail::buffer_memory held_;
};

/// A tape over raw memory. Over no memory it only measures: the same carving code serves both.
class scratch {
 public:
  scratch() = default;
  /// Over so many bytes: what does not fit is measured.
  explicit scratch(std::byte* memory, index_t room = max_bytes) : memory_(memory), room_(room) {}

  /// The next n values, aligned to a cache line; nullptr where there is no room for them. No value
  /// needs none: what few routers ask for costs the others no call.
  template <class T>
  T* take(index_t n) {
    MOEROUTE_EXPECTS(n >= 0);
    if (n == 0) return reinterpret_cast<T*>(memory_);
    return static_cast<T*>(take_values(n, sizeof(T)));
  }

  /// Bytes asked for so far.
  index_t used() const { return used_; }

 private:
  MOEROUTE_OUT_OF_LINE void* take_values(index_t n, index_t value_bytes) {
    const index_t bytes = size_product(n, value_bytes);
    std::byte* const at = bytes > room_ - used_ ? nullptr : memory_ + used_;
    // A measure that no machine can hold stays one, and the buffer refuses it.
    used_ = bytes > max_bytes - used_ ? max_bytes + 1
                                      : used_ + round_up(bytes, static_cast<index_t>(alignment));
    return at;
  }

  std::byte* memory_ = nullptr;
  index_t room_ = 0;
  index_t used_ = 0;
};

/// Reusable scratch memory of one caller. Not to be shared between threads that run at the same
/// time.
/// Example:
///
///     workspace ws;                      // one per thread that routes; kept from call to call
///     route(r, logits, ws, choices);     // the first call allocates, those after it do not
class workspace {
 public:
  /// Runs `layout(scratch&)` and returns what it returns; where there was no room for all of it,
  /// that was the measure, and it runs once more. What the previous carve handed out is void.
  ///
  /// Cost: allocates only where the measure exceeds every earlier one.
  template <class Layout>
  auto carve(Layout&& layout) {
    for (;;) {
      scratch tape(memory_.data(), memory_.capacity());
      auto parts = layout(tape);
      if (tape.used() <= memory_.capacity()) [[likely]]
        return parts;
      memory_.resize(tape.used());
    }
  }

  /// Bytes held.
  index_t capacity() const { return memory_.capacity(); }

 private:
  buffer<std::byte> memory_;
};

}  // namespace moeroute
