// Norm, activation and max pooling of float maps in one pass. Included once per instruction set.

template <bool kTail>
static inline void pool_columns(const el_epilogue &e, const el_pool &pool, const float *row,
                                int64_t begin, int64_t end, int channel, float *out) {
    const int count = static_cast<int>(pool.channels) - channel;
    Simd::Floats best = Simd::set(0);
    for (int64_t x = begin; x < end; x++) {
        Simd::Floats v = load_lanes<kTail>(row + x * pool.channels + channel, count);
        if (e.norm_scale) normalize<1, kTail>(e, channel, count, &v);
        activate<AnySteps, 1, kTail>(e, channel, count, &v);
        best = x == begin ? v : Simd::larger(best, v);
    }
    store_lanes<kTail>(out + channel, best, count);
}

// One input row, pooled along the row: out_width pixels.
static void pool_row(const el_epilogue &e, const el_pool &pool, const float *row, float *out) {
    const int channels = static_cast<int>(pool.channels);
    for (int64_t i = 0; i < pool.out_width; i++, out += channels) {
        const int64_t first = i * pool.stride_w - pool.left;
        const int64_t begin = max64(first, 0), end = min64(first + pool.kernel_w, pool.width);
        int c = 0;
        for (; c + Simd::kFloats <= channels; c += Simd::kFloats)
            pool_columns<false>(e, pool, row, begin, end, c, out);
        if (c < channels) pool_columns<true>(e, pool, row, begin, end, c, out);
    }
}

template <int kPixels, bool kTail>
static inline void finish_columns(const el_epilogue &e, const float *x, int channel, int channels,
                                  float *out) {
    const int count = channels - channel;
    Simd::Floats v[kPixels];
    for (int p = 0; p < kPixels; p++) v[p] = load_lanes<kTail>(x + p * channels + channel, count);
    if (e.norm_scale) normalize<kPixels, kTail>(e, channel, count, v);
    activate<AnySteps, kPixels, kTail>(e, channel, count, v);
    for (int p = 0; p < kPixels; p++)
        store_lanes<kTail>(out + p * channels + channel, v[p], count);
}

// Norm and activation alone, of some pixels.
template <int kPixels>
static inline void finish_each(const el_epilogue &e, const float *x, int channels, float *out) {
    int c = 0;
    for (; c + Simd::kFloats <= channels; c += Simd::kFloats)
        finish_columns<kPixels, false>(e, x, c, channels, out);
    if (c < channels) finish_columns<kPixels, true>(e, x, c, channels, out);
}

static void finish_map(const el_epilogue &epilogue, const float *x, int64_t pixels, int channels,
                       float *out) {
    const el_epilogue e = epilogue;  // a copy: no store to the output can change it
    int64_t p = 0;
    for (; p + kGroup <= pixels; p += kGroup)
        finish_each<kGroup>(e, x + p * channels, channels, out + p * channels);
    for (; p < pixels; p++) finish_each<1>(e, x + p * channels, channels, out + p * channels);
}

// Output rows of one image. `rows` holds kernel_h pooled rows, input row y at y % kernel_h.
static void pool_rows(const el_epilogue &e, const el_pool &pool, int64_t image, int64_t begin,
                      int64_t end, float *rows) {
    const int64_t length = pool.out_width * pool.channels;
    const float *input = pool.input + image * pool.height * pool.width * pool.channels;
    float *out = pool.output + (image * pool.out_height + begin) * length;
    const bool plain = pool.kernel_h == 1 && pool.kernel_w == 1;
    if (plain && pool.stride_h == 1 && pool.stride_w == 1)
        return finish_map(e, input + begin * length, (end - begin) * pool.width,
                          static_cast<int>(pool.channels), out);
    int64_t known = -1;  // rows up to this one are in `rows`
    for (int64_t i = begin; i < end; i++, out += length) {
        const int64_t first = max64(i * pool.stride_h - pool.top, 0);
        const int64_t last = min64(i * pool.stride_h - pool.top + pool.kernel_h, pool.height);
        for (int64_t y = max64(first, known + 1); y < last; y++)
            pool_row(e, pool, input + y * pool.width * pool.channels,
                     rows + y % pool.kernel_h * length);
        known = last - 1;
        memcpy(out, rows + first % pool.kernel_h * length,
               static_cast<size_t>(length) * sizeof *out);
        for (int64_t y = first + 1; y < last; y++) {
            const float *other = rows + y % pool.kernel_h * length;
            int64_t k = 0;
            for (; k + Simd::kFloats <= length; k += Simd::kFloats)
                Simd::store(out + k, Simd::larger(Simd::load(out + k), Simd::load(other + k)));
            for (; k < length; k++)
                if (other[k] > out[k] || other[k] != other[k]) out[k] = other[k];
        }
    }
}
