#include "comm/shm/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>
#include <thread>
#include <utility>

#include "mics/error.h"
#include "plan/check.h"

namespace mics::shm {

namespace {

constexpr uint64_t kMagic = 0x314d'4853'5343'494d;  // "MICSSHM1"
constexpr uint32_t kVersion = 1;
constexpr size_t kPage = 4096;

size_t slots_offset(int size) {
  const size_t used = sizeof(Header) + sizeof(Member) * static_cast<size_t>(size);
  return (used + kPage - 1) / kPage * kPage;
}

size_t total_nbytes(int size, int64_t slot_nbytes) {
  return slots_offset(size) + static_cast<size_t>(slot_nbytes) * static_cast<size_t>(size);
}

void check_name(const std::string& name) {
  MICS_CHECK(name.size() >= 2 && name.size() <= 255 && name[0] == '/' &&
                 name.find('/', 1) == std::string::npos,
             "a shared memory segment has a name of \"/\" and up to 254 further characters: got \"",
             name, "\".");
}

[[noreturn]] void throw_system_error(const char* what, const std::string& name, int error) {
  throw CommError(detail::concatenate("shared memory must be available on the host: ", what,
                                      " failed for segment ", name, ": ", std::strerror(error),
                                      ". Make room in /dev/shm, or use another backend."));
}

// A file descriptor, closed at the end of its scope; mappings stay.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  [[nodiscard]] int get() const { return descriptor_; }

 private:
  const int descriptor_;
};

// Maps the file and populates it at once, so that no collective has page faults.
void* map(int descriptor, size_t nbytes, const std::string& name) {
  void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                      descriptor, /*offset=*/0);
  if (memory == MAP_FAILED) throw_system_error("mmap", name, errno);
  return memory;
}

}  // namespace

Segment::Segment(std::string name, int rank, void* memory, size_t nbytes)
    : name_(std::move(name)), rank_(rank), pid_(getpid()), memory_(memory), nbytes_(nbytes) {}

Segment::Segment(Segment&& other) noexcept
    : name_(std::move(other.name_)),
      rank_(other.rank_),
      pid_(other.pid_),
      memory_(std::exchange(other.memory_, nullptr)),
      nbytes_(other.nbytes_),
      has_place_(other.has_place_) {}

Segment::~Segment() {
  if (memory_ == nullptr) return;
  if (has_place_ && pid_ == getpid()) {
    unlink_unless_complete();
    // Release: who sees that this member left also sees the rounds that it finished.
    own().state.store(Member::kLeft, std::memory_order_release);
    own().written.wake_all();
  }
  munmap(memory_, nbytes_);
}

Segment Segment::create(const std::string& name, uint64_t group_key, int size, int rank,
                        int64_t slot_nbytes) {
  check_name(name);
  const int64_t unit = 2 * static_cast<int64_t>(kCacheLine) * size;
  MICS_CHECK(slot_nbytes >= unit && slot_nbytes % unit == 0,
             "slot_nbytes must be a multiple of 128 bytes per member: got slot_nbytes=",
             slot_nbytes, ", size=", size, ".");
  const File file(shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
  if (file.get() < 0) throw_system_error("shm_open", name, errno);
  const size_t nbytes = total_nbytes(size, slot_nbytes);
  // Reserves the memory: a full /dev/shm is an error here and not a SIGBUS in a collective.
  const int error = posix_fallocate(file.get(), 0, static_cast<off_t>(nbytes));
  if (error != 0) {
    shm_unlink(name.c_str());
    throw_system_error("posix_fallocate", name, error);
  }
  void* memory = nullptr;
  try {
    memory = map(file.get(), nbytes, name);
  } catch (...) {
    shm_unlink(name.c_str());
    throw;
  }
  Segment segment(name, rank, memory, nbytes);
  auto* header = new (memory) Header;
  header->magic = kMagic;
  header->version = kVersion;
  header->size = size;
  header->slot_nbytes = slot_nbytes;
  header->group_key = group_key;
  for (int member = 0; member < size; ++member) new (&segment.member(member)) Member;
  segment.take_place();
  // Release: who sees it sees the header and the members.
  header->is_ready.store(1, std::memory_order_release);
  return segment;
}

Segment Segment::attach(const std::string& name, uint64_t group_key, int size, int rank,
                        std::chrono::milliseconds timeout) {
  check_name(name);
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  const auto pause = [&] {
    if (std::chrono::steady_clock::now() >= deadline) {
      throw TimeoutError(detail::concatenate(
          "a shared memory segment must have been made by its creator: got none ready under ", name,
          " within ", timeout.count(), " ms. The creator has ended, or runs on another host."));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  for (;; pause()) {
    const File file(shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0));
    if (file.get() < 0) {
      if (errno == ENOENT) continue;
      throw_system_error("shm_open", name, errno);
    }
    struct stat info{};
    if (fstat(file.get(), &info) != 0) throw_system_error("fstat", name, errno);
    // The creator gives the file its whole length in one step.
    const auto nbytes = static_cast<size_t>(info.st_size);
    if (nbytes < sizeof(Header)) continue;
    Segment segment(name, rank, map(file.get(), nbytes, name), nbytes);
    const Header& header = segment.header();
    // Acquire: pairs with the release of the creator.
    while (header.is_ready.load(std::memory_order_acquire) == 0) pause();
    MICS_CHECK(header.magic == kMagic && header.version == kVersion && header.size == size &&
                   header.group_key == group_key &&
                   nbytes == total_nbytes(header.size, header.slot_nbytes),
               "a shared memory segment must be that of the group: got version=", header.version,
               ", size=", header.size, " under ", name, ", expected version=", kVersion,
               ", size=", size, ".");
    segment.take_place();
    return segment;
  }
}

void Segment::take_place() {
  uint32_t expected = Member::kAbsent;
  // Relaxed: it only decides which of two gets the place; the process is published below.
  const bool is_free =
      own().state.compare_exchange_strong(expected, Member::kAttaching, std::memory_order_relaxed);
  MICS_CHECK(is_free, "each member of a group attaches once: got rank=", rank_, " again (segment ",
             name_, ").");
  own().process = this_process();
  // Release: who sees kAttached sees the process.
  own().state.store(Member::kAttached, std::memory_order_release);
  has_place_ = true;
  // Acquire and release, so that the last one sees that everybody is attached.
  const int32_t num_before = header().num_attached.fetch_add(1, std::memory_order_acq_rel);
  if (num_before + 1 == header().size) shm_unlink(name_.c_str());
}

void Segment::unlink_unless_complete() {
  // Acquire: pairs with take_place().
  const int32_t num_attached = header().num_attached.load(std::memory_order_acquire);
  if (num_attached < header().size) shm_unlink(name_.c_str());
}

Member& Segment::member(int rank) const {
  auto* first = reinterpret_cast<Member*>(static_cast<char*>(memory_) + sizeof(Header));
  return first[rank];
}

char* Segment::slot(int rank) const {
  return static_cast<char*>(memory_) + slots_offset(header().size) +
         static_cast<size_t>(slot_nbytes()) * static_cast<size_t>(rank);
}

void Segment::wake_everybody() const {
  for (int rank = 0; rank < header().size; ++rank) member(rank).written.wake_all();
}

}  // namespace mics::shm
