"""The planner against published runs, and the calibrations it is shipped with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from torch_mics import _C
from torch_mics.planner import load_calibration
from torch_mics.planner._calibration import dump_calibration, parse_calibration, shipped_instances
from torch_mics.planner._cli import main
from torch_mics.planner._fit import FITS
from torch_mics.planner._page import accuracy_page
from torch_mics.planner._published import predict_run, published_runs
from torch_mics.planner._validate import Validation, validate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"
# Said in the report: what the models do not reproduce.
UNMET = (
    "the same by ZeRO-3 of DeepSpeed on 512 A100",
    "its weak scaling from 128 to 512 GPUs",
    "BERT 20B on 16 V100: hierarchical gathers did not fit",
)


@pytest.fixture(scope="module")
def result() -> Validation:
    return validate()


def test_few_numbers_are_fitted_to_few_points(result: Validation) -> None:
    for fit, numbers, points in zip(FITS, (4, 5), (6, 5), strict=True):
        assert len(fit.start) == numbers
        assert (
            sum(row.is_fitted for row in result.rows if row.run.instance == fit.instance) == points
        )
        assert load_calibration(fit.instance).num_fitted == numbers


def test_held_out_errors_are_within_their_goals(result: Validation) -> None:
    p3dn = result.held_out_errors("p3dn.24xlarge")
    assert len(p3dn) == 50
    assert sum(p3dn) / len(p3dn) <= 0.075
    assert max(p3dn) <= 0.20
    p4d = result.held_out_errors("p4d.24xlarge")
    assert len(p4d) == 7
    assert sum(p4d) / len(p4d) <= 0.04


def test_claims_are_reproduced_but_for_those_that_are_named(result: Validation) -> None:
    unmet = [claim.text for claim in result.claims if not claim.is_met]
    assert all(text.startswith(UNMET) for text in unmet)
    assert len(unmet) == 3, unmet


def test_page_is_what_validate_writes(result: Validation) -> None:
    assert PAGE.read_text() == accuracy_page(result)


def test_last_line_of_the_command_is_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    pattern = r"held-out error: p3dn mean [\d.]+%, worst [\d.]+%; p4d mean [\d.]+%"
    assert re.fullmatch(pattern, last), last


def test_shipped_numbers_are_those_of_the_fit(result: Validation) -> None:
    for fit in FITS:
        shipped, fitted = load_calibration(fit.instance), result.calibrations[fit.instance]
        for name in (*fit.start, "rail_launch"):
            assert shipped[name] == pytest.approx(fitted[name], rel=6e-3), name
        errors = result.held_out_errors(fit.instance)
        assert shipped.time_error == pytest.approx(sum(errors) / len(errors), rel=6e-3)


def test_a_run_without_overlap_is_slower_than_with() -> None:
    calibration = load_calibration("p3dn")
    runs = {(r.model, r.system, r.gpus): r for r in published_runs() if r.figure != "12"}
    serial = runs["bert_10b", "deepspeed_zero3", 64]
    overlapped = runs["bert_10b", "mics_as_zero3", 64]
    assert predict_run(serial, calibration) > 1.4 * predict_run(overlapped, calibration)


def test_gathers_of_p5_are_predicted_by_two_numbers() -> None:
    calibration = load_calibration("p5")
    machine = calibration.cluster(0).machine
    points = calibration.tables["flat"].points
    assert len(points) == 35
    errors = [abs(_C.flat_seconds(machine, n, b) / s - 1) for n, b, s in points]
    assert sum(errors) / len(errors) <= 0.09


# --- calibrations -----------------------------------------------------------------------------------


def test_every_shipped_calibration_is_read_by_name_and_alias() -> None:
    assert len(shipped_instances()) == 7
    for instance in shipped_instances():
        calibration = load_calibration(instance)
        assert calibration.instance == instance
        for alias in calibration.aliases:
            assert load_calibration(alias) == calibration
        again = parse_calibration(json.dumps(dump_calibration(calibration)), "again")
        assert again == calibration


def test_unknown_instance_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'p9'. Use one of p3dn.24xlarge, p4d.24xlarge"):
        load_calibration("p9")


def shipped_text() -> str:
    return json.dumps(dump_calibration(load_calibration("p5")), indent=1)


@pytest.mark.parametrize(
    ("old", "new", "field", "rule"),
    [
        ('"value": 8.0', '"value": 8.5', "values.ranks_per_node.value", "a whole number"),
        ('"value": 0.96', '"value": 1.5', "values.usable_memory.value", "at most 1"),
        ('"value": 0.5,', '"value": "half",', "values.efficiency.value", "above 0"),
        ('"unit": "FLOP/s"', '"unit": "FLOPS"', "values.peak.unit", 'must be "FLOP/s"'),
        ('"origin": "fitted"', '"origin": "guessed"', "values.inter_latency.origin", "one of"),
        ('"num_fitted": 2', '"num_fitted": 3', "num_fitted", "whose origin is fitted, 2"),
        ('"launch": {', '"lunch": {', "values.lunch", "must be one of"),
        ('"gpu": "H100 80 GB",', "", "gpu", "must be there"),
        ('"flat": {', '"star": {', "tables.star", "must be one of flat"),
        ("torch_mics.calibration/1", "torch_mics.calibration/2", "schema", "must be"),
        ("2026-11-25", "yesterday", "date", "must be a date"),
    ],
)
def test_malformed_field_is_named_with_its_line(old: str, new: str, field: str, rule: str) -> None:
    text = shipped_text().replace(old, new, 1)
    assert text != shipped_text()
    with pytest.raises(ValueError, match=re.escape(rule)) as caught:
        parse_calibration(text, "p5.json")
    message = str(caught.value)
    line = int(re.findall(r"p5.json, line (\d+), field", message)[0])
    assert field in message
    key = field.rpartition(".")[2]
    if new:
        assert f'"{key}"' in text.splitlines()[line - 1]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{"a": 1,\n"a": 2}', 2, 'the key "a" is there twice'),
        ('{"a": 1\n"b": 2}', 2, '"," must come here'),
        ('{"a":\n nothing}', 2, "missing or misspelt"),
        ("{}\n{}", 2, "more text"),
        ('{"a": [1,\n2', 2, '"," must come here'),
        ("{\na: 1}", 2, "double quotes"),
        ("", 1, "missing or misspelt"),
    ],
)
def test_text_that_is_no_json_is_refused_with_its_line(text: str, line: int, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        parse_calibration(text, "x.json")
    assert f"x.json, line {line}" in str(caught.value)


def test_located_json_reads_what_json_reads() -> None:
    text = json.dumps(dump_calibration(load_calibration("p5")))
    odd = '{"a": [1.5e3, -2, true, false, null, "\\u00e9\\n", {}, []], "b": {"c": 0}}'
    from torch_mics.planner._located_json import LocatedJson

    for source in (text, odd):
        assert LocatedJson(source, "x").value == json.loads(source)
