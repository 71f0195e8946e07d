#include "mics/communicator.h"

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>

#include <sstream>
#include <utility>

#include "comm/sum_spans.h"
#include "mics/error.h"
#include "plan/check.h"

namespace mics {

at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  if (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) return at::kFloat;
  MICS_CHECK(
      dtype == at::kDouble || dtype == at::kLong,
      "a collective that sums takes float32, bfloat16, float16, float64 or int64: got dtype=",
      dtype, ".");
  return dtype;
}

void sum_in_order(const at::Tensor& output, const std::vector<at::Tensor>& pieces) {
  if (output.is_cpu()) {
    std::vector<const char*> spans;
    for (const at::Tensor& piece : pieces) {
      spans.push_back(static_cast<const char*>(piece.const_data_ptr()));
    }
    return sum_spans(output.scalar_type(), static_cast<char*>(output.mutable_data_ptr()), spans,
                     static_cast<int64_t>(output.nbytes()));
  }
  at::Tensor sum =
      pieces.front().to(accumulation_dtype(output.scalar_type()), /*non_blocking=*/false,
                        /*copy=*/true);
  for (size_t i = 1; i < pieces.size(); ++i) sum.add_(pieces[i]);
  output.copy_(sum);
}

void sum_rows_in_order(const at::Tensor& output, const at::Tensor& rows) {
  const int64_t numel = output.numel();
  if (numel == 0) return;
  if (!output.is_cpu()) return sum_in_order(output.view({-1}), rows.view({-1, numel}).unbind(0));
  std::vector<const char*> spans;
  const auto nbytes = static_cast<int64_t>(output.nbytes());
  for (int64_t row = 0; row < rows.numel() / numel; ++row) {
    spans.push_back(static_cast<const char*>(rows.const_data_ptr()) + row * nbytes);
  }
  sum_spans(output.scalar_type(), static_cast<char*>(output.mutable_data_ptr()), spans, nbytes);
}

namespace {

std::string with_report(std::string message, FlightLog& log) {
  return message.append("\n").append(log.report_failure());
}

std::string describe(const GroupInfo& group) {
  std::ostringstream text;
  text << group.name << " [";
  const char* separator = "";
  for (const int rank : group.world_ranks) {
    text << separator << rank;
    separator = " ";
  }
  text << "]";
  return text.str();
}

}  // namespace

Communicator::Communicator(GroupInfo group)
    : group_(std::move(group)), log_name_(describe(group_)) {
  MICS_CHECK(group_.size() >= 1, "a group must have at least one member: got name=", group_.name,
             ".");
  MICS_CHECK(group_.nodes.size() == group_.world_ranks.size(),
             "a group needs the node of every member: got ", group_.nodes.size(), " nodes for ",
             group_.size(), " members (", group_.name, ").");
  MICS_CHECK(group_.rank >= 0 && group_.rank < group_.size(),
             "a group rank must be in [0, size): got rank=", group_.rank, ", size=", group_.size(),
             " (", group_.name, ").");
}

bool Communicator::is_same_node(int member) const {
  return group_.nodes[static_cast<size_t>(member)] ==
         group_.nodes[static_cast<size_t>(group_.rank)];
}

void Communicator::count(Route route, int64_t nbytes_per_member) {
  const auto add = [this](int to, int from, int64_t nbytes) {
    (is_same_node(to) ? traffic_.sent_intra_nbytes : traffic_.sent_inter_nbytes) += nbytes;
    (is_same_node(from) ? traffic_.received_intra_nbytes : traffic_.received_inter_nbytes) +=
        nbytes;
  };
  const int size = group_.size();
  switch (route) {
    case Route::kDirect:
      for (int member = 0; member < size; ++member) {
        if (member != group_.rank) add(member, member, nbytes_per_member);
      }
      return;
    case Route::kRing:
      return add((group_.rank + 1) % size, (group_.rank + size - 1) % size,
                 nbytes_per_member * (size - 1));
  }
}

void Communicator::check_pairs(const char* op, const std::vector<TensorPair>& pairs,
                               bool output_is_larger) const {
  MICS_CHECK(!pairs.empty(), op, " needs at least one pair of tensors: got none (", group_.name,
             ").");
  const at::ScalarType dtype = pairs.front().input.scalar_type();
  for (const TensorPair& pair : pairs) {
    check_tensor(pair.output);
    check_tensor(pair.input);
    MICS_CHECK(pair.output.is_contiguous() && pair.input.is_contiguous(), op,
               " takes contiguous tensors: got output strides ", pair.output.strides(),
               ", input strides ", pair.input.strides(), " (", group_.name, ").");
    MICS_CHECK(pair.output.scalar_type() == dtype && pair.input.scalar_type() == dtype, op,
               " takes tensors of one dtype: got ", dtype, ", ", pair.output.scalar_type(), " and ",
               pair.input.scalar_type(), " (", group_.name, ").");
    const at::Tensor& large = output_is_larger ? pair.output : pair.input;
    const at::Tensor& small = output_is_larger ? pair.input : pair.output;
    MICS_CHECK(large.numel() == small.numel() * group_.size(), op, " needs the ",
               output_is_larger ? "output" : "input",
               " to hold size pieces: got output numel=", pair.output.numel(),
               ", input numel=", pair.input.numel(), ", size=", group_.size(), " (", group_.name,
               ").");
    if (small.numel() == 0) continue;
    const auto* large_first = static_cast<const char*>(large.const_data_ptr());
    const auto* small_first = static_cast<const char*>(small.const_data_ptr());
    const bool is_in_place =
        small_first == large_first + static_cast<int64_t>(small.nbytes()) * group_.rank;
    const bool overlaps =
        small_first < large_first + large.nbytes() && large_first < small_first + small.nbytes();
    MICS_CHECK(
        is_in_place || !overlaps, op,
        " allows one overlap, the smaller tensor at this rank's place in the larger: got another "
        "(rank=",
        group_.rank, ", ", group_.name, ").");
  }
}

