// Vectors of floats, in the extension that GCC and Clang share, and the elementary functions of them that are needed.
// Every function here is accurate to a few units in the last place on the range its comment names.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Word __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfWord __attribute__((vector_size(2 * LANES)));
typedef uint64_t Long __attribute__((vector_size(4 * LANES)));  // half as many

static inline Float load(const float* p) {
    Float v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }

static inline Float splat(float value) { return Float{} + value; }

static inline float sum(Float v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

static inline Float sqrt(Float v) {
    for (int i = 0; i < LANES; i++) v[i] = __builtin_sqrtf(v[i]);
    return v;
}

// NaN stays NaN, as in torch.
static inline Float relu(Float v) { return v < 0.0f ? Float{} : v; }

static inline Float absolute(Float v) { return (Float)((Int)v & 0x7fffffff); }

// exp(-t) for t >= 0; below the smallest normal number it gives that number.
static inline Float exp_negative(Float t) {
    Float x = t > 87.0f ? splat(-87.0f) : -t;
    Int n = __builtin_convertvector(x * 1.44269504f - 0.5f, Int);  // nearest: x is not positive and this truncates
    Float k = __builtin_convertvector(n, Float);
    Float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
    // Taylor to degree 7 on |r| <= ln(2) / 2.
    Float p = 1 / 5040.0f * r + 1 / 720.0f;
    p = p * r + 1 / 120.0f;
    p = p * r + 1 / 24.0f;
    p = p * r + 1 / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (Float)((n + 127) << 23);
}

// log(1 + e) for 0 <= e <= 1, as 2 artanh(e / (2 + e)).
static inline Float log1p_unit(Float e) {
    Float s = e / (2.0f + e), q = s * s;
    Float p = 1 / 15.0f * q + 1 / 13.0f;
    p = p * q + 1 / 11.0f;
    p = p * q + 1 / 9.0f;
    p = p * q + 1 / 7.0f;
    p = p * q + 1 / 5.0f;
    p = p * q + 1 / 3.0f;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}

// log(u) for normal u > 0.
static inline Float log(Float u) {
    Int bits = (Int)u - 0x3f3504f3;  // sqrt(1/2): the mantissa then lies in [sqrt(1/2), sqrt(2))
    Float e = __builtin_convertvector(bits >> 23, Float);
    Float m = (Float)((bits & 0x007fffff) + 0x3f3504f3);
    Float s = (m - 1.0f) / (m + 1.0f), q = s * s;
    Float p = 1 / 9.0f * q + 1 / 7.0f;
    p = p * q + 1 / 5.0f;
    p = p * q + 1 / 3.0f;
    p = p * q + 1.0f;
    return 2.0f * s * p + e * 0.693147181f;
}

// cos and sin of pi/2 * v for 0 <= v <= 4.
static inline void cos_sin_quarters(Float v, Float& cosine, Float& sine) {
    Int quadrant = __builtin_convertvector(v + 0.5f, Int);
    Float a = (v - __builtin_convertvector(quadrant, Float)) * 1.57079633f, q = a * a;
    Float c = 1 / 40320.0f * q - 1 / 720.0f;
    c = c * q + 1 / 24.0f;
    c = c * q - 0.5f;
    c = c * q + 1.0f;
    Float s = 1 / 362880.0f * q - 1 / 5040.0f;
    s = s * q + 1 / 120.0f;
    s = s * q - 1 / 6.0f;
    s = s * q * a + a;
    Int odd = (quadrant & 1) != 0;
    Float first = odd ? s : c, second = odd ? c : s;
    cosine = (Float)((Int)first ^ (((quadrant + 1) & 2) << 30));
    sine = (Float)((Int)second ^ ((quadrant & 2) << 30));
}
