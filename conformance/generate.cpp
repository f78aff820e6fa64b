// Makes the conformance kit: for every router of the catalogue, and for every size at and beside
// those of kernels, the cases that have caught engines, with the right answers and those of known
// mistakes.
//
//   moeroute-conformance-generate FOLDER                     writes FOLDER/cases and FOLDER/npy
//   moeroute-conformance-generate --check conformance.md     says where the page differs
//   moeroute-conformance-generate                            writes the page to stdout
//
// An answer is in the kit when three agree on it: the reference beside this file, the compiled
// library where it has the rule, and the oracle of the tests.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <moeroute/compiled.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/router_spec.hpp>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../tools/made_page.hpp"
#include "kit.hpp"
#include "own.hpp"
#include "page.hpp"
#include "reference.hpp"

namespace conformance {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

using row = std::vector<float>;

/// A router of the kit: a spec with what it needs beside it.
struct subject {
  std::string name;
  router_spec spec;
  std::vector<float> bias, scale;
  std::vector<std::vector<expert_id>> table;  // [vocabulary]

  oracle::token_inputs inputs(const row& logits, std::size_t token_id) const {
    oracle::token_inputs in{logits.data(), bias, scale};
    if (!table.empty()) in.table = table[token_id];
    return in;
  }
};

/// One case of one router while it is made.
struct made_case {
  std::string name, reason;
  std::vector<row> logits{};
  std::vector<bool> mask{};
};

/// Draws that are the same on every machine.
class draws {
 public:
  explicit draws(std::uint32_t seed) : engine_(seed) {}
  std::size_t below(std::size_t n) { return engine_() % n; }
  float uniform() { return static_cast<float>(engine_() >> 8) * 0x1p-24f; }
  template <class T>
  void shuffle(std::vector<T>& list) {
    for (std::size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[below(i)]);
  }

 private:
  std::mt19937 engine_;
};

// Distinct multiples of 1/256 around 0, not farther from it than 5 where they fit.
row distinct(std::size_t columns, draws& rng) {
  const auto step = static_cast<float>(std::max<std::size_t>(1, 2560 / columns)) * 0x1p-8f;
  row z;
  for (std::size_t i = 0; i < columns; ++i)
    z.push_back((static_cast<float>(i) - 0.5f * static_cast<float>(columns / 2 * 2)) * step);
  rng.shuffle(z);
  return z;
}

row plus(row z, float x) {
  for (float& v : z) v += x;
  return z;
}

struct case_maker {
  const subject& s;
  draws& rng;
  std::vector<made_case> cases{};

  std::size_t columns() const { return static_cast<std::size_t>(s.spec.columns()); }
  std::size_t k() const { return static_cast<std::size_t>(s.spec.k); }

  decision right(const row& z) const { return decide(s.spec, {}, s.inputs(z, 0)); }

  // Draws until `fits` takes the row, rounding cannot turn the decision, or there is none to be
  // had.
  void add(made_case& c, const std::function<row()>& draw,
           const std::function<bool(const decision&)>& fits = {}) {
    for (int tries = 0; tries < 60; ++tries) {
      row z = draw();
      const decision d = right(z);
      if (!d.decided || (fits && !fits(d))) continue;
      c.logits.push_back(std::move(z));
      return;
    }
  }
  void keep(made_case c) {
    if (!c.logits.empty()) cases.push_back(std::move(c));
  }

