// A stand-in for cublasLt: what its header says, on the memory that it is given, and where it leaves a choice, the worst.
//
//   - Where parts of a split sum may be added in the type of the result, they are.
//   - Memory that was promised to be aligned must be: by default, to 256 bytes.
//   - The first algorithm that is offered is made for the very product that was asked about.
//
// Numbers are those of cublasLt.h, cublas_api.h and library_types.h.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum Compute { COMPUTE_16F = 64, COMPUTE_32F = 68, COMPUTE_32F_FAST_16F = 74 };

struct Product {
    int compute, scale, transposed[2] = {0, 0};
    unsigned epilogue = 1;
    uintptr_t bias = 0;
    int bias_type = -1;
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};
struct Preference {
    uint64_t workspace = 0;
    unsigned reductions = 7, alignments[4] = {256, 256, 256, 256};
};
struct Algorithm {  // 64 bytes
    uint64_t workspace, reductions, alignments[5], made_for;
};
struct Heuristic {  // 96 bytes
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

int HANDLE;

double round_to(int type, double value) {
    if (type == R_32F) return static_cast<float>(value);
    if (type == R_16F) return static_cast<_Float16>(value);
    float single = static_cast<float>(value);
    if (std::isnan(single)) return single;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&single, &bits, 4);
    return single;
}

double read(const void* memory, int type, int64_t i) {
    if (type == R_32F) return static_cast<const float*>(memory)[i];
    if (type == R_16F) return static_cast<const _Float16*>(memory)[i];
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(memory)[i]) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void write(void* memory, int type, int64_t i, double value) {
    if (type == R_32F) static_cast<float*>(memory)[i] = static_cast<float>(value);
    if (type == R_16F) static_cast<_Float16*>(memory)[i] = static_cast<_Float16>(value);
    if (type != R_16BF) return;
    float rounded = static_cast<float>(round_to(R_16BF, value));
    uint32_t bits;
    memcpy(&bits, &rounded, 4);
    static_cast<uint16_t*>(memory)[i] = static_cast<uint16_t>(bits >> 16);
}

double gelu(double x) { return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// Of a product, all that an algorithm depends on.
uint64_t fingerprint(const Product* p, const Layout* A, const Layout* B, const Layout* C, const Layout* D) {
    uint64_t hash = 1469598103934665603u;
    auto add = [&](uint64_t number) { hash = (hash ^ number) * 1099511628211u; };
    for (uint64_t n : {uint64_t(p->compute), uint64_t(p->scale), uint64_t(p->transposed[0]), uint64_t(p->transposed[1]),
                       uint64_t(p->epilogue), uint64_t(p->bias_type)})
        add(n);
    for (const Layout* l : {A, B, C, D})
        for (uint64_t n : {uint64_t(l->type), l->rows, l->columns, uint64_t(l->leading)}) add(n);
    return hash;
}

uint64_t rows_of(const Layout* l, int transposed) { return transposed ? l->columns : l->rows; }
uint64_t columns_of(const Layout* l, int transposed) { return transposed ? l->rows : l->columns; }

bool possible(const Product* p, const Layout* A, const Layout* B, const Layout* C, const Layout* D) {
    int a = p->transposed[0], b = p->transposed[1];
    bool fits = columns_of(A, a) == rows_of(B, b) && rows_of(A, a) == D->rows && columns_of(B, b) == D->columns &&
                C->rows == D->rows && C->columns == D->columns;
    bool types = A->type == B->type && C->type == D->type && (D->type == R_32F || D->type == A->type) &&
                 (p->bias_type == -1 || p->bias_type == D->type);
    return fits && types && (p->epilogue == 1 || p->epilogue == 4 || p->epilogue == 32 || p->epilogue == 36);
}

}  // namespace

// What a test looks at, and sets.
extern "C" {
int opened = 0, asked = 0, computed = 0;
int offered = 1, offer_state = SUCCESS, offer_status = SUCCESS;
uintptr_t last_stream = 0, last_workspace = 0;
size_t last_workspace_bytes = 0;

int cublasLtCreate(void** handle) {
    ++opened;
    *handle = &HANDLE;
    return SUCCESS;
}

int cublasLtMatmulDescCreate(void** product, int compute, int scale) {
    *product = new Product{compute, scale};
    return SUCCESS;
}

int cublasLtMatmulDescSetAttribute(void* descriptor, int attribute, const void* value, size_t bytes) {
    Product* p = static_cast<Product*>(descriptor);
    if (bytes != (attribute == 8 ? 8 : 4)) return INVALID_VALUE;
    if (attribute == 3 || attribute == 4) memcpy(&p->transposed[attribute - 3], value, 4);
    else if (attribute == 7) memcpy(&p->epilogue, value, 4);
    else if (attribute == 8) memcpy(&p->bias, value, 8);
    else if (attribute == 26) memcpy(&p->bias_type, value, 4);
    else return INVALID_VALUE;
    return SUCCESS;
}

int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    if (leading < static_cast<int64_t>(rows)) return INVALID_VALUE;
    *layout = new Layout{type, rows, columns, leading};
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new Preference;
    return SUCCESS;
}