namespace {

int64_t total_nbytes(const std::vector<TensorPair>& pairs, const at::Tensor TensorPair::* member) {
  int64_t nbytes = 0;
  for (const TensorPair& pair : pairs) nbytes += static_cast<int64_t>((pair.*member).nbytes());
  return nbytes;
}

void note_pairs(const std::vector<TensorPair>& pairs, const Stream& stream, std::string_view op,
                std::string_view unit) {
  for (const TensorPair& pair : pairs) {
    stream.note_read(pair.input, op, unit);
    stream.note_write(pair.output, op, unit);
  }
}

// Shows a launch to torch.profiler, and under emit_nvtx() to Nsight, by hop and unit. Without a
// profiler it only reads a flag.
class LaunchRange {
 public:
  LaunchRange(const GroupInfo& group, std::string_view unit) : range_(at::RecordScope::USER_SCOPE) {
    if (!range_.isActive()) return;
    std::string name = "torch_mics: launch of " + group.name;
    if (!unit.empty()) name.append(" of ").append(unit);
    range_.before(std::move(name));
  }

 private:
  at::RecordFunction range_;
};

// For groups of one: the result is the input.
void copy_pairs(const std::vector<TensorPair>& pairs) {
  for (const TensorPair& pair : pairs) {
    if (pair.output.numel() == 0) continue;
    if (pair.output.const_data_ptr() == pair.input.const_data_ptr()) continue;
    pair.output.copy_(pair.input);
  }
}

}  // namespace

void Communicator::submit(Stream& stream, std::string_view op, std::string_view unit,
                          int64_t nbytes, std::function<void()> work) {
  if (log_ == nullptr) return stream.enqueue(std::move(work));
  const int64_t id = log_->issue(log_name_, op, unit, nbytes);
  stream.enqueue([log = log_, id, work = std::move(work)] {
    log->start(id);
    try {
      work();
    } catch (const TimeoutError& error) {
      log->fail(id);
      throw TimeoutError(with_report(error.what(), *log));
    } catch (const CommError& error) {
      log->fail(id);
      throw CommError(with_report(error.what(), *log));
    }
    log->finish(id);
  });
}

void Communicator::all_gather(const std::vector<TensorPair>& pairs, Stream& stream,
                              std::string_view unit) {
  check_pairs("all_gather", pairs, /*output_is_larger=*/true);
  traffic_.calls += 1;
  note_pairs(pairs, stream, "all_gather", unit);
  if (group_.size() == 1) return stream.enqueue([pairs] { copy_pairs(pairs); });
  const LaunchRange range(group_, unit);
  const int64_t piece_nbytes = total_nbytes(pairs, &TensorPair::input);
  count(gather_route(), piece_nbytes);
  submit(stream, "all_gather", unit, piece_nbytes * group_.size(),
         [this, pairs] { do_all_gather(pairs); });
}

void Communicator::reduce_scatter(const std::vector<TensorPair>& pairs, Stream& stream,
                                  std::string_view unit) {
  check_pairs("reduce_scatter", pairs, /*output_is_larger=*/false);
  (void)accumulation_dtype(pairs.front().input.scalar_type());
  traffic_.calls += 1;
  note_pairs(pairs, stream, "reduce_scatter", unit);
  if (group_.size() == 1) return stream.enqueue([pairs] { copy_pairs(pairs); });
  const LaunchRange range(group_, unit);
  const int64_t piece_nbytes = total_nbytes(pairs, &TensorPair::output);
  count(reduce_route(), piece_nbytes);
  submit(stream, "reduce_scatter", unit, piece_nbytes * group_.size(),
         [this, pairs] { do_reduce_scatter(pairs); });
}

void Communicator::all_reduce(const at::Tensor& tensor, Stream& stream, std::string_view unit) {
  check_tensor(tensor);
  MICS_CHECK(tensor.is_contiguous(), "all_reduce takes a contiguous tensor: got strides ",
             tensor.strides(), " (", group_.name, ").");
  (void)accumulation_dtype(tensor.scalar_type());
  traffic_.calls += 1;
  if (group_.size() == 1 || tensor.numel() == 0) return;
  const LaunchRange range(group_, unit);
  stream.note_read(tensor, "all_reduce", unit);
  stream.note_write(tensor, "all_reduce", unit);
  // A reduce-scatter of pieces, then an all-gather of the sums.
  const int64_t piece_numel = (tensor.numel() + group_.size() - 1) / group_.size();
  const int64_t piece_nbytes = piece_numel * static_cast<int64_t>(tensor.element_size());
  count(reduce_route(), piece_nbytes);
  count(gather_route(), piece_nbytes);
  submit(stream, "all_reduce", unit, static_cast<int64_t>(tensor.nbytes()),
         [this, tensor] { do_all_reduce(tensor); });
}

}  // namespace mics
