// The perturbation on a CPU, sample by sample: see mathematics.py for the formulas and cpu.py for the callers.
//
// All maps are contiguous (B, C, H, W), float32 or bfloat16; everything is computed in float32. Samples are independent
// here: what couples them, the statistics of the batch, lies between pool and perturb. All return whether there was
// memory for what they keep of a sample.

#include "perturb.h"
#include "pool.h"

#define MP_EXPORT(NAME, T)                                                                                            \
    bool mp_pool_##NAME(const T* x, const Shape* shape, const float* kernels, float* responses, int64_t threads) {    \
        return pool(x, *shape, kernels, responses, threads);                                                          \
    }                                                                                                                 \
    bool mp_pool_backward_##NAME(const T* x, const Shape* shape, const float* kernels, const float* gresponses,       \
                                 T* gx, float* gkernels, int64_t threads) {                                           \
        return pool_backward(x, *shape, kernels, gresponses, gx, gkernels, threads);                                  \
    }                                                                                                                 \
    bool mp_perturb_##NAME(const T* x, const Shape* shape, const float* op, const float* scale,                       \
                           const Strength* strength, const Noise* noise, T* y, int64_t* hits, int64_t threads) {      \
        return perturb(x, *shape, op, scale, *strength, *noise, y, hits, threads);                                    \
    }                                                                                                                 \
    bool mp_perturb_backward_##NAME(const T* x, const T* gy, const Shape* shape, const float* op, const float* scale, \
                                    const Strength* strength, const Noise* noise, T* gx, float* gscale, float* gop,   \
                                    int64_t threads) {                                                                \
        return perturb_backward(x, gy, *shape, op, scale, *strength, *noise, gx, gscale, gop, threads);               \
    }

extern "C" {
MP_EXPORT(float32, float)
MP_EXPORT(bfloat16, BFloat16)
}
