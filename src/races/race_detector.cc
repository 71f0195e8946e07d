#include "mics/race_detector.h"

#include <algorithm>
#include <sstream>

#include "mics/error.h"
#include "races/race_checker.h"

namespace mics {

namespace {

using Kind = RaceEntry::Kind;

constexpr size_t kMostRaces = 20;
constexpr int kCompute = 0;

// What an event keeps.
struct Mark {
  int number = -1;
};

int number_of(const std::shared_ptr<const void>& mark) {
  return mark == nullptr ? -1 : static_cast<const Mark*>(mark.get())->number;
}

uint64_t number_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }

// The bytes from a tensor's first element to its last; empty for what has no memory.
std::pair<uint64_t, uint64_t> bytes_of(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.layout() != at::kStrided || tensor.numel() == 0) return {0, 0};
  if (tensor.is_meta() || !tensor.has_storage()) return {0, 0};
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const uint64_t first = number_of(tensor.const_data_ptr());
  return {first, first + static_cast<uint64_t>((last + 1) * tensor.element_size())};
}

const char* verb_of(Kind kind) {
  switch (kind) {
    case Kind::kRead:
      return "reads";
    case Kind::kWrite:
      return "writes";
    default:
      return "frees";
  }
}

}  // namespace

RaceDetector::RaceDetector(bool keeps_trace, bool throws)
    : keeps_trace_(keeps_trace),
      throws_(throws),
      checker_(std::make_unique<RaceChecker>()),
      streams_{"compute"} {}

RaceDetector::~RaceDetector() = default;

// --- names ---

int RaceDetector::new_id(std::string name) {
  streams_.push_back(std::move(name));
  return static_cast<int>(streams_.size()) - 1;
}

int RaceDetector::id_of(std::optional<uint64_t> handle) {
  if (!handle.has_value()) {
    const auto entered = entered_.find(std::this_thread::get_id());
    return entered == entered_.end() || entered->second.empty() ? kCompute : entered->second.back();
  }
  if (*handle == 0) return kCompute;
  const auto found = handles_.find(*handle);
  if (found != handles_.end()) return found->second;
  std::ostringstream name;
  name << "stream 0x" << std::hex << *handle;
  return handles_[*handle] = new_id(name.str());
}

int RaceDetector::id_of(const Stream& stream) {
  if (stream.native_handle() != nullptr) return id_of(number_of(stream.native_handle()));
  const auto found = objects_.find(&stream);
  return found == objects_.end() ? kCompute : found->second;
}

void RaceDetector::add_stream(const Stream& stream, const std::string& name, bool is_callers) {
  if (is_callers) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stream.native_handle() != nullptr) {
    handles_[number_of(stream.native_handle())] = new_id(name);
  } else {
    objects_[&stream] = new_id(name);
  }
}

void RaceDetector::name_memory(const at::Tensor& tensor, const std::string& name) {
  const auto [first, last] = bytes_of(tensor);
  if (first == last) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  names_[first] = {last, name};
}

std::string RaceDetector::memory_at(uint64_t byte) const {
  const auto after = names_.upper_bound(byte);
  if (after == names_.begin()) return {};
  const auto& [last, name] = std::prev(after)->second;
  return byte < last ? ", " + name : std::string();
}

int RaceDetector::intern(std::string operation) {
  const auto [found, is_new] =
      numbers_.emplace(std::move(operation), static_cast<int>(operations_.size()));
  if (is_new) operations_.push_back(found->first);
  return found->second;
}

// --- the trace ---

std::string RaceDetector::describe(const Race& race) const {
  const auto side = [this](const RaceEntry& entry) {
    return operations_[static_cast<size_t>(entry.operation)] + " on stream \"" +
           streams_[static_cast<size_t>(entry.stream)] + "\"";
  };
  const uint64_t first = std::max(race.now.first, race.past.first);
  const uint64_t last = std::min(race.now.last, race.past.last);
  std::ostringstream text;
  text << "an event must order two streams that use the same memory: got " << side(race.now) << ", "
       << "which " << verb_of(race.now.kind) << " " << last - first << " bytes that "
       << side(race.past) << " " << verb_of(race.past.kind) << memory_at(first)
       << ". Record an event after the first and let the stream of the second wait for it; if no "
          "stream of yours takes part, report this.";
  return text.str();
}

