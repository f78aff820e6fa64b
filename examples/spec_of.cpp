// What a config.json, or the metadata of a GGUF file, says of a model's routers: one line in the
// words of docs/models.md, one for each kind of layer where layers differ.
//
//   spec_of CONFIG.json | MODEL.gguf [--layer N]
//
// Bad input: one line that names file and key, exit code 2.
#include "support/spec_of_app.hpp"

#include <iostream>

int main(int argc, char** argv) { return example::run_spec_of(argc, argv, std::cout, std::cerr); }
