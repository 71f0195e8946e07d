"""torch.compile of blocks inside units and of whole models: the same numbers, breaks at borders only."""

from __future__ import annotations

from typing import Any

import torch
from support.bodies import (
    Layer,
    Stack,
    expect_gradients,
    expect_step,
    make,
    on_ranks,
    train_alone,
    value_of,
)

import torch_mics as mics


class GraphCounter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        self.graphs.append(graph)
        return graph.forward


def train_and_compare(world: Any, model: Any, steps: int = 3) -> None:
    plain = make(Stack)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for _ in range(steps):
        expect_step(world, model, plain)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def train_and_compare_renamed(world: Any, model: Any) -> None:
    """As train_and_compare: torch.compile() puts "_orig_mod" into the names of parameters."""
    plain = make(Stack)
    for _ in range(3):
        value_of(model, world.rank).backward()
        train_alone(plain, value_of)
        right = {name: parameter.grad for name, parameter in plain.named_parameters()}
        for name, parameter in model.named_parameters():
            full = parameter.grad.full_tensor()
            torch.testing.assert_close(full, right[name.replace("_orig_mod.", "")])


def reset() -> None:
    torch._dynamo.reset()


@on_ranks()
def test_block_compiled_before_it_is_sharded_is_one_graph(world):
    reset()
    counter = GraphCounter()
    model = make(Stack)
    for index, layer in enumerate(model.layers):
        # fullgraph: a break inside the block would raise.
        compiled: Any = torch.compile(layer, backend=counter, fullgraph=True)
        mics.fully_shard(compiled, mesh=world.mesh)
        model.layers[index] = compiled
    mics.fully_shard(model, mesh=world.mesh)
    train_and_compare_renamed(world, model)
    # One graph serves all blocks and steps, or one per block; never more.
    assert 1 <= len(counter.graphs) <= len(model.layers)


@on_ranks()
def test_block_compiled_in_place_runs_between_its_hooks(world):
    reset()
    counter = GraphCounter()
    model = make(Stack)
    for layer in model.layers:
        layer.compile(backend=counter)
        mics.fully_shard(layer, mesh=world.mesh)
    mics.fully_shard(model, mesh=world.mesh)
    train_and_compare(world, model)
    assert counter.graphs


@on_ranks()
def test_whole_model_compiled_breaks_at_unit_borders_only(world):
    reset()
    counter = GraphCounter()
    model = make(Stack)
    for layer in model.layers:
        mics.fully_shard(layer, mesh=world.mesh)
    mics.fully_shard(model, mesh=world.mesh)
    compiled: Any = torch.compile(model, backend=counter)
    plain = make(Stack)
    for _ in range(3):
        value_of(compiled, world.rank).backward()
        train_alone(plain, value_of)
        expect_gradients(world, model, plain)
    # Every graph that holds a block's work holds all of it.
    linears = [
        sum("linear" in str(node.target) for node in graph.graph.nodes) for graph in counter.graphs
    ]
    per_block = sum(isinstance(module, torch.nn.Linear) for module in Layer().modules())
    assert set(linears) <= {0, 1, per_block}, linears
    assert per_block in linears
