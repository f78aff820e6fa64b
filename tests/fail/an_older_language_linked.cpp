// expect: [moeroute] this face is C++20
// expect: moeroute stops here
// flags: -std=c++17
#include <moeroute/compiled.hpp>
