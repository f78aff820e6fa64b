// A router described: numbers, and no kernel.
#include <moeroute/policy/router_spec.hpp>

moeroute::router_spec spec() { return {.experts = 64, .k = 8}; }
