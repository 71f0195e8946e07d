#include "mics/shm_communicator.h"

#include <dirent.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "comm/shm/byte_stream.h"
#include "comm/shm/process.h"
#include "comm/shm/segment.h"
#include "comm/shm/transport.h"
#include "plan/check.h"

namespace mics {

namespace {

using shm::Announcement;
using shm::ByteStream;
using shm::Segment;
using shm::Transport;

constexpr char kNamePrefix[] = "torch_mics.";

// FNV-1a over 64-bit values.
uint64_t add_to_key(uint64_t key, uint64_t value) { return (key ^ value) * 0x100000001b3U; }
constexpr uint64_t kEmptyKey = 0xcbf29ce484222325U;

uint64_t key_of(const GroupInfo& group) {
  uint64_t key = kEmptyKey;
  for (const char c : group.name) key = add_to_key(key, static_cast<uint64_t>(c));
  for (const int rank : group.world_ranks) key = add_to_key(key, static_cast<uint64_t>(rank));
  return key;
}

class ShmCommunicator final : public Communicator {
 public:
  explicit ShmCommunicator(std::shared_ptr<Transport> transport)
      : Communicator(transport->group()), transport_(std::move(transport)) {}

  void barrier() override {
    transport_->begin({0, shm::kBarrier, 0, 0, 0, 0});
    transport_->meet();
  }

 protected:
  Route gather_route() const override { return Route::kDirect; }

  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    transport_->begin(announcement_of(shm::kAllGather, pairs, &TensorPair::input));
    ByteStream input;
    std::vector<ByteStream> outputs(static_cast<size_t>(group().size()));
    for (const TensorPair& pair : pairs) {
      const auto nbytes = static_cast<int64_t>(pair.input.nbytes());
      if (nbytes == 0) continue;
      auto* in = static_cast<char*>(pair.input.data_ptr());
      auto* out = static_cast<char*>(pair.output.data_ptr());
      input.add(in, nbytes);
      for (int member = 0; member < group().size(); ++member) {
        outputs[static_cast<size_t>(member)].add(out + nbytes * member, nbytes);
      }
      if (out + nbytes * group().rank != in) {
        std::memcpy(out + nbytes * group().rank, in, static_cast<size_t>(nbytes));
      }
    }
    transport_->gather(std::move(input), std::move(outputs));
  }

  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    transport_->begin(announcement_of(shm::kReduceScatter, pairs, &TensorPair::output));
    std::vector<ByteStream> inputs(static_cast<size_t>(group().size()));
    ByteStream output;
    for (const TensorPair& pair : pairs) {
      const auto nbytes = static_cast<int64_t>(pair.output.nbytes());
      if (nbytes == 0) continue;
      output.add(static_cast<char*>(pair.output.data_ptr()), nbytes);
      auto* in = static_cast<char*>(pair.input.data_ptr());
      for (int member = 0; member < group().size(); ++member) {
        inputs[static_cast<size_t>(member)].add(in + nbytes * member, nbytes);
      }
    }
    transport_->reduce(std::move(inputs), std::move(output), pairs.front().input.scalar_type());
  }

  // A reduce-scatter of pieces in place, then an all-gather of the sums in place.
  void do_all_reduce(const at::Tensor& tensor) override {
    transport_->begin(announcement_of(shm::kAllReduce, {{tensor, tensor}}, &TensorPair::input));
    const auto element = static_cast<int64_t>(tensor.element_size());
    const int64_t piece = (tensor.numel() + group().size() - 1) / group().size();
    auto* data = static_cast<char*>(tensor.data_ptr());
    std::vector<ByteStream> pieces(static_cast<size_t>(group().size()));
    for (int member = 0; member < group().size(); ++member) {
      const int64_t first = std::min(piece * member, tensor.numel());
      const int64_t last = std::min(first + piece, tensor.numel());
      pieces[static_cast<size_t>(member)].add(data + first * element, (last - first) * element);
    }
    const ByteStream own = pieces[static_cast<size_t>(group().rank)];
    transport_->reduce(pieces, own, tensor.scalar_type());
    transport_->gather(own, pieces);
  }

 private:
  Announcement announcement_of(shm::OperationKind kind, const std::vector<TensorPair>& pairs,
                               at::Tensor TensorPair::* piece) const {
    Announcement announcement;
    announcement.kind = kind;
    announcement.dtype = static_cast<int32_t>(pairs.front().input.scalar_type());
    announcement.num_pairs = static_cast<int64_t>(pairs.size());
    announcement.sizes_key = kEmptyKey;
    for (const TensorPair& pair : pairs) {
      MICS_CHECK((pair.*piece).device().is_cpu(),
                 "shared memory carries tensors of the CPU: got device=", (pair.*piece).device(),
                 " (", group().name, ").");
      const auto nbytes = static_cast<int64_t>((pair.*piece).nbytes());
      announcement.nbytes += nbytes;
      announcement.sizes_key = add_to_key(announcement.sizes_key, static_cast<uint64_t>(nbytes));
    }
    return announcement;
  }

  const std::shared_ptr<Transport> transport_;
};

}  // namespace

ShmGroup::ShmGroup(GroupInfo group, const ShmOptions& options) {
  MICS_CHECK(group.size() > 1,
             "a shared memory group has at least two members: got size=", group.size(), " (",
             group.name, ").");
  const uint64_t key = key_of(group);
  Segment segment =
      options.creates
          ? Segment::create(options.segment, key, group.size(), group.rank, options.slot_nbytes)
          : Segment::attach(options.segment, key, group.size(), group.rank, options.timeout);
  transport_ = std::make_shared<Transport>(std::move(group), std::move(segment), options.timeout);
}

ShmGroup::~ShmGroup() = default;

std::unique_ptr<Communicator> ShmGroup::make_communicator() const {
  return std::make_unique<ShmCommunicator>(transport_);
}

bool ShmGroup::has_failed() const { return transport_->has_failed(); }

std::string make_shm_segment_name() {
  std::random_device random;
  const shm::ProcessId process = shm::this_process();
  return detail::concatenate("/", kNamePrefix, shm::pid_namespace(), ".", process.pid, ".",
                             process.start_time, ".", random(), random());
}

int remove_stale_shm_segments() {
  DIR* directory = opendir("/dev/shm");
  if (directory == nullptr) return 0;
  int num_removed = 0;
  while (const dirent* entry = readdir(directory)) {
    unsigned long long name_space = 0;
    unsigned long long start_time = 0;
    int pid = 0;
    if (std::sscanf(entry->d_name, "torch_mics.%llu.%d.%llu.", &name_space, &pid, &start_time) != 3)
      continue;
    if (name_space != shm::pid_namespace() || shm::is_running({pid, start_time})) continue;
    const std::string name = std::string("/") + entry->d_name;
    if (shm_unlink(name.c_str()) == 0) ++num_removed;
  }
  closedir(directory);
  return num_removed;
}

std::string shm_host_identity() {
  char host[256] = {};
  if (gethostname(host, sizeof(host) - 1) != 0) host[0] = '\0';
  return detail::concatenate(host, "/", shm::boot_id(), "/", shm::pid_namespace());
}

}  // namespace mics
