// expect: [moeroute] -ffast-math breaks NaN, infinity and tie handling
#define __FAST_MATH__ 1  // as -ffast-math does
#include <moeroute/base/config.hpp>
