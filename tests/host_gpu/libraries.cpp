// cuBLAS, cuSOLVER and cuRAND as far as candle and this crate call them, by the textbook: matrices are column-major.
#include "host_gpu.h"

#include "shim.h"

#include <cmath>
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

using namespace host_gpu;

namespace {

// A handle of any of the libraries.
struct Handle {
    Stream *stream = nullptr;
    // Shared with the work that is queued, which may be done after the handle is destroyed or has another seed.
    std::shared_ptr<std::mt19937_64> random = std::make_shared<std::mt19937_64>();
};

int create(void **made) {
    auto handle = new Handle;
    handle->stream = stream_of(nullptr);
    return *made = handle, 0;
}
int destroy(void *handle) {
    delete static_cast<Handle *>(handle);
    return 0;
}
int set_stream(void *handle, void *stream) {
    LOCKED;
    static_cast<Handle *>(handle)->stream = stream_of(stream);
    return 0;
}
constexpr int REFUSED = 7, NOT_FINITE = 1;

enum Type { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };

double read(const void *at, int type, size_t i) {
    switch (type) {
    case F64: return static_cast<const double *>(at)[i];
    case F16: return __half2float(static_cast<const __half *>(at)[i]);
    case BF16: return __bfloat162float(static_cast<const __nv_bfloat16 *>(at)[i]);
    }
    return static_cast<const float *>(at)[i];
}
void write(void *at, int type, size_t i, double value) {
    switch (type) {
    case F64: static_cast<double *>(at)[i] = value; return;
    case F16: static_cast<__half *>(at)[i] = __float2half_rn((float)value); return;
    case BF16: static_cast<__nv_bfloat16 *>(at)[i] = __float2bfloat16_rn((float)value); return;
    }
    static_cast<float *>(at)[i] = (float)value;
}

struct Factor {
    const void *at;
    int type, transposed, ld;
    long long stride;
    bool tf32 = false;
    // Element (i, j) of the factor of `batch`, as it is multiplied.
    double get(int batch, int i, int j) const {
        double x = read(at, type, (size_t)(batch * stride) + (transposed ? (size_t)i * ld + j : (size_t)j * ld + i));
        if (!tf32 || x == 0 || !std::isfinite(x)) return x;
        // 11 significant bits.
        int exponent = 0;
        const double digits = std::frexp(x, &exponent);
        return std::ldexp(std::nearbyint(std::ldexp(digits, 11)), exponent - 11);
    }
};

int multiply(void *handle, int m, int n, int k, double alpha, Factor a, Factor b, double beta, void *c, int type, int ld, long long stride, int batches) {
    LOCKED;
    auto work = [=] {
        std::vector<double> left((size_t)m * k), right((size_t)k * n);
        for (int batch = 0; batch < batches; ++batch) {
            for (int i = 0; i < m; ++i)
                for (int l = 0; l < k; ++l) left[(size_t)i * k + l] = a.get(batch, i, l);
            for (int j = 0; j < n; ++j)
                for (int l = 0; l < k; ++l) right[(size_t)j * k + l] = b.get(batch, l, j);
            for (int j = 0; j < n; ++j)
                for (int i = 0; i < m; ++i) {
                    double sum = 0;
                    for (int l = 0; l < k; ++l) sum += left[(size_t)i * k + l] * right[(size_t)j * k + l];
                    size_t at = (size_t)(batch * stride) + (size_t)j * ld + i;
                    write(c, type, at, alpha * sum + (beta == 0 ? 0 : beta * read(c, type, at)));
                }
        }
    };
    return queue(static_cast<Handle *>(handle)->stream, work) ? 0 : REFUSED;
}

// A library may use the legacy stream, which waits for the others: what they record is broken by that.
void use_legacy_stream() {
    for (Stream *stream : streams())
        if (stream->recording) stream->broken = true;
}

using Matrix = std::vector<double>; // n x n, symmetric or lower triangular by rows

// The symmetric matrix of which a triangle is given.
Matrix symmetric(const void *at, int type, size_t n, size_t ld, int upper) {
    Matrix m(n * n);
    for (size_t j = 0; j < n; ++j)
        for (size_t i = 0; i < n; ++i) {
            bool given = upper ? i <= j : i >= j;
            m[i * n + j] = read(at, type, given ? j * ld + i : i * ld + j);
        }
    return m;
}

// `m = l l^T`; the first row that has no root, counted from 1, or 0.
int cholesky(const Matrix &m, Matrix &l, size_t n) {
    l.assign(n * n, 0);
    for (size_t i = 0; i < n; ++i)
        for (size_t j = 0; j <= i; ++j) {
            double sum = m[i * n + j];
            for (size_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
            if (i == j && !(sum > 0)) return (int)i + 1;
            l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
        }
    return 0;
}

// `l^-1` of a lower triangle.
Matrix inverse_lower(const Matrix &l, size_t n) {
    Matrix x(n * n, 0);
    for (size_t j = 0; j < n; ++j)
        for (size_t i = j; i < n; ++i) {
            double sum = i == j;
            for (size_t k = j; k < i; ++k) sum -= l[i * n + k] * x[k * n + j];
            x[i * n + j] = sum / l[i * n + i];
        }
    return x;
}

// Eigenvalues in ascending order, with the vectors as rows, by Jacobi's rotations.
bool eigen(Matrix m, std::vector<double> &values, Matrix &vectors, size_t n) {
    Matrix v(n * n, 0);
    for (size_t i = 0; i < n; ++i) v[i * n + i] = 1;
    for (double x : m)
        if (!std::isfinite(x)) return false;
    for (int sweep = 0; sweep < 60; ++sweep) {
        double off = 0, all = 0;
        for (size_t i = 0; i < n; ++i)
            for (size_t j = 0; j < n; ++j) {
                all += m[i * n + j] * m[i * n + j];
                if (i != j) off += m[i * n + j] * m[i * n + j];
            }
        if (off <= 1e-31 * all) break;
        for (size_t p = 0; p + 1 < n; ++p)
            for (size_t q = p + 1; q < n; ++q) {
                double apq = m[p * n + q];
                if (apq == 0) continue;
                double theta = (m[q * n + q] - m[p * n + p]) / (2 * apq);
                double t = (theta >= 0 ? 1 : -1) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
                double c = 1 / std::sqrt(t * t + 1), s = t * c;
                for (size_t k = 0; k < n; ++k) {
                    double x = m[k * n + p], y = m[k * n + q];
                    m[k * n + p] = c * x - s * y, m[k * n + q] = s * x + c * y;
                }
                for (size_t k = 0; k < n; ++k) {
                    double x = m[p * n + k], y = m[q * n + k];
                    m[p * n + k] = c * x - s * y, m[q * n + k] = s * x + c * y;
                    x = v[p * n + k], y = v[q * n + k];
                    v[p * n + k] = c * x - s * y, v[q * n + k] = s * x + c * y;
                }
            }
    }
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return m[i * n + i] < m[j * n + j]; });
    values.resize(n);
    vectors.resize(n * n);
    for (size_t i = 0; i < n; ++i) {
        values[i] = m[order[i] * n + order[i]];
        std::copy_n(&v[order[i] * n], n, &vectors[i * n]);
    }
    return true;
}

