// expect: add -fno-ipa-ra -DMOEROUTE_NO_IPA_RA
// As g++ for Windows defines them.
#include <version>
#undef __clang__
#define _WIN32 1
#define __OPTIMIZE__ 1
#include <moeroute/base/config.hpp>
