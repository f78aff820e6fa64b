// One program for every x86-64: built without -march, it routes with the best instruction set it
// finds, or with the one that MOEROUTE_ISA names.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <moeroute/compiled.hpp>
#include <random>
#include <vector>

namespace compiled = moeroute::compiled;

int main() try {
  const compiled::spec spec = compiled::spec_of_model("deepseek_v3");
  const std::int64_t tokens = 4096;
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> logits(static_cast<std::size_t>(tokens * spec.experts)),
      bias(static_cast<std::size_t>(spec.experts));
  for (float& x : logits) x = normal(engine);
  for (float& x : bias) x = 0.05f * normal(engine);

  std::vector<std::int32_t> first;
  for (int i = 0; const char* isa = moeroute_isa_name(i); ++i) {
    compiled::check(moeroute_use_isa(isa));
    const compiled::router router(spec, {.bias = bias});
    compiled::assignment choices;
    double best = 1e30;  // of several: other programs run too
    for (int run = 0; run < 10; ++run) {
      const auto start = std::chrono::steady_clock::now();
      compiled::route(router, {logits.data(), tokens, router.columns()}, choices);
      const std::chrono::duration<double, std::nano> time =
          std::chrono::steady_clock::now() - start;
      best = std::min(best, time.count() / static_cast<double>(tokens));
    }
    if (first.empty()) first.assign(choices.ids().begin(), choices.ids().end());
    const bool same = std::ranges::equal(choices.ids(), first);
    std::printf("%-8s %7.1f ns per token, %s\n", isa, best, same ? "the same ids" : "OTHER IDS");
    if (!same) return 1;
  }
} catch (const std::exception& e) {
  std::fprintf(stderr, "runtime_dispatch: %s\n", e.what());
  return 2;
}
