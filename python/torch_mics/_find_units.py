"""find_units: which modules of a model are its units, in time linear in their number."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Callable, Iterable

from torch import nn

Units = str | set[type[nn.Module]] | Callable[[nn.Module], bool] | int | list[nn.Module]


def find_units(model: nn.Module, units: Units = "auto") -> list[list[nn.Module]]:
    """Lists the units below the root, inner ones first; modules of one list form one unit.

    Modules that tie a parameter end up in one list, or in none: then they are left to the root.
    """
    return find_and_explain(model, units, set())[0]


def find_and_explain(
    model: nn.Module, units: Units, ignored: set[nn.Parameter]
) -> tuple[list[list[nn.Module]], list[str]]:
    """Gives the units, and lines for the start-up report about those that share parameters."""
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
    # Modules that the caller has listed are not left to the root: fully_shard() refuses them if tied to it.
    return join_units(tree, candidates, ignored, leaves_to_root=not isinstance(units, list))


def _find_blocks(tree: Tree) -> list[nn.Module]:
    """The repeated blocks: by the class names that the model lists, else those of the largest container."""
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
    """Lists the members that have a forward, also those in nested ModuleLists."""
    members: list[nn.Module] = []
    for member in container._modules.values():
        if member is not None:
            members += [member] if has_forward(member) else _members_of(member)
    return members


def _numel(modules: list[nn.Module]) -> int:
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


def _find_outer_units(tree: Tree, blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Gives each embedding a unit, and one to all that follows the blocks: final norm and head."""
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


def has_forward(module: nn.Module) -> bool:
    """Whether `module` can be a unit: a ModuleList or ModuleDict has no forward."""
    return type(module).forward is not nn.Module.forward


