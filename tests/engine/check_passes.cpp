// Compares the passes of a training step with plain loops, on every instruction set that this
// machine runs.
//
//     check_passes [CASES]
//
// One line per instruction set; the exit status is 1 where anything differs. See .ci/engine-check.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "engine.h"
#include "tools.h"

namespace {

const long kDefaultCases = 2000;
const double kTolerance = 1e-5;
const int kKinds = EL_PASS_SQUEEZE_GRAD + 1;

// A pass with its data; the operands end at closed pages.
struct Job {
    explicit Job(long of) : number(of), random(static_cast<uint64_t>(of)), pass() {
        const int counts[] = {1, 2, 3, 4, 8};
        pass.kind = static_cast<int32_t>(of % kKinds);
        pass.clip = random.chance(50);
        pass.threads = random.between(1, 3);
        pass.count = random.among(counts);
        pass.factor = random.real(0.1f, 2.0f);
        pass.outer = random.between(0, 40);
        pass.channels = pass.inner = 1;
        given = random.chance(50);
        pass.through_mean = given;
        if (weights()) {
            pass.inner = random.between(1, random.chance(20) ? 3000 : 60);
        } else if (!signs()) {
            pass.channels = random.between(1, random.chance(20) ? 700 : 40) * pass.count;
            if (random.chance(50)) pass.inner = random.between(1, 50);
        }
        pass.block = random.between(1, 12);
        blocks = (pass.outer + pass.block - 1) / pass.block;
    }

    bool signs() const { return pass.kind <= EL_PASS_SIGN_GRAD; }
    bool weights() const {
        return pass.kind == EL_PASS_SCALED_SIGN || pass.kind == EL_PASS_SCALED_SIGN_GRAD;
    }
    int64_t of_g() const { return pass.outer * pass.channels * pass.inner; }
    int64_t of_x() const {
        if (pass.kind == EL_PASS_EXPAND || pass.kind == EL_PASS_EXPAND_GRAD)
            return of_g() / pass.count;
        return pass.kind == EL_PASS_SQUEEZE ? of_g() * pass.count : of_g();
    }
    int64_t of_out() const {
        if (pass.kind == EL_PASS_EXPAND_GRAD) return of_g() / pass.count;
        return pass.kind == EL_PASS_SQUEEZE_GRAD ? of_g() * pass.count : of_g();
    }
    int64_t of_vector() const {
        if (pass.kind == EL_PASS_SIGN) return 0;
        if (pass.kind == EL_PASS_SIGN_GRAD) return given ? of_g() : 0;
        if (pass.kind == EL_PASS_SCALED_SIGN) return given ? pass.outer : 0;
        return weights() ? pass.outer : pass.channels;
    }
    int64_t of_sums() const {
        if (signs() || pass.kind == EL_PASS_EXPAND) return 0;
        if (weights()) return pass.outer;
        return pass.kind == EL_PASS_SQUEEZE ? of_g() : blocks * pass.channels;
    }

