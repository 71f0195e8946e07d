#!/usr/bin/env bash
# Builds and tests everything. Stops at the first failure and shows its log.
#
#   bash tests/run.sh [--quick] [--wide] [PYTEST ARGUMENT...]
#
#   --quick   leaves out the builds with sanitizers and without torch
#   --wide    the widest sweeps (MICS_WIDE=1)
#
# Environment: see examples/bootstrap.sh.

source "$(dirname "${BASH_SOURCE[0]}")/../examples/bootstrap.sh"

quick=0
pytest_arguments=()
for argument in "$@"; do
  case "$argument" in
    --quick) quick=1 ;;
    --wide) export MICS_WIDE=1 ;;
    *) pytest_arguments+=("$argument") ;;
  esac
done

# Tests start many processes: one thread each. Gloo listens on loopback, so no host name is looked up.
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
cd "$MICS_ROOT"

# cpp_tests NAME CMAKE_ARGUMENT...: builds in .build/NAME and runs ctest there.
cpp_tests() {
  local name="$1" tree="$MICS_ROOT/.build/$1" launcher=()
  shift
  # A tree made for another interpreter or torch keeps paths into it: start it again.
  if [[ -e $tree/for_torch && "$(<"$tree/for_torch")" != "$torch_id" ]]; then rm -rf "$tree"; fi
  quietly "$name-configure" cmake -S "$MICS_ROOT" -B "$tree" -G Ninja -DPython_EXECUTABLE="$PYTHON" "$@"
  printf '%s\n' "$torch_id" >"$tree/for_torch"
  quietly "$name-build" cmake --build "$tree" --parallel "$(nproc)"
  # ThreadSanitizer cannot map its memory where addresses are randomized over too many bits.
  if [[ $name == tsan ]] && setarch "$(uname -m)" -R true 2>/dev/null; then
    launcher=(setarch "$(uname -m)" -R)
  fi
  "${launcher[@]}" ctest --test-dir "$tree" --parallel "$(nproc)" --output-on-failure --no-tests=error
}

step "Python environment"
ensure_venv dev examples
torch_id="$("$PYTHON" -c 'from importlib.util import find_spec
from pathlib import Path
origin = Path(find_spec("torch").origin)
print(origin, origin.with_name("version.py").read_text())')"

step "Debian packages"
ensure_debian_packages g++ cmake ninja-build libgtest-dev
ensure_build_tools

# The cheap checks come first.
step "clang-format"
find include src python/csrc tests -name '*.h' -o -name '*.cc' | sort |
  xargs -d '\n' "$VIRTUAL_ENV/bin/clang-format" --dry-run -Werror

step "ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .

step "Build torch_mics (Release)"
build_package

step "mypy"
"$PYTHON" -m mypy --config-file .mypy.ini

step "C++ tests (Release)"
cpp_tests python -DMICS_BUILD_TESTS=ON # the package's own tree: its core is built already

if ((!quick)); then
  step "C++ tests (without torch)"
  cpp_tests core-only -DCMAKE_BUILD_TYPE=Release -DMICS_WITH_TORCH=OFF

  step "C++ tests (AddressSanitizer, UndefinedBehaviorSanitizer)"
  cpp_tests asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMICS_SANITIZE=address

  step "C++ tests (ThreadSanitizer)"
  cpp_tests tsan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMICS_SANITIZE=thread
fi

step "Python tests"
export MICS_TEST_FAKES="$MICS_ROOT/.build/python/fakes"
# Ranks wait for each other half of the time, so two files run side by side; `-n 0`: one after the other.
"$PYTHON" -m pytest -c tests/pytest.ini tests/python -n 2 --dist loadfile "${pytest_arguments[@]}"

steps_done
