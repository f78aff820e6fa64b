// Sizes of the slow tests. A sanitizer and an emulator make them twenty times slower, and get the
// smaller one.
#pragma once

#include <moeroute/base/index.hpp>

namespace test {

constexpr moeroute::index_t sized([[maybe_unused]] moeroute::index_t usual,
                                  [[maybe_unused]] moeroute::index_t reduced) {
#if MOEROUTE_TEST_REDUCED
  return reduced;
#else
  return usual;
#endif
}

}  // namespace test
