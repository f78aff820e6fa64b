// What is behind the handles that hold data, the same in every instruction set; and how the structs
// of the C face become views.
#pragma once

#include "kernels.hpp"

#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/base/error.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/data/soft_plan.hpp>
#include <moeroute/exec/callable.hpp>
#include <moeroute/matrix/matrix.hpp>

struct moeroute_assignment : moeroute::sets::handle {
  moeroute::assignment choices;
  moeroute::workspace workspace;
  moeroute::buffer<double> counts;  // of the losses: by expert, then by sequence
};

struct moeroute_plan : moeroute::sets::handle {
  moeroute::dispatch_plan slots;
  moeroute::buffer<std::int32_t> loads;
};

struct moeroute_soft_plan : moeroute::sets::handle {
  moeroute::soft_plan slots;
};

struct moeroute_bias : moeroute::sets::handle {
  moeroute_bias(std::int64_t experts, const moeroute::bias_options& options)
      : handle{moeroute::sets::handle_kind::bias}, controller(experts, options) {}
  moeroute::bias_controller controller;
};

namespace moeroute::sets {

template <class T>
std::span<T> span_of(T* first, std::int64_t size) {
  return {first, first == nullptr ? std::size_t{0} : static_cast<std::size_t>(size)};
}

/// The rows as elements of T; the face has checked pointer, sizes, stride and type.
template <class T>
matrix_view<const T> rows_of(const moeroute_const_matrix& m) {
  return {static_cast<const T*>(m.data), m.rows, m.cols, m.stride};
}
template <class T>
matrix_view<T> rows_of(const moeroute_matrix& m) {
  return {static_cast<T*>(m.data), m.rows, m.cols, m.stride};
}

/// f(element) with a value of the type that a matrix holds.
template <class F>
void with_type(std::int32_t type, F&& f) {
  switch (type) {
    case MOEROUTE_FLOAT: return f(float{});
    case MOEROUTE_BFLOAT16: return f(bfloat16{});
    default: return f(float16{});
  }
}

/// f(from, to) for the pairs that rows are moved between: any type and float, or a type and itself.
template <class F>
void with_types(const char* where, std::int32_t from, std::int32_t to, F&& f) {
  if (from != to && from != MOEROUTE_FLOAT && to != MOEROUTE_FLOAT)
    fail(where, "rows are of two 16-bit types, expected one of them to be float, or both the same");
  with_type(from, [&]<class From>(From a) {
    if (to == MOEROUTE_FLOAT) return f(a, float{});
    if (from == to) return f(a, a);
    if constexpr (std::is_same_v<From, float>) {
      if (to == MOEROUTE_BFLOAT16) return f(a, bfloat16{});
      f(a, float16{});
    }
  });
}

/// The caller's pool, or the calling thread.
class pool {
 public:
  explicit pool(const moeroute_executor* with) : with_(with) {}

  int concurrency() const { return with_ == nullptr ? 1 : with_->threads; }

  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    if (with_ == nullptr || n <= grain) return serial{}.parallel_for(n, grain, f);
    callable_executor(
        [&](index_t, index_t, loop_body body) {
          loop l{&body, n, grain};
          with_->run(with_->pool, n, grain, run_piece, &l);
        },
        with_->threads)
        .parallel_for(n, grain, f);
  }

 private:
  struct loop {
    const loop_body* body;
    index_t n, grain;
  };

  // What a pool asks for decides where results are written: a range that is none of the loop's is
  // not run, and is missing when the pieces are counted.
  static void run_piece(void* data, std::int64_t begin, std::int64_t end) {
    const loop& l = *static_cast<const loop*>(data);
    if (begin >= 0 && begin <= end && end <= l.n && begin % l.grain == 0) (*l.body)(begin, end);
  }

  const moeroute_executor* with_;
};
static_assert(executor<pool>);

/// An enumerator of the C face as ours, which have the same numbers.
template <class Enum>
Enum enum_of(const char* where, const char* what, std::int32_t value, Enum last) {
  check_range(where, what, value, 0, static_cast<index_t>(last));
  return static_cast<Enum>(value);
}

}  // namespace moeroute::sets
