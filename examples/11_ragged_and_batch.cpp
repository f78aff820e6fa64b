// Two routers of one's own: one with as many choices as a token is worth, one that sees the whole
// batch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/stage/route.hpp>
#include <vector>

/// Every expert that is at least as likely as half the best one.
struct as_good_as_half {
  static moeroute::index_t max_choices(moeroute::index_t columns) { return columns; }
  static moeroute::index_t experts(moeroute::index_t columns) { return columns; }
  static void check(moeroute::index_t) {}
  struct buffers {};
  static buffers carve(moeroute::scratch&, moeroute::index_t) { return {}; }

  // Row i's count[i] choices follow those of row i - 1; returns how many there are.
  static moeroute::index_t route_block(const moeroute::logit_block& z, const buffers&,
                                       moeroute::expert_id* id, float* weight,
                                       std::int32_t* count) {
    moeroute::index_t at = 0;
    for (int i = 0; i < z.rows; ++i) {
      const float best = moeroute::simd::row_max(z.row(i), z.experts);  // NaN is skipped
      count[i] = 0;
      for (moeroute::index_t e = 0; e < z.experts; ++e) {
        const float x = z.row(i)[e];
        const float ratio = x == best ? 1.0f : x < best ? std::exp(x - best) : 0.0f;
        if (!(ratio >= 0.5f) || !(x > moeroute::simd::minus_infinity)) continue;
        id[at] = static_cast<moeroute::expert_id>(e);
        weight[at++] = ratio;
        ++count[i];
      }
    }
    return at;
  }
};
static_assert(moeroute::ragged_router<as_good_as_half>);

/// Every expert in turn takes its best token that is still free.
struct one_token_each {
  static void check(moeroute::index_t, moeroute::index_t) {}

  template <moeroute::executor Exec>
  static void route_batch(moeroute::matrix_view<const float> z, const moeroute::side_inputs& side,
                          moeroute::workspace&, moeroute::assignment& out, const Exec&) {
    out.reset(z.rows, z.cols, 1);  // or reset_ragged(), offsets and close()
    std::fill(out.ids().begin(), out.ids().end(), moeroute::no_expert);
    std::fill(out.weights().begin(), out.weights().end(), 0.0f);
    for (moeroute::index_t e = 0; e < z.cols; ++e) {
      moeroute::index_t best = -1;
      for (moeroute::index_t t = 0; t < z.rows; ++t) {
        const bool free = out.ids(t)[0] == moeroute::no_expert && !side.masked(t);
        // Never true for NaN and -inf.
        if (free && z(t, e) > (best < 0 ? moeroute::simd::minus_infinity : z(best, e))) best = t;
      }
      if (best < 0) continue;
      out.ids()[static_cast<std::size_t>(best)] = static_cast<moeroute::expert_id>(e);
      out.weights()[static_cast<std::size_t>(best)] = 1.0f;
    }
  }
};
static_assert(moeroute::batch_router<one_token_each>);

int main() {
  constexpr int tokens = 4, experts = 3;
  const std::vector<float> logits{2.0f, 1.9f, 0.0f, 1.0f, 3.0f, 0.5f,
                                  0.1f, 0.2f, 0.3f, 2.5f, 0.0f, 2.4f};
  const moeroute::matrix_view<const float> z(logits.data(), tokens, experts);
  moeroute::workspace workspace;
  moeroute::assignment choices;

  moeroute::route(as_good_as_half{}, z, workspace, choices);
  for (int t = 0; t < tokens; ++t) {
    std::printf("token %d:", t);
    for (std::size_t c = 0; c < choices.ids(t).size(); ++c)
      std::printf(" expert %d (%.3f)", choices.ids(t)[c],
                  static_cast<double>(choices.weights(t)[c]));
    std::puts("");
  }
  moeroute::route(one_token_each{}, z, workspace, choices);
  for (int t = 0; t < tokens; ++t) std::printf("token %d goes to %d\n", t, choices.ids(t)[0]);
  return 0;
}
