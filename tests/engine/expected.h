// What a case gives, by plain loops.
#ifndef EL_CONVERT_CHECK_EXPECTED_H
#define EL_CONVERT_CHECK_EXPECTED_H

#include <math.h>

#include <algorithm>
#include <vector>

#include "cases.h"

namespace {

const double kTolerance = 1e-5;
const double kSmallest = 1e-37;  // below it floats are not that exact

std::vector<int32_t> expected_sums(const Job &job) {
    const Case &c = job.c;
    const el_geometry &g = c.shape;
    const int inside = c.group_in(), taps = c.taps();
    std::vector<int8_t> x(static_cast<size_t>(c.inputs()));
    for (size_t i = 0; i < x.size(); i++) {
        const float *threshold = job.epilogue.threshold;
        const float limit = threshold ? threshold[i % static_cast<size_t>(g.in_channels)] : 0;
        x[i] = job.input[i] > limit ? 1 : -1;
    }
    std::vector<int8_t> w(static_cast<size_t>(g.out_channels) * taps * inside);  // [out][tap][in]
    for (int m = 0; m < g.out_channels; m++)
        for (int i = 0; i < taps * inside; i++) {
            const uint8_t byte = job.bits[static_cast<size_t>(m) * c.weight_bytes() + i / 8];
            const size_t at = (static_cast<size_t>(m) * taps + i % taps) * inside + i / taps;
            w[at] = byte >> (i % 8) & 1 ? 1 : -1;
        }
    std::vector<int32_t> sums;
    sums.reserve(static_cast<size_t>(c.outputs()));
    for (int64_t p = 0; p < c.pixels(); p++) {
        const int64_t image = p / (c.out_height * c.out_width);
        const int64_t top = p / c.out_width % c.out_height * g.stride_h - g.top;
        const int64_t left = p % c.out_width * g.stride_w - g.left;
        for (int m = 0; m < g.out_channels; m++) {
            int32_t sum = 0;
            for (int t = 0; t < taps; t++) {
                const int64_t row = top + t / g.kernel_w * g.dilation_h;
                const int64_t column = left + t % g.kernel_w * g.dilation_w;
                if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
                const int64_t pixel = (image * c.height + row) * c.width + column;
                const int8_t *a = &x[static_cast<size_t>(pixel * g.in_channels +
                                                         m / c.group_out() * inside)];
                const int8_t *b = &w[(static_cast<size_t>(m) * taps + t) * inside];
                for (int i = 0; i < inside; i++) sum += a[i] * b[i];
            }
            sums.push_back(sum);
        }
    }
    return sums;
}

// A value, and how large the terms were that it is made of: rounding errors are relative to these.
struct Estimate {
    double value, size;

