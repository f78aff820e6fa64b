// A router's description as text, both ways, and what is strange about one that is legal.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace moeroute {

namespace detail {

/// One word of a description, "name=value" or "name".
struct spec_word {
  std::string_view name, value;
  bool valued;

  [[noreturn]] void wrong(const std::string& expected) const {
    fail("parse_spec", "'" + std::string(name) + (valued ? "=" + std::string(value) : "") +
                           "', expected " + expected);
  }
  index_t whole() const {
    index_t x = 0;
    const auto [end, failure] = std::from_chars(value.data(), value.data() + value.size(), x);
    if (!valued || failure != std::errc() || end != value.data() + value.size())
      wrong("a whole number");
    return x;
  }
  float real() const {
    float x = 0.0f;
    const auto [end, failure] = std::from_chars(value.data(), value.data() + value.size(), x);
    if (!valued || failure != std::errc() || end != value.data() + value.size()) wrong("a number");
    return x;
  }
  template <class T, std::size_t N>
  T one_of(const T (&values)[N]) const {
    std::string list;
    for (const T v : values) {
      if (valued && value == to_string(v)) return v;
      list += (list.empty() ? "" : ", ") + std::string(to_string(v));
    }
    wrong(list);
  }
  /// The place of the value in the list.
  template <std::size_t N>
  std::size_t among(const std::string_view (&words)[N]) const {
    std::string list;
    for (std::size_t i = 0; i < N; ++i) {
      if (valued && value == words[i]) return i;
      list += (list.empty() ? "" : ", ") + std::string(words[i]);
    }
    wrong(list);
  }
  bool set() const {
    if (valued) wrong("the word alone");
    return true;
  }
};

/// Puts one word into the spec; false where there is no such word.
inline bool read_word(const spec_word& w, router_spec& s) {
  const auto is = [&](std::string_view name) { return w.name == name; };
  using enum selection_kind;
  if (is("E")) return s.experts = w.whole(), true;
  if (is("k")) return s.k = w.whole(), true;
  if (is("score"))
    return s.score = w.one_of({score_kind::softmax, score_kind::sigmoid, score_kind::sqrt_softplus,
                               score_kind::relu, score_kind::identity, score_kind::uniform}),
           true;
  if (is("score_domain"))
    return s.domain =
               w.among({"all", "selected"}) == 0 ? score_domain::all : score_domain::selected,
           true;
  if (is("selection"))
    return s.selection = w.one_of({top_k, selection_kind::top_p, selection_kind::threshold,
                                   expert_table, product_keys, sparsemixer, top2, random}),
           true;
  if (is("bias")) return s.selection_bias = w.among({"none", "selection"}) == 1, true;
  if (is("groups")) return s.groups = w.whole(), true;
  if (is("topk_group")) return s.topk_group = w.whole(), true;
  if (is("group_score")) {
    constexpr group_score list[] = {group_score::max, group_score::top2_sum, group_score::top_sum};
    return s.group_score = list[w.among({"max", "top2_sum", "top_sum"})], true;
  }
  if (is("group_fill")) return s.group_fill = w.real(), true;
  if (is("lost_weight")) {
    constexpr lost_weight list[] = {lost_weight::zero, lost_weight::own};
    return s.lost_weight = list[w.among({"zero", "own"})], true;
  }
  if (is("normalize")) {
    constexpr normalization list[] = {normalization::none, normalization::sum, normalization::lp};
    return s.normalize = list[w.among({"none", "sum", "lp"})], true;
  }
  if (is("lp_p")) return s.lp_p = w.real(), true;
  if (is("eps")) return s.eps = w.real(), true;
  if (is("eps_mode")) {
    constexpr eps_mode list[] = {eps_mode::none, eps_mode::add, eps_mode::clamp};
    return s.eps_where = list[w.among({"none", "add", "clamp"})], true;
  }
  if (is("scale")) return s.scale = w.real(), true;
  if (is("scale_where"))
    return s.scale_where =
               w.among({"weights", "output"}) == 0 ? scale_place::weights : scale_place::output,
           true;
  if (is("post_divide_by_k")) return s.divide_by_k = w.set(), true;
  if (is("output_scale")) return s.output_scale = w.real(), true;
  if (is("per_expert_scale")) return s.per_expert_scale = w.set(), true;
  if (is("gate_bias")) return s.gate_bias = w.set(), true;
  if (is("logit_softcap")) return s.softcap = w.real(), true;
  if (is("temperature")) return s.temperature = w.real(), true;
  if (is("jitter_eps")) return s.jitter = w.real(), true;
  if (is("p")) return s.top_p = w.real(), true;
  if (is("crossing")) {
    constexpr crossing list[] = {crossing::include, crossing::include_strict, crossing::exclude};
    return s.crossing = list[w.among({"include", "include_strict", "exclude"})], true;
  }
  if (is("min_k")) return s.min_k = w.whole(), true;
  if (is("max_k")) return s.max_k = w.whole(), true;
  if (is("threshold")) return s.threshold = w.real(), true;
  if (is("row_norm")) {
    constexpr threshold_norm list[] = {threshold_norm::none, threshold_norm::sum,
                                       threshold_norm::rms};
    return s.row_norm = list[w.among({"none", "sum", "rms"})], true;
  }
  if (is("zero_experts")) return s.zero_experts = w.whole(), true;
  if (is("shared_experts")) return s.shared_experts = w.whole(), true;
  if (is("weight_on"))
    return s.weight_on =
               w.among({"output", "input"}) == 0 ? weight_place::output : weight_place::input,
           true;
  if (is("capacity")) return s.capacity = w.whole(), true;
  if (is("drop_order"))
    return s.drop_order =
               w.one_of({drop_order::choice_major, drop_order::token_major, drop_order::by_weight,
                         drop_order::batch_priority, drop_order::random}),
           true;
  if (is("norm_before_drop"))
    return s.normalize_before_drop = w.among({"true", "false"}) == 0, true;
  return false;
}

}  // namespace detail

