// Convolutions one after the other in one call: maps between them are places in scratch memory.
//
// A group of steps is worked on strip by strip: a strip of the first step's output, then what the
// pointwise steps after it make of it while it is in the cache.
#include "memory.h"
#include "strips.h"
#include "system.h"

namespace el {
namespace {

const int kSpins = 2000;  // before a waiting thread lets others run

const Convolution &convolution_of(const el_step &step) {
    return *static_cast<const Convolution *>(step.convolution);
}

// What threads share that run the steps for some images.
struct Job {
    const el_chain *chain;
    const float *input;
    float *scratch, *output;
    int64_t batch, threads;
    Team team;
    int64_t *taken;  // for each group and part of the team
    int64_t done;    // strips of all groups
    int failed;
};

// Steps from `first` to `last`, without that.
struct Group {
    const Job *job;
    int64_t first, last;
    Strips strips;

    Group(const Job &of, int64_t begin)
        : job(&of), first(begin), last(end_of(of, begin)), strips(cut()) {}

    const el_step &step(int64_t index) const { return job->chain->steps[index]; }

    // In its output, of all images.
    int64_t first_pixel(const Strip &strip) const {
        if (convolution_of(step(first)).pointwise) return strip.begin;
        return (strip.image * step(first).out_height + strip.row_begin) * step(first).out_width;
    }

    static int64_t pixels(const Strip &strip) {
        return (strip.row_end - strip.row_begin) * (strip.end - strip.begin);
    }

    // Where a strip's map of step `index` lies in the thread's memory, in floats; for `last`, the
    // size of all of them.
    int64_t strip_offset(int64_t index) const {
        const int64_t most = pixels(strips.largest());
        int64_t at = 0;
        for (int64_t i = first; i < index; i++)
            if (step(i).output.base == EL_AT_STRIP)
                at += whole(most * convolution_of(step(i)).shape.out_channels, 16);
        return at;
    }

    // Pixels of a pointwise step that are done at once.
    Strips parts(int64_t index, int64_t count) const {
        return Strips(convolution_of(step(index)), 1, 1, count, 1);
    }

    // Bytes of scratch for any of the steps.
    size_t scratch_bytes() const {
        size_t most = scratch_layout(convolution_of(step(first)), strips.largest()).total;
        for (int64_t i = first + 1; i < last; i++) {
            const Strip part = parts(i, pixels(strips.largest())).largest();
            const size_t bytes = scratch_layout(convolution_of(step(i)), part).total;
            if (bytes > most) most = bytes;
        }
        return most;
    }

  private:
    static int64_t end_of(const Job &job, int64_t begin) {
        int64_t end = begin + 1;
        while (end < job.chain->count && job.chain->steps[end].follows) end++;
        return end;
    }

