#include "system.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

// For this file alone, so that the rest runs on any machine of the architecture.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx2,fma")
#endif

namespace el {
namespace {
#include "simd_avx512.h"
typedef Avx512 Simd;

#include "lookup.inl"
#include "isa.inl"
}  // namespace
}  // namespace el

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace el {
static bool available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
const Isa kAvx512 = {"avx512", available, Simd::kBytes, Simd::kMaxBlock, kCounting,
                     run_strip, pool_rows, linear_rows, pass_rows, peak};
}  // namespace el
#else
namespace el {
static bool available() { return false; }
const Isa kAvx512 = {"avx512", available, 0, 0, {}, nullptr, nullptr, nullptr, nullptr, nullptr};
}  // namespace el
#endif
