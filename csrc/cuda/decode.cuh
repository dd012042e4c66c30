// Low-rank layers of a group for 1 to 16 tokens in 16 bits: both products in one launch.
//
// A block per multiprocessor, all running at once. Each takes as many rows of `down` as the others,
// and computes their z; all wait at one barrier of the grid; each computes its own outputs.
//
// Weights flow through a ring in shared memory that every thread fills for itself, some dozens of
// copies of 16 bytes ahead of its products. The copies go on from the first product to the second:
// while blocks wait for each other, the first rows of `up` are on their way.
//
// Products are those of the tensor cores, 16 tokens by 8 rows of weight by 16 inputs. A block works
// on up to three tiles of 8 rows at a time; its warps share the inputs of a row, each a part of
// them, and their sums are added in order. So a sum runs in an order that depends on the number of
// inputs alone. z is float32; the second product takes it apart into two numbers of 16 bits, a high
// and a low part, so it is not rounded between the two products.
//
// A dependent launch (programmatic dependent launch, sm_90 and newer) begins while what the stream
// ran before still ends. Until that has ended nothing is read: only the cache is asked for the
// weights that the block begins with. The next grid may begin when all blocks have allowed it, so
// it never takes the place of a block that others wait for.
#pragma once
#include <type_traits>

#include "cuda/members.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tiles.cuh"

namespace soco::cuda::decoding {

constexpr int kTiles = 3;  // that share one reading of x in the first product
constexpr int kSums = kTokens * kRows;
constexpr int kMostBlocks = 256;       // of a grid
constexpr int kMostSlots = 32;         // of the ring; fewer where shared memory is small
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
  static constexpr int kLoads = 2 / sizeof(W);    // of 16 bytes of a token, per line of weight
  static constexpr int kInputs = 16 / sizeof(W);  // of a lane in a line