/// The spec that a line of to_string(spec) describes; words are separated by blanks, in any order.
///
/// Fields that are not there have the value of the plain softmax top-k. Ensures:
/// to_string(parse_spec(to_string(s))) == to_string(s) for every spec that check() takes. Throws:
/// error that names the word: one that is not known, has a wrong value or stands twice, E or k
/// missing; and what check() refuses.
[[nodiscard]] inline router_spec parse_spec(std::string_view text) {
  router_spec s;
  std::vector<std::string_view> seen;
  while (!text.empty()) {
    const std::size_t begin = text.find_first_not_of(' ');
    if (begin == text.npos) break;
    const std::size_t end = std::min(text.find(' ', begin), text.size());
    const std::string_view whole = text.substr(begin, end - begin);
    text.remove_prefix(end);
    const std::size_t sign = whole.find('=');
    const detail::spec_word word{whole.substr(0, sign),
                                 sign == whole.npos ? std::string_view{} : whole.substr(sign + 1),
                                 sign != whole.npos};
    if (std::find(seen.begin(), seen.end(), word.name) != seen.end()) word.wrong("it once");
    if (!detail::read_word(word, s)) word.wrong("a word of docs/models.md");
    seen.push_back(word.name);
  }
  for (const std::string_view name : {"E", "k"})
    if (std::find(seen.begin(), seen.end(), name) == seen.end())
      fail("parse_spec", "'" + std::string(name) + "' is missing");
  check(s);
  return s;
}

/// What is legal in a spec and yet untrainable or suspicious, a sentence each; empty: nothing.
///
/// Throws: what check() refuses.
[[nodiscard]] inline std::vector<std::string> advice(const router_spec& s) {
  check(s);
  std::vector<std::string> list;
  const auto say = [&](std::string sentence) { list.push_back(std::move(sentence)); };
  const bool winners = s.score == score_kind::softmax && s.domain == score_domain::selected;
  const bool divided = s.normalize != normalization::none;
  if (s.k == 1 && (divided || winners) && s.selection == selection_kind::top_k)
    say("k=1 and weights that sum to one: every weight is 1, and the gate has no gradient");
  if (s.k == s.experts && s.selection == selection_kind::top_k)
    say("k=" + std::to_string(s.k) + " is E: every token takes every expert, nothing is chosen");
  if (s.groups > 1 && s.topk_group == s.groups)
    say("topk_group=" + std::to_string(s.topk_group) +
        " keeps every group: the limit does nothing");
  if (s.groups > 1 && s.group_fill == 0.0f && s.selection_bias)
    say("group_fill=0 with bias=selection: an expert of a lost group beats every kept one whose "
        "score + bias is below 0");
  if (s.selection_bias && s.score == score_kind::softmax)
    say("bias=selection on softmax scores: they are about 1/E = " +
        detail::number(1.0f / static_cast<float>(s.experts)) +
        ", so the step of a bias controller has to be far below that (0.001 is made for sigmoids)");
  if (s.score == score_kind::identity && divided)
    say("normalize on score=identity: logits have either sign, so their sum may vanish");
  if (s.eps_where == eps_mode::add && divided && s.eps >= 1e-3f)
    say("eps=" + detail::number(s.eps) +
        " is added to the divisor: weights sum to visibly less "
        "than one");
  if (s.softcap > 0.0f && s.softcap < 1.0f)
    say("logit_softcap=" + detail::number(s.softcap) + ": logits within +-" +
        detail::number(s.softcap) + " make nearly equal scores");
  if (s.selection == selection_kind::threshold && s.score == score_kind::sigmoid &&
      s.threshold <= 0.0f)
    say("threshold=" + detail::number(s.threshold) + " on sigmoids lets every expert through");
  if (s.selection == selection_kind::top_p && s.max_k == 0)
    say("p=" + detail::number(s.top_p) +
        " without max_k: a token that is undecided takes up to E = " + std::to_string(s.experts) +
        " experts");
  if (s.capacity != 0 && s.normalize_before_drop && (divided || winners))
    say("weights are divided before the drop: those of a token with dropped choices sum to less "
        "than one");
  return list;
}

}  // namespace moeroute
