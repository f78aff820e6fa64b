// The catalogue's routers in the list that the laws run over, by way of make_router. Entries that
// differ in their sizes only are one kind; every kind is tried at the sizes of the laws.
#include <catch2/catch_test_macros.hpp>
#include <map>
#include <memory>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_rare_router.hpp>
#include <moeroute/policy/spec_text.hpp>
#include <string>
#include <utility>
#include <vector>

#include "laws/routers.hpp"
#include "oracle/spec_routing.hpp"
#include "support/random.hpp"

using moeroute::router_spec;
using moeroute::selection_kind;

namespace test {

namespace {

// The spec for another E and k: groups and zero experts as near to its own as these allow.
router_spec resized(router_spec s, index_t k, index_t experts) {
  s.experts = experts;
  s.k = k;
  const bool each = s.selection == selection_kind::each_group;
  while (experts % s.groups != 0 || (each && k % s.groups != 0)) --s.groups;
  const index_t size = experts / s.groups;
  s.topk_group = std::clamp((k + size - 1) / size, std::min(s.topk_group, s.groups), s.groups);
  s.zero_experts = s.zero_experts == 0 ? 0 : experts / 3;
  // Dropping is a stage of its own, with tests of its own.
  s.capacity = 0;
  s.drop_order = moeroute::drop_order::choice_major;
  s.normalize_before_drop = true;
  return s;
}

// A router of the catalogue with tensors by a fixed seed. Every token has the same id, so that the
// laws of rows hold for tables too.
class catalogue_subject final : public subject {
 public:
  static constexpr std::int32_t token_id = 3;

  catalogue_subject(const router_spec& spec) : spec_(spec) {
    random rng(7);
    const float size = spec.score == moeroute::score_kind::softmax ? 0.02f : 0.3f;
    for (index_t e = 0; e < spec.experts; ++e) {
      if (spec.selection_bias) bias_.push_back(size * rng.normal());
      if (spec.per_expert_scale) scale_.push_back(0.5f + rng.uniform());
    }
    if (spec.selection == selection_kind::expert_table)
      table_ = moeroute::random_table(8, spec.k, spec.experts, 11);
    const moeroute::router_tensors tensors{
        .bias = bias_, .per_expert_scale = scale_, .table = &table_};
    if (spec.has_rare_words())
      rare_ = std::make_unique<moeroute::any_rare_router>(make_rare_router(spec, tensors));
    else
      router_ = std::make_unique<moeroute::any_router>(make_router(spec, tensors));
  }

  bool narrow() const override { return false; }
  void route(matrix_view<const float> z, assignment& out) override {
    with_router([&](const auto& r) { moeroute::route(r, z, side(z.rows), memory_, out); });
  }
  void route(matrix_view<const bfloat16>, assignment&) override { FAIL("compiled for float"); }
  void route(matrix_view<const float16>, assignment&) override { FAIL("compiled for float"); }
  void route(matrix_view<const float> z, const moeroute::side_inputs& more,
             assignment& out) override {
    moeroute::side_inputs all = side(z.rows);
    all.mask = more.mask;
    with_router([&](const auto& r) { moeroute::route(r, z, all, memory_, out); });
  }
  void route(matrix_view<const float> z, [[maybe_unused]] int threads, assignment& out) override {
#if defined(_OPENMP)
    with_router([&](const auto& r) {
      moeroute::route(r, z, side(z.rows), memory_, out, moeroute::openmp{threads});
    });
#else
    route(z, out);
#endif
  }

  // The first token that float64 decides otherwise.
  std::string break_of(const std::vector<float>& logits, index_t tokens,
                       const std::vector<moeroute::expert_id>& ids,
                       const std::vector<float>& weights) const {
    oracle::token_inputs in{nullptr, bias_, scale_};
    if (spec_.selection == selection_kind::expert_table) in.table = table_.of(token_id);
    const auto k = static_cast<std::size_t>(spec_.k);
    for (index_t t = 0; t < tokens; ++t) {
      in.logits = logits.data() + t * spec_.experts;
      const std::string broken = oracle::break_of(spec_, in, {ids.data() + t * spec_.k, k},
                                                  {weights.data() + t * spec_.k, k});
      if (!broken.empty()) return "token " + std::to_string(t) + ", " + broken;
    }
    return "";
  }

