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
#if defined(_WIN32)
#include <io.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#else
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
#endif

namespace example {

static_assert(std::endian::native == std::endian::little,
              "these formats store little-endian numbers; the readers copy them as they are");

// The system's own files: as bytes, read at an offset by any thread.
#if defined(_WIN32)
inline int open_file(const std::filesystem::path& path) {
  return ::_wopen(path.c_str(), _O_RDONLY | _O_BINARY | _O_NOINHERIT);
}
inline std::ptrdiff_t read_file(int file, void* to, std::size_t bytes, std::uint64_t offset) {
  static std::mutex positions;  // a file has one there
  const std::lock_guard<std::mutex> mine(positions);
  if (::_lseeki64(file, static_cast<std::int64_t>(offset), SEEK_SET) < 0) return -1;
  return ::_read(file, to, static_cast<unsigned>(std::min(bytes, std::size_t{1} << 30)));
}
inline std::int64_t size_of_file(int file) { return ::_filelengthi64(file); }
inline void close_file(int file) { ::_close(file); }
#else
inline int open_file(const std::filesystem::path& path) {
  return ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
}
inline std::ptrdiff_t read_file(int file, void* to, std::size_t bytes, std::uint64_t offset) {
  return ::pread(file, to, bytes, static_cast<::off_t>(offset));
}
inline std::int64_t size_of_file(int file) {
  struct stat status = {};
  return ::fstat(file, &status) == 0 ? static_cast<std::int64_t>(status.st_size) : -1;
}
inline void close_file(int file) { ::close(file); }
#endif

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
    descriptor_ = open_file(path);
    if (descriptor_ < 0) {
      refuse(name_, ": cannot be opened: ", std::strerror(errno));
    }
    const std::int64_t size = size_of_file(descriptor_);
    if (size < 0) {
      close_file(std::exchange(descriptor_, -1));
      refuse(name_, ": its size cannot be read");
    }
    size_ = static_cast<std::uint64_t>(size);
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
      close_file(descriptor_);
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
      const std::ptrdiff_t got = read_file(descriptor_, out, bytes, offset);
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
