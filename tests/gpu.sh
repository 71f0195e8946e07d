#!/usr/bin/env bash
# What needs a GPU, most important first, planned for 6 minutes on one GPU with 16 cores. It installs nothing
# and asks no registry: the Python that it finds must have torch and the extra `gpu` of setup.py.
#
#   bash tests/gpu.sh [--dry-run] [--no-build] [--first] [--sanitizer]
#
#   --dry-run      on CPU tensors, up to the point where a GPU is needed
#   --no-build     the package is built already
#   --first        of each list of modes only the first, and no tests of pytest
#   --sanitizer    at the end, the GPU tests under compute-sanitizer (minutes)
#
# Environment: OUT (at most 8 files with everything that was measured; default .build/gpu), PYTHON (default
# python3), LIMIT (seconds in all, default 360). The end of the output is the summary. The status is not 0
# when something is wrong. docs/hardware.md says what a run must show.

set -uo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

DEVICE=cuda BUILD=1 FIRST=0 SANITIZER=0
while (($# > 0)); do
  case $1 in
    --dry-run) DEVICE=cpu ;;
    --no-build) BUILD=0 ;;
    --first) FIRST=1 ;;
    --sanitizer) SANITIZER=1 ;;
    *) echo "error: unknown argument $1; see the head of tests/gpu.sh" >&2; exit 2 ;;
  esac
  shift
done
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-.build/gpu}" && cd "${OUT:-.build/gpu}" && pwd)
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
export OUT PROBE_DEVICE=$DEVICE PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
export PYTHONPATH=$PWD/python:$PWD/tests/python${PYTHONPATH:+:$PYTHONPATH}
export MASTER_ADDR=127.0.0.1
num_wrong=0

say() { printf '\n[%3d s] %s\n' $SECONDS "$*"; }
wrong() { echo "WRONG: $*"; num_wrong=$((num_wrong + 1)); }
on_gpu() { [[ $DEVICE == cuda ]]; }

# ranks N LOG ARGUMENT...: the probe on N ranks; in the background, so that groups of runs overlap.
next_port=$((20000 + $$ % 20000))
ranks() {
  local n=$1 log=$2 rank options=("${STEPS[@]}")
  shift 2
  if [[ $1 == --* ]]; then options+=("$1" "$2") && shift 2; fi
  if ((FIRST)); then set -- "$1"; fi
  next_port=$((next_port + 1))
  for ((rank = 0; rank < n; ++rank)); do
    local to="$LOGS/$log.log"
    ((rank == 0)) || to="$LOGS/$log.rank$rank"
    RANK=$rank WORLD_SIZE=$n MASTER_PORT=$next_port timeout -k 5 "${TIME:-75}" \
      "$PYTHON" tests/gpu/probe.py "${options[@]}" "$@" >"$to" 2>&1 &
  done
}

say "device and Python"
if on_gpu; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: tests/gpu.sh needs a GPU: torch sees none on this host." >&2
    exit 1
  }
fi
"$PYTHON" -c 'import pytest, rich, torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' ||
  { echo "error: $PYTHON must have torch, pytest and rich (the extra gpu of setup.py)" >&2; exit 1; }

say "build"
if ((BUILD)); then
  "$PYTHON" setup.py build_ext --inplace >"$LOGS/build.txt" 2>&1 || {
    tail -40 "$LOGS/build.txt"
    exit 1
  }
fi
timeout 60 "$PYTHON" -m torch_mics env 2>&1 | tee "$LOGS/env.txt" | tail -25

STEPS=(--steps 8)
on_gpu || STEPS=(--steps 4 --micro-steps 2)

say "one rank and two against the CPU, and against FSDP2"
if ((!FIRST)); then
  (
    timeout 170 "$PYTHON" -m pytest -c /dev/null -p no:cacheprovider -v -rs -k "$DEVICE" \
      tests/python/test_gpu.py >"$LOGS/pytest.txt" 2>&1
    echo "status $?" >>"$LOGS/pytest.txt"
  ) &
