// What one rank sends to every other: a row for each token and rank, an entry for each choice.
#pragma once

#include <cstdint>
#include <span>

#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/dispatch_plan.hpp>

namespace moeroute {

/// The rows and entries of one rank's tokens, by destination rank.
///
/// An entry is a choice: it names a slot of its destination. A row is a token: it is sent once to
/// each rank where any of its choices has a slot, whatever their number. Both lie in (destination,
/// token, choice) order, so that a row's entries follow one another. outer() is the same as a
/// dispatch_plan with ranks in place of experts: its slots are the entries, and what comes back in
/// their order is combined with it. Storage is reused.
class exchange_plan {
 public:
  index_t ranks() const { return outer_.experts(); }
  index_t tokens() const { return outer_.tokens(); }
  index_t rows() const { return rows_; }
  index_t entries() const { return outer_.slots(); }
  index_t rows_to(index_t rank) const { return row_offset_[rank + 1] - row_offset_[rank]; }
  index_t entries_to(index_t rank) const { return outer_.load(rank); }

  const dispatch_plan& outer() const { return outer_; }
  /// First row to every rank and, last, the number of rows: [R + 1].
  std::span<const std::int32_t> row_offset() const { return row_offset_; }
  /// First entry to every rank: [R + 1].
  std::span<const slot_id> entry_offset() const { return outer_.offsets(); }
  /// The token of each row: [rows].
  std::span<const slot_id> row_token() const { return {row_token_.data(), size(rows_)}; }
  /// How many entries each row has, at least 1: [rows].
  std::span<const std::int32_t> entries_of_row() const {
    return {row_entries_.data(), size(rows_)};
  }
  /// The slot of each entry, counted from its rank's first: [entries].
  std::span<const std::int32_t> local_slot() const { return {local_slot_.data(), size(entries())}; }

  /// For the stage that builds the plan.
  struct parts {
    dispatch_plan& outer;
    buffer<std::int32_t>& row_offset;
    buffer<slot_id>& row_token;
    buffer<std::int32_t>& row_entries;
    buffer<std::int32_t>& local_slot;
    buffer<std::int32_t>& key;
    index_t& rows;
  };
  parts writable() {
    return {outer_, row_offset_, row_token_, row_entries_, local_slot_, key_, rows_};
  }

 private:
  static std::size_t size(index_t n) { return static_cast<std::size_t>(n); }

  dispatch_plan outer_;
  index_t rows_ = 0;
  buffer<std::int32_t> row_offset_;
  buffer<slot_id> row_token_;
  buffer<std::int32_t> row_entries_;
  buffer<std::int32_t> local_slot_;
  buffer<std::int32_t> key_;
};

}  // namespace moeroute
