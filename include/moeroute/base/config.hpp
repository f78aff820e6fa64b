// Everything that depends on the compiler: attributes, and the settings a user may define.
#pragma once

#include <version>

#include <moeroute/base/version.hpp>

#if !defined(__cpp_concepts) || __cpp_concepts < 201907L
#error "[moeroute] the headers are C++20; compile with -std=c++20 or later"
// No compiler stops at a sentence, and thousands of lines about the same would follow.
#include <moeroute stops here: the error above says why>
#endif

// On Windows g++ takes its own copy of an inline function for the one that will be linked, and
// keeps values in registers that this copy leaves alone; the copy of another file may change them.
// No macro tells the optimiser's level: what is told is that the flag is there.
#if defined(_WIN32) && defined(__OPTIMIZE__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(MOEROUTE_NO_IPA_RA)
#error \
    "[moeroute] from -O2 on g++ for Windows keeps values in registers that an inline function changes where another file's copy of it is linked; add -fno-ipa-ra -DMOEROUTE_NO_IPA_RA, or compile with clang"
#endif

// NaN and infinities are data here (a NaN logit counts as -inf), so finite-math modes break the
// promises.
#if !defined(MOEROUTE_ALLOW_FAST_MATH)
#if defined(__FAST_MATH__)
#error \
    "[moeroute] -ffast-math breaks NaN, infinity and tie handling; compile without it, or define MOEROUTE_ALLOW_FAST_MATH to accept wrong routing"
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ != 0
#error \
    "[moeroute] -ffinite-math-only breaks NaN and infinity handling; compile without it, or define MOEROUTE_ALLOW_FAST_MATH to accept wrong routing"
#elif defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
// Macros of g++ alone: clang does not tell.
#error \
    "[moeroute] -fassociative-math, -freciprocal-math and -fno-signed-zeros change ties and bits; compile without them, or define MOEROUTE_ALLOW_FAST_MATH to accept wrong routing"
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define MOEROUTE_INLINE [[gnu::always_inline]] inline
#define MOEROUTE_INLINE_LAMBDA __attribute__((always_inline))
#define MOEROUTE_COLD [[gnu::cold, gnu::noinline]]
#define MOEROUTE_OUT_OF_LINE [[gnu::noinline]]
#define MOEROUTE_RESTRICT __restrict__
#define MOEROUTE_MAY_ALIAS [[gnu::may_alias]]
#define MOEROUTE_PREFETCH(address) __builtin_prefetch(address)
#define MOEROUTE_PREFETCH_TO_SECOND(address) __builtin_prefetch(address, 0, 2)
#define MOEROUTE_PREFETCH_TO_WRITE(address) __builtin_prefetch(address, 1)
#define MOEROUTE_FORGET(address) asm volatile("" : : "r"(address) : "memory")
#define MOEROUTE_APART(integer) asm("" : "+r"(integer))
#else
#define MOEROUTE_INLINE inline
#define MOEROUTE_INLINE_LAMBDA
#define MOEROUTE_COLD
#define MOEROUTE_OUT_OF_LINE
#define MOEROUTE_RESTRICT
#define MOEROUTE_MAY_ALIAS
#define MOEROUTE_PREFETCH(address) static_cast<void>(address)
#define MOEROUTE_PREFETCH_TO_SECOND(address) static_cast<void>(address)
#define MOEROUTE_PREFETCH_TO_WRITE(address) static_cast<void>(address)
#define MOEROUTE_FORGET(address) static_cast<void>(address)
#define MOEROUTE_APART(integer) static_cast<void>(integer)
#endif

// MOEROUTE_FORGET: the compiler forgets what it has stored at an address and loads it. From what it
// knows it would make one lane of a register by two or three shuffles, which all take one port.

// MOEROUTE_APART: an integer that is read by itself. Two neighbours read at once have to wait until
// what wrote them one by one has reached the cache.

// Loops over register arrays must be unrolled completely, or the array spills to the stack.
#if defined(__clang__)
#define MOEROUTE_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define MOEROUTE_UNROLL _Pragma("GCC unroll 64")
#else
#define MOEROUTE_UNROLL
#endif

#if defined(__cpp_exceptions)
#define MOEROUTE_EXCEPTIONS 1
#else
#define MOEROUTE_EXCEPTIONS 0
#endif

// libc++ up to 19 has std::from_chars of whole numbers alone.
#if defined(__cpp_lib_to_chars)
#define MOEROUTE_FROM_CHARS_OF_REALS 1
#else
#define MOEROUTE_FROM_CHARS_OF_REALS 0
#endif

// Checks of our own invariants. On in debug builds; define MOEROUTE_CONTRACTS to 0 or 1 to decide
// yourself.
#if !defined(MOEROUTE_CONTRACTS)
#if defined(NDEBUG)
#define MOEROUTE_CONTRACTS 0
#else
#define MOEROUTE_CONTRACTS 1
#endif
#endif