  void all() {
    const auto some = [&](float part, float value) {
      row z = distinct(columns(), rng);
      for (float& x : z)
        if (rng.uniform() < part) x = value;
      return z;
    };
    const auto best_of = [&](const row& z) {
      return static_cast<std::size_t>(std::max_element(z.begin(), z.end()) - z.begin());
    };
    made_case c{"ordinary", "distinct logits: what differs here differs everywhere"};
    for (int i = 0; i < 3; ++i) add(c, [&] { return distinct(columns(), rng); });
    keep(c);

    c = {"tie_kth",
         "experts with the same choice score on both sides of the k-th place: the lower "
         "id is chosen"};
    for (int i = 0; i < 2; ++i)
      add(
          c,
          [&] {
            row z = distinct(columns(), rng);
            for (float& x : z) x = std::round(x);
            return z;
          },
          [](const decision& d) { return d.tied; });
    keep(c);

    if (s.spec.groups > 1 && s.spec.selection == moeroute::selection_kind::top_k) {
      c = {"tie_groups",
           "groups of the same worth on both sides of the last place: the lower group "
           "stays"};
      const std::size_t size = columns() / static_cast<std::size_t>(s.spec.groups);
      add(
          c,
          [&] {
            // The best of every group are experts without a bias.
            row one = distinct(size, rng), z;
            std::sort(one.begin(), one.end());
            for (std::size_t i = 0; 2 * i + 1 < size; ++i) std::swap(one[size - 1 - i], one[2 * i]);
            for (std::size_t g = 0; g < columns() / size; ++g)
              z.insert(z.end(), one.begin(), one.end());
            return z;
          },
          [](const decision& d) { return d.groups_tied; });
      keep(c);
      c = {"group_shape",
           "one group has the best expert, another the best two: by which a group is "
           "worth decides"};
      for (int i = 0; i < 2; ++i)
        add(c, [&] {
          row z = plus(distinct(columns(), rng), -4.0f);
          std::vector<std::size_t> order(columns() / size);
          std::iota(order.begin(), order.end(), 0u);
          rng.shuffle(order);
          // Half of the groups stay by one expert, half by two.
          for (std::size_t g = 0; g < order.size(); ++g) {
            const float step = 0.03125f * static_cast<float>(g);
            z[order[g] * size] = g % 2 == 0 ? 3.0f + step : 1.5f + step;
            if (size > 2) z[order[g] * size + 2] = g % 2 == 0 ? -3.0f : 1.25f + step;
          }
          return z;
        });
      keep(c);
    }

    c = {"tie_all", "all logits equal: ids from 0 on, where no bias decides"};
    add(c, [&] { return row(columns(), 0.0f); });
    keep(c);

    c = {"nan", "a NaN logit counts as -inf: it is not chosen, and no weight becomes NaN"};
    add(c, [&] { return some(0.25f, nan); });
    add(c, [&] {
      row z = distinct(columns(), rng);
      z[best_of(z)] = nan;
      return z;
    });
    add(c, [&] { return row(columns(), nan); });
    keep(c);

    c = {"infinite",
         "-inf is never chosen: a pick that cannot be made is -1 with weight 0; +inf "
         "experts share the weight"};
    add(c, [&] { return some(0.3f, -infinity); });
    add(c, [&] {
      row z(columns(), -infinity);
      for (std::size_t i = 0; i + 1 < k() && i < z.size(); ++i)
        z[rng.below(z.size())] = 0.25f * static_cast<float>(i);
      return z;
    });
    add(c, [&] { return row(columns(), -infinity); });
    add(c, [&] {
      row z = distinct(columns(), rng);
      z[rng.below(z.size())] = infinity;
      return z;
    });
    add(c, [&] {
      row z = distinct(columns(), rng);
      for (std::size_t i = 0; i < 2; ++i) z[rng.below(z.size())] = infinity;
      return z;
    });
    keep(c);

    c = {"saturated",
         "logits of 20 and more: a sigmoid is 1 for all of them, and what was chosen on "
         "scores ties"};
    add(c, [&] {
      row z = plus(distinct(columns(), rng), -8.0f);
      for (std::size_t i = 0; i < k() + 2 && i < z.size(); ++i)
        z[rng.below(z.size())] = 20.0f + 4.0f * static_cast<float>(rng.below(6));
      return z;
    });
    add(c, [&] { return plus(distinct(columns(), rng), 200.0f); });
    keep(c);

    c = {"low_scores",
         "all logits near -16, -48 and -80: scores as small as the eps of the divisor"};
    for (const float low : {-16.0f, -48.0f, -80.0f})
      add(c, [&] { return plus(distinct(columns(), rng), low); });
    keep(c);

    c = {"peaked", "one expert has all of the probability, the others are small beside it"};
    add(c, [&] {
      row z = distinct(columns(), rng);
      z[rng.below(z.size())] = 40.0f;
      return z;
    });
    keep(c);

    c = {"denormal",
         "logits below the normal numbers still have an order, on threads that do not "
         "flush them to zero"};
    add(c, [&] {
      row z = distinct(columns(), rng);
      for (float& x : z) x *= 0x1p-138f;
      return z;
    });
    keep(c);

    c = {"minus_zero", "-0 equals +0 and keeps its place by id"};
    add(c, [&] {
      row z(columns());
      for (float& x : z) x = rng.below(2) == 0 ? 0.0f : -0.0f;
      return z;
    });
    add(c, [&] {
      row z(columns());
      for (float& x : z) x = rng.below(3) == 0 ? 0.0f : rng.below(2) == 0 ? -0.0f : -1.5f;
      return z;
    });
    keep(c);

    c = {"bf16_logits", "logits rounded to bfloat16, which tie where float would not"};
    for (int i = 0; i < 2; ++i)
      add(c, [&] {
        row z(columns());
        for (float& x : z) {
          float sum = 0;
          for (int j = 0; j < 6; ++j) sum += rng.uniform();
          x = detail::bfloat16_of(1.5f * (sum - 3.0f));
        }
        return z;
      });
    keep(c);

    if (s.spec.selection != moeroute::selection_kind::product_keys) {
      c = {"last_ids",
           "the best experts have the last ids, and ids around powers of two: none may be "
           "cut"};
      add(c, [&] {
        row z = distinct(columns(), rng);
        std::sort(z.begin(), z.end());
        return z;
      });
      add(c, [&] {
        row z = plus(distinct(columns(), rng), -2.0f);
        float high = 4.0f;
        for (std::size_t power = 128; power / 2 < z.size(); power *= 2)
          for (const std::size_t id : {power - 1, power, power + 1})
            if (id < z.size()) z[id] = high -= 0.125f;
        return z;
      });
      keep(c);
    }

    c = {"masked_rows", "a masked token has no expert: ids -1, weights 0"};
    for (int i = 0; i < 3; ++i) add(c, [&] { return distinct(columns(), rng); });
    c.mask.assign(c.logits.size(), true);
    if (c.mask.size() > 1) c.mask[1] = false;
    keep(c);
  }
};

// ---- the answers --------------------------------------------------------------------------------

answer answer_of(const decision& d) { return {{d.ids.begin(), d.ids.end()}, d.weights}; }

bool same(const answer& a, const answer& b) {
  kit_file rule;
  rule.relative = 3e-6;
  rule.absolute = 1e-35;
  return difference(rule, a, b, {}).empty();
}

kit_file kit_of(const subject& s, draws& rng) {
  kit_file kit;
  kit.model = s.name;
  kit.rule = moeroute::to_string(s.spec);
  kit.experts = s.spec.experts;
  kit.columns = s.spec.columns();
  kit.k = s.spec.k;
  kit.bias = s.bias;
  kit.per_expert_scale = s.scale;
  for (const auto& of_id : s.table) kit.table.push_back({of_id.begin(), of_id.end()});
  kit.relative = 3e-6;
  kit.absolute = 1e-35;
  case_maker maker{s, rng};
  maker.all();
  std::set<std::string> seen;
  for (const made_case& c : maker.cases) {
    kit_case out;
    out.name = c.name;
    out.reason = c.reason;
    out.logits = c.logits;
    for (const bool m : c.mask) out.mask.push_back(m);
    for (std::size_t t = 0; t < c.logits.size(); ++t) {
      const std::size_t id = s.table.empty() ? 0 : t % s.table.size();
      if (!s.table.empty()) out.token_ids.push_back(static_cast<std::int64_t>(id));
      const bool takes_part = c.mask.empty() || c.mask[t];
      const oracle::token_inputs in = s.inputs(c.logits[t], id);
      const answer right = answer_of(decide(s.spec, {}, in, takes_part));
      const std::string where = s.name + ", " + c.name + ", token " + std::to_string(t) + ": ";
      if (takes_part) {
        const std::vector<expert_id> ids(right.ids.begin(), right.ids.end());
        const std::string broken = oracle::break_of(s.spec, in, ids, right.weights);
        if (!broken.empty()) throw std::runtime_error(where + "the oracle says: " + broken);
      }
      out.answers.push_back(right);
      for (const mistake& m : mistakes) {
        router_spec spec = s.spec;
        reading how;
        if (!m.plant(spec, how)) continue;
        const answer wrong = answer_of(decide(spec, how, in, takes_part));
        if (same(wrong, right)) continue;
        out.mistaken[std::string(m.name)][t] = wrong;
        seen.insert(std::string(m.name));
      }
    }
    kit.cases.push_back(std::move(out));
  }
  for (const mistake& m : mistakes)
    if (seen.contains(std::string(m.name))) kit.mistakes.emplace_back(m.name, m.sentence);
  if (!in_library(kit)) return kit;
  const judgement found = judge(kit, own_answers(kit));
  for (const judgement::wrong& w : found.wrongs)
    throw std::runtime_error(s.name + ", " + kit.cases[w.in_case].name + ", token " +
                             std::to_string(w.token) + ": the library has " + w.what);
  return kit;
}

// ---- the list of routers ------------------------------------------------------------------------

subject subject_of(std::string name, router_spec spec, bool large_bias, draws& rng) {
  // What drops tokens, and what is done to the combined row, comes after routing.
  spec.capacity = 0;
  spec.drop_order = moeroute::drop_order::choice_major;
  spec.normalize_before_drop = true;
  subject s{std::move(name), spec, {}, {}, {}};
  // Probabilities are as small as there are experts: the bias must not hide them.
  float size = 1;
  const float offset = spec.groups > 1 ? -64.0f : 64.0f;
  if (spec.score == moeroute::score_kind::softmax && spec.domain == moeroute::score_domain::all)
    for (index_t n = 4; n < spec.experts; n *= 2) size *= 0.5f;
  for (index_t e = 0; e < spec.experts; ++e) {
    // Every second expert has none, so that there are ties.
    const float b =
        e % 2 == 0 ? 0.0f : (static_cast<float>(rng.below(63)) - 31.5f) * 0x1p-7f * size;
    if (spec.selection_bias) s.bias.push_back(large_bias ? offset + 16.0f * b / size : b);
    if (spec.per_expert_scale) s.scale.push_back(0.5f + rng.uniform());
  }
  if (spec.selection == moeroute::selection_kind::expert_table)
    for (int id = 0; id < 16; ++id) {
      std::vector<expert_id> all(static_cast<std::size_t>(spec.experts));
      std::iota(all.begin(), all.end(), 0);
      rng.shuffle(all);
      all.resize(static_cast<std::size_t>(spec.k));
      s.table.push_back(all);
    }
  return s;
}

std::vector<kit_file> whole_kit() {
  std::vector<kit_file> kits;
  draws rng(21);
  const auto add = [&](const std::string& name, const router_spec& spec) {
    const subject s = subject_of(name, spec, false, rng);
    kits.push_back(kit_of(s, rng));
    if (s.bias.empty()) return;
    kits.push_back(kit_of(subject_of(name + ".large_bias", spec, true, rng), rng));
  };
  for (const moeroute::catalog_entry& entry : moeroute::catalog)
    add(std::string(entry.name), entry.spec);
  for (const moeroute::catalog_entry& entry : moeroute::newer_catalog)
    add(std::string(entry.name), entry.spec);
  for (const index_t experts :
       {1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 512, 513}) {
    const index_t k = std::min<index_t>(experts, 4);
    const std::string sizes = ".E" + std::to_string(experts) + "_k" + std::to_string(k);
    add("softmax" + sizes,
        moeroute::detail::softmax_all(experts, k, moeroute::detail::renormalized));
    add("softmax_selected" + sizes, moeroute::detail::softmax_k(experts, k));
    kits.push_back(
        kit_of(subject_of("sigmoid_bias" + sizes,
                          moeroute::detail::biased_sigmoid(experts, k, 2.5f), false, rng),
               rng));
  }
  // All of the experts, and very many of them.
  add("softmax.E64_k64", moeroute::detail::softmax_all(64, 64, moeroute::detail::renormalized));
  add("softmax.E32_k17", moeroute::detail::softmax_all(32, 17, moeroute::detail::renormalized));
  return kits;
}

// ---- the files ----------------------------------------------------------------------------------

json number(float x) {
  if (x != x) return "nan";
  if (std::isinf(x)) return x > 0 ? "inf" : "-inf";
  return x;
}

json numbers(const std::vector<float>& list) {
  json out = json::array();
  for (const float x : list) out.push_back(number(x));
  return out;
}

void put_answers(json& to, const std::vector<answer>& answers) {
  to["ids"] = to["weights"] = json::array();
  for (const answer& a : answers) {
    to["ids"].push_back(a.ids);
    to["weights"].push_back(numbers(a.weights));
  }
}

void write_cases(const kit_file& kit, const std::string& path) {
  std::ofstream out(path);
  json first = {{"format", "moeroute-conformance"},
                {"version", 1},
                {"library", moeroute_version()},
                {"model", kit.model},
                {"rule", kit.rule},
                {"experts", kit.experts},
                {"columns", kit.columns},
                {"k", kit.k},
                {"relative", static_cast<float>(kit.relative)},
                {"absolute", static_cast<float>(kit.absolute)}};
  if (!kit.bias.empty()) first["bias"] = numbers(kit.bias);
  if (!kit.per_expert_scale.empty()) first["per_expert_scale"] = numbers(kit.per_expert_scale);
  if (!kit.table.empty()) first["table"] = kit.table;
  first["mistakes"] = json::object();
  for (const auto& [name, sentence] : kit.mistakes) first["mistakes"][name] = sentence;
  out << first.dump() << '\n';
  for (const kit_case& c : kit.cases) {
    json line = {{"case", c.name}, {"reason", c.reason}};
    line["logits"] = json::array();
    for (const row& z : c.logits) line["logits"].push_back(numbers(z));
    if (!c.mask.empty()) line["mask"] = c.mask;
    if (!c.token_ids.empty()) line["token_ids"] = c.token_ids;
    put_answers(line, c.answers);
    line["mistakes"] = json::object();
    for (const auto& [name, tokens] : c.mistaken) {
      json& to = line["mistakes"][name];
      to["tokens"] = json::array();
      std::vector<answer> answers;
      for (const auto& [t, a] : tokens) {
        to["tokens"].push_back(t);
        answers.push_back(a);
      }
      put_answers(to, answers);
    }
    out << line.dump() << '\n';
  }
  if (!out.flush()) throw std::runtime_error(path + ": cannot be written");
}

template <class T>
void write_npy(const std::string& path, const char* type, const std::vector<std::size_t>& shape,
               const std::vector<T>& values) {
  std::string header = std::string("{'descr': '") + type + "', 'fortran_order': False, 'shape': (";
  for (const std::size_t n : shape) header += std::to_string(n) + ", ";
  header += "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  std::ofstream out(path, std::ios::binary);
  const char size[2] = {static_cast<char>(header.size() & 0xff),
                        static_cast<char>(header.size() >> 8)};
  out.write("\x93NUMPY\x01\x00", 8).write(size, 2);
  out << header;
  out.write(reinterpret_cast<const char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(T)));
  if (!out.flush()) throw std::runtime_error(path + ": cannot be written");
}

