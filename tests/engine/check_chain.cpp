// Compares chains of convolutions with the same convolutions called one by one: bit for bit, with
// scratch memory of exactly the size they are given.
//
//     check_chain [CASES]
//
// One line per instruction set; the exit status is 1 where anything differs. See .ci/engine-check.
#include <string.h>

#include <thread>
#include <vector>

#include "engine.h"
#include "tools.h"

namespace {

const long kDefaultCases = 600;

// Convolutions with stride 1 that keep height and width, each after any one before it.
struct Layer {
    void *convolution;
    int channels, input, residual;  // maps: 0 is the input, n + 1 what layer n gives; -1 for none
    bool follows;                   // of one group with the layer before
    std::vector<float> gamma;
    el_epilogue epilogue;
};

struct Chain {
    Chain(long number, const char *isa) : random(static_cast<uint64_t>(number)) {
        const int most = random.chance(20) ? 60 : 9;  // several strips, or one
        height = random.between(1, most), width = random.between(1, most);
        batch = random.between(0, 5), images = random.between(1, 3);
        threads = random.between(1, 2), slots = random.between(1, 3);
        sizes.push_back(random.between(1, 70));
        const int count = random.between(1, 6);
        layers.resize(static_cast<size_t>(count));
        for (int i = 0; i < count; i++) add(i, isa);
    }
    ~Chain() {
        for (Layer &layer : layers) el_destroy(layer.convolution);
    }

    void add(int index, const char *isa) {
        Layer &layer = layers[static_cast<size_t>(index)];
        layer.input = index ? random.between(index > 2 ? index - 2 : 0, index) : 0;
        const int from = sizes[static_cast<size_t>(layer.input)];
        const bool depthwise = random.chance(25), wide = random.chance(60);
        layer.channels = depthwise || random.chance(40) ? from : random.between(1, 70);
        // One channel to one is depthwise, too.
        const bool pointwise = !wide && !depthwise && (from > 1 || layer.channels > 1);
        layer.follows = index && layer.input == index && pointwise && random.chance(80);
        el_geometry shape = {from, layer.channels, depthwise ? from : 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0};
        if (wide || depthwise) {
            shape.kernel_h = shape.kernel_w = 3;
            shape.top = shape.bottom = shape.left = shape.right = 1;
        }
        const size_t row = static_cast<size_t>((from / shape.groups) * shape.kernel_h * shape.kernel_w + 7) / 8;
        std::vector<uint8_t> bits(row * static_cast<size_t>(layer.channels));
        for (uint8_t &byte : bits) byte = static_cast<uint8_t>(random.next());
        layer.convolution = el_create(&shape, bits.data(), isa);
        layer.residual = -1;
        for (int map = 0; map <= index; map++)
            if (sizes[static_cast<size_t>(map)] == layer.channels && random.chance(40))
                layer.residual = map;
        layer.epilogue = el_epilogue();
        if (layer.channels == from) {
            for (int c = 0; c < from; c++) layer.gamma.push_back(random.real(-2, 2));
            layer.epilogue.gamma = layer.gamma.data();
            layer.epilogue.link = EL_LINK_IDENTITY;
        }
        sizes.push_back(layer.channels);
    }

    int64_t floats(size_t map) const { return int64_t(sizes[map]) * height * width; }

