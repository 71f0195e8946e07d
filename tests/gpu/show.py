"""Says what the logs of the probe show: one line per mode, then what is right and what is WRONG.

    python3 show.py FOLDER_OF_LOGS RESULTS.jsonl

The status is 1 if something is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Results = dict[tuple[str, str], dict[str, Any]]  # by log and mode
Verdict = tuple[bool, str]
# Of losses, relative. NCCL sums in another order than one hop of it does.
TOLERANCES = {"bf16": 2e-2, "fp16": 2e-2, "bf16model": 5e-2}
TOLERANCE = 1e-4
FIRST_STEADY = 3
# Settings that change what is computed; ours and FSDP2's are compared where these are equal.
NUMERIC = ("bf16", "fp16", "bf16model", "large")


def read(folder: Path) -> Results:
    """Reads all logs."""
    found: Results = {}
    for path in sorted(folder.glob("*.log")):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
                found[path.stem, result["mode"]] = result
    return found


def describe(log: str, result: dict[str, Any]) -> str:
    """One line."""
    if "error" in result:
        return f"{log} {result['mode']}: {result['seconds']} s, {result['error'][:600]}"
    losses, norms, times = result["losses"], result["norms"], sorted(result["ms"])
    carriers = sorted(set(result.get("backends", {}).values()))
    return (
        f"{log} {result['mode']}: loss {losses[0]:.7f} {losses[-1]:.7f} norm {norms[0]:.6f} "
        f"{norms[-1]:.6f} step {times[len(times) // 2]} ms, peak {result.get('peak_mib')} MiB, all ranks "
        f"{result.get('used_mib_of_all_ranks')} MiB {carriers}"
    )


def _settings(mode: str) -> set[str]:
    return set(mode.split("+")[1:])


def _numeric(mode: str) -> tuple[str, ...]:
    return tuple(sorted(_settings(mode) & set(NUMERIC)))


def check_errors(results: Results) -> Iterator[Verdict]:
    """A mode fails only where a rank was killed, and there it must."""
    for (log, mode), result in results.items():
        was_killed = "killed" in _settings(mode)
        if was_killed:
            is_told = "error" in result
            told = f"{result['seconds']} s: {result.get('error', 'no error')[:200]}"
            yield is_told, f"{log} {mode}: the other rank was told after {told}"
        elif "error" in result:
            yield False, f"{log} {mode}: {result['error'][:300]}"


def check_losses(results: Results) -> Iterator[Verdict]:
    """Ours are those of FSDP2 in the same precision on as many ranks."""
    right = {
        (log.partition("_")[0], _numeric(mode)): result
        for (log, mode), result in results.items()
        if mode.startswith("fsdp2") and "losses" in result
    }
    for (log, mode), result in results.items():
        same = right.get((log.partition("_")[0], _numeric(mode)))
        if not mode.startswith("ours") or "losses" not in result or same is None:
            continue
        if "between" in _settings(mode):  # another program
            continue
        pairs = zip(result["losses"], same["losses"], strict=True)
        worst = max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)
        allowed = max((TOLERANCES.get(n, TOLERANCE) for n in _numeric(mode)), default=TOLERANCE)
        yield worst <= allowed, f"{log} {mode}: losses within {worst:.1e} of {same['mode']}"


def check_races(results: Results) -> Iterator[Verdict]:
    """With late compute every digit is that of launches that block."""
    for (log, mode), result in results.items():
        other = results.get(("race_blocking", mode))
        if log != "race_async" or other is None or "losses" not in result.keys() & other.keys():
            continue
        is_same = all(result[key] == other[key] for key in ("losses", "norms"))
        yield is_same, f"{mode}: late compute gives the digits of blocking launches"


def check_steady(results: Results) -> Iterator[Verdict]:
    """A steady step neither waits for the device nor asks it for memory."""
    for (log, mode), result in results.items():
        if "sync" in _settings(mode) and "peak_mib" in result:  # on a GPU
            found = result["synchronisations"]
            yield not found, f"{log} {mode}: {len(found)} host synchronisations {found[:1]}"
        allocations = result.get("allocations", [])[FIRST_STEADY:]
        if allocations and "late" not in _settings(mode) and "boom" not in _settings(mode):
            yield len(set(allocations)) == 1, f"{log} {mode}: allocations by step {allocations}"


def main() -> None:
    """Prints everything; the lines that matter last."""
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    results = read(folder)
    with output.open("w") as file:
        for (log, _), result in results.items():
            file.write(json.dumps({"log": log, **result}) + "\n")
            print(describe(log, result))
    silent = sorted({path.stem for path in folder.glob("*.log")} - {log for log, _ in results})
    for name in silent:
        print(f"{name}: no result:\n{(folder / f'{name}.log').read_text(errors='replace')[-1500:]}")
    verdicts = [(False, f"{name}: no result") for name in silent]
    for check in (check_errors, check_losses, check_races, check_steady):
        verdicts += check(results)
    for is_right, text in sorted(verdicts, reverse=True):
        print("  right " if is_right else "  WRONG ", text)
    sys.exit(not all(is_right for is_right, _ in verdicts))


if __name__ == "__main__":
    main()
