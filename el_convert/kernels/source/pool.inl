// Norm, activation and max pooling of float maps in one pass. Included once per instruction set.

// Norm and activation of one vector of channels of some pixels, `step` floats apart.
template <class Steps, int kPixels, bool kTail>
static inline void finish_loaded(const el_epilogue &e, const float *x, ptrdiff_t step, int channel,
                                 int count, Simd::Floats *v) {
    for (int p = 0; p < kPixels; p++) v[p] = load_lanes<kTail>(x + p * step + channel, count);
    if (Steps::normed(e)) normalize<kPixels, kTail>(e, channel, count, v);
    activate<Steps, kPixels, kTail>(e, channel, count, v);
}

// One vector of channels of windows of `columns` pixels; the first one starts at `x`.
template <class Steps, int kPixels, bool kTail>
static inline void pool_columns(const el_epilogue &e, const el_pool &pool, const float *x,
                                int64_t columns, int channel, float *out) {
    const int channels = static_cast<int>(pool.channels), count = channels - channel;
    const ptrdiff_t step = pool.stride_w * pool.channels;
    Simd::Floats best[kPixels], v[kPixels];
    finish_loaded<Steps, kPixels, kTail>(e, x, step, channel, count, best);
    for (int64_t j = 1; j < columns; j++) {
        finish_loaded<Steps, kPixels, kTail>(e, x + j * channels, step, channel, count, v);
        for (int p = 0; p < kPixels; p++) best[p] = Simd::larger(best[p], v[p]);
    }
    for (int p = 0; p < kPixels; p++)
        store_lanes<kTail>(out + p * channels + channel, best[p], count);
}

template <class Steps, int kPixels>
static inline void pool_windows(const el_epilogue &e, const el_pool &pool, const float *x,
                                int64_t columns, float *out) {
    const int channels = static_cast<int>(pool.channels);
    int c = 0;
    for (; c + Simd::kFloats <= channels; c += Simd::kFloats)
        pool_columns<Steps, kPixels, false>(e, pool, x, columns, c, out);
    if (c < channels) pool_columns<AnySteps, kPixels, true>(e, pool, x, columns, c, out);
}

// One input row, pooled along the row: out_width pixels.
template <class Steps>
static void pool_row(const el_epilogue &epilogue, const el_pool &pool, const float *row, float *out) {
    const el_epilogue e = epilogue;  // a copy: no store to the output can change it
    for (int64_t i = 0; i < pool.out_width;) {
        const int64_t first = i * pool.stride_w - pool.left;
        const int64_t last = first + (kGroup - 1) * pool.stride_w + pool.kernel_w;
        float *to = out + i * pool.channels;
        if (first >= 0 && last <= pool.width && i + kGroup <= pool.out_width) {
            pool_windows<Steps, kGroup>(e, pool, row + first * pool.channels, pool.kernel_w, to);
            i += kGroup;
            continue;
        }
        const int64_t begin = max64(first, 0), end = min64(first + pool.kernel_w, pool.width);
        pool_windows<Steps, 1>(e, pool, row + begin * pool.channels, end - begin, to);
        i++;
    }
}

// Norm and activation alone, of some pixels.
template <class Steps, int kPixels>
static inline void finish_each(const el_epilogue &e, const float *x, int channels, float *out) {
    Simd::Floats v[kPixels];
    int c = 0;
    for (; c + Simd::kFloats <= channels; c += Simd::kFloats) {
        finish_loaded<Steps, kPixels, false>(e, x, channels, c, channels - c, v);
        for (int p = 0; p < kPixels; p++) Simd::store(out + p * channels + c, v[p]);
    }
    if (c == channels) return;
    finish_loaded<AnySteps, kPixels, true>(e, x, channels, c, channels - c, v);
    for (int p = 0; p < kPixels; p++)
        store_lanes<true>(out + p * channels + c, v[p], channels - c);
}

template <class Steps>
static void finish_map(const el_epilogue &epilogue, const float *x, int64_t pixels, int channels,
                       float *out) {
    const el_epilogue e = epilogue;  // a copy: no store to the output can change it
    int64_t p = 0;
    for (; p + kGroup <= pixels; p += kGroup)
        finish_each<Steps, kGroup>(e, x + p * channels, channels, out + p * channels);
    for (; p < pixels; p++)
        finish_each<Steps, 1>(e, x + p * channels, channels, out + p * channels);
}

// The larger of two rows, number by number; one of them may be `out`.
static inline void take_larger(const float *one, const float *other, int64_t length, float *out) {
    int64_t k = 0;
    for (; k + Simd::kFloats <= length; k += Simd::kFloats)
        Simd::store(out + k, Simd::larger(Simd::load(one + k), Simd::load(other + k)));
    for (; k < length; k++)
        out[k] = other[k] > one[k] || other[k] != other[k] ? other[k] : one[k];
}

template <class Steps>
static void pool_some(const el_epilogue &e, const el_pool &pool, int64_t image, int64_t begin,
                      int64_t end, float *rows) {
    const int64_t length = pool.out_width * pool.channels;
    const float *input = pool.input + image * pool.height * pool.width * pool.channels;
    float *out = pool.output + (image * pool.out_height + begin) * length;
    const bool plain = pool.kernel_h == 1 && pool.kernel_w == 1;
    if (plain && pool.stride_h == 1 && pool.stride_w == 1)
        return finish_map<Steps>(e, input + begin * length, (end - begin) * pool.width,
                                 static_cast<int>(pool.channels), out);
    int64_t known = -1;  // rows up to this one are in `rows`
    for (int64_t i = begin; i < end; i++, out += length) {
        const int64_t first = max64(i * pool.stride_h - pool.top, 0);
        const int64_t last = min64(i * pool.stride_h - pool.top + pool.kernel_h, pool.height);
        for (int64_t y = max64(first, known + 1); y < last; y++)
            pool_row<Steps>(e, pool, input + y * pool.width * pool.channels,
                            rows + y % pool.kernel_h * length);
        known = last - 1;
        const float *best = rows + first % pool.kernel_h * length;
        if (last == first + 1) memcpy(out, best, static_cast<size_t>(length) * sizeof *out);
        for (int64_t y = first + 1; y < last; y++, best = out)
            take_larger(best, rows + y % pool.kernel_h * length, length, out);
    }
}

// Output rows of one image. `rows` holds kernel_h pooled rows, input row y at y % kernel_h.
static void pool_rows(const el_epilogue &e, const el_pool &pool, int64_t image, int64_t begin,
                      int64_t end, float *rows) {
    if (!ends_usually(e)) return pool_some<AnySteps>(e, pool, image, begin, end, rows);
    if (e.activation == EL_ACT_PRELU)
        return pool_some<UsualSteps<false, EL_ACT_PRELU>>(e, pool, image, begin, end, rows);
    pool_some<UsualSteps<false, EL_ACT_CLAMP>>(clamped(e), pool, image, begin, end, rows);
}
