#include "mics/model/workload.h"

#include <gtest/gtest.h>

#include "mics/error.h"

namespace mics {
namespace {

// BERT 10B of the MiCS paper.
TransformerShape bert_10b() {
  TransformerShape shape;
  shape.hidden = 2560;
  shape.layers = 127;
  shape.heads = 40;
  shape.vocabulary = 32008;
  shape.sequence = 512;
  return shape;
}

TEST(Workload, CountsFlopAsThePaper) {
  const double l = 512, L = 127, h = 2560, V = 32008;
  const double paper = 96 * l * L * h * h * (1 + l / (6 * h) + V / (16 * L * h));
  EXPECT_NEAR(transformer_workload(bert_10b()).flops(true) / paper, 1, 1e-12);
  // Without recomputation the layers count three quarters; the head is never recomputed.
  const double head = 6 * l * h * V;
  EXPECT_NEAR(transformer_workload(bert_10b()).flops(false), (paper - head) * 0.75 + head, 1e5);
}

TEST(Workload, CountsParameters) {
  const Workload workload = transformer_workload(bert_10b());
  EXPECT_NEAR(static_cast<double>(workload.numel()) / 10.07e9, 1, 1e-3);
  EXPECT_EQ(workload.num_units(), 129);
  TransformerShape llama;
  llama.hidden = 4096;
  llama.mlp = 11008;
  llama.layers = 32;
  llama.heads = 32;
  llama.vocabulary = 32000;
  llama.sequence = 4096;
  llama.mlp_matrices = 3;
  llama.is_tied = false;
  // 6,738,415,616 parameters are published; the model counts one norm more.
  EXPECT_EQ(transformer_workload(llama).numel(), 6738415616 + 4096);
}

TEST(Workload, DropsTheQuadraticTermWithFusedAttention) {
  TransformerShape shape = bert_10b();
  const double plain = transformer_workload(shape).units[1].saved_nbytes;
  shape.has_fused_attention = true;
  const double fused = transformer_workload(shape).units[1].saved_nbytes;
  EXPECT_DOUBLE_EQ(plain - fused, 5.0 * 40 * 512 * 512);
}

TEST(Workload, RefusesImpossibleShapes) {
  TransformerShape shape = bert_10b();
  shape.layers = 0;
  EXPECT_THROW((void)transformer_workload(shape), InvalidArgument);
  shape = bert_10b();
  shape.mlp_matrices = 4;
  EXPECT_THROW((void)transformer_workload(shape), InvalidArgument);
  EXPECT_THROW(check_workload({}), InvalidArgument);
  Workload workload;
  workload.units = {{.name = "a", .numel = -1}};
  EXPECT_THROW(check_workload(workload), InvalidArgument);
  workload.units = {{.name = "a", .numel = 0}};
  EXPECT_THROW(check_workload(workload), InvalidArgument);
}

}  // namespace
}  // namespace mics
