"""A plan as tables, JSON, an explanation and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch_mics import _C
from torch_mics.planner._extras import extra
from torch_mics.planner._plan import Plan, size_of
from torch_mics.planner._tables import Table, percent

TIME_TERMS = (
    ("compute", "compute, alone"),
    ("contention", "compute lost to a busy network"),
    ("exposed", "waiting for communication"),
    ("optimizer", "optimizer"),
)
BUSY_TERMS = (
    ("gather_rail", "gather over nodes"),
    ("gather_intra", "gather inside nodes"),
    ("reduce_intra", "reduce inside nodes"),
    ("reduce_rail", "reduce over nodes"),
    ("replicate", "all-reduce over replicas"),
)
MEMORY_TERMS = (
    ("states", "states of the shard"),
    ("parameters_kept", "parameters kept"),
    ("gradients_kept", "gradient sums kept"),
    ("gathered", "units gathered"),
    ("staging", "node blocks in flight"),
    ("unit_gradients", "gradients of a unit"),
    ("activations", "activations"),
    ("recomputation", "recomputation of a unit"),
    ("head", "logits"),
    ("communicators", "context and communicators"),
)


def ranking_table(plan: Plan) -> Table:
    """Gives the leaders of each partition size and variant, fastest first."""
    leaders = sorted(plan.leaders, key=lambda c: c.time.total)
    rows = [_row(plan, candidate) for candidate in leaders]
    columns = ("p", "variant", "batch", "steps", "recompute", "kept", "ahead")
    title = (
        f"{plan.calibration.instance}, {plan.world_size} ranks, {plan.workload.numel / 1e9:.2f}B "
        f"parameters, global batch {plan.global_batch}"
    )
    return Table(title, (*columns, "s per step", "TFLOP/s", "GB", ""), rows)


def _row(plan: Plan, candidate: _C.Candidate) -> tuple[str, ...]:
    settings = candidate.settings
    time = candidate.time
    mark = "best" if size_of(candidate) == size_of(plan.best) else ""
    if time.is_extrapolated:
        mark = f"{mark} extrapolated".strip()
    return (
        str(settings.partition_size),
        variant_name(settings.gather),
        str(settings.micro_batch),
        str(settings.num_microsteps),
        "yes" if settings.recompute else "no",
        _kept(settings),
        f"{settings.prefetch_rail}, {settings.prefetch_intra}",
        f"{time.total:.3f}",
        f"{plan.tflops(candidate):.1f}",
        f"{candidate.memory.peak / 1e9:.1f}",
        mark,
    )


def variant_name(variant: _C.Variant) -> str:
    return "hierarchical" if variant == _C.Variant.HIERARCHICAL else "flat"


def _kept(settings: _C.StepSettings) -> str:
    residency = settings.residency
    parts = (residency.after_forward, residency.between_microsteps, residency.gradient_accumulation)
    return "/".join(part.name.lower() for part in parts)


def verdict(plan: Plan) -> str:
    """Says in one or two lines what was chosen, by how much, and if that means anything."""
    settings = plan.best.settings
    arguments = ", ".join(f"{name}={value!r}" for name, value in plan.arguments().items())
    text = f"Best: {arguments}, micro-batch {settings.micro_batch}."
    other, margin = plan.runner_up, plan.margin
    if other is None or margin is None:
        return f"{text} Nothing else fits."
    text += (
        f" Runner-up: p = {other.settings.partition_size} {variant_name(other.settings.gather)}, "
        f"{percent(margin)}."
    )
    if plan.is_tie:
        text += f" A tie: times are known to {100 * plan.calibration.time_error:.0f}%."
    if plan.is_extrapolated:
        text += " The time is extrapolated beyond the measured tables of the calibration."
    return text


def explanation(plan: Plan) -> list[Table]:
    """Gives time and memory term by term, of the best and the runner-up."""
    shown = [plan.best] if plan.runner_up is None else [plan.best, plan.runner_up]
    names = tuple(
        f"p = {c.settings.partition_size} {variant_name(c.settings.gather)}" for c in shown
    )

    def rows(part: str, terms: tuple[tuple[str, str], ...], scale: float) -> list[tuple[str, ...]]:
        return [
            (text, *(f"{getattr(getattr(c, part), name) / scale:.3f}" for c in shown))
            for name, text in (*terms, ("total" if part == "time" else "peak", "together"))
        ]

    busy = [(text, *(f"{getattr(c.time, name):.3f}" for c in shown)) for name, text in BUSY_TERMS]
    memory = rows("memory", MEMORY_TERMS, 1e9)
    limits = plan.calibration.limits()
    usable = f"{limits.usable * limits.capacity_nbytes / 1e9:.3f}"
    memory[-1] = ("peak (not all terms at once)", *memory[-1][1:])
    memory.append(("usable", *[usable] * len(shown)))
    return [
        Table("Seconds of a step", ("term", *names), rows("time", TIME_TERMS, 1)),
        Table("Seconds that the links are busy, mostly behind compute", ("term", *names), busy),
        Table("GB of one rank", ("term", *names), memory),
    ]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Gives a plan as what json.dumps() takes."""
    return {
        "instance": plan.calibration.instance,
        "world_size": plan.world_size,
        "global_batch": plan.global_batch,
        "parameters": plan.workload.numel,
        "time_error": plan.calibration.time_error,
        "fitted_numbers": plan.calibration.num_fitted,
        "considered": plan.num_considered,
        "fitting": plan.num_fitting,
        "arguments": plan.arguments(),
        "margin": plan.margin,
        "is_tie": plan.is_tie,
        "is_extrapolated": plan.is_extrapolated,
        "ranked": [_candidate_json(plan, candidate) for candidate in plan.ranked],
        "leaders": [_candidate_json(plan, candidate) for candidate in plan.leaders],
        "misses": [
            {"shard_size": c.settings.partition_size, "peak_nbytes": c.memory.peak}
            for c in plan.misses
        ],
    }


