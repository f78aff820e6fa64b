// trace: somebody's own logits, [T, E] or [layers, T, E], routed by a router of the catalogue or by
// one that a file describes.
#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>

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
    example::refuse("--router ", name, ": expected a name of the catalogue or a .json file");
  auto made =
      example::read_golden_router(example::read_json<example::float_json>(name), name, {}, tokens);
  if (made.spec.columns() != columns)
    example::refuse(name, ": field 'experts': expected ", columns,
                    " columns, as the logits have, found ", made.spec.columns());
  return made;
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
  const index_t step = std::min<index_t>(tokens, 1024);

  auto router = router_of(asked.router, columns, tokens);
  bench::drawn_tensors drawn(router.spec, tokens);
  const auto all =
      std::make_shared<const trace>(trace{std::move(logits), std::move(router), std::move(drawn)});
  const auto& spec = all->router.spec;
  moeroute::make_router(spec, all->tensors());  // refuses here what it would refuse later
  const std::string name = std::filesystem::path(asked.router).stem().string();
  for (index_t layer = 0; layer < layers; ++layer) {
    bench::entry("trace/" + name + "/layer:" + std::to_string(layer) +
                     "/T:" + std::to_string(step) + "/E:" + std::to_string(spec.experts) +
                     "/k:" + std::to_string(spec.k),
                 [=](benchmark::State& state) {
                   bench::compete_routing(state, all->router.spec, all->tensors(), all->token_ids(),
                                          all->logits.values.data() + layer * tokens * columns,
                                          bench::rotation(tokens / step * step, columns * 4, step));
                 });
  }
}

const bool registered = [] {
  bench::late_entries().push_back(add);
  return true;
}();

}  // namespace
