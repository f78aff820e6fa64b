// A page that a program makes: printed, or compared with a file.
#pragma once

#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>

/// The main of such a program: without words the page goes to standard output; `--check FILE` says
/// where the file differs from what `source` has now. Returns the exit code.
inline int print_or_check(int argc, char** argv, const char* name, const char* source,
                          const std::string& page) {
  if (argc == 1) {
    std::fwrite(page.data(), 1, page.size(), stdout);
    return 0;
  }
  if (argc != 3 || std::string_view(argv[1]) != "--check") {
    std::fprintf(stderr, "usage: %s [--check FILE]\n", name);
    return 2;
  }
  std::ifstream file(argv[2]);
  std::istringstream now(page);
  std::string there, expected;
  for (int line = 1;; ++line) {
    const bool more = static_cast<bool>(std::getline(now, expected));
    const bool has = static_cast<bool>(std::getline(file, there));
    if (!more && !has) return 0;
    if (more != has || there != expected) {
      std::fprintf(stderr, "%s:%d: differs from %s, which has\n  %s\n", argv[2], line, source,
                   more ? expected.c_str() : "no more lines");
      return 1;
    }
  }
}
