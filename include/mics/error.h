// The exceptions that every layer of mics throws. The type is API; the text is not.
//
// A message reads `<rule>: got <name>=<value>, ... (<who>). <what to do>.` (docs/errors.md).
#pragma once

#include <stdexcept>
#include <string>

namespace mics {

// Base of all exceptions thrown on purpose by this library.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller broke a stated rule. Nothing has been queued or changed. Python: ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// A collective failed: a peer is gone or the transport reported an error. Python: CommError.
class CommError : public Error {
 public:
  using Error::Error;
};

// A peer did not arrive within the limit. Python: TimeoutError.
class TimeoutError : public Error {
 public:
  using Error::Error;
};

// Two streams use the same memory at once; see race_detector.h. Python: RaceError.
class RaceError : public Error {
 public:
  using Error::Error;
};

// A promise between two parts of this library was broken: a defect here, not in the caller's code.
class InternalError : public Error {
 public:
  using Error::Error;
};

}  // namespace mics
