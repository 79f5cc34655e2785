// The vector operations of the engine for AVX-512 with population counts (VPOPCNTDQ).
#ifndef EL_CONVERT_SIMD_AVX512VPOPCNTDQ_H
#define EL_CONVERT_SIMD_AVX512VPOPCNTDQ_H

#include "simd_avx512.h"

struct Simd : Avx512 {
    enum { kMaxBlock = 64 };

    // Counts of 32 bits each.
    static inline Bytes repeat(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
    static inline Bytes add_ones(Bytes counts, Bytes bits) {
        return _mm512_add_epi32(counts, _mm512_popcnt_epi32(bits));
    }
    // 32 counts, in the order of `popcount_lane`.
    template <bool kAdd>
    static inline void store_counts(uint16_t *sums, Bytes a, Bytes b) {
        Bytes counts = _mm512_packus_epi32(a, b);
        if (kAdd) counts = _mm512_add_epi16(counts, _mm512_loadu_si512(sums));
        _mm512_storeu_si512(sums, counts);
    }
};

#endif
