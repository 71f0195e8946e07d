"""The commands of README.md and docs/ exist, with their options."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import ROOT, all_sources, blocks_of, every_page, file_problems

from torch_mics.cli import build_parser


def commands_of(text: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def command_problems(command: str) -> list[str]:
    """Says what is wrong with one command of a page. Long commands are looked at, not run."""
    words = shlex.split(command, comments=True)
    problems = []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, value = words.pop(0).split("=", 1)
        if name not in all_sources():
            problems.append(f"no source knows {name}")
        if name == "MICS_TORCH" and not re.fullmatch(r"torch[=<>!~]=?[\d.]+\w*", value):
            problems.append(f"MICS_TORCH must be a requirement on torch: got {value}")
    if words[:3] == ["python", "-m", "torch.distributed.run"]:
        words[:3] = ["torchrun"]
    checks = {
        "bash": _script_problems,
        "torchrun": _torchrun_problems,
        "python": _python_problems,
        "pip": _pip_problems,
        "ctest": _ctest_problems,
        "cmake": _cmake_problems,
        "sbatch": _sbatch_problems,
        "kubectl": _kubectl_problems,
        "pcluster": _pcluster_problems,
    }
    if not words or words[0] not in checks:
        return [*problems, "is of a kind that this test cannot check"]
    return problems + checks[words[0]](words[1:])


def _script_problems(words: list[str]) -> list[str]:
    script, *arguments = words
    if problems := file_problems(script):
        return problems
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    known = re.findall(r"^\s+(--[\w-]+)\)", (ROOT / script).read_text(), re.MULTILINE)
    unknown = [argument for argument in arguments if argument not in known]
    return [done.stderr] * (done.returncode != 0) + [f"{script} has no {a}" for a in unknown]


def _torchrun_problems(words: list[str]) -> list[str]:
    from torch.distributed.run import get_args_parser

    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            parsed = get_args_parser().parse_args(words)
        except SystemExit:
            return [f"torchrun refuses its options: {said.getvalue()}"]
    if parsed.module:
        return _python_problems(["-m", parsed.training_script, *parsed.training_script_args])
    return _run_problems(parsed.training_script, parsed.training_script_args)


def _sbatch_problems(words: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("file")
    parser.add_argument("script")
    try:
        parsed, arguments = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        return [f"sbatch: {error}"]
    return _script_problems([parsed.file]) + _run_problems(parsed.script, arguments)


def _kubectl_problems(words: list[str]) -> list[str]:
    if len(words) == 3 and words[:2] == ["apply", "-f"]:
        return file_problems(words[2])
    return [f"kubectl {words} is unknown to this test"]


def _pcluster_problems(words: list[str]) -> list[str]:
    if words[:2] == ["create-cluster", "--cluster-name"] and words[3] == "--cluster-configuration":
        return file_problems(words[4])
    return [f"pcluster {words} is unknown to this test"]


def _run_problems(script: str, arguments: list[str]) -> list[str]:
    """What is wrong with running a Python script, or a folder, with these arguments."""
    if problems := file_problems(script):
        return problems
    if "--" in arguments:  # what it runs
        index = arguments.index("--")
        inner = command_problems(shlex.join(arguments[index + 1 :]))
        return _run_problems(script, arguments[:index]) + inner
    if (ROOT / script).is_dir():
        script += "/__main__.py"
    if script == "examples/train_gpt.py":
        return _train_gpt_problems(arguments)
    # setup.py takes what setuptools takes: the pages may use what our own scripts use.
    source = (ROOT / ("examples/bootstrap.sh" if script == "setup.py" else script)).read_text()
    return [f"{script} has no {a}" for a in arguments if a.startswith("-") and a not in source]


def _train_gpt_problems(arguments: list[str]) -> list[str]:
    pytest.importorskip("jsonargparse")
    parse_config = importlib.import_module("gpt.config").parse_config
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            parse_config(arguments)
        except SystemExit as stop:
            return [f"train_gpt.py refuses: {said.getvalue()}"] if stop.code else []
        except ValueError as error:
            return [f"train_gpt.py refuses: {error}"]
    return []


def _python_problems(words: list[str]) -> list[str]:
    if words[0] != "-m":
        return _run_problems(words[0], words[1:])
    module, *arguments = words[1:]
    if module == "pytest":
        return _pytest_problems(arguments)
    if module == "torch_mics":
        return _torch_mics_problems(arguments)
    if module not in ("ruff", "mypy"):
        return [f"python -m {module} is unknown to this test"]
    done = subprocess.run([sys.executable, "-m", module, *arguments, "--help"], capture_output=True)
    paths = [a for a in arguments if "/" in a or a.startswith(".")]
    problems = [problem for path in paths for problem in file_problems(path)]
    return problems + [f"{module} refuses {arguments}"] * (done.returncode != 0)


def _torch_mics_problems(arguments: list[str]) -> list[str]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            build_parser().parse_args(arguments)
        except SystemExit:
            return [f"torch_mics refuses: {said.getvalue()}"]
    return []


def _pytest_problems(arguments: list[str]) -> list[str]:
    problems, words = [], iter(arguments)
    for word in words:
        if word == "-c":
            problems += file_problems(next(words))
        elif word == "-k":
            next(words)
        elif word.startswith("-"):
            problems.append(f"pytest option {word} is unknown to this test")
        else:
            problems += _test_problems(word)
    return problems


def _test_problems(name: str) -> list[str]:
    path, _, test = name.partition("::")
    problems = file_problems(path)
    if not problems and test and f"def {test}(" not in (ROOT / path).read_text():
        problems = [f"there is no {test} in {path}"]
    return problems


def _pip_problems(words: list[str]) -> list[str]:
    if words[:2] != ["install", "--no-build-isolation"]:
        return ["installing this package needs: pip install --no-build-isolation"]
    target = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
    if target is None or [w for w in words[2:-1] if w != "-e"]:
        return [f"pip install of {words[2:]} is unknown to this test"]
    tree = ast.parse((ROOT / "setup.py").read_text())
    (extras,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
    ]
    wanted = target.group(1).split(",") if target.group(1) else []
    return [f"setup.py has no extra {extra}" for extra in wanted if extra not in extras]


def _tree_problems(tree: str) -> list[str]:
    known = re.findall(r"^\s*cpp_tests ([\w-]+)", (ROOT / "tests/run.sh").read_text(), re.MULTILINE)
    name = tree.removeprefix(".build/")
    return [] if name in known else [f"tests/run.sh makes no tree {tree}"]


def _ctest_problems(words: list[str]) -> list[str]:
    problems, rest = [], iter(words)
    tests = re.findall(r"mics_add_test\(\s*(\w+)", (ROOT / "tests/cpp/CMakeLists.txt").read_text())
    for word in rest:
        if word == "--test-dir":
            problems += _tree_problems(next(rest))
        elif word == "-R":
            pattern = next(rest)
            if not any(re.search(pattern, test) for test in tests):
                problems.append(f"no ctest matches {pattern}: there are {tests}")
        elif word != "--output-on-failure":
            problems.append(f"ctest option {word} is unknown to this test")
    return problems


def _cmake_problems(words: list[str]) -> list[str]:
    if words[0] != "--build" or words[2:-1] not in ([], ["--parallel"]):
        return [f"cmake {words} is unknown to this test"]
    return _tree_problems(words[1])


@every_page
def test_commands_are_right(page: Path):
    problems = []
    for block in blocks_of(page.read_text()):
        if block.language not in ("bash", "python", "diff", ""):
            problems.append(f"line {block.line}: a block of {block.language}")
        if block.language == "bash":
            for command in commands_of(block.text):
                problems += [f"{command!r}: {p}" for p in command_problems(command)]
    inline = r"`((?:bash|torchrun|python -m|pip install|ctest) [^`]+)`"
    for command in re.findall(inline, page.read_text()):
        problems += [f"{command!r}: {p}" for p in command_problems(command)]
    for name in set(re.findall(r"tests/python/\w+\.py::\w+", page.read_text())):
        problems += _test_problems(name)
    assert not problems, "\n".join(problems)


def test_readme_has_the_two_commands():
    blocks = [b.text for b in blocks_of((ROOT / "README.md").read_text()) if b.language == "bash"]
    assert blocks[0].splitlines() == ["bash examples/quickstart.sh", "bash tests/run.sh"]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("bash examples/quick.sh", "there is no examples/quick.sh"),
        ("bash tests/run.sh --fast", "has no --fast"),
        ("bash examples/quickstart.sh --quick", "has no --quick"),
        ("MICS_WIDER=1 bash tests/run.sh", "no source knows MICS_WIDER"),
        ("MICS_TORCH=2.15 bash tests/run.sh", "must be a requirement"),
        ("torchrun --nprocs 4 examples/train_gpt.py", "torchrun refuses"),
        ("torchrun --nproc-per-node 4 examples/train.py", "there is no examples/train.py"),
        ("torchrun examples/train_gpt.py --shards 2", "train_gpt.py refuses"),
        ("python examples/train_gpt.py --steps 0", "--steps must be at least 1"),
        ("python examples/train_gpt.py --precision fp8", "train_gpt.py refuses"),
        (
            "python -m pytest tests/python/test_nothing.py",
            "there is no tests/python/test_nothing.py",
        ),
        ("python -m pytest tests/python/test_docs.py::test_no", "there is no test_no in"),
        ("pip install .", "needs: pip install --no-build-isolation"),
        ('pip install --no-build-isolation ".[tpu]"', "no extra tpu"),
        ("ctest --test-dir .build/release -R nccl_tests", "no ctest matches"),
        ("ctest --test-dir .build/debug", "makes no tree"),
        ("make test", "cannot check"),
        ("sbatch --nodes 2 examples/launch/slurm.sh a.py", "there is no examples/launch/slurm.sh"),
        ("sbatch examples/launch/slurm.sbatch a.py", "there is no a.py"),
        ("kubectl apply -f eks.yaml", "there is no eks.yaml"),
        ("kubectl delete -f examples/launch/eks.yaml", "is unknown"),
        ("python benchmarks/emulated_cluster --speed 1 -- python a.py", "has no --speed"),
        ("python benchmarks/emulated_cluster -- python a.py", "there is no a.py"),
        ("python -m torch_mics validate --pages a.md", "torch_mics refuses"),
        ("torchrun --nproc-per-node 4 -m torch_mics calibrate", "torch_mics refuses"),
    ],
)
def test_a_wrong_command_is_found(command: str, problem: str):
    assert any(problem in found for found in command_problems(command)), command_problems(command)
