#include "engine.hpp"

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  const std::int64_t width = 64, tokens = 33;
  std::vector<float> gate(256 * width), bias(256), x(tokens * width), y(x.size());
  unsigned bits = 1;
  const auto next = [&] {
    bits = bits * 1664525u + 1013904223u;
    return static_cast<float>(bits >> 8) / 16777216.0f - 0.5f;
  };
  for (float& v : gate) v = next();
  for (float& v : x) v = next();
  moe layer("deepseek_v3", gate.data(), width, bias.data());
  layer(x.data(), y.data(), tokens);
  layer(x.data(), y.data(), 1);
  // Every expert multiplies by its number: a row of y is its row of x times one factor.
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float factor = y[t * width] / x[t * width];
    for (std::int64_t c = 0; c < width; ++c)
      if (std::abs(y[t * width + c] - factor * x[t * width + c]) > 1e-3f * std::abs(factor)) {
        std::printf("engine: token %d, column %d is off\n", static_cast<int>(t),
                    static_cast<int>(c));
        return 1;
      }
  }
  std::puts("engine: 33 tokens through one layer");
}
