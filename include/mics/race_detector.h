// RaceDetector: finds memory that two streams use at once, from what the streams are asked for.
//
// It observes the streams of a runtime (records, waits, collectives), and is told what the caller
// computes, allocates and frees. All of it enters one trace, which is checked while it grows: an
// access is a race when no event orders it after an earlier one to the same bytes, even if this run
// happened to do them one after the other. So it finds a missing edge without a device, too.
//
//   allocate   a write of the stream that is current
//   free       a write of the stream that was current at the allocation, because in the order of
//              that stream the memory is given out again
//
// Streams are known by their device's handle; on a CPU by the object, and the caller's thread is
// stream 0, "compute". It cannot see: kernels that no operator launches, edges and waits that are
// made beside Stream, tensors whose elements interleave (their whole range counts).
//
// Thread safety: any thread. Source: issue 18, section 4.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "mics/stream.h"

namespace mics {

struct RaceEntry;
struct Race;
class RaceChecker;

class RaceDetector final : public StreamObserver {
 public:
  // `keeps_trace`: for trace() and find_unordered(). `throws`: an access throws the first race that
  // was found up to then; else they are only collected.
  RaceDetector(bool keeps_trace, bool throws);
  ~RaceDetector() override;

  // Names a stream that it will observe; `is_callers`: the stream of the caller's own work.
  void add_stream(const Stream& stream, const std::string& name, bool is_callers);
  // Names memory in messages, until free(): "shard of unit \"blocks.1\"".
  void name_memory(const at::Tensor& tensor, const std::string& name);

  // What the calling thread computes. `stream`: the device's current stream; without one it is the
  // stream whose work this thread runs, else compute. Not looked at: tensors without elements or
  // without strides; on a side stream without a handle, numbers [] that are only read, which a
  // device would get by value.
  // Throws: RaceError, if it is to.
  void access(const std::string& operation, const std::vector<at::Tensor>& reads,
              const std::vector<at::Tensor>& writes, std::optional<uint64_t> stream);
  // Tensors that an operator has made and written. Where allocate() was not told of their memory,
  // nothing is known of its former owner, and the allocator is trusted.
  void made(const std::string& operation, const std::vector<at::Tensor>& tensors,
            std::optional<uint64_t> stream);
  // `nbytes` 0: they become known by the first tensor in it.
  void allocate(uint64_t address, int64_t nbytes, std::optional<uint64_t> stream);
  void free(uint64_t address) noexcept;
  // The host has waited for the stream; without one for all of them.
  void synchronize(std::optional<uint64_t> stream);
  // Events that are not of Stream, by the device's handle.
  void record_event(uint64_t event, uint64_t stream);
  void wait_for_event(uint64_t event, uint64_t stream);

  // What was found, as messages; the first 20.
  [[nodiscard]] std::vector<std::string> races() const;
  // Accesses that were looked at.
  [[nodiscard]] int64_t num_accesses() const;

  // Bytes of tensors that each operation has read or written, by its name.
  [[nodiscard]] std::map<std::string, int64_t> moved_nbytes() const;

  // --- with a trace ---

  struct Noticed {
    int noticed = 0;
    int all = 0;
  };
  // Defects that are put into the trace one at a time, of each kind every `stride`-th, and how many
  // of them are noticed, by kind:
  //   "gather_rail does not wait for compute"   a wait is left out
  //   "compute does not record"                 a record is left out: waits find the mark before it
  //   "compute writes late"                     a write comes only after the stream's next record
  // One that is not noticed was redundant: what it ordered was ordered by others. `only`: a kind;
  // empty: all.
  [[nodiscard]] std::map<std::string, Noticed> put_defects(int stride,
                                                           const std::string& only = {}) const;

  // --- of streams ---
  std::shared_ptr<const void> on_record(const Stream& stream,
                                        const std::shared_ptr<const void>& before) override;
  void on_wait(const Stream& stream, const std::shared_ptr<const void>& mark) override;
  void on_passed(const std::shared_ptr<const void>& mark) override;
  void on_synchronize(const Stream& stream) override;
  void on_access(const Stream& stream, const at::Tensor& tensor, bool is_write,
                 std::string_view operation, std::string_view unit) override;
  void on_enter(const Stream& stream) override;
  void on_leave() noexcept override;

 private:
  struct Allocation {
    int64_t nbytes = 0;
    int stream = 0;
  };
  // All with mutex_ held.
  [[nodiscard]] int id_of(const Stream& stream);
  [[nodiscard]] int id_of(std::optional<uint64_t> handle);
  [[nodiscard]] int new_id(std::string name);
  [[nodiscard]] int intern(std::string operation);
  void add(const RaceEntry& entry);
  void add_access(int stream, const at::Tensor& tensor, bool is_write,
                  const std::string& operation);
  void throw_if_any() const;
  // The allocation that holds `tensor`; null: unknown.
  [[nodiscard]] Allocation* allocation_of(const at::Tensor& tensor);
  [[nodiscard]] std::string describe(const Race& race) const;
  [[nodiscard]] std::string memory_at(uint64_t byte) const;
  // Whether the trace has a race when `entry` is left out or, with `later`, comes after that one.
  [[nodiscard]] bool is_noticed(size_t entry, std::optional<size_t> later) const;
  [[nodiscard]] std::string kind_of_defect(const RaceEntry& entry,
                                           const std::map<int, int>& recorded_on) const;

  const bool keeps_trace_;
  const bool throws_;
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  const std::unique_ptr<RaceChecker> checker_;
  std::vector<RaceEntry> trace_;
  std::vector<std::string> streams_;      // names, by id
  std::map<uint64_t, int> handles_;       // ids
  std::map<const Stream*, int> objects_;  // ids of streams without a handle
  std::map<std::thread::id, std::vector<int>> entered_;
  std::vector<std::string> operations_;                         // names, by number
  std::unordered_map<std::string, int> numbers_;                // of operations
  std::map<uint64_t, Allocation> allocations_;                  // by address
  std::map<uint64_t, std::pair<uint64_t, std::string>> names_;  // of memory: first -> last, name
  std::map<uint64_t, int> events_;                              // marks, by handle
  int num_marks_ = 0;
  int64_t num_accesses_ = 0;
  std::map<std::string, int64_t> moved_nbytes_;  // by operation
  std::vector<std::string> races_;
};

}  // namespace mics
