// Relay: a switch in user space that holds every frame for a fixed time. For kernels without netem.
//
//   relay DELAY_US RATE_BPS FD...
//
// FD i is an open TAP device (no packet information, with a virtio-net header) of node i, whose
// link address ends in i. What node i sends to node j arrives DELAY_US later, and at RATE_BPS at
// most over all senders. Shaping what a node sends is the TAP's own queue discipline: only there
// does it slow the sender down.
//
// At SIGUSR1 it counts from nothing again. It ends at SIGTERM and then prints, as JSON, the bytes
// that went from each node to each, and how late frames left: {"nbytes": [[...]], "late_mean_us":
// x, "late_max_us": x, "dropped": n}.
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Duration = Clock::duration;
using Time = Clock::time_point;

// What precedes each frame, as linux/virtio_net.h has it; that header is not C++.
struct FrameHeader {
  uint8_t flags;
  uint8_t gso_type;  // 0: the frame fits the MTU
  uint16_t hdr_len;  // of the linear part, not of the headers
  uint16_t gso_size;
  uint16_t csum_start;
  uint16_t csum_offset;
};
static_assert(sizeof(FrameHeader) == 10, "TUN's default");

constexpr size_t kHeaderNbytes = sizeof(FrameHeader);
constexpr size_t kLargestFrame = kHeaderNbytes + 65536 + 64;
constexpr size_t kAddressNbytes = 6;
constexpr size_t kFewestNbytes = kHeaderNbytes + 2 * kAddressNbytes;

volatile sig_atomic_t is_ending = 0;
volatile sig_atomic_t is_starting_over = 0;
void take_signal(int signal) { (signal == SIGTERM ? is_ending : is_starting_over) = 1; }

struct Frame {
  Time due;
  std::vector<char> bytes;
};

// What a node is going to receive, in order.
struct Destination {
  int file = -1;
  Time free_at{};  // when the last frame has left
  std::deque<Frame> frames;
};

struct Lateness {
  int64_t count = 0;
  Duration sum{};
  Duration max{};
};

// Bytes on a wire: a frame that the kernel has not cut yet repeats its headers.
int64_t wire_nbytes(const char* frame, size_t nbytes) {
  FrameHeader header;
  std::memcpy(&header, frame, sizeof(header));
  const auto length = static_cast<int64_t>(nbytes - kHeaderNbytes);
  // Only TCP is offloaded; its header begins where the checksum does, and says how long it is.
  const int64_t length_at = header.csum_start + 12;
  if (header.gso_type == 0 || header.gso_size == 0 || length_at >= length) return length;
  const auto words = static_cast<unsigned char>(frame[kHeaderNbytes + length_at]) >> 4;
  const int64_t headers = header.csum_start + 4 * words;
  const int64_t num_parts = (length - headers + header.gso_size - 1) / header.gso_size;
  return length + (std::max<int64_t>(num_parts, 1) - 1) * headers;
}

class Relay {
 public:
  Relay(Duration delay, double rate, const std::vector<int>& files)
      : delay_(delay), rate_(rate), nbytes_(files.size(), std::vector<int64_t>(files.size())) {
    for (const int file : files) {
      destinations_.push_back({file, {}, {}});
      polled_.push_back({file, POLLIN, 0});
    }
  }

  void run() {
    while (is_ending == 0) {
      if (is_starting_over != 0) start_over();
      const Duration wait = time_to_next();
      const auto nanoseconds = std::chrono::nanoseconds(wait).count();
      const timespec timeout = {nanoseconds / 1000000000, nanoseconds % 1000000000};
      if (ppoll(polled_.data(), polled_.size(), &timeout, nullptr) < 0 && errno != EINTR) return;
      for (size_t source = 0; source < polled_.size(); ++source) {
        if ((polled_[source].revents & POLLIN) != 0) read_all(source);
      }
      write_due();
    }
  }

