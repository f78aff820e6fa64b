// Folders and files that a test makes, and that go when it ends.
#pragma once

#include "support/safetensors.hpp"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include <unistd.h>

namespace example::fixture {

class scratch_folder {
 public:
  scratch_folder() {
    static std::atomic<int> count{0};
    path_ =
        std::filesystem::temp_directory_path() / join("moeroute-test-", ::getpid(), "-", count++);
    std::filesystem::create_directories(path_);
  }
  scratch_folder(const scratch_folder&) = delete;
  scratch_folder& operator=(const scratch_folder&) = delete;
  ~scratch_folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::filesystem::path write(const std::string& name,
                                            std::string_view content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

[[nodiscard]] inline std::string bytes_of(const std::vector<float>& values) {
  if (values.empty()) {
    return {};
  }
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

/// A safetensors file with any header text, true or lying.
[[nodiscard]] inline std::string safetensors_bytes(std::string_view header, std::string_view data) {
  std::uint64_t length = header.size();
  std::string made(sizeof length, '\0');
  std::memcpy(made.data(), &length, sizeof length);
  return made.append(header).append(data);
}

/// The folder of the bundled model.
[[nodiscard]] inline std::filesystem::path bundled_model() { return MOEROUTE_MODEL_DIR; }

/// The message with which `act` refuses its input; empty where it does not.
template <class F>
[[nodiscard]] std::string refusal(F&& act) {
  try {
    act();
  } catch (const input_error& error) {
    return error.what();
  } catch (const moeroute::error& error) {
    return error.what();
  }
  return {};
}

}  // namespace example::fixture
