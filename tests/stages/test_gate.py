"""A model that does not come to what was asked is told apart, figure by figure."""

import pytest
from pydantic import ValidationError

from configs.delivery import Gate, GateSpec
from configs.errors import DataError
from stages.artifacts import Bundle, Parity, Report
from stages.contract import Workspace
from stages.gate import gate

REPORT = Report(uri="/", headline={"after_pass_at_1": 0.5, "after_bits_per_byte": 2.5})


def judge(work: Workspace, **gates: Gate) -> Report:
    return gate.run(GateSpec(gates=gates), work, report=REPORT)


def test_figures_within_their_bounds_pass(workspace: Workspace) -> None:
    made = judge(
        workspace,
        after_pass_at_1=Gate(at_least=0.5),
        after_bits_per_byte=Gate(at_least=1, at_most=2.5),
    )
    assert made.told() is None
    assert made.headline == REPORT.headline
    assert (
        "| after_pass_at_1 | 0.5 | at least 0.5 | yes |" in workspace.path("report.md").read_text()
    )


def test_a_figure_beyond_its_bound_is_named_with_both_numbers(workspace: Workspace) -> None:
    made = judge(
        workspace, after_pass_at_1=Gate(at_least=0.6), after_bits_per_byte=Gate(at_most=2.4)
    )
    assert made.told() == (
        "after_pass_at_1 = 0.5, where evaluate.gates asks for at least 0.6; "
        "after_bits_per_byte = 2.5, where evaluate.gates asks for at most 2.4"
    )
    assert "| no |" in workspace.path("report.md").read_text()


def test_a_figure_that_is_no_number_passes_no_gate() -> None:
    assert not Gate(at_least=0).admits(float("nan"))
    assert not Gate(at_most=0).admits(float("nan"))


def test_a_figure_that_the_report_lacks_is_an_error(workspace: Workspace) -> None:
    with pytest.raises(DataError, match=r"evaluate\.gates\.pass_at_1: the report has no such"):
        judge(workspace, pass_at_1=Gate(at_least=0.6))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [({}, "asks for nothing"), ({"at_least": 2, "at_most": 1}, "above at_most = 1")],
)
def test_a_gate_that_asks_for_nothing_that_can_be_is_refused(
    bounds: dict[str, float], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Gate.model_validate(bounds)


def test_a_bundle_of_a_model_that_fell_short_has_no_alias() -> None:
    parity = {"bf16": Parity(positions=1, max_abs_logit_error=0, top1_agreement=1, mean_kl_nats=0)}
    made = Bundle(uri="/", target="cuda", parity=parity)
    assert (made.alias(), made.told()) == ("cuda", None)
    short = made.model_copy(update={"shortfall": "too small"})
    assert (short.alias(), short.told()) == (None, "too small")
