// Where the cache holds the positions of each text.
//
//   keys, values   T    (pages,H,S,D) each: a page is S positions of every head
//   pages          int  (B,P): position s of text t is row s % S of page pages[t,s/S]
//
// Any page can be any text's, and a full one several texts'. A cache of one row for each text is that of one page each,
// P = 1. Attention goes page by page: what it does within one does not depend on there being others, so it is no slower
// where there is one, and S need not be a power of two, as it would have to be if every key were looked up by itself.
#pragma once
#include "common.cuh"

struct Pages {
    const int* table;
    int P, H, S, D;

    // Of the key, and of the value, of a position.
    __device__ __forceinline__ long long slot(int text, int h, int position) const {
        const int index = position / S;
        const long long page = table[static_cast<long long>(text) * P + index];
        return ((page * H + h) * S + (position - index * S)) * D;
    }
    // Positions from this one on that lie one after the other.
    __device__ __forceinline__ int in_a_row(int position) const { return S - position % S; }
};
