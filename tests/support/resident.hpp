// How much memory the process has at the moment.
#pragma once

#include <unistd.h>

#include <fstream>

#include <moeroute/base/index.hpp>

namespace test {

inline moeroute::index_t resident_kilobytes() {
  std::ifstream file("/proc/self/statm");
  moeroute::index_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * sysconf(_SC_PAGESIZE) / 1024;
}

}  // namespace test
