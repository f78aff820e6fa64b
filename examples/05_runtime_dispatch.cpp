// One program for every x86-64: built without -march, it routes with the best instruction set it
// finds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <moeroute/policy/catalog.hpp>
#include <moeroute_dispatch.hpp>
#include <random>
#include <vector>

int main() try {
  const moeroute::router_spec spec = moeroute::find_in_catalog("deepseek_v3")->spec;
  const int tokens = 4096, columns = static_cast<int>(spec.columns());
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> logits(static_cast<std::size_t>(tokens * columns)),
      bias(static_cast<std::size_t>(columns));
  for (float& x : logits) x = normal(engine);
  for (float& x : bias) x = 0.05f * normal(engine);

  std::vector<std::int32_t> first;
  for (const auto* kernels : moeroute::dispatch::available()) {
    moeroute::dispatch::session session(spec, {.bias = bias}, *kernels);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * spec.k));
    std::vector<float> weights(ids.size());
    double best = 1e30;  // of several: other programs run too
    for (int run = 0; run < 10; ++run) {
      const auto start = std::chrono::steady_clock::now();
      session.route(logits.data(), tokens, columns, ids.data(), weights.data());
      const std::chrono::duration<double, std::nano> time =
          std::chrono::steady_clock::now() - start;
      best = std::min(best, time.count() / tokens);
    }
    if (first.empty()) first = ids;
    std::printf("%-8s %7.1f ns per token, %s\n", session.isa(), best,
                ids == first ? "the same ids" : "OTHER IDS");
    if (ids != first) return 1;
  }
} catch (const std::exception& e) {
  std::fprintf(stderr, "runtime_dispatch: %s\n", e.what());
  return 2;
}
