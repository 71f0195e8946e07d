"""Checks who may include and import whom: the table of docs/design.md, as data.

A rule is a room and what may be named there. Anything not allowed is a violation, printed as
`file:line: includes ... (rule: ...)`.
"""

import ast
import fnmatch
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.who_uses_whom import circles, cpp_uses, python_uses

ROOT = Path(__file__).resolve().parents[2]
CPP_SUFFIXES = {".h", ".cc", ".cu"}

# The rooms of the public headers; all other headers lie beside their sources.
PLAN_HEADERS = ("error.h", "build_info.h", "topology.h", "shard_layout.h", "residency.h")
PLAN_HEADERS += ("prefetch.h",)
MODEL_HEADERS = ("cost_model.h", "measured_table.h", "workload.h", "step_model.h")
MODEL_HEADERS += ("memory_model.h", "planner.h")
COMM_HEADERS = ("stream.h", "communicator.h", "flight_log.h")
RACES_HEADERS = ("race_detector.h",)
BACKEND_HEADERS = ("local_world.h", "c10d_communicator.h", "shm_communicator.h")
BACKEND_HEADERS += ("nccl_options.h", "nccl_world.h")
RUNTIME_HEADERS = ("unit_collectives.h", "unit_parameters.h", "unit_gradients.h", "unit.h")
RUNTIME_HEADERS += ("runtime_streams.h", "engine.h")
OPTIM_HEADERS = ("flat_optimizer.h",)

STD = "std"  # any header named without a directory and without .h: <vector>, <cstdint>
BESIDE = "beside"  # a header of the same folder: "bindings.h"
TORCH = ("ATen/*", "c10/*")


def public(*names: str) -> tuple[str, ...]:
    return tuple(f"mics/{name}" for name in names)


PLAN = (STD, "plan/*", *public(*PLAN_HEADERS))
MODEL = (*PLAN, "model/*", *public(*(f"model/{name}" for name in MODEL_HEADERS)))
# What all rooms may use.
BASE = (STD, "plan/check.h", *public("error.h", "build_info.h"))
COMM = (*BASE, "comm/*", *public(*COMM_HEADERS), *TORCH)
BACKENDS = ("comm/local/*", "comm/c10d/*", "comm/shm/*", "comm/nccl/*")
NO_SIDE_EFFECTS = (
    *("thread", "mutex", "shared_mutex", "condition_variable", "future", "atomic"),
    *("stop_token", "semaphore", "latch", "barrier"),
    *("iostream", "fstream", "istream", "ostream", "filesystem", "cstdio"),
)


def other_backends(name: str) -> tuple[str, ...]:
    return tuple(backend for backend in BACKENDS if backend != f"comm/{name}/*")


@dataclass(frozen=True)
class Room:
    path: str  # the rule of the longest matching path holds
    allowed: tuple[str, ...]
    rule: str
    forbidden: tuple[str, ...] = ()


