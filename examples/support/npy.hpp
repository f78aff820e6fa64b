// Reader of NumPy's .npy files, for the float32 row-major arrays that the
// bundled references and traces are stored as.
#pragma once

#include "file.hpp"
#include "safetensors.hpp"

#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace example {

struct npy_array {
  tensor_shape shape;
  std::vector<float> values;  // row-major
};

namespace detail {

/// The text after "'key':" in the header's dictionary; empty where the key is not there once.
[[nodiscard]] inline std::string_view npy_value(std::string_view header, std::string_view key) {
  const std::string quoted = join("'", key, "':");
  const auto found = header.find(quoted);
  if (found == std::string_view::npos || header.find(quoted, found + 1) != std::string_view::npos) {
    return {};
  }
  const auto begin = header.find_first_not_of(' ', found + quoted.size());
  return begin == std::string_view::npos ? std::string_view{} : header.substr(begin);
}

/// "(4, 2048, 32)" as numbers; nothing where it is not such a tuple.
[[nodiscard]] inline std::optional<tensor_shape> npy_shape(std::string_view text) {
  if (text.empty() || text.front() != '(') {
    return std::nullopt;
  }
  tensor_shape shape;
  std::optional<std::uint64_t> number;
  for (const char c : text.substr(1)) {
    if (c >= '0' && c <= '9') {
      number = checked_product(number.value_or(0), 10);
      if (!number || *number > UINT64_MAX - 9) {
        return std::nullopt;
      }
      *number += static_cast<std::uint64_t>(c - '0');
    } else if (c == ',' || c == ')') {
      if (number) {
        shape.push_back(*number);
      }
      number.reset();
      if (c == ')') {
        return shape;
      }
    } else if (c != ' ') {
      return std::nullopt;
    }
  }
  return std::nullopt;
}

}  // namespace detail

[[nodiscard]] inline npy_array read_npy(const std::filesystem::path& path) {
  const input_file file(path);
  std::array<unsigned char, 12> head{};
  if (file.size() < head.size()) {
    refuse(file.name(), ": expected a .npy file, found only ", file.size(), " bytes");
  }
  file.read(0, head.data(), head.size());
  if (std::memcmp(head.data(), "\x93NUMPY", 6) != 0 || head[6] < 1 || head[6] > 3) {
    refuse(file.name(), ": expected a .npy file of version 1 to 3");
  }
  const bool wide = head[6] > 1;  // the header's length takes 4 bytes from version 2 on
  const std::uint64_t begin = wide ? 12 : 10;
  const std::uint64_t length =
      head[8] + 256ULL * head[9] + (wide ? 65536ULL * head[10] + 16777216ULL * head[11] : 0);
  if (length > file.size() - begin) {
    refuse(file.name(), ": header length ", length, ": expected at most ", file.size() - begin);
  }
  std::string header(static_cast<std::size_t>(length), '\0');
  file.read(begin, header.data(), header.size());

  if (header.find('\0') != std::string::npos) {
    refuse(file.name(), ": expected a header of text, found a NUL");
  }
  for (const char* const key : {"descr", "fortran_order", "shape"}) {
    if (detail::npy_value(header, key).empty()) {
      refuse(file.name(), ": field '", key, "': expected once in the header");
    }
  }
  const std::string_view kind = detail::npy_value(header, "descr");
  if (!kind.starts_with("'<f4'")) {
    refuse(file.name(), ": values of type ", one_line(std::string(kind.substr(0, kind.find(',')))),
           ": expected '<f4', little-endian float32: save logits.astype(\"<f4\")");
  }
  if (!detail::npy_value(header, "fortran_order").starts_with("False")) {
    refuse(file.name(),
           ": columns one after the other (fortran_order): expected rows: save "
           "numpy.ascontiguousarray(logits)");
  }
  auto shape = detail::npy_shape(detail::npy_value(header, "shape"));
  if (!shape) {
    refuse(file.name(), ": field 'shape': expected a tuple of sizes");
  }
  std::optional<std::uint64_t> bytes = sizeof(float);
  for (const std::uint64_t extent : *shape) {
    bytes = bytes ? checked_product(*bytes, extent) : bytes;
  }
  const std::uint64_t room = file.size() - begin - length;
  if (bytes != room) {
    refuse(file.name(), ": shape ", to_string(*shape), ": found ", room,
           " bytes of values, expected ",
           bytes ? std::to_string(*bytes) : std::string("more than 64 bits can count"));
  }
  npy_array made{std::move(*shape), std::vector<float>(room / sizeof(float))};
  file.read(begin + length, made.values.data(), room);
  return made;
}

}  // namespace example
