// Compares the engine with plain loops, over random shapes and epilogues, on every instruction set
// that this machine runs.
//
//     check [CASES [FIRST [ISA]]]
//
// A case depends on nothing but its number: `check 1 4711` repeats number 4711 alone. One line per
// instruction set; the exit status is 1 where anything differs. See .ci/engine-check.
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "tools.h"

// Present where a sanitizer is: what it calls before it ends the process.
extern "C" void __sanitizer_set_death_callback(void (*)(void)) __attribute__((weak));

namespace {

const long kDefaultCases = 3000;
const int kShownPerIsa = 5;  // mismatches that are printed
const double kTolerance = 1e-5;
const double kSmallest = 1e-37;  // below it floats are not that exact
const float kUnwritten = 1.25e30f;  // what outputs hold before a call

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

// For crashes.
char doing[512];

void tell_case() {
    const ssize_t written = write(2, doing, strlen(doing));
    doing[0] = 0;  // other threads may crash too
    (void)written;
}

void crashed(int number) {
    tell_case();
    signal(number, SIG_DFL);
    raise(number);
}

void watch_for_crashes() {
    if (__sanitizer_set_death_callback) {
        __sanitizer_set_death_callback(tell_case);
        return;
    }
    const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
    for (int number : signals) signal(number, crashed);
}

// ---- Cases

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

// ---- What is expected

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

// ---- Running the engine

struct Tally {
    const char *isa;
    long cases, threaded, wrong;
    int64_t values;

    void report(const std::string &what, const std::string &where) {
        if (++wrong <= kShownPerIsa)
            fprintf(stderr, "%s: %s\n    %s\n", isa, what.c_str(), where.c_str());
    }
    void report(const Case &c, const std::string &what) { report(what, describe(c)); }
};

struct PoolThread {
    void (*work)(void *);
    void *data;
};

void *run_pool_thread(void *given) {
    const PoolThread *thread = static_cast<const PoolThread *>(given);
    thread->work(thread->data);
    return nullptr;
}

pthread_t start_thread(void *(*run)(void *), void *data) {
    pthread_t thread;
    const int error = pthread_create(&thread, nullptr, run, data);
    if (error) {
        fprintf(stderr, "pthread_create: %s\n", strerror(error));
        exit(3);
    }
    return thread;
}

long pool_calls;
unsigned pool_most;

// GOMP_parallel's interface: the caller is one of the threads.
void run_in_pool(void (*work)(void *), void *data, unsigned threads, unsigned) {
    __atomic_fetch_add(&pool_calls, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&pool_most, threads, __ATOMIC_RELAXED);
    PoolThread shared = {work, data};
    std::vector<pthread_t> others;
    for (unsigned i = 1; i < threads; i++) others.push_back(start_thread(run_pool_thread, &shared));
    work(data);
    for (pthread_t other : others) pthread_join(other, nullptr);
}

// One call; runs in a thread of its own where several calls share a convolution.
struct Run {
    const void *convolution;
    const el_epilogue *epilogue;
    el_call call;
    std::unique_ptr<Memory> output;
    int status;

