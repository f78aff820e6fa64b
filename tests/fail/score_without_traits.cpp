// expect: score_function
// expect: S::traits
#include <moeroute/policy/router.hpp>

struct cosine {};

moeroute::router<cosine> mine;
