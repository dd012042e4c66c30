// Low-rank layers of a group for 1 to 16 tokens in 16 bits: both products in one launch.
//
// A block per multiprocessor, all running at once. Each takes as many rows of `down` as the others,
// and computes their z; all wait at one barrier of the grid; each computes its own outputs.
//
// Weights flow through a ring in shared memory (ring.cuh), far ahead of the products. The copies go
// on from the first product to the second: while blocks wait for each other, the first rows of `up`
// are on their way.
//
// Products are those of the tensor cores, 16 tokens by 8 rows of weight by 16 inputs. A block works
// on up to three tiles of 8 rows at a time, which share one reading of the other factor; its warps
// share the inputs of a row, each a part of them, and their sums are added in order. So a sum runs
// in an order that depends on the number of inputs alone. z is float32; the second product takes it
// apart into two numbers of 16 bits, a high and a low part, so it is not rounded between the two
// products.
//
// A dependent launch (programmatic dependent launch, sm_90 and newer) begins while what the stream
// ran before still ends. Until that has ended nothing is read: only the cache is asked for the
// weights that the block begins with. The next grid may begin when all blocks have allowed it, so
// it never takes the place of a block that others wait for.
#pragma once
#include <type_traits>

#include "cuda/members.cuh"
#include "cuda/ptx.cuh"
#include "cuda/ring.cuh"
#include "cuda/tiles.cuh"

namespace soco::cuda::decoding {

constexpr int kMostBlocks = 256;       // of a grid
constexpr int64_t kAhead = 64 * 1024;  // bytes that a block asks for: what memory gives in 2 us

__host__ __device__ constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Shared memory, in bytes from its beginning.
struct Layout {
  int ring, partials, high, low, token_scale, parts, added, up_scale, held, residual, place, column;
  int total;
};

// What all blocks are told.
template <typename T, typename W>
struct Task {
  Members all;
  const T* x;
  const W* down;
  const float* down_scale;
  const T* bias;
  const T* residual;
  float* z;
  T* y;
  uint32_t* barrier;
  int64_t in, columns;  // of y
  int tokens, slots;
  bool gated, dependent;
  Layout at;
  int first[kMostBlocks + 1];  // column of y of each block, and behind them their number
};

// Columns of y of one member that a block computes.
struct Part {
  int member;
  int columns;     // of y
  int first;       // of them, among all that the block computes
  int row, rows;   // of up, that they are
  int64_t column;  // of the member, the first
};

// Elements between tokens of z in shared memory: lanes that read at once meet no common bank.
template <typename W>
__host__ __device__ constexpr int64_t pitch_of(int64_t rank) {
  return round_up(rank, kLine) + (sizeof(W) == 1 ? 8 : 32);
}

template <typename T, typename W, int kHalves>
class Worker {
  static constexpr int kLoads = 2 / sizeof(W);       // of 16 bytes of a token, per line of weight
  static constexpr int kInputs = 16 / sizeof(W);     // of a lane in a line
  static constexpr int kSums = 8 * kHalves * kRows;  // of a tile

 public:
  __device__ Worker(const Task<T, W>& given, unsigned char* shared)
      : task(given),
        memory(shared),
        ring(shared + given.at.ring, given.slots),
        thread(static_cast<int>(threadIdx.x)),
        warp(thread / 32),
        lane(thread % 32),
        from(given.all.ranks * blockIdx.x / gridDim.x),
        to(given.all.ranks * (blockIdx.x + 1) / gridDim.x),
        mine(lines_of(given.in * static_cast<int64_t>(sizeof(W)), warp)) {}

