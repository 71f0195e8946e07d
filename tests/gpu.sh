#!/usr/bin/env bash
# Runs what needs a GPU, and says what it ran and on what.
#
#   bash tests/gpu.sh [PYTEST ARGUMENT...]
#
# Environment: see examples/bootstrap.sh.

source "$(dirname "${BASH_SOURCE[0]}")/../examples/bootstrap.sh"
cd "$MICS_ROOT"
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo

step "Python environment"
ensure_venv dev examples

step "GPUs"
"$PYTHON" - <<'EOF' || fail "tests/gpu.sh needs a GPU: torch sees none on this host."
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(1)
print("torch", torch.__version__, "CUDA", torch.version.cuda, "NCCL", torch.cuda.nccl.version())
for index in range(torch.cuda.device_count()):
    print("GPU", index, torch.cuda.get_device_name(index))
EOF

step "Debian packages"
ensure_debian_packages g++ cmake ninja-build libgtest-dev
ensure_build_tools

step "Build torch_mics (Release)"
build_package

step "Tests on GPUs"
"$PYTHON" -m pytest -c tests/pytest.ini -v -rs tests/python/test_gpu.py tests/python/test_nccl.py "$@"

step "compute-sanitizer memcheck"
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$PYTHON" -m pytest -c tests/pytest.ini -q tests/python/test_gpu.py
else
  echo "skipped: there is no compute-sanitizer on the path."
fi

step "One GPT on one GPU"
"$PYTHON" benchmarks/single_gpu.py --json "${OUT:-.build}/single_gpu.json"

steps_done
