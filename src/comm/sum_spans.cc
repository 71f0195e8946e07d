#include "comm/sum_spans.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "plan/check.h"

namespace mics {

namespace {

// Elements summed at a time: the accumulators stay in the first-level cache.
constexpr int64_t kBlock = 1024;

template <typename T, typename Accumulator>
void sum_elements(char* output, const std::vector<const char*>& pieces, int64_t numel) {
  Accumulator sum[kBlock];
  for (int64_t start = 0; start < numel; start += kBlock) {
    const int64_t length = std::min(kBlock, numel - start);
    const T* first = reinterpret_cast<const T*>(pieces.front()) + start;
    for (int64_t i = 0; i < length; ++i) sum[i] = static_cast<Accumulator>(first[i]);
    for (size_t member = 1; member < pieces.size(); ++member) {
      const T* piece = reinterpret_cast<const T*>(pieces[member]) + start;
      for (int64_t i = 0; i < length; ++i) sum[i] += static_cast<Accumulator>(piece[i]);
    }
    T* target = reinterpret_cast<T*>(output) + start;
    for (int64_t i = 0; i < length; ++i) target[i] = static_cast<T>(sum[i]);
  }
}

}  // namespace

void sum_spans(c10::ScalarType dtype, char* output, const std::vector<const char*>& pieces,
               int64_t nbytes) {
  const int64_t numel = nbytes / static_cast<int64_t>(c10::elementSize(dtype));
  switch (dtype) {
    case c10::ScalarType::Float:
      return sum_elements<float, float>(output, pieces, numel);
    case c10::ScalarType::BFloat16:
      return sum_elements<c10::BFloat16, float>(output, pieces, numel);
    case c10::ScalarType::Half:
      return sum_elements<c10::Half, float>(output, pieces, numel);
    case c10::ScalarType::Double:
      return sum_elements<double, double>(output, pieces, numel);
    case c10::ScalarType::Long:
      return sum_elements<int64_t, int64_t>(output, pieces, numel);
    default:
      MICS_INTERNAL_CHECK(false, "a sum of dtype ", dtype, " has passed the check of arguments.");
  }
}

}  // namespace mics
