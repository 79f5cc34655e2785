// Compares linear layers with plain loops, on every instruction set that this machine runs.
//
//     check_linear [CASES]
//
// One line per instruction set; the exit status is 1 where anything differs. See .ci/engine-check.
#include <math.h>

#include "engine.h"
#include "tools.h"

namespace {

const long kDefaultCases = 1000;
const double kTolerance = 1e-5;

// Values that end at a closed page.
struct Values {
    Values(int64_t count, Random *random) : memory(static_cast<size_t>(count) * sizeof(float), true) {
        for (int64_t i = 0; i < count; i++) at()[i] = random->real(-2, 2);
    }
    float *at() const { return memory.as<float>(); }
    Memory memory;
};

bool check(long number, const char *isa) {
    Random random(static_cast<uint64_t>(number));
    el_linear linear = {};
    linear.batch = random.between(0, 5);
    linear.in_features = random.between(1, random.chance(20) ? 700 : 40);
    linear.out_features = random.between(1, random.chance(20) ? 300 : 12);
    linear.threads = random.between(1, 3);
    const Values input(linear.batch * linear.in_features, &random);
    const Values weight(linear.out_features * linear.in_features, &random);
    const Values bias(linear.out_features, &random);
    const Values output(linear.batch * linear.out_features, &random);
    linear.input = input.at();
    linear.weight = weight.at();
    linear.bias = random.chance(50) ? bias.at() : nullptr;
    linear.output = output.at();
    if (el_linear_run(&linear, isa)) return false;
    for (int64_t n = 0; n < linear.batch; n++)
        for (int64_t m = 0; m < linear.out_features; m++) {
            double sum = linear.bias ? linear.bias[m] : 0, size = 1;
            for (int64_t k = 0; k < linear.in_features; k++) {
                const double term = static_cast<double>(linear.input[n * linear.in_features + k]) *
                                    linear.weight[m * linear.in_features + k];
                sum += term, size += fabs(term);
            }
            const float got = linear.output[n * linear.out_features + m];
            if (fabs(got - sum) <= kTolerance * size) continue;
            fprintf(stderr, "%s: case %ld, output %ld of input %ld is %.9g, not %.9g\n", isa, number,
                    static_cast<long>(m), static_cast<long>(n), static_cast<double>(got), sum);
            return false;
        }
    return true;
}

}  // namespace

int main(int count, char **given) {
    const long cases = count > 1 ? atol(given[1]) : kDefaultCases;
    long wrong = el_abi() != EL_ABI;
    const el_linear none = {};
    wrong += el_linear_run(&none, "none") == 0;
    for (int i = 0; const char *isa = el_isa_name(i); i++) {
        long of_isa = 0;
        for (long number = 0; number < cases; number++) of_isa += !check(number, isa);
        printf("%-8s %ld linear layers, %ld wrong\n", isa, cases, of_isa);
        wrong += of_isa;
    }
    return wrong != 0;
}
