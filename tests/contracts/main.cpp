// Every kind of contract that can be reached from outside is broken once, in a process of its own:
// it must abort and say which condition, in which file.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/exec/callable.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/select/top_k.hpp>
#include <string>
#include <vector>

static_assert(MOEROUTE_CONTRACTS == 1);

using namespace moeroute;

namespace {

struct broken {
  const char* says;  ///< condition and file, as they are printed
  void (*breaks)();
};

float values[16] = {};

const broken all[] = {
    {"r >= 0 && c >= 0 (", [] { matrix_view<float>(values, -1, 4); }},
    {"r >= 0 && r < rows (", [] { matrix_view<float>(values, 2, 4).row(2); }},
    {"r >= 0 && r < rows (", [] { matrix_view<float>(values, 2, 4).row(-1); }},
    {"first >= 0 && n >= 0 && first + n <= rows (",
     [] { matrix_view<float>(values, 2, 4).middle_rows(1, 2); }},
    {"n >= 0 (", [] { buffer<float>(-1); }},
    {"n >= 0 (", [] { scratch().take<float>(-1); }},
    {"ragged_ (",
     [] {
       assignment a;
       a.reset(1, 2, 1);
       a.close();
     }},
    {"token >= 0 && token < tokens_ (",
     [] {
       assignment a;
       a.reset(1, 2, 1);
       (void)a.ids(1);
     }},
    {"token >= 0 && token < tokens_ (",
     [] {
       assignment a;
       a.reset(1, 2, 1);
       (void)a.weights(-1);
     }},
    {"e >= 0 && e < experts_ (", [] { (void)dispatch_plan().load(0); }},
    {"e >= 0 && e < experts_ (", [] { (void)dispatch_plan().rows(-1); }},
    {"choices <= slot_of_choice_.size() (", [] { dispatch_plan().set_choices(1); }},
    {"begin % grain_ == 0 (",
     [] {
       const callable_executor off_the_grain([](index_t n, index_t, loop_body body) { body(1, n); },
                                             1);
       off_the_grain.parallel_for(4, 2, [](index_t, index_t) {});
     }},
    {"n >= 1 && n <= block_rows && k >= least && k <= most && k <= cols (",
     [] {
       float value[3 * block_rows];
       expert_id id[3 * block_rows];
       std::uint64_t key[64];
       simd::top_k_block<>(values, 2, 1, 2, 3, value, id, key);
     }},
};

// What the process said that f ran in, or that it ended otherwise than by abort().
template <class F>
std::string last_words(F f) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child < 0) return "no process";
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    f();
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char piece[512];
  for (ssize_t n; (n = read(ends[0], piece, sizeof piece)) > 0;)
    words.append(piece, static_cast<std::size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT) return "not aborted: " + words;
  return words;
}

}  // namespace

int main() {
  int failed = 0;
  for (const broken& contract : all) {
    const std::string words = last_words(contract.breaks);
    const auto said = words.find("moeroute: contract broken: " + std::string(contract.says));
    if (said == 0 && words.find("moeroute/", words.find(" (")) != std::string::npos &&
        words.find(".hpp:") != std::string::npos)
      continue;
    std::fprintf(stderr, "expected \"%s\", got \"%s\"\n", contract.says, words.c_str());
    ++failed;
  }
  // A contract that is kept says nothing.
  const std::string kept = last_words([] { matrix_view<float>(values, 2, 4).row(1); });
  if (kept != "not aborted: ") {
    std::fprintf(stderr, "a contract that is kept: \"%s\"\n", kept.c_str());
    ++failed;
  }
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
