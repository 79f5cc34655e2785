// What the checks of the engine share: random numbers, and memory whose bounds are watched.
#ifndef EL_CONVERT_CHECK_TOOLS_H
#define EL_CONVERT_CHECK_TOOLS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// The same numbers on every machine, unlike those of <random>.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}

    uint64_t next() {
        state_ += 0x9E3779B97F4A7C15u;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    int between(int low, int high) {
        return low + static_cast<int>(next() % static_cast<uint64_t>(high - low + 1));
    }
    bool chance(int percent) { return between(1, 100) <= percent; }
    float real(float low, float high) {
        return low + (high - low) * static_cast<float>(next() >> 40) / 16777216.0f;
    }
    template <size_t kCount>
    int among(const int (&values)[kCount]) {
        return values[next() % kCount];
    }

  private:
    uint64_t state_;
};

// Memory of exactly this size. Guarded: its end is the end of a page, and the next page is closed,
// which also catches what sanitizers do not see, such as masked vector loads.
class Memory {
  public:
    Memory(size_t bytes, bool guarded) : mapped_(0) {
        if (!guarded) {
            base_ = data_ = malloc(bytes);
            if (!data_ && bytes) fail();
            return;
        }
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t open = (bytes + page - 1) / page * page;
        mapped_ = open + page;
        base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) fail();
        char *end = static_cast<char *>(base_) + open;
        if (mprotect(end, page, PROT_NONE)) fail();
        data_ = end - bytes;
    }
    ~Memory() {
        if (mapped_) munmap(base_, mapped_);
        else free(base_);
    }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    template <class T>
    T *as() const {
        return static_cast<T *>(data_);
    }

  private:
    static void fail() {
        perror("memory");
        exit(3);
    }
    void *base_, *data_;
    size_t mapped_;
};

#endif