ROOMS = (
    Room(
        "src/plan",
        PLAN,
        "plan is arithmetic over the standard library: no torch, no threads, no I/O",
        NO_SIDE_EFFECTS,
    ),
    Room(
        "src/model",
        MODEL,
        "model is arithmetic over plan: no torch, no threads, no I/O",
        NO_SIDE_EFFECTS,
    ),
    Room(
        "src/comm",
        (*COMM, "torch/csrc/distributed/c10d/Store.hpp"),
        "the comm interface needs ATen/core, c10 and c10d's Store, and names no backend",
        BACKENDS,
    ),
    Room(
        "src/comm/local",
        (*COMM, "mics/local_world.h"),
        "comm/local needs the comm interface only",
        other_backends("local"),
    ),
    Room(
        "src/comm/c10d",
        (*COMM, "mics/c10d_communicator.h", "torch/csrc/distributed/c10d/*"),
        "comm/c10d needs the comm interface and c10d",
        other_backends("c10d"),
    ),
    Room(
        "src/comm/shm",
        (*COMM, "mics/shm_communicator.h", "sys/*", "linux/futex.h")
        + ("dirent.h", "fcntl.h", "sched.h", "unistd.h"),
        "comm/shm needs the comm interface and the operating system",
        other_backends("shm"),
    ),
    Room(
        "src/comm/nccl",
        (*COMM, "mics/nccl_*.h", "nccl.h", "cuda_runtime_api.h", "dlfcn.h")
        + ("unistd.h", "torch/csrc/distributed/c10d/*"),
        "comm/nccl needs the comm interface, NCCL, the CUDA runtime and c10d's Store",
        other_backends("nccl"),
    ),
    Room(
        "src/optim",
        (*BASE, *public(*OPTIM_HEADERS), *TORCH, "optim/*"),
        "optim needs ATen",
    ),
    Room(
        "src/races",
        (*BASE, "mics/stream.h", "mics/race_detector.h", *TORCH, "races/*"),
        "races needs the interface of streams and ATen",
    ),
    Room(
        "src/runtime",
        (*PLAN, *COMM, *public(*RUNTIME_HEADERS), "runtime/*", "torch/csrc/autograd/*"),
        "runtime needs plan, the comm interface and autograd, never a backend",
        BACKENDS,
    ),
    Room(
        "include/mics",
        (STD, "mics/*", "ATen/core/*", "c10/*"),
        "a public header includes include/mics, ATen/core and c10",
    ),
    Room(
        "python/csrc",
        (STD, BESIDE, "mics/*", "plan/check.h", "optim/*", "runtime/runtime_memory.h")
        + ("comm/c10d/store_reports.h", "torch/*", "pybind11/*", "Python.h", *TORCH),
        "python/csrc needs include/mics and what it binds beside, torch and pybind11",
        ("nccl.h", "cuda_runtime_api.h"),
    ),
    Room(
        "tests/python/csrc",
        (STD, BESIDE, "mics/*", "support/*", "torch/csrc/*", "torch/library.h")
        + ("pybind11/*", *TORCH),
        "tests/python/csrc binds the fakes of tests/cpp/support, and has a device for torch",
    ),
    Room(
        "tests/cpp",
        (STD, "signal.h", "sys/wait.h", "unistd.h", "mics/*", "gtest/*", "gmock/*", "support/*")
        + ("torch/csrc/distributed/c10d/*", "torch/csrc/autograd/*", *TORCH)
        + ("plan/*", "model/*", "comm/*", "optim/*", "races/*", "runtime/*"),
        "a C++ test needs no Python",
    ),
)

# A public header takes the rule of its room too, so that a lower room cannot reach up through it.
HEADER_LAYERS = (
    (PLAN_HEADERS, public(*PLAN_HEADERS), "a plan header includes plan"),
    (
        MODEL_HEADERS,
        public(*PLAN_HEADERS, *(f"model/{name}" for name in MODEL_HEADERS)),
        "a model header includes plan and model",
    ),
    (
        (*COMM_HEADERS, *BACKEND_HEADERS),
        public("error.h", *COMM_HEADERS, "nccl_options.h"),
        "a comm header includes the comm interface",
    ),
    (
        RUNTIME_HEADERS,
        public(*PLAN_HEADERS, *COMM_HEADERS, *RUNTIME_HEADERS),
        "a runtime header includes plan, the comm interface and runtime",
    ),
    (OPTIM_HEADERS, public("error.h"), "an optim header includes no other room"),
    (RACES_HEADERS, public("stream.h"), "a header of races includes streams"),
)
NO_TORCH_HEADERS = (*PLAN_HEADERS, *MODEL_HEADERS)

BINDING_ONLY = re.compile(
    r"pybind11|^Python\.h$|^torch/(extension|python)\.h$|torch/csrc/utils/|/python_"
)

IMPORTS = (
    # path, top-level modules forbidden there, rule
    ("python/torch_mics", {"tests", "benchmarks", "examples", "pytest"}, "nothing points upwards"),
    ("examples", {"tests", "benchmarks"}, "examples use the public interface"),
    ("benchmarks", {"tests"}, "benchmarks use the public interface"),
)

TOP_LEVEL = {
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "benchmarks",
    "docs",
    "examples",
    "include",
    "python",
    "setup.py",
    "src",
    "tests",
}


