// What the files of the engine share: a prepared convolution and the work of one strip.
#ifndef EL_CONVERT_PLAN_H
#define EL_CONVERT_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "engine.h"
#include "shares.h"

// Arrays of vectors stay in registers only where loops over them are gone.
#if defined(__clang__)
#define EL_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define EL_UNROLL _Pragma("GCC unroll 8")
#else
#define EL_UNROLL
#endif

namespace el {

constexpr int kRunPixels = 16;

// How an instruction set counts disagreeing signs. Weights are laid out in steps, each for a block
// of output channels side by side and for some bytes of the map.
struct Counting {
    int channels;    // input channels in a byte of the map
    int pixels;      // output pixels whose channels share a byte of the map
    int together;    // and of strips: they are cut between as many only
    int gather;      // bytes of the map in a step, and of weights in a step of one output channel
    int most;        // bytes of the map until a counter is full
    int multiple;    // of the bytes counted in one go, where possible
    int slab_bytes;  // of weights that are walked over all pixels of a strip before the next ones
    int (*lane)(int index);  // where an output channel of a block lies in a step
};

// A run of bytes that is contiguous in the activations' map and in the weights.
struct Chunk {
    int32_t row, start;  // in the map, from the first byte that an output pixel sees
    int32_t length;
};

struct Isa;

struct Convolution {
    el_geometry shape;
    const Isa *isa;
    int group_in, group_out;    // channels per group
    int pixel_bytes;            // packed bits of one group of one pixel
    int units;                  // bytes of the map for each of its columns
    int taps, depth;            // KH * KW; steps of a block
    int run, runs;              // bytes of the map that lie side by side; how many such runs
    int block, blocks;          // output channels side by side; blocks per group
    int padded_out;             // blocks * block
    int plane;                  // padded_out of all groups
    bool depthwise, pointwise;
    Chunk *chunks;
    int chunk_count;
    uint8_t *weight;  // [group][block][depth][block][gather]; depthwise [tap][C]
    // Per output channel: the input channels, from one to before another, that a gate's channel is
    // made of; the first alone where channels are repeated.
    int32_t *bin_begin, *bin_end;
    int32_t *lanes;  // [group][padded_out]: of that first one, in the vector's inputs
    // Prefix sums over taps of the number of +1 weights: [KH + 1][KW + 1][plane].
    int32_t *plus;
};

// A rectangle of output pixels that is worked on at once: rows of one image, or, for pointwise
// convolutions, a range of the flattened pixels of all images.
struct Strip {
    int64_t image;
    int64_t row_begin, row_end;
    int64_t begin, end;  // columns
};

struct Work {
    const Convolution *conv;
    const el_epilogue *epilogue;
    const el_call *call;
};

// Byte offsets of what a strip needs in its scratch memory.
struct Scratch {
    int64_t rows, columns;  // of the map
    int64_t row_bytes;      // of the map
    size_t bits, map, sums, init, match, chunks, total;
};

struct Isa {
    const char *name;
    bool (*available)(void);
    int width;      // bytes of a vector
    int max_block;  // output channels side by side
    Counting counting;
    void (*strip)(const Work &work, const Strip &strip, uint8_t *scratch);
    void (*pool)(const el_epilogue &epilogue, const el_pool &pool, int64_t image, int64_t begin,
                 int64_t end, float *rows);
    void (*linear)(const el_linear &linear, int64_t begin, int64_t end);
    void (*pass)(const el_pass &pass, int64_t begin, int64_t end);
    double (*peak)(int rounds);
};

// How many of 4 signs disagree, for each pair of pixels' nibbles and each nibble of weights; see
// lookup.inl. Filled in by a file that runs on every machine.
struct alignas(64) Tables {
    uint8_t at[256][16];
    Tables();
};

extern const Tables kTables;
extern const Isa kAvx512Vpopcntdq, kAvx512, kAvx2, kNeon, kPortable;

// By name, or the best where that is null; null where this machine has none of that name.
const Isa *find_isa(const char *name);

Scratch scratch_layout(const Convolution &conv, const Strip &strip);

// The next multiple.
inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace el
#endif
