// Norms and activations of vectors of channels. Included once per instruction set.

template <bool kTail>
static inline Simd::Floats load_lanes(const float *p, int count) {
    return kTail ? Simd::load_first(p, count) : Simd::load(p);
}

template <bool kTail>
static inline void store_lanes(float *p, Simd::Floats v, int count) {
    if (!kTail) return Simd::store(p, v);
    float padded[Simd::kFloats];
    Simd::store(padded, v);
    memcpy(p, padded, static_cast<size_t>(count) * sizeof *p);
}

// To about a unit in the last place: 2^n e^r, with |r| at most half of log 2, and Cephes' polynomial.
static inline Simd::Floats exponential(Simd::Floats x) {
    typedef Simd::Floats Floats;
    static const float kTerms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    // At 89 the power of two, 2^128, is infinity.
    x = Simd::min(Simd::set(89.0f), Simd::max(Simd::set(-87.0f), x));
    const Floats n = Simd::nearest(Simd::mul(x, Simd::set(1.44269504f)));
    Floats r = Simd::fma(n, Simd::set(-0.693359375f), x);
    r = Simd::fma(n, Simd::set(2.12194440e-4f), r);
    Floats sum = Simd::set(kTerms[0]);
    for (int i = 1; i < 6; i++) sum = Simd::fma(sum, r, Simd::set(kTerms[i]));
    sum = Simd::add(Simd::fma(Simd::mul(sum, r), r, r), Simd::set(1.0f));
    return Simd::mul(sum, Simd::power_of_two(n));
}

static inline Simd::Floats silu(Simd::Floats v) {
    const Simd::Floats one = Simd::set(1.0f);
    return Simd::div(v, Simd::add(one, exponential(Simd::mul(v, Simd::set(-1.0f)))));
}

static inline Simd::Floats hardswish(Simd::Floats v) {
    const Simd::Floats six = Simd::set(6.0f), shifted = Simd::add(v, Simd::set(3.0f));
    const Simd::Floats gate = Simd::min(six, Simd::max(Simd::set(0.0f), shifted));
    return Simd::div(Simd::mul(v, gate), six);
}

// Not inlined: the registers that it takes are the others' too.
#if defined(__GNUC__)
__attribute__((noinline))
#endif
static Simd::Floats smooth(int activation, Simd::Floats v) {
    return activation == EL_ACT_SILU ? silu(v) : hardswish(v);
}

// The activation of one vector of channels of some pixels.
template <class Steps, int kPixels, bool kTail>
static inline void activate(const el_epilogue &e, int channel, int count, Simd::Floats *v) {
    typedef Simd::Floats Floats;
    const int activation = Steps::activation(e);
    if (activation == EL_ACT_CLAMP) {
        const Floats low = Simd::set(e.low), high = Simd::set(e.high);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::min(high, Simd::max(low, v[p]));
    }
    if (activation == EL_ACT_SILU || activation == EL_ACT_HARDSWISH)
        for (int p = 0; p < kPixels; p++) v[p] = smooth(activation, v[p]);
    if (activation != EL_ACT_PRELU) return;
    if (Steps::shifts(e.act_in)) {
        const Floats shift = load_lanes<kTail>(e.act_in + channel, count);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::add(v[p], shift);
    }
    const Floats slope = load_lanes<kTail>(e.slope + channel, count);
    for (int p = 0; p < kPixels; p++) v[p] = Simd::prelu(v[p], slope);
    if (Steps::shifts(e.act_out)) {
        const Floats shift = load_lanes<kTail>(e.act_out + channel, count);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::add(v[p], shift);
    }
}

template <int kPixels, bool kTail>
static inline void normalize(const el_epilogue &e, int channel, int count, Simd::Floats *v) {
    const Simd::Floats scale = load_lanes<kTail>(e.norm_scale + channel, count);
    const Simd::Floats shift = load_lanes<kTail>(e.norm_shift + channel, count);
    for (int p = 0; p < kPixels; p++) v[p] = Simd::fma(v[p], scale, shift);
}
