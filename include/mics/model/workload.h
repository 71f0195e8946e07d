// Workload: a model as the time and the memory model see it, unit by unit.
//
// Compute counts one multiply-add as 2 FLOP. Per layer of a transformer with hidden size h, MLP
// size f in m matrices, sequence l (source: MiCS paper section 5, the FLOP formula; Megatron-LM's
// activation memory):
//
//   parameters       4h^2 + m*h*f, and 13h of biases and norms where biases are
//   forward FLOP     2*l*(4h^2 + m*h*f) + 4*h*l^2          the head: 2*l*h*V
//   saved bytes      l*h*34 + 5*a*l^2 (16-bit; the second term is gone with fused attention)
//   input bytes      2*l*h                                 all that is kept when recomputed
//
// Thread safety: values and functions without state.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mics {

// `num_units` equal units in a row; all amounts are of one unit and one sample.
struct UnitWork {
  std::string name;
  int num_units = 1;
  int64_t numel = 0;         // parameters
  double forward_flops = 0;  // backward is twice this
  double saved_nbytes = 0;   // activations from forward to backward when nothing is recomputed
  double input_nbytes = 0;   // what is kept when the unit is recomputed
  bool can_recompute = true;
  // Kept only while the unit's own forward and backward are next to each other (logits).
  double transient_nbytes = 0;
};

struct Workload {
  std::vector<UnitWork> units;  // in the order of forward
  int64_t tokens_per_sample = 1;
  int64_t width = 0;  // hidden size; what the efficiency of matrix products depends on

  [[nodiscard]] int64_t numel() const;
  [[nodiscard]] int64_t largest_numel() const;
  [[nodiscard]] int num_units() const;
  // FLOP of one sample, forward and backward, with the forward of recomputed units counted twice.
  [[nodiscard]] double flops(bool recompute) const;
};

struct TransformerShape {
  int64_t hidden = 0;
  int64_t mlp = 0;  // 0: 4 * hidden
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t vocabulary = 0;
  int64_t sequence = 0;
  int mlp_matrices = 2;  // 3 in gated ones
  bool is_tied = true;   // embedding and head share one matrix
  bool has_fused_attention = false;
};

// Embedding, layers and head. Throws InvalidArgument for a size below 1 and mlp_matrices other than
// 2 and 3.
[[nodiscard]] Workload transformer_workload(const TransformerShape& shape);

// Throws InvalidArgument for a workload without units or with a negative amount.
void check_workload(const Workload& workload);

}  // namespace mics
