// From counts to the layer's output, one pass. Included once per instruction set.

enum { kGroup = 4, kAheadFloats = 1024 };  // pixels at once; about a page

// A run of pixels of one row that see the same padding, and one group's output channels.
struct Run {
    const uint16_t *sums;  // [pixel][padded_out]
    const float *init;     // [padded_out]
    int64_t pixel;         // of the output, flattened
    int count;             // pixels, at most kRunPixels
    int channel, channels; // first output channel, how many
};

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
template <int kPixels, bool kTail>
static inline void activate(const el_epilogue &e, int channel, int count, Simd::Floats *v) {
    typedef Simd::Floats Floats;
    if (e.activation == EL_ACT_CLAMP) {
        const Floats low = Simd::set(e.low), high = Simd::set(e.high);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::min(high, Simd::max(low, v[p]));
    }
    if (e.activation == EL_ACT_SILU || e.activation == EL_ACT_HARDSWISH)
        for (int p = 0; p < kPixels; p++) v[p] = smooth(e.activation, v[p]);
    if (e.activation != EL_ACT_PRELU) return;
    if (e.act_in) {
        const Floats shift = load_lanes<kTail>(e.act_in + channel, count);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::add(v[p], shift);
    }
    const Floats slope = load_lanes<kTail>(e.slope + channel, count);
    for (int p = 0; p < kPixels; p++) v[p] = Simd::prelu(v[p], slope);
    if (e.act_out) {
        const Floats shift = load_lanes<kTail>(e.act_out + channel, count);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::add(v[p], shift);
    }
}

template <int kPixels, bool kTail>
static inline void normalize(const el_epilogue &e, int channel, int count, Simd::Floats *v) {
    if (!e.norm_scale) return;
    const Simd::Floats scale = load_lanes<kTail>(e.norm_scale + channel, count);
    const Simd::Floats shift = load_lanes<kTail>(e.norm_shift + channel, count);
    for (int p = 0; p < kPixels; p++) v[p] = Simd::fma(v[p], scale, shift);
}

