// Sums of neighbouring channels, for gates whose input has more channels. Included once per
// instruction set.

// One pixel, all in order.
static inline void squeeze_pixel(const int32_t *begin, const int32_t *end, int channels, bool mean,
                                 const float *x, float *out) {
    for (int i = 0; i < channels; i++) {
        float sum = x[begin[i]];
        for (int k = begin[i] + 1; k < end[i]; k++) sum += x[k];
        out[i] = mean ? sum * (1.0f / static_cast<float>(end[i] - begin[i])) : sum;
    }
}

template <class Simd, bool kTransposes>
struct Squeezer {
    static void pixels(const int32_t *, const int32_t *, int, bool, const float *, ptrdiff_t, float *,
                       ptrdiff_t) {}
};

// As many pixels as a vector has lanes, a pixel in each: the same sums, but for all at once.
template <class Simd>
struct Squeezer<Simd, true> {
    typedef typename Simd::Floats Floats;
    enum { kLanes = Simd::kFloats, kWindow = 17 * kLanes };  // channels turned around at a time

    // `x` and `out` of the first pixel, and the steps to the next one's.
    static void pixels(const int32_t *begin, const int32_t *end, int channels, bool mean,
                       const float *x, ptrdiff_t inputs, float *out, ptrdiff_t outputs) {
        alignas(64) float turned[kWindow][kLanes];
        for (int at = 0; at < channels; at += kLanes) {
            const int count = channels - at < kLanes ? channels - at : static_cast<int>(kLanes);
            const int first = begin[at], span = end[at + count - 1] - first;
            if (span > kWindow) {
                for (int p = 0; p < kLanes; p++)
                    squeeze_pixel(begin + at, end + at, count, mean, x + p * inputs,
                                  out + p * outputs + at);
                continue;
            }
            for (int c = 0; c < span; c += kLanes)
                turn(x + first + c, inputs, span - c, turned[c]);
            Floats sums[kLanes];
            for (int i = 0; i < kLanes; i++) sums[i] = Simd::set(0);
            for (int i = 0; i < count; i++)
                sums[i] = sum(turned + begin[at + i] - first, end[at + i] - begin[at + i], mean);
            Simd::transpose(sums);
            for (int p = 0; p < kLanes; p++) Simd::store(out + p * outputs + at, sums[p]);
        }
    }

  private:
    static inline void turn(const float *x, ptrdiff_t inputs, int left, float *turned) {
        Floats v[kLanes];
        for (int p = 0; p < kLanes; p++)
            v[p] = left < kLanes ? Simd::load_first(x + p * inputs, left)
                                 : Simd::load(x + p * inputs);
        Simd::transpose(v);
        for (int c = 0; c < kLanes; c++) Simd::store(turned + c * kLanes, v[c]);
    }

    static inline Floats sum(const float (*turned)[kLanes], int count, bool mean) {
        Floats total = Simd::load(turned[0]);
        for (int k = 1; k < count; k++) total = Simd::add(total, Simd::load(turned[k]));
        return mean ? Simd::mul(total, Simd::set(1.0f / static_cast<float>(count))) : total;
    }
};

// `count` pixels from `x` on to rows of `padded_out`, for output channels from `channel` on.
static void squeeze_channels(const Convolution &conv, bool mean, int channel, int channels,
                             const float *x, int count, float *out) {
    const int32_t *begin = conv.bin_begin + channel, *end = conv.bin_end + channel;
    const ptrdiff_t inputs = conv.shape.in_channels, outputs = conv.padded_out;
    int p = 0;
    if (Simd::kTransposes)
        for (; p + Simd::kFloats <= count; p += Simd::kFloats)
            Squeezer<Simd, Simd::kTransposes>::pixels(begin, end, channels, mean, x + p * inputs,
                                                      inputs, out + p * outputs, outputs);
    for (; p < count; p++)
        squeeze_pixel(begin, end, channels, mean, x + p * inputs, out + p * outputs);
}
