// Every kind of router at 1, 3 and 17 tokens, then what follows it. Run under valgrind, which sees
// lanes without a row that were read before anybody wrote them; and on other platforms, where the
// digest of all ids, weights and slots must be this machine's. Needs no library of tests.
#include <moeroute/data/routing_record.hpp>
#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/policy/row/compose.hpp>
#include <moeroute/policy/row/replay.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace moeroute;

long long seen = 0;
std::uint64_t digest = 0xcbf29ce484222325;  // FNV-1a over 32-bit words

void add(std::uint32_t word) {
  for (int byte = 0; byte < 4; ++byte) digest = (digest ^ (word >> 8 * byte & 255)) * 0x100000001b3;
}

// A value that nobody wrote decides the branch.
template <class T>
void look_at(std::span<const T> values) {
  for (const T& v : values) {
    if (v != T{}) ++seen;
    static_assert(sizeof(T) == 4);
    std::uint32_t word;
    std::memcpy(&word, &v, 4);
    add(word);
  }
}

// Nearly normal, of variance 1, and the same for every standard library: sums of twelve integers,
// none of which a float rounds.
template <class T>
std::vector<T> normals(index_t n, unsigned seed) {
  std::mt19937 bits(seed);
  std::vector<T> list;
  for (index_t i = 0; i < n; ++i) {
    std::int32_t sum = 0;
    for (int j = 0; j < 12; ++j) sum += static_cast<std::int32_t>(bits() >> 12);
    list.push_back(static_cast<T>(static_cast<float>(sum - 6 * (1 << 20)) / (1 << 20)));
  }
  return list;
}

template <class T, class Router>
void run(const Router& router, index_t tokens, index_t columns, const side_inputs& side) {
  const std::vector<T> z = normals<T>(tokens * columns, 1);
  // Heaps of their own: what an earlier call left in a lane is no value of this one.
  workspace ws;
  assignment choices;
  route(router, matrix_view<const T>(z.data(), tokens, columns), side, ws, choices);
  look_at<expert_id>(choices.ids());
  look_at<float>(choices.weights());
  apply_capacity(choices, {.rule = {.formula = capacity_formula::megatron, .factor = 1.0}}, ws);
  dispatch_plan slots;
  plan(choices, slots);
  look_at<slot_id>(slots.token_of_slot());
  look_at<slot_id>(slots.slot_of_choice());
  constexpr index_t d = 19;
  const std::vector<T> x = normals<T>(tokens * d, 2);
  std::vector<float> rows(static_cast<std::size_t>(slots.slots() * d));
  std::vector<T> y(static_cast<std::size_t>(tokens * d));
  dispatch(matrix_view<const T>(x.data(), tokens, d), slots,
           matrix_view<float>(rows.data(), slots.slots(), d));
  combine(matrix_view<const float>(rows.data(), slots.slots(), d), slots, choices,
          matrix_view<T>(y.data(), tokens, d));
  std::vector<float> values;
  for (const T& v : y) values.push_back(static_cast<float>(v));
  look_at<float>(values);
}

void run_spec(router_spec spec, index_t tokens) {
  spec.experts = std::min<index_t>(spec.experts, 64);
  spec.zero_experts = 0;
  spec.k = std::min(spec.k, spec.experts);
  if (spec.selection == selection_kind::product_keys) spec.experts = 64;
  const std::vector<float> bias = normals<float>(spec.experts, 3);
  const std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens), 2);
  const expert_table table = random_table(5, spec.k, spec.experts, 7);
  const any_router router = make_router(
      spec, {.bias = {bias.data(), spec.selection_bias ? bias.size() : 0},
             .per_expert_scale = {bias.data(), spec.per_expert_scale ? bias.size() : 0},
             .table = spec.selection == selection_kind::expert_table ? &table : nullptr});
  const side_inputs side = side_inputs{.token_ids = ids}.only(router.reads_side(spec.columns()));
  run<float>(router, tokens, spec.columns(), side);
  run<bfloat16>(router, tokens, spec.columns(), side);
}

}  // namespace

int main() {
  for (const index_t tokens : {1, 3, 17}) {
    std::map<std::string, bool> done;
    for (const catalog_entry& entry : catalog)
      if (!done[to_string(entry.spec)]) {
        done[to_string(entry.spec)] = true;
        run_spec(entry.spec, tokens);
      }
    for (const auto kind : {selection_kind::top_p, selection_kind::threshold,
                            selection_kind::random, selection_kind::sparsemixer}) {
      router_spec spec{.experts = 20, .selection = kind};
      if (kind == selection_kind::top_p) spec.top_p = 0.7f;
      if (kind == selection_kind::threshold) spec.score = score_kind::relu;
      run_spec(spec, tokens);
    }
    const auto n = static_cast<std::size_t>(tokens);
    const router plain{softmax{}, top_k{.k = 3}, sum_normalized};
    router lp = plain;
    lp.weight = {.normalize = normalization::lp, .p = 3.0f};
    router noisy = plain;
    noisy.transform = {.temperature = 2.0f, .softcap = 5.0f, .noise = {.kind = noise_kind::gumbel}};
    for (const index_t experts : {5, 16, 40, 300}) {
      run<float>(plain, tokens, experts, {});
      run<float16>(plain, tokens, experts, {});
      run<float>(lp, tokens, experts, {});
      run<float>(noisy, tokens, experts, {});
      const std::vector<std::int32_t> own(n, 2);
      const std::vector<std::uint8_t> mask(n, 1), modality(n, 1);
      run<float>(plain, tokens, experts, {.mask = mask, .k_of_token = own});
      run<float>(with_shared{plain, 2}, tokens, experts, {});
      if (experts > 5)
        run<float>(by_modality<router<softmax>>{plain, lp, experts / 2}, tokens, experts,
                   {.modality = modality});
      run<float>(expert_choice<>{}, tokens, experts, {});
      run<float>(sinkhorn{.k = 2}, tokens, experts, {});
      run<float>(sinkhorn_expert_choice{}, tokens, experts, {});
      run<float>(base_assignment{.phase = routing_phase::evaluation}, tokens, experts, {});
      workspace ws;
      assignment first;
      const std::vector<float> z = normals<float>(tokens * experts, 1);
      route(plain, matrix_view<const float>(z.data(), tokens, experts), ws, first);
      routing_record<std::uint16_t> record;
      record.record(first);
      run<float>(replay<softmax, std::uint16_t>{.record = &record}, tokens, experts, {});
    }
  }
  std::printf("lanes: %lld values seen, digest %016" PRIx64 "\n", seen, digest);
  return seen > 0 ? 0 : 1;
}
