// docs/models.md from the catalogue.
//
//   models_table                        writes the page to stdout
//   models_table --check docs/models.md  says where the page differs; exit code 1
#include <iterator>
#include <moeroute/policy/catalog.hpp>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "made_page.hpp"

namespace {

// What a description can say, in the order in which it is printed.
struct word_lister {
  std::ostringstream out{};

  void row(std::string_view name, const std::string& values) {
    out << "| `" << name << "` | " << values << " |\n";
  }
  template <class T>
  void number(std::string_view name, T, bool) {
    row(name, std::is_integral_v<T> ? "a whole number" : "a number");
  }
  void flag(std::string_view name, bool) { row(name, "the word alone"); }
  template <class E>
  bool one_of(std::string_view name, E, bool) {
    list(name, moeroute::detail::enum_words<E>::list);
    return false;
  }
  template <std::size_t N, class Set>
  void pick(std::string_view name, const std::string_view (&words)[N], std::size_t, const Set&,
            bool) {
    list(name, words);
  }

 private:
  template <std::size_t N>
  void list(std::string_view name, const std::string_view (&words)[N]) {
    std::string values;
    for (const std::string_view word : words)
      values += (values.empty() ? "`" : ", `") + std::string(word) + '`';
    row(name, values);
  }
};

std::string page() {
  std::ostringstream out;
  int golden = 0;
  std::vector<moeroute::catalog_entry> entries(std::begin(moeroute::catalog),
                                               std::end(moeroute::catalog));
  entries.insert(entries.end(), std::begin(moeroute::newer_catalog),
                 std::end(moeroute::newer_catalog));
  for (const moeroute::catalog_entry& e : entries) golden += e.golden.empty() ? 0 : 1;
  out << "# Routers of published models\n\n"
         "<!-- Made by tools/models_table.cpp from include/moeroute/policy/catalog.hpp; a test "
         "compares. "
         "After a change: build/ci/tests/models_table > docs/models.md -->\n\n"
         "Every router class of transformers 5.12.1 has an entry in `moeroute::catalog`; "
         "`moeroute::newer_catalog` has the classes that are new in 5.24.0 and published models "
         "outside it. `make_router(find_in_catalog(name)->spec)` is that router, "
         "`make_rare_router` where the spec has rare words. `moeroute_model_name` of the C face "
         "lists the first, which its specs describe whole; `moeroute_spec_of_model` takes a name "
         "of either and refuses one whose words its spec does not have. The spec column is what "
         "`to_string(spec)` prints: fields that are not there have the value of the plain softmax "
         "top-k (or of `plain_spec(selection)`). "
         "Its words are those of [the golden files](../tests/golden/README.md), so a spec can be "
         "written "
         "down as the `config` of a file for `./run example route_file`.\n\n"
         "`./run example spec_of FILE` prints the spec of a checkpoint's `config.json` "
         "or GGUF file, layer by layer where layers differ; a program reads them with "
         "[moeroute/json/config_json.hpp](../include/moeroute/json/config_json.hpp) and "
         "[gguf.hpp](../include/moeroute/json/gguf.hpp) (link `moeroute::json`, which "
         "brings nlohmann-json). `parse_spec` reads such a line back, and `advice` says "
         "what is strange about a legal one.\n\n"
         "All "
      << entries.size()
      << " entries are recomputed in float64 at their own size on all input shapes; " << golden
      << " are also compared with vectors of the real class, ids exactly and weights to 3e-6, "
         "both in `tests/golden/open_models_test.cpp`.\n\n"
         "| name | spec | source | checked by | remark |\n|---|---|---|---|---|\n";
  for (const moeroute::catalog_entry& e : entries) {
    out << "| " << e.name << " | `" << moeroute::to_string(e.spec) << "` | " << e.source << " | ";
    if (e.golden.empty())
      out << "float64";
    else
      out << "[golden](../tests/golden/open/" << e.golden << ".json), float64";
    out << " | " << e.remark << " |\n";
  }
  moeroute::router_spec any;
  word_lister words;
  moeroute::detail::each_word(any, words);
  out << "\nNot in the table: vitpose_backbone, whose experts are picked by the data set's id "
         "without a "
         "router (`moeroute::expert_table` is that); inkling (transformers 5.24.0), whose two "
         "shared "
         "experts have logits of their own and share in the division by the sum of the "
         "selected.\n\n"
         "## Words\n\nWhat a description can say beside E; their meanings stand at the fields of "
         "[router_spec](../include/moeroute/policy/router_spec.hpp) and of "
         "[gate_spec](../include/moeroute/policy/parts/gate_spec.hpp). `make_router`, "
         "`make_rare_router` and `make_batch_router` make the router, `with_router` whichever it "
         "is, and `make_gate` the gate. A word that means nothing beside the others is taken and "
         "not printed.\n\n"
         "| word | values |\n|---|---|\n"
      << words.out.str();
  return out.str();
}

}  // namespace

int main(int argc, char** argv) {
  return print_or_check(argc, argv, "models_table", "the catalogue", page());
}
