// Pooled responses of each channel to the four filters of the scale, and their gradient.
#pragma once

#include "batch.h"

constexpr int FEATURES = 4;

struct ScaleFilters {
    Filter filters[FEATURES];
    ScaleFilters(const float* kernels, bool transposed = false)
        : filters{{kernels, transposed}, {kernels + 9, transposed}, {kernels + 18, transposed}, {kernels + 27, transposed}} {}
    const Filter& operator[](int k) const { return filters[k]; }
};

template <typename T>
bool pool(const T* x, Shape shape, const float* kernels, float* responses, int64_t threads) {
    const Layout layout(shape.height, shape.width);
    const int64_t floats = shape.group() * layout.size + layout.span;
    return for_each_sample(shape.batch, threads, floats, [&](int64_t b, float* memory) {
        float *planes = memory + layout.first, *mask = memory + shape.group() * layout.size;
        layout.fill_mask(mask, 1);
        const ScaleFilters filters(kernels);
        for_each_group(shape, [&](int64_t first, int64_t count) {
            for (int64_t c = 0; c < count; c++)
                pad(x + b * shape.sample() + (first + c) * shape.map(), layout, planes + c * layout.size);
            for (int64_t c = 0; c < count; c++) {
                const float* pixels = planes + c * layout.size;
                Float totals[FEATURES] = {};
                for (int64_t i = 0; i < layout.span; i += LANES) {
                    const Neighbours n(pixels + i, layout.pitch);
                    const Float pixel = load(mask + i);
                    for (int k = 0; k < FEATURES; k++) totals[k] += pixel * relu(apply(filters[k], n));
                }
                for (int k = 0; k < FEATURES; k++)
                    responses[(b * shape.channels + first + c) * FEATURES + k] = sum(totals[k]) / shape.map();
            }
        });
    });
}

// gx += the gradient of the pooled responses; gkernels (B, 4, 9). Either may be null.
template <typename T>
bool pool_backward(const T* x, Shape shape, const float* kernels, const float* gresponses, T* gx, float* gkernels,
                   int64_t threads) {
    const Layout layout(shape.height, shape.width);
    const int64_t planes = shape.group() * layout.size, floats = (2 + FEATURES) * planes + layout.span;
    return for_each_sample(shape.batch, threads, floats, [&](int64_t b, float* memory) {
        float *pixels = memory + layout.first, *gates = pixels + planes;
        float *gradients = gates + FEATURES * planes, *mask = memory + (2 + FEATURES) * planes;
        layout.fill_mask(mask, 1.0f / shape.map());
        const ScaleFilters filters(kernels), transposed(kernels, true);
        double totals[FEATURES * 9] = {};
        for_each_group(shape, [&](int64_t first, int64_t count) {
            const int64_t offset = b * shape.sample() + first * shape.map();
            for (int64_t c = 0; c < count; c++) pad(x + offset + c * shape.map(), layout, pixels + c * layout.size);
            for (int64_t c = 0; c < count; c++) {
                Float g[FEATURES];
                for (int k = 0; k < FEATURES; k++)
                    g[k] = splat(gresponses[(b * shape.channels + first + c) * FEATURES + k]);
                float* own = gates + c * FEATURES * layout.size;
                for (int64_t i = 0; i < layout.span; i += LANES) {
                    const Neighbours n(pixels + c * layout.size + i, layout.pitch);
                    const Float pixel = load(mask + i);
                    for (int k = 0; k < FEATURES; k++)
                        store(own + k * layout.size + i, apply(filters[k], n) > 0.0f ? pixel * g[k] : Float{});
                }
            }
            if (gkernels)
                for (int64_t c = 0; c < count; c++)
                    for (int k = 0; k < FEATURES; k++)
                        correlate(gates + (c * FEATURES + k) * layout.size, pixels + c * layout.size, layout, totals + 9 * k);
            if (!gx) return;
            for (int64_t c = 0; c < count; c++) {
                const float* own = gates + c * FEATURES * layout.size;
                for (int64_t i = 0; i < layout.span; i += LANES) {
                    Float total = {};
                    for (int k = 0; k < FEATURES; k++)
                        total += filter_at(transposed[k], own + k * layout.size + i, layout.pitch);
                    store(gradients + c * layout.size + i, total);
                }
            }
            for (int64_t c = 0; c < count; c++)
                add_unpadded(gradients + c * layout.size, layout, gx + offset + c * shape.map());
        });
        if (gkernels) std::copy(totals, totals + FEATURES * 9, gkernels + b * FEATURES * 9);
    });
}
