// expect: [moeroute] -fassociative-math, -freciprocal-math and -fno-signed-zeros
#define __ASSOCIATIVE_MATH__ 1  // as g++ does
#include <moeroute/base/config.hpp>