def matches(header: str, patterns: tuple[str, ...]) -> bool:
    if STD in patterns and re.fullmatch(r"[a-z0-9_]+", header):
        return True
    if BESIDE in patterns and re.fullmatch(r"[a-z0-9_]+\.h", header):
        return True
    return any(fnmatch.fnmatch(header, pattern) for pattern in patterns)


def includes(text: str) -> list[tuple[int, str]]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
        if match:
            found.append((number, match.group(1)))
    return found


def cpp_violations(path: str, text: str) -> list[str]:
    """Returns the violations in one C++ file; `path` is relative to the root."""
    rooms = [room for room in ROOMS if path.startswith(room.path + "/")]
    if not rooms:
        return [f"{path}:1: is in no room (rule: every C++ file has a rule in this test)"]
    room = max(rooms, key=lambda room: len(room.path))
    violations = []
    for line, header in includes(text):
        broken = []
        if not matches(header, room.allowed) or matches(header, room.forbidden):
            broken.append(room.rule)
        if BINDING_ONLY.search(header) and not room.path.endswith("python/csrc"):
            broken.append("only python/csrc includes Python or pybind11 headers")
        if room.path == "include/mics":
            name = Path(path).name
            for names, allowed, rule in HEADER_LAYERS:
                if name in names and header.startswith("mics/") and header not in allowed:
                    broken.append(rule)
            if name in NO_TORCH_HEADERS and matches(header, TORCH):
                broken.append("plan and model headers include no torch")
        violations += [f"{path}:{line}: includes {header} (rule: {rule})" for rule in broken]
    return violations


def python_violations(path: str, text: str) -> list[str]:
    """Returns the violations in one Python file; `path` is relative to the root."""
    violations = []
    for node in ast.walk(ast.parse(text, path)):
        is_private = isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)
        if is_private and path.startswith("python/torch_mics/report/"):
            if ast.unparse(node.value) != "self":
                rule = "a report uses the public side of the runtime"
                violations.append(f"{path}:{node.lineno}: uses {node.attr} (rule: {rule})")
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
            names = [alias.name for alias in node.names]
            if node.module == "torch_mics":
                modules += [f"torch_mics.{name}" for name in names]
            elif path.startswith("python/torch_mics/"):
                rule = "a name that other modules import has no underscore"
                violations += [
                    f"{path}:{node.lineno}: imports {name} (rule: {rule})"
                    for name in names
                    if modules[0].startswith("torch_mics.") and re.match("_[^_]", name)
                ]
        else:
            continue
        for module in modules:
            for prefix, forbidden, rule in IMPORTS:
                if path.startswith(prefix + "/") and module.split(".")[0] in forbidden:
                    violations.append(f"{path}:{node.lineno}: imports {module} (rule: {rule})")
            if path.startswith(("examples/", "benchmarks/")) and module.startswith("torch_mics._"):
                rule = "examples and benchmarks import nothing private"
                violations.append(f"{path}:{node.lineno}: imports {module} (rule: {rule})")
    return violations


def sources(suffixes: set[str], *folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes)


def report(violations: list[str]) -> str:
    return "\n".join(["", *violations])


def test_includes_follow_the_table():
    files = sources(CPP_SUFFIXES, "include", "src", "python/csrc", "tests")
    assert files
    found = [v for p in files for v in cpp_violations(str(p.relative_to(ROOT)), p.read_text())]
    assert not found, report(found)


def test_imports_follow_the_table():
    files = sources({".py"}, "python/torch_mics", "examples", "benchmarks")
    assert files
    found = [v for p in files for v in python_violations(str(p.relative_to(ROOT)), p.read_text())]
    assert not found, report(found)


@pytest.mark.parametrize("folders", ["python/torch_mics", "benchmarks", "src include python/csrc"])
def test_no_files_use_each_other(folders: str):
    uses = {**python_uses(*folders.split()), **cpp_uses(*folders.split())}
    assert uses
    assert not circles(uses), report([", ".join(circle) for circle in circles(uses)])


def test_visible_top_level_entries_are_the_agreed_ones():
    try:
        listing = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    visible = {name.split("/")[0] for name in listing if not name.startswith(".")}
    assert visible <= TOP_LEVEL, f"not agreed at the top level: {sorted(visible - TOP_LEVEL)}"


