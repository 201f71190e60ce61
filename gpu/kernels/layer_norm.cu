// LayerNorm:  y[n,c] = (x[n,c] - mean[n]) / sqrt(variance[n] + eps) * weight[c] + bias[c]
//
//   x             float  (N,C)   the residual stream
//   weight, bias  T      (C)
//   y             T      (N,C)
//
// mean and variance are those of a row, in float and in two passes: the mean of squares minus the square of the mean
// loses all digits when the mean is large.
//
//   layer_norm_naive   one thread for each row: the equation, read off the page
//   layer_norm         one block for each row
//   layer_norm_pair    the two norms of a parallel block, which read the same x, from one set of statistics
//
// Grid of the last two: N blocks. Block: a multiple of 32 threads, which take every blockDim.x-th column.
// Bytes: each row is read three times, from memory and then from the caches (24 KB in the 20B). layer_norm moves
// N C (4 + sizeof(T)), layer_norm_pair N C (4 + 2 sizeof(T)), and C sizeof(T) for each weight and bias.
#include "ptx.cuh"
#include "statistics.cuh"

template <class T> __global__ void layer_norm_naive(const float* x, const T* weight, const T* bias, T* y, int N, int C,
                                                    float eps) {
    after_earlier_launches();
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const float* row = x + static_cast<long long>(n) * C;
    float sum = 0.0f, squares = 0.0f;
    for (int c = 0; c < C; c++) sum += row[c];
    float mean = sum / C;
    for (int c = 0; c < C; c++) squares += (row[c] - mean) * (row[c] - mean);
    float scale = 1.0f / sqrtf(squares / C + eps);
    T* out = y + static_cast<long long>(n) * C;
    for (int c = 0; c < C; c++)
        out[c] = from_float<T>((row[c] - mean) * scale * to_float(weight[c]) + to_float(bias[c]));
}

template <class T> __global__ void __launch_bounds__(1024)
layer_norm(const float* x, const T* __restrict__ weight, const T* __restrict__ bias, T* y,
           int C, float eps) {
    after_earlier_launches();
    const long long first = static_cast<long long>(blockIdx.x) * C;
    Statistics s = row_statistics(x + first, C, eps);
    share_out(C, [&](int c) { return Term<T>{x[first + c], weight[c], bias[c]}; },
              [&](int c, const Term<T>& t) { y[first + c] = normalized(t, s); });
}

// What the two norms make of one number.
template <class T> struct Both {
    Term<T> first;
    T weight, bias;  // of the second
};

template <class T> __global__ void __launch_bounds__(1024)
layer_norm_pair(const float* x, const T* __restrict__ weight1, const T* __restrict__ bias1,
                const T* __restrict__ weight2, const T* __restrict__ bias2, T* y1, T* y2,
                int C, float eps) {
    after_earlier_launches();
    const long long first = static_cast<long long>(blockIdx.x) * C;
    Statistics s = row_statistics(x + first, C, eps);
    auto load = [&](int c) { return Both<T>{{x[first + c], weight1[c], bias1[c]}, weight2[c], bias2[c]}; };
    share_out<4>(C, load, [&](int c, const Both<T>& both) {
        y1[first + c] = normalized(both.first, s);
        y2[first + c] = normalized(Term<T>{both.first.x, both.weight, both.bias}, s);
    });
}
