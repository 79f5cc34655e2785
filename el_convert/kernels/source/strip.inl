// One strip of output pixels, from float input to float output. Included once per instruction set.

// Which kernel taps of one dimension see the image rather than padding.
struct Span {
    int begin, end;
    bool operator!=(const Span &other) const {
        return begin != other.begin || end != other.end;
    }
};

static inline Span span_of(int64_t first, int dilation, int taps, int64_t size) {
    int begin = 0, end = taps;
    while (begin < taps && first + static_cast<int64_t>(begin) * dilation < 0) begin++;
    while (end > begin && first + static_cast<int64_t>(end - 1) * dilation >= size) end--;
    const Span span = {begin, end};
    return span;
}

// What the sums start from. Padding counts as sign -1 in the map: its +1 weights are given back.
static void start_sums(const Convolution &conv, int group, Span rows, Span columns, float *init) {
    const int wide = conv.shape.kernel_w + 1;
    const int32_t *plus = conv.plus + group * conv.padded_out;
    const ptrdiff_t step = conv.plane;
    const int32_t *all = plus + (conv.shape.kernel_h * wide + conv.shape.kernel_w) * step;
    const int32_t *a = plus + (rows.begin * wide + columns.begin) * step;
    const int32_t *b = plus + (rows.begin * wide + columns.end) * step;
    const int32_t *c = plus + (rows.end * wide + columns.begin) * step;
    const int32_t *d = plus + (rows.end * wide + columns.end) * step;
    const int seen = (rows.end - rows.begin) * (columns.end - columns.begin) * conv.group_in;
    for (int m = 0; m < conv.padded_out; m++)
        init[m] = static_cast<float>(seen + 2 * (all[m] - (d[m] - c[m] - b[m] + a[m])));
}

// The columns of output pixels that see no padding beside them.
static inline Span inner_columns(const Convolution &conv, const el_call &call) {
    const el_geometry &g = conv.shape;
    const int64_t room = call.width - 1 + g.left - static_cast<int64_t>(g.kernel_w - 1) * g.dilation_w;
    const int64_t begin = (g.left + g.stride_w - 1) / g.stride_w;
    const int64_t end = room < 0 ? 0 : room / g.stride_w + 1;
    const Span span = {static_cast<int>(min64(begin, call.out_width)),
                       static_cast<int>(min64(max64(end, 0), call.out_width))};
    return span;
}

// What the sums of one kind of pixel start from: kept for as long as the next see the same padding.
struct Start {
    Span rows, columns;
    float *init;
    void prepare(const Convolution &conv, int group, Span of_rows, Span of_columns) {
        if (!(rows != of_rows || columns != of_columns)) return;
        rows = of_rows, columns = of_columns;
        start_sums(conv, group, rows, columns, init);
    }
};

// The epilogue over a strip's rows for one group, by runs that see the same padding.
static void finish_rows(const Work &work, const Strip &strip, int group, const Scratch &at,
                        uint8_t *scratch, int64_t sums_width) {
    const Convolution &conv = *work.conv;
    const el_geometry &shape = conv.shape;
    const el_call &call = *work.call;
    float *init = reinterpret_cast<float *>(scratch + at.init);
    float *match = reinterpret_cast<float *>(scratch + at.match);
    const uint16_t *sums = reinterpret_cast<const uint16_t *>(scratch + at.sums);
    Run run = {};
    run.init = init;
    run.channel = group * conv.group_out;
    run.channels = conv.depthwise ? shape.out_channels : conv.group_out;
    if (conv.pointwise) {
        const Span all = {0, 1};
        start_sums(conv, group, all, all, init);
        run.sums = sums;
        run.pixel = strip.begin;
        epilogue(work, run, static_cast<int>(strip.end - strip.begin), match);
        return;
    }
    const Span inner = inner_columns(conv, call), none = {-1, -1};
    Start starts[3];  // left of the inner columns, these, and right of them
    for (int i = 0; i < 3; i++) {
        const Start start = {none, none, init + i * conv.padded_out};
        starts[i] = start;
    }
    const int64_t row_sums = sums_width * conv.padded_out;
    for (int64_t y = strip.row_begin; y < strip.row_end; y++, sums += row_sums) {
        const Span rows = span_of(y * shape.stride_h - shape.top, shape.dilation_h, shape.kernel_h,
                                  call.height);
        for (int64_t x = strip.begin; x < strip.end;) {
            const Span columns = span_of(x * shape.stride_w - shape.left, shape.dilation_w,
                                         shape.kernel_w, call.width);
            const bool within = x >= inner.begin && x < inner.end;
            const int64_t end = within ? min64(inner.end, strip.end) : x + 1;
            Start &start = starts[x < inner.begin ? 0 : within ? 1 : 2];
            start.prepare(conv, group, rows, columns);
            run.init = start.init;
            run.sums = sums + (x - strip.begin) * conv.padded_out;
            run.pixel = (strip.image * call.out_height + y) * call.out_width + x;
            epilogue(work, run, static_cast<int>(end - x), match);
            x = end;
        }
    }
}

