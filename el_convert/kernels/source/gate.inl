// The gate's sum and its gradients, with channels repeated or summed on the way. Each kind has a
// loop over the channels of a pixel, for maps whose channels are innermost, and one over pixels.

// What a row (a pixel, or an image of whole channels) reads and writes.
struct GateRow {
    const float *x, *g, *gamma;
    float *out, *sums;
    int64_t channels, inner, count;  // channels: of g
    float factor;
};

// Channels of a pixel are handled so many at a time, through memory in the first-level cache: what
// repeats or sums neighbours is apart, and the rest is vectors all the way.
enum { kCopies = 512 };

template <int kCount>
static inline void repeat(const float *x, int64_t channels, float *__restrict copies) {
    for (int64_t c = 0; c < channels; c++)
        for (int k = 0; k < kCount; k++) copies[c * kCount + k] = x[c];
}

// The same, or x itself.
template <int kCount>
static inline const float *repeated(const float *x, int64_t channels, float *memory) {
    if (kCount == 1) return x;
    repeat<kCount>(x, channels, memory);
    return memory;
}

template <int kCount>
static inline void sum_neighbours(const float *x, int64_t channels, float *__restrict sums) {
    for (int64_t c = 0; c < channels; c++) {
        float total = 0;
        for (int k = 0; k < kCount; k++) total += x[c * kCount + k];
        sums[c] = total;
    }
}

struct Expand {
    static inline int64_t x_size(int64_t of_g, int64_t count) { return of_g / count; }
    static inline int64_t out_size(int64_t of_g, int64_t) { return of_g; }
    enum { kMap = 0 };
    template <int kCount>
    static inline void pixel(const GateRow &r) {
        float memory[kCopies];
        for (int64_t from = 0; from < r.channels; from += kCopies) {
            const int64_t size = min64(r.channels - from, kCopies);
            const float *g = r.g + from, *gamma = r.gamma + from;
            float *__restrict out = r.out + from;
            const float *copies = repeated<kCount>(r.x + from / kCount, size / kCount, memory);
            for (int64_t k = 0; k < size; k++) out[k] = g[k] + gamma[k] * copies[k];
        }
    }
    static inline void planes(const GateRow &r) {
        for (int64_t k = 0; k < r.channels; k++) {
            const float *x = r.x + k / r.count * r.inner, *g = r.g + k * r.inner;
            float *__restrict out = r.out + k * r.inner;
            for (int64_t i = 0; i < r.inner; i++) out[i] = g[i] + r.gamma[k] * x[i];
        }
    }
};

struct ExpandGrad {
    static inline int64_t x_size(int64_t of_g, int64_t count) { return of_g / count; }
    static inline int64_t out_size(int64_t of_g, int64_t count) { return of_g / count; }
    enum { kMap = 0 };
    template <int kCount>
    static inline void pixel(const GateRow &r) {
        float memory[kCopies], products[kCopies];
        for (int64_t from = 0; from < r.channels; from += kCopies) {
            const int64_t size = min64(r.channels - from, kCopies);
            const float *g = r.g + from, *gamma = r.gamma + from;
            float *__restrict sums = r.sums + from;
            const float *copies = repeated<kCount>(r.x + from / kCount, size / kCount, memory);
            float *__restrict scaled = kCount == 1 ? r.out + from : products;
            for (int64_t k = 0; k < size; k++) {
                scaled[k] = gamma[k] * g[k];
                sums[k] += copies[k] * g[k];
            }
            if (kCount > 1)
                sum_neighbours<kCount>(products, size / kCount, r.out + from / kCount);
        }
    }
    static inline void planes(const GateRow &r) {
        for (int64_t k = 0; k < r.channels; k++) {
            const float *x = r.x + k / r.count * r.inner, *g = r.g + k * r.inner;
            float *__restrict out = r.out + k / r.count * r.inner;
            const bool first = k % r.count == 0;
            for (int64_t i = 0; i < r.inner; i++)
                out[i] = (first ? 0.0f : out[i]) + r.gamma[k] * g[i];
            r.sums[k] += static_cast<float>(sum_of<Product>(x, g, r.inner));
        }
    }
};

