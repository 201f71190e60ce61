// The activations of the MLP.
//
//   gelu       x P(Z < x) for a normal Z  =  x erfc(-x / sqrt(2)) / 2
//   gelu_fast  x (1 + tanh u) / 2  =  x / (1 + exp(-2u)),   u = sqrt(2/pi) (x + 0.044715 x^3)
//
// The forms on the right are used: for negative x nothing cancels in them.
#pragma once
#include "common.cuh"

struct Gelu {
    static __device__ __forceinline__ float of(float x) { return 0.5f * x * erfcf(-0.70710678f * x); }
};

struct GeluFast {
    static __device__ __forceinline__ float of(float x) {
        float u = 0.79788456f * (x + 0.044715f * x * x * x);
        return x / (1.0f + expf(-2.0f * u));  // exp overflows to infinity, and the quotient to 0, as it should
    }
};
