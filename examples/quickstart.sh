#!/usr/bin/env bash
# From a fresh clone to a trained model: installs what is missing, builds torch_mics, trains a small
# GPT on four processes that act as two nodes, goes on from its checkpoint with another partition
# size, and counts what crossed the network. Runs on a CPU.
#
#   bash examples/quickstart.sh
#
# Environment: see examples/bootstrap.sh.

source "$(dirname "${BASH_SOURCE[0]}")/bootstrap.sh"
cd "$MICS_ROOT"

# Four processes share the machine: one thread each. Gloo listens on loopback, so no host name is looked up.
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
# Ranks 0 and 1 are one node, ranks 2 and 3 the other.
export MICS_RANKS_PER_NODE=2

on_four_ranks() {
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 4 "$@"
}

train() {
  on_four_ranks examples/train_gpt.py --accumulation-steps 4 --batch-size 2 "$@"
}

step "Python environment"
ensure_venv examples

step "Build torch_mics"
ensure_build_tools
build_package

step "Train: each copy of the model states over two nodes (partition size 4)"
train --shard-size 4 --hierarchical-gather true --steps 50 --output-dir runs/quickstart/p4

step "Go on from its checkpoint: each copy inside one node (partition size 2)"
train --shard-size 2 --resume runs/quickstart/p4/checkpoints/latest --steps 75 \
  --output-dir runs/quickstart/p2 --sample 200

step "Bytes that cross nodes in a step, beside FSDP2"
on_four_ranks examples/compare_traffic.py

steps_done
