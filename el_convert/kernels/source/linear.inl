// A linear layer for few inputs, whose time is that of reading its weights. Included once per
// instruction set.

enum { kWeightRows = 4 };  // read side by side, which memory gives faster than one after the other

static inline float sum_lanes(Simd::Floats v) {
    float lanes[Simd::kFloats], sum = 0;
    Simd::store(lanes, v);
    for (int i = 0; i < Simd::kFloats; i++) sum += lanes[i];
    return sum;
}

template <int kRows>
static inline void dot_rows(const el_linear &linear, const float *x, int64_t row, float *out) {
    const int64_t inputs = linear.in_features;
    const float *weight = linear.weight + row * inputs;
    Simd::Floats sums[kRows];
    for (int r = 0; r < kRows; r++) sums[r] = Simd::set(0);
    int64_t k = 0;
    for (; k + Simd::kFloats <= inputs; k += Simd::kFloats) {
        const Simd::Floats v = Simd::load(x + k);
        for (int r = 0; r < kRows; r++)
            sums[r] = Simd::fma(v, Simd::load(weight + r * inputs + k), sums[r]);
    }
    for (int r = 0; r < kRows; r++) {
        float sum = sum_lanes(sums[r]);
        for (int64_t i = k; i < inputs; i++) sum += x[i] * weight[r * inputs + i];
        out[r] = linear.bias ? sum + linear.bias[row + r] : sum;
    }
}

// Outputs from `begin` to `end` of every input.
static void linear_rows(const el_linear &linear, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
        const bool many = row + kWeightRows <= end;
        for (int64_t n = 0; n < linear.batch; n++) {
            const float *x = linear.input + n * linear.in_features;
            float *out = linear.output + n * linear.out_features + row;
            if (many) dot_rows<kWeightRows>(linear, x, row, out);
            else dot_rows<1>(linear, x, row, out);
        }
        row += many ? kWeightRows : 1;
    }
}
