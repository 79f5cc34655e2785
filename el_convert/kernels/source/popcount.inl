// The inner loop: counting disagreeing signs by instructions that count ones. Included once per
// instruction set that has them for vectors.
//
// A byte of the map holds 8 channels of one pixel. Four at a time are compared with those of 16
// output channels' weights, side by side in a vector.

enum { kChannels = 8, kPixels = 1, kGather = 4, kOutputs = 16, kTile = 4, kPeakBytes = 168 };
enum { kWideTile = 7 };  // its counts fill the registers

// Two vectors of 32-bit counts become one of 16 bits, half a lane from either.
static int popcount_lane(int index) {
    const int vector = index / 32 * 2 + index % 8 / 4;
    return vector * 16 + index % 32 / 8 * 4 + index % 4;
}

// Counts do not overflow: a run is never cut. Weights are read ahead from the second-level cache.
const Counting kCounting = {kChannels, kPixels, kWideTile, kGather, 1 << 30, 1, 65536, popcount_lane};

// Columns of the map: the bits as they are.
static inline void fill_map(const Convolution &conv, const uint8_t *bits, int64_t, int64_t columns,
                            uint8_t *out) {
    memcpy(out, bits, static_cast<size_t>(columns * conv.pixel_bytes));
}

template <int kColumns, int kVectors>
static inline void count_step(const uint8_t *from, ptrdiff_t column_step, uint32_t mask,
                              const uint8_t *weight, Simd::Bytes (&total)[kColumns][kVectors]) {
    for (int p = 0; p < kColumns; p++) {
        uint32_t signs;
        memcpy(&signs, from + p * column_step, sizeof signs);
        const Simd::Bytes repeated = Simd::repeat(signs & mask);
        for (int v = 0; v < kVectors; v++) {
            const Simd::Bytes own = Simd::load(weight + v * Simd::kBytes);
            total[p][v] = Simd::add_ones(total[p][v], Simd::differ(repeated, own));
        }
    }
}

template <bool kAdd, int kColumns, int kVectors>
static inline void store_tile(const Simd::Bytes (&total)[kColumns][kVectors], uint16_t *sums,
                              ptrdiff_t stride) {
    EL_UNROLL
    for (int p = 0; p < kColumns; p++)
        EL_UNROLL
        for (int v = 0; v < kVectors; v += 2)
            Simd::template store_counts<kAdd>(sums + p * stride + v * kOutputs, total[p][v],
                                              total[p][v + 1]);
}

template <int kColumns, int kVectors>
static inline void tile(const uint8_t *map, ptrdiff_t column_step, ptrdiff_t row_bytes,
                        const Chunk *chunk, int chunks, const uint8_t *weight, uint16_t *sums,
                        ptrdiff_t stride, bool first) {
    const ptrdiff_t block = kVectors * Simd::kBytes;
    Simd::Bytes total[kColumns][kVectors];
    EL_UNROLL
    for (int p = 0; p < kColumns; p++)
        EL_UNROLL
        for (int v = 0; v < kVectors; v++) total[p][v] = Simd::zero();
    for (int n = 0; n < chunks; n++, chunk++) {
        const uint8_t *from = map + chunk->row * row_bytes + chunk->start;
        int k = 0;
        for (; k + kGather <= chunk->length; k += kGather, weight += block)
            count_step(from + k, column_step, ~0u, weight, total);
        if (k == chunk->length) continue;
        // What lies beyond the run is another pixel's.
        count_step(from + k, column_step, (1u << 8 * (chunk->length - k)) - 1, weight, total);
        weight += block;
    }
    if (first) store_tile<false, kColumns, kVectors>(total, sums, stride);
    else store_tile<true, kColumns, kVectors>(total, sums, stride);
}

template <int kVectors>
static void tile_row(const uint8_t *map, ptrdiff_t column_step, ptrdiff_t row_bytes,
                     int64_t columns, const Chunk *chunk, int chunks, const uint8_t *weight,
                     uint16_t *sums, ptrdiff_t stride, bool first) {
    int64_t i = 0;
    // Without a remainder, which leaves much of the processor idle: 7, 14, 28 and 56 columns.
    for (; columns % kWideTile == 0 && i < columns; i += kWideTile)
        tile<kWideTile, kVectors>(map + i * column_step, column_step, row_bytes, chunk, chunks,
                                  weight, sums + i * stride, stride, first);
    for (; i + kTile <= columns; i += kTile)
        tile<kTile, kVectors>(map + i * column_step, column_step, row_bytes, chunk, chunks, weight,
                              sums + i * stride, stride, first);
    for (; i + 2 <= columns; i += 2)
        tile<2, kVectors>(map + i * column_step, column_step, row_bytes, chunk, chunks, weight,
                          sums + i * stride, stride, first);
    if (i < columns)
        tile<1, kVectors>(map + i * column_step, column_step, row_bytes, chunk, chunks, weight,
                          sums + i * stride, stride, first);
}
