// Ends an object without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

namespace mics {

// For objects whose last reference may be dropped with the GIL held, but whose end waits for
// threads that may need it.
template <typename T>
std::shared_ptr<T> end_without_gil(std::shared_ptr<T> owner) {
  T* const address = owner.get();
  return {address, [owner = std::move(owner)](T*) mutable {
            if (PyGILState_Check() == 0) return owner.reset();
            const pybind11::gil_scoped_release no_gil;
            owner.reset();
          }};
}

}  // namespace mics
