// From counts to the layer's output, one pass. Included once per instruction set.

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

// The activation of one vector of channels.
template <bool kTail>
static inline Simd::Floats activate(const el_epilogue &e, Simd::Floats v, int channel, int count) {
    if (e.activation == EL_ACT_CLAMP)
        return Simd::min(Simd::set(e.high), Simd::max(Simd::set(e.low), v));
    if (e.activation == EL_ACT_NONE) return v;
    if (e.act_in) v = Simd::add(v, load_lanes<kTail>(e.act_in + channel, count));
    v = Simd::prelu(v, load_lanes<kTail>(e.slope + channel, count));
    return e.act_out ? Simd::add(v, load_lanes<kTail>(e.act_out + channel, count)) : v;
}

template <bool kTail>
static inline Simd::Floats normalize(const el_epilogue &e, Simd::Floats v, int channel, int count) {
    if (!e.norm_scale) return v;
    return Simd::fma(v, load_lanes<kTail>(e.norm_scale + channel, count),
                     load_lanes<kTail>(e.norm_shift + channel, count));
}

// Where pixels are read that the link is made of.
template <bool kPooled>
struct Source {
    const float *from;
    ptrdiff_t step;         // to the next output pixel's
    ptrdiff_t right, down;  // within a window of 2x2
    template <class Load>
    Simd::Floats load(const Load &one, ptrdiff_t at) const {
        const float *p = from + at;
        if (!kPooled) return one(p);
        // In torch's order: the sum of four, rounded each time, and a quarter of it.
        const Simd::Floats row = Simd::add(one(p), one(p + right));
        const Simd::Floats sum = Simd::add(Simd::add(row, one(p + down)), one(p + down + right));
        return Simd::mul(sum, Simd::set(0.25f));
    }
    void next() { from += step; }
};

struct LoadAll {
    Simd::Floats operator()(const float *p) const { return Simd::load(p); }
};

struct LoadFirst {
    int count;
    Simd::Floats operator()(const float *p) const { return Simd::load_first(p, count); }
};

// Links: `at` gives one vector of the pixel's, from channel `at` of the run's on.
struct NoLink {
    static const bool kAny = false;
    template <bool kTail>
    Simd::Floats at(int, int) const { return Simd::set(0); }
    void next() {}
};

// As many channels as the output has.
template <bool kPooled>
struct DirectLink {
    static const bool kAny = true;
    Source<kPooled> source;
    template <bool kTail>
    Simd::Floats at(int at, int count) const {
        const LoadFirst first = {count};
        return kTail ? source.load(first, at) : source.load(LoadAll(), at);
    }
    void next() { source.next(); }
};

// Each input channel for `times` output channels, a divisor of the vector's length.
template <bool kPooled>
struct ExpandLink {
    static const bool kAny = true;
    Source<kPooled> source;
    int inputs, shift;  // input channels of a vector; log2 of `times`
    int32_t lanes[Simd::kFloats];
    template <bool kTail>
    Simd::Floats at(int at, int count) const {
        const LoadFirst first = {kTail ? ((count - 1) >> shift) + 1 : inputs};
        return Simd::pick(source.load(first, at >> shift), lanes);
    }
    void next() { source.next(); }
};

