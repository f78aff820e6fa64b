// Whole models as experts: which of several language models answers a query, what it costs and how
// good it is, on a synthetic table (support/query_routing.hpp).
#include <cstdio>
#include <vector>

#include "support/query_routing.hpp"

using namespace example;

int main() {
  const model_table t(4000);

  std::printf("by cost (CARROT): share of queries for each of four models, quality, cost\n");
  const std::vector<float> cost{0.125f, 0.25f, 0.5f, 1.0f};
  for (const float mu : {0.0f, 0.2f, 0.4f}) {
    const auto chosen = by_cost(t.qualities(), cost, mu);
    double count[4] = {}, quality = 0.0, spent = 0.0;
    for (index_t q = 0; q < t.queries; ++q) {
      const expert_id m = chosen[static_cast<std::size_t>(q)];
      count[m] += 1.0 / double(t.queries);
      quality += double{t.qualities()(q, m)} / double(t.queries);
      spent += double{t.costs()(q, m)} / double(t.queries);
    }
    std::printf("  mu %.1f: %.2f %.2f %.2f %.2f, quality %.3f, cost %.3f\n", double{mu}, count[0],
                count[1], count[2], count[3], quality, spent);
  }

  std::vector<float> win;  // that the last model beats the first
  for (index_t q = 0; q < t.queries; ++q)
    win.push_back(t.qualities()(q, 3) - t.qualities()(q, 0) + 0.5f);
  for (const float threshold : {0.6f, 0.8f}) {
    const auto chosen = by_threshold({win.data(), t.queries, 1}, threshold);
    std::printf("by threshold %.1f (RouteLLM): %.2f of the queries go to the strong model\n",
                double{threshold},
                double(std::count(chosen.begin(), chosen.end(), 1)) / double(t.queries));
  }

  index_t calls = 0;
  const auto answers = [&](index_t m, index_t q) {
    // A sure model has one large logit.
    static std::vector<float> z(4);
    z.assign(4, 0.0f);
    z[0] = 6.0f * t.qualities()(q, m);
    return std::span<const float>(z);
  };
  const auto chosen = cascade(4, t.queries, 0.5, answers, calls);
  std::printf("a cascade by entropy: %.2f models asked per query, the first answers %.2f\n",
              double(calls) / double(t.queries),
              double(std::count(chosen.begin(), chosen.end(), 0)) / double(t.queries));

  linear_bandit bandit(4, 2, 1.0);
  double first = 0.0, last = 0.0;
  for (index_t q = 0; q < t.queries; ++q) {
    const std::vector<double> x{1.0, double{t.costs()(q, 0)}};
    const expert_id m = bandit.choose(x);
    const double reward = double{t.qualities()(q, m)};
    bandit.learn(m, x, reward);
    if (q < 200) first += reward / 200.0;
    if (q >= t.queries - 200) last += reward / 200.0;
  }
  std::printf("a linear bandit: quality %.3f over the first 200 queries, %.3f over the last\n",
              first, last);

  const served greedy = serve_greedily(t), priced = serve_by_prices(t, 0.1);
  std::printf("under budgets: the best model serves %td queries, quality %.0f\n", greedy.queries,
              greedy.quality);
  std::printf("  prices learnt from the first tenth (PORT): %td queries, quality %.0f\n",
              priced.queries, priced.quality);
}
