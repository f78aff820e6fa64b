#include "every_header.hpp"

int other();

int main() { return other(); }
