// The part of cuSOLVER that soco/linalg/cusolver.py calls, on a processor: what the reference says
// of arguments is checked, and how a call goes wrong can be set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

// How the next calls go: well, or as the name says.
enum Mood {
  kWell,
  kNoHandle,
  kNoStream,
  kRefusesSize,
  kRefusesCall,
  kNotConverged,
  kWrong,
  kNaN,
  kUnordered,
  kNegative,
  kSaysNo
};

constexpr int kInvalid = 3, kInternal = 7;
constexpr int kHandle = 0x50c0, kOptions = 0x0c05;
constexpr int kReal32 = 0, kReal64 = 1;

struct Object {
  int kind;
  void* stream;
};

int mood = kWell;
int64_t handles = 0;
size_t device_size = 0, host_size = 0;

bool is(const void* object, int kind) {
  return object != nullptr && static_cast<const Object*>(object)->kind == kind;
}

// Sizes that a matrix of this many bytes is said to want; then they have to be there.
int ask(int64_t bytes, size_t* device, size_t* host) {
  if (mood == kRefusesSize) return kInternal;
  *device = device_size = static_cast<size_t>(bytes) + 24;
  *host = host_size = 40;
  return 0;
}

bool use(void* device, size_t device_bytes, void* host, size_t host_bytes) {
  if (device == nullptr || host == nullptr) return false;
  if (device_bytes != device_size || host_bytes != host_size) return false;
  std::memset(device, 0xff, device_bytes);
  std::memset(host, 0xff, host_bytes);
  return true;
}

using Wide = long double;

// One-sided Jacobi on the columns of a (m, n), m >= n: a becomes U diag(s), v the rotations.
void one_sided(std::vector<Wide>& a, int64_t m, int64_t n, std::vector<Wide>& v) {
  v.assign(static_cast<size_t>(n * n), 0);
  for (int64_t i = 0; i < n; ++i) v[i + i * n] = 1;
  for (int sweep = 0; sweep < 60; ++sweep) {
    bool turned = false;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        Wide pp = 0, qq = 0, pq = 0;
        for (int64_t i = 0; i < m; ++i) {
          pp += a[i + p * m] * a[i + p * m];
          qq += a[i + q * m] * a[i + q * m];
          pq += a[i + p * m] * a[i + q * m];
        }
        if (std::abs(pq) <= 1e-18L * std::sqrt(pp * qq) || pp == 0 || qq == 0) continue;
        turned = true;
        const Wide tau = (qq - pp) / (2 * pq);
        const Wide t = (tau >= 0 ? 1 : -1) / (std::abs(tau) + std::sqrt(1 + tau * tau));
        const Wide c = 1 / std::sqrt(1 + t * t), s = c * t;
        auto turn = [&](Wide* x, int64_t rows) {
          for (int64_t i = 0; i < rows; ++i) {
            const Wide left = x[i + p * rows], right = x[i + q * rows];
            x[i + p * rows] = c * left - s * right;
            x[i + q * rows] = s * left + c * right;
          }
        };
        turn(a.data(), m);
        turn(v.data(), n);
      }
    }
    if (!turned) return;
  }
}

std::vector<int64_t> sorted(int64_t n, const std::vector<Wide>& keys) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](auto x, auto y) { return keys[x] < keys[y]; });
  return order;
}