fi
ranks 1 one_fsdp2 fsdp2+p1 fsdp2+p1+bf16 fsdp2+p1+bf16model
ranks 1 one_ours ours+p1 ours+p1+bf16 ours+p1+bf16model ours+p1+sync ours+p1+fused+torchopt
ranks 2 two_fsdp2 fsdp2 fsdp2+bf16 fsdp2+fp16
ranks 2 two_ours ours ours+bf16 ours+fp16 ours+torchopt ours+sync
wait
if ((!FIRST)); then
  tail -4 "$LOGS/pytest.txt"
  grep -q "^status 0" "$LOGS/pytest.txt" || wrong "tests/python/test_gpu.py"
fi

say "races: late compute against launches that block, bit for bit"
RACES=(ours+late+torchopt+fused+between ours+late+torchopt+foreach+keepgrad ours+late+prefetch
  ours+late+bf16model ours+p1+late+bf16model ours+late+keepfull)
ranks 2 race_async "${RACES[@]}"
CUDA_LAUNCH_BLOCKING=1 ranks 2 race_blocking "${RACES[@]}"
MICS_RACE_CHECK=1 ranks 2 two_checked ours+torchopt+foreach ours+bf16
ranks 2 two_killed --timeout 20 ours+killed
wait

say "four ranks as two nodes"
export PROBE_PER_NODE=2
ranks 4 four_fsdp2 fsdp2
ranks 4 four_ours ours ours+flat ours+p2
((FIRST)) || ranks 4 four_kept ours+resident ours+keepfull
wait
unset PROBE_PER_NODE

say "settings"
ranks 2 two_graphs ours+ac ours+meta ours+boom
((FIRST)) || ranks 2 two_kept ours+keep ours+eval ours+keepgrad
if on_gpu; then
  ranks 2 two_compiled ours+compile
  MICS_NCCL_REGISTRATION=buffers ranks 2 two_buffers ours
  MICS_NCCL_REGISTRATION=windows ranks 2 two_windows ours
  MICS_NCCL_REGISTRATION=windows MICS_NCCL_COPY_ENGINE=1 ranks 2 two_engines ours
fi
wait

if on_gpu; then
  say "one GPT alone on the GPU"
  left=$((${LIMIT:-360} - SECONDS - 60))
  if ((left > 45)); then
    timeout $left "$PYTHON" benchmarks/single_gpu.py --rounds 1 --steps 8 --json "$OUT/single_gpu.json" \
      >"$LOGS/single_gpu.txt" 2>&1 || wrong "benchmarks/single_gpu.py, or $left s were not enough"
    tail -20 "$LOGS/single_gpu.txt"
  else
    wrong "no time was left for benchmarks/single_gpu.py"
  fi
  say "a larger pair with traces"
  TIME=60 ranks 2 pair_fsdp2 --steps 5 fsdp2+large+bf16+trace
  wait
  TIME=60 ranks 2 pair_ours --steps 5 ours+large+bf16+trace
  wait
  if ((SANITIZER)); then
    say "compute-sanitizer memcheck"
    compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" -m pytest -c /dev/null \
      -p no:cacheprovider -q -k cuda tests/python/test_gpu.py >"$LOGS/sanitizer.txt" 2>&1 ||
      wrong "compute-sanitizer: $(tail -3 "$LOGS/sanitizer.txt")"
  fi
fi

say "summary"
"$PYTHON" tests/gpu/show.py "$LOGS" "$OUT/results.jsonl" 2>&1 | tee "$OUT/summary.txt"
((PIPESTATUS[0] == 0)) || wrong "see the lines above"
tar czf "$OUT/logs.tgz" -C "$LOGS" .
on_gpu || echo "A GPU is needed from here on: windows, compiled blocks, single_gpu, traces, the sanitizer."
say "$num_wrong wrong; everything is in $OUT"
exit $((num_wrong > 0))
