#include "mics/nccl_world.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>

#include "comm/nccl/handshake.h"
#include "comm/nccl/nccl_communicator.h"
#include "comm/nccl/nccl_memory.h"
#include "comm/nccl/nccl_watchdog.h"
#include "comm/store_clone.h"
#include "mics/error.h"
#include "plan/check.h"

namespace mics {

namespace {

// The first NCCL that knows NCCL_LAUNCH_ORDER_IMPLICIT.
constexpr int kFirstLaunchOrder = 22600;
// Between the two lists of a member's answer. In no topic.
constexpr char kSplits = '|';

#ifdef NCCL_CTA_POLICY_ZERO
constexpr bool kHasZeroCtas = true;
void set_zero_ctas(ncclConfig_t& config) { config.CTAPolicy = NCCL_CTA_POLICY_ZERO; }
#else
constexpr bool kHasZeroCtas = false;
void set_zero_ctas(ncclConfig_t& /*config*/) {}
#endif

// A copy that is never freed, one for each name: NCCL keeps the pointer, also while it aborts a
// non-blocking communicator on a thread of its own.
const char* lasting_name(const std::string& name) {
  static std::mutex mutex;
  static auto* const names = new std::set<std::string>();
  const std::lock_guard<std::mutex> lock(mutex);
  return names->insert(name).first->c_str();
}

class NcclWorldOfRank final : public NcclWorld {
 public:
  NcclWorldOfRank(const c10::intrusive_ptr<c10d::Store>& store, const NcclOptions& options,
                  std::shared_ptr<CudaApi> cuda, std::shared_ptr<NcclApi> nccl)
      : options_(options),
        store_(clone_store(store, options.init_timeout)),
        nccl_(std::move(nccl)),
        context_(std::make_shared<const CudaContext>(CudaContext{
            cuda, std::make_shared<EventPool>(cuda), std::make_shared<Failure>(), options.device})),
        memory_(std::make_shared<NcclMemory>(context_, nccl_, options)) {
    check_hellos();
    MICS_CHECK(!options_.copy_engine || options_.registration == NcclRegistration::kWindows,
               "copy engines need windows: got copy_engine=1 with ", settings_text(options_),
               ". Set MICS_NCCL_REGISTRATION=windows too.");
    for (std::shared_ptr<LaunchOrder>& order : orders_) {
      order = std::make_shared<LaunchOrder>(options.max_in_flight);
    }
    watchdog_ = std::make_shared<NcclWatchdog>(
        context_, nccl_, clone_store(store, std::chrono::seconds(5)), options_.rank,
        NcclWatchdog::Limits{options_.timeout, options_.start_timeout, options_.watch_interval,
                             options_.launch_patience});
  }

  std::unique_ptr<Communicator> make_communicator(GroupInfo group, NcclDirection direction,
                                                  bool only_gathers) override {
    context_->failure->rethrow_if_set();
    const std::string name = group.name + " " + ranks_text(group.world_ranks);
    // Counted by name, because ranks are in different groups: one count would differ among them.
    const std::string topic = "communicator/" + name + "/" + std::to_string(num_of_name_[name]++);
    const int rank = group.rank;
    std::erase_if(made_, [](const Made& made) { return !made.handle->is_open(); });
    const std::string kind = name + (only_gathers ? " only gathers" : "");
    store_->set(topic + "/" + std::to_string(group.world_ranks[static_cast<size_t>(rank)]),
                free_topics(kind) + kSplits + unused_topics(group.world_ranks));
    const std::vector<std::string> answers =
        wait_for_all(*store_, topic, group.world_ranks, options_.rank, options_.init_timeout);
    if (Made* free = common(answers, /*is_free=*/true); free != nullptr) {
      return make_user(*free, std::move(group), direction);
    }
    const Made* parent = common(answers, /*is_free=*/false);

    const std::string where = "group " + name + ", world_rank=" + std::to_string(options_.rank);
    ncclComm_t comm = start(group, topic, parent == nullptr ? nullptr : parent->handle.get(),
                            only_gathers, where);
    const auto handle = std::make_shared<NcclHandle>(nccl_, where, comm);
    const auto in_flight = std::make_shared<InFlight>(context_, where);
    watchdog_->watch(handle, in_flight);
    made_.push_back({topic, kind, group.world_ranks, handle, in_flight, {}});
    return make_user(made_.back(), std::move(group), direction);
  }

  std::unique_ptr<Stream> make_stream(bool high_priority) override {
    return std::make_unique<CudaStream>(
        context_, context_->cuda->pool_stream(options_.device, high_priority));
  }
  std::unique_ptr<Stream> make_current_stream() override {
    return std::make_unique<CudaStream>(context_, nullptr);
  }