// The vectors to the columns of `a`, the values to `w`.
void put(const std::vector<double> &values, const Matrix &vectors, void *a, size_t ld, void *w, int type, size_t n) {
    for (size_t j = 0; j < n; ++j) {
        write(w, type, j, values[j]);
        for (size_t i = 0; i < n; ++i) write(a, type, j * ld + i, vectors[j * n + i]);
    }
}

int potrf(void *handle, int upper, size_t n, void *a, size_t ld, int *info, int type) {
    LOCKED;
    use_legacy_stream();
    auto work = [=] {
        Matrix l;
        *info = cholesky(symmetric(a, type, n, ld, upper), l, n);
        if (*info) return;
        for (size_t i = 0; i < n; ++i)
            for (size_t j = 0; j <= i; ++j) write(a, type, upper ? i * ld + j : j * ld + i, l[i * n + j]);
    };
    return queue(static_cast<Handle *>(handle)->stream, work) ? 0 : REFUSED;
}

int potri(void *handle, int upper, size_t n, void *a, size_t ld, int *info, int type) {
    LOCKED;
    use_legacy_stream();
    auto work = [=] {
        Matrix l(n * n, 0);
        *info = 0;
        for (size_t i = 0; i < n; ++i)
            for (size_t j = 0; j <= i; ++j) l[i * n + j] = read(a, type, upper ? i * ld + j : j * ld + i);
        for (size_t i = 0; i < n; ++i)
            if (l[i * n + i] == 0) {
                *info = (int)i + 1;
                return;
            }
        Matrix x = inverse_lower(l, n);
        for (size_t i = 0; i < n; ++i)
            for (size_t j = 0; j <= i; ++j) {
                double sum = 0;
                for (size_t k = i; k < n; ++k) sum += x[k * n + i] * x[k * n + j];
                write(a, type, upper ? i * ld + j : j * ld + i, sum);
            }
    };
    return queue(static_cast<Handle *>(handle)->stream, work) ? 0 : REFUSED;
}

