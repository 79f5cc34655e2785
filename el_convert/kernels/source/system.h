// The headers that every instruction set's file needs, before any of them changes the target.
#ifndef EL_CONVERT_SYSTEM_H
#define EL_CONVERT_SYSTEM_H

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "plan.h"

namespace el {

inline double seconds() {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace el
#endif
