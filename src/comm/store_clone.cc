#include "comm/store_clone.h"

namespace mics {

c10::intrusive_ptr<c10d::Store> clone_store(const c10::intrusive_ptr<c10d::Store>& store,
                                            std::chrono::milliseconds timeout) {
  const std::chrono::milliseconds of_caller = store->getTimeout();
  c10::intrusive_ptr<c10d::Store> clone = store->clone();
  clone->setTimeout(timeout);
  if (store->getTimeout() != of_caller) store->setTimeout(of_caller);  // the clone shares it
  return clone;
}

}  // namespace mics