// How many chunks from `begin` on have weights that stay in the first-level cache together.
static int slab_end(const Convolution &conv, int begin, ptrdiff_t *bytes) {
    int end = begin;
    *bytes = 0;
    for (; end < conv.chunk_count; end++) {
        const ptrdiff_t own = whole(conv.chunks[end].length, kGather) * conv.block;
        if (end > begin && *bytes + own > kCounting.slab_bytes) break;
        *bytes += own;
    }
    return end;
}

static void count_block(const Convolution &conv, const Strip &strip, int block,
                        const uint8_t *weight, const Scratch &at, uint8_t *scratch) {
    const int64_t columns = whole(strip.end - strip.begin, kPixels) / kPixels;
    const ptrdiff_t step =
        static_cast<ptrdiff_t>(conv.units) * (conv.pointwise ? 1 : kPixels * conv.shape.stride_w);
    const int64_t rows = strip.row_end - strip.row_begin;
    uint16_t *sums = reinterpret_cast<uint16_t *>(scratch + at.sums) + block * conv.block;
    const ptrdiff_t stride = conv.padded_out;
    for (int begin = 0; begin < conv.chunk_count;) {
        ptrdiff_t bytes;
        const int end = slab_end(conv, begin, &bytes);
        for (int64_t y = 0; y < rows; y++) {
            const uint8_t *map = scratch + at.map + y * conv.shape.stride_h * at.row_bytes;
            uint16_t *out = sums + y * columns * kPixels * stride;
            const Chunk *chunks = conv.chunks + begin;
            const bool wide = conv.block == Simd::kMaxBlock;
            const int kWide = Simd::kMaxBlock / kOutputs;
            (wide ? tile_row<kWide> : tile_row<kWide / 2>)(map, step, at.row_bytes, columns, chunks,
                                                           end - begin, weight, out, stride,
                                                           begin == 0);
        }
        weight += bytes;
        begin = end;
    }
}

// Depthwise: one row of output pixels, one vector of channels; counts fit in bytes.
static inline void depthwise_row(const Convolution &conv, const uint8_t *map,
                                 const ptrdiff_t *taps, const uint8_t *weight, int64_t count,
                                 uint16_t *sums) {
    typedef Simd::Bytes Bytes;
    const int n = conv.taps;
    const ptrdiff_t width = conv.padded_out, step = conv.shape.stride_w * width;
    for (int64_t x = 0; x < count; x++, map += step, sums += width) {
        Bytes total = Simd::zero();
        for (int t = 0; t < n; t++)
            total = Simd::add(total, Simd::differ(Simd::load(map + taps[t]),
                                                  Simd::load(weight + t * width)));
        Simd::widen(sums, total);
    }
}

// The same for kernels of 3x3, whose weights stay in registers.
static inline void depthwise_row_3x3(const Convolution &conv, const uint8_t *map,
                                     const ptrdiff_t *taps, const uint8_t *weight, int64_t count,
                                     uint16_t *sums) {
    typedef Simd::Bytes Bytes;
    const ptrdiff_t width = conv.padded_out, step = conv.shape.stride_w * width, right = taps[1];
    const uint8_t *rows[3] = {map, map + taps[3], map + taps[6]};
    Bytes own[3][3];
    EL_UNROLL
    for (int y = 0; y < 3; y++)
        EL_UNROLL
        for (int x = 0; x < 3; x++) own[y][x] = Simd::load(weight + (3 * y + x) * width);
    for (int64_t i = 0; i < count; i++, sums += width) {
        Bytes total[3];
        EL_UNROLL
        for (int y = 0; y < 3; y++, rows[y - 1] += step) {
            const Bytes a = Simd::differ(Simd::load(rows[y]), own[y][0]);
            const Bytes b = Simd::differ(Simd::load(rows[y] + right), own[y][1]);
            const Bytes c = Simd::differ(Simd::load(rows[y] + 2 * right), own[y][2]);
            total[y] = Simd::add(Simd::add(a, b), c);
        }
        Simd::widen(sums, Simd::add(Simd::add(total[0], total[1]), total[2]));
    }
}

