// Reads placement problems and writes what the planners make of them, as JSON: your loads, a
// planner.
//
//   placement_file tests/golden/placement/refine.json
//
// The files' fields are those of tests/golden/placement; only the inputs are read. Bad input: one
// line that names file, case and field, exit code 2.
#include "support/placement_file_app.hpp"

#include <iostream>

int main(int argc, char** argv) {
  return example::run_placement_file(argc, argv, std::cout, std::cerr);
}
