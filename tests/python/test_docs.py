"""README.md and docs/: Python runs; links, names, tables, numbers and messages are right."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.pages import (
    FOLDERS,
    PAGES,
    ROOT,
    all_sources,
    blocks_of,
    every_page,
    file_problems,
    prose_of,
)
from support.ranks import run_ranks, start_process
from torch import nn
from torch.distributed.fsdp import FSDPModule

import torch_mics as mics

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
    process = start_process(_run_parts, parts, directory, name)
    process.join(timeout=1500)
    process.kill()
    errors = directory / "errors"
    return errors.read_text() if errors.exists() else f"exit status {process.exitcode}"


def _run_parts(parts: list[tuple[str, str, int]], directory: Path, name: str) -> None:
    os.chdir(directory)
    for variable in _LAUNCHER:
        os.environ.pop(variable, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    errors = ""
    try:
        for prelude, code, line in parts:
            scope = {"__name__": "__main__"}
            exec(compile(PRELUDES[prelude], "prelude", "exec"), scope)
            # Tracebacks have the page's own lines.
            exec(compile("\n" * line + code, name, "exec"), scope)
    except BaseException:
        errors = traceback.format_exc()
    Path(directory, "errors").write_text(errors)


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
            if not hasattr(place, part) and isinstance(place, ModuleType):
                with contextlib.suppress(ImportError):
                    importlib.import_module(f"{place.__name__}.{part}")
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
    return [problem for path in sorted(set(found)) for problem in file_problems(path)]


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
