#include "mics/model/measured_table.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "plan/check.h"

namespace mics {

MeasuredTable::MeasuredTable(std::vector<MeasuredPoint> points) : points_(std::move(points)) {
  for (const MeasuredPoint& point : points_) {
    MICS_CHECK(point.num_ranks >= 1 && point.nbytes > 0 && point.seconds > 0,
               "a measured point needs ranks, bytes and seconds above 0: got num_ranks=",
               point.num_ranks, ", nbytes=", point.nbytes, ", seconds=", point.seconds, ".");
  }
  const auto key = [](const MeasuredPoint& p) { return std::make_tuple(p.num_ranks, p.nbytes); };
  std::sort(points_.begin(), points_.end(),
            [&](const auto& a, const auto& b) { return key(a) < key(b); });
  for (size_t i = 0; i < points_.size(); ++i) {
    MICS_CHECK(
        i == 0 || key(points_[i - 1]) != key(points_[i]),
        "a table may have one point for each number of ranks and bytes: got two for num_ranks=",
        points_[i].num_ranks, ", nbytes=", points_[i].nbytes, ".");
    if (i == 0 || points_[i - 1].num_ranks != points_[i].num_ranks) rows_.push_back({i, i});
    rows_.back().last = i;
  }
}

double MeasuredTable::read_row(const Row& row, double nbytes) const {
  size_t above = row.first;
  while (above < row.last && points_[above].nbytes < nbytes) ++above;
  const MeasuredPoint& high = points_[above];
  if (above == row.first || high.nbytes <= nbytes) return high.seconds;
  const MeasuredPoint& low = points_[above - 1];
  const double share = std::log(nbytes / low.nbytes) / std::log(high.nbytes / low.nbytes);
  return low.seconds * std::pow(high.seconds / low.seconds, share);
}

MeasuredTable::Reading MeasuredTable::read(int num_ranks, double nbytes) const {
  MICS_CHECK(!empty(), "an empty table of measured collectives cannot be read.");
  size_t above = 0;
  while (above + 1 < rows_.size() && points_[rows_[above].first].num_ranks < num_ranks) ++above;
  size_t below = above;
  if (above > 0 && points_[rows_[above].first].num_ranks > num_ranks) --below;
  const Row& low = rows_[below];
  const Row& high = rows_[above];
  const int low_ranks = points_[low.first].num_ranks;
  const int high_ranks = points_[high.first].num_ranks;
  Reading reading;
  reading.num_ranks = std::clamp(num_ranks, low_ranks, high_ranks);
  // The bytes must be within what was measured for both numbers of ranks.
  const double least = std::max(points_[low.first].nbytes, points_[high.first].nbytes);
  const double most = std::min(points_[low.last].nbytes, points_[high.last].nbytes);
  reading.nbytes = std::min(std::max(nbytes, least), std::max(least, most));
  const double share =
      low_ranks == high_ranks
          ? 0
          : static_cast<double>(reading.num_ranks - low_ranks) / (high_ranks - low_ranks);
  reading.seconds =
      (1 - share) * read_row(low, reading.nbytes) + share * read_row(high, reading.nbytes);
  return reading;
}

}  // namespace mics
