// MeasuredTable: what a collective took on a real cluster, by ranks and bytes.
//
// Between measured points the time is interpolated: in the bytes on logarithmic axes, in the ranks
// linearly, because the latency of a ring is linear in them. Outside there is no measurement: the
// table gives its nearest edge and says so, and the caller carries on from there with a formula.
//
// Immutable after construction; safe to share between threads.
#pragma once

#include <cstddef>
#include <vector>

namespace mics {

struct MeasuredPoint {
  int num_ranks = 1;
  double nbytes = 0;   // that every rank ends, or begins, with
  double seconds = 0;  // of one collective, alone on the network
};

class MeasuredTable {
 public:
  MeasuredTable() = default;  // empty
  // Throws InvalidArgument for num_ranks < 1, nbytes or seconds not above 0, and two points of
  // equal ranks and bytes.
  explicit MeasuredTable(std::vector<MeasuredPoint> points);

  struct Reading {
    double seconds = 0;
    // Where the table was read: what was asked, or the nearest edge.
    int num_ranks = 1;
    double nbytes = 0;
    [[nodiscard]] bool is_inside(int asked_ranks, double asked_nbytes) const {
      return num_ranks == asked_ranks && nbytes == asked_nbytes;
    }
  };

  [[nodiscard]] bool empty() const { return points_.empty(); }
  [[nodiscard]] const std::vector<MeasuredPoint>& points() const { return points_; }
  // Throws InvalidArgument when the table is empty.
  [[nodiscard]] Reading read(int num_ranks, double nbytes) const;

 private:
  struct Row {
    size_t first = 0;  // of points_
    size_t last = 0;
  };
  [[nodiscard]] double read_row(const Row& row, double nbytes) const;

  std::vector<MeasuredPoint> points_;  // by ranks, then bytes
  std::vector<Row> rows_;
};

}  // namespace mics
