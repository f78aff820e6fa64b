// expect: [moeroute] -ffinite-math-only breaks NaN and infinity handling
#undef __FINITE_MATH_ONLY__
#define __FINITE_MATH_ONLY__ 1  // as -ffinite-math-only does
#include <moeroute/base/config.hpp>
