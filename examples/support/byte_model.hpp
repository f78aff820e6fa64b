// A byte language model small enough to train in seconds: the embeddings of the last bytes side by
// side, one block that learns, and a linear map to the next byte.
#pragma once

#include "error.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/gate_backward.hpp>

namespace example {

using moeroute::index_t;
using moeroute::matrix_view;

/// Weights, their gradient and the two averages of Adam (Kingma and Ba 2015).
struct parameter {
  std::vector<float> value, gradient, mean, square;

  parameter() = default;
  /// Normal, with the spread 1 / sqrt(inputs).
  parameter(index_t n, index_t inputs, std::mt19937_64& random)
      : value(static_cast<std::size_t>(n)), gradient(value), mean(value), square(value) {
    for (float& v : value) {
      float sum = -6.0f;
      for (int i = 0; i < 12; ++i) sum += static_cast<float>(random() >> 40) * 0x1p-24f;
      v = sum / std::sqrt(static_cast<float>(inputs));
    }
  }

  void step(std::int64_t n, float rate) {
    const float fix_mean = 1.0f - std::pow(0.9f, static_cast<float>(n));
    const float fix_square = 1.0f - std::pow(0.99f, static_cast<float>(n));
    for (std::size_t i = 0; i < value.size(); ++i) {
      const float g = gradient[i];
      mean[i] = 0.9f * mean[i] + 0.1f * g;
      square[i] = 0.99f * square[i] + 0.01f * g * g;
      value[i] -= rate * (mean[i] / fix_mean) / (std::sqrt(square[i] / fix_square) + 1e-8f);
      gradient[i] = 0.0f;
    }
  }

  [[nodiscard]] matrix_view<const float> rows(index_t n) const {
    return {value.data(), n, static_cast<index_t>(value.size()) / n};
  }
  [[nodiscard]] matrix_view<float> slope(index_t n) {
    return {gradient.data(), n, static_cast<index_t>(gradient.size()) / n};
  }
};

/// Where a training stands, as bytes: writes or reads everything in one order.
class archive {
 public:
  archive(const std::string& path, bool saves)
      : path_(path),
        saves_(saves),
        file_(path, std::ios::binary | (saves ? std::ios::out : std::ios::in)) {
    if (!file_) refuse(path, ": cannot be opened");
  }
  template <class T>
  void list(std::vector<T>& x) {
    auto size = static_cast<std::int64_t>(x.size());
    number(size);
    if (size != static_cast<std::int64_t>(x.size()))
      refuse(path_, ": holds ", size, " values where this training has ", x.size());
    bytes(x.data(), x.size() * sizeof(T));
  }
  template <class T>
  void number(T& x) {
    bytes(&x, sizeof x);
  }
  void add(parameter& p) {
    for (std::vector<float>* x : {&p.value, &p.mean, &p.square}) list(*x);
  }

 private:
  void bytes(void* x, std::size_t n) {
    if (saves_)
      file_.write(static_cast<const char*>(x), static_cast<std::streamsize>(n));
    else
      file_.read(static_cast<char*>(x), static_cast<std::streamsize>(n));
    if (!file_) refuse(path_, saves_ ? ": cannot be written" : ": is cut short");
  }

  std::string path_;
  bool saves_;
  std::fstream file_;
};

/// What is around the block.
class byte_model {
 public:
  static constexpr index_t context = 8, embedding = 16, d = context * embedding, bytes = 256;

  explicit byte_model(std::mt19937_64& random)
      : embed_(bytes * embedding, 1, random), out_(bytes * d, d, random), packed_(bytes, d) {}

  /// x[t] = the embeddings of the bytes before text[at[t]].
  void embed(const std::string& text, std::span<const index_t> at, std::vector<float>& x) const {
    x.resize(at.size() * static_cast<std::size_t>(d));
    for (std::size_t t = 0; t < at.size(); ++t)
      for (index_t c = 0; c < context; ++c)
        std::copy_n(embed_.value.data() + byte(text, at[t] - context + c) * embedding, embedding,
                    x.data() + static_cast<index_t>(t) * d + c * embedding);
  }

  /// The mean cross-entropy of the next bytes, in bits; dh becomes its gradient where learning.
  double loss(const std::string& text, std::span<const index_t> at, const std::vector<float>& h,
              std::vector<float>& dh, bool learning) {
    const auto tokens = static_cast<index_t>(at.size());
    packed_.set_rows(0, out_.rows(bytes));
    logits_.resize(static_cast<std::size_t>(tokens * bytes));
    const matrix_view<float> z(logits_.data(), tokens, bytes);
    const matrix_view<const float> states(h.data(), tokens, d);
    moeroute::gate(states, packed_, z);
    double sum = 0.0;
    for (index_t t = 0; t < tokens; ++t) {
      float* const row = z.row(t);
      const float max = moeroute::simd::row_max(row, bytes);
      const float chosen = row[byte(text, at[static_cast<std::size_t>(t)])];
      const float total = moeroute::simd::row_exp(row, bytes, max, row);
      sum += static_cast<double>(std::log(total) + max - chosen);
      if (!learning) continue;
      const float share = 1.0f / (total * static_cast<float>(tokens));
      for (index_t b = 0; b < bytes; ++b) row[b] *= share;
      row[byte(text, at[static_cast<std::size_t>(t)])] -= 1.0f / static_cast<float>(tokens);
    }
    if (learning) {
      dh.resize(h.size());
      moeroute::gate_backward(
          states, out_.rows(bytes), z,
          moeroute::gate_gradients<float>{
              moeroute::gradient_to::write, {dh.data(), tokens, d}, out_.slope(bytes)});
    }
    return sum / static_cast<double>(tokens) / std::log(2.0);
  }

  void embed_backward(const std::string& text, std::span<const index_t> at,
                      const std::vector<float>& dx) {
    for (std::size_t t = 0; t < at.size(); ++t)
      for (index_t c = 0; c < context; ++c)
        for (index_t i = 0; i < embedding; ++i)
          embed_.gradient[static_cast<std::size_t>(byte(text, at[t] - context + c) * embedding +
                                                   i)] +=
              dx[t * static_cast<std::size_t>(d) + static_cast<std::size_t>(c * embedding + i)];
  }

  void step(std::int64_t n, float rate) {
    embed_.step(n, rate);
    out_.step(n, rate);
  }
  void keep(archive& file) {
    file.add(embed_);
    file.add(out_);
  }

  static index_t byte(const std::string& text, index_t at) {
    return static_cast<unsigned char>(text[static_cast<std::size_t>(at)]);
  }

 private:
  parameter embed_, out_;
  moeroute::simd::packed_matrix<> packed_;
  std::vector<float> logits_;
};

}  // namespace example
