// trace: somebody's own logits, [T, E] or [layers, T, E], routed by a router of the catalogue or by
// one that a file describes.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <moeroute/policy/catalog.hpp>

#include "examples/support/golden_config.hpp"
#include "examples/support/npy.hpp"
#include "support/arguments.hpp"
#include "support/routing.hpp"

namespace {

using bench::index_t;

struct trace {
  example::npy_array logits;
  example::golden_router router;
  bench::drawn_tensors drawn;

  moeroute::router_tensors tensors() const {
    if (from_file())
      return {.bias = router.bias,
              .per_expert_scale = router.per_expert_scale,
              .table = router.table ? &*router.table : nullptr};
    return drawn.view();
  }
  std::span<const std::int32_t> token_ids() const {
    return from_file() ? std::span<const std::int32_t>(router.input_ids)
                       : std::span<const std::int32_t>(drawn.token_ids);
  }
  // A file brings its tensors; a name of the catalogue does not.
  bool from_file() const {
    return !router.bias.empty() || !router.per_expert_scale.empty() || router.table;
  }
};

// The catalogue has the sizes of a published model: the trace decides over E, and bounds k.
example::golden_router router_of(const std::string& name, index_t columns, index_t tokens) {
  if (const auto* entry = moeroute::find_in_catalog(name)) {
    example::golden_router made;
    made.spec = entry->spec;
    if (made.spec.columns() != columns) {
      made.spec.experts = columns;
      made.spec.k = std::min(made.spec.k, columns);
    }
    return made;
  }
  if (!std::filesystem::exists(name))
    example::refuse("--router ", name, ": there is no such file, and ",
                    moeroute::detail::unknown_model(name));
  auto made =
      example::read_golden_router(example::read_json<example::float_json>(name), name, {}, tokens);
  if (made.spec.columns() != columns)
    example::refuse(name, ": field 'experts': expected ", columns,
                    " columns, as the logits have, found ", made.spec.columns());
  return made;
}

// Tokens a call: those of --step, or one and few, as an engine decodes, and many.
std::vector<index_t> steps_of(const std::string& asked, index_t tokens) {
  std::vector<index_t> steps;
  if (asked.empty()) {
    for (const index_t n : {1, 2, 4, 8, 1024}) steps.push_back(std::min(n, tokens));
  } else {
    std::istringstream words(asked);
    for (std::string word; std::getline(words, word, ',');) {
      index_t n = 0;
      const auto [end, code] = std::from_chars(word.data(), word.data() + word.size(), n);
      if (code != std::errc() || end != word.data() + word.size() || n < 1 || n > tokens)
        example::refuse("--step ", asked, ": expected tokens a call, from 1 to the trace's ",
                        tokens);
      steps.push_back(n);
    }
  }
  std::sort(steps.begin(), steps.end());
  steps.erase(std::unique(steps.begin(), steps.end()), steps.end());
  return steps;
}

// Rows of a rotation whose chunks are long beside a look at the clock.
constexpr index_t fewest_rows = 512;

// Routes all of the rows, `step` a call: where they are not whole calls the last one begins
// earlier, and where they are not whole chunks, or too few, the first ones follow again.
void route_rows(benchmark::State& state, const trace& all, const float* rows, index_t count,
                index_t step) {
  const auto columns = static_cast<index_t>(all.logits.shape[2]);
  const index_t calls = (count + step - 1) / step;
  bench::rotation turns(std::max(calls * step, moeroute::round_up(fewest_rows, step)), columns * 4,
                        step);
  turns.units = moeroute::round_up(turns.units, turns.chunk);
  moeroute::buffer<float> laid(turns.units * columns);
  float* to = laid.data();
  for (index_t call = 0; call < turns.units / step; ++call)
    to = std::copy_n(rows + std::min(call % calls * step, count - step) * columns, step * columns,
                     to);
  bench::compete_routing(state, all.router.spec, all.tensors(), all.token_ids(), laid.data(),
                         turns);
}

void add(const bench::arguments& asked) {
  if (asked.trace.empty()) return;
  auto logits = example::read_npy(asked.trace);
  if (logits.shape.size() != 2 && logits.shape.size() != 3)
    example::refuse(asked.trace, ": shape ", example::to_string(logits.shape),
                    ": expected [tokens, experts] or [layers, tokens, experts]");
  if (logits.values.empty()) example::refuse(asked.trace, ": expected at least one token");
  if (logits.shape.size() == 2) logits.shape.insert(logits.shape.begin(), 1);
  const auto layers = static_cast<index_t>(logits.shape[0]),
             tokens = static_cast<index_t>(logits.shape[1]);
  const auto columns = static_cast<index_t>(logits.shape[2]);
  const std::vector<index_t> steps = steps_of(asked.steps, tokens);

  auto router = router_of(asked.router, columns, tokens);
  bench::drawn_tensors drawn(router.spec, tokens);
  const auto all =
      std::make_shared<const trace>(trace{std::move(logits), std::move(router), std::move(drawn)});
  const auto& spec = all->router.spec;
  moeroute::make_router(spec, all->tensors());  // refuses here what it would refuse later
  // Layers of a few tokens are timed together: rows that come again are rows that predictors know.
  const bool together = layers > 1 && tokens < fewest_rows;
  const index_t parts = together ? 1 : layers, count = together ? layers * tokens : tokens;
  if (count < fewest_rows)
    std::fprintf(stderr, "bench: %s: %lld rows to route are fewer than %lld: they come again\n",
                 asked.trace.c_str(), static_cast<long long>(count),
                 static_cast<long long>(fewest_rows));
  const std::string name = std::filesystem::path(asked.router).stem().string();
  for (index_t part = 0; part < parts; ++part)
    for (const index_t step : steps)
      bench::entry("trace/" + name + "/layer:" + (together ? "all" : std::to_string(part)) +
                       "/T:" + std::to_string(step) + "/E:" + std::to_string(spec.experts) +
                       "/k:" + std::to_string(spec.k),
                   [=](benchmark::State& state) {
                     route_rows(state, *all, all->logits.values.data() + part * count * columns,
                                count, step);
                   });
}

const bool registered = [] {
  bench::late_entries().push_back(add);
  return true;
}();

}  // namespace
