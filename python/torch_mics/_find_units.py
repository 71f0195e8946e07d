"""find_units: which modules of a model are its units."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from torch_mics._unit_tree import Tree, has_forward, join_units

Units = str | set[type[nn.Module]] | Callable[[nn.Module], bool] | int | list[nn.Module]


def find_units(model: nn.Module, units: Units = "auto") -> list[list[nn.Module]]:
    """Lists the units below the root, inner ones first; modules of one list form one unit.

    Tied parameters end up in one list, or in none (then the root has them).
    """
    return find_and_explain(model, units, set())[0]


def find_and_explain(
    model: nn.Module, units: Units, ignored: set[nn.Parameter]
) -> tuple[list[list[nn.Module]], list[str]]:
    """The units, and what became of those that share parameters: lines of the start-up report."""
    tree = Tree(model)
    outer: list[list[nn.Module]] = []
    if isinstance(units, list):
        chosen = list(units)
    elif isinstance(units, str):
        if units != "auto":
            raise ValueError(
                f'units must be "auto", a set of classes, a predicate, an int or a list: got {units!r}.'
            )
        chosen = _find_blocks(tree)
        outer = _find_outer_units(tree, chosen)
    elif isinstance(units, set):
        classes = tuple(units)
        chosen = [m for m in tree.modules if isinstance(m, classes)]
    elif isinstance(units, bool):
        raise TypeError(f"units must not be a bool: got {units!r}.")
    elif isinstance(units, int):
        chosen = _find_by_size(tree, units)
    elif callable(units):
        chosen = [m for m in tree.modules if units(m)]
    else:
        raise TypeError(
            'units must be "auto", a set of classes, a predicate, an int or a list: got '
            f"{type(units).__name__}."
        )
    chosen = [module for module in chosen if module is not model]
    if not chosen and not isinstance(units, int | str):
        raise ValueError(f"no module of {type(model).__name__} is a unit: got units={units!r}.")
    missing = [type(module).__name__ for module in chosen if id(module) not in tree.order]
    if missing:
        raise ValueError(f"units must be modules of the model: got {missing} from elsewhere.")
    inner = sorted(chosen, key=lambda module: -tree.order[id(module)])
    candidates = [*([module] for module in inner), *outer]
    # Who names the modules is told what is tied to the root, by fully_shard().
    return join_units(tree, candidates, ignored, leaves_to_root=not isinstance(units, list))


def _find_blocks(tree: Tree) -> list[nn.Module]:
    """The repeated blocks: by name of class if the model says so, else by the largest ModuleList."""
    names = set(getattr(tree.root, "_no_split_modules", None) or [])
    named = [m for m in tree.modules if type(m).__name__ in names and m is not tree.root]
    if named:
        return named
    best: list[nn.Module] = []
    best_numel = 0
    for module in tree.modules:
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        # In the order of the members: every rank must find the same.
        kinds: dict[type[nn.Module], list[nn.Module]] = {}
        for member in _members_of(module):
            kinds.setdefault(type(member), []).append(member)
        for repeated in kinds.values():
            if len(repeated) > 1 and (numel := _numel(repeated)) > best_numel:
                best, best_numel = repeated, numel
    return best


def _members_of(container: nn.Module) -> list[nn.Module]:
    """The members that have a forward: of a ModuleList of ModuleLists, those of the inner ones."""
    members: list[nn.Module] = []
    for member in container._modules.values():
        if member is not None:
            members += [member] if has_forward(member) else _members_of(member)
    return members


def _numel(modules: list[nn.Module]) -> int:
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


def _find_outer_units(tree: Tree, blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Embeddings each, and what follows the blocks (final norm and head) together."""
    is_block = {id(block) for block in blocks}
    inside = tree.below(blocks)
    above = tree.holders_of(is_block)
    leaves = [
        module
        for module in tree.modules
        if id(module) not in inside and id(module) not in above and module._parameters
    ]
    embeddings: list[list[nn.Module]] = [[m] for m in leaves if isinstance(m, nn.Embedding)]
    if not blocks:
        return embeddings
    last_block = max(tree.order[id(block)] for block in blocks)
    tail = [
        module
        for module in leaves
        if not isinstance(module, nn.Embedding) and tree.order[id(module)] > last_block
    ]
    return embeddings + ([tail] if tail else [])


def _find_by_size(tree: Tree, minimum: int) -> list[nn.Module]:
    if minimum < 1:
        raise ValueError(f"units as a number of parameters must be at least 1: got {minimum}.")
    large = [m for m in tree.modules if has_forward(m) and _numel([m]) >= minimum]
    holders = tree.holders_of({id(module) for module in large}, strictly=True)
    return [module for module in large if id(module) not in holders]