  __device__ void run() {
    if (task.dependent) {
      if (thread == 0) ask_for_weights();
      wait_for_stream();
    }
    begin_first();
    for (int slot = 0; slot < task.slots && stage == kFirst; ++slot) copy_next();
    find_parts();  // while the first weights are on their way
    if (stage == kBetween) next_rows();
    while (ring.copied < task.slots) copy_next();
    load_small();
    first_product();  // and a barrier of the block
    if (thread == 0) grid_barrier(task.barrier);
    __syncthreads();
    if (task.dependent) let_next_begin();
    for (int p = 0; p < part_count; ++p) {
      if (p > 0) __syncthreads();  // nobody reads the z of the part before any longer
      load_z(part(p));
      identity(part(p));
      __syncthreads();
      second_product(part(p));
    }
  }

 private:
  const Task<T, W>& task;
  unsigned char* const memory;
  Ring ring;
  const int thread, warp, lane;
  const int64_t from, to;  // rows of down
  const Lines mine;        // of them
  int64_t column = 0;      // the first column of y that is the block's
  int columns = 0, part_count = 0;
  bool knows_parts = false;
  enum Stage { kFirst, kBetween, kSecond, kNone };
  Stage stage = kNone;  // whose weights are copied
  int at_part = 0;      // of the second
  int turn = 0;         // which of two buffers the sums of tiles go to

  template <typename V>
  __device__ V* shared(int offset) const {
    return reinterpret_cast<V*>(memory + offset);
  }
  __device__ Part& part(int number) const { return shared<Part>(task.at.parts)[number]; }

  // Which columns of which members are the block's, and which rows of up they are.
  __device__ void find_parts() {
    column = task.first[blockIdx.x];
    const int64_t last = task.first[blockIdx.x + 1];
    columns = static_cast<int>(last - column);
    int first = 0;
    for (int m = 0; m < task.all.count; ++m) {
      const int64_t begin = task.gated ? 0 : task.all.column[m];
      const int64_t end = begin + task.all.member[m].out;
      const int64_t low = column > begin ? column : begin, high = last < end ? last : end;
      if (low >= high) continue;
      const int count = static_cast<int>(high - low);
      const int64_t at = low - begin;
      if (thread == 0) {
        const bool pivoted = task.all.member[m].sources != nullptr;
        part(part_count) = {
            m, count, first, static_cast<int>(pivoted ? 0x7fffffff : at), pivoted ? 0 : count, at};
      }
      first += count;
      ++part_count;
    }
    __syncthreads();
    for (int p = 0; p < part_count; ++p) read_sources(part(p));
    __syncthreads();
    knows_parts = true;
  }

  // Of a pivoted member: which rows of up the columns are, and which numbers of z.
  __device__ void read_sources(Part& here) {
    const Member& member = task.all.member[here.member];
    if (member.sources == nullptr) return;
    int* const place = shared<int>(task.at.place) + here.first;
    int* const column_of = shared<int>(task.at.column) + here.first;
    for (int c = thread; c < here.columns; c += kThreads) {
      // A source that is wrong gives a wrong output, but nothing outside of up and z is read.
      int64_t source = member.sources[here.column + c];
      const int64_t most = member.rank + member.rows - 1;
      source = source < 0 ? 0 : (source < most ? source : most);
      place[c] = static_cast<int>(source);
      column_of[c] = 0;
      if (source >= member.rank) {
        atomicMin(&here.row, static_cast<int>(source - member.rank));
        atomicAdd(&here.rows, 1);
      }
    }
    __syncthreads();
    const int row_of_first = here.row;
    for (int c = thread; c < here.columns; c += kThreads) {
      const int64_t index = place[c] - member.rank - row_of_first;
      if (place[c] >= member.rank && index < here.columns) column_of[index] = c;
    }
    __syncthreads();
    if (thread == 0) {
      if (here.rows == 0) here.row = 0;
      if (here.rows > member.rows - here.row) here.rows = static_cast<int>(member.rows) - here.row;
    }
  }

