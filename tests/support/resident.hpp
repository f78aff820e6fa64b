// How much memory the process has at the moment.
#pragma once

#if defined(__linux__)
#include <unistd.h>
#endif

#include <fstream>

#include <moeroute/base/index.hpp>

namespace test {

/// 0 where the system is not asked: nothing has grown there.
inline moeroute::index_t resident_kilobytes() {
#if defined(__linux__)
  std::ifstream file("/proc/self/statm");
  moeroute::index_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * sysconf(_SC_PAGESIZE) / 1024;
#else
  return 0;
#endif
}

}  // namespace test
