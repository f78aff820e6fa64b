// expect: [moeroute] these -mavx512 flags fit no machine
// expect: moeroute stops here
// As -mavx512bw alone defines them.
#define __AVX512BW__ 1
#undef __AVX512DQ__
#include <moeroute/simd/batch.hpp>
