// What is a race and what is not, on traces written by hand.
#include "races/race_checker.h"

#include <gtest/gtest.h>

#include <string>

namespace mics {
namespace {

using Kind = RaceEntry::Kind;

RaceEntry access(Kind kind, int stream, uint64_t first, uint64_t last) {
  return {kind, stream, 0, first, last, -1, -1};
}
RaceEntry read(int stream, uint64_t first, uint64_t last) {
  return access(Kind::kRead, stream, first, last);
}
RaceEntry write(int stream, uint64_t first, uint64_t last) {
  return access(Kind::kWrite, stream, first, last);
}
RaceEntry give_back(int stream, uint64_t first, uint64_t last) {
  return access(Kind::kFree, stream, first, last);
}
RaceEntry record(int stream, int mark) { return {Kind::kRecord, stream, 0, 0, 0, mark, -1}; }
RaceEntry wait(int stream, int mark) { return {Kind::kWait, stream, 0, 0, 0, mark, -1}; }
RaceEntry host_wait(int stream) { return {Kind::kHostWait, stream, 0, 0, 0, -1, -1}; }

// The bytes of the first race, "" without one.
std::string race_in(const std::vector<RaceEntry>& trace) {
  RaceChecker checker;
  for (const RaceEntry& entry : trace) {
    const std::optional<Race> race = checker.add(entry);
    if (!race.has_value()) continue;
    return std::to_string(std::max(race->now.first, race->past.first)) + " to " +
           std::to_string(std::min(race->now.last, race->past.last));
  }
  return "";
}

TEST(RaceChecker, OrderIsByEventsAlone) {
  EXPECT_EQ(race_in({write(0, 0, 4), record(0, 0), wait(1, 0), read(1, 2, 6)}), "");
  EXPECT_EQ(race_in({write(0, 0, 4), read(1, 2, 6)}), "2 to 4");
  EXPECT_EQ(race_in({write(0, 0, 4), record(0, 0), read(1, 2, 6), wait(1, 0)}), "2 to 4");
  EXPECT_EQ(race_in({record(0, 0), write(0, 0, 4), wait(1, 0), read(1, 2, 6)}), "2 to 4");
  EXPECT_EQ(race_in({write(0, 0, 4), record(0, 0), wait(1, 7), read(1, 2, 6)}), "2 to 4");
}

TEST(RaceChecker, OneOfTwoWritesAndBothUseTheSameBytes) {
  EXPECT_EQ(race_in({write(0, 0, 4), read(1, 4, 6)}), "");
  EXPECT_EQ(race_in({read(1, 0, 4), read(0, 0, 4)}), "");
  EXPECT_EQ(race_in({read(1, 0, 4), write(0, 0, 4)}), "0 to 4");
  EXPECT_EQ(race_in({write(1, 0, 4), write(0, 3, 8)}), "3 to 4");
  EXPECT_EQ(race_in({write(1, 8, 8), write(0, 0, 16)}), "");
}

TEST(RaceChecker, OrderPassesThroughOtherStreams) {
  EXPECT_EQ(
      race_in({write(0, 0, 4), record(0, 0), wait(1, 0), record(1, 1), wait(2, 1), write(2, 0, 4)}),
      "");
  EXPECT_EQ(
      race_in({write(0, 0, 4), record(0, 0), record(1, 1), wait(1, 0), wait(2, 1), write(2, 0, 4)}),
      "0 to 4");
}

TEST(RaceChecker, ReadersOfSeveralStreamsAreAllRemembered) {
  const std::vector<RaceEntry> both = {write(0, 0, 8), record(0, 0),  wait(1, 0),   wait(2, 0),
                                       read(1, 0, 6),  read(2, 4, 8), record(1, 1), record(2, 2)};
  std::vector<RaceEntry> trace = both;
  trace.insert(trace.end(), {wait(0, 1), write(0, 0, 8)});
  EXPECT_EQ(race_in(trace), "4 to 6");  // the reads of stream 2
  trace = both;
  trace.insert(trace.end(), {wait(0, 1), wait(0, 2), write(0, 0, 8)});
  EXPECT_EQ(race_in(trace), "");
}

TEST(RaceChecker, MemoryIsGivenOutAgainInTheOrderOfItsStream) {
  // Read on another stream when it is given back.
  const std::vector<RaceEntry> used = {write(0, 0, 8), record(0, 0), wait(1, 0), read(1, 0, 8)};
  std::vector<RaceEntry> trace = used;
  trace.push_back(give_back(0, 0, 8));
  EXPECT_EQ(race_in(trace), "0 to 8");
  trace = used;
  trace.insert(trace.end(), {record(1, 1), wait(0, 1), give_back(0, 0, 8)});
  EXPECT_EQ(race_in(trace), "");
  // What was before a free does not count for the next owner.
  trace.push_back(write(2, 0, 8));
  EXPECT_EQ(race_in(trace), "");
}

TEST(RaceChecker, WhatTheHostHasWaitedForIsBeforeAllThatFollows) {
  EXPECT_EQ(race_in({write(1, 0, 4), host_wait(1), read(2, 0, 4)}), "");
  EXPECT_EQ(race_in({write(1, 0, 4), host_wait(2), read(2, 0, 4)}), "0 to 4");
  EXPECT_EQ(race_in({host_wait(1), write(1, 0, 4), read(2, 0, 4)}), "0 to 4");
}

}  // namespace
}  // namespace mics
