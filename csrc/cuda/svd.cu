// A block for each matrix, a warp for each vector or pair of vectors: see svd.h. What is turned
// again and again lies in shared memory where it fits.
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "svd.h"

namespace soco::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMostWarps = 16;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename A>
__device__ A warp_sum(A value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// The place of the largest value (the smallest with `sign` -1), the first of equals, in every lane.
template <typename A>
__device__ int64_t warp_largest(A value, int64_t place) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, step);
    const int64_t elsewhere = __shfl_xor_sync(kAllLanes, place, step);
    if (other > value || (other == value && elsewhere < place)) {
      value = other;
      place = elsewhere;
    }
  }
  return place;
}

template <typename A>
__device__ A magnitude(A value) {
  return value < 0 ? -value : value;
}

// `count` vectors of `length` numbers, one behind the other.
template <typename A>
struct Vectors {
  A* data;
  int64_t count, length;
  __device__ A* operator[](int64_t i) const { return data + i * length; }
};

struct Place {
  int64_t lane, warp, warps, thread, threads;
};

// Entry i of a vector belongs to lane i % kWarp, wherever a loop begins: what a lane wrote, the
// same lane reads next. The first of a lane's own from `begin` on:
__device__ int64_t first_of(int64_t begin, const Place& me) {
  const int64_t i = begin / kWarp * kWarp + me.lane;
  return i < begin ? i + kWarp : i;
}

template <typename A>
__device__ A dot(const A* x, const A* y, int64_t begin, int64_t end, const Place& me) {
  A sum = 0;
  for (int64_t i = first_of(begin, me); i < end; i += kWarp) sum += x[i] * y[i];
  return warp_sum(sum);
}

// See cpu/svd_rows.cpp: Householder's QR by the whole block.
template <typename A>
__device__ void factorize(Vectors<A> columns, Vectors<A> triangle, A* factors, A* squares,
                          int32_t* places, const Place& me) {
  const int64_t count = columns.count, length = columns.length;
  __shared__ int64_t largest;
  for (int64_t j = me.warp; j < count; j += me.warps) {
    const A square = dot(columns[j], columns[j], 0, length, me);
    if (me.lane == 0) squares[j] = square;
  }
  __syncthreads();
  for (int64_t k = 0; k < count; ++k) {
    if (places != nullptr) {
      if (me.warp == 0) {
        A most = -1;
        int64_t place = count;
        for (int64_t j = k + me.lane; j < count; j += kWarp)
          if (squares[j] > most) {
            most = squares[j];
            place = j;
          }
        place = warp_largest(most, place);
        if (me.lane == 0) largest = place;
      }
      __syncthreads();
      const int64_t other = largest;
      if (other != k) {
        for (int64_t i = me.thread; i < length; i += me.threads) {
          const A held = columns[k][i];
          columns[k][i] = columns[other][i];
          columns[other][i] = held;
        }
        for (int64_t i = me.thread; i < k; i += me.threads) {
          const A held = triangle[i][k];
          triangle[i][k] = triangle[i][other];
          triangle[i][other] = held;
        }
        if (me.thread == 0) {
          squares[other] = squares[k];  // that of k is computed anew below
          const int32_t held = places[k];
          places[k] = places[other];
          places[other] = held;
        }
      }
      __syncthreads();
    }
    A* const v = columns[k];
    const A square = dot(v, v, k, length, me);
    const A old = v[k];
    const bool seen = square > JacobiLimits<A>::kSmallestPivot;
    const A norm = seen ? sqrt(square) : A(0);
    const A diagonal = old < 0 ? norm : -norm;
    __syncthreads();
    if (me.thread == 0) {
      factors[k] = seen ? 1 / (norm * (norm + magnitude(old))) : A(0);
      triangle[k][k] = seen ? diagonal : A(0);
      v[k] = old - diagonal;
    }
    for (int64_t j = me.thread; j < k; j += me.threads) triangle[k][j] = 0;
    if (!seen)
      for (int64_t i = k + me.thread; i < length; i += me.threads) v[i] = 0;
    __syncthreads();
    for (int64_t j = k + 1 + me.warp; j < count; j += me.warps) {
      A* const x = columns[j];
      const A by = factors[k] * dot(x, v, k, length, me);
      A rest = 0;
      for (int64_t i = first_of(k, me); i < length; i += kWarp) {
        const A entry = x[i] - by * v[i];
        if (i == k)
          triangle[k][j] = seen || places == nullptr ? entry : A(0);  // the rest is as small
        else
          rest += entry * entry;
        x[i] = i == k ? A(0) : entry;
      }
      rest = warp_sum(rest);
      if (me.lane == 0) squares[j] = rest;
    }
    __syncthreads();
  }
}