    Random random;
    int height, width, batch, images, threads, slots;
    std::vector<int> sizes;
    std::vector<Layer> layers;
};

// Every map whole, by calls of their own.
bool one_by_one(const Chain &chain, std::vector<std::vector<float>> *maps) {
    for (size_t i = 0; i < chain.layers.size(); i++) {
        const Layer &layer = chain.layers[i];
        std::vector<float> out(static_cast<size_t>(chain.batch * chain.floats(i + 1)));
        const float *input = (*maps)[static_cast<size_t>(layer.input)].data();
        el_call call = {};
        call.input = input;
        call.link = layer.epilogue.link ? input : nullptr;
        if (layer.residual >= 0) call.residual = (*maps)[static_cast<size_t>(layer.residual)].data();
        call.output = out.data();
        call.batch = chain.batch;
        call.height = call.out_height = chain.height;
        call.width = call.out_width = chain.width;
        call.threads = 1;
        if (el_run(layer.convolution, &layer.epilogue, &call)) return false;
        maps->push_back(out);
    }
    return true;
}

// The number of each layer's group.
std::vector<int> groups_of(const Chain &chain) {
    std::vector<int> groups;
    for (const Layer &layer : chain.layers)
        groups.push_back(groups.empty() ? 0 : groups.back() + !layer.follows);
    return groups;
}

// Whether layer `at` may write over its residual: nobody else of its group, or later, reads that.
bool may_write_over(const Chain &chain, size_t at) {
    const std::vector<int> groups = groups_of(chain);
    const int map = chain.layers[at].residual;
    int reads = 0;
    for (size_t i = 0; i < chain.layers.size(); i++)
        if (groups[i] >= groups[at])
            reads += (chain.layers[i].input == map) + (chain.layers[i].residual == map);
    return reads == 1;
}

// Whether only the group that gives map `map` reads it.
bool within_group(const Chain &chain, int map) {
    const std::vector<int> groups = groups_of(chain);
    int inside = 0, outside = 0;
    for (size_t i = 0; i < chain.layers.size(); i++)
        if (chain.layers[i].input == map || chain.layers[i].residual == map)
            (groups[i] == groups[static_cast<size_t>(map - 1)] ? inside : outside)++;
    return inside && !outside;
}

bool check(long number, const char *isa) {
    Chain chain(number, isa);
    const size_t count = chain.layers.size();
    std::vector<std::vector<float>> maps(1);
    for (int64_t i = 0; i < chain.batch * chain.floats(0); i++)
        maps[0].push_back(chain.random.real(-1, 1));
    if (!one_by_one(chain, &maps)) return false;
    std::vector<el_place> places(1, el_place{EL_AT_INPUT, 0, 0});
    std::vector<el_step> steps;
    int64_t scratch_floats = 0;
    for (size_t i = 0; i < count; i++) {
        const Layer &layer = chain.layers[i];
        el_place out = {EL_AT_OUTPUT, 0, 0};
        if (i + 1 < count && within_group(chain, static_cast<int>(i + 1))) {
            out.base = EL_AT_STRIP;
            out.offset = static_cast<int64_t>(i);
        } else if (i + 1 < count) {
            out.base = EL_AT_SCRATCH;
            const int over = layer.residual;
            if (over > 0 && places[static_cast<size_t>(over)].base == EL_AT_SCRATCH &&
                may_write_over(chain, i)) {
                out.offset = places[static_cast<size_t>(over)].offset;
            } else {
                out.offset = scratch_floats;
                scratch_floats += chain.floats(i + 1);
            }
        }
        places.push_back(out);
        el_step step = {};
        step.convolution = layer.convolution;
        step.epilogue = &layer.epilogue;
        step.input = places[static_cast<size_t>(layer.input)];
        if (layer.epilogue.link) step.link = step.input;
        if (layer.residual >= 0) step.residual = places[static_cast<size_t>(layer.residual)];
        step.output = out;
        step.height = step.out_height = chain.height;
        step.width = step.out_width = chain.width;
        step.follows = layer.follows;
        steps.push_back(step);
    }
    const size_t size = sizeof(float);
    const Memory scratch(
        static_cast<size_t>(scratch_floats * chain.images * chain.slots) * size, true);
    const Memory input(maps[0].size() * size, true), output(maps[count].size() * size, true);
    if (!maps[0].empty()) memcpy(input.as<float>(), maps[0].data(), maps[0].size() * size);
    el_chain call = {};
    call.steps = steps.data();
    call.input = input.as<float>();
    call.scratch = scratch.as<float>();
    call.output = output.as<float>();
    call.count = static_cast<int64_t>(count);
    call.batch = chain.batch;
    call.images = chain.images;
    call.input_floats = chain.floats(0);
    call.output_floats = chain.floats(count);
    call.slot_floats = scratch_floats * chain.images;
    call.slots = chain.slots;
    call.threads = chain.threads;
    if (el_chain_run(&call)) return false;
    return maps[count].empty() ||
           !memcmp(output.as<float>(), maps[count].data(), maps[count].size() * size);
}

// As OpenMP does it.
void in_threads(void (*work)(void *), void *data, unsigned count, unsigned) {
    std::vector<std::thread> threads;
    for (unsigned i = 1; i < count; i++) threads.emplace_back(work, data);
    work(data);
    for (std::thread &thread : threads) thread.join();
}

}  // namespace

int main(int count, char **given) {
    const long cases = count > 1 ? atol(given[1]) : kDefaultCases;
    long wrong = 0;
    el_set_parallel(reinterpret_cast<void *>(in_threads), nullptr);
    for (int i = 0; const char *isa = el_isa_name(i); i++) {
        long of_isa = 0;
        for (long number = 0; number < cases; number++) of_isa += !check(number, isa);
        printf("%-8s %ld chains, %ld wrong\n", isa, cases, of_isa);
        wrong += of_isa;
    }
    return wrong != 0;
}
