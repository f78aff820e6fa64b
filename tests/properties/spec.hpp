// Property: a router_spec of any content is refused in a sentence, or routes as it says.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_batch_router.hpp>
#include <moeroute/policy/spec_text.hpp>
#include <moeroute/stage/route.hpp>
#include <span>
#include <string>
#include <vector>

#include "oracle/spec_routing.hpp"
#include "properties/bytes.hpp"

namespace test {

namespace detail {

// Numbers that a field may be given by mistake among those that it is meant for.
inline float parameter(bytes& in, float usual) {
  constexpr float odd[] = {0.0f, 1.0f, 0.5f, 2.5f, 1e-20f, -1.0f, 1e-3f};
  const auto b = in.below(32);
  if (b < 7) return odd[b];
  if (b == 7) return in.raw();
  return usual;
}

inline moeroute::router_spec any_spec(bytes& in) {
  using namespace moeroute;
  router_spec s;
  const index_t start = in.below(static_cast<index_t>(std::size(catalog)) + 1);
  if (start > 0) s = catalog[static_cast<std::size_t>(start - 1)].spec;
  s.experts = in.usually(s.experts > 300 ? 64 : s.experts, [&] { return in.below(300); });
  s.k = in.usually(std::min(s.k, s.experts), [&] { return in.below(20); });
  const auto change = [&] { return in.below(8) == 0; };
  if (change()) s.score = in.one_of(score_kind::uniform);
  if (change()) s.domain = in.one_of(score_domain::selected);
  if (change()) s.selection = in.one_of(selection_kind::random);
  if (change()) s.selection_bias = in.flag();
  if (change()) s.groups = in.below(17);
  if (change()) s.topk_group = in.below(9);
  if (change()) s.group_score = in.one_of(group_score::sum);
  if (change()) s.group_fill = parameter(in, 0.0f);
  if (change()) s.lost_weight = in.one_of(lost_weight::own);
  if (change()) s.normalize = in.one_of(normalization::lp);
  if (change()) s.lp_p = parameter(in, 2.0f);
  if (change()) s.eps_where = in.one_of(eps_mode::clamp);
  if (change()) s.eps = parameter(in, 1e-9f);
  if (change()) s.scale = parameter(in, 2.5f);
  if (change()) s.scale_where = in.one_of(scale_place::output);
  if (change()) s.divide_by_k = in.flag();
  if (change()) s.output_scale = parameter(in, 2.0f);
  if (change()) s.per_expert_scale = in.flag();
  if (change()) s.softcap = parameter(in, 30.0f);
  if (change()) s.temperature = parameter(in, 1.5f);
  if (change()) s.jitter = parameter(in, 0.1f);
  if (change()) s.top_p = parameter(in, 0.7f);
  if (change()) s.crossing = in.one_of(crossing::exclude);
  if (change()) s.min_k = in.below(10);
  if (change()) s.max_k = in.below(20);
  if (change()) s.threshold = parameter(in, 0.1f);
  if (change()) s.row_norm = in.one_of(threshold_norm::rms);
  if (change()) s.zero_experts = in.below(20);
  if (change()) s.capacity = in.below(5);
  // The rare words: most specs have none.
  if (in.below(3) != 0) return s;
  if (in.below(4) == 0) s.selection = in.one_of(selection_kind::soft);
  if (change()) s.score = in.one_of(score_kind::softplus);
  if (change()) s.group_score = in.one_of(group_score::sum);
  if (change()) s.ties = in.one_of(tie_order::higher_id);
  if (change()) s.class_bias = in.flag();
  if (change()) s.weight_apart = in.flag();
  s.weight_score = in.one_of(score_kind::softplus);
  s.weight_domain = in.one_of(score_domain::selected);
  if (change()) s.second = in.one_of(second_expert::random);
  if (change()) s.table_key = in.one_of(table_key::bigram);
  if (change()) s.first_keys = in.below(20);
  if (change()) s.second_logits = in.one_of(logit_pairs::weigh);
  if (change()) s.passes = in.below(5);
  if (change()) s.pass_rule = in.one_of(pass_rule::ratio);
  if (change()) s.pass_lambda = parameter(in, 1.0f);
  if (change()) s.standardize = parameter(in, 1.5f);
  if (change()) s.steering = in.flag();
  if (change()) s.candidates = in.below(20);
  if (change()) s.noise = in.one_of(noise_kind::gumbel);
  if (change()) s.noise_sigma = parameter(in, 0.1f);
  if (change()) s.count = in.one_of(count_rule::tsallis);
  if (change()) s.count_scope = in.one_of(row_scope::batch);
  if (change()) s.quantile = parameter(in, 0.75f);
  if (change()) s.ratio = parameter(in, 0.5f);
  if (change()) s.entropy_low = parameter(in, 0.5f);
  if (change()) s.entropy_high = parameter(in, 1.0f);
  if (change()) s.mid_k = in.below(8);
  if (change()) s.tsallis_q = parameter(in, 1.1f);
  if (change()) s.dense_above = parameter(in, 0.9f);
  if (change()) s.take.factor = static_cast<double>(parameter(in, 1.25f));
  if (change()) s.take.fixed = in.below(10);
  if (change()) s.sequence = in.below(8);
  if (change()) s.phase = in.one_of(routing_phase::evaluation);
  if (change()) s.plan_weights = in.one_of(plan_weights::plan);
  s.plan.most_iterations = 1 + in.below(20);
  s.probability = parameter(in, 0.5f);
  if (change()) s.plan.temperature = parameter(in, 0.5f);
  if (change()) s.plan.eps = parameter(in, 1e-8f);
  if (change()) s.support = in.below(6);
  if (change()) s.plan_gamma = parameter(in, 0.5f);
  if (change()) s.solver = in.one_of(assignment_solver::optimal);
  if (change()) s.rounds = in.below(50);
  if (change()) s.explore = parameter(in, 0.5f);
  if (change()) s.explore_scope = in.one_of(row_scope::batch);
  if (change()) s.shares = in.flag();
  if (change()) s.gate_bias = in.flag();
  if (change())
    s.gate = {.kind = in.one_of(gate_kind::none),
              .d = in.below(40),
              .width = in.below(40),
              .activation = in.one_of(gate_activation::silu),
              .temperature = parameter(in, 0.07f),
              .scale = parameter(in, 0.5f),
              .eps = parameter(in, 1e-6f)};
  return s;
}

// What holds for every decision.
inline std::string shape_break(const moeroute::assignment& a) {
  for (index_t t = 0; t < a.tokens(); ++t) {
    std::vector<moeroute::expert_id> ids(a.ids(t).begin(), a.ids(t).end());
    for (std::size_t r = 0; r < ids.size(); ++r) {
      const float w = a.weights(t)[r];
      if (ids[r] < -1 || ids[r] >= a.experts()) return "id " + std::to_string(ids[r]);
      if (!std::isfinite(w)) return "weight " + std::to_string(w);
      if (ids[r] < 0 && w != 0.0f) return "a weight without an expert";
    }
    std::erase(ids, moeroute::no_expert);
    std::sort(ids.begin(), ids.end());
    if (std::adjacent_find(ids.begin(), ids.end()) != ids.end()) return "an expert twice";
  }
  return "";
}

}  // namespace detail

namespace detail {

// Whether the powers of a row's scores that Lp normalisation adds up are lost in a float.
inline bool loses_powers(const moeroute::router_spec& s, std::span<const float> row) {
  if (s.normalize != moeroute::normalization::lp || row.empty()) return false;
  if (s.score == moeroute::score_kind::relu && (s.softcap != 0.0f || s.temperature != 1.0f))
    return true;  // logits become as small as one likes
  const auto top = static_cast<double>(*std::max_element(row.begin(), row.end()));
  const double least = s.score == moeroute::score_kind::relu
                           ? top
                           : std::min(1.0 / (1.0 + std::exp(-top)), 1.0 / double(row.size()));
  return least > 0.0 && std::pow(least, static_cast<double>(s.lp_p)) < 1e-30;
}

// A line of text with a few bytes of another: refused in a sentence, or a spec that prints as it is
// read.
inline std::string text_break(std::string line, bytes& in) {
  constexpr std::string_view letters = "=  E8k2.-+eabcgnxyz_09\n\t";
  for (auto changes = in.below(4); changes > 0 && !line.empty(); --changes) {
    const auto at = static_cast<std::size_t>(in.below(static_cast<index_t>(line.size())));
    const char letter =
        letters[static_cast<std::size_t>(in.below(static_cast<index_t>(letters.size())))];
    switch (in.below(4)) {
      case 0: line[at] = letter; break;
      case 1: line.insert(line.begin() + static_cast<std::ptrdiff_t>(at), letter); break;
      case 2: line.erase(at, 1); break;
      default: line += line.substr(at); break;
    }
  }
  try {
    const std::string once = to_string(moeroute::parse_spec(line));
    const std::string again = to_string(moeroute::parse_spec(once));
    if (again != once) return line + ": " + once + " is read as " + again;
  } catch (const moeroute::error& refused) {
    if (!std::string_view(refused.what()).starts_with("moeroute::"))
      return line + ": refused without a place";
  }
  return "";
}

}  // namespace detail

/// How many specs had the ids and weights of at least one token compared with the oracle's.
inline std::int64_t specs_compared = 0;

inline std::string spec_property(bytes in) {
  using namespace moeroute;
  const router_spec s = detail::any_spec(in);
  const index_t tokens = in.below(36);
  std::vector<float> bias, other_bias, scale, share;
  std::vector<std::int32_t> token_ids;
  std::vector<std::uint8_t> modality;
  for (index_t e = 0; e < std::max<index_t>(0, s.experts); ++e) {
    const auto number = static_cast<float>(in.below(64));
    if (s.selection_bias) bias.push_back((number - 32.0f) / 256.0f);
    if (s.class_bias) other_bias.push_back((number - 20.0f) / 128.0f);
    if (s.per_expert_scale) scale.push_back(0.5f + number / 64.0f);
    if (s.shares) share.push_back(0.5f + number);
  }
  std::vector<expert_id> promote, suppress;
  for (index_t e = 0; s.steering && e < std::min<index_t>(s.experts, 8); ++e)
    if (const auto b = in.below(4); b > 1)
      (b == 2 ? promote : suppress).push_back(static_cast<expert_id>(e));
  const steering steer{.promote = promote,
                       .suppress = suppress,
                       .how = in.flag() ? promotion::soft : promotion::hard,
                       .lambda = detail::parameter(in, 0.5f)};
  expert_table table;
  std::string told = to_string(s);
  if (const std::string broken = detail::text_break(told, in); !broken.empty()) return broken;
  try {
    check(s);
    if (to_string(parse_spec(told)) != told) return told + ": parsed as another router";
    if (s.selection == selection_kind::expert_table)
      table = random_table(5, s.k, s.experts, in.take<std::uint32_t>());
    const std::vector<float> z = in.logits(tokens * s.columns());
    for (index_t t = 0; t < tokens; ++t) {
      token_ids.push_back(static_cast<std::int32_t>(in.below(5)));
      modality.push_back(in.flag());
    }
    workspace memory;
    assignment out;
    if (s.selection == selection_kind::soft) return "";
    with_router(s,
                {.bias = bias,
                 .per_expert_scale = scale,
                 .table = &table,
                 .second_bias = other_bias,
                 .steer = steer,
                 .share = share},
                [&](const auto& router) {
                  const side_inputs side{.token_ids = token_ids, .modality = modality};
                  route(router, matrix_view<const float>(z.data(), tokens, s.columns()),
                        side.only(router.reads_side(s.columns())), memory, out);
                });
    if (const std::string broken = detail::shape_break(out); !broken.empty())
      return told + ": " + broken;
    if (out.ragged() || s.sees_batch() || s.selection == selection_kind::random ||
        s.selection == selection_kind::top2 || s.noise != noise_kind::none || s.candidates != 0 ||
        s.explore != 0.0f || s.table_key == table_key::bigram)
      return "";
    // A sum of either sign may vanish, and then rounding decides.
    if (s.normalize != normalization::none &&
        (s.weight_apart ? s.weight_score : s.score) == score_kind::identity)
      return "";
    // Products of the parameters beyond what a float holds are the caller's choice.
    const double size = std::abs(static_cast<double>(s.scale)) *
                        std::max(1.0, static_cast<double>(s.eps)) *
                        std::max(1.0, static_cast<double>(s.lp_p));
    if (size > 1e6 || size < 1e-6 || s.temperature < 0.1f || s.lp_p < 0.1f) return "";
    router_spec decided = s;
    if (s.capacity != 0 && !s.normalize_before_drop) {
      decided.normalize = normalization::none;  // left to the stage that drops
      decided.eps_where = eps_mode::none;
    }
    bool compared = false;
    for (index_t t = 0; t < tokens; ++t) {
      const std::span<const float> row(z.data() + t * s.columns(),
                                       static_cast<std::size_t>(s.columns()));
      if (detail::loses_powers(s, row)) continue;
      const oracle::token_inputs token{
          z.data() + t * s.columns(),
          s.class_bias && modality[static_cast<std::size_t>(t)] != 0 ? other_bias : bias, scale,
          s.selection == selection_kind::expert_table
              ? table.of(token_ids[static_cast<std::size_t>(t)])
              : std::span<const expert_id>{},
          steer};
      if (const std::string broken = oracle::break_of(decided, token, out.ids(t), out.weights(t));
          !broken.empty())
        return told + ": token " + std::to_string(t) + ": " + broken;
      compared = true;
    }
    specs_compared += compared;
  } catch (const error& refused) {
    const std::string_view sentence = refused.what();
    if (sentence.find(':') == std::string_view::npos) return "refused without a place";
  }
  return "";
}

}  // namespace test
