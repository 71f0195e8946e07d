"""help() of the C++ core: every class and function says what it is, as the stub does."""

import ast
import inspect
from pathlib import Path

import torch_mics
from torch_mics import _C


def documented(node: ast.AST, of: object) -> list[tuple[str, str | None, object]]:
    """Lists (name, docstring, object) of the classes and functions of the stub, with their members."""
    found = []
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef)
        if not is_function and not isinstance(child, ast.ClassDef):
            continue
        is_property = is_function and any(
            isinstance(d, ast.Name) and d.id == "property" for d in child.decorator_list
        )
        if child.name.startswith("_") or is_property:
            continue
        bound = getattr(of, child.name)
        found.append((child.name, ast.get_docstring(child), bound))
        if isinstance(child, ast.ClassDef) and not issubclass(bound, Exception):
            found += documented(child, bound)
    return found


def test_help_says_what_the_stub_says():
    stub = Path(inspect.getfile(torch_mics)).with_name("_C.pyi")
    found = documented(ast.parse(stub.read_text()), _C)
    assert len(found) > 100
    for name, docstring, bound in found:
        if isinstance(bound, type) and issubclass(bound, Exception):
            continue
        assert docstring, f"{name} has no docstring in the stub"
        assert docstring in (bound.__doc__ or ""), f"help({name}) does not say: {docstring}"
