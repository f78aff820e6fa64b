// What a benchmark program was asked for, beyond Google Benchmark's own flags.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace bench {

struct arguments {
  std::string trace;   ///< .npy file of logits that somebody wants routed
  std::string router;  ///< its router: a name of the catalogue, or a file that describes one
  std::string steps;   ///< tokens a call, "1,8,64"; empty: few and many
};

/// Programs whose entries depend on the arguments add them here; main calls these when it knows.
/// What they throw is the reader's to put right.
inline std::vector<std::function<void(const arguments&)>>& late_entries() {
  static std::vector<std::function<void(const arguments&)>> list;
  return list;
}

}  // namespace bench
