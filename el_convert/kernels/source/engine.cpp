// Preparing convolutions, cutting calls into strips, and sharing these among threads.
#include "engine.h"

#include "memory.h"
#include "strips.h"
#include "system.h"

namespace el {

const Tables kTables;

namespace {

int ones(int nibble) {
    return (nibble & 1) + (nibble >> 1 & 1) + (nibble >> 2 & 1) + (nibble >> 3 & 1);
}

const Isa *const kIsas[] = {&kAvx512Vpopcntdq, &kAvx512, &kAvx2, &kNeon, &kPortable};
const int kIsaCount = 5;
const int kNarrow = 32;  // output channels that fill half of the widest vector

// The best for a convolution's outputs, where none is asked for by name.
const Isa *choose_isa(const char *name, int outputs, bool depthwise) {
    const Isa *best = find_isa(name);
    if (name || !best || best->width < 64 || outputs > kNarrow) return best;
    const bool narrow = depthwise ? outputs > kNarrow / 2 : best->max_block / 2 > kNarrow;
    return narrow && kAvx2.available() ? &kAvx2 : best;
}

bool bad_shape(const el_geometry &g) {
    if (g.in_channels < 1 || g.out_channels < 1 || g.groups < 1) return true;
    if (g.in_channels % g.groups || g.out_channels % g.groups) return true;
    if (g.kernel_h < 1 || g.kernel_w < 1 || g.stride_h < 1 || g.stride_w < 1) return true;
    if (g.dilation_h < 1 || g.dilation_w < 1 || g.top < 0 || g.left < 0) return true;
    if (g.bottom < 0 || g.right < 0) return true;
    const int64_t taps = static_cast<int64_t>(g.kernel_h) * g.kernel_w;
    const bool depthwise = g.in_channels == g.groups && g.out_channels == g.groups;
    // Sums are counted in 16 bits, those of depthwise convolutions in 8.
    return taps * (g.in_channels / g.groups) > (depthwise ? 255 : 65535);
}

int padded(int channels, int block) { return static_cast<int>(whole(channels, block)); }

// How the bytes that an output pixel sees lie in the map.
void lay_out(Convolution *conv) {
    const el_geometry &g = conv->shape;
    const Counting &counting = conv->isa->counting;
    conv->pixel_bytes = (conv->group_in + 7) / 8;
    conv->units = conv->pixel_bytes * 8 / counting.channels;
    conv->taps = g.kernel_h * g.kernel_w;
    const bool joined = g.dilation_w == 1;
    conv->run = joined ? g.kernel_w * conv->units : conv->units;
    conv->runs = joined ? g.kernel_h : conv->taps;
    conv->depth = conv->runs * ((conv->run + counting.gather - 1) / counting.gather);
}

void choose_block(Convolution *conv) {
    const int outputs = conv->depthwise ? conv->shape.out_channels : conv->group_out;
    const int wide = conv->isa->max_block, narrow = wide / 2;
    const bool waste = padded(outputs, narrow) < padded(outputs, wide);
    conv->block = waste ? narrow : wide;
    if (conv->depthwise) conv->block = padded(outputs, conv->isa->width);  // whole pixels
    conv->padded_out = padded(outputs, conv->block);
    conv->blocks = conv->padded_out / conv->block;
    conv->plane = conv->padded_out * (conv->depthwise ? 1 : conv->shape.groups);
}

// Cuts each run into pieces that byte counters hold, of equal length where possible.
int cut_chunks(const Convolution &conv, Chunk *chunks) {
    const el_geometry &g = conv.shape;
    const Counting &counting = conv.isa->counting;
    const int pieces = (conv.run + counting.most - 1) / counting.most;
    const int length = padded((conv.run + pieces - 1) / pieces, counting.multiple);
    const int columns = conv.runs / g.kernel_h;  // runs of a row: one, unless taps lie apart
    int count = 0;
    for (int run = 0; run < conv.runs; run++)
        for (int at = 0; at < conv.run; at += length, count++) {
            if (!chunks) continue;
            chunks[count].row = run / columns * g.dilation_h;
            chunks[count].start = run % columns * g.dilation_w * conv.units + at;
            chunks[count].length = length < conv.run - at ? length : conv.run - at;
        }
    return count;
}

// Where a weight's sign goes: output channel `m` of a group, input channel `c`, tap `t`.
void place_weight(Convolution *conv, int group, int m, int c, int t) {
    if (conv->depthwise) {
        conv->weight[static_cast<size_t>(t) * conv->padded_out + group] = 1;
        return;
    }
    const Counting &counting = conv->isa->counting;
    const int block = m / conv->block, taps = conv->taps / conv->runs;
    const int byte = t % taps * conv->units + c / counting.channels;
    const size_t step = static_cast<size_t>(group * conv->blocks + block) * conv->depth +
                        static_cast<size_t>(t / taps) * (conv->depth / conv->runs) +
                        byte / counting.gather;
    const size_t lane = step * conv->block + counting.lane(m % conv->block);
    conv->weight[lane * counting.gather + byte % counting.gather] |=
        static_cast<uint8_t>(1 << c % counting.channels);
}

void place_weights(Convolution *conv, const uint8_t *bits) {
    const el_geometry &g = conv->shape;
    const int row_bytes = (conv->group_in * conv->taps + 7) / 8;
    const int wide = g.kernel_w + 1;
    for (int channel = 0; channel < g.out_channels; channel++, bits += row_bytes) {
        const int group = channel / conv->group_out, m = channel % conv->group_out;
        int32_t *plus = conv->plus + (conv->depthwise ? channel : group * conv->padded_out + m);
        for (int c = 0; c < conv->group_in; c++)
            for (int t = 0; t < conv->taps; t++) {
                const int bit = c * conv->taps + t;
                if (!(bits[bit / 8] >> (bit % 8) & 1)) continue;
                place_weight(conv, group, m, c, t);
                const int y = t / g.kernel_w, x = t % g.kernel_w;
                plus[static_cast<ptrdiff_t>((y + 1) * wide + x + 1) * conv->plane]++;
            }
        for (int y = 1; y <= g.kernel_h; y++)
            for (int x = 1; x <= g.kernel_w; x++) {
                int32_t *at = plus + static_cast<ptrdiff_t>(y * wide + x) * conv->plane;
                const ptrdiff_t up = static_cast<ptrdiff_t>(wide) * conv->plane;
                at[0] += at[-conv->plane] + at[-up] - at[-up - conv->plane];
            }
    }
}

// Channel c of C' has a part in floor(c C / C') up to ceil((c + 1) C / C').
void place_bins(Convolution *conv) {
    const int64_t in = conv->shape.in_channels, out = conv->shape.out_channels;
    const int vector = conv->isa->width / static_cast<int>(sizeof(float));
    for (int64_t c = 0; c < out; c++) {
        conv->bin_begin[c] = static_cast<int32_t>(c * in / out);
        conv->bin_end[c] = static_cast<int32_t>(((c + 1) * in + out - 1) / out);
        if (conv->depthwise) continue;
        const int64_t group = c / conv->group_out, m = c % conv->group_out;
        conv->lanes[group * conv->padded_out + m] =
            conv->bin_begin[c] - conv->bin_begin[c - m % vector];
    }
}

bool allocate(Convolution *conv) {
    const el_geometry &g = conv->shape;
    const size_t rows = conv->depthwise
                            ? static_cast<size_t>(conv->taps)
                            : static_cast<size_t>(g.groups) * conv->blocks * conv->depth;
    const size_t width =
        conv->depthwise ? conv->padded_out : conv->block * conv->isa->counting.gather;
    const size_t corners = static_cast<size_t>(g.kernel_h + 1) * (g.kernel_w + 1);
    conv->weight = static_cast<uint8_t *>(calloc(rows, width));
    conv->plus = static_cast<int32_t *>(calloc(corners * conv->plane, sizeof *conv->plus));
    conv->bin_begin = static_cast<int32_t *>(calloc(g.out_channels, sizeof(int32_t)));
    conv->bin_end = static_cast<int32_t *>(calloc(g.out_channels, sizeof(int32_t)));
    conv->lanes = static_cast<int32_t *>(calloc(conv->plane, sizeof(int32_t)));
    conv->chunk_count = cut_chunks(*conv, nullptr);
    conv->chunks = static_cast<Chunk *>(calloc(conv->chunk_count, sizeof *conv->chunks));
    return conv->weight && conv->plus && conv->chunks && conv->bin_begin && conv->bin_end &&
           conv->lanes;
}

struct Shared {
    Work work;
    const Strips *strips;
    Team team;
    int64_t taken[kMostParts];
    int failed;
};

void work_through(void *data) {
    Shared *shared = static_cast<Shared *>(data);
    const Convolution &conv = *shared->work.conv;
    uint8_t *scratch = own_memory.at_least(scratch_layout(conv, shared->strips->largest()).total);
    if (!scratch) {
        __atomic_store_n(&shared->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    Team &team = shared->team;
    Share share(shared->taken, team.parts, team.join(), shared->strips->count());
    for (int64_t index; (index = share.take()) >= 0;)
        conv.isa->strip(shared->work, shared->strips->at(index), scratch);
    own_memory.give_back();
}

struct SharedPool {
    const el_epilogue *epilogue;
    const el_pool *pool;
    const Isa *isa;
    int64_t step;
    Team team;
    int64_t taken[kMostParts];
    int failed;
};

void pool_through(void *data) {
    SharedPool *shared = static_cast<SharedPool *>(data);
    const el_pool &pool = *shared->pool;
    const size_t floats = static_cast<size_t>(pool.kernel_h * pool.out_width * pool.channels);
    float *rows = static_cast<float *>(malloc(floats * sizeof(float)));
    if (!rows) {
        __atomic_store_n(&shared->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    const int64_t per_image = (pool.out_height + shared->step - 1) / shared->step;
    Team &team = shared->team;
    Share share(shared->taken, team.parts, team.join(), per_image * pool.batch);
    for (int64_t index; (index = share.take()) >= 0;) {
        const int64_t begin = index % per_image * shared->step;
        const int64_t end = min64(begin + shared->step, pool.out_height);
        shared->isa->pool(*shared->epilogue, pool, index / per_image, begin, end, rows);
    }
    free(rows);
}

}  // namespace

Parallel parallel = nullptr;
ThreadNumber thread_number = nullptr;

const Isa *find_isa(const char *name) {
    for (int i = 0; i < kIsaCount; i++)
        if (kIsas[i]->available() && (!name || !strcmp(name, kIsas[i]->name))) return kIsas[i];
    return nullptr;
}

Tables::Tables() {
    for (int pair = 0; pair < 256; pair++)
        for (int weights = 0; weights < 16; weights++)
            at[pair][weights] = static_cast<uint8_t>(ones((pair & 15) ^ weights) |
                                                     ones((pair >> 4) ^ weights) << 4);
}

Scratch scratch_layout(const Convolution &conv, const Strip &strip) {
    const el_geometry &g = conv.shape;
    Scratch at = {};
    const int64_t rows = strip.row_end - strip.row_begin;
    const int pixels = conv.depthwise ? 1 : conv.isa->counting.pixels;
    const int64_t width = whole(strip.end - strip.begin, pixels);
    size_t bits = 0, taps = 0;
    if (conv.pointwise) {
        at.rows = 1;
        at.columns = width / pixels;
        at.row_bytes = at.columns * conv.units;
        bits = static_cast<size_t>((width + 1) * conv.pixel_bytes);  // and a partner for the last
    } else {
        const int64_t last = width - pixels;
        at.rows = (rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
        at.columns = last * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1;
        at.row_bytes = at.columns * (conv.depthwise ? conv.padded_out : conv.units);
        if (conv.depthwise) taps = conv.taps * sizeof(ptrdiff_t);
        else bits = static_cast<size_t>((at.columns + g.stride_w) * conv.pixel_bytes);
    }
    size_t end = 0;
    const size_t sizes[] = {
        bits,
        static_cast<size_t>(at.rows * at.row_bytes),
        static_cast<size_t>(rows * width * conv.padded_out) * sizeof(uint16_t),
        conv.padded_out * sizeof(float) * 3,
        conv.padded_out * sizeof(float) * kRunPixels,
        taps,
    };
    size_t *const places[] = {&at.bits, &at.map, &at.sums, &at.init, &at.match, &at.chunks};
    for (int i = 0; i < 6; i++) {
        *places[i] = end;
        end = (end + sizes[i] + 127) / 64 * 64;  // and at least a vector of slack
    }
    at.total = end;
    return at;
}

}  // namespace el

using namespace el;

extern "C" {

int el_abi(void) { return EL_ABI; }

const char *el_isa_name(int index) {
    for (int i = 0; i < kIsaCount; i++)
        if (kIsas[i]->available() && index-- == 0) return kIsas[i]->name;
    return nullptr;
}

void el_set_parallel(void *gomp_parallel, void *omp_get_thread_num) {
    parallel = reinterpret_cast<Parallel>(gomp_parallel);
    thread_number = reinterpret_cast<ThreadNumber>(omp_get_thread_num);
}

void *el_create(const el_geometry *geometry, const uint8_t *weight, const char *isa) {
    if (bad_shape(*geometry)) return nullptr;
    const el_geometry &g = *geometry;
    const bool depthwise = g.in_channels == g.groups && g.out_channels == g.groups;
    const int outputs = depthwise ? g.out_channels : g.out_channels / g.groups;
    const Isa *found = choose_isa(isa, outputs, depthwise);
    Convolution *conv = static_cast<Convolution *>(calloc(1, sizeof(Convolution)));
    if (!found || !conv) {
        free(conv);
        return nullptr;
    }
    conv->shape = g;
    conv->isa = found;
    conv->depthwise = depthwise;
    const bool padded = g.top || g.bottom || g.left || g.right;
    conv->pointwise = !depthwise && g.kernel_h == 1 && g.kernel_w == 1 && !padded;
    conv->group_in = g.in_channels / g.groups;
    conv->group_out = g.out_channels / g.groups;
    lay_out(conv);
    choose_block(conv);
    if (!allocate(conv)) {
        el_destroy(conv);
        return nullptr;
    }
    cut_chunks(*conv, conv->chunks);
    place_weights(conv, weight);
    place_bins(conv);
    return conv;
}

void el_destroy(void *convolution) {
    Convolution *conv = static_cast<Convolution *>(convolution);
    if (!conv) return;
    free(conv->chunks);
    free(conv->weight);
    free(conv->plus);
    free(conv->bin_begin);
    free(conv->bin_end);
    free(conv->lanes);
    free(conv);
}

int el_run(const void *convolution, const el_epilogue *epilogue, const el_call *call) {
    const Convolution *conv = static_cast<const Convolution *>(convolution);
    if (!call->batch || !call->out_height || !call->out_width) return 0;
    const Strips strips(*conv, call->batch, call->out_height, call->out_width, call->threads);
    const unsigned threads = static_cast<unsigned>(max64(1, min64(call->threads, strips.count())));
    Shared shared = {{conv, epilogue, call}, &strips, Team(threads), {0}, 0};
    if (threads > 1 && parallel) parallel(work_through, &shared, threads, 0);
    else work_through(&shared);
    return shared.failed ? -1 : 0;
}

int el_pool_run(const el_epilogue *epilogue, const el_pool *pool, const char *isa) {
    const Isa *found = find_isa(isa);
    if (!found) return -1;
    const int64_t threads = max64(1, min64(pool->threads, pool->batch * pool->out_height));
    const int64_t step = max64(1, (pool->batch * pool->out_height + threads - 1) / threads);
    SharedPool shared = {epilogue, pool, found, min64(step, max64(pool->out_height, 1)),
                         Team(threads), {0}, 0};
    if (threads > 1 && parallel)
        parallel(pool_through, &shared, static_cast<unsigned>(threads), 0);
    else
        pool_through(&shared);
    return shared.failed ? -1 : 0;
}

double el_peak(const char *isa, int rounds) {
    const Isa *found = find_isa(isa);
    return found ? found->peak(rounds) : 0;
}

}  // extern "C"
