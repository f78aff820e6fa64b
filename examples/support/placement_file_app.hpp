// The placement_file program, apart from main: tests run it in their own process.
#pragma once

#include "json.hpp"

#include <ostream>

namespace example {

/// The cases of a file, each with what its planner makes of its input.
json answer_placement_file(const json& file);

/// The whole program: 0, or 2 with one line on `err`.
int run_placement_file(int count, const char* const* words, std::ostream& out, std::ostream& err);

}  // namespace example
