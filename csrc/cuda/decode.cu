// Launches the kernel of decode.cuh: whether it can run, how y is shared out, where in shared
// memory everything lies.
#include "cuda/decode.cuh"
#include "cuda/launch.cuh"

namespace soco::cuda {
namespace {

using namespace decoding;

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Whether rows can be read by 16 bytes. Ranks of packed layers are such that they can.
bool fits(const LowRankGroup& g) {
  const int64_t size = g.weight_dtype == g.dtype ? 2 : 1;
  bool fit = g.tokens >= 1 && g.tokens <= kTokens && g.barrier != nullptr && aligned(g.x) &&
             aligned(g.down) && aligned(g.z) && g.in % (16 / size) == 0;
  for (const Member& member : g.members)
    fit = fit && aligned(member.up) && member.stride % (16 / size) == 0 &&
          member.rank % (16 / size) == 0;
  return fit;
}

struct Device {
  int blocks, shared;  // multiprocessors; bytes of shared memory a block may have
  bool able;           // to launch cooperatively, and to run the kernel
  bool ahead;          // to launch dependently
};

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "low_rank_group");
  check(cudaDeviceGetAttribute(&value, which, device), "low_rank_group");
  return value;
}

Device device() {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          major >= 8 && attribute(cudaDevAttrCooperativeLaunch) != 0, major >= 9};
}

// Fills in the first column of y of each block, and behind them the number of columns: as it was
// given for a grid of this size, or by what a column of each member costs on average.
void share_out(const LowRankGroup& g, const Members& all, int blocks, int* first) {
  const bool given = g.shares != nullptr && g.shares->size() == static_cast<size_t>(blocks) + 1;
  int64_t cost[kMostMembers], costs = 0;
  for (int m = 0; m < all.count; ++m) {
    const Member& member = all.member[m];
    cost[m] = 1 + (member.out > 0 ? member.rank * member.rows / member.out : 0);
    costs += cost[m] * member.out;
  }
  for (int64_t block = 0; block <= blocks; ++block) {
    int64_t column = all.width;
    if (given) {
      column = (*g.shares)[static_cast<size_t>(block)];
    } else if (g.gated) {
      column = all.width * block / blocks;
    } else {
      int64_t left = costs * block / blocks;
      for (int m = 0; m < all.count; ++m) {
        const int64_t own = cost[m] * all.member[m].out;
        if (left < own) {
          column = all.column[m] + left / cost[m];
          break;
        }
        left -= own;
      }
    }
    first[block] = static_cast<int>(column);
  }
}

// Places the parts of shared memory. `most` columns of y are computed by one block.
template <typename T, typename W>
Layout layout(const Task<T, W>& task, int tokens, int slots, int64_t most) {
  int64_t rank = 0;
  bool pivoted = false;
  for (int m = 0; m < task.all.count; ++m) {
    const Member& member = task.all.member[m];
    rank = member.rank > rank ? member.rank : rank;
    pivoted = pivoted || member.sources != nullptr;
  }
  const int64_t wide = task.gated ? 2 * most : most;
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t begin = end;
    end = round_up(end + bytes, 16);
    return static_cast<int>(begin < 0x7fffffff ? begin : 0x7fffffff);
  };
  Layout at{};
  at.ring = place(static_cast<int64_t>(slots) * kSlotSize * 16);
  at.partials = place(2 * kTiles * kWarps * (tokens > 8 ? 16 : 8) * kRows * 4);
  at.high = place(tokens * pitch_of<W>(rank) * 2);
  at.low = place(tokens * pitch_of<W>(rank) * 2);
  at.token_scale = place(kTokens * 4);
  at.parts = place(kMostMembers * static_cast<int64_t>(sizeof(Part)));
  at.added = place(wide * 4);
  at.up_scale = place(wide * 4);
  at.held = place(task.gated ? tokens * most * 4 : 0);
  at.residual = place(task.residual != nullptr ? tokens * most * 4 : 0);
  at.place = place(pivoted ? wide * 4 : 0);
  at.column = place(pivoted ? wide * 4 : 0);
  at.total = place(0);
  return at;
}

// Whether it was launched: a context may have fewer multiprocessors than the device.
template <typename T, typename W, int kHalves>
bool launch_cooperatively(const Task<T, W>& task, int blocks, void* stream) {
  const auto kernel = decode_kernel<T, W, kHalves>;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, task.at.total),
        "low_rank_group");
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(task.at.total);
  config.stream = as_stream(stream);
  config.attrs = attributes;
  config.numAttrs = task.dependent ? 2 : 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, task);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // it is dealt with
    return false;
  }
  check(status, "low_rank_group");
  return true;
}

template <typename T, typename W>
bool run(const LowRankGroup& g, void* stream) {
  const Device gpu = device();
  if (!gpu.able) return false;
  const int blocks = gpu.blocks < kMostBlocks ? gpu.blocks : kMostBlocks;
  Task<T, W> task{};
  task.all = members_of(g);
  task.gated = g.gated;
  task.dependent = g.dependent && gpu.ahead;
  task.columns = task.all.width;
  task.down = static_cast<const W*>(g.down);
  task.down_scale = g.down_scale;
  task.bias = static_cast<const T*>(g.bias);
  task.barrier = g.barrier;
  task.in = g.in;
  int64_t most = 0;
  share_out(g, task.all, blocks, task.first);
  for (int block = 0; block < blocks; ++block) {
    const int64_t own = task.first[block + 1] - task.first[block];
    most = own > most ? own : most;
  }
  // The longest ring that there is memory for; fewer tokens at a time where there is none.
  task.residual = static_cast<const T*>(g.residual);
  int at_once = static_cast<int>(g.tokens);
  for (int size = 0;; ++size) {
    if (size == kSizes) {
      if (at_once == 1) return false;
      at_once = (at_once + 1) / 2;
      size = 0;
    }
    task.slots = kSlots[size];
    task.at = layout(task, at_once, task.slots, most);
    if (task.at.total <= gpu.shared) break;
  }
  for (int64_t first = 0; first < g.tokens; first += at_once) {
    const int64_t left = g.tokens - first;
    task.tokens = static_cast<int>(left < at_once ? left : at_once);
    task.x = static_cast<const T*>(g.x) + first * g.in;
    task.z = static_cast<float*>(g.z);
    task.y = static_cast<T*>(g.y) + first * task.columns;
    if (g.residual != nullptr)
      task.residual = static_cast<const T*>(g.residual) + first * task.columns;
    const bool launched = task.tokens > 8 ? launch_cooperatively<T, W, 2>(task, blocks, stream)
                                          : launch_cooperatively<T, W, 1>(task, blocks, stream);
    if (!launched) return false;
  }
  return true;
}

}  // namespace

bool decode(const LowRankGroup& group, void* stream) {
  bool launched = false;
  visit_types(group, [&](auto* tag, auto* weight_tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using W = std::remove_pointer_t<decltype(weight_tag)>;
    if constexpr (sizeof(T) == 2) launched = fits(group) && run<T, W>(group, stream);
  });
  return launched;
}

}  // namespace soco::cuda