// Eigenvalue functions wait in between, so they cannot be recorded.
int syev(void *handle, int upper, size_t n, void *a, size_t ld, void *w, int *info, int type, size_t batches) {
    LOCKED;
    use_legacy_stream();
    auto work = [=] {
        size_t bytes = type == F64 ? 8 : 4;
        for (size_t batch = 0; batch < batches; ++batch) {
            char *m = static_cast<char *>(a) + batch * ld * n * bytes, *to = static_cast<char *>(w) + batch * n * bytes;
            std::vector<double> values;
            Matrix vectors;
            info[batch] = eigen(symmetric(m, type, n, ld, upper), values, vectors, n) ? 0 : NOT_FINITE;
            if (info[batch] == 0) put(values, vectors, m, ld, to, type, n);
        }
    };
    return queue(static_cast<Handle *>(handle)->stream, work, false) ? 0 : REFUSED;
}

// `a x = value b x`.
int sygv(void *handle, int upper, size_t n, void *a, size_t lda, void *b, size_t ldb, void *w, int *info, int type) {
    LOCKED;
    use_legacy_stream();
    auto work = [=] {
        Matrix l, m = symmetric(a, type, n, lda, upper), vectors, reduced(n * n);
        std::vector<double> values;
        if (int at = cholesky(symmetric(b, type, n, ldb, upper), l, n)) {
            *info = (int)n + at;
            return;
        }
        Matrix x = inverse_lower(l, n), half(n * n);
        for (size_t i = 0; i < n; ++i)
            for (size_t j = 0; j < n; ++j)
                for (size_t k = 0; k <= i; ++k) half[i * n + j] += x[i * n + k] * m[k * n + j];
        for (size_t i = 0; i < n; ++i)
            for (size_t j = 0; j < n; ++j)
                for (size_t k = 0; k <= j; ++k) reduced[i * n + j] += half[i * n + k] * x[j * n + k];
        if (!eigen(reduced, values, vectors, n)) {
            *info = NOT_FINITE;
            return;
        }
        Matrix back(n * n);
        for (size_t v = 0; v < n; ++v)
            for (size_t i = 0; i < n; ++i)
                for (size_t k = i; k < n; ++k) back[v * n + i] += x[k * n + i] * vectors[v * n + k];
        *info = 0;
        put(values, back, a, lda, w, type, n);
    };
    return queue(static_cast<Handle *>(handle)->stream, work, false) ? 0 : REFUSED;
}

// `count` numbers made from pairs of uniform ones in (0, 1).
template <class T, class F> int generate(void *handle, T *to, size_t count, F make) {
    LOCKED;
    auto *own = static_cast<Handle *>(handle);
    auto work = [to, count, make, random = own->random] {
        auto uniform = [&random] { return (((*random)() >> 11) + 0.5) * 0x1p-53; };
        for (size_t i = 0; i < count; ++i) {
            double first = uniform();
            to[i] = (T)make(first, uniform());
        }
    };
    return queue(own->stream, work) ? 0 : REFUSED;
}
double uniform(double first, double) { return first; }
double normal(double first, double second) { return std::sqrt(-2 * std::log(first)) * std::cos(6.283185307179586 * second); }

} // namespace

SHOWN int cublasCreate_v2(void **made) { return create(made); }
SHOWN int cublasDestroy_v2(void *handle) { return destroy(handle); }
SHOWN int cublasSetStream_v2(void *handle, void *stream) { return set_stream(handle, stream); }
SHOWN int cublasDgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k, const double *alpha, const void *a, int lda, long long stride_a,
                                    const void *b, int ldb, long long stride_b, const double *beta, void *c, int ldc, long long stride_c, int batches) {
    return multiply(handle, m, n, k, *alpha, {a, F64, ta, lda, stride_a}, {b, F64, tb, ldb, stride_b}, *beta, c, F64, ldc, stride_c, batches);
}
SHOWN int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda,
                                     long long stride_a, const void *b, int type_b, int ldb, long long stride_b, const void *beta, void *c, int type,
                                     int ldc, long long stride_c, int batches, int compute, int) {
    // CUBLAS_COMPUTE_16F and its pedantic form, CUBLAS_COMPUTE_64F and its; all others are of 32 bits.
    int scale = compute == 64 || compute == 65 ? F16 : compute == 70 || compute == 71 ? F64 : F32;
    const bool rounded = compute == 77; // CUBLAS_COMPUTE_32F_FAST_TF32
    return multiply(handle, m, n, k, read(alpha, scale, 0), {a, type_a, ta, lda, stride_a, rounded}, {b, type_b, tb, ldb, stride_b, rounded},
                    read(beta, scale, 0), c, type, ldc, stride_c, batches);
}
SHOWN int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda, const void *b, int type_b,
                       int ldb, const void *beta, void *c, int type, int ldc, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type, ldc, 0, 1, compute,
                                      algorithm);
}

