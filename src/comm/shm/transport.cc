#include "comm/shm/transport.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "comm/sum_spans.h"
#include "mics/error.h"
#include "plan/check.h"

namespace mics::shm {

namespace {

using Clock = std::chrono::steady_clock;

// How often a sleeping member wakes to check that its peers are alive.
constexpr std::chrono::milliseconds kSlice{50};
// How often a member polls a counter before it sleeps, where every member has a core.
constexpr int kNumSpins = 2000;

const char* name_of(int32_t kind) {
  constexpr const char* kNames[] = {"all_gather", "reduce_scatter", "all_reduce", "barrier"};
  return kNames[kind];
}

int num_usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

int64_t longest_of(const std::vector<ByteStream>& streams) {
  int64_t longest = 0;
  for (const ByteStream& stream : streams) longest = std::max(longest, stream.remaining());
  return longest;
}

bool is_failure(uint32_t state) { return state == Failure::kComm || state == Failure::kTimeout; }

}  // namespace

Transport::Transport(GroupInfo group, Segment segment, std::chrono::milliseconds timeout)
    : group_(std::move(group)),
      segment_(std::move(segment)),
      timeout_(timeout),
      half_nbytes_(segment_.slot_nbytes() / 2),
      num_spins_(num_usable_cores() >= group_.size() ? kNumSpins : 0) {}

bool Transport::has_failed() const {
  // Relaxed: nothing else is read for it.
  return segment_.failure().state.load(std::memory_order_relaxed) != Failure::kNone;
}

void Transport::begin(const Announcement& announcement) {
  announcement_ = announcement;
  announcement_.operation = ++operation_;
  deadline_ = Clock::now() + timeout_;
  throw_if_failed();
}

void Transport::meet() {
  run_round([](char*) {}, [] {});
}

void Transport::gather(ByteStream input, std::vector<ByteStream> outputs) {
  const int64_t longest = longest_of(outputs);
  for (int64_t done = 0; done == 0 || done < longest; done += half_nbytes_) {
    const auto part = [&](const ByteStream& s) { return std::min(half_nbytes_, s.remaining()); };
    run_round([&](char* half) { input.copy_to(half, part(input)); },
              [&] {
                for (int step = 1; step < group_.size(); ++step) {
                  const int member = (group_.rank + step) % group_.size();
                  ByteStream& output = outputs[static_cast<size_t>(member)];
                  output.copy_from(half_of(member), part(output));
                }
              });
  }
}

// Each half of a slot has a section for each other member.
void Transport::reduce(std::vector<ByteStream> inputs, ByteStream output, c10::ScalarType dtype) {
  const int64_t line = static_cast<int64_t>(kCacheLine);
  const int64_t section = half_nbytes_ / (group_.size() - 1) / line * line;
  const int64_t longest = longest_of(inputs);
  const int rank = group_.rank;
  std::vector<const char*> pieces(static_cast<size_t>(group_.size()));
  for (int64_t done = 0; done == 0 || done < longest; done += section) {
    const auto part = [&](const ByteStream& s) { return std::min(section, s.remaining()); };
    run_round(
        [&](char* half) {
          for (int owner = 0; owner < group_.size(); ++owner) {
            if (owner == rank) continue;
            ByteStream& input = inputs[static_cast<size_t>(owner)];
            input.copy_to(half + section * (owner - (owner > rank ? 1 : 0)), part(input));
          }
        },
        [&] {
          // This member's input and output have the same spans, so they advance together.
          ByteStream& own = inputs[static_cast<size_t>(rank)];
          const int64_t nbytes = part(own);
          int64_t offset = 0;
          own.take(nbytes, [&](char* data, int64_t length) {
            for (int member = 0; member < group_.size(); ++member) {
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

char* Transport::half_of(int member) const {
  return segment_.slot(member) + half_nbytes_ * static_cast<int64_t>(round_ % 2);
}

int Transport::world_rank(int member) const {
  return group_.world_ranks[static_cast<size_t>(member)];
}

void Transport::run_round(const std::function<void(char*)>& write,
                          const std::function<void()>& read) {
  ++round_;
  // The half was last used two rounds ago. All have read it: each read it before it wrote the last
  // round, and this member has waited for that.
  write(half_of(group_.rank));
  Member& own = segment_.own();
  own.halves[round_ % 2].announcement = announcement_;
  own.written.raise(round_);
  for (int member = 0; member < group_.size(); ++member) {
    if (member == group_.rank) continue;
    wait_for(member, segment_.member(member).written, round_);
    check_same(member);
  }
  read();
}

void Transport::check_same(int member) {
  const Announcement& other = segment_.member(member).halves[round_ % 2].announcement;
  if (other == announcement_) return;
  fail(Failure::kComm, "every member must issue the same collectives, sizes and dtypes: got " +
                           describe(announcement_, group_.rank) + " and " +
                           describe(other, member));
}

std::string Transport::describe(const Announcement& announcement, int member) const {
  return detail::concatenate(name_of(announcement.kind), " of ", announcement.num_pairs,
                             " tensors, ", announcement.nbytes, " bytes, dtype ",
                             static_cast<c10::ScalarType>(announcement.dtype), " on world_rank ",
                             world_rank(member));
}

void Transport::wait_for(int member, Counter& counter, uint32_t target) {
  if (counter.has_reached(target)) return;
  for (int spin = 0; spin < num_spins_; ++spin) {
    if (counter.has_reached(target)) return;
  }
  while (!counter.wait_for(target, kSlice)) {
    throw_if_failed();
    const Member& peer = segment_.member(member);
    // Acquire: pairs with the stores in segment.cc. A peer may do its part and then end, so the
    // counter is read once more after this.
    const uint32_t state = peer.state.load(std::memory_order_acquire);
    const bool is_known = state == Member::kAttached;
    const bool has_ended = is_known && !is_running(peer.process);
    if (counter.has_reached(target)) return;
    if (state == Member::kLeft) {
      fail(Failure::kComm, detail::concatenate("world_rank ", world_rank(member),
                                               " has left the group: its models are gone"));
    }
    if (has_ended) {
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

void Transport::fail(Failure::State kind, const std::string& reason) {
  segment_.unlink_unless_complete();
  Failure& failure = segment_.failure();
  uint32_t expected = Failure::kNone;
  // Relaxed: it only decides who writes the reason, which is published below.
  if (failure.state.compare_exchange_strong(expected, Failure::kBeingWritten,
                                            std::memory_order_relaxed)) {
    std::snprintf(failure.reason, sizeof(failure.reason), "%s", reason.c_str());
    // Release: who sees the kind sees the reason.
    failure.state.store(kind, std::memory_order_release);
    segment_.wake_everybody();
  }
  throw_failure(kind, reason);
}

void Transport::throw_if_failed() const {
  const Failure& failure = segment_.failure();
  // Acquire: pairs with fail().
  const uint32_t state = failure.state.load(std::memory_order_acquire);
  if (!is_failure(state)) return;
  throw_failure(static_cast<Failure::State>(state), failure.reason);
}

void Transport::throw_failure(Failure::State kind, const std::string& reason) const {
  const std::string message =
      detail::concatenate(name_of(announcement_.kind), " failed: operation ", operation_,
                          " of group ", group_.name, " (world_rank=", world_rank(group_.rank),
                          "). See docs/errors.md#comm. Reason: ", reason, ".");
  if (kind == Failure::kTimeout) throw TimeoutError(message);
  throw CommError(message);
}

}  // namespace mics::shm
