#include "system.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace el {
namespace {
#include "simd_neon.h"

#include "lookup.inl"
#include "isa.inl"
}  // namespace

static bool available() { return true; }
const Isa kNeon = {"neon", available, Simd::kBytes, Simd::kMaxBlock, kCounting,
                   run_strip, pool_rows, linear_rows, pass_rows, peak};
}  // namespace el
#else
namespace el {
static bool available() { return false; }
const Isa kNeon = {"neon", available, 0, 0, {}, nullptr, nullptr, nullptr, nullptr, nullptr};
}  // namespace el
#endif
