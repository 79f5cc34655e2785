// Random layers and poolings, each from its number alone, with their data.
#ifndef EL_CONVERT_CHECK_CASES_H
#define EL_CONVERT_CHECK_CASES_H

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "tools.h"

namespace {

struct Case {
    long number;
    el_geometry shape;
    int64_t batch, height, width, out_height, out_width;
    int threads;
    bool pool;       // whether there is a thread pool
    bool saturated;  // all signs of the input the same, and all weights: sums as large as possible
    bool guarded;
    int link, times;  // channels: the larger number is `times` the smaller one; 0 where not whole
    int pooled;  // an el_link_pool

    int taps() const { return shape.kernel_h * shape.kernel_w; }
    int group_in() const { return shape.in_channels / shape.groups; }
    int group_out() const { return shape.out_channels / shape.groups; }
    int weight_bytes() const { return (group_in() * taps() + 7) / 8; }
    int64_t weights() const {
        return static_cast<int64_t>(shape.out_channels) * group_in() * taps();
    }
    int64_t pixels() const { return batch * out_height * out_width; }
    int64_t inputs() const { return batch * height * width * shape.in_channels; }
    int64_t outputs() const { return pixels() * shape.out_channels; }
    int64_t work() const { return pixels() * weights(); }
    int64_t link_channels() const {
        return link == EL_LINK_IDENTITY ? shape.out_channels : shape.in_channels;
    }
    bool depthwise() const {
        return shape.in_channels == shape.groups && shape.out_channels == shape.groups;
    }
    bool refused() const { return group_in() * taps() > (depthwise() ? 255 : 65535); }
};

std::string describe(const Case &c) {
    const el_geometry &g = c.shape;
    char text[400];
    snprintf(text, sizeof text,
             "case %ld: %d -> %d channels in %d groups, kernel %dx%d, stride %dx%d, dilation "
             "%dx%d, padding top %d bottom %d left %d right %d, input %ld x %ldx%ld, "
             "output %ldx%ld, threads %d%s, link %d%s%s",
             c.number, g.in_channels, g.out_channels, g.groups, g.kernel_h, g.kernel_w, g.stride_h,
             g.stride_w, g.dilation_h, g.dilation_w, g.top, g.bottom, g.left, g.right,
             static_cast<long>(c.batch), static_cast<long>(c.height), static_cast<long>(c.width),
             static_cast<long>(c.out_height), static_cast<long>(c.out_width), c.threads,
             c.pool ? "" : " without a pool", c.link,
             c.pooled == EL_LINK_MAX ? " largest" : c.pooled ? " averaged" : "",
             c.saturated ? ", saturated" : "");
    return text;
}

// Shapes whose counters are as full as they may be.
const el_geometry kFull[] = {
    {65535, 3, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
    {257, 33, 1, 15, 17, 1, 1, 1, 1, 7, 7, 8, 8},
    {4369, 1, 1, 5, 3, 1, 1, 2, 2, 1, 3, 1, 1},
    {1, 1, 1, 15, 17, 1, 1, 1, 1, 7, 7, 8, 8},
    {67, 67, 67, 5, 51, 1, 1, 1, 1, 2, 2, 25, 25},
    {64, 64, 64, 255, 1, 1, 1, 1, 1, 127, 127, 0, 0},
};
const int kFullCount = sizeof kFull / sizeof *kFull;

int some_channels(Random &random) {
    static const int blocks[] = {8, 16, 32, 64, 96, 128, 192, 256};
    const int kind = random.between(1, 100);
    if (kind <= 35) return random.between(1, 40);
    if (kind <= 65) return random.between(1, 300);
    if (kind <= 92) return random.among(blocks) + random.between(-1, 1);
    return random.between(300, 2100);
}

void choose_channels(Random &random, Case *c) {
    static const int many[] = {1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9, 16, 24};
    el_geometry &g = c->shape;
    const int kind = random.between(1, 100);
    c->link = random.between(EL_LINK_NONE, EL_LINK_SUM);
    c->times = 1;
    if (kind <= 20) {
        g.in_channels = g.out_channels = g.groups = some_channels(random);
        return;
    }
    const bool free = c->link == EL_LINK_NONE || c->link == EL_LINK_IDENTITY;
    g.groups = kind <= 45 ? random.between(2, 8) : 1;
    if (kind == 45) g.groups = random.between(9, 70);  // of few channels each
    int in = std::max(1, some_channels(random) / g.groups);
    int out = std::max(1, some_channels(random) / g.groups);
    if (kind > 45 && random.chance(10)) (random.chance(50) ? in : out) = 1;
    // Preparing weights takes longest: not many of both.
    if (in > out) out = std::min(out, std::max(1, 30000 / in));
    else in = std::min(in, std::max(1, 30000 / out));
    if (!free) {
        c->times = random.among(many);
        int few = std::max(1, (random.chance(50) ? in : out) / c->times);
        while (few * few * c->times > 100000) few -= few / 4;
        in = out = few;
        int &larger = c->link == EL_LINK_EXPAND ? out : in;
        larger *= c->times;
        if (few > 1 && random.chance(35)) {
            larger += random.between(1, few - 1);
            c->times = 0;
        }
    }
    g.in_channels = in * g.groups;
    g.out_channels = out * g.groups;
}

void choose_windows(Random &random, Case *c) {
    static const int strides[] = {1, 1, 2, 2, 3}, dilations[] = {1, 1, 1, 2};
    el_geometry &g = c->shape;
    const int kind = random.between(1, 100);
    g.kernel_h = kind <= 30 ? 1 : kind <= 55 ? 3 : random.between(1, 7);
    g.kernel_w = kind <= 30 ? 1 : kind <= 55 ? 3 : random.between(1, 7);
    while (c->weights() > 500000 && c->taps() > 1)
        (g.kernel_h > g.kernel_w ? g.kernel_h : g.kernel_w)--;
    g.stride_h = random.among(strides);
    g.stride_w = random.chance(70) ? g.stride_h : random.among(strides);
    g.dilation_h = random.among(dilations);
    g.dilation_w = random.chance(70) ? g.dilation_h : random.among(dilations);
    if (random.chance(30)) return;
    g.top = random.between(0, 3);
    g.left = random.between(0, 3);
    g.bottom = g.top;
    g.right = g.left;
    if (random.chance(70)) return;
    if (random.chance(30)) g.top = g.left = 0;
    g.bottom = random.between(0, 3);
    g.right = random.between(0, 3);
}

int64_t output_size(int64_t size, int before, int after, int kernel, int stride, int dilation) {
    const int64_t room = size + before + after - (kernel - 1) * dilation - 1;
    return room < 0 ? 0 : room / stride + 1;
}

void measure(Case *c) {
    const el_geometry &g = c->shape;
    c->out_height =
        output_size(c->height, g.top, g.bottom, g.kernel_h, g.stride_h, g.dilation_h);
    c->out_width =
        output_size(c->width, g.left, g.right, g.kernel_w, g.stride_w, g.dilation_w);
}

void choose_sizes(Random &random, Case *c) {
    static const int sides[] = {1, 2, 3, 4, 5, 7, 8, 13, 14, 16, 17, 23, 28, 33, 40, 56};
    static const int batches[] = {1, 1, 1, 2, 3};
    c->batch = random.chance(2) ? 0 : random.among(batches);
    c->height = random.chance(10) ? 1 : random.among(sides);
    c->width = random.chance(60) ? c->height : random.among(sides);
    const int kind = random.between(1, 100);
    const int64_t budget = kind <= 80 ? 500000 : kind <= 98 ? 3000000 : 20000000;
    for (;;) {
        measure(c);
        if (c->work() <= budget && c->inputs() <= 150000 && c->outputs() <= 100000) break;
        if (c->height == 1 && c->width == 1) break;
        int64_t &larger = c->height > c->width ? c->height : c->width;
        larger -= (larger + 3) / 4;
    }
    if (random.chance(95)) {  // the kernel fits
        while (!c->out_height) c->height++, measure(c);
        while (!c->out_width) c->width++, measure(c);
    }
}

Case make_case(long number) {
    Random random(static_cast<uint64_t>(number));
    Case c = {};
    c.number = number;
    if (number < kFullCount) {
        c.shape = kFull[number];
        c.batch = c.saturated = true;
        c.height = c.width = c.shape.kernel_h == 1 ? 3 : 4;
        if (number == 2) c.height = c.width = 9;
        measure(&c);
    } else {
        c.shape.groups = 1;
        choose_channels(random, &c);
        choose_windows(random, &c);
        choose_sizes(random, &c);
        c.saturated = random.chance(6);
    }
    c.threads = random.between(0, 5);
    c.pool = random.chance(80);
    c.guarded = number % 2;
    const bool squeezes = c.link == EL_LINK_MEAN || c.link == EL_LINK_SUM;
    const bool in_vectors = !squeezes || c.times == 2 || c.times == 4;
    if (c.link != EL_LINK_NONE && in_vectors && random.chance(50))
        c.pooled = random.chance(50) ? EL_LINK_AVERAGE : EL_LINK_MAX;
    return c;
}

float special(Random &random) {
    static const float values[] = {NAN, -NAN, INFINITY, -INFINITY, -0.0f, 0.0f, 1e-42f, -1e-42f};
    return values[random.next() % 8];
}

// What calls read, filled at random.
class Data {
  public:
    explicit Data(uint64_t seed, bool guarded) : epilogue(), random(seed), guarded_(guarded) {}
    el_epilogue epilogue;

  protected:
    float *floats(int64_t count) {
        memory_.emplace_back(new Memory(static_cast<size_t>(count) * sizeof(float), guarded_));
        return memory_.back()->as<float>();
    }
    const float *vector(int64_t count, float low, float high) {
        float *v = floats(count);
        for (int64_t i = 0; i < count; i++) v[i] = random.real(low, high);
        return v;
    }
    const float *maybe(int64_t count) { return random.chance(50) ? vector(count, -2, 2) : nullptr; }
    const float *map(int64_t count) {
        float *x = floats(count);
        const bool specials = random.chance(30);
        for (int64_t i = 0; i < count; i++) {
            x[i] = random.real(-20, 20);
            if (specials && random.next() % 64 == 0) x[i] = special(random);
        }
        return x;
    }
    void fill_norm(int64_t channels) {
        epilogue.norm_scale = maybe(channels);
        if (epilogue.norm_scale) epilogue.norm_shift = vector(channels, -2, 2);
    }
    void fill_activation(int64_t channels) {
        el_epilogue &e = epilogue;
        e.activation = random.between(EL_ACT_NONE, EL_ACT_HARDSWISH);
        if (e.activation == EL_ACT_CLAMP) {
            e.low = random.chance(60) ? 0.0f : random.real(-30, 0);
            e.high = random.chance(40) ? INFINITY : random.real(0, 30);
        } else if (e.activation == EL_ACT_PRELU) {
            e.slope = vector(channels, -1, 1);
            e.act_in = maybe(channels);
            e.act_out = maybe(channels);
        }
    }
    Random random;

  private:
    bool guarded_;
    std::vector<std::unique_ptr<Memory>> memory_;
};

// A case with its data.
class Job : public Data {
  public:
    explicit Job(const Case &given)
        : Data(~static_cast<uint64_t>(given.number), given.guarded), c(given), link(nullptr),
          residual(nullptr) {
        fill_weights();
        epilogue.threshold = random.chance(40) ? nullptr : thresholds();
        fill_input();
        fill_epilogue();
    }

    const Case c;
    std::vector<uint8_t> bits;
    const float *input, *link, *residual;

  private:
    void fill_weights() {
        bits.resize(static_cast<size_t>(c.shape.out_channels) * c.weight_bytes());
        const bool positive = random.chance(50);
        for (uint8_t &byte : bits) {
            byte = static_cast<uint8_t>(random.next());  // and anything past a channel's last bit
            if (c.saturated) byte = positive ? 255 : 0;
        }
    }

    const float *thresholds() {
        float *t = floats(c.shape.in_channels);
        for (int i = 0; i < c.shape.in_channels; i++) {
            t[i] = static_cast<float>(random.between(-2, 2)) / 4;
            if (random.chance(2)) t[i] = special(random);
            if (c.saturated) t[i] = 0.5f;
        }
        return t;
    }

    void fill_input() {
        float *x = floats(c.inputs());
        const float same = random.chance(50) ? 1.0f : -1.0f;
        const bool specials = random.chance(50);
        for (int64_t i = 0; i < c.inputs(); i++) {
            const uint64_t kind = random.next() % 64;
            x[i] = static_cast<float>(random.between(-4, 4)) / 4;  // often a threshold's value
            if (kind < 32) x[i] = random.real(-1, 1);
            if (kind == 32 && specials) x[i] = special(random);
            if (c.saturated) x[i] = same;
        }
        input = x;
    }

    void fill_epilogue() {
        const int64_t channels = c.shape.out_channels;
        el_epilogue &e = epilogue;
        e.scale = maybe(channels);
        e.bias = maybe(channels);
        fill_norm(channels);
        e.link = c.link;
        if (c.link != EL_LINK_NONE) {
            e.gamma = vector(channels, -2, 2);
            e.link_after_norm = random.chance(50);
            e.link_pooled = c.pooled;
            link = map(c.pixels() * c.link_channels() * (c.pooled ? 4 : 1));
        }
        if (random.chance(60)) {
            residual = map(c.outputs());
            e.residual_last = random.chance(50);
        }
        fill_activation(channels);
    }
};

// Norm, activation and max pooling, with its data.
class Pooling : public Data {
  public:
    explicit Pooling(long of)
        : Data(static_cast<uint64_t>(of) + 0x5EED00000000u, of / 4 % 2), pool() {
        const bool none = random.chance(15);
        pool.kernel_h = none ? 1 : random.between(1, 4);
        pool.kernel_w = none ? 1 : random.between(1, 4);
        pool.stride_h = none ? 1 : random.between(1, 3);
        pool.stride_w = none ? 1 : random.between(1, 3);
        pool.top = random.between(0, pool.kernel_h - 1);
        pool.left = random.between(0, pool.kernel_w - 1);
        pool.batch = random.between(0, 3);
        pool.channels = random.between(1, 140);
        pool.height = random.between(1, 24);
        pool.width = random.between(1, 24);
        pool.out_height = windows(pool.height, pool.top, pool.kernel_h, pool.stride_h);
        pool.out_width = windows(pool.width, pool.left, pool.kernel_w, pool.stride_w);
        pool.threads = random.between(0, 5);
        fill_norm(pool.channels);
        fill_activation(pool.channels);
        pool.input = map(pool.batch * pool.height * pool.width * pool.channels);
    }
    int64_t outputs() const {
        return pool.batch * pool.out_height * pool.out_width * pool.channels;
    }

    el_pool pool;

  private:
    // As many as see the map, or fewer.
    int64_t windows(int64_t size, int before, int kernel, int stride) {
        const int64_t most = (size + before - 1) / stride + 1;
        const int64_t inside = std::max<int64_t>(1, (size + before - kernel) / stride + 1);
        return random.chance(50) ? most : std::min(most, inside);
    }
};

}  // namespace

#endif
