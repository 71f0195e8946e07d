"""The modules of a model in order, and which chosen ones must be one unit. Linear in modules."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterable

from torch import nn


def has_forward(module: nn.Module) -> bool:
    """False for a ModuleList or ModuleDict, which cannot be a unit."""
    return type(module).forward is not nn.Module.forward


class Tree:
    """The modules of a model, each once, in the order of `modules()`.

    Attributes:
        order: position by id.
        names: by id; of a module in several places the first.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        named = list(root.named_modules())
        self.modules = [module for _, module in named]
        self.order = {id(module): position for position, module in enumerate(self.modules)}
        self.names = {id(module): name for name, module in named}

    def below(self, modules: Iterable[nn.Module]) -> set[int]:
        """The ids of `modules` and all that is in them."""
        found: set[int] = set()
        waiting = list(modules)
        while waiting:
            module = waiting.pop()
            if id(module) not in found:
                found.add(id(module))
                waiting += _children(module)
        return found

    def holders_of(self, chosen: set[int], *, strictly: bool = False) -> set[int]:
        """The ids of the modules with a chosen one in them; the chosen ones too, unless `strictly`."""
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
    """Sets of chosen modules that must be one unit; by number, the root's is ROOT."""

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
    """Which chosen modules hold each module and parameter without another chosen one in between."""

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
        """The ids of the modules that have parameters, at or below them, that no chosen one below has."""
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

    A module inside one that it is joined with is left to that. Gives the units, inner ones first, and
    what was joined or left: lines of the start-up report.
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
        # Together without need: what is tied to the root does not take the others there.
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
        order += circular  # fully_shard() refuses it
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
    """The groups so that none comes before one inside it, else by place; and those of a circle."""
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
    """The names in quotes; of many the first ones."""
    different = list(dict.fromkeys(names))
    text = ", ".join(f'"{name}"' for name in different[:MAX_LISTED])
    more = len(different) - MAX_LISTED
    return f"{text} and {more} more" if more > 0 else text
