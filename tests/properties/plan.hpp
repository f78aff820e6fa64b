// Property: any ids are planned as brute force plans them, or refused by their place; experts are
// called with the rows that were planned for them.
#pragma once

#include <algorithm>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/plan.hpp>

#include "oracle/layer.hpp"
#include "properties/bytes.hpp"

namespace test {

namespace detail {

inline moeroute::assignment any_assignment(bytes& in, bool sound) {
  const index_t experts = 1 + in.below(in.flag() ? 400 : 9);
  const index_t tokens = in.below(50);
  const index_t k = 1 + in.below(std::min<index_t>(9, experts));
  moeroute::assignment a;
  const bool ragged = in.flag();
  if (ragged)
    a.reset_ragged(tokens, experts, k);
  else
    a.reset(tokens, experts, k);
  const auto id = [&]() -> moeroute::expert_id {
    const index_t b = in.below(64);
    if (b == 0) return moeroute::no_expert;
    if (b == 1 && !sound) return in.take<std::int32_t>();
    return static_cast<moeroute::expert_id>(in.below(experts));
  };
  if (ragged) {
    const moeroute::assignment::parts p = a.to_fill();
    p.offsets[0] = 0;
    for (index_t t = 0; t < tokens; ++t) {
      const auto n = static_cast<std::int32_t>(in.below(k + 1));
      for (std::int32_t c = p.offsets[t]; c < p.offsets[t] + n; ++c) {
        p.ids[c] = id();
        // An expert twice in a token is refused: seldom, so that plans are made.
        const moeroute::expert_id* const first = p.ids + p.offsets[t];
        while (p.ids[c] >= 0 && p.ids[c] < experts &&
               std::find(first, first + (c - p.offsets[t]), p.ids[c]) !=
                   first + (c - p.offsets[t]) &&
               in.below(32) != 1)
          p.ids[c] = static_cast<moeroute::expert_id>((p.ids[c] + 1) % experts);
        p.weights[c] = p.ids[c] < 0 ? 0.0f : static_cast<float>(in.below(8)) / 8.0f;
      }
      p.offsets[t + 1] = p.offsets[t] + n;
    }
    a.close();
  } else {
    for (std::size_t c = 0; c < a.ids().size(); ++c) {
      a.ids()[c] = id();
      a.weights()[c] = a.ids()[c] < 0 ? 0.0f : static_cast<float>(in.below(8)) / 8.0f;
    }
  }
  return a;
}

// The pieces that every executor cuts, from the first or from the last on.
struct either_way {
  bool backwards;
  static constexpr int concurrency() { return 1; }

  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    const index_t pieces = (n + grain - 1) / grain;
    for (index_t i = 0; i < pieces; ++i) {
      const index_t begin = (backwards ? pieces - 1 - i : i) * grain;
      f(begin, std::min(n, begin + grain));
    }
  }
};

// Counts the slots that experts are called with, and looks at what their rows hold: the slot, or
// the token where experts read tokens where they lie.
struct counted_calls {
  const moeroute::dispatch_plan& plan;
  const float* out0;
  index_t most;
  bool tokens;
  std::vector<int>& seen;
  bool& right;

  static constexpr index_t scratch_floats() { return 1; }
  void operator()(moeroute::expert_id e, moeroute::matrix_view<const float> in,
                  moeroute::matrix_view<float> out) const {
    const index_t first = out.data - out0, own = plan.offsets()[static_cast<std::size_t>(e)];
    right = right && in.rows == out.rows && out.rows >= 1 && first >= own &&
            first + out.rows <= own + plan.load(e) &&
            (most == 0 || (out.rows <= most && (first == own || first % most == 0)));
    for (index_t r = 0; right && r < out.rows; ++r) {
      const auto slot = static_cast<std::size_t>(first + r);
      ++seen[slot];
      right = in(r, 0) == static_cast<float>(tokens ? plan.token_of_slot()[slot]
                                                    : static_cast<std::int32_t>(slot));
    }
  }
  void operator()(moeroute::expert_id e, moeroute::matrix_view<const float> in,
                  moeroute::matrix_view<float> out, float* memory) const {
    *memory = static_cast<float>(e);
    (*this)(e, in, out);
  }
};

// Every expert's own rows are handed out once and its padding never, however calls are cut.
inline std::string calls_of(const moeroute::assignment& a, const moeroute::dispatch_plan& p,
                            bytes& in) {
  using namespace moeroute;
  const bool where_they_lie = in.flag(), with_scratch = in.flag();
  const either_way exec{in.flag()};
  const expert_options options{
      .rows_per_call = where_they_lie ? 0 : in.usually<index_t>(0, [&] { return in.below(20); })};
  const index_t n = where_they_lie ? p.tokens() : p.slots();
  std::vector<float> numbers(static_cast<std::size_t>(n) + 1),
      results(static_cast<std::size_t>(p.slots()) + 1), memory(2);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i);
  const matrix_view<const float> from(numbers.data(), n, 1);
  const matrix_view<float> to(results.data(), p.slots(), 1);
  std::vector<int> seen(static_cast<std::size_t>(p.slots()), 0), expected = seen;
  bool right = true;
  const counted_calls f{p, results.data(), options.rows_per_call, where_they_lie, seen, right};
  if (where_they_lie && with_scratch)
    for_each_expert(p, a, from, to, f, memory.data(), exec);
  else if (where_they_lie)
    for_each_expert(p, a, from, to, f, exec);
  else if (with_scratch)
    for_each_expert(p, from, to, f, memory.data(), exec, options);
  else
    for_each_expert(p, from, to, f, exec, options);
  for (index_t e = 0; e < p.experts(); ++e)
    std::fill_n(expected.begin() + p.offsets()[static_cast<std::size_t>(e)], p.load(e), 1);
  if (!right) return "an expert was called with rows that are not its own";
  return seen == expected ? "" : "rows were not handed out once";
}

}  // namespace detail

