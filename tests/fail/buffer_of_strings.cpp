// expect: [moeroute::buffer] holds plain values only
#include <moeroute/base/workspace.hpp>
#include <string>

moeroute::buffer<std::string> names;
