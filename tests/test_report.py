"""The verification report counts what ran, names what was worst, and says what was skipped and why."""

import json

import pytest

from sbkernels.verify import report, tolerance
from sbkernels.verify.inputs import LAYOUTS, MEMORY, REGIMES, Case, cases
from sbkernels.verify.run import Outcome

Finding = tolerance.Finding


@pytest.fixture(scope="module")
def found():
    def outcome(name, ratio=0.5, variant="", **more):
        findings = [Finding(output, ratio + 0.1 * (output == "dk"), 0, 0, f"at {ratio}") for output in tolerance.OUTPUTS]
        return Outcome("torch", variant, "float16", str(name), findings, seconds=2.0, **more)

    outcomes = [
        outcome(Case(M=1, N=1)),
        outcome(Case("zero", lengths=(3, 0)), 1.0),
        Outcome("torch", "log <b>", "float16", str(Case()), skipped="no such <thing>"),
        Outcome("torch", "log <b>", "float16", str(Case()), error="RuntimeError: planted"),
        Outcome("torch", "", "float16", "mass", [Finding("o + r", 0.25, 0, 0, "here")], seconds=1.0),
        Outcome("torch", "", "float32", "streams", skipped="a matter of GPUs"),
    ]
    return report.report(outcomes, {"cuda": "no GPU"}, planned=8)


def test_counts(found):
    assert [found[name] for name in ("planned", "ran", "skipped", "failed", "seconds")] == [8, 4, 2, 2, 5.0]
    assert "8 checks planned: 4 ran in 5 s, 2 skipped, 2 failed, 2 not reached" in report.totals(found)
    assert {"backend": "torch (log <b>)", "reason": "no such <thing>", "count": 1} in found["reasons"]


def test_checks(found):
    rows = {(row["backend"], row["check"]): row for row in found["checks"]}
    whole, dk, mass = (rows["torch", name] for name in ("cases", "dk", "mass"))
    assert (whole["run"], whole["failed"], whole["worst"], whole["seconds"]) == (2, 1, 1.1, 4.0)
    assert whole["where"] == "float16 Case(regime=zero, lengths=(3, 0)): dk, at 1.0"
    assert (dk["worst"], dk["seconds"], rows["torch", "dq"]["failed"]) == (1.1, None, 0)
    assert (mass["run"], mass["worst"], mass["seconds"]) == (1, 0.25, 1.0)
    assert (rows["torch (log <b>)", "cases"]["failed"], rows["torch (log <b>)", "dv"]["skipped"]) == (1, 1)


def test_coverage(found):
    matrix = found["coverage"]
    assert matrix["dtype float16"] == {"torch": [2, 0], "torch (log <b>)": [1, 1]}
    assert matrix["empty sequences"]["torch"] == matrix["1 keys"]["torch"] == [1, 0]
    assert matrix["properties"]["torch"] == [1, 1] and matrix["regime std30"]["torch"] == [0, 0]


def test_every_feature_is_covered_on_a_gpu():
    """By the set of cases without the long ones, but for those."""
    for feature, has in report.FEATURES.items():
        assert any(map(has, cases(large=feature == "4096 keys"))), feature
    assert {f"regime {name}" for name in REGIMES} | {f"memory {name}" for name in (*LAYOUTS, *MEMORY)} <= report.FEATURES.keys()


def test_json_and_html(found):
    assert json.loads(json.dumps(found)) == found
    page = report.section(found)
    assert page.startswith("<section") and page.count("<table>") == page.count("</table>") == 3
    assert "no such &lt;thing&gt;" in page and "<b>" not in page and "no GPU" in page