    Run(const Job &job, const void *prepared, const el_epilogue &what_follows)
        : convolution(prepared), epilogue(&what_follows), call(), status(-2) {
        const Case &c = job.c;
        const size_t count = static_cast<size_t>(c.outputs());
        output.reset(new Memory(count * sizeof(float), c.guarded));
        std::fill_n(values(), count, kUnwritten);
        call.input = job.input;
        call.link = job.link;
        call.residual = job.residual;
        call.output = values();
        call.batch = c.batch;
        call.height = c.height;
        call.width = c.width;
        call.out_height = c.out_height;
        call.out_width = c.out_width;
        call.threads = c.threads;
    }
    float *values() const { return output->as<float>(); }
    void operator()() { status = el_run(convolution, epilogue, &call); }
};

void *run_apart(void *given) {
    (*static_cast<Run *>(given))();
    return nullptr;
}

std::string place(const Case &c, size_t index) {
    const int64_t at = static_cast<int64_t>(index), pixel = at / c.shape.out_channels;
    char text[120];
    snprintf(text, sizeof text, "output[%ld][%ld][%ld][%ld]",
             static_cast<long>(pixel / (c.out_height * c.out_width)),
             static_cast<long>(pixel / c.out_width % c.out_height),
             static_cast<long>(pixel % c.out_width), static_cast<long>(at % c.shape.out_channels));
    return text;
}

std::string mismatch(const Case &c, size_t index, float got, double wanted) {
    char text[200];
    snprintf(text, sizeof text, "%s is %.9g, not %.9g", place(c, index).c_str(),
             static_cast<double>(got), wanted);
    return text;
}

void check_sums(const Job &job, const void *convolution, const std::vector<int32_t> &expected,
                Tally *tally) {
    el_epilogue none = {};
    none.threshold = job.epilogue.threshold;
    Run run(job, convolution, none);
    run.call.link = run.call.residual = nullptr;
    run();
    if (run.status) return tally->report(job.c, "el_run has no memory");
    for (size_t i = 0; i < expected.size(); i++)
        if (run.values()[i] != static_cast<float>(expected[i]))
            return tally->report(job.c, "sum: " + mismatch(job.c, i, run.values()[i], expected[i]));
    tally->values += static_cast<int64_t>(expected.size());
}

void check_outputs(const Job &job, const void *convolution, const std::vector<Estimate> &expected,
                   Tally *tally) {
    Run run(job, convolution, job.epilogue);
    run();
    if (run.status) return tally->report(job.c, "el_run has no memory");
    for (size_t i = 0; i < expected.size(); i++)
        if (!agrees(run.values()[i], expected[i]))
            return tally->report(
                job.c, "epilogue: " + mismatch(job.c, i, run.values()[i], expected[i].value));
    tally->values += static_cast<int64_t>(expected.size());
    if (job.c.number % 8) return;
    // Several calls of one convolution at once.
    std::vector<std::unique_ptr<Run>> runs;
    std::vector<pthread_t> threads;
    for (int i = 0; i < 3; i++) {
        runs.emplace_back(new Run(job, convolution, job.epilogue));
        runs.back()->call.threads = i + 1;
    }
    for (const auto &one : runs) threads.push_back(start_thread(run_apart, one.get()));
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
    for (const auto &one : runs)
        if (one->status || memcmp(one->values(), run.values(), expected.size() * sizeof(float)))
            return tally->report(job.c, "several calls at once differ from one alone");
}

void check_case(const Job &job, const std::vector<int32_t> &sums,
                const std::vector<Estimate> &outputs, Tally *tally) {
    const Case &c = job.c;
    snprintf(doing, sizeof doing, "%s: crashed\n    %s\n", tally->isa, describe(c).c_str());
    void *convolution;
    {
        const Memory weight(job.bits.size(), c.guarded);  // the engine keeps none of it
        memcpy(weight.as<uint8_t>(), job.bits.data(), job.bits.size());
        convolution = el_create(&c.shape, weight.as<uint8_t>(), tally->isa);
    }
    tally->cases++;
    if (!convolution != c.refused())
        return tally->report(c, convolution ? "el_create takes it" : "el_create refuses it");
    if (!convolution) return;
    el_set_parallel(c.pool ? reinterpret_cast<void *>(run_in_pool) : nullptr, nullptr);
    pool_calls = 0;
    check_sums(job, convolution, sums, tally);
    if (pool_calls && (pool_most < 2 || pool_most > static_cast<unsigned>(c.threads)))
        tally->report(c, "not as many threads as asked for");
    tally->threaded += pool_calls > 0;
    check_outputs(job, convolution, outputs, tally);
    el_destroy(convolution);
}

void check_pooling(const Pooling &job, const std::vector<Estimate> &expected, long number,
                   Tally *tally) {
    el_pool pool = job.pool;
    char text[300];
    snprintf(text, sizeof text,
             "case %ld, pooling: kernel %dx%d, stride %dx%d, top %d, left %d, input %ld x %ldx%ld, "
             "output %ldx%ld, %ld channels, threads %d",
             number, pool.kernel_h, pool.kernel_w, pool.stride_h, pool.stride_w, pool.top,
             pool.left, static_cast<long>(pool.batch), static_cast<long>(pool.height),
             static_cast<long>(pool.width), static_cast<long>(pool.out_height),
             static_cast<long>(pool.out_width), static_cast<long>(pool.channels), pool.threads);
    snprintf(doing, sizeof doing, "%s: crashed\n    %s\n", tally->isa, text);
    const Memory output(expected.size() * sizeof(float), number / 4 % 2);
    pool.output = output.as<float>();
    std::fill_n(pool.output, expected.size(), kUnwritten);
    if (el_pool_run(&job.epilogue, &pool, tally->isa))
        return tally->report("el_pool_run has no memory", text);
    for (size_t i = 0; i < expected.size(); i++)
        if (!agrees(pool.output[i], expected[i])) {
            char what[100];
            snprintf(what, sizeof what, "value %ld is %.9g, not %.9g", static_cast<long>(i),
                     static_cast<double>(pool.output[i]), expected[i].value);
            return tally->report(what, text);
        }
    tally->values += static_cast<int64_t>(expected.size());
}

void check_refusals(Tally *tally) {
    static const el_geometry refused[] = {
        {0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {3, 4, 2, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {4, 3, 2, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, -1, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, -1, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, -1},
        {65536, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {8, 8, 8, 16, 16, 1, 1, 1, 1, 0, 0, 0, 0},
        {8, 8, 1, 65536, 65536, 1, 1, 1, 1, 0, 0, 0, 0},
    };
    const std::vector<uint8_t> weight(65536, 0);
    for (const el_geometry &shape : refused) {
        void *made = el_create(&shape, weight.data(), tally->isa);
        if (!made) continue;
        fprintf(stderr, "%s: el_create takes a bad shape, number %d\n", tally->isa,
                static_cast<int>(&shape - refused));
        tally->wrong++;
        el_destroy(made);
    }
    // Without a name the engine chooses, by how many output channels there are.
    for (int channels = 8; channels <= 128; channels *= 2) {
        const el_geometry shape = {channels, channels, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0};
        void *made = el_create(&shape, weight.data(), nullptr);
        tally->wrong += !made;
        el_destroy(made);
        made = el_create(&shape, weight.data(), "none");
        tally->wrong += made != nullptr;
        el_destroy(made);
    }
    tally->wrong += !(el_peak(tally->isa, 2) > 0);
}

void check_convolution(long number, std::vector<Tally> *tallies) {
    const Job job(make_case(number));
    std::vector<int32_t> sums;
    std::vector<Estimate> outputs;
    if (!job.c.refused()) sums = expected_sums(job);
    outputs.reserve(sums.size());
    for (size_t i = 0; i < sums.size(); i++) {
        const int64_t at = static_cast<int64_t>(i), channels = job.c.shape.out_channels;
        outputs.push_back(
            expected_output(job, sums[i], at / channels, static_cast<int>(at % channels)));
    }
    for (Tally &tally : *tallies) check_case(job, sums, outputs, &tally);
}

void check_pooling(long number, std::vector<Tally> *tallies) {
    const Pooling job(number);
    std::vector<Estimate> expected;
    for (int64_t i = 0; i < job.outputs(); i++) expected.push_back(expected_maximum(job, i));
    for (Tally &tally : *tallies) check_pooling(job, expected, number, &tally);
}

long number_from(const char *text) {
    char *end;
    errno = 0;
    const long number = strtol(text, &end, 10);
    if (errno || *end || end == text || number < 0) {
        fprintf(stderr, "usage: check [CASES [FIRST [ISA]]]\n");
        exit(2);
    }
    return number;
}

}  // namespace

int main(int count, char **given) {
    const long cases = count > 1 ? number_from(given[1]) : kDefaultCases;
    const long first = count > 2 ? number_from(given[2]) : 0;
    const char *only = count > 3 ? given[3] : nullptr;
    std::vector<Tally> tallies;
    for (int i = 0; const char *name = el_isa_name(i); i++) {
        if (only && strcmp(only, name)) continue;
        const Tally tally = {name, 0, 0, 0, 0};
        tallies.push_back(tally);
    }
    if (tallies.empty() || el_abi() != EL_ABI) {
        fprintf(stderr, "%s\n", only ? "no such instruction set here" : "a broken build");
        return 2;
    }
    watch_for_crashes();
    for (Tally &tally : tallies) check_refusals(&tally);
    for (long number = first; number < first + cases; number++) {
        check_convolution(number, &tallies);
        if (number % 4 == 3) check_pooling(number, &tallies);
    }
    long wrong = 0;
    for (const Tally &tally : tallies) {
        printf("%-8s %ld cases (%ld in threads), %.1f million values, %ld wrong\n", tally.isa,
               tally.cases, tally.threaded, static_cast<double>(tally.values) * 1e-6, tally.wrong);
        wrong += tally.wrong;
    }
    return wrong != 0;
}