// Eigenvectors in the columns of a (n, n), of which the upper triangle counts; values ascending.
template <typename T>
void eigen(T* a, int64_t n, T* w) {
  std::vector<Wide> whole(static_cast<size_t>(n * n)), v, values(static_cast<size_t>(n));
  Wide shift = 0;  // makes it positive definite: singular values are eigenvalues then
  for (int64_t j = 0; j < n; ++j) {
    Wide sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      whole[i + j * n] = a[std::min(i, j) + std::max(i, j) * n];
      sum += std::abs(whole[i + j * n]);
    }
    shift = std::max(shift, sum);
  }
  for (int64_t i = 0; i < n; ++i) whole[i + i * n] += shift;
  one_sided(whole, n, n, v);
  for (int64_t j = 0; j < n; ++j) {
    Wide sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += whole[i + j * n] * whole[i + j * n];
    values[j] = std::sqrt(sum) - shift;
  }
  const std::vector<int64_t> order = sorted(n, values);
  for (int64_t j = 0; j < n; ++j) {
    w[j] = static_cast<T>(values[order[j]]);
    for (int64_t i = 0; i < n; ++i) a[i + j * n] = static_cast<T>(v[i + order[j] * n]);
  }
  if (mood == kWrong) w[n - 1] *= T(1.01);
  if (mood == kUnordered) {
    std::swap(w[0], w[1]);
    for (int64_t i = 0; i < n; ++i) std::swap(a[i], a[i + n]);
  }
  if (mood == kNaN) w[0] = std::nan("");
}

// a (m, n) = u diag(s) v^T, m >= n. Where a singular value is zero, the column of u is, too.
template <typename T>
void decompose(T* a, int64_t m, int64_t n, T* s, T* u, T* v) {
  std::vector<Wide> taken(a, a + m * n), turned, sizes(static_cast<size_t>(n));
  std::memset(a, 0xff, sizeof(T) * static_cast<size_t>(m * n));
  one_sided(taken, m, n, turned);
  for (int64_t j = 0; j < n; ++j) {
    Wide sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += taken[i + j * m] * taken[i + j * m];
    sizes[j] = -std::sqrt(sum);
  }
  const std::vector<int64_t> order = sorted(n, sizes);
  for (int64_t j = 0; j < n; ++j) {
    const Wide size = -sizes[order[j]];
    s[j] = static_cast<T>(size);
    for (int64_t i = 0; i < n; ++i) v[i + j * n] = static_cast<T>(turned[i + order[j] * n]);
    for (int64_t i = 0; i < m; ++i) {
      u[i + j * m] = size > 0 ? static_cast<T>(taken[i + order[j] * m] / size) : T(0);
    }
  }
  if (mood == kWrong) s[0] *= T(1.01);
  if (mood == kUnordered) {
    std::swap(s[0], s[1]);
    for (int64_t i = 0; i < m; ++i) std::swap(u[i], u[i + m]);
    for (int64_t i = 0; i < n; ++i) std::swap(v[i], v[i + n]);
  }
  if (mood == kNegative) {
    s[n - 1] = -s[n - 1];
    for (int64_t i = 0; i < m; ++i) u[i + (n - 1) * m] = -u[i + (n - 1) * m];
  }
  if (mood == kNaN) u[0] = std::nan("");
}

}  // namespace

