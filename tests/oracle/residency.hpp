// What residency rules choose, in plain loops over sorted lists.
#pragma once

#include <algorithm>
#include <cmath>
#include <moeroute/residency/rule.hpp>
#include <numeric>
#include <set>
#include <vector>

namespace oracle {

using moeroute::expert_id;
using moeroute::index_t;
using moeroute::residency_kind;

/// All experts that can be chosen, best first.
inline std::vector<expert_id> ranked(const std::vector<float>& s) {
  std::vector<expert_id> order;
  for (std::size_t e = 0; e < s.size(); ++e)
    if (s[e] > -INFINITY) order.push_back(static_cast<expert_id>(e));
  std::stable_sort(order.begin(), order.end(), [&](expert_id a, expert_id b) {
    return s[static_cast<std::size_t>(a)] > s[static_cast<std::size_t>(b)];
  });
  return order;
}

/// One token's choice from its choice scores; drop_cold, which looks at weights, aside.
inline std::vector<expert_id> choose(const moeroute::residency_rule& rule,
                                     const std::set<expert_id>& held, std::vector<float> s,
                                     index_t k) {
  const auto at = [&](expert_id e) { return s[static_cast<std::size_t>(e)]; };
  const auto cut = [](std::vector<expert_id> list, index_t n) {
    if (static_cast<index_t>(list.size()) > n) list.resize(static_cast<std::size_t>(n));
    return list;
  };
  const std::vector<expert_id> order = ranked(s);
  std::vector<expert_id> plain = cut(order, k);
  if (!rule.active() || order.empty()) return plain;
  if (at(order[0]) == INFINITY && rule.kind != residency_kind::max_rank &&
      rule.kind != residency_kind::mass_threshold &&
      !(rule.kind == residency_kind::within && rule.ranks > 0))
    return plain;
  const float range = rule.range == moeroute::score_range::running
                          ? rule.running->value()
                          : at(order.front()) - at(order.back());
  const std::vector<expert_id> forced = cut(order, rule.forced);
  const auto is_in = [](const std::vector<expert_id>& list, expert_id e) {
    return std::find(list.begin(), list.end(), e) != list.end();
  };
  if (rule.kind == residency_kind::cache_prior ||
      (rule.kind == residency_kind::within && rule.ranks == 0)) {
    std::vector<float> moved = s;
    for (std::size_t e = 0; e < s.size(); ++e) {
      const bool in = held.contains(static_cast<expert_id>(e));
      if (rule.kind == residency_kind::within)
        moved[e] = in ? s[e] : -INFINITY;
      else if (in)
        moved[e] = s[e] + rule.strength * range;
    }
    std::vector<expert_id> out = forced;
    for (const expert_id e : ranked(moved))
      if (!is_in(forced, e)) out.push_back(e);
    return cut(out, k);
  }
  if (rule.kind == residency_kind::max_rank || rule.kind == residency_kind::mass_threshold ||
      rule.kind == residency_kind::within) {
    const auto experts = static_cast<index_t>(s.size());
    index_t best = rule.ranks == 0 ? std::min(experts, 4 * k) : rule.ranks;
    const std::vector<expert_id> seen = cut(order, best);
    if (rule.kind == residency_kind::mass_threshold && at(order[0]) < INFINITY) {
      double total = 0, mass = 0;
      for (const expert_id e : order) total += std::exp(double(at(e)) - double(at(order[0])));
      index_t n = 0;
      while (n < static_cast<index_t>(seen.size()) && mass < double(rule.strength) * total)
        mass += std::exp(double(at(seen[static_cast<std::size_t>(n++)])) - double(at(order[0])));
      best = std::max(n, k);
    }
    std::vector<expert_id> out = forced;
    const std::vector<expert_id> candidates = cut(seen, best);
    for (const expert_id e : candidates)
      if (held.contains(e) && !is_in(out, e)) out.push_back(e);
    if (rule.kind != residency_kind::within)
      for (const expert_id e : seen)
        if (!is_in(out, e)) out.push_back(e);
    return cut(out, k);
  }
  std::vector<expert_id> out = plain;
  if (rule.kind == residency_kind::margin_swap) {
    index_t left = rule.swaps == 0 ? k : rule.swaps;
    for (auto r = static_cast<index_t>(out.size()) - 1; r >= rule.forced && left > 0; --r) {
      expert_id& e = out[static_cast<std::size_t>(r)];
      if (held.contains(e)) continue;
      for (const expert_id f : order) {
        if (!held.contains(f) || is_in(plain, f) || is_in(out, f)) continue;
        if (at(f) >= std::fma(-rule.strength, range, at(e))) {
          e = f;
          --left;
        }
        break;
      }
    }
  }
  if (rule.kind == residency_kind::buddy) {
    double total = 0, entropy = 0;
    for (const expert_id e : order) total += std::exp(double(at(e)) - double(at(order[0])));
    for (const expert_id e : order) {
      const double p = std::exp(double(at(e)) - double(at(order[0]))) / total;
      if (p > 0) entropy -= p * std::log(p);
    }
    const auto missing = static_cast<float>(
        std::count_if(plain.begin(), plain.end(), [&](expert_id e) { return !held.contains(e); }));
    if (missing > rule.most_missing * static_cast<float>(k) ||
        (rule.least_entropy > 0 && entropy < double(rule.least_entropy)))
      return plain;
    for (std::size_t r = static_cast<std::size_t>(rule.forced); r < out.size(); ++r) {
      if (held.contains(out[r])) continue;
      for (const expert_id f :
           rule.buddies->of(out[r]).first(static_cast<std::size_t>(rule.search)))
        if (f != moeroute::no_expert && held.contains(f) && !is_in(out, f) && at(f) > -INFINITY) {
          out[r] = f;
          break;
        }
    }
  }
  return out;
}

}  // namespace oracle