// The sum, or mean, of kTimes input channels: summed in order, as torch does.
template <bool kPooled, int kTimes>
struct SqueezeLink {
    static const bool kAny = true;
    Source<kPooled> source;
    Simd::Floats factor;
    template <bool kTail>
    Simd::Floats at(int at, int count) const {
        Simd::Floats v[kTimes], w[kTimes];
        for (int i = 0; i < kTimes; i++) {
            const ptrdiff_t from = at * kTimes + i * Simd::kFloats;
            const int left = count * kTimes - i * Simd::kFloats;
            const LoadFirst first = {left < 0 ? 0 : left};
            if (kTail && left < Simd::kFloats) v[i] = source.load(first, from);
            else v[i] = source.load(LoadAll(), from);
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
    void next() { source.next(); }
};

// One vector of channels of one pixel, `at` channels into the run's.
template <bool kTail, class Link>
static inline void finish(const el_epilogue &e, const Run &run, const Link &link, int at,
                          const uint16_t *sums, const float *residual, float *out) {
    typedef Simd::Floats Floats;
    const int channel = run.channel + at, count = run.channels - at;
    // Exact: whole numbers below 2^24.
    Floats v = Simd::fma(Simd::set(-2.0f), Simd::widen(sums + at), Simd::load(run.init + at));
    if (e.scale) v = Simd::mul(v, load_lanes<kTail>(e.scale + channel, count));
    if (e.bias) v = Simd::add(v, load_lanes<kTail>(e.bias + channel, count));
    Floats linked, gamma;
    if (Link::kAny) {
        linked = link.template at<kTail>(at, count);
        gamma = load_lanes<kTail>(e.gamma + channel, count);
        if (!e.link_after_norm) v = Simd::fma(gamma, linked, v);
    }
    v = normalize<kTail>(e, v, channel, count);
    if (Link::kAny && e.link_after_norm) v = Simd::fma(gamma, linked, v);
    if (residual && !e.residual_last) v = Simd::add(v, load_lanes<kTail>(residual + at, count));
    v = activate<kTail>(e, v, channel, count);
    if (residual && e.residual_last) v = Simd::add(v, load_lanes<kTail>(residual + at, count));
    store_lanes<kTail>(out + at, v, count);
}

// Pixel by pixel, each with all its channels: memory is read and written in long runs.
template <class Link>
static void finish_run(const Work &work, const Run &run, Link link) {
    const el_epilogue e = *work.epilogue;  // a copy: no store to the output can change it
    const ptrdiff_t outputs = work.conv->shape.out_channels, width = work.conv->padded_out;
    const ptrdiff_t from = run.pixel * outputs + run.channel;
    const float *residual = work.call->residual ? work.call->residual + from : nullptr;
    float *out = work.call->output + from;
    const uint16_t *sums = run.sums;
    for (int p = 0; p < run.count; p++, sums += width, out += outputs, link.next()) {
        int at = 0;
        for (; at + Simd::kFloats <= run.channels; at += Simd::kFloats)
            finish<false>(e, run, link, at, sums, residual, out);
        if (at < run.channels) finish<true>(e, run, link, at, sums, residual, out);
        if (residual) residual += outputs;
    }
}

// Channels brought to the output's number: out[i] for output channels from `channel` on.
static inline void expand(const float *x, int times, int channel, int count, float *out) {
    for (int i = 0; i < count; i++) out[i] = x[(channel + i) / times];
}

static inline void squeeze(const float *x, int times, float divisor, int channel, int count,
                           float *out) {
    x += static_cast<ptrdiff_t>(channel) * times;
    for (int i = 0; i < count; i++, x += times) {
        float sum = x[0];
        for (int k = 1; k < times; k++) sum += x[k];
        out[i] = sum / divisor;
    }
}

// How often a channel is repeated, or how many are summed; 0 where torch has matched them.
static inline int link_times(const Work &work) {
    const el_geometry &shape = work.conv->shape;
    if (work.epilogue->link == EL_LINK_IDENTITY) return 0;
    return work.epilogue->link == EL_LINK_EXPAND ? shape.out_channels / shape.in_channels
                                                 : shape.in_channels / shape.out_channels;
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

// Any number of channels, the run's per pixel.
static void match_channels(const Work &work, const Run &run, int times, float *match) {
    const int inputs = work.conv->shape.in_channels;
    const bool mean = work.epilogue->link == EL_LINK_MEAN;
    const float divisor = mean ? static_cast<float>(times) : 1.0f;
    for (int p = 0; p < run.count; p++, match += work.conv->padded_out) {
        const float *x = work.call->link + (run.pixel + p) * inputs;
        if (work.epilogue->link == EL_LINK_EXPAND)
            expand(x, times, run.channel, run.channels, match);
        else
            squeeze(x, times, divisor, run.channel, run.channels, match);
    }
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
    const int times = link_times(work);
    const bool grows = work.epilogue->link == EL_LINK_EXPAND;
    if (times == 0) {
        DirectLink<kPooled> link = {
            link_source<kPooled>(work, run, work.conv->shape.out_channels)};
        link.source.from += run.channel;
        finish_run(work, run, link);
    } else if (grows && Simd::kFloats % times == 0 && run.channel % times == 0) {
        finish_expanded<kPooled>(work, run, times);
    } else if (!grows && times == 2) {
        finish_squeezed<kPooled, 2>(work, run);
    } else if (!grows && times == 4) {
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
        match_channels(work, run, link_times(work), match);
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
