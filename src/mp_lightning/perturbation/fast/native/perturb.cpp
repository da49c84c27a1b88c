// The perturbation on a CPU, sample by sample: see mathematics.py for the formulas and cpu.py for the callers.
//
// All maps are contiguous (B, C, H, W), float32 or bfloat16; everything is computed in float32. Samples are independent
// here: what couples them, the statistics of the batch, lies between pool_* and perturb_*.

#include <algorithm>

#include "noise.h"
#include "planes.h"

namespace {

constexpr int FEATURES = 4;
constexpr int64_t CHUNK = 512;  // elements of noise drawn at a time, at least one map

struct Shape {
    int64_t batch, channels, height, width;
    int64_t map() const { return height * width; }
    int64_t sample() const { return channels * map(); }
};

enum Mode { EXPECTED = 0, KEYED = 1, GIVEN = 2 };

struct Noise {
    int64_t mode;
    const float* given;  // (B, C, H, W), where GIVEN
    NoiseKey key;
    int64_t rank, world;  // sample b is number b * world + rank of the global batch
};

struct Strength {
    float coeff, clip;
};

// z and its derivative with respect to alpha.
struct Multiplier {
    Float z, slope;
};

inline Multiplier sampled(Float t) {
    Float e = exp_negative(absolute(t)), inverse = 1.0f / (1.0f + e);
    return {relu(t) + log1p_unit(e), t < 0.0f ? e * inverse : inverse};
}

// E[softplus(alpha + eps)], see mathematics.expected_noise.
inline Multiplier expected(Float alpha) {
    Float t = absolute(alpha);
    Float q = -4.1674365e-05f * t + 0.00095792785f;
    Float dq = 4 * -4.1674365e-05f * t + 3 * 0.00095792785f;
    q = q * t - 0.00671529346f;
    dq = dq * t + 2 * -0.00671529346f;
    q = q * t + 0.00668506302f;
    dq = dq * t + 0.00668506302f;
    q = q * t - 0.904215028f;
    Multiplier even = sampled(q * t + 0.214389405f);
    Float slope = even.slope * (q + dq * t);
    slope = alpha < 0.0f ? -slope : alpha > 0.0f ? slope + 1.0f : Float{};
    return {relu(alpha) + even.z, slope};
}

// The noise of one sample, a few maps at a time.
class SampleNoise {
  public:
    SampleNoise(const Noise& noise, const Shape& shape, int64_t sample, float* buffer)
        : noise_(noise), map_(shape.map()), elements_(shape.sample()), buffer_(buffer),
          position_((uint32_t)(sample * noise.world + noise.rank)),
          given_(noise.given ? noise.given + sample * shape.sample() : nullptr) {}

    static int64_t buffer_size(const Shape& shape) { return std::max(CHUNK, shape.map()) + shape.map() + 12 * LANES; }

    // eps of one channel, (H, W); null where its expectation is wanted.
    const float* channel(int64_t c) {
        if (noise_.mode == EXPECTED) return nullptr;
        int64_t begin = c * map_, end = begin + map_;
        if (noise_.mode == GIVEN) return given_ + begin;
        if (begin < from_ || end > to_) {
            from_ = begin / 4 * 4;
            int64_t wanted = std::min(std::max(end, from_ + CHUNK), elements_);
            for (to_ = from_; to_ < wanted; to_ += 4 * LANES)
                normals((uint32_t)(to_ / 4), position_, noise_.key, buffer_ + (to_ - from_));
        }
        return buffer_ + (begin - from_);
    }

  private:
    const Noise& noise_;
    int64_t map_, elements_;
    float* buffer_;
    uint32_t position_;
    const float* given_;
    int64_t from_ = 0, to_ = 0;
};

// What alpha of one sample is made of, kept in padded planes.
struct Location {
    const Layout& layout;
    const Shape& shape;
    const float* op;  // op1_identity, op1_all, op2_identity, op2_all
    float *x, *hidden;            // one plane a channel
    float *mean, *hidden_mean;    // over channels
    float* shared;                // what the mean contributes to every channel

    static int64_t size(const Layout& layout, const Shape& shape) { return (2 * shape.channels + 3) * layout.size; }

    Location(const Layout& layout, const Shape& shape, const float* op, float* memory)
        : layout(layout), shape(shape), op(op), x(memory + layout.first),
          hidden(x + shape.channels * layout.size), mean(hidden + shape.channels * layout.size),
          hidden_mean(mean + layout.size), shared(hidden_mean + layout.size) {}

