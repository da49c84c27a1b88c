// What is computed of one sample before its output: the noise, and the location of it, alpha.
#pragma once

#include <algorithm>

#include "batch.h"
#include "noise.h"

constexpr int64_t CHUNK = 512;  // elements of noise drawn at a time, at least one map

enum Mode { EXPECTED = 0, KEYED = 1, GIVEN = 2 };

struct Noise {
    int64_t mode;
    const float* given;  // (B, C, H, W), where GIVEN
    NoiseKey key;
    int64_t rank, world;  // sample b is number b * world + rank of the global batch
    int64_t per_channel;  // one number for each channel of a sample instead of one for each element
};

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
        if (noise_.per_channel) {
            float* drawn = buffer_ + map_;
            if (c < from_ || c >= to_) {
                from_ = c / 4 * 4;
                to_ = from_ + 4 * LANES;
                normals((uint32_t)(from_ / 4), position_, noise_.key, drawn);
            }
            std::fill(buffer_, buffer_ + map_, drawn[c - from_]);
            return buffer_;
        }
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
        for (int64_t c = 0; c < shape.channels; c++) pad(sample + c * shape.map(), layout, plane(x, c));
        for (int64_t c = 0; c < shape.channels; c++) accumulate(plane(x, c), per_channel, mean);
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

    // alpha of one channel, contiguous (H, W). Up to LANES numbers behind it are overwritten.
    void alpha(int64_t c, const Filter& own, float* map) const {
        const float* in = plane(hidden, c);
        for_each_row_part(layout, [&](int64_t i, int64_t j, int64_t) {
            store(map + j, filter_at(own, in + i, layout.pitch) + load(shared + i));
        });
    }

    void accumulate(const float* in, float factor, float* total) const {
        for (int64_t i = 0; i < layout.span; i += LANES) store(total + i, load(total + i) + load(in + i) * factor);
    }

    void spread(const float* in, const float* kernel, bool transposed = false, float factor = 1) {
        const Filter filter(kernel, transposed, factor);
        for (int64_t i = 0; i < layout.span; i += LANES) store(shared + i, filter_at(filter, in + i, layout.pitch));
    }
};
