// Batches of feature maps, contiguous (B, C, H, W), and the loop over their samples.
#pragma once

#include <algorithm>

#include "planes.h"

struct Shape {
    int64_t batch, channels, height, width;
    int64_t map() const { return height * width; }
    int64_t sample() const { return channels * map(); }
    // Channels that go through one stage before any goes on to the next. A processor hands a number that it has just
    // stored on to a load quickly only where the two cover the same bytes, which shifted rows do not.
    int64_t group() const { return std::min(channels, std::max<int64_t>(1, 1024 / map())); }
};

// False if a thread found no memory, so that the results are not all there.
template <typename F>
bool for_each_sample(int64_t batch, int64_t threads, int64_t floats, F body) {
    bool enough = true;
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(batch, threads))) reduction(&& : enough)
    {
        float* memory = own_workspace().take(floats);
        enough = memory != nullptr;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; b++)
            if (memory) body(b, memory);
        own_workspace().give_back();
    }
    return enough;
}

// The channels of a sample, a group at a time: body(first, how many).
template <typename F>
void for_each_group(const Shape& shape, F body) {
    for (int64_t first = 0; first < shape.channels; first += shape.group())
        body(first, std::min(shape.group(), shape.channels - first));
}