// Where pixels are read that the link is made of.
template <bool kPooled>
struct Source {
    const float *from;
    ptrdiff_t step;         // to the next output pixel's
    ptrdiff_t right, down;  // within a window of 2x2
    template <class Load>
    Simd::Floats load(const Load &one, int pixel, ptrdiff_t at) const {
        const float *p = from + pixel * step + at;
        if (!kPooled) return one(p);
        // In torch's order: the sum of four, rounded each time, and a quarter of it.
        const Simd::Floats row = Simd::add(one(p), one(p + right));
        const Simd::Floats sum = Simd::add(Simd::add(row, one(p + down)), one(p + down + right));
        return Simd::mul(sum, Simd::set(0.25f));
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

// Where a run's next pixels are read and written.
struct Place {
    const uint16_t *sums;
    const float *residual;  // or null
    float *out;
    ptrdiff_t width, outputs;  // from pixel to pixel: of sums; of the others
    ptrdiff_t ahead;           // whole groups of pixels, to what is fetched into the cache
};

// Several rows at once are more than the processor follows by itself.
static inline void fetch(const Place &place, float *out) {
#if defined(__GNUC__)
    __builtin_prefetch(out + place.ahead, 1);
    if (place.residual) __builtin_prefetch(place.residual + (out - place.out) + place.ahead);
#endif
}

template <int kPixels, bool kTail>
static inline void add_residual(const Place &place, int at, int count, Simd::Floats *v) {
    for (int p = 0; p < kPixels; p++)
        v[p] = Simd::add(v[p], load_lanes<kTail>(place.residual + p * place.outputs + at, count));
}

template <int kPixels>
static inline void add_link(const Simd::Floats (&linked)[kPixels], Simd::Floats gamma,
                            Simd::Floats *v) {
    for (int p = 0; p < kPixels; p++) v[p] = Simd::fma(gamma, linked[p], v[p]);
}

// One vector of channels of some pixels, `at` channels into the run's.
template <int kPixels, bool kTail, class Link>
static inline void finish(const el_epilogue &e, const Run &run, const Link &link, int at,
                          const Place &place) {
    typedef Simd::Floats Floats;
    const int channel = run.channel + at, count = run.channels - at;
    Floats v[kPixels], linked[kPixels], gamma = Simd::set(0);
    const Floats init = Simd::load(run.init + at), minus_two = Simd::set(-2.0f);
    // Exact: whole numbers below 2^24.
    for (int p = 0; p < kPixels; p++)
        v[p] = Simd::fma(minus_two, Simd::widen(place.sums + p * place.width + at), init);
    if (e.scale) {
        const Floats scale = load_lanes<kTail>(e.scale + channel, count);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::mul(v[p], scale);
    }
    if (e.bias) {
        const Floats bias = load_lanes<kTail>(e.bias + channel, count);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::add(v[p], bias);
    }
    if (Link::kAny) {
        gamma = load_lanes<kTail>(e.gamma + channel, count);
        for (int p = 0; p < kPixels; p++) linked[p] = link.template at<kTail>(p, at, count);
        if (!e.link_after_norm) add_link<kPixels>(linked, gamma, v);
    }
    normalize<kPixels, kTail>(e, channel, count, v);
    if (Link::kAny && e.link_after_norm) add_link<kPixels>(linked, gamma, v);
    if (place.residual && !e.residual_last) add_residual<kPixels, kTail>(place, at, count, v);
    activate<kPixels, kTail>(e, channel, count, v);
    if (place.residual && e.residual_last) add_residual<kPixels, kTail>(place, at, count, v);
    for (int p = 0; p < kPixels; p++) {
        float *out = place.out + p * place.outputs + at;
        store_lanes<kTail>(out, v[p], count);
        if (kPixels > 1) fetch(place, out);
    }
}

// Some pixels, each with all its channels: memory is read and written in long runs, and what a
// channel has for all pixels is read once.
template <int kPixels, class Link>
static inline void finish_pixels(const el_epilogue &e, const Run &run, Link *link, Place *place) {
    int at = 0;
    for (; at + Simd::kFloats <= run.channels; at += Simd::kFloats)
        finish<kPixels, false>(e, run, *link, at, *place);
    if (at < run.channels) finish<kPixels, true>(e, run, *link, at, *place);
    link->skip(kPixels);
    place->sums += kPixels * place->width;
    place->out += kPixels * place->outputs;
    if (place->residual) place->residual += kPixels * place->outputs;
}

template <class Link>
static void finish_run(const Work &work, const Run &run, Link link) {
    const el_epilogue e = *work.epilogue;  // a copy: no store to the output can change it
    const ptrdiff_t outputs = work.conv->shape.out_channels;
    const ptrdiff_t from = run.pixel * outputs + run.channel;
    Place place = {run.sums, work.call->residual ? work.call->residual + from : nullptr,
                   work.call->output + from, work.conv->padded_out, outputs,
                   whole(kAheadFloats, kGroup * outputs)};
    int p = 0;
    for (; p + kGroup <= run.count; p += kGroup) finish_pixels<kGroup>(e, run, &link, &place);
    for (; p < run.count; p++) finish_pixels<1>(e, run, &link, &place);
}

// How often a channel is repeated, or how many are summed; 0 where that is no whole number.
static inline int link_times(const Work &work) {
    const el_geometry &shape = work.conv->shape;
    const bool grows = work.epilogue->link == EL_LINK_EXPAND;
    const int few = grows ? shape.in_channels : shape.out_channels;
    const int many = grows ? shape.out_channels : shape.in_channels;
    return many % few ? 0 : many / few;
}

template <bool kPooled>
static Source<kPooled> link_source(const Work &work, const Run &run, int channels) {
    const el_call &call = *work.call;
    if (!kPooled) {
        const Source<kPooled> source = {call.link + run.pixel * channels, channels, 0, 0};
        return source;
    }
    const int64_t row = run.pixel / call.out_width, x = run.pixel % call.out_width;
    const int64_t width = 2 * call.out_width;
    const Source<kPooled> source = {call.link + (2 * row * width + 2 * x) * channels, 2 * channels,
                                    channels, width * channels};
    return source;
}

template <bool kPooled>
static void finish_expanded(const Work &work, const Run &run, int times) {
    ExpandLink<kPooled> link = {
        link_source<kPooled>(work, run, work.conv->shape.in_channels), Simd::kFloats / times, 0, {}};
    link.source.from += run.channel / times;
    while (1 << link.shift < times) link.shift++;
    for (int i = 0; i < Simd::kFloats; i++) link.lanes[i] = i / times;
    finish_run(work, run, link);
}

template <bool kPooled>
static void finish_spread(const Work &work, const Run &run) {
    const Convolution &conv = *work.conv;
    const int group = run.channel / conv.group_out;
    const SpreadLink<kPooled> link = {link_source<kPooled>(work, run, conv.shape.in_channels),
                                      conv.bin_begin + run.channel,
                                      conv.lanes + group * conv.padded_out};
    finish_run(work, run, link);
}

template <bool kPooled, int kTimes>
static void finish_squeezed(const Work &work, const Run &run) {
    const bool mean = work.epilogue->link == EL_LINK_MEAN;
    SqueezeLink<kPooled, kTimes> link = {
        link_source<kPooled>(work, run, work.conv->shape.in_channels),
        Simd::set(mean ? 1.0f / kTimes : 1.0f)};
    link.source.from += static_cast<ptrdiff_t>(run.channel) * kTimes;
    finish_run(work, run, link);
}

// False where channels cannot be matched within vectors.
template <bool kPooled>
static bool finish_in_vectors(const Work &work, const Run &run) {
    if (work.epilogue->link == EL_LINK_IDENTITY) {
        DirectLink<kPooled> link = {
            link_source<kPooled>(work, run, work.conv->shape.out_channels)};
        link.source.from += run.channel;
        finish_run(work, run, link);
        return true;
    }
    const int times = link_times(work);
    if (work.epilogue->link == EL_LINK_EXPAND) {
        const bool even = times && Simd::kFloats % times == 0 && run.channel % times == 0;
        if (even) finish_expanded<kPooled>(work, run, times);
        else finish_spread<kPooled>(work, run);
    } else if (times == 2) {
        finish_squeezed<kPooled, 2>(work, run);
    } else if (times == 4) {
        finish_squeezed<kPooled, 4>(work, run);
    } else {
        return false;
    }
    return true;
}

static void finish_linked(const Work &work, const Run &run, float *match) {
    // Callers pool only what is matched within vectors.
    if (work.epilogue->link_pooled) {
        finish_in_vectors<true>(work, run);
    } else if (!finish_in_vectors<false>(work, run)) {
        const bool mean = work.epilogue->link == EL_LINK_MEAN;
        squeeze_channels(*work.conv, mean, run.channel, run.channels,
                         work.call->link + run.pixel * work.conv->shape.in_channels, run.count,
                         match);
        const DirectLink<false> link = {{match, work.conv->padded_out, 0, 0}};
        finish_run(work, run, link);
    }
}

static void epilogue(const Work &work, Run run, int count, float *match) {
    const int64_t width = work.call->out_width;
    for (int done = 0; done < count; done += run.count) {
        run.count = count - done < kRunPixels ? count - done : kRunPixels;
        // Windows of 2x2 follow each other within a row only.
        if (work.epilogue->link_pooled)
            run.count = static_cast<int>(min64(run.count, width - run.pixel % width));
        if (work.epilogue->link == EL_LINK_NONE) finish_run(work, run, NoLink());
        else finish_linked(work, run, match);
        run.sums += static_cast<ptrdiff_t>(run.count) * work.conv->padded_out;
        run.pixel += run.count;
    }
}
