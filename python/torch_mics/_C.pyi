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
class RaceError(RuntimeError): ...
class CommError(RuntimeError): ...
class TimeoutError(CommError): ...

class Variant:
    """How the collectives of a partition group over several nodes run."""

    @property
    def name(self) -> str: ...
    FLAT: Variant
    HIERARCHICAL: Variant
    def __hash__(self) -> int: ...

class Topology:
    """The groups of every rank, from the nodes of the ranks and the partition size."""

    def __init__(self, *, node_of_rank: Sequence[str], partition_size: int) -> None: ...
    @staticmethod
    def legal_partition_sizes(world_size: int, ranks_per_node: int) -> list[int]:
        """Every legal partition size; `ranks_per_node` 0: irregular nodes."""
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
    def node_of(self, world_rank: int) -> int:
        """Index of the node of a rank."""
    def partition_index(self, world_rank: int) -> int:
        """Which partition group the rank is in."""
    def partition_rank(self, world_rank: int) -> int:
        """Which member of its partition group the rank is."""
    def partition_group(self, world_rank: int) -> list[int]:
        """Ranks that share one copy of the model states with the rank."""
    def replication_group(self, world_rank: int) -> list[int]:
        """Ranks that hold the same shard as the rank."""
    def intra_group(self, world_rank: int, variant: Variant) -> list[int]:
        """Ranks of hop 2 of a gather."""
    def rail_group(self, world_rank: int, variant: Variant) -> list[int]:
        """Ranks of hop 1 of a gather."""
    def partition_groups(self) -> list[list[int]]:
        """All partition groups."""
    def replication_groups(self) -> list[list[int]]:
        """All replication groups."""
    def intra_groups(self, variant: Variant) -> list[list[int]]:
        """The hop-2 groups of all ranks."""
    def rail_groups(self, variant: Variant) -> list[list[int]]:
        """The hop-1 groups of all ranks."""
    def describe_nodes(self) -> str:
        """The map of ranks to nodes, as messages print it."""

class ParameterLayout:
    """Where one parameter lies; offsets and lengths in elements."""

    num_rows: int
    row_numel: int
    chunk_rows: int
    chunk_numel: int
    shard_offset: int

class ShardLayout:
    """Where the parameters of a unit lie in its shard and in its full buffer."""

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
    def parameter(self, index: int) -> ParameterLayout:
        """Where parameter `index` lies."""
    def rows_of(self, index: int, partition_rank: int) -> tuple[int, int]:
        """Rows [first, last) that a rank owns of a parameter."""

class Residency:
    """What of a unit stays in memory between two uses."""

    SHARD: Residency
    BLOCK: Residency
    FULL: Residency
    @property
    def name(self) -> str: ...

class ResidencySettings:
    """What of a unit stays after forward, between micro-steps, and of its gradients."""

    after_forward: Residency
    between_microsteps: Residency
    gradient_accumulation: Residency
    def __init__(self, **fields: Any) -> None: ...

class Link:
    """One tier of the network: latency in seconds per step, bandwidth in bytes per second."""

    latency: float
    bandwidth: float
    def __init__(self, **fields: Any) -> None: ...

class Machine:
    """The two tiers of a cluster's network and its ranks per node."""

    ranks_per_node: int
    launch: float
    rail_launch: float
    intra: Link
    inter: Link
    def __init__(self, **fields: Any) -> None: ...

def flat_seconds(machine: Machine, num_ranks: int, nbytes: float) -> float:
    """Seconds of one all-gather or reduce-scatter of `nbytes` over all ranks at once."""

def rail_hop_seconds(machine: Machine, num_ranks: int, nbytes: float) -> float:
    """Seconds of the hop over nodes of a collective of `nbytes`."""

def intra_hop_seconds(machine: Machine, num_ranks: int, nbytes: float) -> float:
    """Seconds of the hop inside nodes of a collective of `nbytes`."""

class MeasuredPoint:
    """Seconds of one collective, measured."""

    num_ranks: int
    nbytes: float
    seconds: float
    def __init__(self, **fields: Any) -> None: ...

class MeasuredTable:
    """Measured seconds by number of ranks and bytes, interpolated."""

    def __init__(self, points: Sequence[MeasuredPoint] = ...) -> None: ...
    @property
    def points(self) -> list[MeasuredPoint]: ...

