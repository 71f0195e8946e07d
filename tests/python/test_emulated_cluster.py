"""The emulated cluster: bytes and parity over counted links, its gates, and that nothing stays behind.

Where the machine does not permit it the tests are skipped, with the reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "emulated_cluster"


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(FOLDER), *arguments]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=1500, check=False, **options
    )


@pytest.fixture(scope="module")
def permitted() -> None:
    """Skips where an emulated cluster cannot run."""
    done = run("--check")
    if done.returncode == 77:
        pytest.skip((done.stdout + done.stderr).strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("permitted")
def test_two_nodes_train_with_the_bytes_of_the_formulas(tmp_path: Path):
    report = tmp_path / "report.json"
    smoke = (sys.executable, str(FOLDER / "smoke.py"))
    sizes = ("--nodes", "2", "--ranks-per-node", "2", "--rate", "500mbit", "--timeout", "1400")
    done = run(*sizes, "--json", str(report), "--", *smoke)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all bytes and losses are as they should be." in done.stdout
    found = json.loads(report.read_text())
    assert found["status"] == 0
    sent = {name: counters["sent_nbytes"] for name, counters in found["links"].items()}
    received = {name: counters["received_nbytes"] for name, counters in found["links"].items()}
    for node in (0, 1):
        # Both ends of a link tell the same, up to what was on its way.
        assert received[f"node {node} port"] == pytest.approx(sent[f"node {node} link"], rel=0.01)
        assert received[f"node {1 - node} link"] == pytest.approx(
            sent[f"node {node} link"], rel=0.01
        )


@pytest.mark.usefixtures("permitted")
def test_ranks_get_the_environment_of_torchrun_and_a_host_of_their_own():
    script = (
        "import os, pathlib, socket;"
        "pathlib.Path(os.environ['RESULTS'], os.environ['RANK']).write_text(' '.join(["
        "socket.gethostname(), *(os.environ[name] for name in"
        " ('LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR'))]))"
    )
    results = Path(os.environ.get("TMPDIR", "/tmp"), f"emulated-{uuid.uuid4().hex}")
    results.mkdir()
    try:
        done = run(
            *("--nodes", "2", "--ranks-per-node", "2", "--", sys.executable, "-c", script),
            env={**os.environ, "RESULTS": str(results)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        texts = [(results / str(rank)).read_text() for rank in range(4)]
    finally:
        for file in results.iterdir():
            file.unlink()
        results.rmdir()
    assert texts == [
        "emulated-0 0 4 2 0 10.77.0.1",
        "emulated-0 1 4 2 0 10.77.0.1",
        "emulated-1 0 4 2 1 10.77.0.1",
        "emulated-1 1 4 2 1 10.77.0.1",
    ]


@pytest.mark.usefixtures("permitted")
def test_a_failing_rank_ends_the_run_with_its_status_and_output():
    script = "import os, sys; rank = os.environ['RANK']; print('rank', rank, 'says this');"
    script += "sys.exit(7 if rank == '1' else 0)"
    done = run("--nodes", "2", "--ranks-per-node", "1", "--", sys.executable, "-c", script)
    assert done.returncode == 7
    assert "rank 1 ended with status 7" in done.stderr
    assert "rank 1 says this" in done.stderr


@pytest.mark.usefixtures("permitted")
def test_a_broken_gate_is_named_and_strict_refuses():
    one = ("--nodes", "1", "--ranks-per-node", "1")
    slow = ("--max-cpu", "-1")  # no machine is that idle
    for strict, status in (((), 0), (("--strict",), 3)):
        done = run(*one, *slow, *strict, "--", "true")
        assert done.returncode == status, done.stdout + done.stderr
        assert "not valid: processors were busy" in done.stderr


LINK = """
import os, socket, time
NBYTES = 4_000_000
if os.environ["RANK"] == "1":
    server = socket.create_server(("10.77.0.2", 5002))
    peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(100):
        peer.sendall(peer.recv(1))
    left = NBYTES
    while left:
        left -= len(peer.recv(1 << 20))
    peer.sendall(b"x")
    raise SystemExit
while True:
    try:
        peer = socket.create_connection(("10.77.0.2", 5002), timeout=600.0)
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(100):
    begin = time.monotonic()
    peer.sendall(b"x")
    peer.recv(1)
    times.append(time.monotonic() - begin)