  // The rows of down that the block begins with, into the cache.
  __device__ void ask_for_weights() const {
    const int64_t bytes = (to - from) * task.in * static_cast<int64_t>(sizeof(W));
    if (bytes > 0)
      read_ahead(task.down + from * task.in,
                 static_cast<uint32_t>(bytes < kAhead ? bytes : kAhead));
  }

  // ---- copies

  __device__ void begin_first() {
    stage = kFirst;
    const int64_t of_row = task.in * static_cast<int64_t>(sizeof(W));
    if (!ring.begin(task.down + from * task.in, of_row, static_cast<int>(to - from), of_row, mine))
      next_rows();
  }

  // Which rows are copied next: behind those of the first product, and once it is known which they
  // are, those of the block's parts of the second.
  __device__ void next_rows() {
    if (stage == kFirst) stage = kBetween;
    if (stage == kBetween) {
      if (!knows_parts) return;
      stage = kSecond;
      at_part = -1;
    }
    while (++at_part < part_count) {
      const Part& here = part(at_part);
      const Member& member = task.all.member[here.member];
      const int64_t of_row = member.rank * static_cast<int64_t>(sizeof(W));
      if (ring.begin(static_cast<const W*>(member.up) + here.row * member.stride,
                     member.stride * static_cast<int64_t>(sizeof(W)), here.rows, of_row,
                     lines_of(of_row, warp)))
        return;
    }
    stage = kNone;
  }

  __device__ void copy_next() {
    if (ring.copy_next()) next_rows();
  }

  // What was read last is not needed any longer: its slots are filled again.
  __device__ void release(int count) {
    ring.release(count);
    for (int i = 0; i < count; ++i) copy_next();
  }

  // ---- products

  // What is read once: bias, scales and residual of the block's columns, long before they are
  // needed.
  __device__ void load_small() {
    for (int p = 0; p < part_count; ++p) {
      const Part here = part(p);
      const Member& member = task.all.member[here.member];
      float* const added = shared<float>(task.at.added) + here.first;
      float* const scale = shared<float>(task.at.up_scale) + here.first;
      const int64_t of_bias = task.all.column[here.member] + here.column;
      for (int c = thread; c < here.columns; c += kThreads) {
        added[c] = task.bias == nullptr ? 0.0f : widen(task.bias[of_bias + c]);
        if (c < here.rows)
          scale[c] = member.up_scale == nullptr ? 1.0f : member.up_scale[here.row + c];
      }
    }
    if (task.residual == nullptr) return;
    float* const residual = shared<float>(task.at.residual);
    for (int c = thread; c < columns; c += kThreads)
      for (int t = 0; t < task.tokens; ++t)
        residual[t * columns + c] = widen(task.residual[t * task.columns + column + c]);
  }

