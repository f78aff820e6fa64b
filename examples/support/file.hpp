// A file read piece by piece, so that a checkpoint never lies in memory whole.
#pragma once

#include "error.hpp"

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

namespace example {

static_assert(std::endian::native == std::endian::little,
              "these formats store little-endian numbers; the readers copy them as they are");

class input_file {
 public:
  explicit input_file(const std::filesystem::path& path) : name_(path.string()) {
    std::error_code failure;
    const auto status = std::filesystem::status(path, failure);
    if (!std::filesystem::exists(status)) {
      refuse(name_, ": no such file");
    }
    // Checked before opening: opening a pipe would wait for a writer.
    if (!std::filesystem::is_regular_file(status)) {
      refuse(name_, ": expected a regular file");
    }
    descriptor_ = ::open(name_.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor_ < 0) {
      refuse(name_, ": cannot be opened: ", std::strerror(errno));
    }
    struct ::stat facts{};
    if (::fstat(descriptor_, &facts) != 0 || facts.st_size < 0) {
      ::close(std::exchange(descriptor_, -1));
      refuse(name_, ": its size cannot be read");
    }
    size_ = static_cast<std::uint64_t>(facts.st_size);
  }
  input_file(input_file&& other) noexcept
      : name_(std::move(other.name_)),
        descriptor_(std::exchange(other.descriptor_, -1)),
        size_(other.size_) {}
  input_file(const input_file&) = delete;
  input_file& operator=(const input_file&) = delete;
  input_file& operator=(input_file&&) = delete;
  ~input_file() {
    if (descriptor_ >= 0) {
      ::close(descriptor_);
    }
  }

  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] std::uint64_t size() const { return size_; }

  /// Fills `bytes` bytes at `to` from `offset` on, or refuses the file.
  void read(std::uint64_t offset, void* to, std::size_t bytes) const {
    if (offset > size_ || bytes > size_ - offset) {
      refuse(name_, ": expected ", bytes, " bytes at offset ", offset, ", the file has ", size_);
    }
    auto* out = static_cast<std::byte*>(to);
    while (bytes > 0) {
      const auto got = ::pread(descriptor_, out, bytes, static_cast<::off_t>(offset));
      if (got < 0 && errno == EINTR) {
        continue;
      }
      if (got <= 0) {
        refuse(name_, ": cannot be read at offset ", offset, ": ",
               got < 0 ? std::strerror(errno) : "the file became shorter");
      }
      out += got;
      offset += static_cast<std::uint64_t>(got);
      bytes -= static_cast<std::size_t>(got);
    }
  }

  /// The whole file as text, refused when larger than `limit` bytes.
  [[nodiscard]] std::string text(std::uint64_t limit) const {
    if (size_ > limit) {
      refuse(name_, ": expected at most ", limit, " bytes, found ", size_);
    }
    std::string all(static_cast<std::size_t>(size_), '\0');
    read(0, all.data(), all.size());
    return all;
  }

 private:
  std::string name_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

}  // namespace example