begin = time.monotonic()
peer.sendall(bytes(NBYTES))
peer.recv(1)
print("measured", min(times), time.monotonic() - begin)
"""


@pytest.mark.usefixtures("permitted")
@pytest.mark.parametrize("delay_ms", [0, 20])
def test_a_link_has_its_delay_and_its_rate(delay_ms: int, tmp_path: Path):
    report = tmp_path / "report.json"
    done = run(
        *("--nodes", "2", "--ranks-per-node", "1", "--rate", "100mbit", "--delay", str(delay_ms)),
        *("--json", str(report), "--", sys.executable, "-c", LINK),
    )
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    round_trip, seconds = map(float, done.stdout.split("measured")[1].split())
    ideal = 4_000_000 * 8 / 100e6
    assert 2 * delay_ms / 1e3 <= round_trip < 2 * delay_ms / 1e3 + 0.02  # of the fastest of 100
    assert seconds > 0.95 * ideal + 2 * delay_ms / 1e3
    found = json.loads(report.read_text())
    sent = found["links"]["node 0 link"]["sent_nbytes"]
    assert 4e6 < sent < 5e6  # a busy machine sends some again
    if delay_ms:
        (_, there), (back, _) = found["relay"]["nbytes"]
        assert there == pytest.approx(sent, rel=0.02)
        assert 0 < back < 0.02 * there


def interfaces() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def running(marker: str) -> list[int]:
    """Processes that have `marker` on their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:  # it ended meanwhile
            pass
    return found


@pytest.mark.usefixtures("permitted")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_when_it_is_ended_in_the_middle(number: signal.Signals):
    before = interfaces()
    marker = f"emulated-test-{uuid.uuid4().hex}"
    # A child of a rank that ignores polite requests.
    script = "import subprocess, sys;"
    script += "subprocess.run(['sh', '-c', 'trap : INT TERM; sleep 3600; :', sys.argv[1]])"
    process = subprocess.Popen(
        command(
            "--nodes", "2", "--ranks-per-node", "2", "--", sys.executable, "-c", script, marker
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 600.0
        while len(running(marker)) < 2 + 2 * 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(running(marker)) >= 2 + 2 * 4
        process.send_signal(number)
        status = process.wait(timeout=300.0)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 300.0
    while running(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(marker) == []
    assert interfaces() == before
    assert status == (-number if number == signal.SIGKILL else 128 + number)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("os.geteuid = lambda: 1000", "needs root: got user id 1000"),
        ("os.environ['PATH'] = ''; os.geteuid = lambda: 0", "needs iproute2: got no ip and no tc"),
    ],
)
def test_what_is_missing_is_said(change: str, says: str):
    script = f"import os, runpy, sys; {change}; sys.argv = ['emulated_cluster', '--', 'true']; "
    script += f"runpy.run_path({str(FOLDER)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 77
    assert says in done.stderr


@pytest.mark.usefixtures("permitted")
def test_contest_counts_what_its_links_carry_and_makes_a_page(tmp_path: Path):
    """train_bench under run_all's names: bytes, parity, and the page that is made of them."""
    data = tmp_path / "data"
    data.mkdir()
    contest = (sys.executable, str(ROOT / "benchmarks" / "train_bench"))
    names = ("ddp", "ours@2", "ours@4", "ours_flat@4", "ours_residency@4")
    done = run(
        *("--nodes", "2", "--ranks-per-node", "2", "--timeout", "1400"),
        *("--json", str(data / "two_nodes-1.cluster.json"), "--", *contest),
        *("--strategy", *names, "--steps", "1", "--layers", "4"),
        *("--json", str(data / "two_nodes-1.json")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((data / "two_nodes-1.json").read_text())["records"]
    for name in names:
        record = records[name]
        assert record["parity"] == "exact"
        if name != "ddp":
            counted = record["counted_inter_nbytes"]
            assert counted <= record["link_nbytes"] <= 1.015 * counted + 20_000
    across = {name: records[name]["counted_inter_nbytes"] for name in names}
    assert across["ours_residency@4"] < across["ours@4"] / 4 < across["ours_flat@4"] / 4
    page = [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "--render"]
    done = subprocess.run(
        [*page, "--out", str(tmp_path)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "README.md").read_text()
    assert "| ours_residency@4 |" in text
    assert "python benchmarks/emulated_cluster --nodes 2 --ranks-per-node 2 --rate 500mbit" in text
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    assert (tmp_path / "two_nodes.svg").stat().st_size > 1000
