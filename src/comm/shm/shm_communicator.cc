#include "mics/shm_communicator.h"

#include <dirent.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "comm/shm/byte_stream.h"
#include "comm/shm/segment.h"
#include "comm/sum_spans.h"
#include "mics/check.h"
#include "mics/error.h"

namespace mics {

namespace {

using shm::Announcement;
using shm::ByteStream;
using shm::Counter;
using shm::Failure;
using shm::Member;
using shm::Segment;

using Clock = std::chrono::steady_clock;

constexpr char kNamePrefix[] = "torch_mics.";
// How long a sleeping member goes without a look at its peers' health.
constexpr std::chrono::milliseconds kSlice{50};
// Looks at a counter before sleeping, where every member has a core.
constexpr int kNumSpins = 2000;

enum OperationKind : int32_t { kAllGather, kReduceScatter, kAllReduce, kBarrier };

const char* name_of(int32_t kind) {
  constexpr const char* kNames[] = {"all_gather", "reduce_scatter", "all_reduce", "barrier"};
  return kNames[kind];
}

// FNV-1a over 64-bit values.
uint64_t add_to_key(uint64_t key, uint64_t value) { return (key ^ value) * 0x100000001b3U; }
constexpr uint64_t kEmptyKey = 0xcbf29ce484222325U;

uint64_t key_of(const GroupInfo& group) {
  uint64_t key = kEmptyKey;
  for (const char c : group.name) key = add_to_key(key, static_cast<uint64_t>(c));
  for (const int rank : group.world_ranks) key = add_to_key(key, static_cast<uint64_t>(rank));
  return key;
}

int num_usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

class ShmCommunicator final : public Communicator {
 public:
  ShmCommunicator(GroupInfo group, Segment segment, std::chrono::milliseconds timeout)
      : Communicator(std::move(group)),
        segment_(std::move(segment)),
        timeout_(timeout),
        half_nbytes_(segment_.slot_nbytes() / 2),
        num_spins_(num_usable_cores() >= this->group().size() ? kNumSpins : 0) {}

  void barrier() override {
    begin({0, kBarrier, 0, 0, 0, 0});
    run_round([](char*) {}, [] {});
  }

 protected:
  GatherRoute gather_route() const override { return GatherRoute::kDirect; }

  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    begin(announcement_of(kAllGather, pairs, &TensorPair::input));
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
    gather(std::move(input), std::move(outputs));
  }

  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    begin(announcement_of(kReduceScatter, pairs, &TensorPair::output));
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
    reduce(std::move(inputs), std::move(output), pairs.front().input.scalar_type());
  }

  // A reduce-scatter of pieces in place, then an all-gather of the sums in place.
  void do_all_reduce(const at::Tensor& tensor) override {
    begin(announcement_of(kAllReduce, {{tensor, tensor}}, &TensorPair::input));
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
    reduce(pieces, own, tensor.scalar_type());
    gather(own, pieces);
  }