    void add(double x) { value += x, size += fabs(x); }
    void multiply(double x) { value *= x, size *= fabs(x); }
    void add_product(double x, const Estimate &y) {
        value += x * y.value;
        size += fabs(x) * y.size;
    }
    void clamp(double low, double high) {
        const double given = value;
        if (value < low) value = low;
        if (value > high) value = high;
        if (isinf(given)) size = fabs(value);
    }
    // By a number that depends on the value: the product changes 1.5 times as much at most.
    void gate(double open) {
        value *= open;
        size *= 1.5;
    }
    void prelu(double slope) {
        if (!(value > 0)) value *= slope;
        size *= fmax(1, fabs(slope));
    }
};

Estimate link_value(const Job &job, int64_t pixel, int64_t channel) {
    const Case &c = job.c;
    const int64_t channels = c.link_channels();
    Estimate sum = {0, 0};
    if (!c.pooled) {
        sum.add(job.link[pixel * channels + channel]);
        return sum;
    }
    const int64_t row = pixel / c.out_width, column = pixel % c.out_width;
    float largest = -INFINITY;
    for (int k = 0; k < 4; k++) {
        const int64_t from = (2 * row + k / 2) * 2 * c.out_width + 2 * column + k % 2;
        const float value = job.link[from * channels + channel];
        if (value > largest || isnan(value)) largest = value;
        if (c.pooled == EL_LINK_AVERAGE) sum.add(value);
    }
    if (c.pooled == EL_LINK_MAX) sum.add(largest);
    else sum.multiply(0.25);
    return sum;
}

Estimate matched_link(const Job &job, int64_t pixel, int channel) {
    const int64_t in = job.c.shape.in_channels, out = job.c.shape.out_channels;
    if (job.c.link == EL_LINK_IDENTITY) return link_value(job, pixel, channel);
    const int64_t begin = channel * in / out, end = ((channel + 1) * in + out - 1) / out;
    if (job.c.link == EL_LINK_EXPAND) return link_value(job, pixel, begin);
    Estimate sum = {0, 0};
    for (int64_t k = begin; k < end; k++) sum.add_product(1, link_value(job, pixel, k));
    if (job.c.link == EL_LINK_MEAN) sum.multiply(1.0 / static_cast<double>(end - begin));
    return sum;
}

void normalize(const el_epilogue &e, int64_t channel, Estimate *v) {
    if (e.norm_scale) v->multiply(e.norm_scale[channel]);
    if (e.norm_shift) v->add(e.norm_shift[channel]);
}

void activate(const el_epilogue &e, int64_t channel, Estimate *v) {
    if (e.act_in) v->add(e.act_in[channel]);
    if (e.activation == EL_ACT_CLAMP) v->clamp(e.low, e.high);
    if (e.activation == EL_ACT_PRELU) v->prelu(e.slope[channel]);
    if (e.activation == EL_ACT_SILU) v->gate(1 / (1 + exp(-v->value)));
    if (e.activation == EL_ACT_HARDSWISH) v->gate(fmin(fmax(v->value + 3, 0), 6) / 6);
    if (e.act_out) v->add(e.act_out[channel]);
}

Estimate expected_output(const Job &job, int32_t sum, int64_t pixel, int channel) {
    const el_epilogue &e = job.epilogue;
    Estimate v = {static_cast<double>(sum), fabs(sum)}, linked = {0, 0};
    if (e.scale) v.multiply(e.scale[channel]);
    if (e.bias) v.add(e.bias[channel]);
    if (e.link != EL_LINK_NONE) linked = matched_link(job, pixel, channel);
    if (e.link != EL_LINK_NONE && !e.link_after_norm) v.add_product(e.gamma[channel], linked);
    normalize(e, channel, &v);
    if (e.link != EL_LINK_NONE && e.link_after_norm) v.add_product(e.gamma[channel], linked);
    const int64_t at = pixel * job.c.shape.out_channels + channel;
    if (job.residual && !e.residual_last) v.add(job.residual[at]);
    activate(e, channel, &v);
    if (job.residual && e.residual_last) v.add(job.residual[at]);
    return v;
}

// The value at a place of the output, counted in its order in memory.
Estimate expected_maximum(const Pooling &job, int64_t at) {
    const el_pool &pool = job.pool;
    const int64_t channel = at % pool.channels, pixel = at / pool.channels;
    const int64_t left = pixel % pool.out_width * pool.stride_w - pool.left;
    const int64_t top = pixel / pool.out_width % pool.out_height * pool.stride_h - pool.top;
    const int64_t image = pixel / pool.out_width / pool.out_height;
    Estimate best = {-INFINITY, 0};
    for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + pool.kernel_h, pool.height); y++)
        for (int64_t x = std::max<int64_t>(left, 0); x < std::min(left + pool.kernel_w, pool.width);
             x++) {
            const int64_t from = (image * pool.height + y) * pool.width + x;
            Estimate v = {0, 0};
            v.add(pool.input[from * pool.channels + channel]);
            normalize(job.epilogue, channel, &v);
            activate(job.epilogue, channel, &v);
            best.size = fmax(best.size, v.size);
            if (v.value > best.value || isnan(v.value)) best.value = v.value;
        }
    return best;
}

bool agrees(float got, const Estimate &expected) {
    if (isnan(expected.value)) return isnan(got);
    if (isinf(expected.value)) return got == expected.value;
    return fabs(got - expected.value) <= kTolerance * expected.size + kSmallest;
}

}  // namespace

#endif
