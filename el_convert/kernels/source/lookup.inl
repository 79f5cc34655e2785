// The inner loop: counting disagreeing signs by table lookup. Included once per instruction set
// that has nothing better.
//
// A byte of the map holds 4 channels of two output pixels. It selects one of 256 tables of 16
// bytes, each holding, for every possible nibble of weights, how many of the 4 signs disagree: for
// the first pixel in the low half of the byte, for the second in the high half. The weights of
// many output channels are the index of one vector lookup.

enum { kChannels = 4, kPixels = 2, kGather = 1, kOutputs = Simd::kBytes, kTile = 2 };
enum { kPeakBytes = 48 };

// Widening bytes to 16 bits by interleaving gives the channels in order.
static int lookup_lane(int index) {
    const int vector = index / Simd::kBytes, inside = index % Simd::kBytes;
    const int half = Simd::kBytes / 2, part = inside % half;
    return vector * Simd::kBytes + part / 8 * 16 + part % 8 + (inside < half ? 0 : 8);
}

// A counter holds 63 times 4; half of a first-level cache of 32 KB holds the weights.
const Counting kCounting = {kChannels, kPixels, kPixels, kGather, 63, 3, 16384, lookup_lane};

// Columns of the map: byte k of each is nibble k of one pixel below nibble k of another, `partner`
// pixels to the right.
static inline void fill_map(const Convolution &conv, const uint8_t *bits, int64_t partner,
                            int64_t columns, uint8_t *__restrict out) {
    const uint8_t *high = bits + partner * conv.pixel_bytes;
    const int64_t count = columns * conv.pixel_bytes;
    for (int64_t i = 0; i < count; i++) {
        out[2 * i] = static_cast<uint8_t>((bits[i] & 15) | (high[i] << 4));
        out[2 * i + 1] = static_cast<uint8_t>((bits[i] >> 4) | (high[i] & 0xF0));
    }
}

// kPairs pixel pairs times kVectors vectors of output channels. A counter of 4 bits holds three
// lookups; then both halves go on to bytes: `both` gets low + 16 * high modulo 256, `high` the
// high halves alone.
template <int kPairs, int kVectors>
static inline void tile(const uint8_t *map, ptrdiff_t pair_step, ptrdiff_t row_bytes,
                        const Chunk *chunk, int chunks, const uint8_t *weight, uint16_t *sums,
                        ptrdiff_t stride, bool first) {
    typedef typename Simd::Bytes Bytes;
    const int block = kVectors * Simd::kBytes;
    for (int n = 0; n < chunks; n++, chunk++) {
        const uint8_t *from = map + chunk->row * row_bytes + chunk->start;
        Bytes both[kPairs][kVectors], high[kPairs][kVectors];
        for (int p = 0; p < kPairs; p++)
            for (int v = 0; v < kVectors; v++) both[p][v] = high[p][v] = Simd::zero();
        int k = 0;
        for (; k + 3 <= chunk->length; k += 3, weight += 3 * block) {
            for (int p = 0; p < kPairs; p++) {
                const uint8_t *pair = from + p * pair_step + k;
                const Bytes t0 = Simd::table(kTables.at[pair[0]]);
                const Bytes t1 = Simd::table(kTables.at[pair[1]]);
                const Bytes t2 = Simd::table(kTables.at[pair[2]]);
                for (int v = 0; v < kVectors; v++) {
                    const uint8_t *w = weight + v * Simd::kBytes;
                    const Bytes counts =
                        Simd::add(Simd::add(Simd::lookup(t0, Simd::load(w)),
                                            Simd::lookup(t1, Simd::load(w + block))),
                                  Simd::lookup(t2, Simd::load(w + 2 * block)));
                    both[p][v] = Simd::add(both[p][v], counts);
                    high[p][v] = Simd::add_high(high[p][v], counts);
                }
            }
        }
        for (; k < chunk->length; k++, weight += block)
            for (int p = 0; p < kPairs; p++) {
                const Bytes t = Simd::table(kTables.at[from[p * pair_step + k]]);
                for (int v = 0; v < kVectors; v++) {
                    const Bytes counts = Simd::lookup(t, Simd::load(weight + v * Simd::kBytes));
                    both[p][v] = Simd::add(both[p][v], counts);
                    high[p][v] = Simd::add_high(high[p][v], counts);
                }
            }
        for (int p = 0; p < kPairs; p++)
            for (int v = 0; v < kVectors; v++) {
                const Bytes low = Simd::sub(both[p][v], Simd::times16(high[p][v]));
                uint16_t *out = sums + 2 * p * stride + v * Simd::kBytes;
                if (first && n == 0) {
                    Simd::template spill<false>(out, low);
                    Simd::template spill<false>(out + stride, high[p][v]);
                } else {
                    Simd::template spill<true>(out, low);
                    Simd::template spill<true>(out + stride, high[p][v]);
                }
            }
    }
}

template <int kVectors>
static void tile_row(const uint8_t *map, ptrdiff_t pair_step, ptrdiff_t row_bytes, int64_t pairs,
                     const Chunk *chunk, int chunks, const uint8_t *weight, uint16_t *sums,
                     ptrdiff_t stride, bool first) {
    int64_t i = 0;
    for (; i + kTile <= pairs; i += kTile)
        tile<kTile, kVectors>(map + i * pair_step, pair_step, row_bytes, chunk, chunks, weight,
                               sums + 2 * i * stride, stride, first);
    for (; i < pairs; i++)
        tile<1, kVectors>(map + i * pair_step, pair_step, row_bytes, chunk, chunks, weight,
                          sums + 2 * i * stride, stride, first);
}
