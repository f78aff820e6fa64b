#include "support/report.hpp"
#include "support/placed_words.hpp"

#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

namespace report_test {

using namespace example;
using Catch::Matchers::ContainsSubstring;

namespace {

load_profile profile_of(const std::string& name, const std::vector<std::int64_t>& choices) {
  load_profile made(name, 1, static_cast<std::int64_t>(choices.size()));
  made.layers[0].choices = choices;
  made.layers[0].tokens = 10;
  return made;
}

}  // namespace

TEST_CASE("no option and no word too many is taken for the name of a page") {
  const auto said = [](std::vector<const char*> words) {
    std::ostringstream out;
    words.insert(words.begin(), "program");
    try {
      const bool help = asked_how(static_cast<int>(words.size()), words.data(), 2,
                                  "program [PAGE.html [STEPS]]", out);
      return out.str() + (help ? "help" : "run");
    } catch (const input_error& e) {
      return std::string(e.what());
    }
  };
  CHECK(said({}) == "run");
  CHECK(said({"a.html", "3"}) == "run");
  CHECK(said({"--help"}) == "usage: program [PAGE.html [STEPS]]\nhelp");
  CHECK(said({"a.html", "3", "4", "-h"}) == "usage: program [PAGE.html [STEPS]]\nhelp");
  CHECK(said({"--steps"}) == "command line: expected program [PAGE.html [STEPS]], found '--steps'");
  CHECK(said({"a.html", "3", "4"}) ==
        "command line: expected program [PAGE.html [STEPS]], found '4'");
  CHECK(number_in_place("STEPS", "12", 12, 20) == 12);
  CHECK_THROWS_WITH(number_in_place("STEPS", "1e3", 12, 20),
                    "STEPS: expected a number from 12 to 20, found '1e3'");
}

TEST_CASE("imbalance is the largest load over the mean, less one") {
  CHECK(profile_of("even", {5, 5, 5, 5}).layers[0].max_violation() == 0.0);
  CHECK(profile_of("skewed", {2, 0, 6, 0}).layers[0].max_violation() == 2.0);
  CHECK(profile_of("empty", {0, 0}).layers[0].max_violation() == 0.0);
}

TEST_CASE("the entropy of equal logits is log2 of their number, of one towering logit 0") {
  const float equal[8] = {3, 3, 3, 3, 3, 3, 3, 3};
  CHECK(std::abs(softmax_entropy(equal, 8) - 3.0) < 1e-12);
  const float sure[4] = {0, 1000, 0, 0};
  CHECK(softmax_entropy(sure, 4) == 0.0);
}

TEST_CASE("choices are counted per layer and expert, missing ones are not") {
  load_profile load("counts", 2, 3);
  const moeroute::expert_id ids[4] = {2, 0, 2, moeroute::no_expert};
  load.count(1, {ids, 2, 2});
  CHECK(load.layers[1].choices == std::vector<std::int64_t>{1, 0, 2});
  CHECK(load.layers[1].tokens == 2);
  CHECK(load.layers[0].total() == 0);
}

TEST_CASE("every expert of every layer is a cell that tells its load") {
  std::ostringstream out;
  write_report(out, {"m", "olmoe", 4, 2}, {profile_of("one", {1, 2, 3, 14})});
  const std::string page = out.str();
  CHECK_THAT(page, ContainsSubstring("layer 0, expert 3: 14 choices, 70.0 % (2.80× even share)"));
  std::size_t cells = 0;
  for (auto at = page.find("<title>layer"); at != std::string::npos;
       at = page.find("<title>layer", at + 1)) {
    ++cells;
  }
  CHECK(cells == 4);
}

TEST_CASE("a hundred layers of a thousand experts still fit the panel") {
  const detail::heat_layout at{1024, 100};
  CHECK(at.map_width == 384.0);
  CHECK(at.cell_height() >= 7.0);
  CHECK(at.cell_width() > 0.0);
}

TEST_CASE("names are shown as text, never as markup") {
  std::ostringstream out;
  write_report(out, {"<b>&\"", "olmoe", 2, 1}, {profile_of("<script>x</script>", {1, 2})});
  CHECK_THAT(out.str(), ContainsSubstring("&lt;b&gt;&amp;&quot;"));
  CHECK_THAT(out.str(), !ContainsSubstring("<script"));
}

TEST_CASE("heat classes grow with the load and hold their lower bound") {
  CHECK(detail::heat_class(0.0) == 0);
  CHECK(detail::heat_class(0.25) == 1);
  CHECK(detail::heat_class(0.999) == 2);
  CHECK(detail::heat_class(1.0) == 3);
  CHECK(detail::heat_class(100.0) == detail::heat_bounds.size());
}

}  // namespace report_test