  // The sums of a warp for the tiles that are worked on, where the threads that add them find them.
  // There are two places in turn: one barrier of the block after it is all that they need.
  __device__ const float* put(const float (&sums)[kTiles][4], int count) {
    float* const place =
        shared<float>(task.at.partials) + turn * (kTiles * kWarps * kSums) + warp * kSums;
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i >= count) continue;
      float* const own = place + i * (kWarps * kSums) + lane / 4 * kRows + lane % 4 * 2;
      own[0] = sums[i][0];
      own[1] = sums[i][1];
      if (kHalves == 1) continue;
      own[8 * kRows] = sums[i][2];
      own[8 * kRows + 1] = sums[i][3];
    }
    return place - warp * kSums;
  }

  // Of what the warps put there: the sum for one token and the row of this lane.
  __device__ float total(const float* put_there, int token) const {
    const float* const own =
        put_there + lane / kRows * (kWarps * kSums) + token * kRows + lane % kRows;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += own[w * kSums];
    return sum;
  }

  // Inputs of this lane in a line of x, zeros where there are none.
  __device__ void load_tokens(uint4 (&tokens)[kHalves][kLoads], int of_line) const {
    const int64_t input = static_cast<int64_t>(of_line) * 4 * kInputs + lane % 4 * kInputs;
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const int token = half * 8 + lane / 4;
        const int64_t at = input + load * 8;
        tokens[half][load] = {0, 0, 0, 0};
        if (token < task.tokens && at < task.in)
          tokens[half][load] = *reinterpret_cast<const uint4*>(task.x + token * task.in + at);
      }
  }

  __device__ void first_product() {
    for (int64_t first = from; first < to; first += kTiles * kRows) {
      const int count = tiles_of(to - first);
      const int64_t own = first + lane;  // the row that this lane adds up
      const bool adds = lane < count * kRows && own < to;
      const float scale = adds && task.down_scale != nullptr ? task.down_scale[own] : 1.0f;
      float sums[kTiles][4] = {};
      for (int l = mine.begin; l < mine.end; l += kChunk) {
        uint4 tokens[kChunk][kHalves][kLoads];
        const int there = chunk_of(mine.end - l);
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          if (i < there) load_tokens(tokens[i], l + i);
        ring.wait_for(count);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (j >= count) continue;
          const uint4* const slot = ring.slot_of(j);
#pragma unroll
          for (int i = 0; i < kChunk; ++i)
            if (i < there) multiply_line<T, W, kHalves>(sums[j], tokens[i], slot[i * kThreads]);
        }
        release(count);
      }
      const float* const put_there = put(sums, count);
      __syncthreads();
      for (int t = warp; t < task.tokens && adds; t += kWarps)
        task.z[t * task.all.ranks + own] = total(put_there, t) * scale;
    }
    __syncthreads();  // all of z is written, and nobody reads sums any longer
  }

  // What float16 z of one size up to `top` is multiplied by, so that neither its high part
  // overflows nor its low part is lost: a power of two.
  static __device__ float scale_for(float top) {
    const uint32_t exponent = float_bits(top) >> 23;
    if (exponent == 0 || exponent == 255) return 1.0f;
    const uint32_t wanted = 267u - exponent;
    return bits_float((wanted < 253u ? wanted : 253u) << 23);
  }

  // z of a part's member into shared memory, in two parts of 16 bits, and zeros behind it.
  __device__ void load_z(const Part& here) {
    const int64_t rank = task.all.member[here.member].rank, pitch = pitch_of<W>(rank);
    const float* const z = task.z + task.all.z_column[here.member];
    float* const scale = shared<float>(task.at.token_scale);
    if constexpr (std::is_same_v<T, Float16>) {
      for (int t = warp; t < task.tokens; t += kWarps) {
        float top = 0;
        for (int64_t k = lane; k < rank; k += 32) {
          const float size = fabsf(load_fresh_one(z + t * task.all.ranks + k));
          top = size > top ? size : top;
        }
        for (int apart = 16; apart > 0; apart /= 2) {
          const float other = __shfl_xor_sync(0xffffffffu, top, apart);
          top = other > top ? other : top;
        }
        if (lane == 0) scale[t] = scale_for(top);
      }
      __syncthreads();
    }
    const int fours = static_cast<int>(round_up(rank, kLine) / 4);
    for (int i = thread; i < fours * task.tokens; i += kThreads) {
      const int token = i / fours, k = i % fours * 4;
      float4 four = {0, 0, 0, 0};
      if (k < rank) four = load_fresh(z + token * task.all.ranks + k);
      float factor = 1.0f;
      if constexpr (std::is_same_v<T, Float16>) factor = scale[token];
      const float values[4] = {four.x * factor, four.y * factor, four.z * factor, four.w * factor};
      uint2 high, low;
      take_apart<T>(values, high, low);
      const int64_t at = (token * pitch + k) * 2;
      *reinterpret_cast<uint2*>(memory + task.at.high + at) = high;
      *reinterpret_cast<uint2*>(memory + task.at.low + at) = low;
    }
  }

  // Outputs of a pivoted member that are numbers of z.
  __device__ void identity(const Part& here) {
    const Member& member = task.all.member[here.member];
    if (member.sources == nullptr) return;
    const float* const z = task.z + task.all.z_column[here.member];
    const int* const place = shared<int>(task.at.place) + here.first;
    for (int c = thread; c < here.columns; c += kThreads)
      if (place[c] < member.rank)
        for (int t = 0; t < task.tokens; ++t)
          finish(here, t, c, load_fresh_one(z + t * task.all.ranks + place[c]));
  }

  // Numbers of z of this lane in a line, zeros behind the last token.
  __device__ void load_line(uint4 (&numbers)[kHalves][kLoads], int part_of_z, int64_t pitch,
                            int of_line) const {
    const int64_t input = static_cast<int64_t>(of_line) * 4 * kInputs + lane % 4 * kInputs;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int token = half * 8 + lane / 4;
      const int at = part_of_z + static_cast<int>((token * pitch + input) * 2);
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        numbers[half][load] = {0, 0, 0, 0};
        if (token < task.tokens) numbers[half][load] = shared<uint4>(at)[load];
      }
    }
  }

  __device__ void second_product(const Part& here) {
    const Member& member = task.all.member[here.member];
    const int64_t pitch = pitch_of<W>(member.rank);
    const Lines own = lines_of(member.rank * static_cast<int64_t>(sizeof(W)), warp);
    for (int first = 0; first < here.rows; first += kTiles * kRows) {
      const int count = tiles_of(here.rows - first);
      float high[kTiles][4] = {}, low[kTiles][4] = {};
      for (int l = own.begin; l < own.end; l += kChunk) {
        const int there = chunk_of(own.end - l);
        const uint4* const slots[kTiles] = {ring.slot_of(0), ring.slot_of(1), ring.slot_of(2)};
        ring.wait_for(count);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i >= there) continue;
          uint4 highs[kHalves][kLoads], lows[kHalves][kLoads];
          load_line(highs, task.at.high, pitch, l + i);
          load_line(lows, task.at.low, pitch, l + i);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            if (j >= count) continue;
            const uint4 line_of_weights = slots[j][i * kThreads];
            multiply_line<T, W, kHalves>(high[j], highs, line_of_weights);
            multiply_line<T, W, kHalves>(low[j], lows, line_of_weights);
          }
        }
        release(count);
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        for (int k = 0; k < 4; ++k) high[j][k] += low[j][k];
      const float* const put_there = put(high, count);
      __syncthreads();
      const int index = first + lane;
      if (lane < count * kRows && index < here.rows) {
        const int at =
            member.sources == nullptr ? index : shared<int>(task.at.column)[here.first + index];
        const float scale = shared<float>(task.at.up_scale)[here.first + index];
        for (int t = warp; t < task.tokens; t += kWarps) {
          float value = total(put_there, t);
          if constexpr (std::is_same_v<T, Float16>)
            value *= 1.0f / shared<float>(task.at.token_scale)[t];
          finish(here, t, at, value * scale);
        }
      }
    }
  }

  // Output `c` of a part: bias, gate, residual, and into y.
  __device__ void finish(const Part& here, int token, int c, float value) {
    value += shared<float>(task.at.added)[here.first + c];
    int of_block = here.first + c;
    if (task.gated) {
      float* const held = shared<float>(task.at.held) + token * columns + c;
      if (here.member == 0) {
        *held = value;
        return;
      }
      value *= *held / (1.0f + expf(-*held));
      of_block = c;
    }
    if (task.residual != nullptr)
      value += shared<float>(task.at.residual)[token * columns + of_block];
    task.y[token * task.columns + column + of_block] = narrow<T>(value);
  }
};

template <typename T, typename W, int kHalves>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ Task<T, W> task) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // others have not its instructions
  Worker<T, W, kHalves>(task, shared_memory()).run();
#endif
}

}  // namespace soco::cuda::decoding
