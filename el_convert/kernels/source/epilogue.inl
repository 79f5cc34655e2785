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

// Where a run's next pixels are read and written.
struct Place {
    const uint16_t *sums;
    const float *residual;  // or null
    float *out;
    ptrdiff_t width, outputs;  // from pixel to pixel: of sums; of the others
    ptrdiff_t ahead;           // whole groups of pixels, to what is fetched into the cache
};

// Several rows at once are more than the processor follows by itself.
static inline void fetch(const float *residual, const float *out, ptrdiff_t ahead) {
#if defined(__GNUC__)
    __builtin_prefetch(out + ahead, 1);
    if (residual) __builtin_prefetch(residual + ahead);
#endif
}

template <int kPixels>
static inline void add_link(const Simd::Floats (&linked)[kPixels], Simd::Floats gamma,
                            Simd::Floats *v) {
    for (int p = 0; p < kPixels; p++) v[p] = Simd::fma(gamma, linked[p], v[p]);
}

// One vector of channels of some pixels, `at` channels into the run's.
template <class Steps, int kPixels, bool kTail, class Link>
static inline void finish(const el_epilogue &e, const Run &run, const Link &link, int at,
                          const Place &place) {
    typedef Simd::Floats Floats;
    const int channel = run.channel + at, count = run.channels - at;
    Floats v[kPixels], linked[kPixels], gamma = Simd::set(0);
    const Floats init = Simd::load(run.init + at), minus_two = Simd::set(-2.0f);
    // Exact: whole numbers below 2^24.
    for (int p = 0; p < kPixels; p++)
        v[p] = Simd::fma(minus_two, Simd::widen(place.sums + p * place.width + at), init);
    if (Steps::scales(e)) {
        const Floats scale = load_lanes<kTail>(e.scale + channel, count);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::mul(v[p], scale);
    }
    if (Steps::biased(e)) {
        const Floats bias = load_lanes<kTail>(e.bias + channel, count);
        for (int p = 0; p < kPixels; p++) v[p] = Simd::add(v[p], bias);
    }
    if (Link::kAny) {
        gamma = load_lanes<kTail>(e.gamma + channel, count);
        for (int p = 0; p < kPixels; p++) linked[p] = link.template at<kTail>(p, at, count);
        if (!Steps::link_last(e)) add_link<kPixels>(linked, gamma, v);
    }
    if (Steps::normed(e)) normalize<kPixels, kTail>(e, channel, count, v);
    if (Link::kAny && Steps::link_last(e)) add_link<kPixels>(linked, gamma, v);
    const bool residual = Steps::residual(place.residual), last = Steps::residual_last(e);
    for (int p = 0; p < kPixels && residual && !last; p++)
        v[p] = Simd::add(v[p], load_lanes<kTail>(place.residual + p * place.outputs + at, count));
    activate<Steps, kPixels, kTail>(e, channel, count, v);
    for (int p = 0; p < kPixels && residual && last; p++)
        v[p] = Simd::add(v[p], load_lanes<kTail>(place.residual + p * place.outputs + at, count));
    for (int p = 0; p < kPixels; p++) {
        const ptrdiff_t to = p * place.outputs + at;
        store_lanes<kTail>(place.out + to, v[p], count);
        if (kPixels > 1) fetch(residual ? place.residual + to : nullptr, place.out + to, place.ahead);
    }
}

// Some pixels, each with all its channels: memory is read and written in long runs, and what a
// channel has for all pixels is read once.
template <class Steps, int kPixels, class Link>
static inline void finish_pixels(const el_epilogue &e, const Run &run, Link *link, Place *place) {
    int at = 0;
    for (; at + Simd::kFloats <= run.channels; at += Simd::kFloats)
        finish<Steps, kPixels, false>(e, run, *link, at, *place);
    if (at < run.channels) finish<AnySteps, kPixels, true>(e, run, *link, at, *place);
    link->skip(kPixels);
    place->sums += kPixels * place->width;
    place->out += kPixels * place->outputs;
    if (place->residual) place->residual += kPixels * place->outputs;
}

template <class Steps, class Link>
static void finish_steps(const el_epilogue &epilogue, const Run &run, Link link, Place place) {
    const el_epilogue e = epilogue;  // a copy: no store to the output can change it
    int p = 0;
    for (; p + kGroup <= run.count; p += kGroup) finish_pixels<Steps, kGroup>(e, run, &link, &place);
    for (; p < run.count; p++) finish_pixels<Steps, 1>(e, run, &link, &place);
}

template <class Link>
static void finish_run(const Work &work, const Run &run, const Link &link) {
    const el_epilogue &e = *work.epilogue;
    const ptrdiff_t outputs = work.conv->shape.out_channels;
    const ptrdiff_t from = run.pixel * outputs + run.channel;
    const float *residual = work.call->residual;
    const Place place = {run.sums, residual ? residual + from : nullptr, work.call->output + from,
                         work.conv->padded_out, outputs, whole(kAheadFloats, kGroup * outputs)};
    if (!is_usual(e, residual)) return finish_steps<AnySteps>(e, run, link, place);
    if (e.activation == EL_ACT_PRELU)
        return residual ? finish_steps<UsualSteps<true, EL_ACT_PRELU>>(e, run, link, place)
                        : finish_steps<UsualSteps<false, EL_ACT_PRELU>>(e, run, link, place);
    return residual ? finish_steps<UsualSteps<true, EL_ACT_CLAMP>>(clamped(e), run, link, place)
                    : finish_steps<UsualSteps<false, EL_ACT_CLAMP>>(clamped(e), run, link, place);
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
        const Source<kPooled> source = {call.link + run.pixel * channels, channels, 0, 0, false};
        return source;
    }
    const int64_t row = run.pixel / call.out_width, x = run.pixel % call.out_width;
    const int64_t width = 2 * call.out_width;
    const Source<kPooled> source = {call.link + (2 * row * width + 2 * x) * channels, 2 * channels,
                                    channels, width * channels,
                                    work.epilogue->link_pooled == EL_LINK_MAX};
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
        const DirectLink<false> link = {{match, work.conv->padded_out, 0, 0, false}};
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
