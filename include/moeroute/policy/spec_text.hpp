// A router's description as text, both ways, and what is strange about one that is legal.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/read_number.hpp>
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
    if (!read_number(value, x)) wrong("a whole number");
    return x;
  }
  template <class T>
  T real() const {
    T x = 0;
    if (!read_number(value, x)) wrong("a number");
    return x;
  }
  /// The place of the value in the list.
  template <std::size_t N>
  std::size_t among(const std::string_view (&words)[N]) const {
    std::string list;
    for (std::size_t i = 0; i < N; ++i) {
      if (value == words[i]) return i;  // no word is empty
      list += (list.empty() ? "" : ", ") + std::string(words[i]);
    }
    wrong(list);
  }
  bool set() const {
    if (valued) wrong("the word alone");
    return true;
  }
};

/// Puts one word into the spec where its name is that of a field.
struct word_reader {
  const spec_word& word;
  bool known = false;

  bool is(std::string_view name) {
    if (word.name != name) return false;
    return known = true;
  }
  void number(std::string_view name, index_t& x, bool) {
    if (is(name)) x = word.whole();
  }
  void number(std::string_view name, float& x, bool) {
    if (is(name)) x = word.real<float>();
  }
  void number(std::string_view name, double& x, bool) {
    if (is(name)) x = word.real<double>();
  }
  void flag(std::string_view name, bool& x) {
    if (is(name)) x = word.set();
  }
  template <class E>
  bool one_of(std::string_view name, E& e, bool) {
    if (!is(name)) return false;
    e = static_cast<E>(word.among(enum_words<E>::list));
    return true;
  }
  template <std::size_t N, class Set>
  void pick(std::string_view name, const std::string_view (&words)[N], std::size_t, const Set& set,
            bool) {
    if (is(name)) set(word.among(words));
  }
};

}  // namespace detail

/// The spec that a line of to_string(spec) describes; words are separated by blanks, in any order.
///
/// Fields that are not there have the defaults of plain_spec(selection). Ensures:
/// to_string(parse_spec(to_string(s))) == to_string(s) for every spec that check() takes. Throws:
/// error that names the word: one that is not known, has a wrong value or stands twice, E or k
/// missing; and what check() refuses.
/// Example:
///
///     const auto r = make_router(parse_spec("E=64 k=6 score=sigmoid normalize=sum"));
[[nodiscard]] inline router_spec parse_spec(std::string_view text) {
  std::vector<detail::spec_word> words;
  router_spec s;
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
    for (const detail::spec_word& before : words)
      if (before.name == word.name) word.wrong("it once");
    words.push_back(word);
    // The rule says what is absent.
    if (word.name == "selection")
      s = plain_spec(
          static_cast<selection_kind>(word.among(detail::enum_words<selection_kind>::list)));
  }
  for (const detail::spec_word& word : words) {
    detail::word_reader reader{word};
    detail::each_word(s, reader);
    if (!reader.known) word.wrong("a word of docs/models.md");
  }
  const auto given = [&](std::string_view name) {
    return std::any_of(words.begin(), words.end(), [&](const auto& w) { return w.name == name; });
  };
  if (!given("E")) fail("parse_spec", "'E' is missing");
  if (detail::spec_uses(s).k && !given("k")) fail("parse_spec", "'k' is missing");
  check(s);
  return s;
}

namespace detail {

// The part of advice() that is of words beyond the common ones.
template <class Say>
MOEROUTE_COLD void say_of_words(const router_spec& s, const Say& say) {
  using enum selection_kind;
  const spec_uses use(s);
  const gate_spec& gate = s.gate;
  if (s.explore == 1.0f) say("explore=1: experts are always drawn, the router chooses nothing");
  if (s.candidates == s.k && use.top_k)
    say("candidates=" + std::to_string(s.candidates) +
        " is k: every candidate is taken, the lot decides");
  if (s.noise != noise_kind::none && s.selection != selective_sinkhorn)
    say("noise=" + std::string(to_string(s.noise)) +
        " is drawn in every call: describe inference without it");
  if (use.counted && s.count == count_rule::ratio && s.score == score_kind::identity)
    say("count=ratio on score=identity: where the best logit is below 0 only min_k reach a share "
        "of it");
  if (use.counted && s.count != count_rule::tsallis && s.max_k == 0)
    say("count=" + std::string(to_string(s.count)) +
        " without max_k: a token that is undecided takes up to E = " + std::to_string(s.experts) +
        " experts");
  if (s.selection == expert_choice || s.selection == sinkhorn_expert_choice || use.sparse ||
      (s.sees_batch() && use.counted))
    say("selection=" + std::string(to_string(s.selection)) +
        " decides by the whole batch: a token's experts depend on tokens behind it");
  if (use.phase && s.phase == routing_phase::training)
    say("phase=training balances the batch that it is given: describe inference with "
        "phase=evaluation");
  if (use.plan && s.plan.domain == sinkhorn_domain::exponential &&
      s.plan.similarity == plan_similarity::logits && s.plan.temperature < 0.25f)
    say("plan_temperature=" + number(s.plan.temperature) +
        " on logits: what is 69 of it below a row's largest counts as 0" +
        (s.plan.eps > 0.0f ? ", and plan_eps outweighs an expert that all tokens want" : "") +
        "; plan_domain=logarithm has neither limit");
  const bool cosine = gate.kind == gate_kind::cosine || gate.kind == gate_kind::low_rank_cosine;
  if (cosine && gate.temperature > 0.5f && s.score == score_kind::softmax)
    say("gate_temperature=" + number(gate.temperature) + " on cosines: logits within +-" +
        number(1.0f / gate.temperature) + " make nearly equal scores");
  if (gate.kind == gate_kind::low_rank_cosine && gate.d != 0 && gate.width >= gate.d)
    say("gate_width=" + std::to_string(gate.width) +
        " is no lower rank than gate_d=" + std::to_string(gate.d));
  if (gate.kind == gate_kind::mixing)
    say("gate=mixing mixes every token of the call: a token's experts depend on tokens behind it");
  if (gate.kind != gate_kind::linear && gate.kind != gate_kind::none &&
      s.score == score_kind::uniform)
    say("gate=" + std::string(to_string(gate.kind)) +
        " on score=uniform: nobody reads its logits, gate=none saves the product");
}

}  // namespace detail

/// What is legal in a spec and yet untrainable or suspicious, a sentence each; empty: nothing.
///
/// Throws: what check() refuses.
[[nodiscard]] inline std::vector<std::string> advice(const router_spec& s) {
  check(s);
  std::vector<std::string> list;
  const auto say = [&](std::string sentence) { list.push_back(std::move(sentence)); };
  const score_kind weighs = s.weight_apart ? s.weight_score : s.score;
  const score_domain weighed = s.weight_apart ? s.weight_domain : s.domain;
  const bool winners = weighs == score_kind::softmax && weighed == score_domain::selected;
  const bool divided = s.normalize != normalization::none;
  const bool picks =
      s.selection == selection_kind::top_k || s.selection == selection_kind::each_group;
  if (s.k == 1 && (divided || winners) && picks)
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
  detail::say_of_words(s, say);
  return list;
}

}  // namespace moeroute
