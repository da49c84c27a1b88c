// The output of a site and its gradient, all but what goes through the statistics.
#pragma once

#include "batch.h"
#include "multiplier.h"
#include "sample.h"

template <typename T>
bool perturb(const T* x, Shape shape, const float* op, const float* scale, Strength strength, Noise noise, T* y,
             int64_t* hits, int64_t threads) {
    const Layout layout(shape.height, shape.width);
    const int64_t map = shape.map(), maps = Layout::round_up(map) + LANES, location = Location::size(layout, shape);
    const int64_t floats = location + shape.group() * maps + SampleNoise::buffer_size(shape);
    return for_each_sample(shape.batch, threads, floats, [&](int64_t b, float* memory) {
        Location at(layout, shape, op, memory);
        float* alphas = memory + location;
        SampleNoise eps(noise, shape, b, alphas + shape.group() * maps);
        at.compute(x + b * shape.sample());
        const Filter own(op + 18);
        Int reached = {};
        for_each_group(shape, [&](int64_t first, int64_t count) {
            for (int64_t c = 0; c < count; c++) at.alpha(first + c, own, alphas + c * maps);
            for (int64_t c = first; c < first + count; c++) {
                const int64_t offset = b * shape.sample() + c * map;
                const float *alpha = alphas + (c - first) * maps, *e = eps.channel(c);
                for (int64_t i = 0; i < map; i += LANES) {
                    const Float a = load(alpha + i);
                    const Float z = e ? sampled(a + read(e, i, map)).z : expected(a).z;
                    Float v = read(x + offset, i, map) * (1.0f + strength.coeff * (scale[c] * z - 1.0f));
                    v = v > strength.clip ? splat(strength.clip) : v;
                    reached -= v >= strength.clip;
                    write(v, y + offset, i, map);
                }
            }
        });
        if (hits) {
            int64_t total = 0;
            for (int l = 0; l < LANES; l++) total += reached[l];
            hits[b] = total;
        }
    });
}

// gx (without the part through the scale), gscale (B, C), and gop (B, 4, 9). gx and gop may be null.
template <typename T>
bool perturb_backward(const T* x, const T* gy, Shape shape, const float* op, const float* scale, Strength strength,
                      Noise noise, T* gx, float* gscale, float* gop, int64_t threads) {
    const Layout layout(shape.height, shape.width);
    const int64_t map = shape.map(), maps = Layout::round_up(map) + LANES, group = shape.group();
    const int64_t location = Location::size(layout, shape), planes = (shape.channels + 1) * layout.size;
    const int64_t floats = location + planes + 2 * group * maps + SampleNoise::buffer_size(shape);
    return for_each_sample(shape.batch, threads, floats, [&](int64_t b, float* memory) {
        Location at(layout, shape, op, memory);
        float *galpha = memory + location + layout.first, *total = galpha + shape.channels * layout.size;
        float *alphas = memory + location + planes, *galphas = alphas + group * maps;
        SampleNoise eps(noise, shape, b, galphas + group * maps);
        at.compute(x + b * shape.sample());
        std::fill(total, total + layout.span, 0.0f);
        const Filter own(op + 18);
        for_each_group(shape, [&](int64_t first, int64_t count) {
            for (int64_t c = 0; c < count; c++) at.alpha(first + c, own, alphas + c * maps);
            for (int64_t c = first; c < first + count; c++) {
                const int64_t offset = b * shape.sample() + c * map;
                const float *alpha = alphas + (c - first) * maps, *e = eps.channel(c);
                const float s = scale[c], coeff = strength.coeff;
                Float of_scale = {};
                for (int64_t i = 0; i < map; i += LANES) {
                    const Float a = load(alpha + i), v = read(x + offset, i, map);
                    const Multiplier m = e ? sampled(a + read(e, i, map)) : expected(a);
                    const Float factor = 1.0f + coeff * (s * m.z - 1.0f);
                    const Float g = v * factor > strength.clip ? Float{} : read(gy + offset, i, map);
                    const Float gm = g * v * coeff;
                    of_scale += gm * m.z;
                    store(galphas + (c - first) * maps + i, gm * s * m.slope);
                    if (gx) write(g * factor, gx + offset, i, map);
                }
                gscale[b * shape.channels + c] = sum(of_scale);
            }
            for (int64_t c = 0; c < count; c++) pad(galphas + c * maps, layout, at.plane(galpha, first + c));
        });
        for (int64_t c = 0; c < shape.channels; c++) at.accumulate(at.plane(galpha, c), 1, total);
        double totals[4 * 9] = {};
        const float per_channel = 1.0f / shape.channels;
        if (gop) {
            for (int64_t c = 0; c < shape.channels; c++)
                correlate(at.plane(galpha, c), at.plane(at.hidden, c), layout, totals + 18);
            correlate(total, at.hidden_mean, layout, totals + 27);
        }
        // Back through the second layer and the ReLU: the gradient of the first layer's output takes hidden's place.
        at.spread(total, op + 27, true, per_channel);
        std::fill(total, total + layout.span, 0.0f);
        const Filter second(op + 18, true);
        for (int64_t c = 0; c < shape.channels; c++) {
            const float* g = at.plane(galpha, c);
            float* hidden = at.plane(at.hidden, c);
            for (int64_t i = 0; i < layout.span; i += LANES) {
                const Float gradient = filter_at(second, g + i, layout.pitch) + load(at.shared + i);
                const Float gated = load(hidden + i) > 0.0f ? gradient : Float{};
                store(hidden + i, gated);
                store(total + i, load(total + i) + gated);
            }
        }
        if (gop) {
            for (int64_t c = 0; c < shape.channels; c++)
                correlate(at.plane(at.hidden, c), at.plane(at.x, c), layout, totals);
            correlate(total, at.mean, layout, totals + 9);
            std::copy(totals, totals + 4 * 9, gop + b * 4 * 9);
        }
        if (!gx) return;
        at.spread(total, op + 9, true, per_channel);
        const Filter first(op, true);
        for (int64_t c = 0; c < shape.channels; c++) {
            const float* g = at.plane(at.hidden, c);
            float* to = at.plane(galpha, c);
            for (int64_t i = 0; i < layout.span; i += LANES)
                store(to + i, filter_at(first, g + i, layout.pitch) + load(at.shared + i));
            layout.blank(to);  // for the next sample
        }
        for (int64_t c = 0; c < shape.channels; c++)
            add_unpadded(at.plane(galpha, c), layout, gx + b * shape.sample() + c * map);
    });
}