class UnitWork:
    """Compute and memory of equal units, per unit and sample."""

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
    """A model as the time model and the memory model see it."""

    units: list[UnitWork]
    tokens_per_sample: int
    width: int
    def __init__(self, **fields: Any) -> None: ...
    @property
    def numel(self) -> int: ...
    @property
    def num_units(self) -> int: ...
    def flops(self, *, recompute: bool) -> float:
        """FLOP of one sample, forward and backward; recomputed units count forward twice."""

class TransformerShape:
    """Sizes of a transformer, for transformer_workload()."""

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

def transformer_workload(shape: TransformerShape) -> Workload:
    """Embedding, layers and head of a transformer as a workload."""

class Contention:
    """How much longer an operation takes while another queue is busy."""

    compute_by_network: float
    compute_by_intra: float
    network_by_compute: float
    def __init__(self, **fields: Any) -> None: ...

class Cluster:
    """One instance type, calibrated."""

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
    """When gradients are summed over which ranks."""

    TWO_HOP: GradientSync
    REPLICATE_EACH: GradientSync
    ALL_REDUCE_EACH: GradientSync
    @property
    def name(self) -> str: ...

class StepSettings:
    """What a step is predicted for."""

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
    """Seconds of one step, and of its parts."""

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

def step_time(workload: Workload, cluster: Cluster, settings: StepSettings) -> StepTime:
    """Predicts the seconds of one optimizer step."""

def step_time_bound(workload: Workload, cluster: Cluster, settings: StepSettings) -> float:
    """A lower bound of step_time(): the busiest queue, without any waiting."""

class MemoryLimits:
    """Memory of one rank's device, and what is taken of it in any case."""

    capacity_nbytes: float
    usable: float
    context_nbytes: float
    communicator_nbytes: float
    state_nbytes: float
    bucket_nbytes: float
    def __init__(self, **fields: Any) -> None: ...

class MemoryTerms:
    """Bytes that one rank holds, term by term, and the peak."""

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
) -> MemoryTerms:
    """Predicts the bytes that one rank holds at its fullest moment."""

def fits(memory: MemoryTerms, limits: MemoryLimits) -> bool:
    """Whether a peak is within the usable memory."""

class PlanRequest:
    """What plan_step() searches."""

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
    """One way to run a workload, with its time and memory."""

    settings: StepSettings
    time: StepTime
    memory: MemoryTerms
    def __init__(self, **fields: Any) -> None: ...

class PlanResult:
    """What plan_step() found, fastest first."""

    ranked: list[Candidate]
    leaders: list[Candidate]
    misses: list[Candidate]
    num_considered: int
    num_fitting: int
    num_simulated: int
    def __init__(self, **fields: Any) -> None: ...

def plan_step(request: PlanRequest) -> PlanResult:
    """Every legal way to run a workload on a cluster, within memory, fastest first."""

class HopCounts:
    """How often each hop of a unit runs in one step."""

    gather_rail: int
    gather_intra: int
    reduce_intra: int
    reduce_rail: int
    replicate: int
    def __init__(self, **fields: Any) -> None: ...

class UnitSize:
    """A unit as step_bytes() sees it."""

    shard_numel: int
    payload_numel: int
    gradient_shard_numel: int
    gradient_payload_numel: int
    parameter_nbytes: int
    gradient_nbytes: int
    replicate_nbytes: int
    def __init__(self, **fields: Any) -> None: ...

class StepBytes:
    """Bytes that one rank receives in one step, by communicator."""

    gather_rail: int
    gather_intra: int
    reduce_rail: int
    reduce_intra: int
    replicate: int
    def __init__(self, **fields: Any) -> None: ...

def count_hops(
    residency: ResidencySettings, num_microsteps: int, replication_size: int
) -> HopCounts:
    """Counts the hops of a unit in one step."""

def step_bytes(
    unit: UnitSize, shape: tuple[int, int], replication_size: int, hops: HopCounts
) -> StepBytes:
    """Bytes of one unit in one step."""

def layout_alignment(parameter_dtype: torch.dtype, reduce_dtype: torch.dtype) -> int:
    """Elements to which chunks are aligned: 16 bytes of the narrower dtype."""

class Traffic:
    """Calls and bytes of one communicator since it was made."""

    calls: int
    sent_intra_nbytes: int
    sent_inter_nbytes: int
    received_intra_nbytes: int
    received_inter_nbytes: int