    Strips cut() const {
        const el_step &head = step(first);
        return Strips(convolution_of(head), job->batch, head.out_height, head.out_width,
                      job->threads);
    }
};

// A map as if it were whole: in a strip's memory lies what begins with `pixel`.
float *place_of(const Group &group, const el_place &place, int64_t pixel, float *strip_maps) {
    const Job &job = *group.job;
    switch (place.base) {
        case EL_AT_INPUT: return const_cast<float *>(job.input);  // steps do not write there
        case EL_AT_SCRATCH: return job.scratch + place.offset * job.chain->images;
        case EL_AT_OUTPUT: return job.output;
        case EL_AT_STRIP: {
            const int64_t channels = convolution_of(group.step(place.offset)).shape.out_channels;
            return strip_maps + group.strip_offset(place.offset) - pixel * channels;
        }
        default: return nullptr;
    }
}

void run_strip(const Group &group, int64_t index, uint8_t *scratch, float *strip_maps) {
    const Strip strip = group.strips.at(index);
    const int64_t pixel = group.first_pixel(strip);
    for (int64_t i = group.first; i < group.last; i++) {
        const el_step &step = group.step(i);
        const Convolution &conv = convolution_of(step);
        el_call call = {};
        call.input = place_of(group, step.input, pixel, strip_maps);
        call.link = place_of(group, step.link, pixel, strip_maps);
        call.residual = place_of(group, step.residual, pixel, strip_maps);
        call.output = place_of(group, step.output, pixel, strip_maps);
        call.batch = group.job->batch;
        call.height = step.height, call.width = step.width;
        call.out_height = step.out_height, call.out_width = step.out_width;
        const Work work = {&conv, step.epilogue, &call};
        if (i == group.first) {
            conv.isa->strip(work, strip, scratch);
            continue;
        }
        const Strips parts = group.parts(i, Group::pixels(strip));
        for (int64_t k = 0; k < parts.count(); k++) {
            Strip part = parts.at(k);
            part.begin += pixel, part.end += pixel;
            conv.isa->strip(work, part, scratch);
        }
    }
}

void wait_until(const int64_t *done, int64_t count) {
    for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < count; spins++)
        if (spins > kSpins) let_others_run();
}

// One thread's share. A strip waits for all of the groups before its own: each of these was taken by a
// thread that works on it, or waits in turn for groups before.
void work_through(void *data) {
    Job &job = *static_cast<Job *>(data);
    size_t scratch_bytes = 0;
    int64_t floats = 0;
    for (int64_t at = 0; at < job.chain->count;) {
        const Group group(job, at);
        const size_t bytes = group.scratch_bytes();
        if (bytes > scratch_bytes) scratch_bytes = bytes;
        floats = max64(floats, group.strip_offset(group.last));
        at = group.last;
    }
    const size_t map_bytes = static_cast<size_t>(floats) * sizeof(float);
    uint8_t *scratch = own_memory.at_least(scratch_bytes + map_bytes);
    if (!scratch) {
        __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
        return;
    }
    float *strip_maps = reinterpret_cast<float *>(scratch + scratch_bytes);
    const int64_t own = job.team.join(), parts = job.team.parts;
    int64_t before = 0, *taken = job.taken;
    for (int64_t at = 0; at < job.chain->count; taken += parts) {
        const Group group(job, at);
        Share share(taken, parts, own, group.strips.count());
        int64_t index = share.take();
        if (index >= 0) wait_until(&job.done, before);
        for (; index >= 0; index = share.take()) {
            run_strip(group, index, scratch, strip_maps);
            __atomic_fetch_add(&job.done, 1, __ATOMIC_RELEASE);
        }
        before += group.strips.count();
        at = group.last;
    }
    own_memory.give_back();
}

// Steps for some images, with the scratch memory of one slot.
int run_images(const el_chain &chain, int64_t first, int64_t slot, int32_t threads) {
    const Team team(threads);
    int64_t *taken =
        static_cast<int64_t *>(calloc(static_cast<size_t>(chain.count * team.parts), sizeof(int64_t)));
    if (!taken) return -1;
    Job job = {&chain,
               chain.input + first * chain.input_floats,
               chain.scratch + slot * chain.slot_floats,
               chain.output + first * chain.output_floats,
               min64(chain.images, chain.batch - first),
               threads,
               team,
               taken,
               0,
               0};
    if (threads > 1 && parallel) parallel(work_through, &job, static_cast<unsigned>(threads), 0);
    else work_through(&job);
    free(taken);
    return job.failed ? -1 : 0;
}

struct Shared {
    const el_chain *chain;
    int64_t next, slot;
    int failed;
};

// One thread's share: it goes through all layers by itself, and waits for nobody in between.
void take_images(void *data) {
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
}  // namespace el

extern "C" int el_chain_run(const el_chain *chain) {
    if (chain->slots > 1 && el::parallel) {
        el::Shared shared = {chain, 0, 0, 0};
        el::parallel(el::take_images, &shared, static_cast<unsigned>(chain->slots), 0);
        return shared.failed ? -1 : 0;
    }
    for (int64_t first = 0; first < chain->batch; first += chain->images)
        if (el::run_images(*chain, first, 0, chain->threads)) return -1;
    return 0;
}