    long number;
    Random random;
    el_pass pass;
    bool given;  // a vector, where there may be none; and through_mean
    int64_t blocks;
};

struct Values {
    Values(int64_t of, Random *random) : count(of), memory(bytes(), true) {
        for (int64_t i = 0; i < count; i++)
            data()[i] = random->chance(5) ? 0.0f : random->real(-1.6f, 1.6f);
    }
    size_t bytes() const { return static_cast<size_t>(count) * sizeof(float); }
    float *data() const { return memory.as<float>(); }
    float *or_null() const { return count ? data() : nullptr; }
    int64_t count;
    Memory memory;
};

double sign(double x) { return x > 0 ? 1 : -1; }

double surrogate(const el_pass &p, double x) {
    return p.clip ? (fabs(x) <= 1 ? 1 : 0) : std::max(0.0, 2 - 2 * fabs(x));
}

// Plain loops in double; sums of (blocks, channels) are added up to one row.
void expect(const Job &job, const float *x, const float *g, const float *v,
            std::vector<double> *out, std::vector<double> *sums) {
    const el_pass &p = job.pass;
    for (int64_t o = 0; o < p.outer; o++) {
        double mean = 0, total = 0;
        for (int64_t i = 0; job.weights() && i < p.inner; i++) {
            mean += fabs(static_cast<double>(x[o * p.inner + i])) / static_cast<double>(p.inner);
            total += sign(x[o * p.inner + i]) * g[o * p.inner + i];
        }
        if (job.weights() && v && v[o] == 0.0f) total = 0;
        for (int64_t c = 0; c < p.channels; c++)
            for (int64_t i = 0; i < p.inner; i++) {
                const size_t at = static_cast<size_t>((o * p.channels + c) * p.inner + i);
                const size_t channel = static_cast<size_t>(c), row = static_cast<size_t>(o);
                const size_t narrow = static_cast<size_t>(
                    (o * (p.channels / p.count) + c / p.count) * p.inner + i);
                switch (p.kind) {
                    case EL_PASS_SIGN: (*out)[at] = sign(x[at]); break;
                    case EL_PASS_SIGN_GRAD:
                        (*out)[at] = surrogate(p, x[at]) * g[at] + (v ? v[at] : 0);
                        break;
                    case EL_PASS_SCALED_SIGN:
                        (*out)[at] = sign(x[at]) * (v ? v[o] : mean);
                        if (!v) (*sums)[row] = mean;
                        break;
                    case EL_PASS_SCALED_SIGN_GRAD:
                        (*out)[at] = surrogate(p, x[at]) * v[o] * g[at];
                        if (p.through_mean)
                            (*out)[at] += sign(x[at]) * total / static_cast<double>(p.inner);
                        (*sums)[row] = total;
                        break;
                    case EL_PASS_PRELU_GRAD:
                        (*out)[at] = x[at] > 0 ? g[at] : static_cast<double>(v[c]) * g[at];
                        (*sums)[channel] += std::min(0.0, static_cast<double>(x[at])) * g[at];
                        break;
                    case EL_PASS_EXPAND:
                        (*out)[at] = g[at] + static_cast<double>(v[c]) * x[narrow];
                        break;
                    case EL_PASS_EXPAND_GRAD:
                        (*out)[narrow] += static_cast<double>(v[c]) * g[at];
                        (*sums)[channel] += static_cast<double>(x[narrow]) * g[at];
                        break;
                    default: {  // the squeezes
                        const bool back = p.kind == EL_PASS_SQUEEZE_GRAD;
                        double sum = 0;
                        for (int64_t k = 0; k < p.count; k++) {
                            const size_t wide = static_cast<size_t>(
                                ((o * p.channels + c) * p.count + k) * p.inner + i);
                            if (back) (*out)[wide] = static_cast<double>(v[c]) * g[at] * p.factor;
                            else sum += static_cast<double>(x[wide]) * p.factor;
                        }
                        if (back) (*sums)[channel] += static_cast<double>(x[at]) * g[at];
                        else (*sums)[at] = sum, (*out)[at] = g[at] + v[c] * sum;
                    }
                }
            }
    }
}

bool agree(const Job &job, const char *isa, const char *what, const float *got,
           const std::vector<double> &wanted) {
    double size = 1;
    for (const double value : wanted) size = std::max(size, fabs(value));
    for (size_t i = 0; i < wanted.size(); i++)
        if (!(fabs(got[i] - wanted[i]) <= kTolerance * size)) {
            const el_pass &p = job.pass;
            fprintf(stderr,
                    "%s: case %ld, kind %d, (%ld, %ld, %ld), block %ld, count %d: %s[%ld] is %.9g, "
                    "not %.9g\n",
                    isa, job.number, p.kind, static_cast<long>(p.outer),
                    static_cast<long>(p.channels), static_cast<long>(p.inner),
                    static_cast<long>(p.block), p.count, what, static_cast<long>(i),
                    static_cast<double>(got[i]), wanted[i]);
            return false;
        }
    return true;
}

bool check(long number, const char *isa) {
    Job job(number);
    const Values x(job.of_x(), &job.random), g(job.of_g(), &job.random);
    const Values vector(job.of_vector(), &job.random), out(job.of_out(), &job.random);
    const bool no_sums = job.pass.kind == EL_PASS_SCALED_SIGN && job.given;
    const Values sums(no_sums ? 0 : job.of_sums(), &job.random);
    const bool by_block = sums.count && !job.weights() && job.pass.kind != EL_PASS_SQUEEZE;
    const size_t kept = static_cast<size_t>(by_block ? job.pass.channels : sums.count);
    std::vector<double> of_out(static_cast<size_t>(out.count)), of_sums(kept);
    expect(job, x.data(), g.data(), vector.or_null(), &of_out, &of_sums);
    job.pass.x = x.data();
    job.pass.g = g.data();
    job.pass.vector = vector.or_null();
    job.pass.out = out.data();
    job.pass.sums = sums.or_null();
    if (el_pass_run(&job.pass, isa)) return false;
    std::vector<float> found(sums.data(), sums.data() + kept);
    for (int64_t i = static_cast<int64_t>(kept); by_block && i < sums.count; i++)
        found[static_cast<size_t>(i % job.pass.channels)] += sums.data()[i];
    return agree(job, isa, "out", out.data(), of_out) &&
           agree(job, isa, "sums", found.data(), of_sums);
}

}  // namespace

int main(int count, char **given) {
    const long cases = count > 1 ? atol(given[1]) : kDefaultCases;
    long wrong = el_abi() != EL_ABI;
    const el_pass none = {};
    wrong += el_pass_run(&none, "none") == 0;
    for (int i = 0; const char *isa = el_isa_name(i); i++) {
        long of_isa = 0;
        for (long number = 0; number < cases; number++) of_isa += !check(number, isa);
        printf("%-8s %ld passes, %ld wrong\n", isa, cases, of_isa);
        wrong += of_isa;
    }
    return wrong != 0;
}
