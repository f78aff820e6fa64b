// The machine's caches, as it says itself.
#pragma once

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <moeroute/base/config.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute::simd {

/// What stages choose by that move rows.
struct cache_sizes {
  index_t second = index_t{1} << 20;  ///< bytes of a core's second-level cache
};

namespace detail {

MOEROUTE_COLD inline cache_sizes asked_caches() {
  cache_sizes sizes;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const long bytes = ::sysconf(_SC_LEVEL2_CACHE_SIZE); bytes > 0) sizes.second = bytes;
#endif
  return sizes;
}

}  // namespace detail

/// The machine's own sizes, asked for once per process; the defaults where it does not say.
inline const cache_sizes& machine_caches() {
  static const cache_sizes sizes = detail::asked_caches();
  return sizes;
}

}  // namespace moeroute::simd
