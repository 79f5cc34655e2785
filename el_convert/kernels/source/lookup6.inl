// The inner loop: counting disagreeing signs by lookups in tables of 64 bytes. Included once per
// instruction set that permutes that many.
//
// A byte of the map holds 6 channels of one pixel. It selects one of 64 tables of 64 bytes, each
// holding, for every 6 bits of weights, how many signs disagree. The weights of 64 output channels
// are the index of one permutation.

enum { kChannels = 6, kPixels = 1, kTile = 4, kPeakChunks = 2 };
// A counter holds 42 times 6; the weights are read ahead from the second-level cache.
const Lookup kLookup = {kChannels, kPixels, 42, 1, 49152};

// Columns of the map: byte k of each is the signs of channels 6 k to 6 k + 5.
static inline void fill_map(const Convolution &conv, const uint8_t *bits, int64_t,
                            int64_t columns, uint8_t *out) {
    for (int64_t i = 0; i < columns; i++, bits += conv.pixel_bytes, out += conv.units) {
        int left = conv.pixel_bytes;
        for (int at = 0; at < conv.units; at += 8, left -= 6) {
            // Eight units at a time. What is read beyond the pixel is masked, what is written
            // beyond it is the next one's.
            uint64_t signs;
            memcpy(&signs, bits + at / 8 * 6, sizeof signs);
            if (left < 6) signs &= (1ull << 8 * left) - 1;
            const uint64_t units = _pdep_u64(signs, 0x3F3F3F3F3F3F3F3Full);
            memcpy(out + at, &units, sizeof units);
        }
    }
}

// One chunk, at most 252 disagreeing signs: kColumns pixels times kVectors vectors of outputs.
template <int kColumns, int kVectors>
static inline void count(const uint8_t *from, ptrdiff_t step, int length, const uint8_t *weight,
                         Simd::Bytes (&total)[kColumns][kVectors]) {
    for (int p = 0; p < kColumns; p++)
        for (int v = 0; v < kVectors; v++) total[p][v] = Simd::zero();
    for (int k = 0; k < length; k++, weight += kVectors * Simd::kBytes) {
        Simd::Bytes own[kVectors];
        for (int v = 0; v < kVectors; v++) own[v] = Simd::load(weight + v * Simd::kBytes);
        for (int p = 0; p < kColumns; p++) {
            const Simd::Bytes table = Simd::load(kTables.six[from[p * step + k]]);
            for (int v = 0; v < kVectors; v++)
                total[p][v] = Simd::add(total[p][v], Simd::lookup64(table, own[v]));
        }
    }
}

// Two chunks at a time, so that sums in memory are read and written half as often.
template <int kColumns, int kVectors>
static inline void tile(const uint8_t *map, ptrdiff_t column_step, ptrdiff_t row_bytes,
                        const Chunk *chunk, int chunks, const uint8_t *weight, uint16_t *sums,
                        ptrdiff_t stride, bool first) {
    const ptrdiff_t block = kVectors * Simd::kBytes;
    for (int n = 0; n < chunks; n += 2, first = false) {
        Simd::Bytes one[kColumns][kVectors], two[kColumns][kVectors];
        for (int i = 0; i < 2; i++) {
            // Without a second chunk, one of no length.
            const Chunk &own = chunk[n + i < chunks ? n + i : n];
            const int length = n + i < chunks ? own.length : 0;
            count<kColumns, kVectors>(map + own.row * row_bytes + own.start, column_step, length,
                                      weight, i ? two : one);
            weight += length * block;
        }
        for (int p = 0; p < kColumns; p++)
            for (int v = 0; v < kVectors; v++) {
                uint16_t *out = sums + p * stride + v * Simd::kBytes;
                if (first) Simd::template spill_both<false>(out, one[p][v], two[p][v]);
                else Simd::template spill_both<true>(out, one[p][v], two[p][v]);
            }
    }
}

template <int kVectors>
static void tile_row(const uint8_t *map, ptrdiff_t column_step, ptrdiff_t row_bytes,
                     int64_t columns, const Chunk *chunk, int chunks, const uint8_t *weight,
                     uint16_t *sums, ptrdiff_t stride, bool first) {
    const int kWide = kVectors == 1 ? 2 * kTile : kTile;
    int64_t i = 0;
    for (; i + kWide <= columns; i += kWide)
        tile<kWide, kVectors>(map + i * column_step, column_step, row_bytes, chunk, chunks, weight,
                              sums + i * stride, stride, first);
    for (; i + 2 <= columns; i += 2)
        tile<2, kVectors>(map + i * column_step, column_step, row_bytes, chunk, chunks, weight,
                          sums + i * stride, stride, first);
    for (; i < columns; i++)
        tile<1, kVectors>(map + i * column_step, column_step, row_bytes, chunk, chunks, weight,
                          sums + i * stride, stride, first);
}
