// Reader of safetensors files: a length, a JSON header, then raw tensors.
// Nothing the header says is believed before it is checked.
#pragma once

#include "file.hpp"
#include "json.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace example {

using tensor_shape = std::vector<std::uint64_t>;

[[nodiscard]] inline std::string to_string(const tensor_shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

/// a * b, or nothing where it does not fit.
[[nodiscard]] constexpr std::optional<std::uint64_t> checked_product(std::uint64_t a,
                                                                     std::uint64_t b) {
  if (b != 0 && a > std::numeric_limits<std::uint64_t>::max() / b) {
    return std::nullopt;
  }
  return a * b;
}

[[nodiscard]] inline float widen_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

[[nodiscard]] inline float widen_f16(std::uint16_t bits) {
  const auto sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t mantissa = bits & 0x3ffU;
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24 is exact in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
  }
  const std::uint32_t wide = exponent == 31 ? 255U : exponent + 112U;
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

class safetensors_file {
 public:
  explicit safetensors_file(const std::filesystem::path& path) : file_(path) {
    std::uint64_t length = 0;
    if (file_.size() < sizeof length) {
      refuse(name(), ": expected a safetensors file, found only ", file_.size(), " bytes");
    }
    file_.read(0, &length, sizeof length);
    if (length > json_size_limit || length > file_.size() - sizeof length) {
      refuse(name(), ": header length ", length, ": expected at most ",
             std::min(json_size_limit, file_.size() - sizeof length));
    }
    std::string text(static_cast<std::size_t>(length), '\0');
    file_.read(sizeof length, text.data(), text.size());
    data_begin_ = sizeof length + length;
    read_header(parse_json(text, join(name(), ": header")));
    check_overlap();
  }

  [[nodiscard]] const std::string& name() const { return file_.name(); }
  [[nodiscard]] bool contains(const std::string& tensor) const {
    return entries_.find(tensor) != entries_.end();
  }
  [[nodiscard]] std::vector<std::string> tensors() const {
    std::vector<std::string> names;
    for (const auto& [tensor, unused] : entries_) {
      names.push_back(tensor);
    }
    return names;
  }

  /// Refuses the file unless the tensor exists with this shape and a dtype
  /// that widens to float.
  void require(const std::string& tensor, const tensor_shape& shape) const {
    const entry& found = find(tensor);
    if (found.shape != shape) {
      refuse(name(), ": tensor '", tensor, "': expected shape ", to_string(shape), ", found ",
             to_string(found.shape));
    }
    if (found.dtype != "F32" && found.dtype != "BF16" && found.dtype != "F16") {
      refuse(name(), ": tensor '", tensor, "': expected dtype F32, BF16 or F16, found ",
             found.dtype);
    }
  }

  /// Reads `out.size()` elements from element `first` on, widened to float.
  void read(const std::string& tensor, std::uint64_t first, std::span<float> out) const {
    const entry& found = find(tensor);
    const std::uint64_t width = *size_of(found.dtype);
    if (found.dtype == "F32") {
      file_.read(found.begin + first * width, out.data(), out.size_bytes());
      return;
    }
    const auto widen = found.dtype == "BF16" ? &widen_bf16 : &widen_f16;
    std::array<std::uint16_t, 8192> piece;
    std::uint64_t offset = found.begin + first * width;
    while (!out.empty()) {
      const std::size_t count = std::min(out.size(), piece.size());
      file_.read(offset, piece.data(), count * width);
      std::transform(piece.begin(), piece.begin() + static_cast<std::ptrdiff_t>(count), out.begin(),
                     widen);
      offset += count * width;
      out = out.subspan(count);
    }
  }

 private:
  struct entry {
    std::string dtype;
    tensor_shape shape;
    std::uint64_t begin = 0;  // in the file
    std::uint64_t end = 0;
  };

  /// Bytes of one element; nothing for a dtype this reader has not heard of,
  /// which is refused only when somebody wants to read such a tensor.
  static std::optional<std::uint64_t> size_of(const std::string& dtype) {
    static const std::map<std::string, std::uint64_t> sizes{
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
        {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},
        {"I32", 4},  {"F32", 4}, {"U64", 8}, {"I64", 8},     {"F64", 8}};
    const auto found = sizes.find(dtype);
    return found == sizes.end() ? std::nullopt : std::optional(found->second);
  }

  const entry& find(const std::string& tensor) const {
    const auto found = entries_.find(tensor);
    if (found == entries_.end()) {
      refuse(name(), ": tensor '", tensor, "' is missing");
    }
    return found->second;
  }

  static std::uint64_t size_value(const json& value, const json_fields& fields, const char* field) {
    if (!value.is_number_unsigned()) {
      refuse(fields.where(), ": field '", field, "': expected integers from 0 on, found ",
             value.is_number() ? value.dump() : value.type_name());
    }
    return value.get<std::uint64_t>();
  }

  void read_header(const json& header) {
    if (!header.is_object()) {
      refuse(name(), ": header: expected a JSON object, found ", header.type_name());
    }
    for (const auto& [tensor, description] : header.items()) {
      if (tensor != "__metadata__") {
        entries_.emplace(tensor, read_entry(tensor, description));
      }
    }
  }

  entry read_entry(const std::string& tensor, const json& description) const {
    const json_fields fields(description, join(name(), ": tensor '", tensor, "'"));
    entry made;
    made.dtype = fields.text("dtype");
    std::optional<std::uint64_t> bytes = size_of(made.dtype);
    const bool known = bytes.has_value();
    for (const json& extent : fields.array("shape")) {
      made.shape.push_back(size_value(extent, fields, "shape"));
      bytes = bytes ? checked_product(*bytes, made.shape.back()) : bytes;
    }
    const json& offsets = fields.array("data_offsets");
    if (offsets.size() != 2) {
      refuse(fields.where(), ": field 'data_offsets': expected 2 integers, found ", offsets.size());
    }
    const std::uint64_t begin = size_value(offsets[0], fields, "data_offsets");
    const std::uint64_t end = size_value(offsets[1], fields, "data_offsets");
    const std::uint64_t room = file_.size() - data_begin_;
    if (begin > end || end > room) {
      refuse(fields.where(), ": data_offsets [", begin, ", ", end,
             "]: expected a range within the file's ", room, " bytes of data");
    }
    if (known && bytes != end - begin) {
      refuse(fields.where(), ": data_offsets span ", end - begin, " bytes, expected ",
             bytes ? std::to_string(*bytes) : std::string("more than 64 bits can count"), " for ",
             made.dtype, " of shape ", to_string(made.shape));
    }
    made.begin = data_begin_ + begin;
    made.end = data_begin_ + end;
    return made;
  }

  void check_overlap() const {
    std::vector<std::pair<std::uint64_t, std::string>> order;
    for (const auto& [tensor, found] : entries_) {
      if (found.begin != found.end) {
        order.emplace_back(found.begin, tensor);
      }
    }
    std::sort(order.begin(), order.end());
    for (std::size_t i = 1; i < order.size(); ++i) {
      if (entries_.at(order[i - 1].second).end > order[i].first) {
        refuse(name(), ": tensor '", order[i].second,
               "': expected data of its own, found it overlapping tensor '", order[i - 1].second,
               "'");
      }
    }
  }

  input_file file_;
  std::uint64_t data_begin_ = 0;
  std::map<std::string, entry> entries_;
};

}  // namespace example
