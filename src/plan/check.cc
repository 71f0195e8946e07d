#include "plan/check.h"

#include "mics/error.h"

namespace mics {

namespace detail {

void throw_invalid_argument(const std::string& message) { throw InvalidArgument(message); }

void throw_internal_error(const char* condition, const char* file, int line,
                          const std::string& message) {
  throw InternalError(concatenate("internal error: ", message,
                                  " Please report this with the log.\n  [", condition,
                                  " is false at ", file, ":", line, "]"));
}

}  // namespace detail

std::string join_or(const std::vector<int>& values) {
  if (values.empty()) return "none";
  std::ostringstream out;
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) out << (i + 1 == values.size() ? " or " : ", ");
    out << values[i];
  }
  return out.str();
}

}  // namespace mics
