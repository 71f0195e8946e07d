#include "runtime/exposed_wait.h"

#include <ATen/record_function.h>

namespace mics {

void wait_exposed(Stream& compute, const Event& event, const char* what, const std::string& unit,
                  std::chrono::nanoseconds& exposed) {
  at::RecordFunction range(at::RecordScope::USER_SCOPE);
  if (range.isActive()) range.before(std::string("torch_mics: ") + what + " of " + unit);
  const auto start = compute.now();
  compute.wait(event);
  exposed += compute.now() - start;
}

}  // namespace mics
