// The list of the properties: the random tests and the fuzzers run over it.
#pragma once

#include "properties/capacity.hpp"
#include "properties/plan.hpp"
#include "properties/select.hpp"
#include "properties/spec.hpp"

namespace test {

struct property {
  const char* name;
  /// The first thing that does not hold, in words; empty where all does.
  std::string (*broken)(bytes);
};

inline constexpr property properties[] = {
    {"selection", selection_property},
    {"spec", spec_property},
    {"plan", plan_property},
    {"capacity", capacity_property},
};

}  // namespace test
