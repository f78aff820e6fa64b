// Prompts into token ids, and tokens onto a terminal without harm.
#pragma once

#include "config.hpp"
#include "error.hpp"

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace example {

using token_ids = std::vector<std::int32_t>;

[[nodiscard]] inline token_ids byte_tokens(std::string_view text) {
  token_ids made;
  made.reserve(text.size());
  for (const char c : text) {
    made.push_back(static_cast<unsigned char>(c));
  }
  return made;
}

/// "1,2,3" as ids of a vocabulary of `vocab` tokens.
[[nodiscard]] inline token_ids parse_token_ids(std::string_view text, std::int64_t vocab) {
  token_ids made;
  while (!text.empty()) {
    const auto comma = text.find(',');
    const std::string_view word = text.substr(0, comma);
    std::int64_t id = -1;
    const auto [end, failure] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (failure != std::errc() || end != word.data() + word.size() || id < 0 || id >= vocab) {
      refuse("--prompt-ids: expected token ids from 0 to ", vocab - 1, ", found '", word, "'");
    }
    made.push_back(static_cast<std::int32_t>(id));
    text = comma == std::string_view::npos ? std::string_view{} : text.substr(comma + 1);
  }
  return made;
}

/// Writes tokens as they come. Bytes are held back until they complete a UTF-8
/// character; what never does, and control characters, are shown as \xNN, so
/// that no model can steer the terminal. Ids of larger vocabularies are shown
/// as numbers.
class token_printer {
 public:
  token_printer(std::ostream& out, const model_config& config)
      : out_(out), bytes_(config.byte_vocabulary()) {}

  void write(std::int32_t token) {
    if (!bytes_) {
      out_ << token << ' ';
    } else {
      accept(static_cast<unsigned char>(token));
    }
    out_.flush();
  }
  void write(std::span<const std::int32_t> tokens) {
    for (const std::int32_t token : tokens) {
      write(token);
    }
  }
  /// Shows what is still held back.
  void finish() {
    escape_held();
    out_.flush();
  }

 private:
  void accept(unsigned char byte) {
    if (!held_.empty()) {
      if (byte >= low_ && byte <= high_) {
        held_.push_back(static_cast<char>(byte));
        low_ = 0x80;
        high_ = 0xbf;
        if (held_.size() == wanted_) {
          show_character();
        }
        return;
      }
      escape_held();
    }
    if (byte < 0x80) {
      show_ascii(byte);
    } else if (!begin_character(byte)) {
      escape(byte);
    }
  }

  /// The bounds of the second byte rule out overlong forms, surrogates and
  /// values past U+10FFFF (Unicode, table 3-7).
  bool begin_character(unsigned char byte) {
    if (byte < 0xc2 || byte > 0xf4) {
      return false;
    }
    wanted_ = byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
    low_ = byte == 0xe0 ? 0xa0 : byte == 0xf0 ? 0x90 : 0x80;
    high_ = byte == 0xed ? 0x9f : byte == 0xf4 ? 0x8f : 0xbf;
    held_.assign(1, static_cast<char>(byte));
    return true;
  }

  void show_character() {
    // U+0080 to U+009F are control characters as well.
    if (held_[0] == '\xc2' && static_cast<unsigned char>(held_[1]) < 0xa0) {
      escape_held();
      return;
    }
    out_ << held_;
    held_.clear();
  }

  void show_ascii(unsigned char byte) {
    if ((byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f) {
      escape(byte);
    } else {
      out_ << static_cast<char>(byte);
    }
  }

  void escape_held() {
    for (const char c : held_) {
      escape(static_cast<unsigned char>(c));
    }
    held_.clear();
  }

  void escape(unsigned char byte) {
    constexpr std::string_view digits = "0123456789abcdef";
    out_ << "\\x" << digits[byte >> 4] << digits[byte & 15U];
  }

  std::ostream& out_;
  bool bytes_;
  std::string held_;
  std::size_t wanted_ = 0;
  unsigned char low_ = 0x80;
  unsigned char high_ = 0xbf;
};

}  // namespace example
