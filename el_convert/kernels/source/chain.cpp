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

}  // namespace

extern "C" int el_chain_run(const el_chain *chain) {
    const int64_t images = el::max64(1, chain->images);
    for (int64_t first = 0; first < chain->batch; first += images) {
        const Bases bases = {chain->input + first * chain->input_floats, chain->scratch,
                             chain->output + first * chain->output_floats, images};
        const int64_t batch = el::min64(images, chain->batch - first);
        for (int64_t i = 0; i < chain->count; i++)
            if (run_step(chain->steps[i], bases, batch, chain->threads)) return -1;
    }
    return 0;
}
