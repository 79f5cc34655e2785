// Sharing the passes of a training step among threads.
#include "system.h"

using namespace el;

namespace {

struct Shared {
    const el_pass *pass;
    const Isa *isa;
    int64_t next;
};

void pass_through(void *data) {
    Shared *shared = static_cast<Shared *>(data);
    const el_pass &pass = *shared->pass;
    for (;;) {
        const int64_t block = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
        if (block * pass.block >= pass.outer) break;
        shared->isa->pass(pass, block * pass.block, min64((block + 1) * pass.block, pass.outer));
    }
}

}  // namespace

extern "C" int el_pass_run(const el_pass *pass, const char *isa) {
    const Isa *found = find_isa(isa);
    if (!found) return -1;
    Shared shared = {pass, found, 0};
    const int64_t blocks = (pass->outer + pass->block - 1) / pass->block;
    const unsigned threads = static_cast<unsigned>(max64(1, min64(pass->threads, blocks)));
    if (threads > 1 && parallel) parallel(pass_through, &shared, threads, 0);
    else pass_through(&shared);
    return 0;
}
