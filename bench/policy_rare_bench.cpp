// Rules of selection, steps on logits, counts from the row and exploration, each against the same
// as an inlined loop over the row.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/policy/parts/selection_rules.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/counted.hpp>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/row/product_keys.hpp>
#include <moeroute/policy/row/transformed.hpp>

#include "support/plain_rules.hpp"
#include "support/rule_contest.hpp"

namespace {

using bench::add_everywhere;
using bench::agreement;
using bench::index_t;
using bench::rule;
using moeroute::expert_id;
using moeroute::side_inputs;

constexpr index_t k = 8, few = 2;
constexpr float lowest = bench::detail::lowest;

// The k best of a row that step(row, experts, token, side, out) made of the row, whose size it
// returns; weighed by the softmax over them, or by `raw` as they are.
template <class Step>
struct plain_step {
  Step step;
  index_t choices = few;
  bool raw = false;
  std::vector<float> made;
  bench::plain_softmax_k best{};

  index_t operator()(const float* row, index_t columns, index_t token, const side_inputs& side,
                     expert_id* id, float* weight) {
    made.resize(static_cast<std::size_t>(columns));
    const index_t n = step(row, columns, token, side, made.data());
    if (raw) {
      best.select.partial_sort(made.data(), n, choices, id, weight);
      return choices;
    }
    best.k = choices;
    return best(made.data(), n, token, side, id, weight);
  }
};
template <class Step>
plain_step<Step> after(Step step, bool raw = false, index_t choices = few) {
  return {step, choices, raw, {}, {}};
}

std::pair<float, float> moments(const float* row, index_t n) {
  float sum = 0.0f, square = 0.0f;
  for (index_t e = 0; e < n; ++e) sum += row[e];
  const float mean = sum / static_cast<float>(n);
  for (index_t e = 0; e < n; ++e) square += (row[e] - mean) * (row[e] - mean);
  return {mean, std::sqrt(square / static_cast<float>(n))};
}

// As many of the best as the row says: the scores, a sort, the count.
struct plain_counted {
  moeroute::row_count count;
  std::vector<float> score, sorted;
  std::vector<expert_id> order;

  index_t operator()(const float* row, index_t n, index_t, const side_inputs&, expert_id* id,
                     float* weight) {
    const float max = bench::detail::row_max(row, n);
    const float total = bench::detail::exponentials(row, n, max, score);
    float entropy = 0.0f;
    order.clear();
    sorted.clear();
    for (index_t e = 0; e < n; ++e) {
      float& p = score[static_cast<std::size_t>(e)];
      p /= total;
      if (!(row[e] > lowest)) continue;
      order.push_back(static_cast<expert_id>(e));
      sorted.push_back(p);
      if (count.rule == moeroute::count_rule::entropy && p > 0.0f) entropy -= p * std::log(p);
    }
    if (order.empty()) return 0;
    float least = count.ratio / total;
    if (count.rule == moeroute::count_rule::percentile) {
      std::sort(sorted.begin(), sorted.end());
      const float place = count.quantile * static_cast<float>(sorted.size() - 1);
      const auto low = static_cast<std::size_t>(place);
      const float above = sorted[std::min(low + 1, sorted.size() - 1)];
      least = sorted[low] + (place - static_cast<float>(low)) * (above - sorted[low]);
    }
    const auto said =
        std::count_if(sorted.begin(), sorted.end(), [&](float p) { return p >= least; });
    index_t most = count.rule != moeroute::count_rule::entropy ? said
                   : entropy < count.low                       ? count.min_k
                   : entropy > count.high                      ? count.max_k
                                                               : count.mid_k;
    most = std::min<index_t>(std::clamp(most, count.min_k, count.most(n)),
                             static_cast<index_t>(order.size()));
    std::partial_sort(
        order.begin(), order.begin() + most, order.end(),
        [&](expert_id a, expert_id b) { return row[a] > row[b] || (row[a] == row[b] && a < b); });
    for (index_t r = 0; r < most; ++r) {
      id[r] = order[static_cast<std::size_t>(r)];
      weight[r] = score[static_cast<std::size_t>(id[r])];
    }
    return most;
  }
};

// Everything where Tsallis' entropy is high, else the prefix that reaches p.
struct plain_dense_if {
  moeroute::dense_if how;
  bench::plain_top_p sparse;