void RaceDetector::add(const RaceEntry& entry) {
  if (keeps_trace_) trace_.push_back(entry);
  const std::optional<Race> race = checker_->add(entry);
  if (race.has_value() && races_.size() < kMostRaces) races_.push_back(describe(*race));
}

void RaceDetector::add_access(int stream, const at::Tensor& tensor, bool is_write,
                              const std::string& operation) {
  const auto [first, last] = bytes_of(tensor);
  if (first == last) return;
  ++num_accesses_;
  moved_nbytes_[operation] += static_cast<int64_t>(tensor.nbytes());
  if (Allocation* allocation = allocation_of(tensor)) {
    allocation->nbytes =
        std::max(allocation->nbytes, static_cast<int64_t>(tensor.storage().nbytes()));
  }
  std::ostringstream name;
  name << operation << " of " << tensor.scalar_type() << " " << tensor.sizes();
  add({is_write ? Kind::kWrite : Kind::kRead, stream, intern(name.str()), first, last, -1, -1});
}

RaceDetector::Allocation* RaceDetector::allocation_of(const at::Tensor& tensor) {
  if (allocations_.empty()) return nullptr;
  const auto found = allocations_.find(number_of(tensor.storage().data()));
  return found == allocations_.end() ? nullptr : &found->second;
}

void RaceDetector::throw_if_any() const {
  if (throws_ && !races_.empty()) throw RaceError(races_.front());
}

// --- what the caller does ---

void RaceDetector::access(const std::string& operation, const std::vector<at::Tensor>& reads,
                          const std::vector<at::Tensor>& writes, std::optional<uint64_t> stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int id = id_of(stream);
  const bool passes_numbers = !stream.has_value() && id != kCompute;
  for (const at::Tensor& tensor : reads) {
    if (passes_numbers && tensor.defined() && tensor.dim() == 0) continue;
    add_access(id, tensor, false, operation);
  }
  for (const at::Tensor& tensor : writes) add_access(id, tensor, true, operation);
  throw_if_any();
}

void RaceDetector::made(const std::string& operation, const std::vector<at::Tensor>& tensors,
                        std::optional<uint64_t> stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int id = id_of(stream);
  for (const at::Tensor& tensor : tensors) {
    const auto [first, last] = bytes_of(tensor);
    if (first == last) continue;
    if (allocation_of(tensor) == nullptr) add({Kind::kForget, id, 0, first, last, -1, -1});
    add_access(id, tensor, true, operation);
  }
  throw_if_any();
}

void RaceDetector::allocate(uint64_t address, int64_t nbytes, std::optional<uint64_t> stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int id = id_of(stream);
  allocations_[address] = {nbytes, id};
  add({Kind::kWrite, id, intern("an allocation"), address, address + static_cast<uint64_t>(nbytes),
       -1, -1});
}

// Called by deleters, so the race is only collected here.
void RaceDetector::free(uint64_t address) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = allocations_.find(address);
  if (found == allocations_.end()) return;
  const auto [nbytes, stream] = found->second;
  allocations_.erase(found);
  names_.erase(names_.lower_bound(address),
               names_.lower_bound(address + static_cast<uint64_t>(nbytes)));
  add({Kind::kFree, stream, intern("the end of its last tensor"), address,
       address + static_cast<uint64_t>(nbytes), -1, -1});
}

void RaceDetector::synchronize(std::optional<uint64_t> stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto wait_for = [this](int id) { add({Kind::kHostWait, id, 0, 0, 0, -1, -1}); };
  if (stream.has_value()) return wait_for(id_of(stream));
  for (int id = 0; id < static_cast<int>(streams_.size()); ++id) wait_for(id);
}

void RaceDetector::record_event(uint64_t event, uint64_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = events_.find(event);
  const int before = known == events_.end() ? -1 : known->second;
  events_[event] = num_marks_;
  add({Kind::kRecord, id_of(stream), 0, 0, 0, num_marks_++, before});
}

void RaceDetector::wait_for_event(uint64_t event, uint64_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = events_.find(event);
  add({Kind::kWait, id_of(stream), 0, 0, 0, known == events_.end() ? -1 : known->second, -1});
}

std::vector<std::string> RaceDetector::races() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return races_;
}

int64_t RaceDetector::num_accesses() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_accesses_;
}

