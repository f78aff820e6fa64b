// Loads: how many choices each expert, sequence or device has. What is counted is always said.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <type_traits>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// Which of a token's choices count.
enum class count_basis {
  all_choices,   ///< all of them
  first_choice,  ///< the best one alone (rank 0); dropped, it is not replaced by the second
};

/// Whether choices that capacity dropped count. An assignment that nothing dropped from is the same
/// under both.
enum class drop_stage {
  before_drop,  ///< they do
  after_drop,   ///< they do not
};

/// What is counted. Biased or unbiased selection is the caller's choice of the assignment.
struct count_options {
  count_basis basis = count_basis::all_choices;
  drop_stage drops = drop_stage::before_drop;
  std::span<const std::uint8_t> mask{};  ///< [T], 0: the token does not count; empty: all do
};

namespace detail {

// f(expert) for every choice of one token that counts.
template <class F>
void for_each_counted(const assignment& a, const count_options& what, index_t token, F&& f) {
  if (!what.mask.empty() && what.mask[static_cast<std::size_t>(token)] == 0) return;
  const auto ids = a.ids(token);
  const std::size_t n =
      what.basis == count_basis::first_choice ? std::min<std::size_t>(1, ids.size()) : ids.size();
  for (std::size_t r = 0; r < n; ++r) {
    if (ids[r] == no_expert) continue;
    const index_t choice = a.first(token) + static_cast<index_t>(r);
    if (what.drops == drop_stage::before_drop || a.kept(choice)) f(index_t{ids[r]});
  }
}

template <class A = simd::default_arch>
void check_counted(const char* where, const assignment& a, const count_options& what) {
  if (!what.mask.empty())
    check_size(where, "mask.size", static_cast<index_t>(what.mask.size()), a.tokens());
  check_choices<A>(where, a);
}

}  // namespace detail

/// counts[e] = choices of expert e.
///
/// Shapes: counts [E]. Throws: error where a size differs or an id is outside [-1, E). Cost: O(T k
/// + E). No allocation. Determinism: exact up to 2^24 in float, 2^53 in double.
/// Example:
///
///     std::vector<std::int64_t> load(8);
///     count_choices(choices, {.basis = count_basis::first_choice}, std::span(load));
template <class N, class A = simd::default_arch>
  requires std::is_arithmetic_v<N>
void count_choices(const assignment& a, const count_options& what, std::span<N> counts) {
  check_size("count_choices", "counts.size", static_cast<index_t>(counts.size()), a.experts());
  detail::check_counted<A>("count_choices", a, what);
  std::fill(counts.begin(), counts.end(), N{0});
  for (index_t t = 0; t < a.tokens(); ++t)
    detail::for_each_counted(a, what, t,
                             [&](index_t e) { counts[static_cast<std::size_t>(e)] += N{1}; });
}

/// counts(s, e) = choices of expert e by the tokens [s * length, (s + 1) * length).
///
/// Shapes: counts [ceil(T / length), E]; the last sequence may be shorter. Throws: error where a
/// size differs or length < 1. Cost: O(T k + sequences * E). No allocation.
template <class N, class A = simd::default_arch>
  requires std::is_arithmetic_v<N>
void count_choices_by_sequence(const assignment& a, const count_options& what, index_t length,
                               matrix_view<N> counts) {
  constexpr const char* where = "count_choices_by_sequence";
  check_range(where, "length", length, 1, index_t{1} << 40);
  check_size(where, "counts.rows", counts.rows, ceil_div(a.tokens(), length));
  check_size(where, "counts.cols", counts.cols, a.experts());
  check_stride(where, "counts", counts);
  detail::check_counted<A>(where, a, what);
  for (index_t s = 0; s < counts.rows; ++s) {
    N* const row = counts.row(s);
    std::fill_n(row, counts.cols, N{0});
    for (index_t t = s * length; t < std::min(a.tokens(), (s + 1) * length); ++t)
      detail::for_each_counted(a, what, t, [&](index_t e) { row[e] += N{1}; });
  }
}

/// counts[g] = tokens with a choice on device g, each token once; device g holds the experts
/// [g * E / D, (g + 1) * E / D).
///
/// Shapes: counts [D], D divides E. Throws: error where a size differs or D does not divide E.
/// Cost: O(T k^2 + D). No allocation.
template <class N, class A = simd::default_arch>
  requires std::is_arithmetic_v<N>
void count_device_tokens(const assignment& a, const count_options& what, std::span<N> counts) {
  constexpr const char* where = "count_device_tokens";
  const auto devices = static_cast<index_t>(counts.size());
  check_range(where, "counts.size", devices, 1, a.experts());
  check_size(where, "experts % devices", a.experts() % devices, 0);
  detail::check_counted<A>(where, a, what);
  const index_t each = a.experts() / devices;
  std::fill(counts.begin(), counts.end(), N{0});
  for (index_t t = 0; t < a.tokens(); ++t) {
    index_t seen = 0;
    detail::for_each_counted(a, what, t, [&](index_t e) {
      const index_t device = e / each;
      index_t earlier = 0;
      bool again = false;
      detail::for_each_counted(
          a, what, t, [&](index_t other) { again |= earlier++ < seen && other / each == device; });
      ++seen;
      if (!again) counts[static_cast<std::size_t>(device)] += N{1};
    });
  }
}

}  // namespace moeroute
