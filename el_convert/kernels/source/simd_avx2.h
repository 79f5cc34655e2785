// The vector operations of the engine for AVX2 with FMA.
#ifndef EL_CONVERT_SIMD_AVX2_H
#define EL_CONVERT_SIMD_AVX2_H

struct Simd {
    typedef __m256i Bytes;
    typedef __m256 Floats;
    enum { kBytes = 32, kFloats = 8, kSigns = 8, kMaxBlock = 64, kTransposes = 1 };

    static inline Bytes zero() { return _mm256_setzero_si256(); }
    static inline Bytes at(const void *p) {
        return _mm256_loadu_si256(static_cast<const __m256i *>(p));
    }
    static inline void put(void *p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }
    static inline void store(uint8_t *p, Bytes v) { put(p, v); }
    static inline Bytes load(const uint8_t *p) { return at(p); }
    // 16 bytes, the same in each lane of 128 bits.
    static inline Bytes table(const uint8_t *p) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static inline Bytes lookup(Bytes table, Bytes index) {
        return _mm256_shuffle_epi8(table, index);
    }
    static inline Bytes add(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
    static inline Bytes differ(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
    static inline Bytes sub(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
    // b + the high nibbles of s.
    static inline Bytes add_high(Bytes b, Bytes s) {
        return add(b, _mm256_and_si256(_mm256_srli_epi16(s, 4), _mm256_set1_epi8(15)));
    }
    static inline Bytes times16(Bytes b) {
        return _mm256_and_si256(_mm256_slli_epi16(b, 4), _mm256_set1_epi8(-16));
    }
    template <bool kAdd>
    static inline void spill(uint16_t *sums, Bytes counts) {
        Bytes low = _mm256_unpacklo_epi8(counts, zero()), high = _mm256_unpackhi_epi8(counts, zero());
        if (kAdd) {
            low = _mm256_add_epi16(low, at(sums));
            high = _mm256_add_epi16(high, at(sums + 16));
        }
        put(sums, low);
        put(sums + 16, high);
    }

    static inline Floats load(const float *p) { return _mm256_loadu_ps(p); }
    static inline void store(float *p, Floats v) { _mm256_storeu_ps(p, v); }
    static inline Floats set(float v) { return _mm256_set1_ps(v); }
    static inline Floats widen(const uint16_t *p) {
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(words));
    }
    static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    // Whole numbers, as floats, from -126 to 128, whose power is infinity.
    static inline Floats nearest(Floats v) {
        return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static inline Floats power_of_two(Floats n) {
        const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    }
    static inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    // The second operand where either is NaN.
    static inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    // The larger; NaN where either is.
    static inline Floats larger(Floats a, Floats b) {
        return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    }
    static inline Floats prelu(Floats v, Floats slope) {
        const Floats positive = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ);
        return _mm256_blendv_ps(_mm256_mul_ps(v, slope), v, positive);
    }
    // The first `count` floats, then zeros; nothing beyond them is read.
    static inline Floats load_first(const float *p, int count) {
        const Bytes places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), places));
    }
    static inline Floats pick(Floats v, const int32_t *lanes) {
        return _mm256_permutevar8x32_ps(v, at(lanes));
    }
    // Lanes of even and odd number of a followed by b.
    static inline void split(Floats a, Floats b, Floats *even, Floats *odd) {
        const __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
        const __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xDD));
        *even = _mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xD8));
        *odd = _mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xD8));
    }
    // Rows become columns.
    static inline void transpose(Floats (&v)[8]) {
        Floats w[8];
        for (int i = 0; i < 8; i += 2) {
            w[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
            w[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
        }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 2; j++) {
                v[i + 2 * j] = _mm256_shuffle_ps(w[i + j], w[i + j + 2], 0x44);
                v[i + 2 * j + 1] = _mm256_shuffle_ps(w[i + j], w[i + j + 2], 0xEE);
            }
        for (int j = 0; j < 4; j++) {
            w[j] = _mm256_permute2f128_ps(v[j], v[j + 4], 0x20);
            w[j + 4] = _mm256_permute2f128_ps(v[j], v[j + 4], 0x31);
        }
        for (int j = 0; j < 8; j++) v[j] = w[j];
    }
    static inline unsigned signs(const float *x, const float *threshold) {
        const Floats t = threshold ? load(threshold) : _mm256_setzero_ps();
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(load(x), t, _CMP_GT_OQ)));
    }
    static inline uint64_t sign_word(const float *x, const float *threshold) {
        uint64_t word = 0;
        for (int i = 0; i < 64; i += kSigns)
            word |= static_cast<uint64_t>(signs(x + i, threshold ? threshold + i : nullptr)) << i;
        return word;
    }
    // A byte per channel: 1 where x > threshold, else 0.
    static inline Bytes sign_bytes(const float *x, const float *threshold) {
        Bytes mask[4];
        for (int i = 0; i < 4; i++) {
            const Floats t = threshold ? load(threshold + 8 * i) : _mm256_setzero_ps();
            mask[i] = _mm256_castps_si256(_mm256_cmp_ps(load(x + 8 * i), t, _CMP_GT_OQ));
        }
        const Bytes bytes = _mm256_packs_epi16(_mm256_packs_epi32(mask[0], mask[1]),
                                               _mm256_packs_epi32(mask[2], mask[3]));
        const Bytes order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        return _mm256_and_si256(_mm256_permutevar8x32_epi32(bytes, order), _mm256_set1_epi8(1));
    }
    static inline void widen(uint16_t *sums, Bytes counts) {
        put(sums, _mm256_cvtepu8_epi16(_mm256_castsi256_si128(counts)));
        put(sums + 16, _mm256_cvtepu8_epi16(_mm256_extracti128_si256(counts, 1)));
    }
};

#endif