@pytest.mark.parametrize(
    ("path", "header", "rule"),
    [
        ("src/plan/topology.cc", "ATen/core/Tensor.h", "no torch"),
        ("src/plan/topology.cc", "thread", "no threads"),
        ("src/plan/topology.cc", "fstream", "no I/O"),
        ("src/plan/topology.cc", "mics/communicator.h", "arithmetic over the standard"),
        ("src/plan/schedule.cc", "mics/model/workload.h", "arithmetic over the standard"),
        ("src/model/planner.cc", "mics/stream.h", "arithmetic over plan"),
        ("src/comm/stream.cc", "mics/topology.h", "the comm interface"),
        ("src/comm/stream.cc", "comm/local/local_world.h", "names no backend"),
        ("src/comm/local/local_world.cc", "torch/csrc/distributed/c10d/Store.hpp", "local"),
        ("src/comm/shm/segment.cc", "comm/nccl/nccl_api.h", "comm/shm needs"),
        ("src/optim/flat_optimizer.cc", "mics/communicator.h", "optim needs"),
        ("src/runtime/unit_collectives.cc", "mics/c10d_communicator.h", "never a backend"),
        ("src/runtime/engine.cc", "mics/model/workload.h", "runtime needs"),
        ("src/runtime/engine.cc", "comm/c10d/c10d_communicator.h", "never a backend"),
        ("src/runtime/engine.cc", "pybind11/pybind11.h", "only python/csrc"),
        ("src/runtime/engine.cc", "Python.h", "only python/csrc"),
        ("include/mics/engine.h", "torch/csrc/distributed/c10d/Store.hpp", "a public header"),
        ("include/mics/engine.h", "ATen/ATen.h", "a public header"),
        ("include/mics/engine.h", "runtime/prefetcher.h", "a public header"),
        ("include/mics/topology.h", "mics/unit.h", "a plan header"),
        ("include/mics/topology.h", "c10/util/Exception.h", "no torch"),
        ("include/mics/unit.h", "mics/nccl_world.h", "a runtime header"),
        ("python/csrc/module.cc", "runtime/prefetcher.h", "include/mics and what it binds"),
        ("tests/cpp/engine_test.cc", "torch/extension.h", "a C++ test"),
    ],
)
def test_checker_reports_file_line_and_rule(path: str, header: str, rule: str):
    found = cpp_violations(path, f"// A comment.\n#include <vector>\n\n#include <{header}>\n")
    assert found
    assert all(v.startswith(f"{path}:4: includes {header} (rule: ") for v in found)
    assert any(rule in v for v in found), report(found)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "src/plan/topology.cc",
            '#include "mics/topology.h"\n#include <map>\n#include "plan/check.h"',
        ),
        ("src/comm/c10d/x.cc", "#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>\n"),
        ("src/runtime/engine.cc", '#include "mics/unit.h"\n#include <thread>\n'),
        ("src/plan/topology.cc", '// #include "mics/engine.h"\n'),
    ],
)
def test_checker_accepts_what_the_table_allows(path: str, text: str):
    assert cpp_violations(path, text) == []


def test_checker_reports_imports():
    assert python_violations("python/torch_mics/x.py", "import os\nimport pytest\n") == [
        "python/torch_mics/x.py:2: imports pytest (rule: nothing points upwards)"
    ]
    assert python_violations("examples/x.py", "from torch_mics import _C\n") == [
        "examples/x.py:1: imports torch_mics._C"
        " (rule: examples and benchmarks import nothing private)"
    ]
    assert python_violations("examples/x.py", "from torch_mics import init_mesh\n") == []
    assert python_violations("python/torch_mics/x.py", "from torch_mics._unit import _y\n") == [
        "python/torch_mics/x.py:1: imports _y (rule: a name that other modules import has no underscore)"
    ]
    assert python_violations("python/torch_mics/report/x.py", "self._x = model._unit\n") == [
        "python/torch_mics/report/x.py:1: uses _unit"
        " (rule: a report uses the public side of the runtime)"
    ]


def test_checker_finds_circles():
    uses = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(uses) == [["a", "b", "c"]]
    assert circles(uses | {"b": {"d"}}) == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
