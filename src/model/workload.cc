#include "mics/model/workload.h"

#include <algorithm>

#include "plan/check.h"

namespace mics {

int64_t Workload::numel() const {
  int64_t sum = 0;
  for (const UnitWork& unit : units) sum += unit.num_units * unit.numel;
  return sum;
}

int64_t Workload::largest_numel() const {
  int64_t largest = 0;
  for (const UnitWork& unit : units) largest = std::max(largest, unit.numel);
  return largest;
}

int Workload::num_units() const {
  int sum = 0;
  for (const UnitWork& unit : units) sum += unit.num_units;
  return sum;
}

double Workload::flops(bool recompute) const {
  double sum = 0;
  for (const UnitWork& unit : units) {
    sum += unit.num_units * unit.forward_flops * (recompute && unit.can_recompute ? 4 : 3);
  }
  return sum;
}

void check_workload(const Workload& workload) {
  MICS_CHECK(!workload.units.empty(), "a workload must have at least one unit: got none.");
  for (const UnitWork& unit : workload.units) {
    MICS_CHECK(unit.num_units >= 1 && unit.numel >= 0 && unit.forward_flops >= 0 &&
                   unit.saved_nbytes >= 0 && unit.input_nbytes >= 0 && unit.transient_nbytes >= 0,
               "the amounts of a unit must not be negative: got num_units=", unit.num_units,
               ", numel=", unit.numel, ", forward_flops=", unit.forward_flops, " (unit \"",
               unit.name, "\").");
  }
  MICS_CHECK(workload.numel() > 0, "a workload must have parameters: got numel=0.");
}

Workload transformer_workload(const TransformerShape& shape) {
  MICS_CHECK(shape.hidden >= 1 && shape.mlp >= 0 && shape.layers >= 1 && shape.heads >= 1 &&
                 shape.vocabulary >= 1 && shape.sequence >= 1,
             "the sizes of a transformer must be at least 1: got hidden=", shape.hidden,
             ", mlp=", shape.mlp, ", layers=", shape.layers, ", heads=", shape.heads,
             ", vocabulary=", shape.vocabulary, ", sequence=", shape.sequence, ".");
  MICS_CHECK(shape.mlp_matrices == 2 || shape.mlp_matrices == 3,
             "an MLP has 2 matrices, or 3 when gated: got mlp_matrices=", shape.mlp_matrices, ".");
  const int64_t h = shape.hidden;
  const int64_t f = shape.mlp == 0 ? 4 * h : shape.mlp;
  const int64_t l = shape.sequence;
  const int64_t matrices = 4 * h * h + shape.mlp_matrices * h * f;
  // Biases and norms: 4h + f + h and 4h with f = 4h; gated models have two norms without biases.
  const int64_t small = shape.mlp_matrices == 2 ? 9 * h + f : 2 * h;
  const auto real = [](int64_t value) { return static_cast<double>(value); };

  Workload workload;
  workload.tokens_per_sample = l;
  workload.width = h;
  UnitWork embedding;
  embedding.name = "embedding";
  embedding.numel = shape.vocabulary * h + (shape.mlp_matrices == 2 ? l * h : 0);
  embedding.input_nbytes = embedding.saved_nbytes = 8 * real(l);
  embedding.can_recompute = false;
  UnitWork layer;
  layer.name = "layer";
  layer.num_units = static_cast<int>(shape.layers);
  layer.numel = matrices + small;
  layer.forward_flops = 2 * real(l) * real(matrices) + 4 * real(h) * real(l) * real(l);
  layer.input_nbytes = 2 * real(l) * real(h);
  layer.saved_nbytes = 34 * real(l) * real(h);
  if (!shape.has_fused_attention) {
    layer.saved_nbytes += 5 * real(shape.heads) * real(l) * real(l);
  }
  UnitWork head;
  head.name = "head";
  head.numel = (shape.is_tied ? 0 : shape.vocabulary * h) + 2 * h;
  head.forward_flops = 2 * real(l) * real(h) * real(shape.vocabulary);
  head.input_nbytes = head.saved_nbytes = 2 * real(l) * real(h);
  head.can_recompute = false;
  head.transient_nbytes = 8 * real(l) * real(shape.vocabulary);
  workload.units = {embedding, layer, head};
  return workload;
}

}  // namespace mics