    float* plane(float* planes, int64_t c) const { return planes + c * layout.size; }

    template <typename T>
    void compute(const T* sample) {
        const int64_t span = layout.span, pitch = layout.pitch;
        const float per_channel = 1.0f / shape.channels;
        std::fill(mean, mean + span, 0.0f);
        std::fill(hidden_mean, hidden_mean + span, 0.0f);
        for (int64_t c = 0; c < shape.channels; c++) {
            pad(sample + c * shape.map(), layout, plane(x, c));
            accumulate(plane(x, c), per_channel, mean);
        }
        spread(mean, op + 9);
        const Filter own(op);
        for (int64_t c = 0; c < shape.channels; c++) {
            const float* in = plane(x, c);
            float* out = plane(hidden, c);
            for (int64_t i = 0; i < span; i += LANES)
                store(out + i, relu(filter_at(own, in + i, pitch) + load(shared + i)));
            layout.blank(out);
            accumulate(out, per_channel, hidden_mean);
        }
        spread(hidden_mean, op + 27);
    }

    // alpha of one channel, contiguous (H, W), by way of a plane.
    void alpha(int64_t c, const Filter& own, float* plane_, float* map) const {
        const float* in = plane(hidden, c);
        for (int64_t i = 0; i < layout.span; i += LANES)
            store(plane_ + i, filter_at(own, in + i, layout.pitch) + load(shared + i));
        unpad(plane_, layout, map);
    }

    void accumulate(const float* in, float factor, float* total) const {
        for (int64_t i = 0; i < layout.span; i += LANES) store(total + i, load(total + i) + load(in + i) * factor);
    }

    void spread(const float* in, const float* kernel, bool transposed = false, float factor = 1) {
        const Filter filter(kernel, transposed, factor);
        for (int64_t i = 0; i < layout.span; i += LANES) store(shared + i, filter_at(filter, in + i, layout.pitch));
    }
};

// A contiguous map seen LANES elements at a time, widened to float32; the last ones may be fewer.
template <typename T>
inline Float read(const T* map, int64_t i, int64_t count) {
    Float v{};
    if (count - i >= LANES) {
        for (int l = 0; l < LANES; l++) v[l] = widen(map[i + l]);
    } else {
        for (int64_t l = 0; l < count - i; l++) v[l] = widen(map[i + l]);
    }
    return v;
}

template <typename T>
inline void write(Float v, T* map, int64_t i, int64_t count) {
    if (count - i >= LANES) {
        for (int l = 0; l < LANES; l++) narrow(v[l], map[i + l]);
    } else {
        for (int64_t l = 0; l < count - i; l++) narrow(v[l], map[i + l]);
    }
}

// Sums of a * (neighbour j of b) over a plane, for the gradient of a filter; a is zero wherever there is no pixel.
inline void correlate(const float* a, const float* b, const Layout& layout, float factor, double* total) {
    Float sums[9] = {};
    for (int64_t i = 0; i < layout.span; i += LANES) {
        const Float v = load(a + i);
        for (int j = 0; j < 9; j++) sums[j] += v * load(b + i + (j / 3 - 1) * layout.pitch + j % 3 - 1);
    }
    for (int j = 0; j < 9; j++) total[j] += factor * (double)sum(sums[j]);
}

template <typename F>
void for_each_sample(int64_t batch, int64_t threads, int64_t floats, F body) {
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(batch, threads)))
    {
        static thread_local Workspace workspace;
        float* memory = workspace.take(floats);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; b++) body(b, memory);
    }
}

template <typename T>
void pool(const T* x, Shape shape, const float* kernels, float* responses, int64_t threads) {
    const Layout layout(shape.height, shape.width);
    for_each_sample(shape.batch, threads, layout.size + layout.span, [&](int64_t b, float* memory) {
        float *pixels = memory + layout.first, *mask = memory + layout.size;
        layout.fill_mask(mask);
        const Filter filters[FEATURES] = {kernels, kernels + 9, kernels + 18, kernels + 27};
        for (int64_t c = 0; c < shape.channels; c++) {
            pad(x + b * shape.sample() + c * shape.map(), layout, pixels);
            Float totals[FEATURES] = {};
            for (int64_t i = 0; i < layout.span; i += LANES) {
                const Neighbours n(pixels + i, layout.pitch);
                const Float pixel = load(mask + i);
                for (int k = 0; k < FEATURES; k++) totals[k] += pixel * relu(apply(filters[k], n));
            }
            for (int k = 0; k < FEATURES; k++)
                responses[(b * shape.channels + c) * FEATURES + k] = sum(totals[k]) / shape.map();
        }
    });
}

