// Scratch memory of the threads that work on convolutions.
#ifndef EL_CONVERT_MEMORY_H
#define EL_CONVERT_MEMORY_H

#include <stdint.h>
#include <stdlib.h>

namespace el {

#if defined(__SANITIZE_ADDRESS__)
const size_t kKeptBytes = 0;  // each call's bounds are then watched
#else
const size_t kKeptBytes = 1024 * 1024;
#endif

// A thread's scratch memory, kept from call to call: fresh memory would cost page faults.
class OwnMemory {
  public:
    OwnMemory() : memory_(nullptr), size_(0) {}
    ~OwnMemory() { free(memory_); }

    // On a line of the cache; null where there is no memory.
    uint8_t *at_least(size_t bytes) {
        if (size_ < bytes + 64) {
            free(memory_);
            memory_ = static_cast<uint8_t *>(malloc(bytes + 64));
            size_ = memory_ ? bytes + 64 : 0;
        }
        return memory_ ? memory_ + (64 - reinterpret_cast<uintptr_t>(memory_) % 64) : nullptr;
    }

    // What is uncommonly large is not kept.
    void give_back() {
        if (size_ <= kKeptBytes) return;
        free(memory_);
        memory_ = nullptr;
        size_ = 0;
    }

  private:
    uint8_t *memory_;
    size_t size_;
};

static thread_local OwnMemory own_memory;

}  // namespace el
#endif
