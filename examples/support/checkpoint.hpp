// The tensors of a checkpoint directory: one safetensors file, or several
// with an index that says which file holds which tensor.
#pragma once

#include "safetensors.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace example {

class checkpoint {
 public:
  explicit checkpoint(const std::filesystem::path& directory) {
    const auto single = directory / "model.safetensors";
    const auto index = directory / "model.safetensors.index.json";
    origin_ = single.string();
    std::error_code ignored;
    if (!std::filesystem::exists(single, ignored) && std::filesystem::exists(index, ignored)) {
      origin_ = index.string();
      open_shards(directory, read_json(index));
      return;
    }
    files_.emplace_back(single);
    for (const std::string& tensor : files_.front().tensors()) {
      home_.emplace(tensor, 0);
    }
  }

  [[nodiscard]] bool contains(const std::string& tensor) const {
    return home_.find(tensor) != home_.end();
  }
  void require(const std::string& tensor, const tensor_shape& shape) const {
    file_of(tensor).require(tensor, shape);
  }
  [[nodiscard]] const std::string& file_name(const std::string& tensor) const {
    return file_of(tensor).name();
  }
  /// Requires: require(tensor, ...) passed, and the elements lie within it.
  void read(const std::string& tensor, std::uint64_t first, std::span<float> out) const {
    file_of(tensor).read(tensor, first, out);
  }

 private:
  void open_shards(const std::filesystem::path& directory, const json& index) {
    const json_fields fields(index, origin_);
    const json& map = fields.at("weight_map");
    if (!map.is_object()) {
      fields.wrong("weight_map", "an object");
    }
    std::map<std::string, std::size_t> opened;
    for (const auto& [tensor, shard] : map.items()) {
      if (!shard.is_string()) {
        refuse(origin_, ": tensor '", tensor, "': expected a file name, found ", shard.type_name());
      }
      const auto& file = shard.get_ref<const std::string&>();
      // A name with folders in it could reach out of the checkpoint.
      if (file.empty() || std::filesystem::path(file).filename() != file) {
        refuse(origin_, ": tensor '", tensor, "': expected a file name without folders, found '",
               file, "'");
      }
      const auto [place, is_new] = opened.try_emplace(file, files_.size());
      if (is_new) {
        files_.emplace_back(directory / file);
      }
      if (!files_[place->second].contains(tensor)) {
        refuse(files_[place->second].name(), ": tensor '", tensor, "' is missing, expected by ",
               origin_);
      }
      home_.emplace(tensor, place->second);
    }
  }

  [[nodiscard]] const safetensors_file& file_of(const std::string& tensor) const {
    const auto found = home_.find(tensor);
    if (found == home_.end()) {
      refuse(origin_, ": tensor '", tensor, "' is missing");
    }
    return files_[found->second];
  }

  std::string origin_;
  std::vector<safetensors_file> files_;
  std::map<std::string, std::size_t> home_;
};

}  // namespace example