extern "C" {

void set_mood(int wanted) { mood = wanted; }
int64_t handles_made() { return handles; }

int cusolverDnCreate(void** handle) {
  if (mood == kNoHandle) return kInternal;
  ++handles;
  *handle = new Object{kHandle, nullptr};
  return 0;
}

int cusolverDnCreateParams(void** params) {
  *params = new Object{kOptions, nullptr};
  return 0;
}

int cusolverDnSetStream(void* handle, void* stream) {
  if (!is(handle, kHandle) || mood == kNoStream) return kInvalid;
  static_cast<Object*>(handle)->stream = stream;
  return 0;
}

void* stream_of_last_call = nullptr;
void* last_stream() { return stream_of_last_call; }

int cusolverDnXsyevBatched_bufferSize(void* handle, void* params, int jobz, int uplo, int64_t n,
                                      int type_a, const void* a, int64_t lda, int type_w,
                                      const void* w, int compute, size_t* device, size_t* host,
                                      int64_t batch) {
  const bool good = is(handle, kHandle) && is(params, kOptions) && jobz == 1 && uplo == 1 &&
                    n > 0 && lda == n && batch > 0 && a != nullptr && w != nullptr &&
                    (type_a == kReal32 || type_a == kReal64) && type_a == type_w &&
                    type_a == compute;
  return good ? ask(n * 8 * batch, device, host) : kInvalid;
}

int cusolverDnXsyevBatched(void* handle, void* params, int jobz, int uplo, int64_t n, int type_a,
                           void* a, int64_t lda, int type_w, void* w, int compute, void* device,
                           size_t device_bytes, void* host, size_t host_bytes, int* info,
                           int64_t batch) {
  if (mood == kRefusesCall) return kInternal;
  size_t sizes[2] = {device_size, host_size};
  size_t again[2];
  if (cusolverDnXsyevBatched_bufferSize(handle, params, jobz, uplo, n, type_a, a, lda, type_w, w,
                                        compute, again, again + 1, batch) != 0 ||
      again[0] != sizes[0] || again[1] != sizes[1] ||
      !use(device, device_bytes, host, host_bytes) || info == nullptr) {
    return kInvalid;
  }
  stream_of_last_call = static_cast<Object*>(handle)->stream;
  for (int64_t k = 0; k < batch; ++k) {
    if (type_a == kReal32) {
      eigen(static_cast<float*>(a) + k * n * n, n, static_cast<float*>(w) + k * n);
    } else {
      eigen(static_cast<double*>(a) + k * n * n, n, static_cast<double*>(w) + k * n);
    }
    info[k] = mood == kNotConverged && k == batch - 1 ? 3 : 0;
  }
  return mood == kSaysNo ? kInternal : 0;
}

int cusolverDnXgesvdp_bufferSize(void* handle, void* params, int jobz, int econ, int64_t m,
                                 int64_t n, int type_a, const void* a, int64_t lda, int type_s,
                                 const void* s, int type_u, const void* u, int64_t ldu, int type_v,
                                 const void* v, int64_t ldv, int compute, size_t* device,
                                 size_t* host) {
  const bool good = is(handle, kHandle) && is(params, kOptions) && jobz == 1 && econ == 1 &&
                    m >= n && n > 0 && lda == m && ldu == m && ldv == n && a != nullptr &&
                    s != nullptr && u != nullptr && v != nullptr &&
                    (type_a == kReal32 || type_a == kReal64) && type_a == type_s &&
                    type_a == type_u && type_a == type_v && type_a == compute;
  return good ? ask(m * n * 8, device, host) : kInvalid;
}

int cusolverDnXgesvdp(void* handle, void* params, int jobz, int econ, int64_t m, int64_t n,
                      int type_a, void* a, int64_t lda, int type_s, void* s, int type_u, void* u,
                      int64_t ldu, int type_v, void* v, int64_t ldv, int compute, void* device,
                      size_t device_bytes, void* host, size_t host_bytes, int* info,
                      double* perturbation) {
  if (mood == kRefusesCall) return kInternal;
  size_t again[2];
  if (cusolverDnXgesvdp_bufferSize(handle, params, jobz, econ, m, n, type_a, a, lda, type_s, s,
                                   type_u, u, ldu, type_v, v, ldv, compute, again,
                                   again + 1) != 0 ||
      !use(device, device_bytes, host, host_bytes) || info == nullptr || perturbation == nullptr) {
    return kInvalid;
  }
  stream_of_last_call = static_cast<Object*>(handle)->stream;
  if (type_a == kReal32) {
    decompose(static_cast<float*>(a), m, n, static_cast<float*>(s), static_cast<float*>(u),
              static_cast<float*>(v));
  } else {
    decompose(static_cast<double*>(a), m, n, static_cast<double*>(s), static_cast<double*>(u),
              static_cast<double*>(v));
  }
  *perturbation = 0;
  *info = mood == kNotConverged ? 3 : 0;
  return mood == kSaysNo ? kInternal : 0;
}

}  // extern "C"
