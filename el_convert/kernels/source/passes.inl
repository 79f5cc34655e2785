// The passes over memory of a training step, each fused. Included once per instruction set: plain
// loops, which compilers vectorize for the target. Sums have kLanes partial sums, whatever the
// vectors' width, so that all instruction sets give the same.

enum { kLanes = 16, kRound = 1024 };  // kRound: as many floats are summed before doubles take over

static inline float sign_of(float x) { return x > 0.0f ? 1.0f : -1.0f; }

// What stands in for the derivative of the sign; see `sign_surrogate` in functional.py.
template <bool kClip>
static inline float surrogate(float x) {
    const float size = __builtin_fabsf(x);
    if (kClip) return size <= 1.0f ? 1.0f : 0.0f;
    const float slope = 2.0f - 2.0f * size;
    return slope < 0.0f ? 0.0f : slope;
}

struct Magnitude {
    static inline float of(float x, float) { return __builtin_fabsf(x); }
};
struct TimesSign {
    static inline float of(float x, float g) { return x > 0.0f ? g : -g; }
};
struct Product {
    static inline float of(float x, float g) { return x * g; }
};
struct TimesNegative {
    static inline float of(float x, float g) { return (x > 0.0f ? 0.0f : x) * g; }
};

// The sum of Term over `count` pairs.
template <typename Term>
static inline double sum_of(const float *x, const float *g, int64_t count) {
    double total = 0;
    for (int64_t from = 0; from < count; from += kRound) {
        const int64_t end = min64(from + kRound, count);
        float lanes[kLanes] = {};
        int64_t i = from;
        for (; i + kLanes <= end; i += kLanes)
            for (int k = 0; k < kLanes; k++) lanes[k] += Term::of(x[i + k], g[i + k]);
        for (int k = 0; i < end; i++, k++) lanes[k] += Term::of(x[i], g[i]);
        for (int k = 0; k < kLanes; k++) total += lanes[k];
    }
    return total;
}

static void pass_sign(const el_pass &pass, int64_t begin, int64_t end) {
    const float *x = pass.x;
    float *__restrict out = pass.out;
    for (int64_t i = begin; i < end; i++) out[i] = sign_of(x[i]);
}

template <bool kClip>
static void pass_sign_grad(const el_pass &pass, int64_t begin, int64_t end) {
    const float *x = pass.x, *g = pass.g;
    float *__restrict out = pass.out;
    const float *other = pass.vector;
    if (other)
        for (int64_t i = begin; i < end; i++) out[i] = surrogate<kClip>(x[i]) * g[i] + other[i];
    else
        for (int64_t i = begin; i < end; i++) out[i] = surrogate<kClip>(x[i]) * g[i];
}

static void pass_scaled_sign(const el_pass &pass, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float *x = pass.x + row * pass.inner;
        float *__restrict out = pass.out + row * pass.inner;
        if (!pass.vector) {
            const double sum = sum_of<Magnitude>(x, x, pass.inner);
            pass.sums[row] = static_cast<float>(sum / static_cast<double>(pass.inner));
        }
        const float scale = pass.vector ? pass.vector[row] : pass.sums[row];
        for (int64_t i = 0; i < pass.inner; i++) out[i] = x[i] > 0.0f ? scale : -scale;
    }
}

template <bool kClip>
static void pass_scaled_sign_grad(const el_pass &pass, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float *x = pass.x + row * pass.inner, *g = pass.g + row * pass.inner;
        float *__restrict out = pass.out + row * pass.inner;
        const float scale = pass.vector[row];
        double sum = 0;
        if (pass.sums && scale != 0.0f) sum = sum_of<TimesSign>(x, g, pass.inner);
        if (pass.sums) pass.sums[row] = static_cast<float>(sum);
        float share = 0;
        if (pass.through_mean) share = static_cast<float>(sum / static_cast<double>(pass.inner));
        for (int64_t i = 0; i < pass.inner; i++)
            out[i] = surrogate<kClip>(x[i]) * scale * g[i] + (x[i] > 0.0f ? share : -share);
    }
}

// Of maps (outer, channels, inner); `sums` is (blocks, channels).
static void pass_prelu_grad(const el_pass &pass, int64_t begin, int64_t end) {
    const int64_t channels = pass.channels, inner = pass.inner;
    const float *slope = pass.vector;
    float *__restrict sums = pass.sums + begin / pass.block * channels;
    for (int64_t c = 0; c < channels; c++) sums[c] = 0;
    for (int64_t row = begin; row < end; row++) {
        const float *x = pass.x + row * channels * inner, *g = pass.g + row * channels * inner;
        float *__restrict out = pass.out + row * channels * inner;
        if (inner == 1) {
            for (int64_t c = 0; c < channels; c++) {
                out[c] = x[c] > 0.0f ? g[c] : slope[c] * g[c];
                sums[c] += TimesNegative::of(x[c], g[c]);
            }
            continue;
        }
        for (int64_t c = 0; c < channels; c++, x += inner, g += inner, out += inner) {
            const float a = slope[c];
            for (int64_t i = 0; i < inner; i++) out[i] = x[i] > 0.0f ? g[i] : a * g[i];
            if (inner < kLanes)
                for (int64_t i = 0; i < inner; i++) sums[c] += TimesNegative::of(x[i], g[i]);
            else
                sums[c] += static_cast<float>(sum_of<TimesNegative>(x, g, inner));
        }
    }
}

#include "gate.inl"

static void pass_rows(const el_pass &pass, int64_t begin, int64_t end) {
    switch (pass.kind) {
        case EL_PASS_SIGN: return pass_sign(pass, begin, end);
        case EL_PASS_SIGN_GRAD:
            return pass.clip ? pass_sign_grad<true>(pass, begin, end)
                             : pass_sign_grad<false>(pass, begin, end);
        case EL_PASS_SCALED_SIGN: return pass_scaled_sign(pass, begin, end);
        case EL_PASS_SCALED_SIGN_GRAD:
            return pass.clip ? pass_scaled_sign_grad<true>(pass, begin, end)
                             : pass_scaled_sign_grad<false>(pass, begin, end);
        case EL_PASS_PRELU_GRAD: return pass_prelu_grad(pass, begin, end);
        case EL_PASS_EXPAND: return gate_rows<Expand>(pass, begin, end);
        case EL_PASS_EXPAND_GRAD: return gate_rows<ExpandGrad>(pass, begin, end);
        case EL_PASS_SQUEEZE: return gate_rows<Squeeze>(pass, begin, end);
        case EL_PASS_SQUEEZE_GRAD: return gate_rows<SqueezeGrad>(pass, begin, end);
    }
}
