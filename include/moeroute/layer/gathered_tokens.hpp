// A rank's tokens as one message that all ranks get: for few tokens, where a message costs more
// than rows that nobody asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// What such a message holds: for each token where its choices begin, for each choice its slot (and
/// weight), then the rows.
struct gathered_shape {
  index_t tokens = 0, choices = 0, d = 0;
  bool weights = false;

  index_t bytes(index_t bytes_of_value) const {
    return 4 * (tokens + 1 + (weights ? 2 : 1) * choices) +
           size_product(size_product(tokens, d), bytes_of_value);
  }
};

/// Writes the message; slot [choices] is what resolve() found.
///
/// Throws: error where a size does not fit. Cost: a copy of the rows; no allocation once warm.
template <storage T>
void pack_gathered(const matrix_view<const T>& x, const assignment& choices,
                   std::span<const slot_id> slot, bool weights, gathered_shape& shape,
                   buffer<std::byte>& message) {
  check_size("pack_gathered", "x.rows()", x.rows, choices.tokens());
  check_size("pack_gathered", "slot.size()", static_cast<index_t>(slot.size()), choices.choices());
  check_stride("pack_gathered", "x", x);
  shape = {choices.tokens(), choices.choices(), x.cols, weights};
  message.resize(shape.bytes(sizeof(T)));
  std::byte* to = message.data();
  const auto put = [&to](const void* from, index_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
    to += bytes;
  };
  for (index_t t = 0; t <= shape.tokens; ++t) {
    const auto first = static_cast<std::int32_t>(choices.first(t));
    put(&first, 4);
  }
  put(slot.data(), 4 * shape.choices);
  if (weights) put(choices.weights().data(), 4 * shape.choices);
  for (index_t t = 0; t < shape.tokens; ++t) put(x.row(t), x.cols * index_t{sizeof(T)});
}

/// Reads it: any address will do.
template <storage T>
class gathered_reader {
 public:
  /// Throws: error where the message has another length.
  gathered_reader(std::span<const std::byte> message, const gathered_shape& shape)
      : first_(message.data()),
        slot_(first_ + 4 * (shape.tokens + 1)),
        weight_(slot_ + 4 * shape.choices),
        rows_(weight_ + (shape.weights ? 4 * shape.choices : 0)),
        d_(shape.d) {
    check_size("gathered_reader", "message.size()", static_cast<index_t>(message.size()),
               shape.bytes(sizeof(T)));
  }
  index_t first(index_t token) const { return value<std::int32_t>(first_, token); }
  index_t slot(index_t choice) const { return value<std::int32_t>(slot_, choice); }
  float weight(index_t choice) const { return value<float>(weight_, choice); }
  void copy_row(index_t token, T* to) const {
    const index_t bytes = d_ * index_t{sizeof(T)};
    if (bytes > 0) std::memcpy(to, rows_ + token * bytes, static_cast<std::size_t>(bytes));
  }

 private:
  template <class V>
  static V value(const std::byte* list, index_t i) {
    V v;
    std::memcpy(&v, list + 4 * i, 4);
    return v;
  }
  const std::byte *first_, *slot_, *weight_, *rows_;
  index_t d_;
};

}  // namespace moeroute