  void report() const {
    std::printf("{\"nbytes\": [");
    for (size_t i = 0; i < nbytes_.size(); ++i) {
      std::printf(i == 0 ? "[" : ", [");
      for (size_t j = 0; j < nbytes_.size(); ++j) {
        std::printf(j == 0 ? "%lld" : ", %lld", static_cast<long long>(nbytes_[i][j]));
      }
      std::printf("]");
    }
    const auto micros = [](Duration d) {
      return std::chrono::duration<double, std::micro>(d).count();
    };
    const double mean =
        late_.count == 0 ? 0.0 : micros(late_.sum) / static_cast<double>(late_.count);
    std::printf("], \"late_mean_us\": %.1f, \"late_max_us\": %.1f, \"dropped\": %lld}\n", mean,
                micros(late_.max), static_cast<long long>(num_dropped_));
  }

 private:
  void start_over() {
    is_starting_over = 0;
    for (std::vector<int64_t>& row : nbytes_) std::fill(row.begin(), row.end(), 0);
    late_ = {};
    num_dropped_ = 0;
  }

  [[nodiscard]] Duration time_to_next() const {
    Time next = Clock::now() + std::chrono::milliseconds(100);
    for (const Destination& destination : destinations_) {
      if (!destination.frames.empty()) next = std::min(next, destination.frames.front().due);
    }
    return std::max(next - Clock::now(), Duration::zero());
  }

  // Takes what node `source` has sent. A few frames at a time: others wait too.
  void read_all(size_t source) {
    for (int count = 0; count < 16; ++count) {
      const ssize_t found = read(destinations_[source].file, buffer_.data(), buffer_.size());
      if (found < static_cast<ssize_t>(kFewestNbytes)) return;
      const auto nbytes = static_cast<size_t>(found);
      const auto* address = reinterpret_cast<const unsigned char*>(buffer_.data() + kHeaderNbytes);
      const size_t last = (static_cast<size_t>(address[4]) << 8) | address[5];
      const bool is_for_one = (address[0] & 1) == 0 && last < destinations_.size();
      for (size_t target = 0; target < destinations_.size(); ++target) {
        if (target != source && (!is_for_one || target == last)) queue(source, target, nbytes);
      }
    }
  }

  void queue(size_t source, size_t target, size_t nbytes) {
    Destination& destination = destinations_[target];
    const int64_t wire = wire_nbytes(buffer_.data(), nbytes);
    const auto on_wire = std::chrono::duration_cast<Duration>(
        std::chrono::duration<double>(static_cast<double>(wire) * 8 / rate_));
    // It arrives whole, when its last bit does. Frames of one sender have taken that time already,
    // in the sender's shaper: only those that meet frames of another wait for it.
    const Time due = std::max(Clock::now() + delay_, destination.free_at);
    destination.free_at = due + on_wire;
    destination.frames.push_back(
        {due, {buffer_.begin(), buffer_.begin() + static_cast<int64_t>(nbytes)}});
    nbytes_[source][target] += wire;
  }

  void write_due() {
    for (Destination& destination : destinations_) {
      while (!destination.frames.empty()) {
        const Frame& frame = destination.frames.front();
        const Time now = Clock::now();
        if (frame.due > now) break;
        late_.count += 1;
        late_.sum += now - frame.due;
        late_.max = std::max(late_.max, now - frame.due);
        if (write(destination.file, frame.bytes.data(), frame.bytes.size()) < 0) ++num_dropped_;
        destination.frames.pop_front();
      }
    }
  }

  const Duration delay_;
  const double rate_;  // bits per second
  std::vector<Destination> destinations_;
  std::vector<pollfd> polled_;
  std::vector<std::vector<int64_t>> nbytes_;
  std::vector<char> buffer_ = std::vector<char>(kLargestFrame);
  Lateness late_;
  int64_t num_dropped_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "relay DELAY_US RATE_BPS FD...\n");
    return 2;
  }
  struct sigaction action = {};
  action.sa_handler = take_signal;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGUSR1, &action, nullptr);
  // Wakes in time; where the system refuses, the lateness that is reported says so.
  prctl(PR_SET_TIMERSLACK, 1UL);
  const sched_param priority = {1};
  (void)sched_setscheduler(0, SCHED_FIFO, &priority);
  std::vector<int> files;
  for (int i = 3; i < argc; ++i) files.push_back(std::atoi(argv[i]));
  Relay relay(std::chrono::microseconds(std::atoll(argv[1])), std::atof(argv[2]), files);
  relay.run();
  relay.report();
  return 0;
}
