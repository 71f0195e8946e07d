#include "optim/neighbours.h"

#include <algorithm>
#include <unordered_map>

#include "optim/storage_part.h"

namespace mics {

namespace {

struct Placed {
  size_t storage;  // numbered by first appearance
  int64_t offset;
  const at::Tensor* tensor;
};

std::vector<Placed> place(const std::vector<at::Tensor>& tensors) {
  std::unordered_map<const void*, size_t> storages;
  std::vector<Placed> placed;
  placed.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (tensor.numel() == 0) continue;
    const Place found = place_of(tensor);
    const size_t number = storages.try_emplace(found.storage, storages.size()).first->second;
    placed.push_back({number, found.offset, &tensor});
  }
  std::stable_sort(placed.begin(), placed.end(), [](const Placed& left, const Placed& right) {
    return left.storage != right.storage ? left.storage < right.storage
                                         : left.offset < right.offset;
  });
  return placed;
}

}  // namespace

std::vector<at::Tensor> join_neighbours(const std::vector<at::Tensor>& tensors) {
  const std::vector<Placed> placed = place(tensors);
  std::vector<at::Tensor> joined;
  for (size_t i = 0; i < placed.size();) {
    const at::Tensor& first = *placed[i].tensor;
    size_t next = i + 1;
    if (!first.is_contiguous()) {
      joined.push_back(first);
      i = next;
      continue;
    }
    int64_t numel = first.numel();
    while (next < placed.size() && placed[next].storage == placed[i].storage &&
           placed[next].offset == placed[i].offset + numel &&
           placed[next].tensor->scalar_type() == first.scalar_type() &&
           placed[next].tensor->is_contiguous()) {
      numel += placed[next].tensor->numel();
      ++next;
    }
    joined.push_back(next == i + 1 ? first.view({-1}) : span_from(first, numel));
    i = next;
  }
  return joined;
}

}  // namespace mics
