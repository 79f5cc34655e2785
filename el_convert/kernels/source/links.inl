// What a gate adds, channels matched and windows averaged within vectors. Included once per
// instruction set.

// Where pixels are read that the link is made of.
template <bool kPooled>
struct Source {
    const float *from;
    ptrdiff_t step;         // to the next output pixel's
    ptrdiff_t right, down;  // within a window of 2x2
    bool largest;           // of a window, instead of the mean
    template <class Load>
    Simd::Floats load(const Load &one, int pixel, ptrdiff_t at) const {
        const float *p = from + pixel * step + at;
        if (!kPooled) return one(p);
        const Simd::Floats a = one(p), b = one(p + right), c = one(p + down);
        const Simd::Floats d = one(p + down + right);
        if (largest) return Simd::larger(Simd::larger(a, b), Simd::larger(c, d));
        // In torch's order: the sum of four, rounded each time, and a quarter of it.
        return Simd::mul(Simd::add(Simd::add(Simd::add(a, b), c), d), Simd::set(0.25f));
    }
    void skip(int pixels) { from += pixels * step; }
};

struct LoadAll {
    Simd::Floats operator()(const float *p) const { return Simd::load(p); }
};

struct LoadFirst {
    int count;
    Simd::Floats operator()(const float *p) const { return Simd::load_first(p, count); }
};

// Links: `at` gives one vector of the `pixel`-th from here, from channel `at` of the run's on.
struct NoLink {
    static const bool kAny = false;
    template <bool kTail>
    Simd::Floats at(int, int, int) const { return Simd::set(0); }
    void skip(int) {}
};

// As many channels as the output has.
template <bool kPooled>
struct DirectLink {
    static const bool kAny = true;
    Source<kPooled> source;
    template <bool kTail>
    Simd::Floats at(int pixel, int at, int count) const {
        const LoadFirst first = {count};
        return kTail ? source.load(first, pixel, at) : source.load(LoadAll(), pixel, at);
    }
    void skip(int pixels) { source.skip(pixels); }
};

// Each input channel for `times` output channels, a divisor of the vector's length.
template <bool kPooled>
struct ExpandLink {
    static const bool kAny = true;
    Source<kPooled> source;
    int inputs, shift;  // input channels of a vector; log2 of `times`
    int32_t lanes[Simd::kFloats];
    template <bool kTail>
    Simd::Floats at(int pixel, int at, int count) const {
        const LoadFirst first = {kTail ? ((count - 1) >> shift) + 1 : inputs};
        return Simd::pick(source.load(first, pixel, at >> shift), lanes);
    }
    void skip(int pixels) { source.skip(pixels); }
};

// Any number of output channels for the input's, as many or more.
template <bool kPooled>
struct SpreadLink {
    static const bool kAny = true;
    Source<kPooled> source;
    const int32_t *begin, *lanes;
    template <bool kTail>
    Simd::Floats at(int pixel, int at, int count) const {
        const int last = kTail ? count - 1 : static_cast<int>(Simd::kFloats) - 1;
        const LoadFirst first = {begin[at + last] - begin[at] + 1};
        const Simd::Floats v = first.count == Simd::kFloats
                                   ? source.load(LoadAll(), pixel, begin[at])
                                   : source.load(first, pixel, begin[at]);
        return Simd::pick(v, lanes + at);
    }
    void skip(int pixels) { source.skip(pixels); }
};

// The sum, or mean, of kTimes input channels: summed in order, as torch does.
template <bool kPooled, int kTimes>
struct SqueezeLink {
    static const bool kAny = true;
    Source<kPooled> source;
    Simd::Floats factor;
    template <bool kTail>
    Simd::Floats at(int pixel, int at, int count) const {
        Simd::Floats v[kTimes], w[kTimes];
        for (int i = 0; i < kTimes; i++) {
            const ptrdiff_t from = at * kTimes + i * Simd::kFloats;
            const int left = count * kTimes - i * Simd::kFloats;
            const LoadFirst first = {left < 0 ? 0 : left};
            if (kTail && left < Simd::kFloats) v[i] = source.load(first, pixel, from);
            else v[i] = source.load(LoadAll(), pixel, from);
        }
        // Split evens from odds until vector i holds every kTimes-th channel from i on.
        for (int apart = 1; apart < kTimes; apart *= 2) {
            for (int i = 0; i < kTimes; i += 2)
                Simd::split(v[i], v[i + 1], &w[i / 2], &w[(i + kTimes) / 2]);
            for (int i = 0; i < kTimes; i++) v[i] = w[i];
        }
        Simd::Floats sum = v[0];
        for (int i = 1; i < kTimes; i++) sum = Simd::add(sum, v[i]);
        return Simd::mul(sum, factor);
    }
    void skip(int pixels) { source.skip(pixels); }
};
