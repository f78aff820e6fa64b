// Which kernels this machine can run.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "moeroute_dispatch.hpp"

extern "C" {
extern const moeroute::dispatch::kernels moeroute_kernels_baseline;
#if defined(__x86_64__)
extern const moeroute::dispatch::kernels moeroute_kernels_avx2;
extern const moeroute::dispatch::kernels moeroute_kernels_avx512;
#endif
}

namespace moeroute::dispatch {

#if defined(__x86_64__)
namespace {

// clang 16's __builtin_cpu_supports does not know the name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace
#endif

const std::vector<const kernels*>& available() {
  static const std::vector<const kernels*> list = [] {
    std::vector<const kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // Each flag of dispatch.cmake is asked for.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_f16c();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd");
    if (avx2 && avx512) found.push_back(&moeroute_kernels_avx512);
    if (avx2) found.push_back(&moeroute_kernels_avx2);
#endif
    found.push_back(&moeroute_kernels_baseline);
    if (const char* wanted = std::getenv("MOEROUTE_ISA")) {
      for (const kernels* k : found)
        if (std::strcmp(k->name, wanted) == 0) return std::vector<const kernels*>{k};
      throw std::invalid_argument("moeroute::dispatch: MOEROUTE_ISA is '" + std::string(wanted) +
                                  "', which is not an instruction set of this machine");
    }
    return found;
  }();
  return list;
}

}  // namespace moeroute::dispatch
