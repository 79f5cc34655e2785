// The vector operations of the engine in plain C++: for any machine, and as the others' check.
#ifndef EL_CONVERT_SIMD_PORTABLE_H
#define EL_CONVERT_SIMD_PORTABLE_H

struct Simd {
    enum { kBytes = 16, kFloats = 4, kSigns = 8, kMaxBlock = 64, kTransposes = 0 };
    struct Bytes {
        uint8_t at[kBytes];
    };
    struct Floats {
        float at[kFloats];
    };

    static inline Bytes zero() { return Bytes(); }
    static inline Bytes load(const uint8_t *p) {
        Bytes r;
        memcpy(r.at, p, kBytes);
        return r;
    }
    static inline void store(uint8_t *p, const Bytes &v) { memcpy(p, v.at, kBytes); }
    static inline Bytes table(const uint8_t *p) { return load(p); }
    static inline Bytes lookup(const Bytes &table, const Bytes &index) {
        Bytes r;
        for (int i = 0; i < kBytes; i++) r.at[i] = table.at[index.at[i] & 15];
        return r;
    }
    static inline Bytes add(const Bytes &a, const Bytes &b) {
        Bytes r;
        for (int i = 0; i < kBytes; i++) r.at[i] = static_cast<uint8_t>(a.at[i] + b.at[i]);
        return r;
    }
    static inline Bytes differ(const Bytes &a, const Bytes &b) {
        Bytes r;
        for (int i = 0; i < kBytes; i++) r.at[i] = static_cast<uint8_t>(a.at[i] ^ b.at[i]);
        return r;
    }
    static inline Bytes sub(const Bytes &a, const Bytes &b) {
        Bytes r;
        for (int i = 0; i < kBytes; i++) r.at[i] = static_cast<uint8_t>(a.at[i] - b.at[i]);
        return r;
    }
    // b + the high nibbles of s.
    static inline Bytes add_high(const Bytes &b, const Bytes &s) {
        Bytes r;
        for (int i = 0; i < kBytes; i++) r.at[i] = static_cast<uint8_t>(b.at[i] + (s.at[i] >> 4));
        return r;
    }
    static inline Bytes times16(const Bytes &b) {
        Bytes r;
        for (int i = 0; i < kBytes; i++) r.at[i] = static_cast<uint8_t>(b.at[i] << 4);
        return r;
    }
    template <bool kAdd>
    static inline void spill(uint16_t *sums, const Bytes &counts) {
        for (int i = 0; i < kBytes; i++)
            sums[i] = static_cast<uint16_t>((kAdd ? sums[i] : 0) + counts.at[i]);
    }

    static inline Floats load(const float *p) {
        Floats r;
        memcpy(r.at, p, sizeof r.at);
        return r;
    }
    static inline void store(float *p, const Floats &v) { memcpy(p, v.at, sizeof v.at); }
    static inline Floats set(float v) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = v;
        return r;
    }
    static inline Floats widen(const uint16_t *p) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = p[i];
        return r;
    }
    static inline Floats add(const Floats &a, const Floats &b) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = a.at[i] + b.at[i];
        return r;
    }
    static inline Floats mul(const Floats &a, const Floats &b) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = a.at[i] * b.at[i];
        return r;
    }
    static inline Floats div(const Floats &a, const Floats &b) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = a.at[i] / b.at[i];
        return r;
    }
    // Whole numbers, as floats, from -126 to 128, whose power is infinity.
    static inline Floats nearest(const Floats &v) {
        const float big = 12582912;  // sums with it have no places for fractions
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = (v.at[i] + big) - big;
        return r;
    }
    static inline Floats power_of_two(const Floats &n) {
        Floats r;
        for (int i = 0; i < kFloats; i++) {
            const int whole = n.at[i] == n.at[i] ? static_cast<int>(n.at[i]) : 0;
            const uint32_t bits = static_cast<uint32_t>(whole + 127) << 23;
            memcpy(&r.at[i], &bits, sizeof bits);
        }
        return r;
    }
    static inline Floats fma(const Floats &a, const Floats &b, const Floats &c) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = a.at[i] * b.at[i] + c.at[i];
        return r;
    }
    // The second operand where either is NaN.
    static inline Floats max(const Floats &a, const Floats &b) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
        return r;
    }
    static inline Floats min(const Floats &a, const Floats &b) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
        return r;
    }
    // The larger; NaN where either is.
    static inline Floats larger(const Floats &a, const Floats &b) {
        Floats r;
        for (int i = 0; i < kFloats; i++)
            r.at[i] = a.at[i] > b.at[i] || a.at[i] != a.at[i] ? a.at[i] : b.at[i];
        return r;
    }
    static inline Floats prelu(const Floats &v, const Floats &slope) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = v.at[i] > 0 ? v.at[i] : v.at[i] * slope.at[i];
        return r;
    }
    // The first `count` floats, then zeros; nothing beyond them is read.
    static inline Floats load_first(const float *p, int count) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = i < count ? p[i] : 0;
        return r;
    }
    static inline Floats pick(const Floats &v, const int32_t *lanes) {
        Floats r;
        for (int i = 0; i < kFloats; i++) r.at[i] = v.at[lanes[i]];
        return r;
    }
    // Lanes of even and odd number of a followed by b.
    static inline void split(const Floats &a, const Floats &b, Floats *even, Floats *odd) {
        for (int i = 0; i < kFloats; i++) {
            even->at[i] = 2 * i < kFloats ? a.at[2 * i] : b.at[2 * i - kFloats];
            odd->at[i] = 2 * i < kFloats ? a.at[2 * i + 1] : b.at[2 * i + 1 - kFloats];
        }
    }
    static inline unsigned signs(const float *x, const float *threshold) {
        unsigned r = 0;
        for (int i = 0; i < kSigns; i++)
            r |= static_cast<unsigned>(x[i] > (threshold ? threshold[i] : 0.0f)) << i;
        return r;
    }
    static inline uint64_t sign_word(const float *x, const float *threshold) {
        uint64_t word = 0;
        for (int i = 0; i < 64; i += kSigns)
            word |= static_cast<uint64_t>(signs(x + i, threshold ? threshold + i : nullptr)) << i;
        return word;
    }
    // A byte per channel: 1 where x > threshold, else 0.
    static inline Bytes sign_bytes(const float *x, const float *threshold) {
        Bytes r;
        for (int i = 0; i < kBytes; i++) r.at[i] = x[i] > (threshold ? threshold[i] : 0.0f);
        return r;
    }
    static inline void widen(uint16_t *sums, const Bytes &counts) { spill<false>(sums, counts); }
};

#endif