// gx += the gradient of the pooled responses; gkernels (B, 4, 9) may be null.
template <typename T>
void pool_backward(const T* x, Shape shape, const float* kernels, const float* gresponses, T* gx, float* gkernels,
                   int64_t threads) {
    const Layout layout(shape.height, shape.width);
    const int64_t floats = (2 + FEATURES) * layout.size + layout.span;
    for_each_sample(shape.batch, threads, floats, [&](int64_t b, float* memory) {
        float *pixels = memory + layout.first, *gates = pixels + layout.size;
        float *gradient = gates + FEATURES * layout.size, *mask = memory + (2 + FEATURES) * layout.size;
        layout.fill_mask(mask);
        const Filter filters[FEATURES] = {kernels, kernels + 9, kernels + 18, kernels + 27};
        double totals[FEATURES * 9] = {};
        for (int64_t c = 0; c < shape.channels; c++) {
            const int64_t offset = b * shape.sample() + c * shape.map();
            pad(x + offset, layout, pixels);
            const float* g = gresponses + (b * shape.channels + c) * FEATURES;
            for (int64_t i = 0; i < layout.span; i += LANES) {
                const Neighbours n(pixels + i, layout.pitch);
                const Float pixel = load(mask + i) / (float)shape.map();
                for (int k = 0; k < FEATURES; k++)
                    store(gates + k * layout.size + i, apply(filters[k], n) > 0.0f ? pixel * g[k] : Float{});
            }
            if (gkernels)
                for (int k = 0; k < FEATURES; k++)
                    correlate(gates + k * layout.size, pixels, layout, 1, totals + 9 * k);
            if (!gx) continue;
            const Filter transposed[FEATURES] = {
                {kernels, true}, {kernels + 9, true}, {kernels + 18, true}, {kernels + 27, true}};
            for (int64_t i = 0; i < layout.span; i += LANES) {
                Float total = {};
                for (int k = 0; k < FEATURES; k++)
                    total += filter_at(transposed[k], gates + k * layout.size + i, layout.pitch);
                store(gradient + i, total);
            }
            add_unpadded(gradient, layout, gx + offset);
        }
        if (gkernels) std::copy(totals, totals + FEATURES * 9, gkernels + b * FEATURES * 9);
    });
}

template <typename T>
void perturb(const T* x, Shape shape, const float* op, const float* scale, Strength strength, Noise noise, T* y,
             int64_t* hits, int64_t threads) {
    const Layout layout(shape.height, shape.width);
    const int64_t map = shape.map(), maps = Layout::round_up(map), location = Location::size(layout, shape);
    const int64_t floats = location + layout.span + maps + SampleNoise::buffer_size(shape);
    for_each_sample(shape.batch, threads, floats, [&](int64_t b, float* memory) {
        Location at(layout, shape, op, memory);
        float *plane = memory + location, *alpha = plane + layout.span;
        SampleNoise eps(noise, shape, b, alpha + maps);
        at.compute(x + b * shape.sample());
        const Filter own(op + 18);
        Int reached = {};
        for (int64_t c = 0; c < shape.channels; c++) {
            const int64_t offset = b * shape.sample() + c * map;
            at.alpha(c, own, plane, alpha);
            const float* e = eps.channel(c);
            for (int64_t i = 0; i < map; i += LANES) {
                const Float a = load(alpha + i);
                const Float z = e ? sampled(a + read(e, i, map)).z : expected(a).z;
                Float v = read(x + offset, i, map) * (1.0f + strength.coeff * (scale[c] * z - 1.0f));
                v = v > strength.clip ? splat(strength.clip) : v;
                reached -= v >= strength.clip;
                write(v, y + offset, i, map);
            }
        }
        if (hits) {
            int64_t total = 0;
            for (int l = 0; l < LANES; l++) total += reached[l];
            hits[b] = total;
        }
    });
}