// x = H_0 ... H_last x, by one warp.
template <typename A>
__device__ void reflect(Vectors<A> reflectors, const A* factors, A* x, const Place& me) {
  for (int64_t k = reflectors.count - 1; k >= 0; --k) {
    const A* const v = reflectors[k];
    const A by = factors[k] * dot(x, v, k, reflectors.length, me);
    for (int64_t i = first_of(k, me); i < reflectors.length; i += kWarp) x[i] -= by * v[i];
  }
}

// Turns two vectors until they are orthogonal, and two others with them; whether they were not.
template <typename A>
__device__ bool rotate(A* x, A* y, A* turn_x, A* turn_y, int64_t length, A limit, const Place& me) {
  A product = 0, first = 0, second = 0;
  for (int64_t i = me.lane; i < length; i += kWarp) {
    const A u = x[i], v = y[i];
    product += u * v;
    first += u * u;
    second += v * v;
  }
  product = warp_sum(product);
  first = warp_sum(first);
  second = warp_sum(second);
  const A less = first < second ? first : second;
  if (!(less > JacobiLimits<A>::kSmallestPivot)) return false;  // squares below have no digits
  if (!(magnitude(product) > limit * sqrt(first) * sqrt(second))) return false;
  const A cotangent = (second - first) / (2 * product), size = magnitude(cotangent);
  const bool huge = !(size < JacobiLimits<A>::kHuge);
  const A steep = 1 / (size + (huge ? size : sqrt(1 + cotangent * cotangent)));
  const A tangent = cotangent < 0 ? -steep : steep;
  const A cosine = 1 / sqrt(1 + tangent * tangent);
  const A s = cosine * tangent, h = s / (1 + cosine);
  for (int64_t i = me.lane; i < length; i += kWarp) {
    const A u = x[i], v = y[i], p = turn_x[i], q = turn_y[i];
    x[i] = u - s * (v + h * u);
    y[i] = v + s * (u - h * v);
    turn_x[i] = p - s * (q + h * p);
    turn_y[i] = q + s * (p - h * q);
  }
  return true;
}

template <typename A>
__device__ int32_t orthogonalize(Vectors<A> x, Vectors<A> turn, const Place& me) {
  const int64_t even = x.count + x.count % 2;
  const A limit = JacobiLimits<A>::kHalfUlp * sqrt(roundings<A>(x.count));
  __shared__ int turned;
  for (int32_t sweep = 0; sweep < kMostSweeps; ++sweep) {
    if (me.thread == 0) turned = 0;
    __syncthreads();
    for (int64_t round = 0; round < even - 1; ++round) {  // a round robin
      for (int64_t p = me.warp; p < even / 2; p += me.warps) {
        const int64_t one = p == 0 ? even - 1 : (round + p) % (even - 1);
        const int64_t other = (round + even - 1 - p) % (even - 1);
        const int64_t i = one < other ? one : other, j = one < other ? other : one;
        if (j < x.count && rotate(x[i], x[j], turn[i], turn[j], x.length, limit, me) &&
            me.lane == 0)
          turned = 1;
      }
      __syncthreads();
    }
    const bool any = turned != 0;
    __syncthreads();
    if (!any) return sweep;
  }
  return kMostSweeps;
}

// See cpu/svd_rows.cpp; by one warp, of the first `length` numbers of each vector.
template <typename A>
__device__ void complete(Vectors<A> x, int64_t given, int64_t length, const Place& me) {
  for (int64_t k = given; k < x.count; ++k) {
    A least = 2;
    int64_t best = length;
    for (int64_t e = me.lane; e < length; e += kWarp) {
      A inside = 0;
      for (int64_t i = 0; i < k; ++i) inside += x[i][e] * x[i][e];
      if (inside < least) {
        least = inside;
        best = e;
      }
    }
    best = warp_largest(-least, best);
    A* const own = x[k];
    for (int64_t i = me.lane; i < x.length; i += kWarp) own[i] = i == best;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t i = 0; i < k; ++i) {
        __syncwarp();
        const A by = dot(own, x[i], 0, length, me);
        for (int64_t e = me.lane; e < length; e += kWarp) own[e] -= by * x[i][e];
      }
    __syncwarp();
    const A scale = 1 / sqrt(dot(own, own, 0, length, me));
    for (int64_t e = me.lane; e < length; e += kWarp) own[e] *= scale;
    __syncwarp();
  }
}

template <typename A>
__device__ bool largest_is_negative(const A* x, int64_t length, const Place& me) {
  A most = -1;
  int64_t place = length;
  for (int64_t i = me.lane; i < length; i += kWarp)
    if (magnitude(x[i]) > most) {
      most = magnitude(x[i]);
      place = i;
    }
  return x[warp_largest(most, place)] < 0;
}

