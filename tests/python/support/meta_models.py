"""Models whose constructors set values in the ways that people write them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

SEED = 5


class Base(nn.Module):
    """Runs its children one after the other; no test looks at what comes out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


class SetsValues(Base):
    def __init__(self) -> None:
        super().__init__()
        self.ramp = nn.Parameter(torch.linspace(0, 1, 7))
        self.noise = nn.Parameter(torch.randn(5, 6) * 0.1)
        self.logs = nn.Parameter(torch.log(torch.arange(1, 9).float()).repeat(4, 1))
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0], requires_grad=True))
        self.copied = nn.Parameter(torch.empty(4))
        with torch.no_grad():
            self.copied.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))


class SetsSlices(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.empty(9, 3))
        nn.init.normal_(self.gates)
        with torch.no_grad():
            self.gates[3:6].fill_(1.0)
            self.gates.t()[0].zero_()


class SetsData(Base):
    """`.data` leaves no trace on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.linear.weight.data.normal_(0, 0.02)
        self.linear.bias.data.fill_(3)


class ReplacesParameters(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.linear.weight = nn.Parameter(torch.eye(6))
        self.linear.bias = nn.Parameter(torch.full((6,), -1.0))


class ReplacesOne(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.linear.weight = nn.Parameter(torch.eye(6))


class ClonesLayers(Base):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(5, 5)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ScalesAfterwards(Base):
    """GPT-2's way: apply() first, then some of the projections again."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.norm = nn.LayerNorm(6)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name == "down.weight":
                nn.init.normal_(parameter, std=0.02 / math.sqrt(8))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class ResetsChildren(Base):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.key = nn.Linear(6, 6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.query.weight)
        nn.init.constant_(self.key.bias, 0.25)


class OwnsAndResets(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ResetsChildren()
        self.weight = nn.Parameter(torch.empty(6))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight)
        self.inner.query.bias.data.copy_(self.weight.data)


class ResetsWhatIsEmpty(Base):
    """Its constructor leaves memory as it is; a caller is to reset it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.empty(6))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Transforms(Base):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 2, 8, batch_first=True)


class NormalisesWeights(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))


class Attends(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


def small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.01)


class AppliesFunction(Base):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 6, padding_idx=0)
        self.head = nn.Linear(6, 12)
        self.apply(small)


class AppliesMethod(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class GoesByNames(Base):
    """Old code asks for the name of the class, which sharding changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def _init_weights(self, module: nn.Module) -> None:
        if type(module).__name__ == "Linear":
            nn.init.ones_(module.weight)
        if type(module).__name__ == "GoesByNames":
            nn.init.constant_(module.linear.bias, 2)


class AppliesOrthogonal(Base):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 6)
        for parameter in self.recurrent.parameters():
            if parameter.ndim == 2:
                nn.init.orthogonal_(parameter)


class Rotates(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        frequencies = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("first", self.frequencies, persistent=False)


class Masks(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril())
        self.register_buffer("positions", torch.arange(6).expand((1, -1)), persistent=False)
        self.register_buffer("slot", torch.tensor(3, dtype=torch.uint8))


class Normalises(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("noise", torch.randn(3))
        self.register_buffer("nothing", None)


class HoldsLooseTensors(Base):
    """Plain attributes are no buffers, and forward uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.angles = torch.arange(4.0)
        self.tables = [torch.ones(2), "name"]


class TiesHead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight


class TiesTokens(Base):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.tokens.weight = self.head.weight


class TiesLayers(Base):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(6, 6)
        self.first, self.second = layer, nn.Linear(6, 6)
        self.second.bias = self.first.bias
        self.again = layer


RIGHT, NAMED = "right", "named"
# What materialize() gives a model that was built under torch.device("meta"), without a record.
MODELS: dict[type[Base], tuple[str, ...]] = {
    SetsValues: (NAMED, "ramp", "noise", "logs", "scale", "copied"),
    SetsSlices: (NAMED, "gates"),
    SetsData: (),
    ReplacesParameters: (),
    ReplacesOne: (NAMED, "linear.weight"),
    ClonesLayers: (),
    ScalesAfterwards: (NAMED, "down.weight"),
    ResetsChildren: (RIGHT,),
    OwnsAndResets: (RIGHT,),
    Attends: (RIGHT,),
    AppliesFunction: (NAMED, "tokens.weight", "head.weight"),
    AppliesMethod: (NAMED, "layers.0.weight", "layers.2.bias"),
    GoesByNames: (RIGHT,),
    AppliesOrthogonal: (NAMED, "recurrent.weight_hh_l0"),
    Rotates: (NAMED, "frequencies", "first"),
    Masks: (NAMED, "mask", "positions", "slot"),
    Normalises: (NAMED, "noise"),
    HoldsLooseTensors: (NAMED, "angles", "tables"),
    ResetsWhatIsEmpty: (RIGHT,),
    Transforms: (),
    NormalisesWeights: (NAMED, "linear.parametrizations.weight.original0"),
    TiesHead: (),
    TiesTokens: (),
    TiesLayers: (),
}


def build(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    built = model()
    if isinstance(built, ResetsWhatIsEmpty):
        built.reset_parameters()
    if isinstance(built, GoesByNames):
        built.apply(built._init_weights)
    return built


def differences(model: nn.Module, plain: nn.Module) -> list[str]:
    """Names of parameters and buffers that differ in a bit. Collective."""
    found = []
    for name, right in plain.named_parameters():
        value = model.get_parameter(name).detach().full_tensor()
        if not torch.equal(value, right.detach()):
            found.append(name)
    for name, right in plain.named_buffers():
        value = model.get_buffer(name)
        if value.is_meta or value.dtype != right.dtype or not torch.equal(value, right):
            found.append(name)
    return found
