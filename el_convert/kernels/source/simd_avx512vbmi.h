// The vector operations of the engine for AVX-512 with byte permutations (VBMI).
#ifndef EL_CONVERT_SIMD_AVX512VBMI_H
#define EL_CONVERT_SIMD_AVX512VBMI_H

#include "simd_avx512.h"

struct Simd : Avx512 {
    // The table's byte at each index.
    static inline Bytes lookup64(Bytes table, Bytes index) {
        return _mm512_permutexvar_epi8(index, table);
    }
    // The sums of two byte counters, in the order of `spill`.
    template <bool kAdd>
    static inline void spill_both(uint16_t *sums, Bytes one, Bytes two) {
        const Bytes ones = _mm512_set1_epi8(1);
        Bytes low = _mm512_maddubs_epi16(_mm512_unpacklo_epi8(one, two), ones);
        Bytes high = _mm512_maddubs_epi16(_mm512_unpackhi_epi8(one, two), ones);
        if (kAdd) {
            low = _mm512_add_epi16(low, _mm512_loadu_si512(sums));
            high = _mm512_add_epi16(high, _mm512_loadu_si512(sums + 32));
        }
        _mm512_storeu_si512(sums, low);
        _mm512_storeu_si512(sums + 32, high);
    }
};

#endif
