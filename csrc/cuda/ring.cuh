// A ring in shared memory that weights flow through, some dozens of copies ahead of the products.
//
// Every thread copies for itself exactly what it multiplies later, so that nobody waits for
// anybody. A slot has four lines of one tile, 64 bytes of each thread: what has to be found out for
// a copy is found out once for four of them. That matters: instructions, not memory, would be what
// a block waits for otherwise.
#pragma once
#include "cuda/ptx.cuh"
#include "cuda/tiles.cuh"

namespace soco::cuda::decoding {

constexpr int kTiles = 3;  // that a block works on at a time
constexpr int kChunk = 4;  // lines of a tile in a slot
constexpr int kSlotSize = kChunk * kThreads;
constexpr int kSlots[] = {8, 4, 3};  // 16 KB each: as many as there is memory for, kTiles at least
constexpr int kSizes = 3;

__device__ __forceinline__ int tiles_of(int64_t rows) {
  const int64_t all = (rows + kRows - 1) / kRows;
  return static_cast<int>(all < kTiles ? all : kTiles);
}

__device__ __forceinline__ int chunk_of(int left) { return left < kChunk ? left : kChunk; }

class Ring {
 public:
  int copied = 0;  // sets of copies, of which every slot gets one

  __device__ Ring(unsigned char* at, int count)
      : memory(reinterpret_cast<uint4*>(at) + threadIdx.x),
        slots(count),
        lane(static_cast<int>(threadIdx.x % 32)) {}

  // `rows` rows are copied next, `apart` bytes from one to the next, and of their `of_row` bytes
  // the lines `own`: of up to kTiles tiles at a time, four lines of each in turn. Says whether that
  // is anything.
  __device__ bool begin(const void* first, int64_t apart, int rows, int64_t of_row, Lines own) {
    const int begin = own.begin * kLine + lane % 4 * 16;
    const int64_t end = static_cast<int64_t>(own.end) * kLine;
    tile_stride = kRows * apart;
    rows_at = static_cast<const unsigned char*>(first) + lane / 4 * apart + begin;
    rows_left = rows;
    bytes = static_cast<int>((of_row < end ? of_row : end) - begin);
    chunks = (own.end - own.begin + kChunk - 1) / kChunk;
    begin_tiles();
    copies = rows > 0 && own.begin < own.end;
    return copies;
  }

  // Starts the copies of the next slot. Where the rows or their lines end, there are zeros. Says
  // whether the rows have come to their end with it.
  __device__ bool copy_next() {
    bool at_end = false;
    if (copies) {
      uint4* const slot = memory + filled * kSlotSize;
      const int there = row < rows_left ? bytes_left : 0;
#pragma unroll
      for (int l = 0; l < kChunk; ++l)
        copy_16(slot + l * kThreads, source + l * kLine, l * kLine < there);
      source += tile_stride;
      row += kRows;
      at_end = ++tile == tiles && !next_chunk();
    }
    ++copied;
    if (++filled == slots) filled = 0;
    close_copies();
    return at_end;
  }

  // Waits for the `count` slots that were filled first, where all slots are filled.
  __device__ void wait_for(int count) const {
    switch (slots - count) {
      case 7:
        return wait_for_copies<7>();
      case 6:
        return wait_for_copies<6>();
      case 5:
        return wait_for_copies<5>();
      case 3:
        return wait_for_copies<3>();
      case 2:
        return wait_for_copies<2>();
      case 1:
        return wait_for_copies<1>();
      default:
        wait_for_copies<0>();
    }
  }

  // The first weights of this lane in the slot that is `number` behind the oldest; those of the
  // next line are kThreads further on.
  __device__ const uint4* slot_of(int number) const {
    int slot = oldest + number;
    if (slot >= slots) slot -= slots;
    return memory + slot * kSlotSize;
  }

  // The oldest `count` slots are not needed any longer. As many are to be filled next.
  __device__ void release(int count) {
    oldest += count;
    if (oldest >= slots) oldest -= slots;
  }

 private:
  uint4* const memory;
  const int slots, lane;
  bool copies = false;
  const unsigned char* source = nullptr;    // what this lane copies first of the next slot,
  const unsigned char* chunk_at = nullptr;  // of the first tile of these lines,
  const unsigned char* rows_at = nullptr;   // and of the first of all its lines
  int64_t tile_stride = 0;                  // bytes from one tile to the next
  int row = 0, rows_left = 0;  // the lane's row behind the first of the tiles; rows from there on
  int bytes_left = 0, bytes = 0;  // of a row's lines: from chunk_at on, from rows_at on
  int tiles = 0, tile = 0, chunks = 0, chunk = 0;
  int filled = 0, oldest = 0;  // slots: the next to be filled, the next to be read

  __device__ void begin_tiles() {
    tiles = tiles_of(rows_left);
    tile = 0;
    chunk = 0;
    row = lane / 4;
    source = chunk_at = rows_at;
    bytes_left = bytes;
  }

  // Whether there is one.
  __device__ bool next_chunk() {
    if (++chunk < chunks) {
      tile = 0;
      row = lane / 4;
      source = chunk_at += kChunk * kLine;
      bytes_left -= kChunk * kLine;
      return true;
    }
    rows_at += kTiles * tile_stride;
    rows_left -= kTiles * kRows;
    copies = rows_left > 0;
    if (copies) begin_tiles();
    return copies;
  }
};

}  // namespace soco::cuda::decoding