  void close(std::chrono::milliseconds patience) override {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    try {
      context_->failure->rethrow_if_set();
      for (const Made& made : made_) {
        if (made.handle->is_open()) made.in_flight->drain(deadline);
      }
      for (const Made& made : made_) made.handle->close(patience);
      context_->failure->rethrow_if_set();
    } catch (...) {
      watchdog_->abort_all();
      watchdog_->stop();
      throw;
    }
    watchdog_->stop();
  }

  int64_t allocated_nbytes() const override { return memory_->allocated_nbytes(); }

  std::vector<std::string> notes() const override {
    std::vector<std::string> notes;
    int version = 0;
    if (nccl_->get_version(&version) != ncclSuccess) version = NCCL_VERSION_CODE;
    if (version < NCCL_VERSION_CODE) {
      notes.push_back("NCCL " + version_text(version) + " is loaded, older than the headers of " +
                      version_text(NCCL_VERSION_CODE) + ": newer settings have no effect");
    }
    const char* connections = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
    if (connections != nullptr && std::string(connections) == "1") {
      notes.emplace_back(
          "CUDA_DEVICE_MAX_CONNECTIONS=1 keeps collectives from running beside compute: unset it");
    }
    const char* implicit = std::getenv("NCCL_LAUNCH_ORDER_IMPLICIT");
    const bool is_ordered = implicit != nullptr && std::string(implicit) == "1";
    if (version >= kFirstLaunchOrder && !is_ordered) {
      notes.emplace_back(
          "NCCL_LAUNCH_ORDER_IMPLICIT is not 1: set it in the environment of every rank, so that "
          "the device keeps the order of launches of several communicators");
    }
    for (std::string& note : memory_->notes()) notes.push_back(std::move(note));
    if (options_.copy_engine && !kHasZeroCtas) {
      notes.emplace_back("copy engines were asked for and need the headers of NCCL 2.28 at build");
    }
    if (!nccl_->has_comm_split()) {
      notes.emplace_back("NCCL has no ncclCommSplit: every communicator is started by itself");
    }
    return notes;
  }

 private:
  struct Made {
    std::string topic;  // the same on all members, and of no other communicator
    std::string kind;   // those of one kind can stand in for each other
    std::vector<int> world_ranks;
    std::shared_ptr<NcclHandle> handle;
    std::shared_ptr<InFlight> in_flight;
    std::weak_ptr<void> user;  // gone: nothing uses it
  };

  std::unique_ptr<Communicator> make_user(Made& made, GroupInfo group, NcclDirection direction) {
    auto user = std::make_unique<NcclCommunicator>(
        std::move(group),
        NcclCommunicator::Shared{context_, nccl_, orders_[static_cast<size_t>(direction)], memory_,
                                 options_.timeout, watchdog_},
        made.handle, made.in_flight);
    made.user = user->life();
    return user;
  }

  // A collective: every member calls it for `topic`. `parent` may be null.
  ncclComm_t start(const GroupInfo& group, const std::string& topic, NcclHandle* parent,
                   bool only_gathers, const std::string& where) {
    check_cuda(*context_->cuda, context_->cuda->set_device(options_.device), "cudaSetDevice");
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = options_.is_blocking ? 1 : 0;
    config.splitShare = 0;  // children that share resources run one after the other
    if (options_.max_ctas > 0) config.maxCTAs = options_.max_ctas;
    if (options_.copy_engine && only_gathers) set_zero_ctas(config);
    config.commName = lasting_name("mics/" + group.name);

    const auto deadline = std::chrono::steady_clock::now() + options_.init_timeout;
    ncclComm_t comm = nullptr;
    try {
      if (parent != nullptr) {
        const NcclHandle::Use use(*parent);
        context_->failure->rethrow_if_set();
        MICS_INTERNAL_CHECK(use.comm() != nullptr, "a communicator is split that has ended.");
        const ncclResult_t result = nccl_->comm_split(use.comm(), 0, group.rank, &comm, &config);
        finish_call(*nccl_, result, comm, "ncclCommSplit", where, deadline);
      } else {
        const ncclResult_t result = nccl_->comm_init_rank_config(
            &comm, group.size(), exchange_id(topic, group.rank), group.rank, &config);
        finish_call(*nccl_, result, comm, "ncclCommInitRankConfig", where, deadline);
      }
    } catch (const TimeoutError&) {
      if (comm != nullptr) (void)nccl_->comm_abort(comm);
      throw;
    } catch (const CommError& error) {
      if (comm != nullptr) (void)nccl_->comm_abort(comm);
      throw CommError(std::string("NCCL must start the communicator: ") + error.what() +
                      " NCCL_DEBUG=WARN says more.");
    }
    return comm;
  }

  void check_hellos() {
    CudaApi& cuda = *context_->cuda;
    int version = 0;
    check_nccl(nccl_->get_version(&version), "ncclGetVersion");
    char bus_id[32] = {};
    check_cuda(cuda, cuda.device_get_pci_bus_id(bus_id, sizeof(bus_id), options_.device),
               "cudaDeviceGetPCIBusId");
    exchange_hellos(*store_, options_, version, bus_id);
  }

