"""Holds the code to sizes that a reader can take in at once. Counted on what the formatters leave."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_HEADER_LINES = 200
MAX_FUNCTION_LINES = 50
MAX_TEST_LINES = 400
MAX_PUBLIC_MEMBERS = 25


def files(suffix: str, *folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob(f"*{suffix}"))


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def too_long(paths: list[Path], most: int) -> list[str]:
    assert paths
    return [f"{p.relative_to(ROOT)}: {num_lines(p)} lines" for p in paths if num_lines(p) > most]


def cpp_functions(text: str) -> list[tuple[int, int, str]]:
    """Returns line, length and first line of each function of a file, or of a class in it."""
    found = []
    lines = text.splitlines()

    def is_at(number: int, indent: str) -> bool:
        line = lines[number]
        return line.startswith(indent) and line[len(indent) :][:1] not in ("", " ", "}", "#")

    for end, line in enumerate(lines):
        indent = line[:-1]
        if line not in ("}", "  }"):
            continue
        start = end - 1
        while start > 0 and not is_at(start, indent):
            start -= 1
        # A return type may have a line of its own.
        while (
            start > 0
            and is_at(start - 1, indent)
            and not re.search(r"//|[;:{}]$", lines[start - 1])
        ):
            start -= 1
        if not re.match(
            r"\s*(namespace|struct|class|enum|union|if|for|while|switch|\{)", lines[start]
        ):
            found.append((start + 1, end - start + 1, lines[start]))
    return found


def public_members(text: str) -> dict[str, int]:
    """Returns the number of public members of each class: names, overloads counted once."""
    counts: dict[str, int] = {}
    for match in re.finditer(r"^(class|struct) (\w+)[^;{]*\{\n(.*?)^\};", text, re.M | re.S):
        kind, name, body = match.groups()
        body = re.sub(r"//[^\n]*", "", body)
        is_public, depth, members, part = kind == "struct", 0, set(), ""
        for line in body.splitlines():
            if depth == 0 and (access := re.match(r" (public|private|protected):", line)):
                is_public, part = access.group(1) == "public", ""
                continue
            part = f"{part} {line.strip()}" if part else line.strip()
            depth += line.count("{") - line.count("}")
            if depth > 0 or not part.endswith((";", "}")):
                continue
            declared = part.split("{")[0].split("=")[0].rstrip("; ")
            is_deleted = part.endswith(("= delete;", "= default;"))
            if is_public and not is_deleted and not re.match(r"(using|friend|struct|enum)\b", part):
                signature = declared.split("(")[0].split()
                if signature:
                    members.add(signature[-1].lstrip("*&"))
            part = ""
        counts[name] = len(members)
    return counts


def test_headers_are_short():
    assert not too_long(files(".h", "include", "src", "python/csrc"), MAX_HEADER_LINES)


def test_files_of_tests_are_short():
    assert not too_long(
        files(".py", "tests") + files(".cc", "tests") + files(".h", "tests"), MAX_TEST_LINES
    )


def test_functions_of_the_core_are_short():
    found = []
    for path in files(".cc", "src") + files(".h", "src", "include"):
        for line, length, head in cpp_functions(path.read_text()):
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path.relative_to(ROOT)}:{line}: {length} lines: {head.strip()}")
    assert not found, "\n".join(found)


def test_functions_of_the_package_are_short():
    found = []
    for path in files(".py", "python/torch_mics"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = [n for n in node.body if not isinstance(n, ast.Expr)] or node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {length}: {node.name}")
    assert not found, "\n".join(found)


def test_classes_have_few_public_members():
    found = []
    for path in files(".h", "include", "src", "python/csrc"):
        for name, count in public_members(path.read_text()).items():
            if count > MAX_PUBLIC_MEMBERS:
                found.append(f"{path.relative_to(ROOT)}: {name} has {count}")
    assert not found, "\n".join(found)


def test_classes_of_the_package_have_few_public_members():
    found = []
    for path in files(".py", "python/torch_mics"):
        for node in ast.walk(ast.parse(path.read_text())):
            # MiCSModule has FSDP2's methods, which are as many as they are.
            if isinstance(node, ast.ClassDef) and node.name != "MiCSModule":
                functions = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
                fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]  # type: ignore[union-attr]
                count = sum(not name.startswith("_") for name in {*functions, *fields})
                if count > MAX_PUBLIC_MEMBERS:
                    found.append(f"{path.relative_to(ROOT)}: {node.name} has {count}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("length", [3, 60])
def test_long_functions_are_seen(length: int):
    body = "".join(f"  call({i});\n" for i in range(length - 2))
    text = (
        f"namespace mics {{\n\nvoid f(int a,\n       int b) {{\n{body}}}\n\n}}  // namespace mics\n"
    )
    assert [found[1] for found in cpp_functions(text)] == [length + 1]


def test_public_members_are_counted():
    text = """class A {
 public:
  A();
  ~A();
  A(const A&) = delete;
  // A comment; with a semicolon.
  [[nodiscard]] int f() const { return f_; }
  void g(int a,
         int b);
  void g(int a);
  struct Inner {
    int x;
  };
  int field = 0;

 private:
  void h();
  int f_;
};
"""
    assert public_members(text) == {"A": 5}
