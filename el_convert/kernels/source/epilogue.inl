// From counts to the layer's output, one pass. Included once per instruction set.

// A run of pixels of one row that see the same padding, and a block of output channels.
struct Run {
    const uint16_t *sums;  // [pixel][block]
    const float *init;     // [block]
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

// Where a pixel's link comes from: `at` gives one vector, from channel `at` of the block on.
struct NoLink {
    static const bool kAny = false;
    template <bool kTail>
    Simd::Floats at(int, int) const { return Simd::set(0); }
    void next() {}
};

// As many channels as the output has.
struct DirectLink {
    static const bool kAny = true;
    const float *from;
    ptrdiff_t step;
    template <bool kTail>
    Simd::Floats at(int at, int count) const { return load_lanes<kTail>(from + at, count); }
    void next() { from += step; }
};

// Each input channel for `times` output channels, a divisor of the vector's length.
struct ExpandLink {
    static const bool kAny = true;
    const float *from;
    ptrdiff_t step;
    int inputs, shift;  // input channels of a vector; log2 of `times`
    int32_t lanes[Simd::kFloats];
    template <bool kTail>
    Simd::Floats at(int at, int count) const {
        const int some = kTail ? ((count - 1) >> shift) + 1 : inputs;
        return Simd::pick(Simd::load_first(from + (at >> shift), some), lanes);
    }
    void next() { from += step; }
};

// The sum, or mean, of kTimes input channels: summed in order, as torch does.
template <int kTimes>
struct SqueezeLink {
    static const bool kAny = true;
    const float *from;
    ptrdiff_t step;
    Simd::Floats factor;
    template <bool kTail>
    Simd::Floats at(int at, int count) const {
        Simd::Floats v[kTimes], w[kTimes];
        const float *x = from + at * kTimes;
        for (int i = 0; i < kTimes; i++) {
            const int left = count * kTimes - i * Simd::kFloats;
            v[i] = kTail ? some(x + i * Simd::kFloats, left) : Simd::load(x + i * Simd::kFloats);
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
    static Simd::Floats some(const float *x, int left) {
        if (left <= 0) return Simd::set(0);
        return left < Simd::kFloats ? Simd::load_first(x, left) : Simd::load(x);
    }
    void next() { from += step; }
};

// One vector of channels of one pixel, `at` channels into the run's block.
template <bool kTail, class Link>
static inline void finish(const Work &work, const Run &run, const Link &link, int at,
                          const uint16_t *sums, const float *residual, float *out) {
    typedef Simd::Floats Floats;
    const el_epilogue &e = *work.epilogue;
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
    if (e.norm_scale)
        v = Simd::fma(v, load_lanes<kTail>(e.norm_scale + channel, count),
                      load_lanes<kTail>(e.norm_shift + channel, count));
    if (Link::kAny && e.link_after_norm) v = Simd::fma(gamma, linked, v);
    if (residual && !e.residual_last) v = Simd::add(v, load_lanes<kTail>(residual + at, count));
    if (e.activation == EL_ACT_CLAMP) {
        v = Simd::min(Simd::set(e.high), Simd::max(Simd::set(e.low), v));
    } else if (e.activation == EL_ACT_PRELU) {
        if (e.act_in) v = Simd::add(v, load_lanes<kTail>(e.act_in + channel, count));
        v = Simd::prelu(v, load_lanes<kTail>(e.slope + channel, count));
        if (e.act_out) v = Simd::add(v, load_lanes<kTail>(e.act_out + channel, count));
    }
    if (residual && e.residual_last) v = Simd::add(v, load_lanes<kTail>(residual + at, count));
    store_lanes<kTail>(out + at, v, count);
}

// Pixel by pixel, each with all its channels: memory is read and written in long runs.
template <class Link>
static void finish_run(const Work &work, const Run &run, Link link) {
    const ptrdiff_t outputs = work.conv->shape.out_channels;
    const ptrdiff_t from = run.pixel * outputs + run.channel;
    const float *residual = work.call->residual ? work.call->residual + from : nullptr;
    float *out = work.call->output + from;
    const uint16_t *sums = run.sums;
    for (int p = 0; p < run.count; p++, sums += work.conv->block, out += outputs, link.next()) {
        int at = 0;
        for (; at + Simd::kFloats <= run.channels; at += Simd::kFloats)
            finish<false>(work, run, link, at, sums, residual, out);
        if (at < run.channels) finish<true>(work, run, link, at, sums, residual, out);
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

// Any number of channels, the run's block of them per pixel.
static void match_channels(const Work &work, const Run &run, int times, float *match) {
    const int inputs = work.conv->shape.in_channels;
    const bool mean = work.epilogue->link == EL_LINK_MEAN;
    const float divisor = mean ? static_cast<float>(times) : 1.0f;
    for (int p = 0; p < run.count; p++, match += work.conv->block) {
        const float *x = work.call->link + (run.pixel + p) * inputs;
        if (work.epilogue->link == EL_LINK_EXPAND)
            expand(x, times, run.channel, run.channels, match);
        else
            squeeze(x, times, divisor, run.channel, run.channels, match);
    }
}

static void finish_expanded(const Work &work, const Run &run, const float *from, int times) {
    const ptrdiff_t inputs = work.conv->shape.in_channels;
    ExpandLink link = {from + run.channel / times, inputs, Simd::kFloats / times, 0, {}};
    while (1 << link.shift < times) link.shift++;
    for (int i = 0; i < Simd::kFloats; i++) link.lanes[i] = i / times;
    finish_run(work, run, link);
}

template <int kTimes>
static void finish_squeezed(const Work &work, const Run &run, const float *from) {
    const bool mean = work.epilogue->link == EL_LINK_MEAN;
    const Simd::Floats factor = Simd::set(mean ? 1.0f / kTimes : 1.0f);
    const SqueezeLink<kTimes> link = {from + static_cast<ptrdiff_t>(run.channel) * kTimes,
                                      work.conv->shape.in_channels, factor};
    finish_run(work, run, link);
}

static void finish_linked(const Work &work, const Run &run, float *match) {
    const int times = link_times(work);
    const bool grows = work.epilogue->link == EL_LINK_EXPAND;
    if (times == 0) {
        const ptrdiff_t step = work.conv->shape.out_channels;
        const DirectLink link = {work.call->link + run.pixel * step + run.channel, step};
        return finish_run(work, run, link);
    }
    const float *from = work.call->link + run.pixel * work.conv->shape.in_channels;
    if (grows && Simd::kFloats % times == 0 && run.channel % times == 0)
        return finish_expanded(work, run, from, times);
    if (!grows && times == 2) return finish_squeezed<2>(work, run, from);
    if (!grows && times == 4) return finish_squeezed<4>(work, run, from);
    match_channels(work, run, times, match);
    const DirectLink link = {match, work.conv->block};
    finish_run(work, run, link);
}

static void epilogue(const Work &work, Run run, int count, float *match) {
    for (int done = 0; done < count; done += run.count) {
        run.count = count - done < kRunPixels ? count - done : kRunPixels;
        if (work.epilogue->link == EL_LINK_NONE) finish_run(work, run, NoLink());
        else finish_linked(work, run, match);
        run.sums += static_cast<ptrdiff_t>(run.count) * work.conv->block;
        run.pixel += run.count;
    }
}
