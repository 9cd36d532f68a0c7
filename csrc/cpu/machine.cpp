#include "cpu/machine.h"

#include <fstream>
#include <string>

#include <unistd.h>

namespace cvfast {
namespace {

// As the C library reads it from the processor; 0 on most that are not x86.
int64_t l2_of_libc() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    return sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    return 0;
#endif
}

// As Linux lists the cache of this level; 0 if it lists none.
int64_t listed(int wanted) {
    for (int index = 0;; ++index) {
        const std::string cache =
            "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
        std::ifstream level_file(cache + "level"), size_file(cache + "size");
        int level = 0;
        int64_t kilobytes = 0;
        if (!(level_file >> level)) return 0;
        if (level == wanted && size_file >> kilobytes) return kilobytes * 1024;
    }
}

}  // namespace

int64_t l2_bytes() {
    static const int64_t bytes = [] {
        if (const int64_t found = l2_of_libc(); found > 0) return found;
        if (const int64_t found = listed(2); found > 0) return found;
        return int64_t{1} << 20;
    }();
    return bytes;
}

int64_t l3_bytes() {
    static const int64_t bytes = [] {
        const int64_t found = listed(3);
        return found > 0 ? found : l2_bytes();
    }();
    return bytes;
}

}  // namespace cvfast
