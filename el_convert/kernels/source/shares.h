// Threads share numbered pieces of work: each has a part of its own, and when that is done it helps
// with the others'. Of maps that follow each other a thread so works on the same region, which then
// is in its own cache.
#ifndef EL_CONVERT_SHARES_H
#define EL_CONVERT_SHARES_H

#include <stdint.h>

namespace el {

const int kMostParts = 64;

// Runs a function on so many threads of torch's; null where torch's pool is not known.
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
extern Parallel parallel;

// The calling thread's number among them; null where it is not known.
typedef int (*ThreadNumber)(void);
extern ThreadNumber thread_number;

// Of one parallel call. Fewer threads may come than it was made for.
class Team {
  public:
    explicit Team(int64_t threads)
        : parts(threads < 1 ? 1 : threads < kMostParts ? threads : kMostParts), arrived_(0) {}

    // Called once by each thread.
    int64_t join() {
        if (thread_number) return thread_number() % parts;
        return __atomic_fetch_add(&arrived_, 1, __ATOMIC_RELAXED) % parts;
    }

    const int64_t parts;

  private:
    int64_t arrived_;
};

// One thread's way through `count` pieces of work.
class Share {
  public:
    // `taken`: for each part, how many of its pieces are; all zeros at first.
    Share(int64_t *taken, int64_t parts, int64_t own, int64_t count)
        : taken_(taken), parts_(parts), own_(own), count_(count), tried_(0) {}

    // A piece that nobody else has; -1 where none is left.
    int64_t take() {
        for (; tried_ < parts_; tried_++) {
            const int64_t part = (own_ + tried_) % parts_;
            const int64_t piece = count_ * part / parts_ +
                                  __atomic_fetch_add(&taken_[part], 1, __ATOMIC_RELAXED);
            if (piece < count_ * (part + 1) / parts_) return piece;
        }
        return -1;
    }

  private:
    int64_t *taken_;
    int64_t parts_, own_, count_, tried_;
};

}  // namespace el
#endif