  index_t operator()(const float* row, index_t n, index_t token, const side_inputs& side,
                     expert_id* id, float* weight) {
    const float total =
        bench::detail::exponentials(row, n, bench::detail::row_max(row, n), sparse.score);
    float powers = 0.0f;
    for (index_t e = 0; e < n; ++e)
      powers += std::pow(sparse.score[static_cast<std::size_t>(e)] / total, how.q);
    const float even = std::pow(static_cast<float>(n), 1.0f - how.q);
    sparse.p = (1.0f - powers) / (1.0f - even) > how.threshold ? 2.0f : how.rule.p;
    return sparse(row, n, token, side, id, weight);
  }
};

// With probability epsilon k distinct experts by Floyd's sampling, from the same random numbers,
// else the k best.
struct plain_explore {
  float epsilon;
  bench::plain_softmax_k best{};

  index_t operator()(const float* row, index_t n, index_t token, const side_inputs& side,
                     expert_id* id, float* weight) {
    using moeroute::detail::random_use;
    const auto of = static_cast<std::uint64_t>(token);
    const std::uint64_t coins = moeroute::detail::random_stream(random_use::explore, side.step);
    if (!(moeroute::random_u01(side.seed, coins, of) < epsilon))
      return best(row, n, token, side, id, weight);
    const std::uint64_t stream =
        moeroute::detail::random_stream(random_use::explored_choice, side.step);
    float sum = 0.0f;
    const float max = bench::detail::row_max(row, n);
    for (index_t r = 0; r < best.k; ++r) {
      const auto limit = static_cast<std::uint32_t>(n - best.k + r + 1);
      auto e = static_cast<expert_id>(moeroute::random_below(
          limit, side.seed, stream,
          of * static_cast<std::uint64_t>(best.k) + static_cast<std::uint64_t>(r)));
      if (std::find(id, id + r, e) != id + r) e = static_cast<expert_id>(limit) - 1;
      id[r] = e;
      sum += weight[r] = std::exp(row[e] - max);
    }
    for (index_t r = 0; r < best.k; ++r) weight[r] /= sum;
    return best.k;
  }
};

template <class Step>
auto over(Step step) {
  return moeroute::transformed<Step, moeroute::router<moeroute::softmax_selected>>{
      step, {.selection = {.k = few}}};
}

const bool registered = [] {
  using namespace moeroute;
  const auto add = [](const std::string& name, index_t least, const bench::rule_run& f) {
    add_everywhere("rare/" + name, least, f);
  };
  // Where rows are cut into parts: multiples of four.
  const auto add_parts = [](const std::string& name, const bench::rule_run& f) {
    for (const char* shape : bench::shapes) bench::add_rule("rare/" + name, {1024, 64, shape}, f);
    for (const index_t columns : {8, 60, 72, 256, 2048})
      bench::add_rule("rare/" + name, {1024, columns, "normal"}, f);
    for (const index_t columns : {8, 64, 256})
      bench::add_rule("rare/" + name, {1, columns, "normal"}, f);
  };
  for (const auto& [name, how] :
       {std::pair<const char*, row_count>{"ratio", {.rule = count_rule::ratio, .max_k = k}},
        {"percentile", {.rule = count_rule::percentile, .quantile = 0.9f, .max_k = k}},
        {"entropy", {.rule = count_rule::entropy, .low = 1.0f, .high = 3.0f, .max_k = 3}}})
    add(std::string("count:") + name, 3,
        rule(counted<>{.count = how}, plain_counted{how, {}, {}, {}}));
  const dense_if undecided{.rule = {.p = 0.75f}};
  add("dense_if", 3, rule(undecided, plain_dense_if{undecided, {}}, agreement::not_asked));

  add("standardized", 2,
      rule(over(standardized{.lambda = 2.0f}),
           after([](const float* row, index_t n, index_t, const side_inputs&, float* out) {
             const auto [mean, deviation] = moments(row, n);
             for (index_t e = 0; e < n; ++e) out[e] = 2.0f * (row[e] - mean) / deviation;
             return n;
           }),
           agreement::not_asked));
  static const std::vector<expert_id> up{0, 2}, down{1};
  for (const promotion how : {promotion::soft, promotion::hard})
    add(std::string("steering:") + (how == promotion::soft ? "soft" : "hard"), 7,
        rule(over(steering{.promote = up, .suppress = down, .how = how}),
             after([how](const float* row, index_t n, index_t, const side_inputs&, float* out) {
               std::copy_n(row, n, out);
               const float max = bench::detail::row_max(row, n);
               const float more = how == promotion::soft ? moments(row, n).second : 0.0f;
               float rank = 2.0f;
               for (const expert_id e : up)
                 out[e] = how == promotion::soft ? row[e] + more : max + 1e-6f * rank--;
               for (const expert_id e : down) out[e] = lowest;
               return n;
             }),
             agreement::not_asked));
  add("candidates", 7,
      rule(over(candidates{.active = 4}),
           after([random = std::mt19937(5), key = std::vector<std::uint32_t>(),
                  order = std::vector<expert_id>()](const float* row, index_t n, index_t,
                                                    const side_inputs&, float* out) mutable {
             key.resize(static_cast<std::size_t>(n));
             order.resize(key.size());
             for (std::size_t e = 0; e < key.size(); ++e) {
               key[e] = static_cast<std::uint32_t>(random());
               order[e] = static_cast<expert_id>(e);
             }
             std::nth_element(
                 order.begin(), order.begin() + 3, order.end(), [&](expert_id a, expert_id b) {
                   return key[static_cast<std::size_t>(a)] < key[static_cast<std::size_t>(b)];
                 });
             std::fill_n(out, n, lowest);
             for (int i = 0; i < 4; ++i)
               out[order[static_cast<std::size_t>(i)]] = row[order[static_cast<std::size_t>(i)]];
             return n;
           }),
           agreement::not_asked));
  add_parts("passes", [](benchmark::State& state, const bench::rule_input& in) {
    bench::compete_rule(
        state, in, over(pass_logits{.passes = 4}),
        after([](const float* row, index_t n, index_t, const side_inputs&, float* out) {
          for (index_t e = 0; e < n / 4; ++e) {
            float sum = 0.0f, square = 0.0f;
            for (int p = 0; p < 4; ++p) sum += row[p * (n / 4) + e];
            for (int p = 0; p < 4; ++p) {
              const float d = row[p * (n / 4) + e] - sum / 4.0f;
              square += d * d;
            }
            out[e] = sum / 4.0f - std::sqrt(square / 4.0f);
          }
          return n / 4;
        }),
        bench::drawn_sides(in), agreement::not_asked);
  });
  const auto halves = [&](const char* name, const auto& router, const auto& plain) {
    add_parts(name, [=](benchmark::State& state, const bench::rule_input& in) {
      bench::compete_rule(state, in, router, plain, bench::drawn_sides(in), agreement::not_asked);
    });
  };
  const router<identity_score> by_value{.selection = {.k = few}};
  halves("two_sigmoids", transformed<sigmoid_sum, router<identity_score>>{sigmoid_sum{}, by_value},
         after(
             [](const float* row, index_t n, index_t, const side_inputs&, float* out) {
               for (index_t e = 0; e < n / 2; ++e)
                 out[e] =
                     1.0f / (1.0f + std::exp(-row[e])) + 1.0f / (1.0f + std::exp(-row[n / 2 + e]));
               return n / 2;
             },
             true));
  halves("weighed_by_second", weighed_by_second<router<identity_score>>{by_value},
         [best = bench::plain_selection()](const float* row, index_t n, index_t, const side_inputs&,
                                           expert_id* id, float* weight) mutable {
           best.partial_sort(row, n / 2, few, id, weight);
           for (index_t r = 0; r < few; ++r) weight[r] = id[r] < 0 ? 0.0f : row[n / 2 + id[r]];
           return few;
         });
  add_parts("each_group", [](benchmark::State& state, const bench::rule_input& in) {
    constexpr index_t groups = 4;
    const router<softmax, top_of_each_group> ours{.selection = {groups, groups}};
    bench::compete_rule(
        state, in, ours,
        [](const float* row, index_t n, index_t, const side_inputs&, expert_id* id, float* weight) {
          for (index_t g = 0; g < groups; ++g) {
            const float* const first = row + g * (n / groups);
            const auto best = std::max_element(first, first + n / groups) - row;
            id[g] = row[best] > lowest ? static_cast<expert_id>(best) : no_expert;
          }
          bench::detail::softmax_of_chosen(row, n, id, groups, weight);
          return groups;
        },
        bench::drawn_sides(in), agreement::not_asked);
  });
  add("ties:higher_id", 2,
      rule(
          router<softmax, ordered_ties<>>{.selection = {.rule = {.k = few}}},
          [order = std::vector<expert_id>()](const float* row, index_t n, index_t,
                                             const side_inputs&, expert_id* id,
                                             float* weight) mutable {
            order.resize(static_cast<std::size_t>(n));
            for (index_t e = 0; e < n; ++e)
              order[static_cast<std::size_t>(e)] = static_cast<expert_id>(e);
            std::partial_sort(order.begin(), order.begin() + few, order.end(),
                              [&](expert_id a, expert_id b) {
                                return row[a] > row[b] || (row[a] == row[b] && a > b);
                              });
            for (index_t r = 0; r < few; ++r) {
              const expert_id e = order[static_cast<std::size_t>(r)];
              id[r] = row[e] > lowest ? e : no_expert;
            }
            bench::detail::softmax_of_chosen(row, n, id, few, weight);
            return few;
          },
          agreement::not_asked));
  add("class_bias", 2, [](benchmark::State& state, const bench::rule_input& in) {
    std::vector<float> bias[2];
    for (index_t e = 0; e < in.experts; ++e) {
      bias[0].push_back(static_cast<float>(e % 5) * 0.02f);
      bias[1].push_back(static_cast<float>(e % 3) * 0.05f);
    }
    const router<sigmoid, class_bias<>> ours{
        .selection = {{.k = few}, {selection_bias(bias[0]), selection_bias(bias[1])}}};
    std::vector<float> biased(bias[0].size());
    bench::compete_rule(
        state, in, ours,
        [&bias, biased, best = bench::plain_selection()](const float* row, index_t n, index_t token,
                                                         const side_inputs& side, expert_id* id,
                                                         float* weight) mutable {
          const auto& b = bias[side.modality[static_cast<std::size_t>(token)] != 0];
          for (index_t e = 0; e < n; ++e) {
            const auto i = static_cast<std::size_t>(e);
            biased[i] = row[e] > lowest ? 1.0f / (1.0f + std::exp(-row[e])) + b[i] : lowest;
          }
          best.partial_sort(biased.data(), n, few, id, weight);
          for (index_t r = 0; r < few; ++r)
            weight[r] = id[r] < 0 ? 0.0f : weight[r] - b[static_cast<std::size_t>(id[r])];
          return few;
        },
        bench::drawn_sides(in), agreement::not_asked);
  });
  for (const float epsilon : {0.05f, 1.0f}) {
    const router<softmax_selected> best{.selection = {.k = few}};
    add(epsilon < 1.0f ? "explore/epsilon:0.05" : "explore/epsilon:1", 2,
        rule(explore<router<softmax_selected>>{best, epsilon}, plain_explore{epsilon, {few, {}}},
             agreement::not_asked));
  }
  return true;
}();

}  // namespace
