// An assignment cut into batches: what is fed piece by piece must say the same as the whole.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <moeroute/data/assignment.hpp>

namespace test {

/// f(part) for each part of so many tokens of a fixed-form assignment without drops.
template <class F>
void for_each_part(const moeroute::assignment& whole,
                   std::initializer_list<moeroute::index_t> tokens, F&& f) {
  moeroute::index_t at = 0;
  for (const moeroute::index_t n : tokens) {
    moeroute::assignment part;
    part.reset(n, whole.experts(), whole.k());
    std::copy_n(whole.ids().begin() + at * whole.k(), n * whole.k(), part.ids().begin());
    std::copy_n(whole.weights().begin() + at * whole.k(), n * whole.k(), part.weights().begin());
    at += n;
    f(part);
  }
}

}  // namespace test
