// The layers of a group as the kernels see them.
#pragma once
#include <stdexcept>
#include <type_traits>

#include "lowrank.h"

namespace soco::cuda {

// The members, and where each begins in z and in y (without gating).
struct Members {
  Member member[kMostMembers];
  int64_t z_column[kMostMembers], column[kMostMembers];
  int64_t ranks, columns;  // of all
  int64_t width;           // of y: columns, or those of one where gated
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
  all.width = group.gated ? group.members[0].out : all.columns;
  return all;
}

// Calls body with null pointers of the C++ types of the group: of x, and of the weights.
template <typename Body>
void visit_types(const LowRankGroup& group, Body body) {
  visit(group.dtype, [&](auto* tag) {
    if (group.weight_dtype == group.dtype) return body(tag, tag);
    if constexpr (!std::is_same_v<decltype(tag), double*>) {
      if (group.weight_dtype == Dtype::kInt8) return body(tag, static_cast<Int8*>(nullptr));
      if (group.weight_dtype == Dtype::kFloat8) return body(tag, static_cast<Float8*>(nullptr));
    }
    throw std::invalid_argument("soco: weights of this dtype do not go with this input");
  });
}

// Runs a group in one launch where there is a kernel for it (decode.cu), and says whether it did.
bool decode(const LowRankGroup& group, void* stream);

}  // namespace soco::cuda