// gx (without the part through the scale), gscale (B, C), and gop (B, 4, 9), which may be null like gx.
template <typename T>
void perturb_backward(const T* x, const T* gy, Shape shape, const float* op, const float* scale, Strength strength,
                      Noise noise, T* gx, float* gscale, float* gop, int64_t threads) {
    const Layout layout(shape.height, shape.width);
    const int64_t map = shape.map(), maps = Layout::round_up(map), location = Location::size(layout, shape);
    const int64_t planes = (shape.channels + 1) * layout.size;
    const int64_t floats = location + planes + layout.span + 2 * maps + SampleNoise::buffer_size(shape);
    for_each_sample(shape.batch, threads, floats, [&](int64_t b, float* memory) {
        Location at(layout, shape, op, memory);
        float *galpha = memory + location + layout.first, *total = galpha + shape.channels * layout.size;
        float *plane = memory + location + planes, *alpha = plane + layout.span, *slope = alpha + maps;
        SampleNoise eps(noise, shape, b, slope + maps);
        at.compute(x + b * shape.sample());
        std::fill(total, total + layout.span, 0.0f);
        const Filter own(op + 18);
        for (int64_t c = 0; c < shape.channels; c++) {
            const int64_t offset = b * shape.sample() + c * map;
            at.alpha(c, own, plane, alpha);
            const float* e = eps.channel(c);
            const float s = scale[c], coeff = strength.coeff;
            Float of_scale = {};
            for (int64_t i = 0; i < map; i += LANES) {
                const Float a = load(alpha + i), v = read(x + offset, i, map);
                const Multiplier m = e ? sampled(a + read(e, i, map)) : expected(a);
                const Float factor = 1.0f + coeff * (s * m.z - 1.0f);
                const Float g = v * factor > strength.clip ? Float{} : read(gy + offset, i, map);
                const Float gm = g * v * coeff;
                of_scale += gm * m.z;
                store(slope + i, gm * s * m.slope);
                if (gx) write(g * factor, gx + offset, i, map);
            }
            gscale[b * shape.channels + c] = sum(of_scale);
            float* g = at.plane(galpha, c);
            pad(slope, layout, g);
            at.accumulate(g, 1, total);
        }
        double totals[4 * 9] = {};
        const float per_channel = 1.0f / shape.channels;
        if (gop) {
            for (int64_t c = 0; c < shape.channels; c++)
                correlate(at.plane(galpha, c), at.plane(at.hidden, c), layout, 1, totals + 18);
            correlate(total, at.hidden_mean, layout, 1, totals + 27);
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
                correlate(at.plane(at.hidden, c), at.plane(at.x, c), layout, 1, totals);
            correlate(total, at.mean, layout, 1, totals + 9);
            std::copy(totals, totals + 4 * 9, gop + b * 4 * 9);
        }
        if (!gx) return;
        at.spread(total, op + 9, true, per_channel);
        const Filter first(op, true);
        for (int64_t c = 0; c < shape.channels; c++) {
            const float* g = at.plane(at.hidden, c);
            for (int64_t i = 0; i < layout.span; i += LANES)
                store(plane + i, filter_at(first, g + i, layout.pitch) + load(at.shared + i));
            add_unpadded(plane, layout, gx + b * shape.sample() + c * map);
        }
    });
}

}  // namespace

#define MP_EXPORT(NAME, T)                                                                                            \
    void mp_pool_##NAME(const T* x, const Shape* shape, const float* kernels, float* responses, int64_t threads) {    \
        pool(x, *shape, kernels, responses, threads);                                                                 \
    }                                                                                                                 \
    void mp_pool_backward_##NAME(const T* x, const Shape* shape, const float* kernels, const float* gresponses,       \
                                 T* gx, float* gkernels, int64_t threads) {                                           \
        pool_backward(x, *shape, kernels, gresponses, gx, gkernels, threads);                                         \
    }                                                                                                                 \
    void mp_perturb_##NAME(const T* x, const Shape* shape, const float* op, const float* scale,                       \
                           const Strength* strength, const Noise* noise, T* y, int64_t* hits, int64_t threads) {      \
        perturb(x, *shape, op, scale, *strength, *noise, y, hits, threads);                                           \
    }                                                                                                                 \
    void mp_perturb_backward_##NAME(const T* x, const T* gy, const Shape* shape, const float* op, const float* scale, \
                                    const Strength* strength, const Noise* noise, T* gx, float* gscale, float* gop,   \
                                    int64_t threads) {                                                                \
        perturb_backward(x, gy, *shape, op, scale, *strength, *noise, gx, gscale, gop, threads);                      \
    }

extern "C" {
MP_EXPORT(float32, float)
MP_EXPORT(bfloat16, BFloat16)
}
