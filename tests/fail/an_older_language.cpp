// expect: [moeroute] the headers are C++20
// expect: moeroute stops here
// flags: -std=c++17
#include <moeroute/routing.hpp>
