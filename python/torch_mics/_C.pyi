"""Types of the C++ core. The contracts are in include/mics."""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

version: str
built_for_torch: str

class Error(RuntimeError): ...
class InvalidArgument(ValueError): ...
class InternalError(RuntimeError): ...
class CommError(RuntimeError): ...
class TimeoutError(CommError): ...

class Variant:
    @property
    def name(self) -> str: ...
    FLAT: Variant
    HIERARCHICAL: Variant
    def __hash__(self) -> int: ...

class Topology:
    def __init__(self, *, node_of_rank: Sequence[str], partition_size: int) -> None: ...
    @staticmethod
    def legal_partition_sizes(world_size: int, ranks_per_node: int) -> list[int]: ...
    @property
    def world_size(self) -> int: ...
    @property
    def partition_size(self) -> int: ...
    @property
    def replication_size(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def ranks_per_node(self) -> int: ...
    @property
    def spans_nodes(self) -> bool: ...
    @property
    def hierarchical_error(self) -> str: ...
    def node_of(self, world_rank: int) -> int: ...
    def partition_index(self, world_rank: int) -> int: ...
    def partition_rank(self, world_rank: int) -> int: ...
    def partition_group(self, world_rank: int) -> list[int]: ...
    def replication_group(self, world_rank: int) -> list[int]: ...
    def intra_group(self, world_rank: int, variant: Variant) -> list[int]: ...
    def rail_group(self, world_rank: int, variant: Variant) -> list[int]: ...
    def partition_groups(self) -> list[list[int]]: ...
    def replication_groups(self) -> list[list[int]]: ...
    def intra_groups(self, variant: Variant) -> list[list[int]]: ...
    def rail_groups(self, variant: Variant) -> list[list[int]]: ...
    def describe_nodes(self) -> str: ...

class ParameterLayout:
    num_rows: int
    row_numel: int
    chunk_rows: int
    chunk_numel: int
    shard_offset: int

class ShardLayout:
    def __init__(
        self, sizes: Sequence[Sequence[int]], *, partition_size: int, alignment: int
    ) -> None: ...
    @property
    def shard_numel(self) -> int: ...
    @property
    def payload_numel(self) -> int: ...
    @property
    def full_numel(self) -> int: ...
    @property
    def parameter_numel(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...
    def parameter(self, index: int) -> ParameterLayout: ...
    def rows_of(self, index: int, partition_rank: int) -> tuple[int, int]: ...

class Residency:
    SHARD: Residency
    BLOCK: Residency
    FULL: Residency
    @property
    def name(self) -> str: ...

class ResidencySettings:
    after_forward: Residency
    between_microsteps: Residency
    gradient_accumulation: Residency
    def __init__(self, **fields: Any) -> None: ...

class Link:
    latency: float
    bandwidth: float
    def __init__(self, **fields: Any) -> None: ...

class Machine:
    ranks_per_node: int
    launch: float
    rail_launch: float
    intra: Link
    inter: Link
    def __init__(self, **fields: Any) -> None: ...

def flat_seconds(machine: Machine, num_ranks: int, nbytes: float) -> float: ...
def rail_hop_seconds(machine: Machine, num_ranks: int, nbytes: float) -> float: ...
def intra_hop_seconds(machine: Machine, num_ranks: int, nbytes: float) -> float: ...

class MeasuredPoint:
    num_ranks: int
    nbytes: float
    seconds: float
    def __init__(self, **fields: Any) -> None: ...

class MeasuredTable:
    def __init__(self, points: Sequence[MeasuredPoint] = ...) -> None: ...
    @property
    def points(self) -> list[MeasuredPoint]: ...

class UnitWork:
    name: str
    num_units: int
    numel: int
    forward_flops: float
    saved_nbytes: float
    input_nbytes: float
    can_recompute: bool
    transient_nbytes: float
    def __init__(self, **fields: Any) -> None: ...

class Workload:
    units: list[UnitWork]
    tokens_per_sample: int
    width: int
    def __init__(self, **fields: Any) -> None: ...
    @property
    def numel(self) -> int: ...
    @property
    def num_units(self) -> int: ...
    def flops(self, *, recompute: bool) -> float: ...

class TransformerShape:
    hidden: int
    mlp: int
    layers: int
    heads: int
    vocabulary: int
    sequence: int
    mlp_matrices: int
    is_tied: bool
    has_fused_attention: bool
    def __init__(self, **fields: Any) -> None: ...

def transformer_workload(shape: TransformerShape) -> Workload: ...

class Contention:
    compute_by_network: float
    compute_by_intra: float
    network_by_compute: float
    def __init__(self, **fields: Any) -> None: ...

class Cluster:
    machine: Machine
    flat: MeasuredTable
    rail_hop: MeasuredTable
    intra_hop: MeasuredTable
    contention: Contention
    peak_flops: float
    efficiency: float
    memory_bandwidth: float
    def __init__(self, **fields: Any) -> None: ...

class GradientSync:
    TWO_HOP: GradientSync
    REPLICATE_EACH: GradientSync
    ALL_REDUCE_EACH: GradientSync
    @property
    def name(self) -> str: ...

class StepSettings:
    world_size: int
    partition_size: int
    gather: Variant
    reduce: Variant
    residency: ResidencySettings
    prefetch_rail: int
    prefetch_intra: int
    num_microsteps: int
    micro_batch: int
    recompute: bool
    overlap: bool
    overlap_replicate: bool
    sync: GradientSync
    parameter_nbytes: float
    gradient_nbytes: float
    replicate_nbytes: float
    def __init__(self, **fields: Any) -> None: ...

class StepTime:
    total: float
    compute: float
    contention: float
    exposed: float
    optimizer: float
    gather_rail: float
    gather_intra: float
    reduce_intra: float
    reduce_rail: float
    replicate: float
    is_extrapolated: bool
    def __init__(self, **fields: Any) -> None: ...

def step_time(workload: Workload, cluster: Cluster, settings: StepSettings) -> StepTime: ...
def step_time_bound(workload: Workload, cluster: Cluster, settings: StepSettings) -> float: ...

class MemoryLimits:
    capacity_nbytes: float
    usable: float
    context_nbytes: float
    communicator_nbytes: float
    state_nbytes: float
    bucket_nbytes: float
    def __init__(self, **fields: Any) -> None: ...

class MemoryTerms:
    states: float
    parameters_kept: float
    gradients_kept: float
    gathered: float
    staging: float
    unit_gradients: float
    activations: float
    recomputation: float
    head: float
    communicators: float
    forward_end: float
    backward: float
    peak: float
    def __init__(self, **fields: Any) -> None: ...

def step_memory(
    workload: Workload, cluster: Cluster, settings: StepSettings, limits: MemoryLimits
) -> MemoryTerms: ...
def fits(memory: MemoryTerms, limits: MemoryLimits) -> bool: ...

class PlanRequest:
    workload: Workload
    cluster: Cluster
    limits: MemoryLimits
    world_size: int
    global_batch: int
    partition_sizes: list[int]
    micro_batches: list[int]
    variants: list[Variant]
    recompute: list[bool]
    vary_residency: bool
    vary_prefetch: bool
    base: StepSettings
    num_ranked: int
    def __init__(self, **fields: Any) -> None: ...

class Candidate:
    settings: StepSettings
    time: StepTime
    memory: MemoryTerms
    def __init__(self, **fields: Any) -> None: ...

class PlanResult:
    ranked: list[Candidate]
    leaders: list[Candidate]
    misses: list[Candidate]
    num_considered: int
    num_fitting: int
    num_simulated: int
    def __init__(self, **fields: Any) -> None: ...

def plan_step(request: PlanRequest) -> PlanResult: ...

class HopCounts:
    gather_rail: int
    gather_intra: int
    reduce_intra: int
    reduce_rail: int
    replicate: int
    def __init__(self, **fields: Any) -> None: ...

class UnitSize:
    shard_numel: int
    payload_numel: int
    gradient_shard_numel: int
    gradient_payload_numel: int
    parameter_nbytes: int
    gradient_nbytes: int
    replicate_nbytes: int
    def __init__(self, **fields: Any) -> None: ...

class StepBytes:
    gather_rail: int
    gather_intra: int
    reduce_rail: int
    reduce_intra: int
    replicate: int
    def __init__(self, **fields: Any) -> None: ...

def count_hops(
    residency: ResidencySettings, num_microsteps: int, replication_size: int
) -> HopCounts: ...
def step_bytes(
    unit: UnitSize, shape: tuple[int, int], replication_size: int, hops: HopCounts
) -> StepBytes: ...
def layout_alignment(parameter_dtype: torch.dtype, reduce_dtype: torch.dtype) -> int: ...

class Traffic:
    calls: int
    sent_intra_nbytes: int
    sent_inter_nbytes: int
    received_intra_nbytes: int
    received_inter_nbytes: int

class LoggedOperation:
    @property
    def number(self) -> int: ...
    @property
    def group(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def issued_at(self) -> float: ...
    @property
    def started_at(self) -> float | None: ...
    @property
    def ended_at(self) -> float | None: ...

class FlightLog:
    def operations(self) -> list[LoggedOperation]: ...
    def begin_incident(self) -> None: ...

def make_reporting_log(
    store: dist.Store,
    *,
    rank: int,
    world_size: int,
    interval: datetime.timedelta,
    patience: datetime.timedelta,
) -> FlightLog: ...

class Communicator:
    @property
    def name(self) -> str: ...
    @property
    def world_ranks(self) -> list[int]: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def gathers_in_ring(self) -> bool: ...
    @property
    def reduces_in_ring(self) -> bool: ...
    @property
    def traffic(self) -> Traffic: ...
    def all_gather(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> None: ...
    def reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> None: ...
    def all_reduce(self, tensor: torch.Tensor) -> None: ...
    def set_flight_log(self, log: FlightLog) -> None: ...
    @property
    def staging_nbytes(self) -> int: ...
    def barrier(self) -> None: ...

class LocalWorld:
    def __init__(self, world_size: int, *, timeout: datetime.timedelta) -> None: ...
    def make_communicator(
        self, *, name: str, world_ranks: Sequence[int], nodes: Sequence[int], rank: int
    ) -> Communicator: ...

def make_c10d_communicator(
    process_group: dist.ProcessGroup,
    *,
    name: str,
    world_ranks: Sequence[int],
    nodes: Sequence[int],
    rank: int,
    timeout: datetime.timedelta,
) -> Communicator: ...

class NcclVersions:
    @property
    def header(self) -> int: ...
    @property
    def library(self) -> int: ...
    @property
    def cuda_header(self) -> int: ...
    @property
    def cuda_runtime(self) -> int: ...
    @property
    def num_devices(self) -> int: ...
    @property
    def problem(self) -> str: ...

def nccl_versions() -> NcclVersions: ...

class NcclRegistration:
    NONE: NcclRegistration
    BUFFERS: NcclRegistration
    WINDOWS: NcclRegistration

class NcclWorld:
    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        device: int,
        host: str,
        timeout: datetime.timedelta,
        registration: NcclRegistration,
        copy_engine: bool,
        max_in_flight: int,
        max_ctas: int,
    ) -> None: ...
    def make_communicator(
        self,
        *,
        name: str,
        world_ranks: Sequence[int],
        nodes: Sequence[int],
        rank: int,
        only_gathers: bool,
    ) -> Communicator: ...
    def make_streams(self) -> RuntimeStreams: ...
    def close(self, patience: datetime.timedelta) -> None: ...
    def notes(self) -> list[str]: ...

class ShmGroup:
    def __init__(
        self,
        segment: str,
        *,
        creates: bool,
        name: str,
        world_ranks: Sequence[int],
        nodes: Sequence[int],
        rank: int,
        timeout: datetime.timedelta,
    ) -> None: ...
    def make_communicator(self) -> Communicator: ...
    @property
    def has_failed(self) -> bool: ...

def make_shm_segment_name() -> str: ...
def remove_stale_shm_segments() -> int: ...
def shm_host_identity() -> str: ...
def make_part(buffer: torch.Tensor, offset: int, sizes: Sequence[int]) -> torch.Tensor: ...
def distance_between(first: torch.Tensor, second: torch.Tensor) -> int | None: ...
def span_from(first: torch.Tensor, numel: int) -> torch.Tensor: ...

class ParameterRegistration:
    def __init__(self) -> None: ...
    def add(
        self,
        parameters: dict[str, torch.nn.Parameter | None],
        key: str,
        *,
        sharded: torch.Tensor,
        full: torch.Tensor,
        name: str,
    ) -> None: ...

class UnitParameter:
    def __init__(
        self,
        *,
        name: str,
        sizes: Sequence[int],
        sharded: torch.Tensor,
        local: torch.Tensor,
        gradient: torch.Tensor | None,
    ) -> None: ...

class UnitSettings:
    residency: ResidencySettings
    unshard_in_backward: bool
    reduce_gradients: bool
    synchronize_gradients: bool
    gradient_factor: float

class Unit:
    def __init__(
        self,
        *,
        name: str,
        parameters: Sequence[UnitParameter],
        shard: torch.Tensor,
        gradient: torch.Tensor,
        parameter_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        partition_size: int,
        has_nested_units: bool,
        gather_rail: Communicator | None,
        gather_intra: Communicator,
        reduce_rail: Communicator | None,
        reduce_intra: Communicator,
        replicate: Communicator | None,
    ) -> None: ...
    name: str
    @property
    def layout(self) -> ShardLayout: ...
    @property
    def gradient_layout(self) -> ShardLayout: ...
    @property
    def settings(self) -> UnitSettings: ...
    @property
    def is_unsharded(self) -> bool: ...
    @property
    def has_accumulated(self) -> bool: ...
    @property
    def has_full_gradient(self) -> bool: ...
    @property
    def is_accumulating(self) -> bool: ...
    @property
    def is_lent(self) -> bool: ...
    def matches_requires_grad(self) -> bool: ...
    def full_views(self) -> list[torch.Tensor]: ...
    def set_full_parameters(self, full_parameters: Sequence[torch.Tensor]) -> None: ...
    def set_registration(self, registration: ParameterRegistration) -> None: ...
    def set_gradient_hook(self, hook: Callable[[torch.Tensor], None]) -> None: ...

class RuntimeStreams:
    def __init__(self, *, on_threads: bool) -> None: ...

class Phase:
    FORWARD: Phase
    BACKWARD: Phase

class ExposedTime:
    @property
    def gather(self) -> datetime.timedelta: ...
    @property
    def reduce(self) -> datetime.timedelta: ...

class Depths:
    intra: int
    rail: int
    reductions: int
    def __init__(self) -> None: ...

class MemoryPart:
    @property
    def name(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class RuntimeMemory:
    @property
    def parts(self) -> list[MemoryPart]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_grown(self) -> int: ...
    @property
    def grown_nbytes(self) -> int: ...

class Engine:
    def __init__(
        self,
        units: Sequence[Unit],
        *,
        control: Communicator | None,
        streams: RuntimeStreams,
        depths: Depths,
    ) -> None: ...
    def pre_forward(self, unit: int) -> None: ...
    def watch_outputs(self, unit: int, outputs: Sequence[torch.Tensor]) -> None: ...
    def post_forward(self, unit: int, *, failed: bool) -> None: ...
    def unshard(self, unit: int) -> None: ...
    def reshard(self, unit: int) -> None: ...
    def prefetch(self, unit: int) -> None: ...
    def lend(self, unit: int, *, is_group: bool) -> None: ...
    def note_written(self, units: Sequence[int]) -> None: ...
    @property
    def is_in_forward(self) -> bool: ...
    def set_prefetch(self, phase: Phase, unit: int, ahead: Sequence[int]) -> None: ...
    def set_depths(self, depths: Depths) -> None: ...
    def finish_backward(self) -> None: ...
    def set_manual_finalization(self, is_manual: bool) -> None: ...
    def unfinished_units(self) -> list[str]: ...
    def matches_requires_grad(self) -> bool: ...
    def change_trainable(
        self, unit: int, gradients: Sequence[torch.Tensor | None], gradient: torch.Tensor
    ) -> None: ...
    def adopt(self, older: Engine, units: Sequence[int]) -> None: ...
    def set_callbacks(
        self, *, refresh: Callable[[], None], check_hooks: Callable[[], None]
    ) -> None: ...
    def drop_gradients(self, unit: int) -> None: ...
    def release_memory(self) -> None: ...
    def memory(self) -> RuntimeMemory: ...
    @property
    def num_order_changes(self) -> int: ...
    def exposed(self, unit: int) -> ExposedTime: ...
    def reset(self) -> None: ...

def has_forward_failed(output: object) -> bool: ...

class UnitHooks:
    def __init__(
        self,
        *,
        long_pre_forward: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any],
        long_post_forward: Callable[[nn.Module, Any, Any], Any],
        find_tensors: Callable[[Any], list[torch.Tensor]],
    ) -> None: ...
    def connect(
        self, engine: Engine, units: Sequence[int], *, input_dtype: torch.dtype | None
    ) -> None: ...
    def disconnect(self) -> None: ...
    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...
    def post_forward(self, module: nn.Module, args: Any, output: Any) -> Any: ...

class AdamWRun:
    def __init__(
        self,
        *,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        max_exp_avg_sq: torch.Tensor | None,
    ) -> None: ...

class SgdRun:
    def __init__(
        self,
        *,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        momentum_buffer: torch.Tensor | None,
    ) -> None: ...

def join_neighbours(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...
def gradients_are(parameters: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> bool: ...
def entries_are(triples: list[tuple[dict[str, Any], str, torch.Tensor]]) -> bool: ...
def adamw_step(
    runs: Sequence[AdamWRun],
    steps: Sequence[float],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None: ...
def sgd_step(
    runs: Sequence[SgdRun],
    is_first: Sequence[bool],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None: ...