// The exponent of a number as of frexp, and 2^exponent.
__device__ int exponent_of(float value) { return value > 0 ? ilogbf(value) + 1 : 0; }
__device__ int exponent_of(double value) { return value > 0 ? ilogb(value) + 1 : 0; }
__device__ float power_of_two(float, int exponent) { return ldexpf(1.0f, exponent); }
__device__ double power_of_two(double, int exponent) { return ldexp(1.0, exponent); }

constexpr int kNotANumber = 1 << 20;  // in the place of an exponent

// Copies a matrix divided by 2^exponent, which makes its largest entry less than 1, its rows in the
// order that is found here; kNotANumber if it holds NaN or Inf. sizes: (rows,), scratch.
template <typename A>
__device__ int load_scaled(const A* matrix, const SvdBatch& batch, Vectors<A> columns, A* sizes,
                           int32_t* row_order, const Place& me) {
  __shared__ int exponent;
  __shared__ int32_t starts[kRowSizes];
  for (int64_t i = me.warp; i < batch.rows; i += me.warps) {
    A most = 0, nothing = 0;  // nothing: NaN if anything is not finite
    for (int64_t j = me.lane; j < batch.columns; j += kWarp) {
      const A size = magnitude(matrix[i * batch.row_stride + j * batch.column_stride]);
      most = size > most ? size : most;
      nothing += size * A(0);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const A other = __shfl_xor_sync(kAllLanes, most, step);
      most = other > most ? other : most;
    }
    nothing = warp_sum(nothing);
    if (me.lane == 0) sizes[i] = nothing == 0 ? most : nothing;
  }
  __syncthreads();
  if (me.thread == 0) {
    A most = 0;
    bool finite = true;
    for (int64_t i = 0; i < batch.rows; ++i) {
      most = sizes[i] > most ? sizes[i] : most;
      finite = finite && sizes[i] == sizes[i];
    }
    const int whole = exponent_of(most);
    exponent = finite ? whole : kNotANumber;
    sort_rows(
        batch.rows,
        [=](int64_t i) { return sizes[i] > 0 ? exponent_of(sizes[i]) - whole : -kRowSizes; },
        starts, row_order);
  }
  __syncthreads();
  if (exponent == kNotANumber) return exponent;
  const A once = power_of_two(A(0), -(exponent / 2));
  const A twice = power_of_two(A(0), -(exponent - exponent / 2));
  for (int64_t e = me.thread; e < columns.count * columns.length; e += me.threads) {
    const int64_t i = e / columns.count, j = e % columns.count;  // along the rows of the matrix
    columns[j][i] =
        matrix[row_order[i] * batch.row_stride + j * batch.column_stride] * once * twice;
  }
  __syncthreads();
  return exponent;
}

