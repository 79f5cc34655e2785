// Compares the engine with plain loops, over random shapes and epilogues, on every instruction set
// that this machine runs.
//
//     check [CASES [FIRST [ISA]]]
//
// A case depends on nothing but its number: `check 1 4711` repeats number 4711 alone. One line per
// instruction set; the exit status is 1 where anything differs. See .ci/engine-check.
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "engine.h"
#include "expected.h"
#include "tools.h"

// Present where a sanitizer is: what it calls before it ends the process.
extern "C" void __sanitizer_set_death_callback(void (*)(void)) __attribute__((weak));

namespace {

const long kDefaultCases = 3000;
const int kShownPerIsa = 5;  // mismatches that are printed
const float kUnwritten = 1.25e30f;  // what outputs hold before a call

// For crashes.
char doing[512];

void tell_case() {
    const ssize_t written = write(2, doing, strlen(doing));
    doing[0] = 0;  // other threads may crash too
    (void)written;
}

void crashed(int number) {
    tell_case();
    signal(number, SIG_DFL);
    raise(number);
}

void watch_for_crashes() {
    if (__sanitizer_set_death_callback) {
        __sanitizer_set_death_callback(tell_case);
        return;
    }
    const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
    for (int number : signals) signal(number, crashed);
}

struct Tally {
    const char *isa;
    long cases, threaded, wrong;
    int64_t values;

    void report(const std::string &what, const std::string &where) {
        if (++wrong <= kShownPerIsa)
            fprintf(stderr, "%s: %s\n    %s\n", isa, what.c_str(), where.c_str());
    }
    void report(const Case &c, const std::string &what) { report(what, describe(c)); }
};

struct PoolThread {
    void (*work)(void *);
    void *data;
};

void *run_pool_thread(void *given) {
    const PoolThread *thread = static_cast<const PoolThread *>(given);
    thread->work(thread->data);
    return nullptr;
}

pthread_t start_thread(void *(*run)(void *), void *data) {
    pthread_t thread;
    const int error = pthread_create(&thread, nullptr, run, data);
    if (error) {
        fprintf(stderr, "pthread_create: %s\n", strerror(error));
        exit(3);
    }
    return thread;
}

long pool_calls;
unsigned pool_most;

// GOMP_parallel's interface: the caller is one of the threads.
void run_in_pool(void (*work)(void *), void *data, unsigned threads, unsigned) {
    __atomic_fetch_add(&pool_calls, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&pool_most, threads, __ATOMIC_RELAXED);
    PoolThread shared = {work, data};
    std::vector<pthread_t> others;
    for (unsigned i = 1; i < threads; i++) others.push_back(start_thread(run_pool_thread, &shared));
    work(data);
    for (pthread_t other : others) pthread_join(other, nullptr);
}

// One call; runs in a thread of its own where several calls share a convolution.
struct Run {
    const void *convolution;
    const el_epilogue *epilogue;
    el_call call;
    std::unique_ptr<Memory> output;
    int status;