def _candidate_json(plan: Plan, candidate: _C.Candidate) -> dict[str, Any]:
    settings, time, memory = candidate.settings, candidate.time, candidate.memory
    residency = settings.residency
    return {
        "shard_size": settings.partition_size,
        "variant": variant_name(settings.gather),
        "micro_batch": settings.micro_batch,
        "micro_steps": settings.num_microsteps,
        "recompute": settings.recompute,
        "prefetch_rail": settings.prefetch_rail,
        "prefetch_intra": settings.prefetch_intra,
        "after_forward": residency.after_forward.name.lower(),
        "between_microsteps": residency.between_microsteps.name.lower(),
        "gradient_accumulation": residency.gradient_accumulation.name.lower(),
        "seconds": {name: getattr(time, name) for name, _ in (*TIME_TERMS, *BUSY_TERMS)}
        | {"total": time.total},
        "nbytes": {name: getattr(memory, name) for name, _ in MEMORY_TERMS} | {"peak": memory.peak},
        "tflops": plan.tflops(candidate),
        "is_extrapolated": time.is_extrapolated,
    }


def plot_plan(plan: Plan, path: Path) -> None:
    """Draws time and memory over the partition size.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(10, 4)
    time_axes, memory_axes = figure.subplots(1, 2)
    for variant in (_C.Variant.FLAT, _C.Variant.HIERARCHICAL):
        leaders = [c for c in plan.leaders if c.settings.gather == variant]
        sizes = [c.settings.partition_size for c in leaders]
        label = variant_name(variant)
        time_axes.plot(sizes, [c.time.total for c in leaders], "o-", label=label)
        memory_axes.plot(sizes, [c.memory.peak / 1e9 for c in leaders], "o-", label=label)
    missed = [c.settings.partition_size for c in plan.misses]
    memory_axes.plot(missed, [c.memory.peak / 1e9 for c in plan.misses], "x", label="does not fit")
    all_sizes = sorted({c.settings.partition_size for c in (*plan.leaders, *plan.misses)})
    limits = plan.calibration.limits()
    memory_axes.axhline(limits.usable * limits.capacity_nbytes / 1e9, linestyle="--", color="grey")
    use_log_scale(memory_axes)
    for axes, title in ((time_axes, "seconds per step"), (memory_axes, "GB of one rank")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(all_sizes, [str(size) for size in all_sizes])
        axes.set_xlabel("partition size")
        axes.set_title(title)
        axes.legend()
    figure.savefig(path)


def use_log_scale(axes: Any) -> None:
    """Makes the y axis logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float) -> Any:
    """Makes a figure of matplotlib that needs no display."""
    with extra("plots need matplotlib"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained", dpi=120)
