// Library: a shared library, loaded when it is not yet, and its entry points by name.
#pragma once

#include <initializer_list>
#include <string>

namespace mics {

class Library {
 public:
  // The first of `names` that the process has loaded already, else the first that can be loaded: a
  // second copy beside torch's would have its own state. Throws Error that says why each failed.
  Library(const char* what, std::initializer_list<const char*> names);

  // Never unloaded: what torch uses must not go away.
  [[nodiscard]] const std::string& name() const { return name_; }
  // Throws Error when there is none.
  template <typename Function>
  void get(Function*& function, const char* symbol) const {
    function = reinterpret_cast<Function*>(find(symbol));
  }
  // Null when there is none.
  template <typename Function>
  void get_optional(Function*& function, const char* symbol) const {
    function = reinterpret_cast<Function*>(find_optional(symbol));
  }

 private:
  [[nodiscard]] void* find(const char* symbol) const;
  [[nodiscard]] void* find_optional(const char* symbol) const;

  void* handle_ = nullptr;
  std::string name_;
};

}  // namespace mics
