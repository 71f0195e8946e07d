// Streams of a CPU: order within a stream, order between streams by events, failures.
#include "mics/stream.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

namespace mics {
namespace {

// Work that lasts until it is told to end, so that a test decides what overlaps.
class Gate {
 public:
  void open() { is_open_ = true; }
  void pass() const {
    while (!is_open_) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }

 private:
  std::atomic<bool> is_open_ = false;
};

TEST(WorkerStream, RunsWorkInTheOrderOfQueueing) {
  const auto stream = make_worker_stream();
  std::vector<int> order;
  for (int i = 0; i < 1000; ++i) stream->enqueue([&order, i] { order.push_back(i); });
  stream->synchronize();
  ASSERT_EQ(order.size(), 1000U);
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(order[static_cast<size_t>(i)], i);
}

TEST(WorkerStream, EnqueueDoesNotWaitForTheWork) {
  const auto stream = make_worker_stream();
  const auto event = stream->make_event();
  Gate gate;
  stream->enqueue([&] { gate.pass(); });
  stream->record(*event);
  EXPECT_FALSE(event->query());
  gate.open();
  event->synchronize();
  EXPECT_TRUE(event->query());
}

TEST(WorkerStream, WaitOrdersTwoStreams) {
  const auto gather = make_worker_stream();
  const auto compute = make_worker_stream();
  const auto ready = gather->make_event();
  Gate gate;
  int value = 0;
  int seen = -1;
  gather->enqueue([&] {
    gate.pass();
    value = 7;
  });
  gather->record(*ready);
  compute->wait(*ready);
  compute->enqueue([&] { seen = value; });
  gate.open();
  compute->synchronize();
  EXPECT_EQ(seen, 7);
}

TEST(WorkerStream, AWaitTakesTheMarkOfItsOwnTime) {
  const auto first = make_worker_stream();
  const auto second = make_worker_stream();
  const auto event = first->make_event();
  first->record(*event);
  second->wait(*event);
  Gate gate;
  first->enqueue([&] { gate.pass(); });
  first->record(*event);  // a later mark must not hold the earlier wait
  second->synchronize();
  EXPECT_FALSE(event->query());
  gate.open();
  first->synchronize();
}

TEST(WorkerStream, AnEventThatWasNeverRecordedIsDone) {
  const auto stream = make_worker_stream();
  const auto event = stream->make_event();
  EXPECT_TRUE(event->query());
  stream->wait(*event);
  stream->synchronize();
}

TEST(WorkerStream, AnEventMayGoBeforeItsMarkIsDone) {
  const auto first = make_worker_stream();
  const auto second = make_worker_stream();
  Gate gate;
  bool ran = false;
  {
    const auto event = first->make_event();
    first->enqueue([&] { gate.pass(); });
    first->record(*event);
    second->wait(*event);
  }
  second->enqueue([&] { ran = true; });
  gate.open();
  second->synchronize();
  EXPECT_TRUE(ran);
}

TEST(WorkerStream, TheDestructorRunsWhatIsQueued) {
  std::atomic<int> num_run = 0;
  {
    const auto stream = make_worker_stream();
    for (int i = 0; i < 100; ++i) stream->enqueue([&] { ++num_run; });
  }
  EXPECT_EQ(num_run, 100);
}

TEST(WorkerStream, WorkBehindAFailureIsDroppedUntilReset) {
  const auto stream = make_worker_stream();
  const auto event = stream->make_event();
  std::atomic<int> num_run = 0;
  stream->enqueue([] { throw std::runtime_error("injected"); });
  stream->enqueue([&] { ++num_run; });
  stream->record(*event);
  EXPECT_THROW(event->synchronize(), std::runtime_error);
  EXPECT_THROW(stream->synchronize(), std::runtime_error);
  EXPECT_EQ(num_run, 0);
  stream->reset();
  stream->enqueue([&] { ++num_run; });
  stream->synchronize();
  EXPECT_EQ(num_run, 1);
  stream->record(*event);
  event->synchronize();
}

TEST(WorkerStream, AFailureReachesStreamsThatWaitForIt) {
  const auto first = make_worker_stream();
  const auto second = make_worker_stream();
  const auto compute = make_inline_stream();
  const auto failed = first->make_event();
  const auto passed_on = second->make_event();
  bool ran = false;
  first->enqueue([] { throw std::runtime_error("injected"); });
  first->record(*failed);
  second->wait(*failed);
  second->enqueue([&] { ran = true; });
  second->record(*passed_on);
  try {
    compute->wait(*passed_on);
    FAIL() << "did not throw";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "injected");
  }
  EXPECT_FALSE(ran);
  first->reset();
  second->reset();
  second->enqueue([&] { ran = true; });
  second->synchronize();
  EXPECT_TRUE(ran);
}

TEST(InlineStream, WaitBlocksUntilTheWorkerHasCome) {
  const auto compute = make_inline_stream();
  const auto gather = make_worker_stream();
  const auto freed = compute->make_event();
  const auto ready = gather->make_event();
  int slot = 0;
  for (int step = 1; step <= 200; ++step) {
    compute->record(*freed);
    gather->wait(*freed);
    gather->enqueue([&slot, step] { slot = step; });
    gather->record(*ready);
    compute->wait(*ready);
    ASSERT_EQ(slot, step);
  }
}

TEST(InlineStream, AnExceptionComesOutOfEnqueue) {
  const auto stream = make_inline_stream();
  EXPECT_THROW(stream->enqueue([] { throw std::runtime_error("injected"); }), std::runtime_error);
  stream->synchronize();
}

// A pipeline over four streams in which each cell of a table is written from its left and upper
// neighbours. Delays are random; a lost edge reads a cell too early (and is a race for TSan).
TEST(WorkerStream, RandomDelaysLoseNoEdge) {
  constexpr size_t kRows = 4;
  constexpr size_t kColumns = 50;
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    std::vector<std::vector<int64_t>> cells(kRows, std::vector<int64_t>(kColumns, -1));
    std::vector<std::vector<std::unique_ptr<Event>>> done(kRows);
    std::vector<std::unique_ptr<Stream>> streams;
    for (size_t row = 0; row < kRows; ++row) {
      streams.push_back(make_worker_stream());
    }
    for (size_t row = 0; row < kRows; ++row) {
      for (size_t column = 0; column < kColumns; ++column) {
        if (row > 0) streams[row]->wait(*done[row - 1][column]);
        const auto delay = std::chrono::microseconds(random() % 8 == 0 ? random() % 200 : 0);
        streams[row]->enqueue([&cells, row, column, delay] {
          std::this_thread::sleep_for(delay);
          const int64_t left = column > 0 ? cells[row][column - 1] : 1;
          const int64_t up = row > 0 ? cells[row - 1][column] : 1;
          cells[row][column] = (left + up) % 1000003;
        });
        done[row].push_back(streams[row]->make_event());
        streams[row]->record(*done[row].back());
      }
    }
    for (const auto& stream : streams) stream->synchronize();
    std::vector<int64_t> above(kColumns, 1);
    for (size_t row = 0; row < kRows; ++row) {
      int64_t left = 1;
      for (size_t column = 0; column < kColumns; ++column) {
        left = above[column] = (left + above[column]) % 1000003;
        ASSERT_EQ(cells[row][column], left) << "seed " << seed;
      }
    }
  }
}

}  // namespace
}  // namespace mics
