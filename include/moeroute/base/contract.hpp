// MOEROUTE_EXPECTS: a condition that only a bug inside the library can break. Debug builds only.
#pragma once

#include <cstdio>
#include <cstdlib>

#include <moeroute/base/config.hpp>

namespace moeroute::detail {

[[noreturn]] MOEROUTE_COLD inline void contract_broken(const char* condition, const char* file,
                                                       int line) {
  std::fprintf(stderr, "moeroute: contract broken: %s (%s:%d)\n", condition, file, line);
  std::abort();
}

}  // namespace moeroute::detail

#if MOEROUTE_CONTRACTS
#define MOEROUTE_EXPECTS(condition) \
  ((condition) ? void() : ::moeroute::detail::contract_broken(#condition, __FILE__, __LINE__))
#else
#define MOEROUTE_EXPECTS(condition) static_cast<void>(0)
#endif