    Run(const Job &job, const void *prepared, const el_epilogue &what_follows)
        : convolution(prepared), epilogue(&what_follows), call(), status(-2) {
        const Case &c = job.c;
        const size_t count = static_cast<size_t>(c.outputs());
        output.reset(new Memory(count * sizeof(float), c.guarded));
        std::fill_n(values(), count, kUnwritten);
        call.input = job.input;
        call.link = job.link;
        call.residual = job.residual;
        call.output = values();
        call.batch = c.batch;
        call.height = c.height;
        call.width = c.width;
        call.out_height = c.out_height;
        call.out_width = c.out_width;
        call.threads = c.threads;
    }
    float *values() const { return output->as<float>(); }
    void operator()() { status = el_run(convolution, epilogue, &call); }
};

void *run_apart(void *given) {
    (*static_cast<Run *>(given))();
    return nullptr;
}

std::string place(const Case &c, size_t index) {
    const int64_t at = static_cast<int64_t>(index), pixel = at / c.shape.out_channels;
    char text[120];
    snprintf(text, sizeof text, "output[%ld][%ld][%ld][%ld]",
             static_cast<long>(pixel / (c.out_height * c.out_width)),
             static_cast<long>(pixel / c.out_width % c.out_height),
             static_cast<long>(pixel % c.out_width), static_cast<long>(at % c.shape.out_channels));
    return text;
}

std::string mismatch(const Case &c, size_t index, float got, double wanted) {
    char text[200];
    snprintf(text, sizeof text, "%s is %.9g, not %.9g", place(c, index).c_str(),
             static_cast<double>(got), wanted);
    return text;
}

void check_sums(const Job &job, const void *convolution, const std::vector<int32_t> &expected,
                Tally *tally) {
    el_epilogue none = {};
    none.threshold = job.epilogue.threshold;
    Run run(job, convolution, none);
    run.call.link = run.call.residual = nullptr;
    run();
    if (run.status) return tally->report(job.c, "el_run has no memory");
    for (size_t i = 0; i < expected.size(); i++)
        if (run.values()[i] != static_cast<float>(expected[i]))
            return tally->report(job.c, "sum: " + mismatch(job.c, i, run.values()[i], expected[i]));
    tally->values += static_cast<int64_t>(expected.size());
}

void check_outputs(const Job &job, const void *convolution, const std::vector<Estimate> &expected,
                   Tally *tally) {
    Run run(job, convolution, job.epilogue);
    run();
    if (run.status) return tally->report(job.c, "el_run has no memory");
    for (size_t i = 0; i < expected.size(); i++)
        if (!agrees(run.values()[i], expected[i]))
            return tally->report(
                job.c, "epilogue: " + mismatch(job.c, i, run.values()[i], expected[i].value));
    tally->values += static_cast<int64_t>(expected.size());
    if (job.c.number % 8) return;
    // Several calls of one convolution at once.
    std::vector<std::unique_ptr<Run>> runs;
    std::vector<pthread_t> threads;
    for (int i = 0; i < 3; i++) {
        runs.emplace_back(new Run(job, convolution, job.epilogue));
        runs.back()->call.threads = i + 1;
    }
    for (const auto &one : runs) threads.push_back(start_thread(run_apart, one.get()));
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
    for (const auto &one : runs)
        if (one->status || memcmp(one->values(), run.values(), expected.size() * sizeof(float)))
            return tally->report(job.c, "several calls at once differ from one alone");
}

void check_case(const Job &job, const std::vector<int32_t> &sums,
                const std::vector<Estimate> &outputs, Tally *tally) {
    const Case &c = job.c;
    snprintf(doing, sizeof doing, "%s: crashed\n    %s\n", tally->isa, describe(c).c_str());
    void *convolution;
    {
        const Memory weight(job.bits.size(), c.guarded);  // the engine keeps none of it
        memcpy(weight.as<uint8_t>(), job.bits.data(), job.bits.size());
        convolution = el_create(&c.shape, weight.as<uint8_t>(), tally->isa);
    }
    tally->cases++;
    if (!convolution != c.refused())
        return tally->report(c, convolution ? "el_create takes it" : "el_create refuses it");
    if (!convolution) return;
    el_set_parallel(c.pool ? reinterpret_cast<void *>(run_in_pool) : nullptr, nullptr);
    pool_calls = 0;
    check_sums(job, convolution, sums, tally);
    if (pool_calls && (pool_most < 2 || pool_most > static_cast<unsigned>(c.threads)))
        tally->report(c, "not as many threads as asked for");
    tally->threaded += pool_calls > 0;
    check_outputs(job, convolution, outputs, tally);
    el_destroy(convolution);
}

void check_pooling(const Pooling &job, const std::vector<Estimate> &expected, long number,
                   Tally *tally) {
    el_pool pool = job.pool;
    char text[300];
    snprintf(text, sizeof text,
             "case %ld, pooling: kernel %dx%d, stride %dx%d, top %d, left %d, input %ld x %ldx%ld, "
             "output %ldx%ld, %ld channels, threads %d",
             number, pool.kernel_h, pool.kernel_w, pool.stride_h, pool.stride_w, pool.top,
             pool.left, static_cast<long>(pool.batch), static_cast<long>(pool.height),
             static_cast<long>(pool.width), static_cast<long>(pool.out_height),
             static_cast<long>(pool.out_width), static_cast<long>(pool.channels), pool.threads);
    snprintf(doing, sizeof doing, "%s: crashed\n    %s\n", tally->isa, text);
    const Memory output(expected.size() * sizeof(float), number / 4 % 2);
    pool.output = output.as<float>();
    std::fill_n(pool.output, expected.size(), kUnwritten);
    if (el_pool_run(&job.epilogue, &pool, tally->isa))
        return tally->report("el_pool_run has no memory", text);
    for (size_t i = 0; i < expected.size(); i++)
        if (!agrees(pool.output[i], expected[i])) {
            char what[100];
            snprintf(what, sizeof what, "value %ld is %.9g, not %.9g", static_cast<long>(i),
                     static_cast<double>(pool.output[i]), expected[i].value);
            return tally->report(what, text);
        }
    tally->values += static_cast<int64_t>(expected.size());
}

void check_refusals(Tally *tally) {
    static const el_geometry refused[] = {
        {0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {3, 4, 2, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {4, 3, 2, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, -1, 0, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, -1, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, -1},
        {65536, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
        {8, 8, 8, 16, 16, 1, 1, 1, 1, 0, 0, 0, 0},
        {8, 8, 1, 65536, 65536, 1, 1, 1, 1, 0, 0, 0, 0},
    };
    const std::vector<uint8_t> weight(65536, 0);
    for (const el_geometry &shape : refused) {
        void *made = el_create(&shape, weight.data(), tally->isa);
        if (!made) continue;
        fprintf(stderr, "%s: el_create takes a bad shape, number %d\n", tally->isa,
                static_cast<int>(&shape - refused));
        tally->wrong++;
        el_destroy(made);
    }
    // Without a name the engine chooses, by how many output channels there are.
    for (int channels = 8; channels <= 128; channels *= 2) {
        const el_geometry shape = {channels, channels, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0};
        void *made = el_create(&shape, weight.data(), nullptr);
        tally->wrong += !made;
        el_destroy(made);
        made = el_create(&shape, weight.data(), "none");
        tally->wrong += made != nullptr;
        el_destroy(made);
    }
    tally->wrong += !(el_peak(tally->isa, 2) > 0);
}

void check_convolution(long number, std::vector<Tally> *tallies) {
    const Job job(make_case(number));
    std::vector<int32_t> sums;
    std::vector<Estimate> outputs;
    if (!job.c.refused()) sums = expected_sums(job);
    outputs.reserve(sums.size());
    for (size_t i = 0; i < sums.size(); i++) {
        const int64_t at = static_cast<int64_t>(i), channels = job.c.shape.out_channels;
        outputs.push_back(
            expected_output(job, sums[i], at / channels, static_cast<int>(at % channels)));
    }
    for (Tally &tally : *tallies) check_case(job, sums, outputs, &tally);
}

void check_pooling(long number, std::vector<Tally> *tallies) {
    const Pooling job(number);
    std::vector<Estimate> expected;
    for (int64_t i = 0; i < job.outputs(); i++) expected.push_back(expected_maximum(job, i));
    for (Tally &tally : *tallies) check_pooling(job, expected, number, &tally);
}

long number_from(const char *text) {
    char *end;
    errno = 0;
    const long number = strtol(text, &end, 10);
    if (errno || *end || end == text || number < 0) {
        fprintf(stderr, "usage: check [CASES [FIRST [ISA]]]\n");
        exit(2);
    }
    return number;
}

}  // namespace

int main(int count, char **given) {
    const long cases = count > 1 ? number_from(given[1]) : kDefaultCases;
    const long first = count > 2 ? number_from(given[2]) : 0;
    const char *only = count > 3 ? given[3] : nullptr;
    std::vector<Tally> tallies;
    for (int i = 0; const char *name = el_isa_name(i); i++) {
        if (only && strcmp(only, name)) continue;
        const Tally tally = {name, 0, 0, 0, 0};
        tallies.push_back(tally);
    }
    if (tallies.empty() || el_abi() != EL_ABI) {
        fprintf(stderr, "%s\n", only ? "no such instruction set here" : "a broken build");
        return 2;
    }
    watch_for_crashes();
    for (Tally &tally : tallies) check_refusals(&tally);
    for (long number = first; number < first + cases; number++) {
        check_convolution(number, &tallies);
        if (number % 4 == 3) check_pooling(number, &tallies);
    }
    long wrong = 0;
    for (const Tally &tally : tallies) {
        printf("%-8s %ld cases (%ld in threads), %.1f million values, %ld wrong\n", tally.isa,
               tally.cases, tally.threaded, static_cast<double>(tally.values) * 1e-6, tally.wrong);
        wrong += tally.wrong;
    }
    return wrong != 0;
}
