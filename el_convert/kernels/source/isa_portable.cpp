#include "system.h"

namespace el {
namespace {
#include "simd_portable.h"

#include "lookup4.inl"
#include "isa.inl"
}  // namespace

static bool available() { return true; }
const Isa kPortable = {"portable", available, Simd::kBytes, Simd::kMaxBlock, kLookup,
                       run_strip, pool_rows, peak};
}  // namespace el
