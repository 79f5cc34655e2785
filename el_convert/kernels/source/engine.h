// The C interface of the 1-bit convolution engine. Nothing here links to libtorch or to Python.
#ifndef EL_CONVERT_ENGINE_H
#define EL_CONVERT_ENGINE_H

#include <stdint.h>

#if defined(_WIN32)
#define EL_EXPORT __declspec(dllexport)
#else
#define EL_EXPORT __attribute__((visibility("default")))
#endif

#define EL_ABI 11

#ifdef __cplusplus
extern "C" {
#endif

// A convolution's shape, with its zero padding.
typedef struct {
    int32_t in_channels, out_channels, groups;
    int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
    int32_t top, bottom, left, right;
} el_geometry;

// Of C input channels and C' output channels, with C <= C', EXPAND repeats channel floor(c C / C') as
// channel c; with C >= C', MEAN and SUM take channels floor(c C / C') up to ceil((c + 1) C / C').
enum el_link { EL_LINK_NONE, EL_LINK_IDENTITY, EL_LINK_EXPAND, EL_LINK_MEAN, EL_LINK_SUM };
enum el_link_pool { EL_LINK_WHOLE, EL_LINK_AVERAGE, EL_LINK_MAX };
enum el_activation { EL_ACT_NONE, EL_ACT_CLAMP, EL_ACT_PRELU, EL_ACT_SILU, EL_ACT_HARDSWISH };

// What follows the integer sums, in this order and each rounded as torch rounds it:
//   v = sums * scale + bias
//   v = v + gamma * link                    (where link_after_norm is 0)
//   v = v * norm_scale + norm_shift
//   v = v + gamma * link                    (where link_after_norm is 1)
//   v = v + residual                        (where residual_last is 0)
//   v = activation(v), for EL_ACT_PRELU activation(v + act_in) + act_out
//   v = v + residual                        (where residual_last is 1)
// Vectors have one value per output channel; a null pointer leaves the step out.
typedef struct {
    const float *threshold;  // per input channel: the sign of x - threshold is taken
    const float *scale, *bias, *gamma, *norm_scale, *norm_shift, *slope, *act_in, *act_out;
    float low, high;  // of EL_ACT_CLAMP
    int32_t link, link_after_norm, activation, residual_last;
    // An el_link_pool, over windows of 2x2 pixels: el_call.link is then (N, 2 OH, 2 OW, C).
    // Only with as many channels as the output or fewer, or 2 or 4 times as many.
    int32_t link_pooled;
} el_epilogue;

// All feature maps are float32, (N, H, W, C) in memory.
typedef struct {
    const float *input;
    const float *link;      // (N, OH, OW, C_in), or C_out channels for EL_LINK_IDENTITY
    const float *residual;  // (N, OH, OW, C_out) or null
    float *output;          // (N, OH, OW, C_out)
    int64_t batch, height, width, out_height, out_width;
    int32_t threads;
    int32_t reserved;
} el_call;

// Convolutions that follow each other, run for `images` images at a time: the maps between them then
// stay in the caches.
enum el_base { EL_AT_NONE, EL_AT_INPUT, EL_AT_SCRATCH, EL_AT_OUTPUT, EL_AT_STRIP };

typedef struct {
    int32_t base, reserved;
    // In scratch memory for one image, in floats. For EL_AT_STRIP the number of the step that gives
    // the map: it and all that read it are of one group, and the map is never whole.
    int64_t offset;
} el_place;

// See el_call. A residual may lie where the output goes.
//
// A step that `follows` is of one group with the step before it: as soon as that has given some rows
// or pixels, this one is done for them. Such steps are pointwise with stride 1, without padding,
// not depthwise, and read no map of their group at other pixels. Within a group nothing is written
// over that its steps read, but for a residual that only the writing step reads.
typedef struct {
    const void *convolution;
    const el_epilogue *epilogue;
    el_place input, link, residual, output;
    int64_t height, width, out_height, out_width;
    int32_t follows, reserved;
} el_step;

typedef struct {
    const el_step *steps;
    const float *input;
    float *scratch;  // for each slot, images times what the places need for one
    float *output;
    int64_t count, batch, images;         // images: at least 1
    int64_t input_floats, output_floats;  // of an image
    int64_t slot_floats;
    // Threads share the strips of each group; with more than one slot, so many share the images.
    int32_t threads, slots;
} el_chain;

// Norm and activation of a float map, as in el_epilogue, then max pooling; padding is never the
// largest. A kernel of 1x1 with stride 1 pools nothing.
typedef struct {
    const float *input;
    float *output;
    int64_t batch, height, width, channels, out_height, out_width;
    int32_t kernel_h, kernel_w, stride_h, stride_w, top, left;
    int32_t threads, reserved;
} el_pool;

// output = input weight^T + bias, all float32 and contiguous: (N, in), (out, in), (out) or null.
typedef struct {
    const float *input, *weight, *bias;
    float *output;  // (N, out)
    int64_t batch, in_features, out_features;
    int32_t threads, reserved;
} el_linear;

enum el_pass_kind {
    EL_PASS_SIGN,              // out = b(x), +1 where x > 0, else -1
    EL_PASS_SIGN_GRAD,         // out = s(x) g (+ vector), s the surrogate of the sign's derivative
    EL_PASS_SCALED_SIGN,       // out = vector b(x); without a vector sums = mean |x| is the vector
    EL_PASS_SCALED_SIGN_GRAD,  // sums = sum of b(x) g; out = s(x) vector g (+ b(x) sums / inner)
    EL_PASS_PRELU_GRAD,        // out = g where x > 0, else vector g; sums of min(x, 0) g
    EL_PASS_EXPAND,            // out = g + vector repeat(x)
    EL_PASS_EXPAND_GRAD,       // of the second term: out = sum of vector g; sums of repeat(x) g
    EL_PASS_SQUEEZE,           // out = g + vector s(x), s(x) = factor sum(x) goes to `sums`
    EL_PASS_SQUEEZE_GRAD       // x is s(x): out = factor vector repeat(g); sums of x g
};

// A pass over memory of a training step, over maps (outer, channels, inner) of float32, `block`
// of the outer at a time. Signs take every number, of their vector too, for an outer; scaled signs have a channel for
// each outer, and one value in `vector` and `sums`; others have `vector` per channel, and `sums`
// (blocks, channels). Repeating and summing is of `count` neighbouring channels; `channels` are
// those of g.
typedef struct {
    const float *x, *g, *vector;
    float *out, *sums;
    int64_t outer, channels, inner, block;
    int32_t kind;
    int32_t clip;          // s(x) is 1 where |x| <= 1, else 0; otherwise max(2 - 2 |x|, 0)
    int32_t through_mean;  // the vector of EL_PASS_SCALED_SIGN_GRAD is mean |x|
    int32_t threads;
    int32_t count;
    float factor;
} el_pass;

EL_EXPORT int el_abi(void);

// Names of the instruction sets this build knows and this machine runs, best first.
EL_EXPORT const char *el_isa_name(int index);

// Weights: per output channel ceil(C_in / G * KH * KW / 8) bytes, bit (c * KH + y) * KW + x.
// Returns null where there is no fast path for the shape, or no memory.
EL_EXPORT void *el_create(const el_geometry *geometry, const uint8_t *weight, const char *isa);
EL_EXPORT void el_destroy(void *convolution);

// 0, or -1 where there is no memory. Reentrant.
EL_EXPORT int el_run(const void *convolution, const el_epilogue *epilogue, const el_call *call);

// 0, or -1 where there is no memory. Reentrant.
EL_EXPORT int el_chain_run(const el_chain *chain);

// 0, or -1 where there is no memory or the instruction set is unknown (null: the best). Every
// window must see the map.
EL_EXPORT int el_pool_run(const el_epilogue *epilogue, const el_pool *pool, const char *isa);

// 0, or -1 where the instruction set is unknown (null: the best).
EL_EXPORT int el_linear_run(const el_linear *linear, const char *isa);

// 0, or -1 where the instruction set is unknown (null: the best).
EL_EXPORT int el_pass_run(const el_pass *pass, const char *isa);

// The innermost loop alone, on operands that stay in the first-level cache: multiply-adds per
// second, the best of `rounds` timed ones.
EL_EXPORT double el_peak(const char *isa, int rounds);

// torch's own thread pool: the addresses of GOMP_parallel and omp_get_thread_num in the OpenMP runtime
// that torch has loaded. Without the second, threads are numbered as they come.
EL_EXPORT void el_set_parallel(void *gomp_parallel, void *omp_get_thread_num);

#ifdef __cplusplus
}
#endif
#endif
