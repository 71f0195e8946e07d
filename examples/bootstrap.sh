# Sourced by examples/quickstart.sh and tests/run.sh: finds or makes what a fresh clone needs.
#
#   step TITLE                     prints a numbered step and the seconds the one before it took
#   steps_done                     ends the last step and prints all of them with their seconds
#   quietly LOG COMMAND...         runs COMMAND; shows its output only when it fails
#   ensure_debian_packages PKG...  installs what is missing when root, else says what to run
#   ensure_python                  a python3 >= 3.10 that can make virtual environments
#   ensure_venv EXTRA...           $PYTHON: an environment with torch and those extras of setup.py
#   ensure_build_tools             g++ >= 11, cmake >= 3.22, ninja, Python.h
#   build_package                  editable install of this checkout, incremental
#
# Environment: MICS_VENV (use this environment), MICS_TORCH (what to install, default torch==2.11.0).

set -euo pipefail
exec </dev/null # nothing here asks a question, and nothing that is called may

MICS_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
MICS_LOGS="$MICS_ROOT/.build/logs"
mkdir -p "$MICS_LOGS"

STEP_TITLES=()
STEP_SECONDS=()
step_started=0

end_step() {
  if ((${#STEP_TITLES[@]} > ${#STEP_SECONDS[@]})); then
    STEP_SECONDS+=($((SECONDS - step_started)))
    printf '    %s s\n' "${STEP_SECONDS[-1]}"
  fi
}

step() {
  end_step
  STEP_TITLES+=("$1")
  step_started=$SECONDS
  printf '\n[%d] %s\n' "${#STEP_TITLES[@]}" "$1"
}

# On the way out: the step that failed is named last, below whatever it printed.
name_failed_step() {
  local status=$?
  if ((status != 0 && ${#STEP_TITLES[@]} > 0)); then
    printf '\nFAILED in step %d: %s\n' "${#STEP_TITLES[@]}" "${STEP_TITLES[-1]}" >&2
  fi
}
trap name_failed_step EXIT

steps_done() {
  end_step
  local i
  printf '\n'
  for i in "${!STEP_TITLES[@]}"; do
    printf '%6d s  %s\n' "${STEP_SECONDS[$i]}" "${STEP_TITLES[$i]}"
  done
  printf '%6d s  in all\n' "$SECONDS"
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

quietly() {
  local log="$MICS_LOGS/$1.log"
  shift
  if ! "$@" >"$log" 2>&1; then
    cat "$log" >&2
    fail "failed: $* (log: $log)"
  fi
}

ensure_debian_packages() {
  local package missing=()
  if ! command -v dpkg >/dev/null; then
    echo "    not a Debian system; the equivalents of these must be there: $*"
    return
  fi
  for package in "$@"; do
    dpkg -s "$package" 2>/dev/null | grep -q '^Status: .* installed$' || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then return; fi
  if ((EUID != 0)); then
    fail "missing Debian packages. Run: sudo apt-get update && sudo apt-get install -y ${missing[*]}"
  fi
  echo "    installing ${missing[*]}"
  if [[ -z ${apt_updated:-} ]]; then
    quietly apt-update apt-get update
    apt_updated=1
  fi
  DEBIAN_FRONTEND=noninteractive quietly apt-install apt-get install -y --no-install-recommends "${missing[@]}"
}

# Puts the path of a usable interpreter into base_python.
ensure_python() {
  local works='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))'
  base_python="$(command -v python3 || true)"
  if [[ -n $base_python ]] && "$base_python" -c "$works" 2>/dev/null; then return; fi
  ensure_debian_packages python3 python3-venv
  hash -r
  base_python="$(command -v python3 || true)"
  [[ -n $base_python ]] && "$base_python" -c "$works" 2>/dev/null ||
    fail "python3 >= 3.10 with the venv module is needed: got ${base_python:-none}."
}

has_torch() { # PYTHON: does it have torch >= 2.11? Reads metadata only; importing torch takes seconds.
  "$1" -c '
import re, sys
from importlib.metadata import version
sys.exit(tuple(map(int, re.findall(r"\d+", version("torch"))[:2])) < (2, 11))' 2>/dev/null
}

missing_requirements() { # EXTRA...: prints, one a line, what $PYTHON lacks
  "$PYTHON" - "$MICS_ROOT/setup.py" "${MICS_TORCH:-}" "$@" <<'PYTHON'
import ast
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

setup_py, torch, *extras = sys.argv[1:]
# setup.py is read, not run: it needs setuptools, which may be among what is missing.
names = {
    node.targets[0].id: node.value
    for node in ast.parse(open(setup_py).read()).body
    if isinstance(node, ast.Assign)
}
of_extra = ast.literal_eval(names["EXTRAS"])
# setuptools builds the package and needs the separate `wheel` before 70.1. numpy: torch warns without it.
wanted = [torch or "torch>=2.11", "setuptools>=70.1", "numpy"]
for extra in extras:
    wanted += of_extra[extra]
for text in dict.fromkeys(wanted):
    requirement = Requirement(text)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        found = None
    if found is None or not requirement.specifier.contains(found, prereleases=True):
        print("torch==2.11.0" if text == "torch>=2.11" else text)
PYTHON
}

ensure_venv() {
  local directory lines missing
  if [[ -n ${MICS_VENV:-} ]]; then
    directory="$MICS_VENV"
  elif [[ -n ${VIRTUAL_ENV:-} ]] && has_torch "$VIRTUAL_ENV/bin/python"; then
    directory="$VIRTUAL_ENV"
  else
    directory="$MICS_ROOT/.venv"
  fi
  if ! "$directory/bin/python" -m pip --version >/dev/null 2>&1; then
    ensure_python
    "$base_python" -m venv "$directory"
  fi
  directory="$(cd "$directory" && pwd)"
  PYTHON="$directory/bin/python"
  export VIRTUAL_ENV="$directory" PATH="$directory/bin:$PATH"
  unset PYTHONHOME
  lines="$(missing_requirements "$@")"
  if [[ -n $lines ]]; then
    mapfile -t missing <<<"$lines"
    echo "    installing ${missing[*]}"
    quietly pip "$PYTHON" -m pip install --disable-pip-version-check "${missing[@]}"
  fi
  "$PYTHON" -c 'import platform, sys
from importlib.metadata import version
print("    python", platform.python_version() + ", torch", version("torch") + ":", sys.prefix)'
}

version_at_least() { # WANTED FOUND
  [[ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" == "$1" ]]
}

ensure_build_tools() {
  local compiler="${CXX:-g++}" header found
  if ! command -v "$compiler" >/dev/null; then ensure_debian_packages g++; fi
  if ! command -v cmake >/dev/null; then ensure_debian_packages cmake; fi
  if ! command -v ninja >/dev/null; then ensure_debian_packages ninja-build; fi
  hash -r
  if "$compiler" --version | grep -qi 'free software foundation'; then
    found="$("$compiler" -dumpfullversion -dumpversion)"
    version_at_least 11 "$found" || fail "g++ must be 11 or newer: got $found. Set CXX to a newer one."
  fi
  found="$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')"
  if ! version_at_least 3.22 "$found"; then
    quietly pip-cmake "$PYTHON" -m pip install --disable-pip-version-check cmake
    hash -r
  fi
  header="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')"
  if [[ ! -e $header ]]; then
    ensure_debian_packages python3-dev
    [[ -e $header ]] || fail "the headers of $PYTHON are missing: no $header. Install those of this Python."
  fi
}

is_editable_install() { # is the torch_mics that $PYTHON sees an install of this checkout?
  (cd / && "$PYTHON" - "$MICS_ROOT/python" <<'PYTHON') 2>/dev/null
import os
import re
import sys
from importlib.metadata import entry_points, version
from importlib.util import find_spec

found = find_spec("torch_mics").origin
here = sys.argv[1]
text = open(os.path.join(here, "torch_mics", "_version.py")).read()
same_version = f'"{version("torch-mics")}"' in re.findall(r'= (".*")', text)
setup_py = open(os.path.join(here, "..", "setup.py")).read()
same_script = all(script.value in setup_py for script in entry_points(name="torch_mics"))
is_here = os.path.realpath(found).startswith(os.path.realpath(here) + os.sep)
sys.exit(not (is_here and same_version and same_script))
PYTHON
}

build_package() {
  if is_editable_install; then
    # Installed before: only what changed is compiled, and pip's seconds are saved.
    (cd "$MICS_ROOT" && quietly build "$PYTHON" setup.py build_ext --inplace)
  else
    quietly build "$PYTHON" -m pip install --disable-pip-version-check --no-build-isolation --no-deps \
      -e "$MICS_ROOT"
  fi
}