template <typename A>
__global__ void batched_svd_kernel(SvdBatch batch, A* scratch, bool in_shared) {
  A* const shared = reinterpret_cast<A*>(shared_memory());
  const int64_t rows = batch.rows, count = batch.columns;
  const Place me{threadIdx.x % kWarp, threadIdx.x / kWarp, blockDim.x / kWarp, threadIdx.x,
                 blockDim.x};
  A* next = scratch + blockIdx.x * svd_scratch(rows, count);
  const Vectors<A> columns{next, count, rows};
  next += count * rows;
  const Vectors<A> triangle{next, count, count};
  next += count * count;
  A* const hot = in_shared ? shared : next;
  const Vectors<A> x{hot, count, count}, turn{hot + count * count, count, count};
  next += 2 * count * count;
  A* const factors = next;
  A* const second_factors = factors + count;
  A* const squares = second_factors + count;
  A* const sizes = squares + count;
  int32_t* const places = reinterpret_cast<int32_t*>(sizes + rows);
  int32_t* const order = places + count;
  int32_t* const row_order = order + count;
  __shared__ int64_t given;
  for (int64_t number = blockIdx.x; number < batch.batch; number += gridDim.x) {
    const int exponent = load_scaled(static_cast<const A*>(batch.matrices) + number * rows * count,
                                     batch, columns, sizes, row_order, me);
    if (exponent == kNotANumber) {  // the same for all threads
      __syncthreads();
      if (me.thread == 0) batch.sweeps[number] = kNotFinite;
      continue;
    }
    for (int64_t j = me.thread; j < count; j += me.threads) places[j] = static_cast<int32_t>(j);
    for (int64_t e = me.thread; e < count * count; e += me.threads)
      turn.data[e] = e / count == e % count;
    __syncthreads();
    factorize(columns, triangle, factors, squares, places, me);
    factorize(triangle, x, second_factors, squares, static_cast<int32_t*>(nullptr), me);
    const int32_t sweeps = orthogonalize(x, turn, me);
    if (me.thread == 0) {
      batch.sweeps[number] = sweeps;
      given = 0;
    }
    for (int64_t j = me.warp; j < count; j += me.warps) {
      const A square = dot(x[j], x[j], 0, count, me);
      if (me.lane == 0) squares[j] = square > JacobiLimits<A>::kSmallestPivot ? square : A(0);
    }
    __syncthreads();
    A* const values = static_cast<A*>(batch.values) + number * count;
    for (int64_t j = me.thread; j < count; j += me.threads) {
      int64_t place = 0;
      for (int64_t i = 0; i < count; ++i)
        place += squares[i] > squares[j] || (squares[i] == squares[j] && i < j);
      order[place] = static_cast<int32_t>(j);
      values[place] = sqrt(squares[j]) * power_of_two(A(0), exponent / 2) *
                      power_of_two(A(0), exponent - exponent / 2);
    }
    __syncthreads();
    for (int64_t k = me.thread; k < count; k += me.threads)
      if (squares[order[k]] > 0 && (k == count - 1 || !(squares[order[k + 1]] > 0))) given = k + 1;
    __syncthreads();
    const Vectors<A> left{static_cast<A*>(batch.left) + number * count * rows, count, rows};
    const Vectors<A> right{static_cast<A*>(batch.right) + number * count * count, count, count};
    for (int64_t k = me.warp; k < count; k += me.warps) {
      A *const u = left[k], *const v = right[k];
      for (int64_t i = me.lane; i < count; i += kWarp) u[i] = turn[order[k]][i];
      __syncwarp();
      reflect(triangle, second_factors, u, me);
      __syncwarp();
      for (int64_t i = me.lane; i < count; i += kWarp) v[places[i]] = u[i];
      __syncwarp();
      const A square = squares[order[k]];
      const A scale = square > 0 ? 1 / sqrt(square) : A(0);
      for (int64_t i = me.lane; i < rows; i += kWarp)
        u[i] = i < count ? x[order[k]][i] * scale : A(0);
    }
    __syncthreads();
    if (me.warp == 0) complete(left, given, count, me);
    __syncthreads();
    for (int64_t k = me.warp; k < count; k += me.warps) reflect(columns, factors, left[k], me);
    __syncthreads();
    for (int64_t k = me.warp; k < count; k += me.warps) {
      A *const u = left[k], *const v = right[k], *const sorted = columns[k];
      for (int64_t i = me.lane; i < rows; i += kWarp) sorted[i] = u[i];
      __syncwarp();
      for (int64_t i = me.lane; i < rows; i += kWarp) u[row_order[i]] = sorted[i];
      __syncwarp();
      const bool flip = batch.sign_by_right ? largest_is_negative(v, count, me)
                                            : largest_is_negative(u, rows, me);
      __syncwarp();
      for (int64_t i = me.lane; flip && i < rows; i += kWarp) u[i] = -u[i];
      for (int64_t i = me.lane; flip && i < count; i += kWarp) v[i] = -v[i];
    }
    __syncthreads();
  }
}

template <typename A>
void run(const SvdBatch& batch, void* scratch, void* stream) {
  const int64_t bytes = 2 * batch.columns * batch.columns * static_cast<int64_t>(sizeof(A));
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "batched_svd");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "batched_svd");
  constexpr int64_t kOther = 1024;  // what the kernel's own variables take, and more
  const bool in_shared = bytes + kOther <= most;
  const int64_t pairs = (batch.columns + 1) / 2;
  const int64_t warps = pairs < kMostWarps ? pairs : kMostWarps;
  const void* const kernel = reinterpret_cast<const void*>(&batched_svd_kernel<A>);
  if (in_shared)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "batched_svd");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(svd_blocks(batch.batch, batch.rows, batch.columns)));
  config.blockDim = dim3(static_cast<unsigned>(warps * kWarp));
  config.dynamicSmemBytes = in_shared ? static_cast<size_t>(bytes) : 0;
  config.stream = as_stream(stream);
  check(cudaLaunchKernelEx(&config, batched_svd_kernel<A>, batch, static_cast<A*>(scratch),
                           in_shared),
        "batched_svd");
}

}  // namespace

void batched_svd(const SvdBatch& batch, void* scratch, void* stream) {
  if (batch.batch == 0) return;
  if (batch.dtype == Dtype::kFloat64)
    run<double>(batch, scratch, stream);
  else
    run<float>(batch, scratch, stream);
}

}  // namespace soco::cuda
