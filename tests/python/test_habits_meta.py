"""First values of models as people write them: what one process computes, or names.

Each model is built in one process and on the meta device, both from the same seed.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics
from torch_mics._standins import Slot

SEED = 5


class Base(nn.Module):
    """Runs its children one after the other; no test looks at what comes out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


# --- constructors that set values -----------------------------------------------------------------


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


# --- parents that write into their children -------------------------------------------------------


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


# --- constructors that initialise by a function ---------------------------------------------------


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


# --- buffers --------------------------------------------------------------------------------------


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


# --- ties -----------------------------------------------------------------------------------------


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


def run_recorded(rank: int, shard_size: int) -> dict[str, list[str]]:
    found = {}
    for cls in MODELS:
        torch.manual_seed(SEED + rank)
        with mics.meta_device():
            model = cls()
            if isinstance(model, GoesByNames):
                model.apply(model._init_weights)
        mics.fully_shard(model, shard_size=shard_size)
        # The random state of rank 0 where the model was built counts.
        torch.manual_seed(77)
        mics.materialize(model)
        found[cls.__name__] = differences(model, build(cls))
        if cls is Rotates:
            assert model.first.data_ptr() == model.frequencies.data_ptr()
        if cls is HoldsLooseTensors:
            assert model.angles.tolist() == [0, 1, 2, 3]
            assert model.tables[0].tolist() == [1, 1]
    return found


@pytest.mark.parametrize(("ranks", "shard_size"), [(2, 2), (4, 4), (4, 2)])
def test_recorded_construction_gives_the_bits_of_one_process(ranks: int, shard_size: int) -> None:
    nothing = {cls.__name__: [] for cls in MODELS}
    assert run_ranks(ranks, run_recorded, shard_size) == [nothing] * ranks


