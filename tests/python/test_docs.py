"""README.md and docs/: Python runs; commands, links, names, tables and messages are right."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule

import torch_mics as mics
from torch_mics.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = ("benchmarks", "docs", "examples", "include", "python", "src", "tests")

every_page = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)


# --- blocks ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the prelude it asks for, the line of its fence."""

    language: str
    text: str
    prelude: str
    line: int


def blocks_of(text: str) -> list[Block]:
    found, lines, start, above = [], text.splitlines(), None, ""
    for number, line in enumerate(lines, start=1):
        if start is None and line.startswith("```"):
            start, prelude = number, re.fullmatch(r"<!-- prelude: (\w+) -->", above.strip())
        elif start is not None and line.startswith("```"):
            language = lines[start - 1].removeprefix("```").strip()
            body = "\n".join(lines[start : number - 1]) + "\n"
            found.append(Block(language, body, prelude.group(1) if prelude else "", start))
            start = None
        above = line or above
    assert start is None, f"a block that begins in line {start} has no end"
    return found


def prose_of(text: str) -> str:
    """The text without its fenced blocks, line for line."""
    inside, kept = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        kept.append("" if inside or line.startswith("```") else line)
    return "\n".join(kept)


# --- Python blocks --------------------------------------------------------------------------------

_PLAIN = '''
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        return x + F.gelu(self.mlp(self.norm(x)))


class GPT(nn.Module):
    """Takes tokens, gives the loss of the next ones."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), tokens[:, 1:].flatten())


torch.manual_seed(7)
batches = [[torch.randint(11, (2, 6)) for _ in range(2)] for _ in range(3)]
'''
_MODEL = _PLAIN + "\nimport torch_mics as mics\n"
_SHARDED = (
    _MODEL
    + "\nmodel = mics.shard_model(GPT())"
    + "\noptimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)\n"
)
PRELUDES = {"": "", "plain": _PLAIN, "model": _MODEL, "sharded": _SHARDED}

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MICS_NODE_ID")