static void depthwise_strip(const Work &work, const Strip &strip, const Scratch &at,
                            uint8_t *scratch) {
    const Convolution &conv = *work.conv;
    const el_geometry &shape = conv.shape;
    pack_bytes(work, strip, at, scratch);
    ptrdiff_t *taps = reinterpret_cast<ptrdiff_t *>(scratch + at.chunks);
    for (int y = 0; y < shape.kernel_h; y++)
        for (int x = 0; x < shape.kernel_w; x++)
            taps[y * shape.kernel_w + x] =
                y * shape.dilation_h * at.row_bytes +
                static_cast<ptrdiff_t>(x) * shape.dilation_w * conv.padded_out;
    const int64_t width = strip.end - strip.begin;
    uint16_t *sums = reinterpret_cast<uint16_t *>(scratch + at.sums);
    for (int64_t y = 0; y < strip.row_end - strip.row_begin; y++) {
        const uint8_t *map = scratch + at.map + y * shape.stride_h * at.row_bytes;
        for (int c = 0; c < conv.padded_out; c += Simd::kBytes) {
            if (shape.kernel_h == 3 && shape.kernel_w == 3)
                depthwise_row_3x3(conv, map + c, taps, conv.weight + c, width, sums + c);
            else
                depthwise_row(conv, map + c, taps, conv.weight + c, width, sums + c);
        }
        sums += width * conv.padded_out;
    }
    finish_rows(work, strip, 0, at, scratch, width);
}

static void run_strip(const Work &work, const Strip &strip, uint8_t *scratch) {
    const Convolution &conv = *work.conv;
    const Scratch at = scratch_layout(conv, strip);
    if (conv.depthwise) return depthwise_strip(work, strip, at, scratch);
    const int64_t width = whole(strip.end - strip.begin, kPixels);
    const size_t block_bytes = static_cast<size_t>(conv.depth) * conv.block * kGather;
    for (int group = 0; group < conv.shape.groups; group++) {
        if (conv.pointwise) pack_pointwise(work, strip, group, at, scratch);
        else pack_rows(work, strip, group, at, scratch);
        for (int block = 0; block < conv.blocks; block++) {
            const size_t index = static_cast<size_t>(group) * conv.blocks + block;
            count_block(conv, strip, block, conv.weight + index * block_bytes, at, scratch);
        }
        finish_rows(work, strip, group, at, scratch, width);
    }
}

static double peak(int rounds) {
    enum { kRepeats = 64 };
    static const Chunk chunk = {0, 0, kPeakBytes};
    alignas(64) static uint8_t map[kTile * kPeakBytes], weight[kPeakBytes * Simd::kMaxBlock];
    alignas(64) uint16_t sums[kTile * kPixels * Simd::kMaxBlock];
    for (int i = 0; i < kTile * kPeakBytes; i++) map[i] = static_cast<uint8_t>(i * 37);
    for (int i = 0; i < kPeakBytes * Simd::kMaxBlock; i++)
        weight[i] = i * 7 & ((1 << kChannels) - 1);
    double best = 0;
    for (int round = 0; round < rounds; round++) {
        const double start = seconds();
        for (int i = 0; i < kRepeats; i++) {
            tile<kTile, Simd::kMaxBlock / kOutputs>(map, kPeakBytes, 0, &chunk, 1, weight, sums,
                                                    Simd::kMaxBlock, true);
            __asm__ volatile("" : : "g"(map), "g"(weight), "g"(sums) : "memory");
        }
        const double spent = seconds() - start;
        const int count = kChannels * kPixels * kTile * kPeakBytes * Simd::kMaxBlock * kRepeats;
        const double rate = count / spent;
        if (rate > best) best = rate;
    }
    return best;
}
