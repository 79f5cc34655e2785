// The vector operations of the engine for AVX-512 (F, BW).
#ifndef EL_CONVERT_SIMD_AVX512_H
#define EL_CONVERT_SIMD_AVX512_H

struct Avx512 {
    typedef __m512i Bytes;
    typedef __m512 Floats;
    enum { kBytes = 64, kFloats = 16, kSigns = 16, kMaxBlock = 128, kTransposes = 1 };

    static inline Bytes zero() { return _mm512_setzero_si512(); }
    static inline void store(uint8_t *p, Bytes v) { _mm512_storeu_si512(p, v); }
    static inline Bytes load(const uint8_t *p) { return _mm512_loadu_si512(p); }
    // 16 bytes, the same in each lane of 128 bits.
    static inline Bytes table(const uint8_t *p) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static inline Bytes lookup(Bytes table, Bytes index) {
        return _mm512_shuffle_epi8(table, index);
    }
    static inline Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
    static inline Bytes differ(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
    static inline Bytes sub(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
    // b + the high nibbles of s.
    static inline Bytes add_high(Bytes b, Bytes s) {
        return add(b, _mm512_and_si512(_mm512_srli_epi16(s, 4), _mm512_set1_epi8(15)));
    }
    static inline Bytes times16(Bytes b) {
        return _mm512_and_si512(_mm512_slli_epi16(b, 4), _mm512_set1_epi8(-16));
    }
    template <bool kAdd>
    static inline void spill(uint16_t *sums, Bytes counts) {
        Bytes low = _mm512_unpacklo_epi8(counts, zero()), high = _mm512_unpackhi_epi8(counts, zero());
        if (kAdd) {
            low = _mm512_add_epi16(low, _mm512_loadu_si512(sums));
            high = _mm512_add_epi16(high, _mm512_loadu_si512(sums + 32));
        }
        _mm512_storeu_si512(sums, low);
        _mm512_storeu_si512(sums + 32, high);
    }

    static inline Floats load(const float *p) { return _mm512_loadu_ps(p); }
    static inline void store(float *p, Floats v) { _mm512_storeu_ps(p, v); }
    static inline Floats set(float v) { return _mm512_set1_ps(v); }
    static inline Floats widen(const uint16_t *p) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(words));
    }
    static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    // Whole numbers, as floats, from -126 to 128, whose power is infinity.
    static inline Floats nearest(Floats v) { return _mm512_roundscale_ps(v, 0); }
    static inline Floats power_of_two(Floats n) {
        return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n);
    }
    static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    // The second operand where either is NaN.
    static inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    // The larger; NaN where either is.
    static inline Floats larger(Floats a, Floats b) {
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        return _mm512_mask_blend_ps(nan, _mm512_max_ps(a, b), a);
    }
    static inline Floats prelu(Floats v, Floats slope) {
        const __mmask16 positive = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);
        return _mm512_mask_blend_ps(positive, _mm512_mul_ps(v, slope), v);
    }
    // The first `count` floats, then zeros; nothing beyond them is read.
    static inline Floats load_first(const float *p, int count) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
    }
    static inline Floats pick(Floats v, const int32_t *lanes) {
        return _mm512_permutexvar_ps(_mm512_loadu_si512(lanes), v);
    }
    // Lanes of even and odd number of a followed by b.
    static inline void split(Floats a, Floats b, Floats *even, Floats *odd) {
        const __m512i step = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                                               28, 30);
        *even = _mm512_permutex2var_ps(a, step, b);
        *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(step, _mm512_set1_epi32(1)), b);
    }
    // Rows become columns.
    static inline void transpose(Floats (&v)[16]) {
        Floats w[16];
        for (int i = 0; i < 16; i += 2) {
            w[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
            w[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                const __m512d a = _mm512_castps_pd(w[i + j]), b = _mm512_castps_pd(w[i + j + 2]);
                v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        // v[i + j] holds, in its quarters, columns j, 4 + j, 8 + j and 12 + j of four rows.
        for (int i = 0; i < 16; i += 8)
            for (int j = 0; j < 4; j++) {
                w[i + j] = _mm512_shuffle_f32x4(v[i + j], v[i + j + 4], 0x88);
                w[i + j + 4] = _mm512_shuffle_f32x4(v[i + j], v[i + j + 4], 0xDD);
            }
        for (int j = 0; j < 8; j++) {
            v[j] = _mm512_shuffle_f32x4(w[j], w[j + 8], 0x88);
            v[j + 8] = _mm512_shuffle_f32x4(w[j], w[j + 8], 0xDD);
        }
    }
    static inline unsigned signs(const float *x, const float *threshold) {
        const Floats t = threshold ? load(threshold) : _mm512_setzero_ps();
        return _mm512_cmp_ps_mask(load(x), t, _CMP_GT_OQ);
    }
    static inline __mmask64 sign_mask(const float *x, const float *threshold) {
        __mmask16 part[4];
        for (int i = 0; i < 4; i++)
            part[i] = static_cast<__mmask16>(signs(x + 16 * i, threshold ? threshold + 16 * i : nullptr));
        return _mm512_kunpackd(_mm512_kunpackw(part[3], part[2]), _mm512_kunpackw(part[1], part[0]));
    }
    static inline uint64_t sign_word(const float *x, const float *threshold) {
        return sign_mask(x, threshold);
    }
    // A byte per channel: 1 where x > threshold, else 0.
    static inline Bytes sign_bytes(const float *x, const float *threshold) {
        return _mm512_maskz_mov_epi8(sign_mask(x, threshold), _mm512_set1_epi8(1));
    }
    static inline void widen(uint16_t *sums, Bytes counts) {
        _mm512_storeu_si512(sums, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(counts)));
        _mm512_storeu_si512(sums + 32, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(counts, 1)));
    }
};

#endif
