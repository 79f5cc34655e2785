// Sharing a linear layer's outputs among threads.
#include "system.h"

using namespace el;

namespace {

const int64_t kPiece = 64;  // outputs

struct Shared {
    const el_linear *linear;
    const Isa *isa;
    int64_t pieces;
    Team team;
    int64_t taken[kMostParts];
};

void linear_through(void *data) {
    Shared *shared = static_cast<Shared *>(data);
    const el_linear &linear = *shared->linear;
    Share share(shared->taken, shared->team.parts, shared->team.join(), shared->pieces);
    for (int64_t piece; (piece = share.take()) >= 0;)
        shared->isa->linear(linear, piece * kPiece, min64((piece + 1) * kPiece, linear.out_features));
}

}  // namespace

extern "C" int el_linear_run(const el_linear *linear, const char *isa) {
    const Isa *found = find_isa(isa);
    if (!found) return -1;
    const int64_t pieces = (linear->out_features + kPiece - 1) / kPiece;
    const int64_t threads = max64(1, min64(linear->threads, pieces));
    Shared shared = {linear, found, pieces, Team(threads), {0}};
    if (threads > 1 && parallel)
        parallel(linear_through, &shared, static_cast<unsigned>(threads), 0);
    else
        linear_through(&shared);
    return 0;
}
