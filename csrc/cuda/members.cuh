// The layers of a group as the kernels see them.
#pragma once
#include "lowrank.h"

namespace soco::cuda {

// The members, and where each begins in z and in y (without gating).
struct Members {
  Member member[kMostMembers];
  int64_t z_column[kMostMembers], column[kMostMembers];
  int64_t ranks, columns;  // of all
  int count;
};

inline Members members_of(const LowRankGroup& group) {
  Members all{};
  all.count = static_cast<int>(group.members.size());
  for (int m = 0; m < all.count; ++m) {
    all.member[m] = group.members[m];
    all.z_column[m] = all.ranks;
    all.column[m] = all.columns;
    all.ranks += group.members[m].rank;
    all.columns += group.members[m].out;
  }
  return all;
}

// Runs a group in one launch where there is a kernel for it (decode.cu), and says whether it did.
bool decode(const LowRankGroup& group, void* stream);

}  // namespace soco::cuda
