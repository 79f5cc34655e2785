// The vector operations of the engine for 64-bit ARM.
#ifndef EL_CONVERT_SIMD_NEON_H
#define EL_CONVERT_SIMD_NEON_H

struct Simd {
    typedef uint8x16_t Bytes;
    typedef float32x4_t Floats;
    enum { kBytes = 16, kFloats = 4, kSigns = 8, kMaxBlock = 64, kTransposes = 0 };

    static inline Bytes zero() { return vdupq_n_u8(0); }
    static inline void store(uint8_t *p, Bytes v) { vst1q_u8(p, v); }
    static inline Bytes load(const uint8_t *p) { return vld1q_u8(p); }
    static inline Bytes table(const uint8_t *p) { return vld1q_u8(p); }
    static inline Bytes lookup(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
    static inline Bytes add(Bytes a, Bytes b) { return vaddq_u8(a, b); }
    static inline Bytes differ(Bytes a, Bytes b) { return veorq_u8(a, b); }
    static inline Bytes sub(Bytes a, Bytes b) { return vsubq_u8(a, b); }
    // b + the high nibbles of s.
    static inline Bytes add_high(Bytes b, Bytes s) { return vsraq_n_u8(b, s, 4); }
    static inline Bytes times16(Bytes b) { return vshlq_n_u8(b, 4); }
    template <bool kAdd>
    static inline void spill(uint16_t *sums, Bytes counts) {
        uint16x8_t low = vmovl_u8(vget_low_u8(counts)), high = vmovl_u8(vget_high_u8(counts));
        if (kAdd) {
            low = vaddq_u16(low, vld1q_u16(sums));
            high = vaddq_u16(high, vld1q_u16(sums + 8));
        }
        vst1q_u16(sums, low);
        vst1q_u16(sums + 8, high);
    }

    static inline Floats load(const float *p) { return vld1q_f32(p); }
    static inline void store(float *p, Floats v) { vst1q_f32(p, v); }
    static inline Floats set(float v) { return vdupq_n_f32(v); }
    static inline Floats widen(const uint16_t *p) {
        return vcvtq_f32_u32(vmovl_u16(vld1_u16(p)));
    }
    static inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
    static inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
    static inline Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
    // Whole numbers, as floats, from -126 to 128, whose power is infinity.
    static inline Floats nearest(Floats v) { return vrndnq_f32(v); }
    static inline Floats power_of_two(Floats n) {
        const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
        return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
    }
    static inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static inline Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
    static inline Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
    // The larger; NaN where either is.
    static inline Floats larger(Floats a, Floats b) { return vmaxq_f32(a, b); }
    static inline Floats prelu(Floats v, Floats slope) {
        return vbslq_f32(vcgtq_f32(v, vdupq_n_f32(0)), v, vmulq_f32(v, slope));
    }
    // The first `count` floats, then zeros; nothing beyond them is read.
    static inline Floats load_first(const float *p, int count) {
        float padded[kFloats] = {0};
        for (int i = 0; i < count; i++) padded[i] = p[i];
        return vld1q_f32(padded);
    }
    static inline Floats pick(Floats v, const int32_t *lanes) {
        float from[kFloats], to[kFloats];
        vst1q_f32(from, v);
        for (int i = 0; i < kFloats; i++) to[i] = from[lanes[i]];
        return vld1q_f32(to);
    }
    // Lanes of even and odd number of a followed by b.
    static inline void split(Floats a, Floats b, Floats *even, Floats *odd) {
        *even = vuzp1q_f32(a, b);
        *odd = vuzp2q_f32(a, b);
    }
    static inline unsigned signs(const float *x, const float *threshold) {
        const float32x4_t t0 = threshold ? vld1q_f32(threshold) : vdupq_n_f32(0);
        const float32x4_t t1 = threshold ? vld1q_f32(threshold + 4) : vdupq_n_f32(0);
        const uint16x4_t low = vmovn_u32(vcgtq_f32(vld1q_f32(x), t0));
        const uint16x4_t high = vmovn_u32(vcgtq_f32(vld1q_f32(x + 4), t1));
        static const uint8_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
        const uint8x8_t mask = vmovn_u16(vcombine_u16(low, high));
        return vaddv_u8(vand_u8(mask, vld1_u8(places)));
    }
    static inline uint64_t sign_word(const float *x, const float *threshold) {
        uint64_t word = 0;
        for (int i = 0; i < 64; i += kSigns)
            word |= static_cast<uint64_t>(signs(x + i, threshold ? threshold + i : nullptr)) << i;
        return word;
    }
    // A byte per channel: 1 where x > threshold, else 0.
    static inline Bytes sign_bytes(const float *x, const float *threshold) {
        uint16x4_t mask[4];
        for (int i = 0; i < 4; i++) {
            const float32x4_t t = threshold ? vld1q_f32(threshold + 4 * i) : vdupq_n_f32(0);
            mask[i] = vmovn_u32(vcgtq_f32(vld1q_f32(x + 4 * i), t));
        }
        const uint8x8_t low = vmovn_u16(vcombine_u16(mask[0], mask[1]));
        const uint8x8_t high = vmovn_u16(vcombine_u16(mask[2], mask[3]));
        return vandq_u8(vcombine_u8(low, high), vdupq_n_u8(1));
    }
    static inline void widen(uint16_t *sums, Bytes counts) { spill<false>(sums, counts); }
};

#endif
