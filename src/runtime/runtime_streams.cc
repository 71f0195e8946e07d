#include "mics/runtime_streams.h"

namespace mics {

std::shared_ptr<RuntimeStreams> make_inline_streams() {
  return std::make_shared<RuntimeStreams>(RuntimeStreams{make_inline_stream(), make_inline_stream(),
                                                         make_inline_stream(), make_inline_stream(),
                                                         make_inline_stream(), make_inline_stream(),
                                                         /*frees_in_compute_order=*/false});
}

std::shared_ptr<RuntimeStreams> make_worker_streams() {
  return std::make_shared<RuntimeStreams>(RuntimeStreams{make_inline_stream(), make_worker_stream(),
                                                         make_worker_stream(), make_worker_stream(),
                                                         make_worker_stream(), make_worker_stream(),
                                                         /*frees_in_compute_order=*/false});
}

}  // namespace mics