 private:
  Announcement announcement_of(OperationKind kind, const std::vector<TensorPair>& pairs,
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

  void begin(const Announcement& announcement) {
    announcement_ = announcement;
    announcement_.operation = ++operation_;
    deadline_ = Clock::now() + timeout_;
    throw_if_failed();
  }

  // outputs[r] gets what member r has in `input`; the own place is filled already.
  void gather(ByteStream input, std::vector<ByteStream> outputs) {
    const int64_t longest = longest_of(outputs);
    for (int64_t done = 0; done == 0 || done < longest; done += half_nbytes_) {
      const auto part = [&](const ByteStream& s) { return std::min(half_nbytes_, s.remaining()); };
      run_round([&](char* half) { input.copy_to(half, part(input)); },
                [&] {
                  for (int step = 1; step < group().size(); ++step) {
                    const int member = (group().rank + step) % group().size();
                    ByteStream& output = outputs[static_cast<size_t>(member)];
                    output.copy_from(half_of(member), part(output));
                  }
                });
    }
  }

  // Sums the members' inputs[rank] to `output`. A half has a section for each other member.
  void reduce(std::vector<ByteStream> inputs, ByteStream output, at::ScalarType dtype) {
    const int64_t line = static_cast<int64_t>(shm::kCacheLine);
    const int64_t section = half_nbytes_ / (group().size() - 1) / line * line;
    const int64_t longest = longest_of(inputs);
    const int rank = group().rank;
    std::vector<const char*> pieces(static_cast<size_t>(group().size()));
    for (int64_t done = 0; done == 0 || done < longest; done += section) {
      const auto part = [&](const ByteStream& s) { return std::min(section, s.remaining()); };
      run_round(
          [&](char* half) {
            for (int owner = 0; owner < group().size(); ++owner) {
              if (owner == rank) continue;
              ByteStream& input = inputs[static_cast<size_t>(owner)];
              input.copy_to(half + section * (owner - (owner > rank ? 1 : 0)), part(input));
            }
          },
          [&] {
            // Own input and output have the same spans, so the two go in step.
            ByteStream& own = inputs[static_cast<size_t>(rank)];
            const int64_t nbytes = part(own);
            int64_t offset = 0;
            own.take(nbytes, [&](char* data, int64_t length) {
              for (int member = 0; member < group().size(); ++member) {
                pieces[static_cast<size_t>(member)] =
                    member == rank
                        ? data
                        : half_of(member) + section * (rank - (rank > member ? 1 : 0)) + offset;
              }
              output.take(length, [&](char* target, int64_t whole) {
                sum_spans(dtype, target, pieces, whole);
              });
              offset += length;
            });
          });
    }
  }

  static int64_t longest_of(const std::vector<ByteStream>& streams) {
    int64_t longest = 0;
    for (const ByteStream& stream : streams) longest = std::max(longest, stream.remaining());
    return longest;
  }

  char* half_of(int member) const {
    return segment_.slot(member) + half_nbytes_ * static_cast<int64_t>(round_ % 2);
  }

  // One round: `write` fills this member's half; `read` reads the halves of all others.
  template <typename Write, typename Read>
  void run_round(const Write& write, const Read& read) {
    ++round_;
    // The half was used two rounds ago. All have read it: they wrote the last round after that, and
    // this member waited for it.
    write(half_of(group().rank));
    Member& own = segment_.own();
    own.halves[round_ % 2].announcement = announcement_;
    own.written.raise(round_);
    for (int member = 0; member < group().size(); ++member) {
      if (member == group().rank) continue;
      wait_for(member, segment_.member(member).written, round_);
      check_same(member);
    }
    read();
  }

  void check_same(int member) {
    const Announcement& other = segment_.member(member).halves[round_ % 2].announcement;
    if (other == announcement_) return;
    fail(Failure::kComm, "every member must issue the same collectives, sizes and dtypes: got " +
                             describe(announcement_, group().rank) + " and " +
                             describe(other, member));
  }

  std::string describe(const Announcement& announcement, int member) const {
    return detail::concatenate(name_of(announcement.kind), " of ", announcement.num_pairs,
                               " tensors, ", announcement.nbytes, " bytes, dtype ",
                               static_cast<at::ScalarType>(announcement.dtype), " on world_rank ",
                               world_rank(member));
  }

  void wait_for(int member, Counter& counter, uint32_t target) {
    if (counter.has_reached(target)) return;
    for (int spin = 0; spin < num_spins_; ++spin) {
      if (counter.has_reached(target)) return;
    }
    while (!counter.wait_for(target, kSlice)) {
      throw_if_failed();
      const Member& peer = segment_.member(member);
      // Acquire: pairs with the stores in segment.cc. A peer that ended may have done its part, so
      // the counter is looked at once more after.
      const uint32_t state = peer.state.load(std::memory_order_acquire);
      const bool is_known = state == Member::kAttached;
      const bool is_gone = state == Member::kLeft || (is_known && !shm::is_running(peer.process));
      if (counter.has_reached(target)) return;
      if (is_gone) {
        fail(Failure::kComm, detail::concatenate("world_rank ", world_rank(member),
                                                 " has ended (pid ", peer.process.pid, ")"));
      }
      if (Clock::now() >= deadline_) {
        fail(Failure::kTimeout,
             detail::concatenate("world_rank ", world_rank(member), " did not come within ",
                                 timeout_.count(), " ms", is_known ? "" : "; it never attached"));
      }
    }
  }

  int world_rank(int member) const { return group().world_ranks[static_cast<size_t>(member)]; }

  // Lets every member fail with `reason`, unless another failure came first, and throws.
  [[noreturn]] void fail(Failure::State kind, const std::string& reason) {
    segment_.unlink_unless_complete();
    Failure& failure = segment_.failure();
    uint32_t expected = Failure::kNone;
    // Relaxed: it only tells who writes the reason, which is published below.
    if (failure.state.compare_exchange_strong(expected, Failure::kBeingWritten,
                                              std::memory_order_relaxed)) {
      std::snprintf(failure.reason, sizeof(failure.reason), "%s", reason.c_str());
      // Release: who sees the kind sees the reason.
      failure.state.store(kind, std::memory_order_release);
      segment_.wake_everybody();
    }
    throw_failure(kind, reason);
  }

  void throw_if_failed() const {
    const Failure& failure = segment_.failure();
    // Acquire: pairs with fail().
    const uint32_t state = failure.state.load(std::memory_order_acquire);
    if (state != Failure::kComm && state != Failure::kTimeout) return;
    throw_failure(static_cast<Failure::State>(state), failure.reason);
  }

  [[noreturn]] void throw_failure(Failure::State kind, const std::string& reason) const {
    const std::string message =
        detail::concatenate(name_of(announcement_.kind), " failed: operation ", operation_,
                            " of group ", group().name, " (world_rank=", world_rank(group().rank),
                            "). See docs/errors.md#comm. Reason: ", reason, ".");
    if (kind == Failure::kTimeout) throw TimeoutError(message);
    throw CommError(message);
  }

  Segment segment_;
  const std::chrono::milliseconds timeout_;
  const int64_t half_nbytes_;
  const int num_spins_;
  uint32_t round_ = 0;
  int64_t operation_ = 0;
  // Of the operation that runs.
  Announcement announcement_;
  Clock::time_point deadline_;
};

}  // namespace

std::unique_ptr<Communicator> make_shm_communicator(GroupInfo group, const ShmOptions& options) {
  MICS_CHECK(group.size() > 1,
             "a shared memory group has at least two members: got size=", group.size(), " (",
             group.name, ").");
  const uint64_t key = key_of(group);
  Segment segment =
      options.creates
          ? Segment::create(options.segment, key, group.size(), group.rank, options.slot_nbytes)
          : Segment::attach(options.segment, key, group.size(), group.rank, options.timeout);
  return std::make_unique<ShmCommunicator>(std::move(group), std::move(segment), options.timeout);
}

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
