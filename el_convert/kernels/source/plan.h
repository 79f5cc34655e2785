// What the files of the engine share: a prepared convolution and the work of one strip.
#ifndef EL_CONVERT_PLAN_H
#define EL_CONVERT_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "engine.h"

namespace el {

constexpr int kRunPixels = 16;

// How an instruction set counts: each byte of the map selects a table, each byte of weights is an
// index into it.
struct Lookup {
    int channels;    // input channels that one lookup counts
    int pixels;      // output pixels whose channels share a byte of the map
    int most;        // lookups that a byte counter holds
    int multiple;    // of the lookups of a chunk, where possible
    int slab_bytes;  // of weights that are walked over all pixels of a strip before the next ones
};

// A run of lookups that is contiguous in the activations' map and in the weights.
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
    int units;                  // lookups of one tap: bytes of the map for each of its columns
    int taps, depth;            // KH * KW; taps * units
    int block, blocks;          // output channels side by side; blocks per group
    int padded_out;             // blocks * block
    int plane;                  // padded_out of all groups
    bool depthwise, pointwise;
    Chunk *chunks;
    int chunk_count;
    uint8_t *weight;  // [group][block][depth][block bytes]: a lookup each; depthwise [tap][C]
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
    Lookup lookup;
    void (*strip)(const Work &work, const Strip &strip, uint8_t *scratch);
    void (*pool)(const el_epilogue &epilogue, const el_pool &pool, int64_t image, int64_t begin,
                 int64_t end, float *rows);
    double (*peak)(int rounds);
};

// How many signs disagree. Filled in by a file that runs on every machine.
struct alignas(64) Tables {
    uint8_t four[256][16];  // of 4, for each pair of pixels' nibbles and each nibble of weights
    uint8_t six[64][64];    // of 6
    Tables();
};

extern const Tables kTables;
extern const Isa kAvx512Vbmi, kAvx512, kAvx2, kNeon, kPortable;

Scratch scratch_layout(const Convolution &conv, const Strip &strip);

// Where output channel `index` of a block lives in its vectors, so that widening bytes to 16 bits
// by interleaving gives the channels in order.
inline int lane_of(int index, int width) {
    const int vector = index / width, inside = index % width, half = width / 2;
    const int part = inside % half;
    return vector * width + (part / 8) * 16 + part % 8 + (inside < half ? 0 : 8);
}

// The next multiple.
inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace el
#endif
