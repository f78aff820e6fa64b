// A copy of a bundled variant that a test may damage, and the program run on it.
#pragma once

#include "scratch_checkpoint.hpp"
#include "support/generate_app.hpp"

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include <moeroute/exec/executor.hpp>

namespace example::fixture {

struct outcome {
  int code = 0;
  std::string out;
  std::string err;
};

template <class MakeExecutor>
[[nodiscard]] outcome run_with(MakeExecutor&& make, const std::vector<std::string>& arguments) {
  std::vector<const char*> words{"generate"};
  for (const std::string& argument : arguments) {
    words.push_back(argument.c_str());
  }
  std::ostringstream out;
  std::ostringstream err;
  const int code = run_generate(static_cast<int>(words.size()), words.data(), out, err, 1, make);
  return {code, out.str(), err.str()};
}

[[nodiscard]] inline outcome run(const std::vector<std::string>& arguments) {
  return run_with([](int) { return moeroute::serial{}; }, arguments);
}

/// Exit code 2 and a single line that names the program and contains `what`.
[[nodiscard]] inline bool is_refusal(const outcome& found, const std::string& what) {
  return found.code == 2 && found.err.starts_with("generate: ") &&
         found.err.find('\n') == found.err.size() - 1 && found.err.find(what) != std::string::npos;
}

class model_copy {
 public:
  explicit model_copy(const std::string& variant = "olmoe") {
    std::filesystem::copy(bundled_model() / "variants" / variant, path());
  }
  [[nodiscard]] const std::filesystem::path& path() const { return folder_.path(); }
  [[nodiscard]] const scratch_folder& folder() const { return folder_; }

  /// Changes a JSON file of the folder.
  void edit(const std::string& name, const std::function<void(json&)>& change) const {
    json document = read_json(path() / name);
    change(document);
    static_cast<void>(folder_.write(name, document.dump()));
  }

  [[nodiscard]] std::string weights() const {
    return input_file(path() / "model.safetensors").text(100'000'000);
  }
  void write_weights(const std::string& bytes) const {
    static_cast<void>(folder_.write("model.safetensors", bytes));
  }
  /// Changes the header of the weights and leaves their data as it is.
  void edit_header(const std::function<void(json&)>& change) const {
    const std::string bytes = weights();
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof length);
    json header = json::parse(bytes.substr(8, length));
    change(header);
    write_weights(safetensors_bytes(header.dump(), bytes.substr(8 + length)));
  }
  /// Overwrites one element of a bfloat16 tensor.
  void set_bfloat16(const std::string& tensor, std::size_t element, std::uint16_t bits) const {
    std::string bytes = weights();
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof length);
    const json header = json::parse(bytes.substr(8, length));
    const auto first = header.at(tensor).at("data_offsets").at(0).get<std::size_t>();
    std::memcpy(bytes.data() + 8 + length + first + 2 * element, &bits, sizeof bits);
    write_weights(bytes);
  }

 private:
  scratch_folder folder_;
};

}  // namespace example::fixture