inline std::string plan_property(bytes in) {
  using namespace moeroute;
  assignment a = detail::any_assignment(in, false);
  if (in.flag())
    for (std::uint8_t& kept : a.kept_to_change()) kept = in.below(5) != 0;
  std::vector<std::uint8_t> owned, mask;
  if (in.flag())
    for (index_t e = 0; e < a.experts(); ++e) owned.push_back(in.flag());
  if (in.flag())
    for (index_t t = 0; t < a.tokens(); ++t) mask.push_back(in.flag());
  const plan_options options{.block = in.usually<index_t>(1, [&] { return in.below(20); }),
                             .capacity = in.usually(as_needed, [&] { return in.below(60); }),
                             .padding = in.one_of(slot_padding::spare_tokens),
                             .owned = owned,
                             .mask = mask};
  dispatch_plan p;
  const bool sound = std::all_of(a.ids().begin(), a.ids().end(),
                                 [&](expert_id e) { return e >= -1 && e < a.experts(); });
  const auto takes_part = [&](index_t t, index_t c) {
    const expert_id e = a.ids()[static_cast<std::size_t>(c)];
    return e >= 0 && a.kept(c) && (owned.empty() || owned[static_cast<std::size_t>(e)] != 0) &&
           (mask.empty() || mask[static_cast<std::size_t>(t)] != 0);
  };
  bool twice = false;
  for (index_t t = 0; sound && a.ragged() && t < a.tokens(); ++t)
    for (index_t c = a.first(t); c < a.first(t + 1); ++c)
      for (index_t other = a.first(t); other < c; ++other)
        twice = twice ||
                (a.ids()[static_cast<std::size_t>(c)] == a.ids()[static_cast<std::size_t>(other)] &&
                 takes_part(t, c) && takes_part(t, other));
  bool over = false;
  if (sound && options.capacity != as_needed) {
    std::vector<index_t> load(static_cast<std::size_t>(a.experts()), 0);
    for (index_t t = 0; t < a.tokens(); ++t)
      for (index_t c = a.first(t); c < a.first(t + 1); ++c)
        if (takes_part(t, c))
          over = ++load[static_cast<std::size_t>(a.ids()[static_cast<std::size_t>(c)])] >
                     options.capacity ||
                 over;
  }
  try {
    plan(a, p, options);
  } catch (const error& refused) {
    const bool expected = !sound || twice || options.block < 1 || over;
    return expected ? "" : std::string("refused: ") + refused.what();
  }
  if (!sound) return "an id out of range was planned";
  if (twice) return "a token with an expert twice was planned";
  if (over) return "more tokens of an expert than its capacity were planned";

  // Expert by expert all choices are looked at.
  std::vector<slot_id> offsets{0}, token_of_slot;
  std::vector<slot_id> slot_of_choice(static_cast<std::size_t>(a.choices()), no_slot);
  for (index_t e = 0; e < a.experts(); ++e) {
    for (index_t t = 0; t < a.tokens(); ++t)
      for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
        const auto at = static_cast<std::size_t>(c);
        if (a.ids()[at] != e || !takes_part(t, c)) continue;
        slot_of_choice[at] = static_cast<slot_id>(token_of_slot.size());
        token_of_slot.push_back(static_cast<slot_id>(t));
      }
    const index_t own = static_cast<index_t>(token_of_slot.size()) - offsets.back();
    if (p.load(e) != own) return "load of expert " + std::to_string(e);
    const index_t rows =
        round_up(options.capacity == as_needed ? own : options.capacity, options.block);
    const auto end = static_cast<std::size_t>(offsets.back() + rows);
    if (options.padding == slot_padding::spare_tokens) {
      const std::vector<slot_id> served(token_of_slot.begin() + offsets.back(),
                                        token_of_slot.end());
      for (index_t t = 0; t < a.tokens() && token_of_slot.size() < end; ++t)
        if ((mask.empty() || mask[static_cast<std::size_t>(t)] != 0) &&
            std::find(served.begin(), served.end(), t) == served.end())
          token_of_slot.push_back(static_cast<slot_id>(t));
    }
    token_of_slot.resize(end, no_token);
    offsets.push_back(static_cast<slot_id>(token_of_slot.size()));
  }
  const auto same = [](auto a_span, const auto& list) {
    return std::equal(a_span.begin(), a_span.end(), list.begin(), list.end());
  };
  if (!same(p.offsets(), offsets)) return "offsets";
  if (!same(p.token_of_slot(), token_of_slot)) return "token_of_slot";
  if (!same(p.slot_of_choice(), slot_of_choice)) return "slot_of_choice";
  if (p.kept() + p.dropped() + p.elsewhere() + p.unrouted() != a.choices()) return "counts";
  return detail::calls_of(a, p, in);
}

}  // namespace test