// `sums` is a map here: what the gate added, without gamma.
struct Squeeze {
    static inline int64_t x_size(int64_t of_g, int64_t count) { return of_g * count; }
    static inline int64_t out_size(int64_t of_g, int64_t) { return of_g; }
    enum { kMap = 1 };
    template <int kCount>
    static inline void pixel(const GateRow &r) {
        float *__restrict out = r.out, *__restrict sums = r.sums;
        sum_neighbours<kCount>(r.x, r.channels, sums);
        for (int64_t c = 0; c < r.channels; c++) {
            sums[c] *= r.factor;
            out[c] = r.g[c] + r.gamma[c] * sums[c];
        }
    }
    static inline void planes(const GateRow &r) {
        for (int64_t c = 0; c < r.channels; c++) {
            const float *x = r.x + c * r.count * r.inner, *g = r.g + c * r.inner;
            float *__restrict out = r.out + c * r.inner, *__restrict sums = r.sums + c * r.inner;
            for (int64_t i = 0; i < r.inner; i++) sums[i] = x[i];
            for (int64_t k = 1; k < r.count; k++)
                for (int64_t i = 0; i < r.inner; i++) sums[i] += x[k * r.inner + i];
            for (int64_t i = 0; i < r.inner; i++) {
                sums[i] *= r.factor;
                out[i] = g[i] + r.gamma[c] * sums[i];
            }
        }
    }
};

struct SqueezeGrad {
    static inline int64_t x_size(int64_t of_g, int64_t) { return of_g; }
    static inline int64_t out_size(int64_t of_g, int64_t count) { return of_g * count; }
    enum { kMap = 0 };
    template <int kCount>
    static inline void pixel(const GateRow &r) {
        float shares[kCopies];
        for (int64_t from = 0; from < r.channels; from += kCopies) {
            const int64_t size = min64(r.channels - from, kCopies);
            const float *x = r.x + from, *g = r.g + from, *gamma = r.gamma + from;
            float *__restrict sums = r.sums + from;
            for (int64_t c = 0; c < size; c++) {
                shares[c] = gamma[c] * g[c] * r.factor;
                sums[c] += x[c] * g[c];
            }
            repeat<kCount>(shares, size, r.out + from * kCount);
        }
    }
    static inline void planes(const GateRow &r) {
        for (int64_t c = 0; c < r.channels; c++) {
            const float *x = r.x + c * r.inner, *g = r.g + c * r.inner;
            float *__restrict out = r.out + c * r.count * r.inner;
            for (int64_t k = 0; k < r.count; k++)
                for (int64_t i = 0; i < r.inner; i++)
                    out[k * r.inner + i] = r.gamma[c] * g[i] * r.factor;
            r.sums[c] += static_cast<float>(sum_of<Product>(x, g, r.inner));
        }
    }
};

template <typename Kind>
static inline void gate_row(const GateRow &row) {
    if (row.inner > 1) return Kind::planes(row);
    switch (row.count) {
        case 1: return Kind::template pixel<1>(row);
        case 2: return Kind::template pixel<2>(row);
        case 4: return Kind::template pixel<4>(row);
        default: return Kind::planes(row);  // of one pixel each
    }
}

template <typename Kind>
static void gate_rows(const el_pass &pass, int64_t begin, int64_t end) {
    const int64_t size = pass.channels * pass.inner;
    const int64_t x_step = Kind::x_size(size, pass.count), out_step = Kind::out_size(size, pass.count);
    float *sums = pass.sums;
    if (!Kind::kMap && sums) {
        sums += begin / pass.block * pass.channels;
        for (int64_t c = 0; c < pass.channels; c++) sums[c] = 0;
    }
    for (int64_t i = begin; i < end; i++) {
        const GateRow row = {pass.x + i * x_step, pass.g + i * size, pass.vector,
                             pass.out + i * out_step, Kind::kMap ? sums + i * size : sums,
                             pass.channels, pass.inner, pass.count, pass.factor};
        gate_row<Kind>(row);
    }
}
