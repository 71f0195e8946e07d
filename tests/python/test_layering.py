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

ROOT = Path(__file__).resolve().parents[2]
CPP_SUFFIXES = {".h", ".cc", ".cu"}

PLAN_HEADERS = (
    "topology.h",
    "shard_layout.h",
    "schedule.h",
    "phase_orders.h",
    "use_order.h",
    "cost_model.h",
    "measured_table.h",
    "workload.h",
    "step_model.h",
    "memory_model.h",
    "planner.h",
)
BASE_HEADERS = ("check.h", "error.h", "build_info.h")
COMM_HEADERS = (
    "stream.h",
    "communicator.h",
    "flight_log.h",
    "local_world.h",
    "c10d_communicator.h",
    "store_reports.h",
    "shm_communicator.h",
    "nccl_world.h",
)
SHARD_HEADERS = ("full_buffer.h", "storage_part.h")
COLLECTIVE_HEADERS = ("unit_collectives.h",)
RUNTIME_HEADERS = (
    "unit.h",
    "runtime_memory.h",
    "runtime_streams.h",
    "step_digest.h",
    "boundary_agreement.h",
    "gather_pipeline.h",
    "reduce_pipeline.h",
    "engine.h",
)
OPTIM_HEADERS = ("flat_optimizer.h", "neighbours.h")

STD = "std"  # any header named without a directory and without .h: <vector>, <cstdint>
BESIDE = "beside"  # a header of the same folder: "bindings.h"
TORCH = ("ATen/*", "c10/*")


def public(*names: str) -> tuple[str, ...]:
    return tuple(f"mics/{name}" for name in names)


BASE = (STD, *public(*BASE_HEADERS))
PLAN = (*BASE, *public(*PLAN_HEADERS), "plan/*")
COMM = (*BASE, *public("stream.h", "communicator.h", "flight_log.h"), *TORCH)


@dataclass(frozen=True)
class Room:
    path: str  # the rule of the longest matching path holds
    allowed: tuple[str, ...]
    rule: str
    forbidden: tuple[str, ...] = ()


ROOMS = (
    Room(
        "src/base",
        (*BASE, "base/*"),
        "base needs the standard library only",
        ("thread", "mutex", "fstream"),
    ),
    Room(
        "src/plan",
        (*PLAN, "base/*"),
        "plan is arithmetic over base: no torch, no threads, no I/O",
        ("thread", "mutex", "shared_mutex", "condition_variable", "future", "atomic")
        + ("stop_token", "semaphore", "latch", "barrier")
        + ("iostream", "fstream", "istream", "ostream", "filesystem", "cstdio"),
    ),
    Room(
        "src/comm",
        (*COMM, "base/*", "comm/*"),
        "the comm interface needs base, ATen/core and c10, and names no backend",
        ("comm/local/*", "comm/c10d/*", "comm/nccl/*", "comm/shm/*"),
    ),
    Room(
        "src/comm/local",
        (*COMM, "mics/local_world.h", "base/*", "comm/*"),
        "comm/local needs the comm interface only",
        ("comm/c10d/*", "comm/nccl/*"),
    ),
    Room(
        "src/comm/store",
        (*BASE, *TORCH, "comm/store/*", "torch/csrc/distributed/c10d/*"),
        "comm/store needs c10d's Store only",
    ),
    Room(
        "src/comm/c10d",
        (
            *COMM,
            *public("c10d_communicator.h", "store_reports.h"),
            "base/*",
            "comm/*",
            "torch/csrc/distributed/c10d/*",
        ),
        "comm/c10d needs the comm interface and c10d",
        ("comm/local/*", "comm/nccl/*"),
    ),
    Room(
        "src/comm/shm",
        (*COMM, "mics/shm_communicator.h", "base/*", "comm/*", "sys/*", "linux/futex.h")
        + ("dirent.h", "fcntl.h", "sched.h", "unistd.h"),
        "comm/shm needs the comm interface and the operating system",
        ("comm/local/*", "comm/c10d/*", "comm/nccl/*"),
    ),
    Room(
        "src/comm/nccl",
        (*COMM, "mics/nccl_*.h", "base/*", "comm/*", "nccl.h", "cuda_runtime_api.h", "dlfcn.h")
        + ("unistd.h", "torch/csrc/distributed/c10d/*"),
        "comm/nccl needs the comm interface, NCCL, the CUDA runtime and c10d's Store",
        ("comm/local/*", "comm/c10d/*"),
    ),
    Room(
        "src/shard",
        (*PLAN, *public(*SHARD_HEADERS), *TORCH, "base/*", "shard/*"),
        "shard needs plan and ATen",
    ),
    Room(
        "src/collective",
        (*PLAN, *COMM, *public(*COLLECTIVE_HEADERS), "base/*", "collective/*"),
        "collective needs plan and the comm interface, never a backend",
    ),
    Room(
        "src/optim",
        (*BASE, *public("storage_part.h", *OPTIM_HEADERS), *TORCH, "base/*", "optim/*"),
        "optim needs base, parts of storages and ATen",
    ),
    Room(
        "src/runtime",
        (*PLAN, *COMM, *public(*SHARD_HEADERS, *COLLECTIVE_HEADERS, *RUNTIME_HEADERS))
        + ("base/*", "comm/*", "shard/*", "collective/*", "runtime/*", "torch/csrc/autograd/*"),
        "runtime needs the rooms below it and never a backend",
        ("comm/local/*", "comm/c10d/*", "comm/nccl/*", "comm/shm/*"),
    ),
    Room(
        "include/mics",
        (STD, "mics/*", "ATen/core/*", "c10/*"),
        "a public header includes include/mics, ATen/core and c10",
    ),
    Room(
        "python/csrc",
        (STD, BESIDE, "mics/*", "torch/*", "pybind11/*", "Python.h", *TORCH),
        "python/csrc needs include/mics only, beside torch and pybind11",
        ("nccl.h", "cuda_runtime_api.h"),
    ),
    Room(
        "tests/python/csrc",
        (STD, "mics/*", "support/*", "torch/csrc/*", "pybind11/*", *TORCH),
        "tests/python/csrc binds the fakes of tests/cpp/support",
    ),
    Room(
        "tests/cpp",
        (
            STD,
            "signal.h",
            "sys/wait.h",
            "unistd.h",
            "mics/*",
            "gtest/*",
            "gmock/*",
            "support/*",
            "torch/csrc/distributed/c10d/*",
            *TORCH,
        )
        + (
            "torch/csrc/autograd/*",
            "base/*",
            "plan/*",
            "comm/*",
            "shard/*",
            "collective/*",
            "optim/*",
            "runtime/*",
        ),
        "a C++ test needs no Python",
    ),
)

