// MICS_CHECK and MICS_INTERNAL_CHECK: throw with a message put together from its parts.
//
// The parts are only evaluated when the condition is false, so a check costs one branch.
#pragma once

#include <sstream>
#include <string>
#include <vector>

namespace mics::detail {

template <typename... Parts>
[[nodiscard]] std::string concatenate(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

[[noreturn]] void throw_invalid_argument(const std::string& message);
[[noreturn]] void throw_internal_error(const char* condition, const char* file, int line,
                                       const std::string& message);

}  // namespace mics::detail

namespace mics {

// "1, 2, 4 or 8"; "none" when empty. For messages that list legal values.
[[nodiscard]] std::string join_or(const std::vector<int>& values);

}  // namespace mics

// Throws InvalidArgument when `condition` is false. For rules that a caller can break.
#define MICS_CHECK(condition, ...)                                                      \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      ::mics::detail::throw_invalid_argument(::mics::detail::concatenate(__VA_ARGS__)); \
    }                                                                                   \
  } while (false)

// Throws InternalError when `condition` is false. For what only a defect in mics can break.
#define MICS_INTERNAL_CHECK(condition, ...)                                           \
  do {                                                                                \
    if (!(condition)) {                                                               \
      ::mics::detail::throw_internal_error(#condition, __FILE__, __LINE__,            \
                                           ::mics::detail::concatenate(__VA_ARGS__)); \
    }                                                                                 \
  } while (false)
