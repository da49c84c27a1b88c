// The noise z of an element, its expectation, and what a site multiplies by.
#pragma once

#include "vector.h"

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
    t = t > 20.0f ? splat(20.0f) : t;
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