int cublasLtMatmulPreferenceSetAttribute(void* descriptor, int attribute, const void* value, size_t bytes) {
    Preference* p = static_cast<Preference*>(descriptor);
    if (bytes != (attribute == 1 ? 8 : 4)) return INVALID_VALUE;
    if (attribute == 1) memcpy(&p->workspace, value, 8);
    else if (attribute == 3) memcpy(&p->reductions, value, 4);
    else if (attribute >= 5 && attribute <= 8) memcpy(&p->alignments[attribute - 5], value, 4);
    else return INVALID_VALUE;
    return SUCCESS;
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, Product* p, Layout* A, Layout* B, Layout* C, Layout* D,
                                   Preference* preference, int most, Heuristic* found, int* count) {
    ++asked;
    if (handle != &HANDLE || most < 1) return INVALID_VALUE;
    memset(found, 0, sizeof(*found));
    *count = possible(p, A, B, C, D) ? offered : 0;
    if (offer_status) return offer_status;
    if (!*count) return SUCCESS;
    Algorithm& algorithm = found->algorithm;
    algorithm.workspace = found->workspace = preference->workspace;
    algorithm.reductions = preference->reductions;
    for (int i = 0; i < 4; ++i) algorithm.alignments[i] = preference->alignments[i];
    algorithm.alignments[4] = p->bias ? p->bias & -p->bias : 256;
    algorithm.made_for = fingerprint(p, A, B, C, D);
    found->state = offer_state;
    return SUCCESS;
}

int cublasLtMatmul(void* handle, const Product* p, const float* alpha, const void* a, const Layout* A, const void* b,
                   const Layout* B, const float* beta, const void* c, const Layout* C, void* d, const Layout* D,
                   const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    ++computed;
    last_stream = reinterpret_cast<uintptr_t>(stream);
    last_workspace = reinterpret_cast<uintptr_t>(workspace);
    last_workspace_bytes = workspace_bytes;
    if (handle != &HANDLE || algorithm->made_for != fingerprint(p, A, B, C, D)) return INVALID_VALUE;
    if (algorithm->workspace > workspace_bytes || p->scale != R_32F) return INVALID_VALUE;
    bool biased = p->epilogue & 4;
    uintptr_t addresses[5] = {uintptr_t(a), uintptr_t(b), uintptr_t(c), uintptr_t(d), biased ? p->bias : 0};
    if (biased && p->bias < 4096) return EXECUTION_FAILED;
    for (int i = 0; i < 5; ++i)
        if (addresses[i] % algorithm->alignments[i]) return EXECUTION_FAILED;
    int factors = p->compute == COMPUTE_32F_FAST_16F ? R_16F : R_32F;
    int sums = p->compute == COMPUTE_16F ? R_16F : R_32F;
    int parts = algorithm->reductions & 5 ? D->type : sums;  // in place is in the type of the result, too
    int64_t inner = columns_of(A, p->transposed[0]);
    for (int64_t n = 0; n < int64_t(D->columns); ++n)
        for (int64_t m = 0; m < int64_t(D->rows); ++m) {
            double part[2] = {0, 0};
            for (int64_t k = 0; k < inner; ++k) {
                double left = read(a, A->type, p->transposed[0] ? m * A->leading + k : k * A->leading + m);
                double right = read(b, B->type, p->transposed[1] ? k * B->leading + n : n * B->leading + k);
                part[k >= inner / 2] += round_to(factors, left) * round_to(factors, right);
            }
            double value = *alpha * (round_to(parts, part[0]) + round_to(parts, part[1]));
            if (*beta) value += *beta * read(c, C->type, n * C->leading + m);  // with 0, C is not read
            if (biased)
                value += read(reinterpret_cast<const void*>(p->bias), p->bias_type == -1 ? D->type : p->bias_type, m);
            write(d, D->type, n * D->leading + m, p->epilogue & 32 ? gelu(value) : value);
        }
    return SUCCESS;
}
}
