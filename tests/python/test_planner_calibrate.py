"""The command `calibrate`: fits, measured ranks, and results of nccl-tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from support.ranks import run_ranks

import torch_mics as mics
from torch_mics import _C
from torch_mics.cli import main
from torch_mics.planner._calibrate import calibrate
from torch_mics.planner._calibration import Calibration
from torch_mics.planner._measure import Measurement
from torch_mics.planner._models import published_model
from torch_mics.planner._nccl_tests import parse_json, parse_text

TRUE = _C.Machine(
    ranks_per_node=8,
    launch=2e-5,
    rail_launch=1e-5,
    intra=_C.Link(latency=3e-6, bandwidth=2e11),
    inter=_C.Link(latency=4e-5, bandwidth=4e10),
)
FORMULAS = {
    "intra_hop": _C.intra_hop_seconds,
    "flat": _C.flat_seconds,
    "rail_hop": _C.rail_hop_seconds,
}
SIZES = (2**20, 2**24, 2**27)


def of_formulas(*tables: str, nodes: tuple[int, ...] = (2, 4, 8)) -> list[Measurement]:
    """What a cluster that obeys the formulas would measure."""
    found = []
    for table in tables:
        for ranks in (2, 4, 8) if table == "intra_hop" else tuple(8 * n for n in nodes):
            for nbytes in SIZES:
                found.append(
                    Measurement(table, ranks, nbytes, FORMULAS[table](TRUE, ranks, nbytes))
                )
    return found


def calibrated(measurements: list[Measurement]) -> Calibration:
    base = mics.load_calibration("p4d")
    return calibrate(
        base, measurements, ranks_per_node=8, instance="x", source="a test", date="2026-11-25"
    )


# --- the fit --------------------------------------------------------------------------------------


def test_numbers_of_the_formulas_are_found_again() -> None:
    found = calibrated(of_formulas("intra_hop", "flat", "rail_hop"))
    for name, value in {
        "intra_latency": 3e-6,
        "intra_bandwidth": 2e11,
        "launch": 2e-5,
        "rail_launch": 1e-5,
        "inter_latency": 4e-5,
        "inter_bandwidth": 4e10,
    }.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
        assert found.values[name].origin == "fitted"
    # The efficiencies are still those that runs on p4d were fitted to.
    assert found.num_fitted == 8
    assert found["efficiency"] == mics.load_calibration("p4d")["efficiency"]
    assert {name: len(table.points) for name, table in found.tables.items()} == {
        "intra_hop": 9,
        "flat": 9,
        "rail_hop": 9,
    }


def test_no_number_is_fitted_below_zero() -> None:
    # Faster for more bytes than any latency allows: the best is none at all.
    steep = [Measurement("intra_hop", 8, n, 1e-12 * n * n / 2**20) for n in SIZES]
    found = calibrated(steep)
    assert found["intra_latency"] == 0
    assert found["intra_bandwidth"] > 0


def test_nodes_in_one_number_are_enough() -> None:
    # One number of nodes cannot tell a launch from latency per node; together they are right.
    found = calibrated(of_formulas("intra_hop", "flat", nodes=(4,)))
    machine = found.cluster(0).machine
    for nbytes in SIZES:
        assert _C.flat_seconds(machine, 32, nbytes) == pytest.approx(
            _C.flat_seconds(TRUE, 32, nbytes), rel=1e-6
        )


def test_what_is_not_measured_stays() -> None:
    base, found = mics.load_calibration("p4d"), calibrated(of_formulas("intra_hop"))
    for name in ("launch", "inter_latency", "inter_bandwidth", "peak", "memory"):
        assert found.values[name] == base.values[name]
    assert found["time_error"] == 0.15


def test_equal_collectives_count_once_as_their_mean() -> None:
    twice = [Measurement("intra_hop", 8, 2**20, s) for s in (1.0, 3.0)]
    found = calibrated([*twice, Measurement("intra_hop", 8, 2**24, 4.0)])
    assert found.tables["intra_hop"].points == ((8, 2**20, 2.0), (8, 2**24, 4.0))


def test_one_size_is_not_enough() -> None:
    with pytest.raises(ValueError, match="at least two sizes: got 1048576 bytes alone in flat"):
        calibrated([Measurement("flat", 16, 2**20, 1e-3)])


# --- measured -------------------------------------------------------------------------------------


def _calibrate(rank: int, arguments: list[str]) -> int:
    return main(["calibrate", *arguments])


def test_four_ranks_on_two_nodes_are_measured_and_planned_with(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    sizes = ["--sizes", "4096", "65536", "1048576"]
    arguments = [str(file), "--base", "p3dn", *sizes]
    assert run_ranks(4, _calibrate, arguments, ranks_per_node=2) == [0] * 4
    found = mics.load_calibration(file)
    assert found.instance == "mine"
    assert found["ranks_per_node"] == 2
    shapes = {name: [(n, b) for n, b, _ in table.points] for name, table in found.tables.items()}
    nbytes = (4096, 65536, 1048576)
    assert shapes == {
        "intra_hop": [(2, b) for b in nbytes],
        "flat": [(4, b) for b in nbytes],
        "rail_hop": [(4, b) for b in nbytes],
    }
    assert found.values["peak"].origin == "measured"
    assert "over gloo" in found.values["peak"].source
    assert found.gpu == "CPU"
    # A point of the table is what the planner reads.
    cluster = found.cluster(0)
    (seconds,) = [s for n, b, s in found.tables["flat"].points if b == 65536]
    workload = _C.Workload(units=[_C.UnitWork(numel=65536 // 2)], tokens_per_sample=1, width=1)
    settings = _C.StepSettings(world_size=4, partition_size=4)
    time = _C.step_time(workload, cluster, settings)
    assert time.gather_rail == pytest.approx(2 * seconds)
    assert not time.is_extrapolated
    plan = mics.plan(published_model("bert_10b"), instance=file, world_size=64, global_batch=64)
    assert plan.is_extrapolated


def test_what_is_wrong_on_one_rank_is_said_on_all(tmp_path: Path) -> None:
    for arguments in (
        [str(tmp_path / "x.json"), "--base", "p9"],
        [str(tmp_path / "nowhere" / "x.json"), "--base", "p3dn"],
        [str(tmp_path / "x.json"), "--base", "p3dn", "--sizes", "4096"],
    ):
        assert run_ranks(2, _calibrate, arguments) == [2, 2]
    assert not list(tmp_path.iterdir())


def test_a_single_process_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # Another file may have made a world of one in this process.
    with mock.patch.object(dist, "is_initialized", return_value=False):
        assert main(["calibrate", str(tmp_path / "x.json"), "--base", "p3dn"]) == 2
    assert "needs the ranks of the cluster" in capsys.readouterr().err


# --- nccl-tests -----------------------------------------------------------------------------------


def printed(
    hosts: list[str],
    sizes: tuple[int, ...] = SIZES,
    *,
    program: str = "all_gather_perf",
    ranks: int | None = None,
    groups: list[int] | None = None,
) -> str:
    """The output of a test in which each size takes a millisecond per MiB."""
    ranks = ranks or len(hosts)
    lines = [
        "some launcher's banner",
        "# nccl-tests version 2.17.1 nccl-headers=22800 nccl-library=22800",
        f"# Collective test starting: {program}",
        "# nThread 1 nGpus 1 minBytes 1048576 maxBytes 134217728 step: 2(factor) warmup iters: 1",
        "#",
        "# Using devices",
    ]
    for rank, host in enumerate(hosts):
        group = groups[rank] if groups else 0
        lines.append(
            f"#  Rank {rank:2} Group {group:2} Pid {100 + rank:6} on {host:>10} device {rank % 8:2} "
            "[0000:10:1c] NVIDIA A100-SXM4-40GB"
        )
    lines += [
        "#",
        "#                                           out-of-place               in-place          ",
        "#       size         count      type   redop    root     time   algbw   busbw  #wrong",
        "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)        ",
    ]
    for size in sizes:
        time = f"{1000 * size / 2**20:9.1f}  1.05  0.98  0"
        lines.append(f"{size:12}  {size // ranks // 4:10}  float  none  -1  {time}  {time}")
    return "\n".join([*lines, "# Out of bounds values : 0 OK", "# Avg bus bandwidth : 1.0", ""])


def written(hosts: list[str], *, gpus_per_process: int = 1, ranks: int) -> str:
    """The JSON of a test whose processes have `gpus_per_process` devices."""
    devices = [
        {"rank": i * gpus_per_process, "group": 0, "pid": i, "hostname": host, "device": 0}
        for i, host in enumerate(hosts)
    ]
    body = {"alg_bw": 1.0, "bus_bw": 1.0, "nwrong": 0.0}
    results = [
        {
            "size": size,
            "count": size // ranks // 2,
            "type": "bfloat16",
            "redop": "sum",
            "root": "    -1",
            "out_of_place": {"time": 1000 * size / 2**20, **body},
            "in_place": {"time": 1.0, **body},
        }
        for size in SIZES
    ]
    return json.dumps(
        {
            "version": 2,
            "args": ["/opt/build/reduce_scatter_perf", "-J", "x.json"],
            "config": {"nthreads": 1, "ngpus": gpus_per_process, "devices": devices},
            "results": results,
        },
        indent=0,
    )


TWO_NODES = ["a"] * 8 + ["b"] * 8
MILLISECONDS = [(size, size / 2**20 / 1e3) for size in SIZES]


def test_printed_results_are_read() -> None:
    found = parse_text(printed(TWO_NODES), "out.txt")
    assert found.ranks_per_node == 8
    assert found.measurements == [Measurement("flat", 16, b, s) for b, s in MILLISECONDS]
    inside = parse_text(printed(["a"] * 4), "out.txt")
    assert inside.measurements == [Measurement("intra_hop", 4, b, s) for b, s in MILLISECONDS]


def test_sizes_without_an_element_per_rank_are_passed_over() -> None:
    found = parse_text(printed(TWO_NODES, (0, *SIZES)), "out.txt")
    assert found == parse_text(printed(TWO_NODES), "out.txt")
    tree = json.loads(written(TWO_NODES, ranks=16))
    tree["results"].insert(0, {**tree["results"][0], "size": 0, "count": 0})
    assert len(parse_json(json.dumps(tree), "out.json").measurements) == 3


def test_output_of_older_versions_is_read() -> None:
    old = re.sub(r"# (nccl-tests|Collective).*\n", "", printed(TWO_NODES))
    old = re.sub(r" Group +\d+", "", old)
    assert "Group" not in old
    assert parse_text(old, "out.txt") == parse_text(printed(TWO_NODES), "out.txt")


def test_one_rank_of_each_node_is_a_rail() -> None:
    # NCCL_TESTS_SPLIT puts rank i of every node into one group.
    rails = printed(TWO_NODES, ranks=2, groups=[*range(8), *range(8)])
    found = parse_text(rails, "out.txt").measurements
    # The unit is that of a partition group of 16 ranks: 8 rails carry it.
    assert found == [Measurement("rail_hop", 16, 8 * b, s) for b, s in MILLISECONDS]


def test_written_results_are_read() -> None:
    found = parse_json(written(TWO_NODES, ranks=16), "out.json")
    assert found.ranks_per_node == 8
    assert found.measurements == [Measurement("flat", 16, b, s) for b, s in MILLISECONDS]
    threads = parse_json(written(["a", "b"], gpus_per_process=8, ranks=16), "out.json")
    assert threads == found


def test_in_place_stands_in_where_there_is_no_other() -> None:
    tree = json.loads(written(TWO_NODES, ranks=16))
    for row in tree["results"]:
        row["out_of_place"] = None
    found = parse_json(json.dumps(tree), "out.json")
    assert [m.seconds for m in found.measurements] == [1e-6] * 3


def test_command_imports_both_forms(tmp_path: Path) -> None:
    files = [tmp_path / "inside.txt", tmp_path / "over.json"]
    files[0].write_text(printed(["a"] * 8))
    files[1].write_text(written(TWO_NODES, ranks=16))
    output = tmp_path / "mine.json"
    command = ["calibrate", str(output), "--base", "p4d", "--name", "my cluster"]
    assert main([*command, "--from-nccl-tests", *map(str, files)]) == 0
    found = mics.load_calibration(output)
    assert found.instance == "my cluster"
    assert {name: len(t.points) for name, t in found.tables.items()} == {"flat": 3, "intra_hop": 3}
    assert "nccl-tests, inside.txt, over.json" in found.tables["flat"].source
    assert mics.plan(published_model("bert_10b"), instance=output, world_size=64, global_batch=512)


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "rule"),
    [
        ("   16000.0  ", "     N/A  ", 28, "time", "above 0"),
        ("   16000.0  ", "     0.0  ", 28, "time", "above 0"),
        ("262144  float", "262144  quad", 28, "count", "a known type, not quad"),
        ("262144  float", "4194304  float", 28, "count", "elements of one of 16 ranks"),
        (" time   algbw", " cputime algbw", 25, "time", "without -C"),
        ("#  Rank", "#  Bank", 1, "devices", "must be listed"),
        ("float", "#", 1, "results", "a row for each size"),
    ],
)
def test_malformed_text_is_named_by_line_and_field(
    old: str, new: str, line: int, field: str, rule: str
) -> None:
    text = printed(TWO_NODES).replace(old, new)
    assert text != printed(TWO_NODES)
    with pytest.raises(ValueError, match=re.escape(rule)) as caught:
        parse_text(text, "out.txt")
    assert f"out.txt, line {line}, field {field}: " in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "field", "rule"),
    [
        ('"time": 16000.0', '"time": "nan"', "results.1.out_of_place.time", "of type"),
        ('"time": 16000.0', '"time": -1.0', "results.1.out_of_place.time", "above 0"),
        ('"time": 16000.0', '"cpu_time": 1.0', "results.1.out_of_place.time", "must be there"),
        ('"count": 524288', '"count": 0', "results.1.count", "at least 1"),
        ('"count": 524288', '"count": 1', "results.1.count", "elements of one of 16"),
        ('"ngpus": 1', '"ngpus": true', "config.ngpus", "of type int"),
        ('"hostname": "b"', '"host": "b"', "config.devices.8.hostname", "must be there"),
        ('"results"', '"rows"', "results", "must be there"),
        ('"nthreads": 1,', '"nthreads": 1', "", '"," must come here'),
    ],
)
def test_malformed_json_is_named_by_line_and_field(
    old: str, new: str, field: str, rule: str
) -> None:
    text = written(TWO_NODES, ranks=16).replace(old, new, 1)
    assert text != written(TWO_NODES, ranks=16)
    with pytest.raises(ValueError, match=re.escape(rule)) as caught:
        parse_json(text, "out.json")
    assert re.search(r"a result of nccl-tests must be .*: out.json, line \d+", str(caught.value))
    assert f"field {field}: " in str(caught.value) or not field


def test_other_collectives_and_uneven_groups_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"got all_reduce_perf \(out.txt, line 3\)"):
        parse_text(printed(TWO_NODES, program="all_reduce_perf"), "out.txt")
    with pytest.raises(ValueError, match="got ranks 8 on a, 4 on b, in 1 groups"):
        parse_text(printed(["a"] * 8 + ["b"] * 4), "out.txt")
    files = [tmp_path / "eight.txt", tmp_path / "four.txt"]
    files[0].write_text(printed(TWO_NODES))
    files[1].write_text(printed(["a"] * 4 + ["b"] * 4))
    command = ["calibrate", str(tmp_path / "x.json"), "--base", "p4d"]
    assert main([*command, "--from-nccl-tests", *map(str, files)]) == 2
    assert "must have nodes of one size" in capsys.readouterr().err