void write_arrays(const kit_file& kit, const std::string& folder) {
  std::filesystem::create_directories(folder);
  std::vector<float> logits, weights;
  std::vector<std::int32_t> ids, token_ids;
  std::vector<std::uint8_t> mask;
  for (const kit_case& c : kit.cases)
    for (std::size_t t = 0; t < c.tokens(); ++t) {
      logits.insert(logits.end(), c.logits[t].begin(), c.logits[t].end());
      for (const std::int64_t id : c.answers[t].ids) ids.push_back(static_cast<std::int32_t>(id));
      weights.insert(weights.end(), c.answers[t].weights.begin(), c.answers[t].weights.end());
      mask.push_back(c.mask.empty() || c.mask[t] != 0);
      if (!c.token_ids.empty()) token_ids.push_back(static_cast<std::int32_t>(c.token_ids[t]));
    }
  const std::size_t tokens = kit.tokens();
  const auto experts = static_cast<std::size_t>(kit.experts), k = static_cast<std::size_t>(kit.k);
  write_npy(folder + "/logits.npy", "<f4", {tokens, static_cast<std::size_t>(kit.columns)}, logits);
  write_npy(folder + "/ids.npy", "<i4", {tokens, k}, ids);
  write_npy(folder + "/weights.npy", "<f4", {tokens, k}, weights);
  write_npy(folder + "/mask.npy", "|u1", {tokens}, mask);
  if (!kit.bias.empty()) write_npy(folder + "/bias.npy", "<f4", {experts}, kit.bias);
  if (!kit.per_expert_scale.empty())
    write_npy(folder + "/per_expert_scale.npy", "<f4", {experts}, kit.per_expert_scale);
  if (!kit.table.empty()) {
    std::vector<std::int32_t> table;
    for (const auto& of_id : kit.table)
      for (const std::int64_t e : of_id) table.push_back(static_cast<std::int32_t>(e));
    write_npy(folder + "/table.npy", "<i4", {kit.table.size(), k}, table);
    write_npy(folder + "/token_ids.npy", "<i4", {tokens}, token_ids);
  }
}

}  // namespace
}  // namespace conformance

int main(int argc, char** argv) {
  try {
    const std::vector<conformance::kit_file> kits = conformance::whole_kit();
    if (argc != 2)
      return print_or_check(argc, argv, "moeroute-conformance-generate", "conformance/",
                            conformance::page(kits));
    const std::string folder = argv[1];
    std::filesystem::create_directories(folder + "/cases");
    std::size_t tokens = 0;
    for (const conformance::kit_file& kit : kits) {
      conformance::write_cases(kit, folder + "/cases/" + kit.model + ".jsonl");
      conformance::write_arrays(kit, folder + "/npy/" + kit.model);
      tokens += kit.tokens();
    }
    std::printf("%s: %zu routers, %zu tokens\n", folder.c_str(), kits.size(), tokens);
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "moeroute-conformance-generate: %s\n", e.what());
    return 1;
  }
}
