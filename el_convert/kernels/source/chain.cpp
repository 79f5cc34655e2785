// Convolutions one after the other in one call: maps between them are places in scratch memory.
#include "plan.h"

namespace {

struct Bases {
    const float *input;
    float *scratch, *output;
    int64_t images;  // that the places in scratch memory are for
};

float *place_of(const Bases &bases, const el_place &place) {
    switch (place.base) {
        case EL_AT_INPUT: return const_cast<float *>(bases.input);  // steps do not write there
        case EL_AT_SCRATCH: return bases.scratch + place.offset * bases.images;
        case EL_AT_OUTPUT: return bases.output;
        default: return nullptr;
    }
}

int run_step(const el_step &step, const Bases &bases, int64_t batch, int32_t threads) {
    el_call call = {};
    call.input = place_of(bases, step.input);
    call.link = place_of(bases, step.link);
    call.residual = place_of(bases, step.residual);
    call.output = place_of(bases, step.output);
    call.batch = batch;
    call.height = step.height, call.width = step.width;
    call.out_height = step.out_height, call.out_width = step.out_width;
    call.threads = threads;
    return el_run(step.convolution, step.epilogue, &call);
}

// Steps for some images, with the scratch memory of one slot.
int run_images(const el_chain &chain, int64_t first, int64_t slot, int32_t threads) {
    const Bases bases = {chain.input + first * chain.input_floats,
                         chain.scratch + slot * chain.slot_floats,
                         chain.output + first * chain.output_floats, chain.images};
    const int64_t batch = el::min64(chain.images, chain.batch - first);
    for (int64_t i = 0; i < chain.count; i++)
        if (run_step(chain.steps[i], bases, batch, threads)) return -1;
    return 0;
}

struct Shared {
    const el_chain *chain;
    int64_t next, slot;
    int failed;
};

// One thread's share: it goes through all layers by itself, and waits for nobody in between.
void work_through(void *data) {
    Shared *shared = static_cast<Shared *>(data);
    const el_chain &chain = *shared->chain;
    const int64_t slot = __atomic_fetch_add(&shared->slot, 1, __ATOMIC_RELAXED);
    for (;;) {
        const int64_t first = __atomic_fetch_add(&shared->next, chain.images, __ATOMIC_RELAXED);
        if (first >= chain.batch) return;
        if (run_images(chain, first, slot, 1))
            __atomic_store_n(&shared->failed, 1, __ATOMIC_RELAXED);
    }
}

}  // namespace

extern "C" int el_chain_run(const el_chain *chain) {
    if (chain->slots > 1 && el::parallel) {
        Shared shared = {chain, 0, 0, 0};
        el::parallel(work_through, &shared, static_cast<unsigned>(chain->slots), 0);
        return shared.failed ? -1 : 0;
    }
    for (int64_t first = 0; first < chain->batch; first += chain->images)
        if (run_images(*chain, first, 0, chain->threads)) return -1;
    return 0;
}
