// Every property under libFuzzer: MOEROUTE_PROPERTY=NAME fuzz [options] [corpus folders].
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "properties/capacity.hpp"
#include "properties/isa.hpp"
#include "properties/plan.hpp"
#include "properties/readers.hpp"
#include "properties/select.hpp"
#include "properties/spec.hpp"

namespace {

struct named {
  std::string_view name;
  std::string (*property)(test::bytes);
};

constexpr named all[] = {
    {"selection", test::selection_property},
    {"spec", test::spec_property},
    {"plan", test::plan_property},
    {"capacity", test::capacity_property},
    {"isa", test::isa_property},
    {"npy", test::npy_property},
    {"safetensors", test::safetensors_property},
    {"config", test::config_property},
    {"gguf", test::gguf_property},
    {"route_file", test::route_file_property},
};

const named& chosen() {
  static const named& found = []() -> const named& {
    const char* name = std::getenv("MOEROUTE_PROPERTY");
    for (const named& n : all)
      if (name != nullptr && n.name == name) return n;
    std::fprintf(stderr, "fuzz: MOEROUTE_PROPERTY is not the name of a property; there are:");
    for (const named& n : all) std::fprintf(stderr, " %s", n.name.data());
    std::fprintf(stderr, "\n");
    std::exit(2);
  }();
  return found;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string broken = chosen().property(test::bytes({data, size}));
  if (!broken.empty()) {
    std::fprintf(stderr, "fuzz: %s: %s\n", chosen().name.data(), broken.c_str());
    std::abort();
  }
  return 0;
}