  void check_nccl(ncclResult_t result, const char* call) {
    finish_call(*nccl_, result, nullptr, call, "world_rank=" + std::to_string(options_.rank),
                std::chrono::steady_clock::now() + options_.init_timeout);
  }

  ncclUniqueId exchange_id(const std::string& topic, int rank) {
    ncclUniqueId id;
    const std::string key = topic + "/id";
    if (rank == 0) {
      check_nccl(nccl_->get_unique_id(&id), "ncclGetUniqueId");
      store_->set(key, std::string(id.internal, sizeof(id.internal)));
      return id;
    }
    const std::string text = store_->get_to_str(key);
    MICS_INTERNAL_CHECK(text.size() == sizeof(id.internal), "a NCCL id has another size.");
    std::copy(text.begin(), text.end(), id.internal);
    return id;
  }

  // Communicators of these members that could be split, a line each: only those without any
  // operation yet, because a split waits for its parent's operations.
  [[nodiscard]] std::string unused_topics(const std::vector<int>& world_ranks) const {
    std::string topics;
    if (!nccl_->has_comm_split() || world_ranks.size() == 1) return topics;
    for (const Made& made : made_) {
      if (made.world_ranks == world_ranks && made.in_flight->is_unused())
        topics += made.topic + "\n";
    }
    return topics;
  }

  // Communicators of this kind that have no user here any more, and nothing in flight, a line each.
  [[nodiscard]] std::string free_topics(const std::string& kind) const {
    std::string topics;
    for (const Made& made : made_) {
      if (made.kind == kind && made.user.expired() && made.in_flight->is_idle()) {
        topics += made.topic + "\n";
      }
    }
    return topics;
  }

  // The first one that all members have listed, as free or as unused: they let go of theirs at
  // different times. One that is free is used again; a split from one that is unused saves the
  // exchange of an id and the bootstrap. Null: none.
  [[nodiscard]] Made* common(const std::vector<std::string>& answers, bool is_free) {
    for (Made& made : made_) {
      const bool is_common =
          std::all_of(answers.begin(), answers.end(), [&](const std::string& answer) {
            const size_t splits = answer.find(kSplits);
            const std::string topics =
                "\n" + (is_free ? answer.substr(0, splits) : answer.substr(splits + 1));
            return topics.find("\n" + made.topic + "\n") != std::string::npos;
          });
      if (is_common) return &made;
    }
    return nullptr;
  }

  const NcclOptions options_;
  const c10::intrusive_ptr<c10d::Store> store_;
  const std::shared_ptr<NcclApi> nccl_;
  const std::shared_ptr<const CudaContext> context_;
  std::array<std::shared_ptr<LaunchOrder>, kNumDirections> orders_;
  const std::shared_ptr<NcclMemory> memory_;
  std::shared_ptr<NcclWatchdog> watchdog_;
  std::map<std::string, int> num_of_name_;
  std::vector<Made> made_;
};

}  // namespace

std::shared_ptr<NcclWorld> NcclWorld::create(const c10::intrusive_ptr<c10d::Store>& store,
                                             const NcclOptions& options,
                                             std::shared_ptr<CudaApi> cuda,
                                             std::shared_ptr<NcclApi> nccl) {
  return std::make_shared<NcclWorldOfRank>(store, options, std::move(cuda), std::move(nccl));
}

std::shared_ptr<NcclWorld> NcclWorld::create(const c10::intrusive_ptr<c10d::Store>& store,
                                             const NcclOptions& options) {
  const NcclVersions versions = nccl_versions();
  MICS_CHECK(versions.problem.empty(), "NCCL needs a GPU and its libraries: ", versions.problem,
             " Use device_type=\"cpu\", or install a torch with CUDA.");
  return create(store, options, load_cuda(), load_nccl());
}

NcclVersions nccl_versions() {
  NcclVersions versions;
  versions.header = NCCL_VERSION_CODE;
  versions.cuda_header = CUDART_VERSION;
  try {
    const std::shared_ptr<NcclApi> nccl = load_nccl();
    if (nccl->get_version(&versions.library) != ncclSuccess) versions.library = 0;
    const std::shared_ptr<CudaApi> cuda = load_cuda();
    if (cuda->runtime_get_version(&versions.cuda_runtime) != cudaSuccess) versions.cuda_runtime = 0;
    const cudaError_t counted = cuda->get_device_count(&versions.num_devices);
    if (counted != cudaSuccess) {
      versions.num_devices = 0;
      versions.problem = "no GPU can be used: " + cuda->error_string(counted) + ".";
    } else if (versions.num_devices == 0) {
      versions.problem = "this host has no GPU.";
    }
  } catch (const Error& error) {
    versions.problem = error.what();
  }
  return versions;
}

}  // namespace mics
