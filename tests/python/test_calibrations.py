"""The calibrations that the planner is shipped with, and how malformed ones are refused."""

from __future__ import annotations

import json
import re

import pytest

from torch_mics import _C
from torch_mics.planner import load_calibration
from torch_mics.planner._calibration import dump_calibration, parse_calibration, shipped_instances
from torch_mics.planner._located_json import LocatedJson


def test_gathers_of_p5_are_predicted_by_two_numbers() -> None:
    calibration = load_calibration("p5")
    machine = calibration.cluster(0).machine
    points = calibration.tables["flat"].points
    assert len(points) == 35
    errors = [abs(_C.flat_seconds(machine, n, b) / s - 1) for n, b, s in points]
    assert sum(errors) / len(errors) <= 0.09


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
    for source in (text, odd):
        assert LocatedJson(source, "x").value == json.loads(source)
