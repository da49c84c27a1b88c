// The Gaussian noise of noise.py, four elements a counter, with the same key, counter and order.
#pragma once

#include "vector.h"

struct NoiseKey {
    uint32_t seed_low, seed_high, stream, forward;
};

static inline Long multiply_low_words(Long a, uint32_t b) {
#if defined(__AVX512F__)
    return (Long)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (Long)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & 0xffffffffull) * (uint64_t)b;
#endif
}

struct Counter {
    Long words[4];  // the low half of each counts
};

// Philox4x32 with 7 rounds.
static inline Counter philox(Counter counter, NoiseKey key) {
    Long c0 = counter.words[0], c1 = counter.words[1], c2 = counter.words[2], c3 = counter.words[3];
    uint32_t k0 = key.seed_low, k1 = key.seed_high;
    for (int round = 0; round < 7; round++) {
        Long p0 = multiply_low_words(c0, 0xD2511F53u), p1 = multiply_low_words(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
        c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
        c1 = p1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// As uint32 to float32 rounds: to nearest.
static inline Float to_float(Word w) {
    Float high = __builtin_convertvector((Int)(w >> 16), Float);
    return high * 65536.0f + __builtin_convertvector((Int)(w & 0xffffu), Float);
}

static inline void box_muller(Word a, Word b, Float& first, Float& second) {
    Float uniform = (to_float(a) + 0.5f) * 0x1p-32f;
    Float radius = sqrt(log(uniform) * -2.0f);
    Float cosine, sine;
    cos_sin_quarters(to_float(b) * 0x1p-30f, cosine, sine);
    first = radius * cosine;
    second = radius * sine;
}

// Normals 4 * lane .. 4 * (lane + LANES) of the sample at `position` into out.
static inline void normals(uint32_t lane, uint32_t position, NoiseKey key, float* out) {
    Counter even, odd;
    for (int i = 0; i < LANES / 2; i++) {
        even.words[0][i] = (uint32_t)(lane + 2 * i);
        odd.words[0][i] = (uint32_t)(lane + 2 * i + 1);
    }
    even.words[1] = odd.words[1] = Long{} + position;
    even.words[2] = odd.words[2] = Long{} + key.stream;
    even.words[3] = odd.words[3] = Long{} + key.forward;
    even = philox(even, key);
    odd = philox(odd, key);
    Word words[4];
    for (int k = 0; k < 4; k++) words[k] = (Word)((even.words[k] & 0xffffffffull) | (odd.words[k] << 32));
    Float n[4];
    box_muller(words[0], words[1], n[0], n[1]);
    box_muller(words[2], words[3], n[2], n[3]);
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < 4; k++) out[4 * i + k] = n[k][i];
}
