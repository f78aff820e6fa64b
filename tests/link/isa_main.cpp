// One program of objects that were compiled for different instruction sets, by nothing but flags:
// each runs its own kernels, and they agree to the bit.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "isa_kernels.hpp"
#include "isa_sets.hpp"

#define MOEROUTE_DECLARE(set) extern const isa_kernels isa_##set;
MOEROUTE_LINK_SETS(MOEROUTE_DECLARE)

namespace {

struct named {
  const char* name;
  const isa_kernels* kernels;
};

#define MOEROUTE_LIST(set) {#set, &isa_##set},
const named all[] = {MOEROUTE_LINK_SETS(MOEROUTE_LIST)};

isa_input random_input() {
  isa_input in{200, 64, {}, {}};
  std::uint32_t state = 1;
  const auto next = [&] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<std::int32_t>(state) >> 24) / 16.0f;  // ties
  };
  for (std::int64_t i = 0; i < in.tokens * in.experts; ++i) in.logits.push_back(next());
  for (std::int64_t e = 0; e < in.experts; ++e) in.bias.push_back(next() / 64.0f);
  for (std::size_t i = 0; i < in.logits.size(); i += 97)
    in.logits[i] = std::numeric_limits<float>::quiet_NaN();
  return in;
}

}  // namespace

int main() {
  const isa_input in = random_input();
  const isa_output first = all[0].kernels->run(in);
  int failed = 0;
  std::string before;
  for (const named& set : all) {
    const isa_output out = set.kernels->run(in);
    const bool own = out.ran == out.compiled_for && out.ran != before;
    const bool same = out.ids == first.ids && out.weights.size() == first.weights.size() &&
                      std::memcmp(out.weights.data(), first.weights.data(),
                                  out.weights.size() * sizeof(float)) == 0;
    std::printf("%-9s compiled for %s, ran %s, %s\n", set.name, out.compiled_for.c_str(),
                out.ran.c_str(), same ? "agrees" : "DIFFERS");
    failed += !own || !same;
    before = out.ran;
  }
  return failed == 0 && !first.ids.empty() ? EXIT_SUCCESS : EXIT_FAILURE;
}
