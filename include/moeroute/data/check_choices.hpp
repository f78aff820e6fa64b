// What may be in an assignment that somebody else wrote: whoever reads it first asks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/simd/batch.hpp>

namespace moeroute {

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void fail_expert_id(const char* where,
                                                      std::span<const expert_id> ids,
                                                      index_t experts) {
  const auto bad =
      std::find_if(ids.begin(), ids.end(), [&](expert_id e) { return e < -1 || e >= experts; });
  fail(where, {"the id of choice ", static_cast<index_t>(bad - ids.begin()), " is ", *bad,
               ", expected -1 to ", experts - 1});
}

[[noreturn]] MOEROUTE_COLD inline void fail_offsets(const char* where, const assignment& a) {
  const std::span<const std::int32_t> first = a.offsets();
  for (index_t t = 0; t < a.tokens(); ++t) {
    const index_t begin = first[static_cast<std::size_t>(t)];
    const index_t end = first[static_cast<std::size_t>(t) + 1];
    if (begin >= 0 && end >= begin && end - begin <= a.k()) continue;
    fail(where, {"token ", t, " has the choices from ", begin, " to ", end,
                 ", expected 0 to k = ", a.k(), " of them, from 0 on"});
  }
  fail(where, {"the choices of a ragged assignment are ", a.choices(), " from ", first[0],
               " on, expected at most ", a.room(), " from 0 on"});
}

}  // namespace detail

/// Throws error where an id is outside [-1, E): such an id would index memory that is not there.
///
/// Cost: one pass without a branch per id, no allocation. A plain loop that compilers turn into
/// vector compares.
template <class A = simd::default_arch>
void check_ids(const char* where, std::span<const expert_id> ids, index_t experts) {
  const auto most = static_cast<std::uint32_t>(experts);
  std::uint32_t bad = 0;
  for (const expert_id e : ids) bad |= static_cast<std::uint32_t>(e) + 1u > most ? 1u : 0u;
  if (bad != 0) [[unlikely]]
    detail::fail_expert_id(where, ids, experts);
}

/// Throws error where the offsets of the ragged form do not ascend from 0 to at most the room there
/// is, or give a token more than k choices.
template <class A = simd::default_arch>
void check_offsets(const char* where, const assignment& a) {
  if (!a.ragged()) return;
  const std::int32_t* const first = a.offsets().data();
  const auto most = static_cast<std::int32_t>(a.k());
  bool bad = first[0] != 0 || a.choices() > a.room();
  for (index_t t = 0; t < a.tokens(); ++t) {
    const std::int32_t begin = first[t], end = first[t + 1];
    bad |= (begin < 0) | (end < begin) || static_cast<std::int64_t>(end) - begin > most;
  }
  if (bad) [[unlikely]]
    detail::fail_offsets(where, a);
}

/// Both: afterwards ids index [0, E) where they are not no_expert, and offsets index the choices.
template <class A = simd::default_arch>
void check_choices(const char* where, const assignment& a) {
  check_offsets<A>(where, a);  // first: they say how many ids there are
  check_ids<A>(where, a.ids(), a.experts());
}

}  // namespace moeroute