# A public header takes the rule of its room too, so that a lower room cannot reach up through it.
HEADER_LAYERS = (
    (BASE_HEADERS, public(*BASE_HEADERS), "a base header includes no other room"),
    (PLAN_HEADERS, public(*BASE_HEADERS, *PLAN_HEADERS), "a plan header includes base and plan"),
    (
        COMM_HEADERS,
        public(*BASE_HEADERS, *COMM_HEADERS),
        "a comm header includes base and comm",
    ),
    (
        SHARD_HEADERS,
        public(*BASE_HEADERS, *PLAN_HEADERS, *SHARD_HEADERS),
        "a shard header includes base, plan and shard",
    ),
    (
        COLLECTIVE_HEADERS,
        public(
            *BASE_HEADERS,
            *PLAN_HEADERS,
            "stream.h",
            "communicator.h",
            "flight_log.h",
            *COLLECTIVE_HEADERS,
        ),
        "a collective header includes plan and the comm interface",
    ),
    (OPTIM_HEADERS, public(*BASE_HEADERS, *OPTIM_HEADERS), "an optim header includes base"),
)
NO_TORCH_HEADERS = (*BASE_HEADERS, *PLAN_HEADERS)

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
                broken.append("base and plan headers include no torch")
        violations += [f"{path}:{line}: includes {header} (rule: {rule})" for rule in broken]
    return violations


def python_violations(path: str, text: str) -> list[str]:
    """Returns the violations in one Python file; `path` is relative to the root."""
    violations = []
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
            if node.module == "torch_mics":
                modules += [f"torch_mics.{alias.name}" for alias in node.names]
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


def test_package_imports_have_no_cycle():
    package = ROOT / "python" / "torch_mics"
    graph: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        graph[name] = set()
        # Imports inside functions run later and make no cycle at import time.
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:
                    keep = len(parts) - node.level
                    module = ".".join((*parts[:keep], *([module] if module else [])))
                graph[name] |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    # __init__ imports its modules, and a module that names the package names what is in it.
    graph = {n: {d for d in ds if d in graph and d != n} for n, ds in graph.items()}
    graph = {n: {d for d in ds if not n.startswith(d + ".")} for n, ds in graph.items()}
    while leaves := [name for name, needed in graph.items() if not needed]:
        graph = {n: ds - set(leaves) for n, ds in graph.items() if n not in leaves}
    assert not graph, f"import cycle among {sorted(graph)}"


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
        ("src/base/check.cc", "mics/topology.h", "base needs"),
        ("src/plan/topology.cc", "ATen/core/Tensor.h", "no torch"),
        ("src/plan/topology.cc", "thread", "no threads"),
        ("src/plan/topology.cc", "fstream", "no I/O"),
        ("src/plan/topology.cc", "mics/communicator.h", "arithmetic over base"),
        ("src/comm/stream.cc", "mics/topology.h", "the comm interface"),
        ("src/comm/stream.cc", "comm/local/local_communicator.h", "names no backend"),
        ("src/comm/local/local_communicator.cc", "torch/csrc/distributed/c10d/Store.hpp", "local"),
        ("src/shard/full_buffer.cc", "mics/communicator.h", "shard needs"),
        ("src/collective/unit_collectives.cc", "mics/c10d_communicator.h", "never a backend"),
        ("src/collective/unit_collectives.cc", "mics/unit.h", "collective needs"),
        ("src/runtime/engine.cc", "comm/c10d/c10d_communicator.h", "never a backend"),
        ("src/runtime/engine.cc", "pybind11/pybind11.h", "only python/csrc"),
        ("src/runtime/engine.cc", "Python.h", "only python/csrc"),
        ("include/mics/engine.h", "torch/csrc/distributed/c10d/Store.hpp", "a public header"),
        ("include/mics/engine.h", "ATen/ATen.h", "a public header"),
        ("include/mics/topology.h", "mics/unit.h", "a plan header"),
        ("include/mics/topology.h", "c10/util/Exception.h", "no torch"),
        ("python/csrc/module.cc", "runtime/engine.h", "include/mics only"),
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
            '#include "mics/topology.h"\n#include <map>\n#include "mics/check.h"',
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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
