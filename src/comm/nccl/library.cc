#include "comm/nccl/library.h"

#include <dlfcn.h>

#include "mics/error.h"

namespace mics {

Library::Library(const char* what, std::initializer_list<const char*> names) {
  std::string reasons;
  for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
    for (const char* name : names) {
      handle_ = dlopen(name, flags);
      if (handle_ != nullptr) {
        name_ = name;
        return;
      }
      const char* reason = dlerror();
      if ((flags & RTLD_NOLOAD) == 0 && reason != nullptr) reasons.append("\n  ").append(reason);
    }
  }
  throw Error("the library must be installed: got no " + std::string(what) +
              ". Install a torch with CUDA, import torch first, or put the library's folder into "
              "LD_LIBRARY_PATH." +
              reasons);
}

void* Library::find_optional(const char* symbol) const { return dlsym(handle_, symbol); }

void* Library::find(const char* symbol) const {
  void* found = find_optional(symbol);
  if (found == nullptr) {
    throw Error("the library must have the entry points that are used: " + name_ + " has no " +
                symbol + ". Install a newer one.");
  }
  return found;
}

}  // namespace mics
