#include "system.h"

namespace el {
namespace {
#include "simd_portable.h"

#include "lookup.inl"
#include "isa.inl"
}  // namespace

static bool available() { return true; }
const Isa kPortable = {"portable", available, Simd::kBytes, Simd::kMaxBlock, kCounting,
                       run_strip, pool_rows, linear_rows, pass_rows, peak};
}  // namespace el
