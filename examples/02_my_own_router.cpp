// A router of one's own: a struct with five functions, routed like any other.
#include <cstdio>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>
#include <vector>

/// The best expert of each of `groups` groups (one group to a machine, say, so that every machine
/// gets the same number of tokens), weighted by the softmax over the chosen ones.
struct one_per_group {
  moeroute::index_t groups = 2;

  moeroute::index_t k() const { return groups; }
  static moeroute::index_t experts(moeroute::index_t columns) { return columns; }
  void check(moeroute::index_t experts) const {  // refuses what does not fit, once per call
    moeroute::check_range("one_per_group", "groups", groups, 1, experts);
  }
  struct buffers {};  // scratch of one block, taken from the workspace: none here
  static buffers carve(moeroute::scratch&, moeroute::index_t) { return {}; }

  // Up to 16 tokens at once; choice r of row i is at [r * 16 + i].
  void route_block(const moeroute::logit_block& z, const buffers&,
                   moeroute::choice_block& c) const {
    for (int i = 0; i < z.rows; ++i)
      for (int g = 0; g < c.k; ++g) {
        moeroute::expert_id& best = c.id[g * moeroute::block_rows + i];
        float& value = c.value[g * moeroute::block_rows + i];
        best = moeroute::no_expert;
        value = moeroute::simd::minus_infinity;
        for (auto e = g * z.experts / groups; e < (g + 1) * z.experts / groups; ++e)
          if (z.row(i)[e] > value) {  // never true for NaN and -inf
            value = z.row(i)[e];
            best = static_cast<moeroute::expert_id>(e);
          }
      }
    moeroute::softmax_selected::score_choices(z, c, moeroute::score_scale::exact);
  }
};
static_assert(moeroute::token_router<one_per_group>);

int main() {
  constexpr int tokens = 6, experts = 8;
  std::vector<float> logits;
  for (int i = 0; i < tokens * experts; ++i)
    logits.push_back(static_cast<float>(i * 37 % 64) / 16.0f);

  moeroute::workspace workspace;
  moeroute::assignment choices;
  moeroute::dispatch_plan plan;
  moeroute::route(one_per_group{2},
                  moeroute::matrix_view<const float>(logits.data(), tokens, experts), workspace,
                  choices);
  moeroute::plan(choices, plan);

  for (int t = 0; t < tokens; ++t)
    std::printf("token %d: expert %d of the first group (%.3f), expert %d of the second (%.3f)\n",
                t, choices.ids(t)[0], static_cast<double>(choices.weights(t)[0]), choices.ids(t)[1],
                static_cast<double>(choices.weights(t)[1]));
  std::ptrdiff_t first = 0;
  for (int e = 0; e < experts / 2; ++e) first += plan.load(e);
  std::printf("the first group serves %td of %d choices\n", first, 2 * tokens);
  return 0;
}
