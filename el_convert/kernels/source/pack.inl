// From float channels to the map that the tiles read. Included once per instruction set.

// One bit per channel, the least significant first: 1 where x > threshold.
static inline void pack_signs(const float *x, const float *threshold, int count, uint8_t *bits) {
    int c = 0;
    for (; c + 64 <= count; c += 64, bits += 8) {
        const uint64_t word = Simd::sign_word(x + c, threshold ? threshold + c : nullptr);
        for (int i = 0; i < 8; i++) bits[i] = static_cast<uint8_t>(word >> 8 * i);
    }
    bits -= c / 8;
    for (; c + Simd::kSigns <= count; c += Simd::kSigns) {
        const unsigned signs = Simd::signs(x + c, threshold ? threshold + c : nullptr);
        bits[c / 8] = static_cast<uint8_t>(signs);
        if (Simd::kSigns == 16) bits[c / 8 + 1] = static_cast<uint8_t>(signs >> 8);
    }
    for (; c < count; c += 8) {
        unsigned byte = 0;
        for (int i = 0; i < 8 && c + i < count; i++)
            byte |= static_cast<unsigned>(x[c + i] > (threshold ? threshold[c + i] : 0.0f)) << i;
        bits[c / 8] = static_cast<uint8_t>(byte);
    }
}

static void pack_pointwise(const Work &work, const Strip &strip, int group, const Scratch &at,
                           uint8_t *scratch) {
    const Convolution &conv = *work.conv;
    const el_call &call = *work.call;
    const int bytes = conv.pixel_bytes, channels = conv.shape.in_channels;
    const float *threshold = work.epilogue->threshold;
    if (threshold) threshold += group * conv.group_in;
    uint8_t *bits = scratch + at.bits, *map = scratch + at.map;
    const int64_t count = strip.end - strip.begin;
    int64_t x = strip.begin % call.out_width, y = strip.begin / call.out_width;
    int64_t image = y / call.out_height;
    y %= call.out_height;
    for (int64_t i = 0; i < count; i++) {
        const int64_t from =
            (image * call.height + y * conv.shape.stride_h) * call.width + x * conv.shape.stride_w;
        pack_signs(call.input + from * channels + group * conv.group_in, threshold, conv.group_in,
                   bits + i * bytes);
        if (++x == call.out_width) {
            x = 0;
            if (++y == call.out_height) y = 0, image++;
        }
    }
    memset(bits + count * bytes, 0, static_cast<size_t>(bytes));  // the last pair may be half
    if (kPixels == 1) return fill_map(conv, bits, 0, at.columns, map);
    for (int64_t column = 0; column < at.columns; column++)
        fill_map(conv, bits + column * kPixels * bytes, 1, 1, map + column * conv.units);
}

// The input row that row `index` of a strip's map holds; outside of the image for padding.
static inline int64_t map_row(const Convolution &conv, const Strip &strip, int64_t index) {
    return strip.row_begin * conv.shape.stride_h - conv.shape.top + index;
}

static void pack_rows(const Work &work, const Strip &strip, int group, const Scratch &at,
                      uint8_t *scratch) {
    const Convolution &conv = *work.conv;
    const el_call &call = *work.call;
    const int bytes = conv.pixel_bytes, channels = conv.shape.in_channels;
    const float *threshold = work.epilogue->threshold;
    if (threshold) threshold += group * conv.group_in;
    uint8_t *bits = scratch + at.bits;
    const int64_t step = conv.shape.stride_w, left = conv.shape.left;
    // The last pixels' partners lie beyond the last column of the map.
    const int64_t end = max64(0, min64(call.width, at.columns + step - left));
    memset(bits, 0, static_cast<size_t>((at.columns + step) * bytes));
    for (int64_t row = 0; row < at.rows; row++) {
        uint8_t *out = scratch + at.map + row * at.row_bytes;
        const int64_t y = map_row(conv, strip, row);
        if (y < 0 || y >= call.height) {
            memset(out, 0, static_cast<size_t>(at.row_bytes));
            continue;
        }
        const float *x = call.input + ((strip.image * call.height + y) * call.width) * channels +
                         group * conv.group_in;
        for (int64_t i = 0; i < end; i++)
            pack_signs(x + i * channels, threshold, conv.group_in, bits + (left + i) * bytes);
        fill_map(conv, bits, step, at.columns, out);
    }
}

// The last channels, fewer than a vector of bytes; the map is padded to whole vectors.
static inline void pack_last_bytes(const float *x, const float *limit, int count, uint8_t *pixel) {
    float own[Simd::kBytes] = {0};
    memcpy(own, x, static_cast<size_t>(count) * sizeof *x);
    Simd::store(pixel, Simd::sign_bytes(own, limit));
}

// Depthwise: a byte per channel, 0 or 1.
static void pack_bytes(const Work &work, const Strip &strip, const Scratch &at, uint8_t *scratch) {
    const Convolution &conv = *work.conv;
    const el_call &call = *work.call;
    const int channels = conv.shape.in_channels, last = channels % Simd::kBytes;
    const float *threshold = work.epilogue->threshold;
    float padded[Simd::kBytes] = {0};
    if (threshold && last)
        memcpy(padded, threshold + channels - last, static_cast<size_t>(last) * sizeof *padded);
    const float *limit = threshold ? padded : nullptr;
    const float *beyond = call.input + call.batch * call.height * call.width * channels;
    const int64_t left = conv.shape.left, width = conv.padded_out;
    const int64_t end = max64(0, min64(call.width, at.columns - left));
    for (int64_t row = 0; row < at.rows; row++) {
        uint8_t *out = scratch + at.map + row * at.row_bytes;
        memset(out, 0, static_cast<size_t>(at.row_bytes));
        const int64_t y = map_row(conv, strip, row);
        if (y < 0 || y >= call.height) continue;
        const float *x = call.input + ((strip.image * call.height + y) * call.width) * channels;
        uint8_t *pixel = out + left * width;
        for (int64_t i = 0; i < end; i++, x += channels, pixel += width) {
            int c = 0;
            for (; c + Simd::kBytes <= channels; c += Simd::kBytes)
                Simd::store(pixel + c, Simd::sign_bytes(x + c, threshold ? threshold + c : nullptr));
            if (!last) continue;
            // Beyond the last channel lie the next pixel's, whose counts nobody reads.
            if (beyond - x >= c + Simd::kBytes) Simd::store(pixel + c, Simd::sign_bytes(x + c, limit));
            else pack_last_bytes(x + c, limit, last, pixel + c);
        }
    }
}
