// Whether a router that sees the whole batch decides the same, whoever carries it out.
#pragma once

#include <algorithm>
#include <moeroute/stage/route.hpp>
#include <string>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/threads.hpp"

namespace test {

/// The first executor, thread count or instruction set whose choices of logits [T, E] differ from
/// those of one thread; empty where none does.
template <class Router>
std::string batch_bits_differ(const Router& router, const std::vector<float>& logits,
                              moeroute::index_t experts) {
  const auto tokens = static_cast<moeroute::index_t>(logits.size()) / experts;
  const moeroute::matrix_view<const float> z(logits.data(), tokens, experts);
  moeroute::workspace memory;
  moeroute::assignment first, other;
  moeroute::route(router, z, memory, first);
  std::string found;
  const auto compare = [&](const std::string& who) {
    const auto same = [](auto a, auto b) {
      return std::equal(a.begin(), a.end(), b.begin(), b.end());
    };
    std::string what;
    if (!same(first.ids(), other.ids())) what = "ids";
    if (!same(first.offsets(), other.offsets())) what = "offsets";
    if (what.empty() && bit_difference(other.weights(), first.weights()) != "") what = "weights";
    if (found.empty() && !what.empty()) found = who + ": " + what;
  };
  for (const int threads : {1, 2, 4}) {
    moeroute::route(router, z, memory, other, several_threads{threads});
    compare(std::to_string(threads) + " threads");
  }
  for_each_arch<widths>([&](auto tag) {
    router.template route_batch<moeroute::serial, decltype(tag)>(z, {}, memory, other, {});
    compare(decltype(tag)::name());
  });
  return found;
}

}  // namespace test