class LoggedOperation:
    """One collective in a FlightLog. Times are those of time.monotonic()."""

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
    """The last collectives of this rank, and the progress of each group."""

    def operations(self) -> list[LoggedOperation]:
        """The last operations, oldest first."""
    def begin_incident(self) -> None:
        """Lets the next failure be reported; on all ranks equally often."""

def make_reporting_log(
    store: dist.Store,
    *,
    rank: int,
    world_size: int,
    interval: datetime.timedelta,
    patience: datetime.timedelta,
) -> FlightLog:
    """A flight log whose report is a table of all ranks, through the Store."""

class Communicator:
    """Collectives among the ranks of one group, in one total order."""

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
    def sums_in_wire_dtype(self) -> bool: ...
    @property
    def traffic(self) -> Traffic: ...
    def all_gather(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Gathers every member's inputs into the outputs, in rank order, as one launch."""
    def reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> None:
        """Sums every member's inputs; piece r of the sum is left at rank r. One launch."""
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` by the sum over all members."""
    def set_flight_log(self, log: FlightLog) -> None:
        """Logs operations from here on; to be called before the first."""
    @property
    def staging_nbytes(self) -> int: ...
    def barrier(self) -> None:
        """Returns when every member has called it."""

class LocalWorld:
    """Ranks that are threads of this process."""

    def __init__(self, world_size: int, *, timeout: datetime.timedelta) -> None: ...
    def make_communicator(
        self, *, name: str, world_ranks: Sequence[int], nodes: Sequence[int], rank: int
    ) -> Communicator:
        """Called by each member on its own thread."""

def make_c10d_communicator(
    process_group: dist.ProcessGroup,
    *,
    name: str,
    world_ranks: Sequence[int],
    nodes: Sequence[int],
    rank: int,
    timeout: datetime.timedelta,
) -> Communicator:
    """A communicator over a ProcessGroup with the members of the group."""

class NcclVersions:
    """Versions of NCCL and the CUDA runtime, at build and now, and why NCCL cannot be used."""

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

def nccl_versions() -> NcclVersions:
    """What is installed of NCCL and CUDA. Loads the libraries."""

class NcclRegistration:
    """What NCCL may do with the memory that the runtime works in."""

    NONE: NcclRegistration
    BUFFERS: NcclRegistration
    WINDOWS: NcclRegistration

class NcclDirection:
    """What a communicator carries; the limit in flight counts each by itself."""

    GATHER: NcclDirection
    REDUCE: NcclDirection
    REPLICATE: NcclDirection

class NcclWorld:
    """This rank's NCCL communicators and CUDA streams, and the watchdog over them."""

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
        is_blocking: bool,
    ) -> None: ...
    def make_communicator(
        self,
        *,
        name: str,
        world_ranks: Sequence[int],
        nodes: Sequence[int],
        rank: int,
        direction: NcclDirection,
        only_gathers: bool,
    ) -> Communicator:
        """Every member calls it."""
    def make_streams(self) -> RuntimeStreams:
        """The runtime's streams on this device."""
    def close(self, patience: datetime.timedelta) -> None:
        """Waits for what is in flight and ends all communicators; before the process ends."""
    @property
    def allocated_nbytes(self) -> int: ...
    def notes(self) -> list[str]:
        """Options that could not be honoured."""

class ShmGroup:
    """This rank's place in the shared memory segment of a group on one host."""

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
    def make_communicator(self) -> Communicator:
        """A communicator of the group; all of one group share one order."""
    @property
    def has_failed(self) -> bool: ...

def make_shm_segment_name() -> str:
    """A name that is new on this host and tells which process made it."""

def remove_stale_shm_segments() -> int:
    """Removes segments of processes that have ended; returns how many."""

def shm_host_identity() -> str:
    """Names the host as shared memory and process ids see it."""

def make_part(buffer: torch.Tensor, offset: int, sizes: Sequence[int]) -> torch.Tensor:
    """A tensor over a part of `buffer`, with a storage of its own."""

def distance_between(first: torch.Tensor, second: torch.Tensor) -> int | None:
    """Elements from `first` to `second` in one buffer; None where they lie in two."""

def span_from(first: torch.Tensor, numel: int) -> torch.Tensor:
    """The next `numel` elements of the buffer in which `first` lies, as a tensor."""

class ParameterRegistration:
    """Puts the full or the sharded parameters of a unit into its modules."""

    def __init__(self) -> None: ...
    def add(
        self,
        parameters: dict[str, torch.nn.Parameter | None],
        key: str,
        *,
        sharded: torch.Tensor,
        full: torch.Tensor,
        name: str,
    ) -> None:
        """Adds one place of a parameter: a module's `_parameters` and the name there."""

class UnitParameter:
    """One parameter of a unit. `gradient` is what its `.grad` is set to; None when frozen."""

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
    """How a unit behaves; may change between steps."""

    residency: ResidencySettings
    unshard_in_backward: bool
    reduce_gradients: bool
    synchronize_gradients: bool
    gradient_factor: float

class Unit:
    """Parameters that are gathered, reduced and freed together, and the state of their gradients."""

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
    def matches_requires_grad(self) -> bool:
        """False when a sharded parameter was frozen or unfrozen and its full one was not."""
    def full_views(self) -> list[torch.Tensor]:
        """Views of the full buffer, one per parameter; readable while unsharded."""
    def set_full_parameters(self, full_parameters: Sequence[torch.Tensor]) -> None:
        """The leaf tensors over full_views() that autograd sees."""
    def set_registration(self, registration: ParameterRegistration) -> None:
        """How full and sharded parameters get into the modules."""
    def set_gradient_hook(self, hook: Callable[[torch.Tensor], None]) -> None:
        """Called with the synchronized gradient before it becomes visible."""

class RuntimeStreams:
    """The streams of one rank's runtime: threads of their own, or the caller's."""

    def __init__(self, *, on_threads: bool) -> None: ...

class NoticedDefects:
    """Defects of one kind that were put into a trace."""

    @property
    def noticed(self) -> int: ...
    @property
    def all(self) -> int: ...

class RaceDetector:
    """Finds memory that two streams use at once, from what the streams are asked for."""

    def __init__(self, *, keeps_trace: bool, throws: bool) -> None: ...
    def watch(self, streams: RuntimeStreams) -> None:
        """Observes the streams of a runtime from here on, before their first use."""
    def name_memory(self, tensor: torch.Tensor, name: str) -> None:
        """Names memory in messages."""
    def access(
        self,
        operation: str,
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        stream: int | None,
    ) -> None:
        """What the calling thread computes; `stream`: the handle of the device's current one."""
    def made(self, operation: str, tensors: Sequence[torch.Tensor], stream: int | None) -> None:
        """Tensors that an operator has made and written."""
    def allocate(self, address: int, nbytes: int, stream: int | None) -> None:
        """A write of the stream that is current."""
    def free(self, address: int) -> None:
        """A write of the stream that was current at allocate()."""
    def synchronize(self, stream: int | None) -> None:
        """The host has waited for the stream; None: for all."""
    def record_event(self, event: int, stream: int) -> None:
        """Of an event that the script has made."""
    def wait_for_event(self, event: int, stream: int) -> None:
        """Of an event that the script has made."""
    @property
    def races(self) -> list[str]: ...
    @property
    def num_accesses(self) -> int: ...
    @property
    def moved_nbytes(self) -> dict[str, int]: ...
    def put_defects(self, stride: int, only: str = "") -> dict[str, NoticedDefects]:
        """Puts defects into the trace one at a time, and counts by kind which are noticed."""

class Phase:
    """When units are used."""

    FORWARD: Phase
    BACKWARD: Phase

class ExposedTime:
    """Time that the calling thread waited for communication of a unit."""

    @property
    def gather(self) -> datetime.timedelta: ...
    @property
    def reduce(self) -> datetime.timedelta: ...

class Depths:
    """How far the runtime works ahead: prefetched units, and reductions in flight."""

    intra: int
    rail: int
    reductions: int
    def __init__(self) -> None: ...

class MemoryPart:
    """One part of the runtime's allocation."""

    @property
    def name(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class MemoryReport:
    """What the runtime works in, one allocation, as it was when the engine was asked."""

    @property
    def parts(self) -> list[MemoryPart]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_grown(self) -> int: ...
    @property
    def grown_nbytes(self) -> int: ...

class Engine:
    """Runs the units of one root module through forward and backward."""

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        control: Communicator | None,
        streams: RuntimeStreams,
        depths: Depths,
    ) -> None: ...
    def pre_forward(self, unit: int) -> None:
        """A forward of the unit begins: gathers it."""
    def watch_outputs(self, unit: int, outputs: Sequence[torch.Tensor]) -> None:
        """Lets backward of the open forward start at these outputs."""
    def post_forward(self, unit: int, *, failed: bool) -> None:
        """A forward of the unit ends."""
    def unshard(self, unit: int) -> None:
        """Gathers the unit, until reshard()."""
    def reshard(self, unit: int) -> None:
        """Ends unshard()."""
    def prefetch(self, unit: int) -> None:
        """Starts to gather the unit; kept until its next use."""
    def lend(self, unit: int, *, is_group: bool) -> None:
        """Another module is about to use the unit's full parameters."""
    def note_written(self, units: Sequence[int]) -> None:
        """The shards of these units were written; on all ranks alike."""
    @property
    def is_in_forward(self) -> bool: ...
    def set_prefetch(self, phase: Phase, unit: int, ahead: Sequence[int]) -> None:
        """Units to gather when a phase of the unit begins; empty: the recorded order."""
    def set_depths(self, depths: Depths) -> None:
        """How far to work ahead; between steps."""
    def finish_backward(self) -> None:
        """Ends a backward under manual finalization."""
    def set_manual_finalization(self, is_manual: bool) -> None:
        """Whether finish_backward() is called by hand."""
    def unplanned_sum_nbytes(self) -> int:
        """Bytes of memory for sums of gradients that was not planned."""
    def unfinished_units(self) -> list[str]:
        """Names of units with gradients that are not visible."""
    def matches_requires_grad(self) -> bool:
        """False when a sharded parameter was frozen or unfrozen and its full one was not."""
    def change_trainable(
        self, unit: int, gradients: Sequence[torch.Tensor | None], gradient: torch.Tensor
    ) -> None:
        """Lets full parameters require gradients as the sharded ones do now."""
    def adopt(self, older: Engine, units: Sequence[int]) -> None:
        """Takes over the units, graphs and gradients of an older engine."""
    def set_callbacks(
        self, *, refresh: Callable[[], None], check_hooks: Callable[[], None]
    ) -> None:
        """Called where requires_grad has changed, and where hooks may have been set."""
    def drop_gradients(self, unit: int) -> None:
        """Drops the unit's gradients that are not visible."""
    def release_memory(self) -> None:
        """Frees the runtime's memory until the next gather."""
    def memory(self) -> MemoryReport:
        """The runtime's memory now, planned if it is not there."""
    @property
    def num_order_changes(self) -> int: ...
    def exposed(self, unit: int) -> ExposedTime:
        """Time that the calling thread has waited for the unit."""
    def reset(self) -> None:
        """Drops what is in flight, on all ranks, after an exception."""

def has_forward_failed(output: object) -> bool:
    """Whether an always_call hook runs because the forward threw."""

class UnitHooks:
    """Forward hooks of a unit's modules: a fast path in C++, else the given Python functions."""

    def __init__(
        self,
        *,
        long_pre_forward: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any],
        long_post_forward: Callable[[nn.Module, Any, Any], Any],
        find_tensors: Callable[[Any], list[torch.Tensor]],
    ) -> None: ...
    def connect(
        self, engine: Engine, units: Sequence[int], *, input_dtype: torch.dtype | None
    ) -> None:
        """Takes the fast path for these units of the engine."""
    def disconnect(self) -> None:
        """Takes the Python functions from here on."""
    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """For register_forward_pre_hook(..., with_kwargs=True)."""
    def post_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        """For register_forward_hook(..., always_call=True)."""

class AdamWRun:
    """Neighbouring parameters with one gradient and one state, flat; for adamw_step()."""

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
    """Neighbouring parameters with one gradient and one momentum buffer, flat; for sgd_step()."""

    def __init__(
        self,
        *,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        momentum_buffer: torch.Tensor | None,
    ) -> None: ...

def join_neighbours(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Flat views that hold each element of `tensors` once and nothing else."""

def gradients_are(parameters: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> bool:
    """Whether the `.grad` of each parameter is the tensor, or None, of `gradients`."""

def entries_are(triples: list[tuple[dict[str, Any], str, torch.Tensor]]) -> bool:
    """Whether each (dictionary, key, value) holds that very value."""

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
    fused: bool = False,
) -> None:
    """One step of AdamW, bit for bit as torch's single-tensor form or its fused one."""

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
) -> None:
    """One step of SGD, bit for bit as torch's single-tensor form."""
