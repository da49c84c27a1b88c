// Feature maps with a border of zeros, on which a 3x3 filter is one flat loop.
//
// A map of H rows and W columns is stored with a pitch of W + 1: the zero after each row is also the one before the
// next. A flat loop over `span` elements covers all pixels, and computes numbers without meaning at the zeros between
// rows, which are set back to zero (`Layout::blank`) or masked out (`Layout::fill_mask`).
#pragma once

#include <cstdlib>

#include "vector.h"

struct Layout {
    int64_t height, width, pitch;
    int64_t first;   // index of the first pixel
    int64_t span;    // length of a flat loop over all pixels, a multiple of LANES
    int64_t size;    // floats of a whole plane

    Layout(int64_t height, int64_t width)
        : height(height), width(width), pitch(width + 1), first(round_up(pitch + 1)),
          span(round_up(height * pitch)), size(first + span + round_up(pitch + 1) + LANES) {}

    static int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

    // Zeros between and behind the rows of a plane; `pixels` points to its first pixel.
    void blank(float* pixels) const {
        for (int64_t h = 0; h < height; h++) pixels[h * pitch + width] = 0;
        for (int64_t i = height * pitch; i < span; i++) pixels[i] = 0;
    }

    // `value` at the pixels, zero elsewhere.
    void fill_mask(float* mask, float value) const {
        for (int64_t i = 0; i < span; i++) mask[i] = 0;
        for (int64_t h = 0; h < height; h++)
            for (int64_t w = 0; w < width; w++) mask[h * pitch + w] = value;
    }
};

struct BFloat16 {
    uint16_t bits;
};

static inline float widen(float v) { return v; }

static inline float widen(BFloat16 v) {
    uint32_t bits = (uint32_t)v.bits << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

static inline void narrow(float v, float& out) { out = v; }

static inline void narrow(float v, BFloat16& out) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    out.bits = v != v ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// One contiguous map into a plane, whose zeros are in place already.
template <typename T>
static inline void pad(const T* map, const Layout& layout, float* pixels) {
    for (int64_t h = 0; h < layout.height; h++)
        for (int64_t w = 0; w < layout.width; w++) pixels[h * layout.pitch + w] = widen(map[h * layout.width + w]);
}

// LANES elements, widened to float32, and back.
static inline Float load_wide(const float* p) { return load(p); }

static inline Float load_wide(const BFloat16* p) {
    HalfWord narrow_;
    std::memcpy(&narrow_, p, sizeof narrow_);
    return (Float)(__builtin_convertvector(narrow_, Word) << 16);
}

static inline void store_wide(Float v, float* p) { store(p, v); }

static inline void store_wide(Float v, BFloat16* p) {
    Word bits = (Word)v;
    bits = v != v ? Word{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1);
    HalfWord narrow_ = __builtin_convertvector(bits >> 16, HalfWord);
    std::memcpy(p, &narrow_, sizeof narrow_);
}

// The same for the elements of a map from i on, of which there may be fewer than LANES before `count`.
template <typename T>
static inline Float read(const T* map, int64_t i, int64_t count) {
    if (count - i >= LANES) return load_wide(map + i);
    Float v{};
    for (int64_t l = 0; l < count - i; l++) v[l] = widen(map[i + l]);
    return v;
}

template <typename T>
static inline void write(Float v, T* map, int64_t i, int64_t count) {
    if (count - i >= LANES) return store_wide(v, map + i);
    for (int64_t l = 0; l < count - i; l++) narrow(v[l], map[i + l]);
}

// Adds a plane to a contiguous map.
template <typename T>
static inline void add_unpadded(const float* pixels, const Layout& layout, T* map) {
    for (int64_t h = 0; h < layout.height; h++)
        for (int64_t w = 0; w < layout.width; w++) {
            T& element = map[h * layout.width + w];
            narrow(widen(element) + pixels[h * layout.pitch + w], element);
        }
}

// Calls body(offset in the plane, offset in the contiguous map, pixels left in the row), LANES pixels at a time.
template <typename F>
static inline void for_each_row_part(const Layout& layout, F body) {
    for (int64_t h = 0; h < layout.height; h++)
        for (int64_t w = 0; w < layout.width; w += LANES)
            body(h * layout.pitch + w, h * layout.width + w, layout.width - w);
}

// A 3x3 filter with each number in all lanes, and its transpose.
struct Filter {
    Float k[9];

    Filter(const float* kernel, bool transposed = false, float factor = 1) {
        for (int j = 0; j < 9; j++) k[j] = splat(kernel[transposed ? 8 - j : j] * factor);
    }
};

struct Neighbours {
    Float v[9];

    Neighbours(const float* at, int64_t pitch) {
        for (int j = 0; j < 9; j++) v[j] = load(at + (j / 3 - 1) * pitch + j % 3 - 1);
    }
};

static inline Float apply(const Filter& filter, const Neighbours& n) {
    // Three chains, so that one multiplication need not wait for the last.
    Float rows[3];
    for (int r = 0; r < 3; r++)
        rows[r] = filter.k[3 * r] * n.v[3 * r] + filter.k[3 * r + 1] * n.v[3 * r + 1] + filter.k[3 * r + 2] * n.v[3 * r + 2];
    return rows[0] + rows[1] + rows[2];
}

static inline Float filter_at(const Filter& filter, const float* at, int64_t pitch) {
    return apply(filter, Neighbours(at, pitch));
}

// Sums of a * (neighbour j of b) over a plane, for the gradient of a filter; a is zero wherever there is no pixel.
inline void correlate(const float* a, const float* b, const Layout& layout, double* total) {
    Float sums[9] = {};
    for (int64_t i = 0; i < layout.span; i += LANES) {
        const Float v = load(a + i);
        for (int j = 0; j < 9; j++) sums[j] += v * load(b + i + (j / 3 - 1) * layout.pitch + j % 3 - 1);
    }
    for (int j = 0; j < 9; j++) total[j] += sum(sums[j]);
}

// Memory of one thread, kept from call to call unless it is large; all zeros when it is taken, null if there is none.
class Workspace {
  public:
    float* take(int64_t floats) {
        if (floats > capacity_) {
            release();
            memory_ = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
            if (!memory_) return nullptr;
            capacity_ = floats;
        }
        std::memset(memory_, 0, floats * 4);
        return memory_;
    }
    void give_back() {
        if (capacity_ > KEPT) release();
    }
    ~Workspace() { release(); }

  private:
    static constexpr int64_t KEPT = 1 << 22;  // floats, 16 MiB

    void release() {
        std::free(memory_);
        memory_ = nullptr;
        capacity_ = 0;
    }

    float* memory_ = nullptr;
    int64_t capacity_ = 0;
};

inline Workspace& own_workspace() {
    static thread_local Workspace workspace;
    return workspace;
}