 private:
  template <class F>
  void with_router(F&& f) {
    if (rare_)
      f(*rare_);
    else
      f(*router_);
  }
  moeroute::side_inputs side(index_t tokens) {
    if (spec_.selection != selection_kind::expert_table) return {};
    if (static_cast<index_t>(tokens_.size()) < tokens)
      tokens_.resize(static_cast<std::size_t>(tokens), token_id);
    return {.token_ids = {tokens_.data(), static_cast<std::size_t>(tokens)}};
  }

  router_spec spec_;
  std::vector<float> bias_, scale_;
  moeroute::expert_table table_;
  std::vector<std::int32_t> tokens_;
  std::unique_ptr<moeroute::any_router> router_;
  std::unique_ptr<moeroute::any_rare_router> rare_;
  moeroute::workspace memory_;
};

// Product keys have columns of another number than experts: product_keys_test.cpp has laws of its
// own.
bool listed(const router_spec& s) { return s.selection != selection_kind::product_keys; }

// Rules that no model of the catalogue has.
constexpr const char* rules[] = {
    "E=64 k=2 score=softplus normalize=sum",
    "E=64 k=2 score=sigmoid ties=higher_id normalize=sum",
    "E=64 k=4 score=softmax selection=each_group groups=4 normalize=sum",
    "E=64 k=2 score=sigmoid bias=selection weight_score=softmax weight_domain=selected",
    "E=64 k=2 score=sigmoid score_domain=selected bias=selection normalize=sum",
    "E=64 k=2 score=softmax standardize=1.5 normalize=sum",
    "E=64 k=2 score=softmax groups=4 topk_group=1 group_score=sum",
    "E=64 k=2 score=softmax score_domain=selected groups=4 topk_group=2",
};

}  // namespace

std::vector<listed_router> catalogue_routers() {
  std::vector<listed_router> list;
  std::map<std::string, std::string> kinds;
  std::vector<std::pair<std::string, router_spec>> described;
  for (const moeroute::catalog_entry& entry : moeroute::catalog)
    described.emplace_back(entry.name, entry.spec);
  for (const char* rule : rules) described.emplace_back(rule, moeroute::parse_spec(rule));
  for (const auto& [name, described_spec] : described) {
    const router_spec spec = described_spec;
    if (!listed(spec)) continue;
    if (!kinds.emplace(to_string(resized(spec, 2, 64)), name).second) continue;
    const moeroute::router_traits traits = moeroute::traits_of(spec);
    const bool table = spec.selection == selection_kind::expert_table;
    const bool mixes = spec.selection == selection_kind::sparsemixer;
    const bool pair = mixes || spec.selection == selection_kind::top2;
    list.push_back({.name = name,
                    .make = [spec](index_t k, index_t experts) -> std::unique_ptr<subject> {
                      return std::make_unique<catalogue_subject>(resized(spec, k, experts));
                    },
                    .verify =
                        [spec](const std::vector<float>& logits, index_t tokens, index_t experts,
                               index_t k, const std::vector<moeroute::expert_id>& ids,
                               const std::vector<float>& weights) {
                          return catalogue_subject(resized(spec, k, experts))
                              .break_of(logits, tokens, ids, weights);
                        },
                    .shift_invariant = traits.shift_invariant && spec.standardize == 0.0f,
                    .permutable = traits.monotone && !spec.per_expert_scale &&
                                  spec.ties == moeroute::tie_order::lower_id,
                    .compact = !table && spec.selection != selection_kind::each_group,
                    .shares = !spec.per_expert_scale && !mixes,
                    .least_k = pair ? 2 : 1,
                    .most_k = pair ? 2 : moeroute::max_experts});
  }
  return list;
}

}  // namespace test

TEST_CASE("the laws run over every kind of router of the catalogue") {
  const auto list = test::catalogue_routers();
  CHECK(list.size() >= 20);
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    if (!test::listed(entry.spec)) continue;
    bool found = false;
    for (const test::listed_router& kind : list)
      if (const auto* const same = moeroute::find_in_catalog(kind.name))
        found = found || to_string(test::resized(same->spec, 2, 64)) ==
                             to_string(test::resized(entry.spec, 2, 64));
    INFO(entry.name);
    CHECK(found);
  }
}
