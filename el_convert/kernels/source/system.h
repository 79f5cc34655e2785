// The headers that every instruction set's file needs, before any of them changes the target.
#ifndef EL_CONVERT_SYSTEM_H
#define EL_CONVERT_SYSTEM_H

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sched.h>
#endif

#include "plan.h"

namespace el {

inline double seconds() {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

inline void let_others_run() {
#if defined(_WIN32)
    SwitchToThread();
#else
    sched_yield();
#endif
}

}  // namespace el
#endif
