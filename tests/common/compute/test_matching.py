"""Arms whose training FLOPs differ are reported, and can be matched."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from common.compute.ledger import FLOPS_TOLERANCE
from common.compute.length_sums import LengthSums
from common.compute.matching import matching_widths, unequal
from common.config import apply_overrides, from_json
from common.errors import UserError
from experiments import find
from experiments.cli.main import main
from experiments.running import execute
from experiments.study import Study
from t5like.config import RUNGS
from tests.helpers import gpt, t5like

DEEPER = "arms.gpt.model.num_layers=5"


def relative_difference(study: Study) -> float:
    flops = [run.flops_per_step for run in study.arms.values()]
    return max(flops) / min(flops) - 1


@pytest.mark.parametrize("name", find.OWN)
def test_built_in_studies_are_matched(name: str) -> None:
    """Within each group of arms that the study claims to compare."""
    study = find.load(name)
    for claim in study.parity:
        for group in study.groups(claim):
            assert len(group) > 1 and relative_difference(study.only(group)) <= FLOPS_TOLERANCE, group
    assert study.remarks() == []


@pytest.mark.parametrize("change", [DEEPER, "arms.t5like.model.encoder_layers=3", "arms.gpt.model.d_ff=700"])
def test_the_proposed_override_makes_arms_equal(change: str) -> None:
    study = apply_overrides(find.load("first_light"), [change])
    (remark,) = study.remarks()
    assert f"{relative_difference(study):.2%} apart" in remark and "(the certificate allows 1%)" in remark
    proposed = remark.partition("--match gpt makes them equal: ")[2].split()[0]
    assert proposed.startswith("arms.t5like.model.d_ff=")
    assert apply_overrides(study, [proposed]).remarks() == []


def test_the_proposal_changes_the_fewest_arms() -> None:
    study = apply_overrides(find.load("ladder"), ["arms.4-causal.model.d_ff=900"])
    (remark,) = study.remarks()
    assert remark.count(".d_ff=") == 1 and "arms.4-causal.model.d_ff=" in remark
    assert "--match 4-causal" not in remark


def test_after_matching_any_two_of_many_arms_are_equal() -> None:
    lengths = LengthSums.of_rows(4, 48, 32)
    models: dict[str, Any] = {
        str(rung): t5like(encoder_layers=2, decoder_layers=2, d_ff=40 + 8 * rung, **switches)
        for rung, switches in enumerate(RUNGS)
    }
    models["gpt"] = gpt(num_layers=3, d_ff=200)
    assert unequal(models, lengths) is not None
    for name, width in matching_widths(models, "gpt", lengths).items():
        models[name] = dataclasses.replace(models[name], d_ff=width)
    for one, other in itertools.combinations(models.values(), 2):
        assert unequal({"one": one, "other": other}, lengths) is None
    assert matching_widths(models, "gpt", lengths) == {}


def test_match_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "first_light", DEEPER, "--match", "gpt", "--print-config"]) == 0
    printed = capsys.readouterr()
    study = from_json(Study, json.loads(printed.out))
    assert relative_difference(study) <= FLOPS_TOLERANCE
    assert printed.err == f"--match gpt: arms.t5like.model.d_ff={study.arms['t5like'].model.d_ff}\n"
    assert main(["plan", "first_light", "--match", "gpt", "--print-config"]) == 0
    printed = capsys.readouterr()
    assert from_json(Study, json.loads(printed.out)) == find.load("first_light") and "all arms do" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--match", "gtp"], "--match 'gtp' is no arm: did you mean 'gpt'?"),
        (
            ["arms.gpt.model.num_layers=1", "arms.gpt.model.d_ff=8", "--match", "gpt"],
            "t5like cannot match gpt: no d_ff",
        ),
    ],
)
def test_an_arm_that_cannot_be_matched_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "first_light", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_run_reports_the_difference_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise UserError("as far as the data")

    monkeypatch.setattr(execute, "open_data", stop)
    assert main(["run", "first_light", "arm=gpt", "--run-dir", str(tmp_path / "run"), DEEPER]) == 2
    printed = capsys.readouterr()
    assert "as far as the data" in printed.err
    assert "training FLOPs of a step are" in " ".join(printed.out.split())
