// The trace program, apart from main: tests run it in their own process.
#pragma once

#include <ostream>

namespace example {

/// The whole program: 0, or 2 with one line on `err`.
int run_trace(int count, const char* const* words, std::ostream& out, std::ostream& err);

}  // namespace example
