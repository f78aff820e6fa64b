// Sizes of the slow tests. A sanitizer makes them twenty times slower, and gets the smaller one.
#pragma once

#include <moeroute/base/index.hpp>

namespace test {

constexpr moeroute::index_t sized(moeroute::index_t usual, moeroute::index_t reduced) {
  return MOEROUTE_TEST_REDUCED ? reduced : usual;
}

}  // namespace test