class Tree:
    """The modules of a model, each once, in the order of `modules()`.

    Attributes:
        order: position of each module, by its id.
        names: name of each module, by its id; the first one if it is in several places.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        named = list(root.named_modules())
        self.modules = [module for _, module in named]
        self.order = {id(module): position for position, module in enumerate(self.modules)}
        self.names = {id(module): name for name, module in named}

    def below(self, modules: Iterable[nn.Module]) -> set[int]:
        """The ids of `modules` and of all modules inside them."""
        found: set[int] = set()
        waiting = list(modules)
        while waiting:
            module = waiting.pop()
            if id(module) not in found:
                found.add(id(module))
                waiting += _children(module)
        return found

    def holders_of(self, chosen: set[int], *, strictly: bool = False) -> set[int]:
        """The ids of the modules that contain a chosen one; the chosen ones too, unless `strictly`."""
        parents: dict[int, list[int]] = collections.defaultdict(list)
        for module in self.modules:
            for child in _children(module):
                parents[id(child)].append(id(module))
        found = set() if strictly else set(chosen)
        waiting = [parent for each in chosen for parent in parents[each]]
        while waiting:
            each = waiting.pop()
            if each not in found:
                found.add(each)
                waiting += parents[each]
        return found


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module._modules.values() if child is not None]


class _Joined:
    """Disjoint sets of chosen modules; each set is one unit. Modules are numbers, and the root is ROOT."""

    def __init__(self, number: int) -> None:
        self._above = list(range(number))

    def of(self, each: int) -> int:
        while self._above[each] != each:
            self._above[each] = self._above[self._above[each]]
            each = self._above[each]
        return each

    def join(self, one: int, other: int) -> None:
        one, other = self.of(one), self.of(other)
        self._above[max(one, other)] = min(one, other)


ROOT = 0


class _Regions:
    """Assigns each module and parameter to the innermost chosen modules around it."""

    def __init__(self, tree: Tree, chosen: list[nn.Module], ignored: set[nn.Parameter]) -> None:
        self.tree = tree
        self.chosen = [tree.root, *chosen]
        self.number = {id(module): number for number, module in enumerate(self.chosen)}
        self.joined = _Joined(len(self.chosen))
        self.parents: list[set[int]] = [set() for _ in self.chosen]
        self.ties: list[tuple[str, int, int]] = []
        self._ignored = {id(parameter) for parameter in ignored}
        self._holds = self._find_holders()
        self._module_owners: dict[int, int] = {}
        self._parameter_owners: dict[int, int] = {}
        for number in range(len(self.chosen)):
            self._walk(number)

    def _find_holders(self) -> set[int]:
        """The ids of modules with parameters, at or below them, that no chosen module below them has."""
        holders: set[int] = set()
        parents: dict[int, list[nn.Module]] = collections.defaultdict(list)
        waiting: list[nn.Module] = []
        for module in self.tree.modules:
            for child in _children(module):
                parents[id(child)].append(module)
            if self._own_parameters(module):
                waiting.append(module)
        while waiting:
            module = waiting.pop()
            if id(module) not in holders:
                holders.add(id(module))
                if id(module) not in self.number:
                    waiting += parents[id(module)]
        return holders

    def _own_parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, parameter)
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) not in self._ignored
        ]

    def _walk(self, number: int) -> None:
        waiting = [self.chosen[number]]
        while waiting:
            module = waiting.pop()
            owner = self._module_owners.setdefault(id(module), number)
            if module is not self.chosen[number]:
                if id(module) in self.number:
                    self.parents[self.number[id(module)]].add(number)
                    continue
                if owner != number and id(module) in self._holds:
                    self._tie(self.tree.names[id(module)], owner, number)
                    continue
            for name, parameter in self._own_parameters(module):
                first = self._parameter_owners.setdefault(id(parameter), number)
                if first != number:
                    prefix = self.tree.names[id(module)]
                    self._tie(f"{prefix}.{name}" if prefix else name, first, number)
            waiting += reversed(_children(module))

    def _tie(self, name: str, one: int, other: int) -> None:
        self.ties.append((name, one, other))


def join_units(
    tree: Tree,
    candidates: list[list[nn.Module]],
    ignored: set[nn.Parameter],
    *,
    leaves_to_root: bool,
) -> tuple[list[list[nn.Module]], list[str]]:
    """Joins candidates that share parameters, and leaves to the root those that share with it.

    A module inside another one of its unit is not listed by itself. Gives the units, inner ones first,
    and lines for the start-up report: what was joined, and what was left to the root.
    """
    place_of: dict[int, int] = {}
    chosen: list[nn.Module] = []
    for place, candidate in enumerate(candidates):
        for module in candidate:
            if id(module) not in place_of:
                place_of[id(module)] = place
                chosen.append(module)
    chosen.sort(key=lambda module: tree.order[id(module)])
    regions = _Regions(tree, chosen, ignored)
    joined = regions.joined
    for _, one, other in regions.ties:
        if leaves_to_root or ROOT not in (one, other):
            joined.join(one, other)
    for candidate in candidates:
        # Modules of a candidate stay together, but one that is tied to the root leaves the others.
        free = [n for m in candidate if joined.of(n := regions.number[id(m)]) != ROOT]
        for number in free[1:]:
            joined.join(free[0], number)
    members: dict[int, list[int]] = {}
    for number in range(1, len(regions.chosen)):
        members.setdefault(joined.of(number), []).append(number)
    left = members.pop(ROOT, [])
    places = {
        group: max(place_of[id(regions.chosen[number])] for number in numbers)
        for group, numbers in members.items()
    }
    order, circular = _innermost_first(regions, places)
    if leaves_to_root:
        left += [number for group in circular for number in members[group]]
    else:
        order += circular  # fully_shard() refuses them
    units = []
    for group in order:
        outermost = [
            number
            for number in members[group]
            if any(joined.of(parent) != group for parent in regions.parents[number])
        ]
        units.append([regions.chosen[number] for number in outermost])
    return units, _notes(regions, members, order, left)


def _innermost_first(regions: _Regions, places: dict[int, int]) -> tuple[list[int], list[int]]:
    """Orders groups, inner ones first, else by place; also lists those that contain each other."""
    around: dict[int, set[int]] = {group: set() for group in places}
    num_inside = dict.fromkeys(places, 0)
    for number, parents in enumerate(regions.parents):
        group = regions.joined.of(number)
        if group not in places:
            continue
        for outer in {regions.joined.of(parent) for parent in parents}:
            if outer in places and outer != group and outer not in around[group]:
                around[group].add(outer)
                num_inside[outer] += 1
    ready = [(place, group) for group, place in places.items() if num_inside[group] == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, group = heapq.heappop(ready)
        order.append(group)
        for outer in around[group]:
            num_inside[outer] -= 1
            if num_inside[outer] == 0:
                heapq.heappush(ready, (places[outer], outer))
    return order, [group for group in places if num_inside[group] > 0]


def _notes(
    regions: _Regions, members: dict[int, list[int]], order: list[int], left: list[int]
) -> list[str]:
    shared: dict[int, list[str]] = {}
    for name, one, _ in regions.ties:
        shared.setdefault(regions.joined.of(one), []).append(name)

    def names(numbers: list[int]) -> str:
        return listed([regions.tree.names[id(regions.chosen[number])] for number in numbers])

    notes = [
        f"tied: {names(members[group])} are one unit; shared are {listed(shared[group])}"
        for group in order
        if group in shared
    ]
    if left:
        texts = [name for group, texts in shared.items() if group not in order for name in texts]
        notes.append(f"tied: {names(left)} left to the root; shared are {listed(texts)}")
    return notes


MAX_LISTED = 4


def listed(names: list[str]) -> str:
    """Writes the names in quotes; of many only the first few."""
    different = list(dict.fromkeys(names))
    text = ", ".join(f'"{name}"' for name in different[:MAX_LISTED])
    more = len(different) - MAX_LISTED
    return f"{text} and {more} more" if more > 0 else text