def run_python(parts: list[tuple[str, str, int]], directory: Path, name: str) -> str:
    """Runs (prelude, code, line) one after the other in one process; gives its errors, or ""."""
    script: list[str] = []
    for prelude, code, line in parts:
        placed = "\n" * line + code  # tracebacks then have the page's own lines
        script += [
            "scope = {'__name__': '__main__'}",
            f"exec(compile({PRELUDES[prelude]!r}, 'prelude', 'exec'), scope)",
            f"exec(compile({placed!r}, {name!r}, 'exec'), scope)",
        ]
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
    path = [str(Path(mics.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    (directory / "blocks.py").write_text("\n".join(script) + "\n")
    done = subprocess.run(
        [sys.executable, "blocks.py"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    return "" if done.returncode == 0 else done.stderr or f"exit status {done.returncode}"


@every_page
def test_python_blocks_run(page: Path, tmp_path: Path):
    blocks = [b for b in blocks_of(page.read_text()) if b.language == "python"]
    if not blocks:
        pytest.skip("no Python on this page")
    errors = run_python([(b.prelude, b.text, b.line) for b in blocks], tmp_path, page.name)
    assert not errors, errors


def sides_of(diff: str) -> tuple[str, str]:
    """The text before and after a diff without headers."""
    lines = diff.splitlines(keepends=True)
    assert all(line[0] in "+- \n" for line in lines), diff
    return tuple("".join(line[1:] or "\n" for line in lines if line[0] != s) for s in "+-")  # type: ignore[return-value]


def test_the_diff_in_the_readme_changes_few_lines_and_no_result(tmp_path: Path):
    (block,) = [b for b in blocks_of((ROOT / "README.md").read_text()) if b.language == "diff"]
    assert 3 <= sum(line.startswith("+") for line in block.text.splitlines()) <= 6
    keep = "\nimport builtins\nbuiltins.results = getattr(builtins, 'results', [])\nresults.append("
    keep += "[p.full_tensor() if hasattr(p, 'full_tensor') else p for p in model.parameters()])\n"
    before, after = (side + keep for side in sides_of(block.text))
    same = "assert len(results) == 2 and all(map(torch.equal, *results)), 'results differ'\n"
    parts = [("plain", before, 0), ("plain", after, 0), ("plain", same, 0)]
    errors = run_python(parts, tmp_path, "README.md")
    assert not errors, errors
    assert (tmp_path / "checkpoint" / ".metadata").exists()


# --- commands -------------------------------------------------------------------------------------


def commands_of(text: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@cache
def all_sources() -> str:
    suffixes = {".py", ".sh", ".cc", ".h", ".txt"}
    files = [p for f in FOLDERS for p in sorted((ROOT / f).rglob("*")) if p.suffix in suffixes]
    files += [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    return "\n".join(p.read_text() for p in files if p.name != Path(__file__).name)


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
        return [*problems, "is of a kind that test_docs.py cannot check"]
    return problems + checks[words[0]](words[1:])


def _file_problems(path: str) -> list[str]:
    return [] if (ROOT / path).exists() else [f"there is no {path}"]


def _script_problems(words: list[str]) -> list[str]:
    script, *arguments = words
    if problems := _file_problems(script):
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
        return _file_problems(words[2])
    return [f"kubectl {words} is unknown to test_docs.py"]


def _pcluster_problems(words: list[str]) -> list[str]:
    if words[:2] == ["create-cluster", "--cluster-name"] and words[3] == "--cluster-configuration":
        return _file_problems(words[4])
    return [f"pcluster {words} is unknown to test_docs.py"]


def _run_problems(script: str, arguments: list[str]) -> list[str]:
    """What is wrong with running a Python script, or a folder, with these arguments."""
    if problems := _file_problems(script):
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
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        parse_config = importlib.import_module("gpt.config").parse_config
    finally:
        sys.path.pop(0)
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
        return [f"python -m {module} is unknown to test_docs.py"]
    done = subprocess.run([sys.executable, "-m", module, *arguments, "--help"], capture_output=True)
    paths = [a for a in arguments if "/" in a or a.startswith(".")]
    problems = [problem for path in paths for problem in _file_problems(path)]
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
            problems += _file_problems(next(words))
        elif word == "-k":
            next(words)
        elif word.startswith("-"):
            problems.append(f"pytest option {word} is unknown to test_docs.py")
        else:
            problems += _test_problems(word)
    return problems


def _test_problems(name: str) -> list[str]:
    path, _, test = name.partition("::")
    problems = _file_problems(path)
    if not problems and test and f"def {test}(" not in (ROOT / path).read_text():
        problems = [f"there is no {test} in {path}"]
    return problems


def _pip_problems(words: list[str]) -> list[str]:
    if words[:2] != ["install", "--no-build-isolation"]:
        return ["installing this package needs: pip install --no-build-isolation"]
    target = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
    if target is None or [w for w in words[2:-1] if w != "-e"]:
        return [f"pip install of {words[2:]} is unknown to test_docs.py"]
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
            problems.append(f"ctest option {word} is unknown to test_docs.py")
    return problems


def _cmake_problems(words: list[str]) -> list[str]:
    if words[0] != "--build" or words[2:-1] not in ([], ["--parallel"]):
        return [f"cmake {words} is unknown to test_docs.py"]
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
        ('pip install --no-build-isolation ".[gpu]"', "no extra gpu"),
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


def test_wrong_python_and_a_wrong_diff_are_found(tmp_path: Path):
    (block,) = blocks_of("text\n\n```python\nvalue = 1\nassert value == 2\n```\n")
    errors = run_python([(block.prelude, block.text, block.line)], tmp_path, "page.md")
    assert 'File "page.md", line 5' in errors
    assert "AssertionError" in errors
    assert sides_of(" a\n-b\n+c\n\n d\n") == ("a\nb\n\nd\n", "a\nc\n\nd\n")


# --- links, names, paths --------------------------------------------------------------------------


def anchors_of(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose_of(text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*plain, *re.findall(r'<a id="([\w-]+)">', text)}


def target_problem(target: str, page: Path) -> str | None:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{target}: there is no such file"
    if anchor and anchor not in anchors_of(file.read_text()):
        return f"{target}: {file.name} has no such heading"
    return None


def link_problems(text: str, page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose_of(text))
    found = [target_problem(t, page) for t in targets if not re.match(r"\w+:", t)]
    return [problem for problem in found if problem]


def name_problems(text: str) -> list[str]:
    """Names of the package that do not exist, in prose and code."""
    problems = []
    for name in sorted(set(re.findall(r"\b(?:torch_mics|mics)((?:\.[A-Za-z_]\w*)+)", text))):
        place: object = mics
        for part in name.split(".")[1:]:
            place = getattr(place, part, None)
            if place is None:
                problems.append(f"torch_mics has no {name.removeprefix('.')}")
                break
    for name in sorted(set(re.findall(r"\bMICS_[A-Z_]+\b", text))):
        if name not in all_sources():
            problems.append(f"no source knows {name}")
    return problems


def path_problems(text: str) -> list[str]:
    found = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)", prose_of(text))
    return [problem for path in sorted(set(found)) for problem in _file_problems(path)]


@every_page
def test_links_names_and_paths_exist(page: Path):
    text = page.read_text()
    problems = link_problems(text, page) + name_problems(text) + path_problems(text)
    assert not problems, "\n".join(problems)
    assert not re.search(r"[\s`(](/(?:work|opt|home|root|tmp)/|https?://(?!arxiv))", text)


def test_a_wrong_link_name_or_path_is_found():
    page = ROOT / "README.md"
    assert link_problems("[a](docs/nothing.md)", page)
    assert link_problems("[a](docs/errors.md#nothing)", page)
    assert not link_problems("[a](docs/errors.md#timeouts) [b](#install)", page)
    assert name_problems("`mics.shard(model)`")
    assert name_problems("torch_mics.checkpoint.TrainStates")
    assert name_problems("`MICS_NOTHING`")
    assert not name_problems("mics.shard_model, torch_mics.checkpoint.TrainState, MICS_NODE_ID")
    assert path_problems("`src/plan/nothing.cc`")


def test_pages_that_sources_mention_exist():
    mentioned = set(re.findall(r"docs/\w+\.md(?:#[\w-]+)?", all_sources()))
    assert {"docs/errors.md#timeouts", "docs/errors.md#comm"} <= mentioned
    problems = [target_problem(target, ROOT / "README.md") for target in sorted(mentioned)]
    assert not [problem for problem in problems if problem]


def test_index_and_readme_list_every_page():
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in (ROOT / "docs/README.md").read_text()
        assert page.name == "README.md" or f"(docs/{page.name})" in PAGES[0].read_text()


# --- what the pages say about the library ---------------------------------------------------------


def test_every_method_of_a_sharded_module_is_on_the_migration_page():
    text = (ROOT / "docs/training.md").read_text()
    _, _, methods = text.partition("### Methods")
    public = [n for n in [*vars(FSDPModule), *vars(mics.MiCSModule)] if not n.startswith("_")]
    assert not [name for name in public if f"`{name}`" not in methods.partition("###")[0]]


def volume_rows() -> dict[tuple[str, str], tuple[int, int]]:
    text = (ROOT / "docs/concepts.md").read_text().partition("<!-- table: volumes -->")[2]
    cells = re.findall(r"^\| (p=\S+ \w+) \| (\S+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    return {(group, name): (int(inter), int(intra)) for group, name, inter, intra in cells}


def _count_volumes(rank: int, shard_size: int, hierarchical: bool) -> dict[str, dict[str, int]]:
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    mics.fully_shard(model, shard_size=shard_size, hierarchical_gather=hierarchical)
    model(torch.ones(2, 64)).sum().backward()
    return mics.traffic(model)


def test_volumes_of_the_worked_example_are_counted():
    groups = {"p=4 flat": (4, False), "p=4 hierarchical": (4, True), "p=2 flat": (2, False)}
    counted = {}
    for group, arguments in groups.items():
        ranks = run_ranks(4, _count_volumes, *arguments, ranks_per_node=2)
        for name in ranks[0]:
            tiers = ("sent_inter_nbytes", "sent_intra_nbytes")
            counted[group, name] = tuple(sum(r[name][t] for r in ranks[:2]) for t in tiers)
    assert counted == volume_rows()


# --- messages -------------------------------------------------------------------------------------

_GAP = "\0"  # what a message leaves open


def _text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text_of(v) if isinstance(v, ast.Constant) else _GAP for v in node.values)
    return _GAP


def python_messages(source: str) -> Iterator[str]:
    """Texts that `raise` gives to an exception."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield _text_of(node.exc.args[0])


def cpp_messages(source: str) -> Iterator[str]:
    """Texts of checks and throws, put together from their literals."""
    raised = r"(?:throw |make_exception_ptr\(\s*)\w+Error"
    starts = rf"\b(?:MICS_CHECK|{raised}|detail::concatenate|py::value_error)\("
    for start in re.finditer(starts, source):
        tokens = re.finditer(r'"((?:[^"\\]|\\.)*)"|([()])', source[start.end() :])
        depth, text, last = 1, "", None
        for token in tokens:
            depth += {"(": 1, ")": -1}.get(token.group(2), 0)
            if depth == 0:
                break
            if token.group(1) is None:
                continue
            between = source[start.end() :][last : token.start()] if last is not None else ""
            text += (_GAP if between.strip() else "") + token.group(1).replace('\\"', '"')
            last = token.end()
        if text:
            yield text


def messages() -> list[str]:
    python = sorted((ROOT / "python/torch_mics").rglob("*.py"))
    cpp = [p for folder in ("src", "python/csrc") for p in sorted((ROOT / folder).rglob("*.cc"))]
    found = [m for p in python for m in python_messages(p.read_text())]
    return found + [m for p in cpp for m in cpp_messages(p.read_text())]


def key_of(message: str) -> str:
    """The part of a message's rule that is always there; "" where a message is only passed on."""
    rule = re.split(r": got|: |\. |\.$", message, maxsplit=1)[0]
    return max((part.replace("`", "").strip() for part in rule.split(_GAP)), key=len)


def documented_messages(text: str) -> list[str]:
    rows = re.findall(r"^\| (`.+?) \| ", text, re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`(.+?)`", row)]


def test_every_message_is_on_the_errors_page():
    text = " ".join(documented_messages((ROOT / "docs/errors.md").read_text()))
    missing = {key_of(message) for message in messages()} - {""}
    missing = {key for key in missing if key not in text}
    assert not missing, f"docs/errors.md has no row for: {sorted(missing)}"


def test_the_errors_page_has_no_message_that_is_gone():
    text = "\n".join(messages()) + all_sources()
    stale = [
        message
        for message in documented_messages((ROOT / "docs/errors.md").read_text())
        if any(part.strip() not in text for part in message.split("..."))
    ]
    assert not stale, f"no source has: {stale}"


def test_messages_are_read_from_both_languages():
    source = 'raise ValueError(f"a must be b: got {c}. Do d." "e")'
    assert list(python_messages(source)) == [f"a must be b: got {_GAP}. Do d.e"]
    source = 'MICS_CHECK(f(a) > 0, "a must "\n "be b: got a=", a, " (\\"", name(), "\\").");'
    assert list(cpp_messages(source)) == [f'a must be b: got a={_GAP} ("{_GAP}").']
    assert key_of(f"{_GAP} needs a c: got {_GAP}. Do d.") == "needs a c"
    assert documented_messages("| `a ... b`, `c` | d |\n") == ["a ... b", "c"]
