// How an example refuses its input: one sentence that names the file, the
// tensor or the field, and what was expected.
#pragma once

#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

namespace example {

/// Something the person who called the program can put right (exit code 2).
class input_error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The parts, one after the other, as text.
template <class... Parts>
[[nodiscard]] std::string join(const Parts&... parts) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw input_error(join(parts...));
}

/// The text with every control character replaced: names come from files, and
/// a message has to stay on one line.
[[nodiscard]] inline std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      c = '?';
    }
  }
  return text;
}

}  // namespace example