SHOWN int cusolverDnCreate(void **made) { return create(made); }
SHOWN int cusolverDnDestroy(void *handle) { return destroy(handle); }
SHOWN int cusolverDnSetStream(void *handle, void *stream) { return set_stream(handle, stream); }
SHOWN int cusolverDnCreateParams(void **made) { return create(made); }
SHOWN int cusolverDnDestroyParams(void *params) { return destroy(params); }

#define TRIANGLES(letter, real, type)                                                                                                                 \
    SHOWN int cusolverDn##letter##potrf_bufferSize(void *, int, int n, real *, int, int *work) { return *work = n, 0; }                               \
    SHOWN int cusolverDn##letter##potri_bufferSize(void *, int, int n, real *, int, int *work) { return *work = n, 0; }                               \
    SHOWN int cusolverDn##letter##potrf(void *h, int upper, int n, real *a, int ld, real *, int, int *info) {                                         \
        return potrf(h, upper, n, a, ld, info, type);                                                                                                 \
    }                                                                                                                                                 \
    SHOWN int cusolverDn##letter##potri(void *h, int upper, int n, real *a, int ld, real *, int, int *info) {                                         \
        return potri(h, upper, n, a, ld, info, type);                                                                                                 \
    }                                                                                                                                                 \
    SHOWN int cusolverDn##letter##syevd_bufferSize(void *, int, int, int n, const real *, int, const real *, int *work) { return *work = n, 0; }      \
    SHOWN int cusolverDn##letter##syevd(void *h, int vectors, int upper, int n, real *a, int ld, real *w, real *, int, int *info) {                   \
        return vectors == 1 ? syev(h, upper, n, a, ld, w, info, type, 1) : REFUSED;                                                                   \
    }                                                                                                                                                 \
    SHOWN int cusolverDn##letter##sygvd_bufferSize(void *, int, int, int, int n, const real *, int, const real *, int, const real *, int *work) {     \
        return *work = n, 0;                                                                                                                          \
    }                                                                                                                                                 \
    SHOWN int cusolverDn##letter##sygvd(void *h, int kind, int vectors, int upper, int n, real *a, int lda, real *b, int ldb, real *w, real *, int,   \
                                        int *info) {                                                                                                  \
        return kind == 1 && vectors == 1 ? sygv(h, upper, n, a, lda, b, ldb, w, info, type) : REFUSED;                                                \
    }
TRIANGLES(S, float, F32)
TRIANGLES(D, double, F64)

SHOWN int cusolverDnXsyevBatched_bufferSize(void *, void *, int, int, int64_t n, int, const void *, int64_t, int, const void *, int, size_t *device,
                                            size_t *host, int64_t batches) {
    return *device = 8 * n * batches, *host = 0, 0;
}
SHOWN int cusolverDnXsyevBatched(void *handle, void *, int vectors, int upper, int64_t n, int type, void *a, int64_t ld, int type_w, void *w, int compute,
                                 void *, size_t, void *, size_t, int *info, int64_t batches) {
    bool alike = type == type_w && type == compute && vectors == 1;
    return alike ? syev(handle, upper, n, a, ld, w, info, type, batches) : REFUSED;
}

SHOWN int curandCreateGenerator(void **made, int) { return create(made); }
SHOWN int curandDestroyGenerator(void *handle) { return destroy(handle); }
SHOWN int curandSetStream(void *handle, void *stream) { return set_stream(handle, stream); }
SHOWN int curandSetPseudoRandomGeneratorSeed(void *handle, unsigned long long seed) {
    LOCKED;
    static_cast<Handle *>(handle)->random = std::make_shared<std::mt19937_64>(seed);
    return 0;
}
SHOWN int curandGenerateUniform(void *handle, float *to, size_t count) { return generate(handle, to, count, uniform); }
SHOWN int curandGenerateUniformDouble(void *handle, double *to, size_t count) { return generate(handle, to, count, uniform); }
// Normal numbers come in pairs.
constexpr int ODD = 105;
SHOWN int curandGenerateNormal(void *handle, float *to, size_t count, float mean, float spread) {
    if (count % 2) return ODD;
    return generate(handle, to, count, [=](double first, double second) { return mean + spread * normal(first, second); });
}
SHOWN int curandGenerateNormalDouble(void *handle, double *to, size_t count, double mean, double spread) {
    if (count % 2) return ODD;
    return generate(handle, to, count, [=](double first, double second) { return mean + spread * normal(first, second); });
}
