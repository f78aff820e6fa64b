// docs/conformance.md, whose tables are made of the kit itself.
#pragma once

#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "kit.hpp"
#include "reference.hpp"

namespace conformance {

/// The page that tells what the kit is, with what it holds and catches.
inline std::string page(const std::vector<kit_file>& kits) {
  std::vector<std::string> cases;
  std::map<std::string, std::string> reasons;
  std::map<std::string, std::size_t> tokens;
  std::map<std::string, std::map<std::string, std::size_t>> caught;
  std::map<std::string, std::size_t> possible;
  for (const kit_file& kit : kits) {
    for (const auto& [name, sentence] : kit.mistakes) possible[name] += 1;
    for (const kit_case& c : kit.cases) {
      if (!reasons.contains(c.name)) cases.push_back(c.name);
      reasons[c.name] = c.reason;
      tokens[c.name] += c.tokens();
      for (const auto& [name, changed] : c.mistaken) caught[name][c.name] += 1;
    }
  }
  std::size_t all = 0;
  for (const kit_file& kit : kits) all += kit.tokens();

  std::ostringstream out;
  out << R"(# Is a router right? The conformance kit

<!-- Made by conformance/generate.cpp; a test compares.
After a change: build/ci/conformance/moeroute-conformance-generate > docs/conformance.md -->

Engines get routers wrong in a few well-known ways, most of which ordinary logits do not show. The kit is a set of files that any engine, in any language, can be held to: for )"
      << kits.size()
      << " routers (those of [the catalogue](models.md), with a second bias of large "
      << "values where there is one, and three rules at the sizes at and beside those of kernels) "
         "it has "
      << all
      << R"( tokens made for trouble, each with the right ids and weights, the reason why it is there, and what each known mistake makes of it.

```sh
./run conformance                                        # makes the kit: build/conformance
build/conformance/moeroute-conformance --own build/conformance/cases/*.jsonl
```

`./run release` packs it as `moeroute-conformance-VERSION.tar.gz`.

## Hold your engine to it

1. Take the file of your model, `cases/deepseek_v3.jsonl`, or the same as arrays, `npy/deepseek_v3/`. Give your router its `bias` (and `per_expert_scale`, or `table`), and route all `logits`, with the `mask` where your engine has one.
2. Write a line `{"ids": [...], "weights": [...]}` for each token in the order of the file, or `ids.npy` and `weights.npy`, both `[T, k]`.
3. Ask the checker. It is one program in C++ and one file of Python without dependencies, which say the same:

```sh
moeroute-conformance cases/deepseek_v3.jsonl < answers.jsonl
python3 moeroute_conformance.py cases/deepseek_v3.jsonl --ids ids.npy --weights weights.npy
```

It says which cases differ and where first, why the case is there, and which known mistake makes exactly these answers:

```
deepseek_v3: 2 of 33 tokens differ
  low_scores: 2 of 3: token 1: rank 0: weight 0.00303285709, expected 0.00290528662
    (all logits near -16, -48 and -80: scores as small as the eps of the divisor)
  looks like eps_missing: the divisor of the weights is without its eps
```

`--unordered` takes the ranks in any order, `--ids-only` leaves the weights out. The exit code is 0 where all agree, 1 where some differ, 2 where a file is malformed; then the message names file, line and field. `--answers MISTAKE FILE` writes the answers of an engine with that mistake: pipe them into the checker to see what it says.

What another system leaves open is not a fault of it: where its reference does not say who wins a tie, `higher_id` is a difference to know, no more; an engine without masks leaves `masked_rows` out.

## What the files are

A file is lines of JSON. The first line is about the router:

| field | what |
|---|---|
| format, version | `moeroute-conformance`, 1: a reader refuses others |
| library | the version of moeroute that made it |
| model, rule | its name; the rule in the words of [models.md](models.md) |
| experts, columns, k | E; columns of the logits; choices per token |
| bias, per_expert_scale | [E] each, where the router has them |
| table | [vocabulary][k] experts by token id, for hash layers |
| relative, absolute | a weight w is right within relative * abs(w) + absolute |
| mistakes | name and sentence of each mistake that shows in this file |

Every other line is a case:

| field | what |
|---|---|
| case, reason | its name, and why it exists |
| logits | [T][columns], float32; "nan", "inf" and "-inf" are those |
| mask | [T], 0: the token takes no part; only where there is one |
| token_ids | [T], rows of the table |
| ids, weights | [T][k], best first; -1 with weight 0: a pick that could not be made |
| mistakes | by name: `tokens`, those that the mistake changes, and the `ids` and `weights` that it makes of them |

Numbers are the shortest that give the float32 back: read them as float32, not by way of double. The arrays beside are the same tokens in the same order: `logits`, `ids`, `weights`, `mask`, and `bias`, `per_expert_scale`, `table`, `token_ids` where there are some. `SHA256SUMS` is of every file. Weights are those before any capacity drops choices and before a factor of the combined row.

An answer is in the kit when three agree on it: a reference in double written for the kit ([conformance/reference.hpp](../conformance/reference.hpp)), the compiled library on the instruction set of the machine where its description has the rule, and [the oracle of the tests](../tests/oracle/spec_routing.hpp). Tokens whose choice rounding could turn are not taken.

## The cases

| case | routers | tokens | why |
|---|--:|--:|---|
)";
  for (const std::string& name : cases) {
    std::size_t routers = 0;
    for (const kit_file& kit : kits)
      for (const kit_case& c : kit.cases) routers += c.name == name;
    out << "| " << name << " | " << routers << " | " << tokens[name] << " | " << reasons[name]
        << " |\n";
  }
  out << R"(
## Known mistakes, and the cases that catch them

How many of the routers where a mistake can be made show it in that case. Blank: that case never does.

| mistake | routers |)";
  for (const std::string& name : cases) out << ' ' << name << " |";
  out << "\n|---|--:|";
  for (std::size_t i = 0; i < cases.size(); ++i) out << "--:|";
  out << '\n';
  for (const mistake& m : mistakes) {
    const std::string name(m.name);
    out << "| " << name << " | " << possible[name] << " |";
    for (const std::string& in : cases) {
      out << ' ';
      if (caught[name].contains(in)) out << caught[name][in] << ' ';
      out << '|';
    }
    out << '\n';
  }
  out << "\nWhat each is:\n\n";
  for (const mistake& m : mistakes) out << "- `" << m.name << "`: " << m.sentence << ".\n";
  out << R"(
[A test](../tests/conformance/planted_test.cpp) plants every one of them and demands that it is recognised by its name, makes most of them a second time by misdescribing the router to the library itself, and breaks files to see the checker name line and field.
)";
  return out.str();
}

}  // namespace conformance