 public:
  __device__ Worker(const Task<T, W>& given, unsigned char* shared)
      : task(given),
        memory(shared),
        ring(reinterpret_cast<uint4*>(shared + given.at.ring)),
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
    int slot = 1;
    for (; slot < task.slots && stage == kFirst; ++slot) copy_next();
    find_parts();  // while the first weights are on their way
    if (stage == kBetween) begin_second();
    for (; slot < task.slots; ++slot) copy_next();
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
  uint4* const ring;
  const int thread, warp, lane;
  const int64_t from, to;  // rows of down
  const Lines mine;        // of them
  int64_t column = 0;      // the first column of y that is the block's
  int columns = 0, part_count = 0;
  bool knows_parts = false;
  // What is copied next: of the first product a line of a token or of a tile, of the second a tile.
  enum Stage { kFirst, kBetween, kSecond, kNone };
  Stage stage = kNone;
  int copied = 0, taken = 0;
  int line = 0, step = 0, tiles = 0, tile = 0, at_part = 0;
  int64_t row = 0;
  Lines lines{0, 0};
  int turn = 0;  // which of two buffers the sums of a tile go to

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
    row = from;
    lines = mine;
    line = lines.begin;
    step = 0;
    tiles = tiles_of(to - row);
    if (row >= to || lines.begin >= lines.end) end_first();
  }

  __device__ void end_first() {
    stage = kBetween;
    if (knows_parts) begin_second();
  }

  __device__ void begin_second() {
    stage = kSecond;
    at_part = -1;
    next_part();
  }

  __device__ void next_part() {
    while (++at_part < part_count) {
      const Part& here = part(at_part);
      lines = lines_of(task.all.member[here.member].rank * static_cast<int64_t>(sizeof(W)), warp);
      tiles = (here.rows + kRows - 1) / kRows;
      tile = 0;
      line = lines.begin;
      if (tiles > 0 && lines.begin < lines.end) return;
    }
    stage = kNone;
  }

  static __device__ int tiles_of(int64_t rows) {
    const int64_t all = (rows + kRows - 1) / kRows;
    return static_cast<int>(all < kTiles ? all : kTiles);
  }

  // Starts the copy of the next 16 bytes of this thread, into the slot that it read last.
  __device__ void copy_next() {
    uint4* const slot = ring + (copied++ & (task.slots - 1)) * kThreads + thread;
    const int64_t input = static_cast<int64_t>(line) * 4 * kInputs + lane % 4 * kInputs;
    if (stage == kFirst) {
      if (step < kHalves * kLoads) {
        const int token = step / kLoads * 8 + lane / 4;
        const int64_t at = input + step % kLoads * 8;
        const bool there = token < task.tokens && at < task.in;
        copy_16(slot, there ? task.x + token * task.in + at : task.x, there);
      } else {
        const int64_t of_row = row + (step - kHalves * kLoads) * kRows + lane / 4;
        const bool there = of_row < to && input < task.in;
        copy_16(slot, there ? task.down + of_row * task.in + input : task.down, there);
      }
      if (++step == kHalves * kLoads + tiles) {
        step = 0;
        if (++line == lines.end) {
          line = lines.begin;
          row += kTiles * kRows;
          tiles = tiles_of(to - row);
          if (row >= to) end_first();
        }
      }
    } else if (stage == kSecond) {
      const Part& here = part(at_part);
      const Member& member = task.all.member[here.member];
      const int64_t of_part = tile * kRows + lane / 4;
      const bool there = of_part < here.rows && input < member.rank;
      const W* const up = static_cast<const W*>(member.up);
      copy_16(slot, there ? up + (here.row + of_part) * member.stride + input : up, there);
      if (++line == lines.end) {
        line = lines.begin;
        if (++tile == tiles) next_part();
      }
    }
    close_copies();
  }

  // The oldest 16 bytes that are on their way.
  __device__ uint4 take() {
    copy_next();
    switch (task.slots) {
      case 32:
        wait_for_copies<31>();
        break;
      case 16:
        wait_for_copies<15>();
        break;
      default:
        wait_for_copies<7>();
    }
    return ring[(taken++ & (task.slots - 1)) * kThreads + thread];
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

  // The sums of a warp for one tile, where the threads that add them find them.
  __device__ void put(float* tile_sums, const float (&sums)[4]) {
    float* const own = tile_sums + warp * kSums + lane / 4 * kRows + lane % 4 * 2;
    own[0] = sums[0];
    own[1] = sums[1];
    if (kHalves == 1) return;
    own[8 * kRows] = sums[2];
    own[8 * kRows + 1] = sums[3];
  }

  static __device__ float total(const float* tile_sums, int token, int tile_row) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += tile_sums[w * kSums + token * kRows + tile_row];
    return sum;
  }

  __device__ void first_product() {
    float* const partials = shared<float>(task.at.partials);
    for (int64_t first = from; first < to; first += kTiles * kRows) {
      const int count = tiles_of(to - first);
      const int64_t own = first + lane;  // the row that this lane adds up
      const bool adds = lane < count * kRows && own < to;
      const float scale = adds && task.down_scale != nullptr ? task.down_scale[own] : 1.0f;
      float sums[kTiles][4] = {};
      for (int l = mine.begin; l < mine.end; ++l) {
        uint4 tokens[kHalves][kLoads];
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
          for (int load = 0; load < kLoads; ++load) tokens[half][load] = take();
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
          if (i < count) multiply_line<T, W, kHalves>(sums[i], tokens, take());
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        if (i < count) put(partials + i * kWarps * kSums, sums[i]);
      __syncthreads();
      for (int t = warp; t < task.tokens && adds; t += kWarps)
        task.z[t * task.all.ranks + own] =
            total(partials + lane / kRows * kWarps * kSums, t, lane % kRows) * scale;
      __syncthreads();
    }
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

  __device__ void second_product(const Part& here) {
    const Member& member = task.all.member[here.member];
    const int64_t pitch = pitch_of<W>(member.rank);
    const Lines own = lines_of(member.rank * static_cast<int64_t>(sizeof(W)), warp);
    const int count = (here.rows + kRows - 1) / kRows;
    for (int i = 0; i < count; ++i) {
      float high[4] = {}, low[4] = {};
      for (int l = own.begin; l < own.end; ++l) {
        const int64_t input = static_cast<int64_t>(l) * 4 * kInputs + lane % 4 * kInputs;
        uint4 highs[kHalves][kLoads], lows[kHalves][kLoads];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const int token = half * 8 + lane / 4;
          const int64_t at = (token * pitch + input) * 2;
#pragma unroll
          for (int load = 0; load < kLoads; ++load) {
            highs[half][load] = lows[half][load] = {0, 0, 0, 0};
            if (token < task.tokens) {
              highs[half][load] = shared<uint4>(task.at.high + static_cast<int>(at))[load];
              lows[half][load] = shared<uint4>(task.at.low + static_cast<int>(at))[load];
            }
          }
        }
        const uint4 weights = take();
        multiply_line<T, W, kHalves>(high, highs, weights);
        multiply_line<T, W, kHalves>(low, lows, weights);
      }
      float* const sums = shared<float>(task.at.partials) + turn * kWarps * kSums;
      turn ^= 1;
      for (int j = 0; j < 4; ++j) high[j] += low[j];
      put(sums, high);
      __syncthreads();  // one per tile: the buffer before this one is not read any longer
      const int token = thread / kRows, index = i * kRows + thread % kRows;
      if (token < task.tokens && index < here.rows) {
        float value = total(sums, token, thread % kRows);
        if constexpr (std::is_same_v<T, Float16>)
          value *= 1.0f / shared<float>(task.at.token_scale)[token];
        value *= shared<float>(task.at.up_scale)[here.first + index];
        const int at =
            member.sources == nullptr ? index : shared<int>(task.at.column)[here.first + index];
        finish(here, token, at, value);
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
