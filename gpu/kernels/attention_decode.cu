// Attention of one query of each text over the cache:
//
//   z[n,h] = sum_s p[s] values[t,h,s],   p = softmax_s(q[n,h] . keys[t,h,s] / sqrt(D)),   t = texts[n], s <= positions[n]
//
//   q          T      (N,H,D)
//   keys       T      (pages,H,S,D)   after rotation
//   values     T      (pages,H,S,D)
//   pages      int    (B,P)       of each text: pages.cuh. keys[t,h,s] above is that of position s of text t
//   texts      int    (N)         which text of the cache a query belongs to
//   positions  int    (N)         where in that text it stands: it sees itself and all before
//   partial    float  (N,H,splits,D+2)
//   z          T      (N,H,D)
//
//   attention_decode_naive    one thread for each number of z: the equation, read off the page
//   attention_decode_split    the keys shared out over blocks, each of which leaves the average over its own
//   attention_decode_combine  the average of those averages
//
// How an average is kept, and how a block takes one: attention.cuh. Scores are float from the first product on: in
// float16 they overflow in trained models.
//
// split: grid (N H, splits), block ATTENTION_THREADS. A split with no key of its own leaves an empty average.
// combine: N H blocks, of any size.
// naive: ceil(N H D / blockDim.x) blocks, of any size.
// Preconditions: D is a multiple of 8, at most 768; positions[n] is in a page of the text.
// Bytes: 2 (positions[n] + 1) H D sizeof(T) for each n, each key and value once; partial is small beside them.
#include "attention.cuh"
#include "ptx.cuh"

constexpr int ATTENTION_THREADS = 128;

// On a multiprocessor: 80 registers for a thread, or, where a key takes twice as many, 96.
template <class T> constexpr int ATTENTION_BLOCKS = sizeof(T) == 2 ? 6 : 5;

template <class T> __global__ void attention_decode_naive(const T* q, const T* keys, const T* values, const int* pages,
                                                          const int* texts, const int* positions, T* z, int N, int H,
                                                          int D, int P, int S) {
    after_earlier_launches();
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= static_cast<long long>(N) * H * D) return;
    int n = i / D / H, h = i / D % H, d = i % D;
    const T* query = q + i / D * D;
    const Pages at{pages, P, H, S, D};
    auto score = [&](int s) {
        float sum = 0.0f;
        const T* key = keys + at.slot(texts[n], h, s);
        for (int j = 0; j < D; j++) sum += to_float(query[j]) * to_float(key[j]);
        return sum / sqrtf(D);
    };
    float maximum = MINUS_INFINITY, weight = 0.0f, sum = 0.0f;
    for (int s = 0; s <= positions[n]; s++) maximum = fmaxf(maximum, score(s));
    for (int s = 0; s <= positions[n]; s++) {
        float p = expf(score(s) - maximum);
        weight += p;
        sum += p * to_float(values[at.slot(texts[n], h, s) + d]);
    }
    z[i] = from_float<T>(sum / weight);
}

template <class T, int D> __global__ void __launch_bounds__(ATTENTION_THREADS, ATTENTION_BLOCKS<T>)
attention_decode_split(const T* q, const T* keys, const T* values,
                       const int* __restrict__ pages, const int* __restrict__ texts,
                       const int* positions, float* partial, int H, int P, int S) {
    after_earlier_launches();
    __shared__ Groups<T, D, ATTENTION_THREADS> groups;
    const int n = blockIdx.x / H, h = blockIdx.x % H;
    const int length = positions[n] + 1, part = (length + gridDim.y - 1) / gridDim.y;
    const int first = blockIdx.y * part, last = min(length, first + part);
    float* out = partial + (static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y) * (D + 2);
    const Text<T> text{keys, values, {pages, P, H, S, D}, texts[n], h};
    attend(q + static_cast<long long>(blockIdx.x) * D, text, first, last, groups, out);
}

template <class T> __global__ void attention_decode_combine(const float* partial, T* z,
                                                            int splits, int D) {
    after_earlier_launches();
    const long long index = blockIdx.x;
    combine(partial + index * splits * (D + 2), splits, D, z + index * D);
}