def run_unrecorded(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls, expected in MODELS.items():
        if not expected:
            continue
        with torch.device("meta"):
            model = cls()
        for child in model.children():
            if type(child) is nn.Linear:
                mics.fully_shard(child, shard_size="world")
        mics.fully_shard(model, shard_size="world")
        torch.manual_seed(SEED + rank)
        try:
            mics.materialize(model)
            found[cls.__name__] = differences(model, build(cls))
        except ValueError as error:
            found[cls.__name__] = str(error)
            assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_unrecorded_construction_is_right_or_named(ranks: int) -> None:
    for found in run_ranks(ranks, run_unrecorded):
        for cls, (verdict, *names) in ((c, e) for c, e in MODELS.items() if e):
            outcome = found[cls.__name__]
            if verdict == RIGHT:
                assert outcome == [], cls.__name__
            else:
                assert "torch_mics.meta_device()" in outcome, (cls.__name__, outcome)
                assert all(name in outcome for name in names), (cls.__name__, outcome)


# --- more than one random stream ------------------------------------------------------------------


class SeedsItself(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.noise = torch.randn(2, device="cpu").shape[0]
        self.fourth = nn.Linear(4, 4)


def run_streams(rank: int) -> list[str]:
    torch.manual_seed(SEED)
    with mics.meta_device():
        first = SeedsItself()
    with mics.meta_device():
        second = nn.Linear(4, 4)
    model = nn.Sequential(first, second)
    mics.fully_shard(model, shard_size="world")
    mics.materialize(model)
    return differences(model, build(lambda: nn.Sequential(SeedsItself(), nn.Linear(4, 4))))


def test_random_stream_goes_on_where_one_process_would() -> None:
    assert run_ranks(2, run_streams) == [[], []]


# --- tensors outside the meta device --------------------------------------------------------------


class Mixed(Base):
    """Some of its tensors are made outside the meta device, whatever the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.gain = nn.Parameter(torch.full((6,), 2.0, device="cpu"))
        self.table = nn.Parameter(torch.arange(20.0, device="cpu").view(5, 4))
        self.linear.bias = nn.Parameter(torch.full((6,), -1.0, device="cpu"))
        self.register_buffer("count", torch.full((2,), 7, device="cpu"))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)
        self.count.zero_()


def mixed(recorded: bool) -> nn.Module:
    with mics.meta_device() if recorded else torch.device("meta"):
        return Mixed()


def run_mixed(rank: int) -> None:
    for recorded in (False, True):
        torch.manual_seed(SEED)
        model = mics.fully_shard(mixed(recorded), shard_size="world")
        mics.materialize(model)
        assert differences(model, build(Mixed)) == []
        model(torch.ones(1, 4))
    for strict in (True, False):
        model = mics.fully_shard(mixed(False), shard_size="world")
        plain = build(Mixed)
        if strict:
            with torch.no_grad():
                plain.table.add_(1)
        source = mics.fully_shard(copy.deepcopy(plain), shard_size="world").state_dict()
        if not strict:
            source = {"linear.weight": source["linear.weight"]}
        model.load_state_dict(source, assign=True, strict=strict)
        assert differences(model, plain) == []
        assert all(not parameter.is_meta for parameter in model.parameters())


def run_loaded_first(rank: int, recorded: bool) -> None:
    with mics.meta_device() if recorded else torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    plain = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)))
    with torch.no_grad():
        plain[0].weight.fill_(3)
        plain[0].bias.fill_(4)
    for child in model:
        mics.fully_shard(child, shard_size="world")
    mics.fully_shard(model, shard_size="world")
    source = mics.fully_shard(copy.deepcopy(plain)[0], shard_size="world").state_dict()
    model[0].load_state_dict(source, assign=True)
    torch.manual_seed(SEED)
    mics.materialize(model)
    assert differences(model[0], plain[0]) == []
    assert 0 < model[1].weight.full_tensor().std() < 1


@pytest.mark.parametrize("recorded", [False, True])
def test_parameters_that_were_loaded_before_keep_their_values(recorded: bool) -> None:
    run_ranks(2, run_loaded_first, recorded)


@pytest.mark.parametrize("ranks", [2, 4])
def test_parameters_outside_the_meta_device_keep_their_values(ranks: int) -> None:
    run_ranks(ranks, run_mixed)


# --- what init_fn leaves, and a second try --------------------------------------------------------


def fill_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        with torch.no_grad():
            module.weight.data.fill_(0.5)
            module.bias = nn.Parameter(torch.full_like(module.bias, 0.25))


def fill_all(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.constant_(parameter, 0.5)


def run_init_fn(rank: int) -> str:
    with torch.device("meta"):
        model = ScalesAfterwards()
    mics.fully_shard(model, shard_size="world")
    mics.materialize(model, init_fn=fill_linear)
    values = mics.full_state_dict(model, rank0_only=False)
    assert (values["up.weight"] == 0.5).all()
    assert (values["down.bias"] == 0.25).all()
    assert (values["norm.weight"] == 1).all()
    assert (values["norm.bias"] == 0).all()

    with torch.device("meta"):
        model = SetsValues()
    mics.fully_shard(model, shard_size="world")
    try:
        mics.materialize(model, init_fn=fill_linear)
    except ValueError as error:
        text = str(error)
    mics.materialize(model, init_fn=fill_all)
    assert all((value == 0.5).all() for value in mics.full_state_dict(model).values())
    return text


@pytest.mark.parametrize("ranks", [2, 4])
def test_init_fn_is_asked_first_and_may_be_tried_again(ranks: int) -> None:
    for text in run_ranks(ranks, run_init_fn):
        assert "needs an initialiser" in text
        assert "ramp" in text


def partly(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight[:1])
        nn.init.zeros_(module.bias)


def run_partly(rank: int) -> str:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
    mics.fully_shard(model, shard_size="world")
    try:
        mics.materialize(model, init_fn=partly)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_parameter_written_in_part_is_named_on_every_rank() -> None:
    for text in run_ranks(4, run_partly):
        assert "0.weight, 1.weight" in text


def run_fails(rank: int) -> str:
    def fails(module: nn.Module) -> None:
        raise RuntimeError("no luck")

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 8))
    mics.fully_shard(model, shard_size="world")
    try:
        mics.materialize(model, init_fn=fails)
    except ValueError as error:
        assert all(parameter.is_meta for parameter in model.parameters())
        return str(error)
    return "nothing"


def run_ignored(rank: int) -> str:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
    mics.fully_shard(model, shard_size="world", ignored_params={model[0].bias})
    try:
        mics.materialize(model)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_initialiser_that_raises_and_ignored_parameter_are_named() -> None:
    for text in run_ranks(2, run_fails):
        assert "RuntimeError: no luck (0)" in text
        assert "Pass init_fn" in text
    for text in run_ranks(2, run_ignored):
        assert "got 0.bias on the meta device" in text


def run_tied(rank: int) -> list[str]:
    with torch.device("meta"):
        model = TiesHead()
    mics.fully_shard(model, shard_size="world")
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch_mics").addHandler(handler)
    mics.materialize(model)
    logging.getLogger("torch_mics").removeHandler(handler)
    return texts


def test_tie_of_two_initialisers_is_told_of() -> None:
    first, second = run_ranks(2, run_tied)
    assert "tokens.weight" in first[0]
    assert "torch_mics.meta_device()" in first[0]
    assert second == []


# --- memory ---------------------------------------------------------------------------------------


class Deep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            for parameter in self.parameters():
                nn.init.normal_(parameter.data)


def run_memory(rank: int, recorded: bool) -> tuple[int, int]:
    """The most bytes of full parameters at once, and those of the largest unit."""
    most = 0
    hold = Slot._hold

    def watched(slot: Slot) -> None:
        nonlocal most
        hold(slot)
        most = max(most, sum(other.nbytes for other in slot.values.held.values()))

    with mics.meta_device() if recorded else torch.device("meta"):
        model = Deep()
        if recorded:
            model.apply(small)
    mics.shard_model(model, units={nn.Linear}, shard_size="world")
    with mock.patch.object(Slot, "_hold", watched):
        mics.materialize(model)
    return most, 4 * (32 * 32 + 32)


@pytest.mark.parametrize("recorded", [False, True])
def test_full_parameters_take_no_more_than_the_largest_unit(recorded: bool) -> None:
    for most, largest in run_ranks(2, run_memory, recorded):
        assert 0 < most <= largest


# --- Hugging Face ---------------------------------------------------------------------------------

# The kind, the class and sizes of its configuration.
WIDE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 128}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 128}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", GPT | IDS),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", GPT),
    "LlamaForCausalLM": (
        "LlamaConfig",
        WIDE | IDS | {"intermediate_size": 64, "num_key_value_heads": 2},
    ),
    "BertForMaskedLM": ("BertConfig", WIDE | {"intermediate_size": 64}),
    "ModernBertForMaskedLM": (
        "ModernBertConfig",
        WIDE | IDS | {"intermediate_size": 64, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "MambaForCausalLM": ("MambaConfig", WIDE | IDS | {"state_size": 8, "time_step_rank": 4}),
    "DiffLlamaForCausalLM": (
        "DiffLlamaConfig",
        WIDE | IDS | {"intermediate_size": 64, "num_key_value_heads": 2},
    ),
    "XLNetLMHeadModel": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "SiglipModel": ("SiglipConfig", {}),
    "Data2VecTextForMaskedLM": ("Data2VecTextConfig", WIDE | IDS | {"intermediate_size": 64}),
}


def of_transformers(name: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config_name, sizes = ARCHITECTURES[name]
    config_class = getattr(transformers, config_name)
    if name == "SiglipModel":
        tower = {k: v for k, v in WIDE.items() if k != "vocab_size"} | {"intermediate_size": 64}
        vision = tower | {"image_size": 32, "patch_size": 8}
        config = config_class(text_config=tower | {"vocab_size": 128}, vision_config=vision)
    else:
        config = config_class(**sizes)
    torch.manual_seed(SEED)
    return getattr(transformers, name)(config)


def unlike(model: nn.Module, plain: nn.Module) -> list[str]:
    """Buffers that differ, and parameters that differ in mean or spread. Collective."""
    found = [
        name
        for name, right in plain.named_buffers()
        if not torch.equal(model.get_buffer(name), right)
    ]
    for name, right in plain.named_parameters():
        if name == "transformer.mask_emb":
            continue  # XLNet's constructor leaves it as memory was
        value, right = model.get_parameter(name).detach().full_tensor(), right.detach()
        if right.numel() < 2 or right.std() == 0:
            same = torch.equal(value, right)
        else:
            # The spread of n draws is known to 1/sqrt(2n): 5 of these.
            tolerance = 5 / math.sqrt(2 * right.numel()) * 2
            same = bool(abs(value.std() / right.std() - 1) < tolerance)
        if not same:
            found.append(f"{name}: {value.mean():.3g} and {value.std():.3g}")
    return found


def run_transformers(rank: int, recorded: bool) -> dict[str, list[str]]:
    found = {}
    for name in ARCHITECTURES:
        with mics.meta_device() if recorded else torch.device("meta"):
            model = of_transformers(name)
        mics.shard_model(model, shard_size="world")
        mics.materialize(model)
        found[name] = unlike(model, of_transformers(name))
        if name == "LlamaForCausalLM":
            model(input_ids=torch.arange(8).view(1, 8)).logits.sum().backward()
    return found


def run_real_part(rank: int) -> bool:
    with torch.device("meta"):
        model = of_transformers("LlamaForCausalLM")
    weight = torch.arange(128.0 * 32).view(128, 32)
    model.model.embed_tokens = nn.Embedding.from_pretrained(weight)
    mics.shard_model(model, shard_size="world")
    mics.materialize(model)
    return torch.equal(model.model.embed_tokens.weight.full_tensor(), weight)


def test_part_that_was_put_in_with_values_keeps_them() -> None:
    assert run_ranks(2, run_real_part) == [True, True]


@pytest.mark.parametrize("recorded", [False, True])
def test_architectures_of_transformers_start_as_in_one_process(recorded: bool) -> None:
    nothing = {name: [] for name in ARCHITECTURES}
    assert run_ranks(2, run_transformers, recorded) == [nothing] * 2