std::map<std::string, int64_t> RaceDetector::moved_nbytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return moved_nbytes_;
}

// --- of streams ---

std::shared_ptr<const void> RaceDetector::on_record(const Stream& stream,
                                                    const std::shared_ptr<const void>& before) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto mark = std::make_shared<const Mark>(Mark{num_marks_++});
  add({Kind::kRecord, id_of(stream), 0, 0, 0, mark->number, number_of(before)});
  return mark;
}

void RaceDetector::on_wait(const Stream& stream, const std::shared_ptr<const void>& mark) {
  const std::lock_guard<std::mutex> lock(mutex_);
  add({Kind::kWait, id_of(stream), 0, 0, 0, number_of(mark), -1});
}

void RaceDetector::on_passed(const std::shared_ptr<const void>& mark) {
  if (mark == nullptr) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  add({Kind::kHostWait, kCompute, 0, 0, 0, number_of(mark), -1});
}

void RaceDetector::on_synchronize(const Stream& stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  add({Kind::kHostWait, id_of(stream), 0, 0, 0, -1, -1});
}

void RaceDetector::on_access(const Stream& stream, const at::Tensor& tensor, bool is_write,
                             std::string_view operation, std::string_view unit) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string name(operation);
  if (!unit.empty()) name.append(" of unit \"").append(unit).append("\"");
  add_access(id_of(stream), tensor, is_write, name);
  throw_if_any();
}

void RaceDetector::on_enter(const Stream& stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  entered_[std::this_thread::get_id()].push_back(id_of(stream));
}

void RaceDetector::on_leave() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto entered = entered_.find(std::this_thread::get_id());
  entered->second.pop_back();
  if (entered->second.empty()) entered_.erase(entered);
}

// --- defects ---

bool RaceDetector::is_noticed(size_t entry, std::optional<size_t> later) const {
  RaceChecker checker;
  const RaceEntry& changed = trace_[entry];
  for (size_t i = 0; i < trace_.size(); ++i) {
    RaceEntry next = trace_[i];
    if (i == entry) continue;
    // Without the record, a wait finds what the event was marked with before.
    const bool waits_for_it =
        next.kind == Kind::kWait && changed.kind == Kind::kRecord && next.mark == changed.mark;
    if (waits_for_it) next.mark = changed.before;
    if (checker.add(next)) return true;
    if (i == later && checker.add(changed)) return true;
  }
  return false;
}

std::string RaceDetector::kind_of_defect(const RaceEntry& entry,
                                         const std::map<int, int>& recorded_on) const {
  const std::string& stream = streams_[static_cast<size_t>(entry.stream)];
  switch (entry.kind) {
    case Kind::kWait: {
      const auto from = recorded_on.find(entry.mark);
      if (from == recorded_on.end() || from->second == entry.stream) return {};
      return stream + " does not wait for " + streams_[static_cast<size_t>(from->second)];
    }
    case Kind::kRecord:
      return stream + " does not record";
    case Kind::kWrite:
      return entry.stream == kCompute ? stream + " writes late" : std::string();
    default:
      return {};
  }
}

std::map<std::string, RaceDetector::Noticed> RaceDetector::put_defects(
    int stride, const std::string& only) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<int, int> recorded_on;  // stream by mark
  for (const RaceEntry& entry : trace_) {
    if (entry.kind == Kind::kRecord) recorded_on[entry.mark] = entry.stream;
  }
  std::map<std::string, int> met;
  std::map<std::string, Noticed> found;
  for (size_t i = 0; i < trace_.size(); ++i) {
    const std::string kind = kind_of_defect(trace_[i], recorded_on);
    if (kind.empty() || (!only.empty() && kind != only)) continue;
    if (met[kind]++ % stride != 0) continue;
    std::optional<size_t> later;
    if (trace_[i].kind == Kind::kWrite) {
      const auto next = std::find_if(
          trace_.begin() + static_cast<int64_t>(i), trace_.end(), [](const RaceEntry& entry) {
            return entry.kind == Kind::kRecord && entry.stream == kCompute;
          });
      if (next == trace_.end()) continue;
      later = static_cast<size_t>(next - trace_.begin());
    }
    Noticed& counts = found[kind];
    ++counts.all;
    if (is_noticed(i, later)) ++counts.noticed;
  }
  return found;
}

}  // namespace mics
