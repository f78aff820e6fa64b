// Property: the k best are those of the sorted row, for every E, k, number of rows and storage.
#pragma once

#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

#include "oracle/routing.hpp"
#include "properties/bytes.hpp"

namespace test {

namespace detail {

template <class T>
std::string selection_break(const std::vector<float>& z, index_t tokens, index_t experts,
                            index_t k) {
  std::vector<T> logits(z.begin(), z.end());
  const moeroute::router router{moeroute::softmax{}, moeroute::top_k{.k = k},
                                moeroute::sum_normalized};
  moeroute::workspace memory;
  moeroute::assignment out;
  moeroute::route(router, moeroute::matrix_view<const T>(logits.data(), tokens, experts), memory,
                  out);
  std::vector<float> row(static_cast<std::size_t>(experts));
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t e = 0; e < experts; ++e)
      row[static_cast<std::size_t>(e)] =
          static_cast<float>(logits[static_cast<std::size_t>(t * experts + e)]);
    const auto expected = oracle::top_k(row.data(), experts, k);
    for (index_t r = 0; r < k; ++r) {
      const auto at = static_cast<std::size_t>(r);
      const std::string where = "E " + std::to_string(experts) + " k " + std::to_string(k) +
                                " token " + std::to_string(t) + " of " + std::to_string(tokens) +
                                " rank " + std::to_string(r) + ": ";
      if (out.ids(t)[at] != expected[at])
        return where + "expert " + std::to_string(out.ids(t)[at]) + ", expected " +
               std::to_string(expected[at]);
      const float w = out.weights(t)[at];
      if (!(w >= 0.0f && w <= 1.0f)) return where + "weight " + std::to_string(w);
    }
  }
  return "";
}

}  // namespace detail

inline std::string selection_property(bytes in) {
  const index_t experts = 1 + in.below(in.flag() ? 2100 : 200);
  const index_t k = 1 + in.below(std::min<index_t>(experts, in.flag() ? 70 : 16));
  const index_t tokens = in.below(40);
  const index_t storage = in.below(3);
  std::vector<float> z;
  if (in.flag()) {
    for (index_t i = 0; i < tokens * experts; ++i) z.push_back(in.raw());
  } else {
    z = in.logits(tokens * experts);
  }
  if (storage == 1) return detail::selection_break<moeroute::bfloat16>(z, tokens, experts, k);
  if (storage == 2) return detail::selection_break<moeroute::float16>(z, tokens, experts, k);
  return detail::selection_break<float>(z, tokens, experts, k);
}

}  // namespace test
