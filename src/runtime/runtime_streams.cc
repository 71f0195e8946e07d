#include "mics/runtime_streams.h"

#include <algorithm>
#include <functional>

namespace mics {

namespace {

bool has_peers(const Communicator* communicator) {
  return communicator != nullptr && communicator->group().size() > 1;
}

}  // namespace

RuntimeStreams make_inline_streams() {
  return {make_inline_stream(), make_inline_stream(), make_inline_stream(),
          make_inline_stream(), make_inline_stream(), make_inline_stream()};
}

RuntimeStreams make_worker_streams(const std::vector<std::shared_ptr<Unit>>& units,
                                   const Communicator* control) {
  RuntimeStreams streams = make_inline_streams();
  using Find = std::function<const Communicator*(const UnitCommunicators&)>;
  const auto make = [&units](std::unique_ptr<Stream>& stream, bool is_needed, const Find& find) {
    is_needed = is_needed || std::any_of(units.begin(), units.end(), [&find](const auto& unit) {
                  return has_peers(find(unit->communicators()));
                });
    if (is_needed) stream = make_worker_stream();
  };
  make(streams.gather_rail, false, [](const UnitCommunicators& c) { return c.gather.rail; });
  make(streams.gather_intra, false, [](const UnitCommunicators& c) { return c.gather.intra; });
  make(streams.reduce_intra, false, [](const UnitCommunicators& c) { return c.reduce.intra; });
  make(streams.reduce_rail, false, [](const UnitCommunicators& c) { return c.reduce.rail; });
  make(streams.replicate, has_peers(control),
       [](const UnitCommunicators& c) { return c.replicate; });
  return streams;
}

}  // namespace mics
