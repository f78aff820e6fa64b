// What a trace of routing says of caches: misses at every size, hot experts, what can be foretold,
// how many experts a batch reads. Converts between the forms in which traces are kept
// (support/trace_file.hpp).
//
//   trace IN [--to csv|route|npy|record|jsonl --out FILE] [--experts N] [--cache N] [--policy P]
//         [--page FILE] [--json]
//
// Bad input: one line that names file, line and column, exit code 2.
#include "support/trace_app.hpp"

#include <iostream>

int main(int argc, char** argv) { return example::run_trace(argc, argv, std::cout, std::cerr); }
