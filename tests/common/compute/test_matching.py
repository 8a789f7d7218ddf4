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
from experiments.cli.main import main
from experiments.config import Experiment
from experiments.registry import EXPERIMENTS, load
from experiments.running import comparison
from t5like.config import RUNGS
from tests.helpers import gpt, t5like

DEEPER = "arms.gpt.model.num_layers=5"


def relative_difference(experiment: Experiment) -> float:
    flops = [experiment.flops_per_step(arm) for arm in experiment.arms.values()]
    return max(flops) / min(flops) - 1


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_built_in_experiments_are_matched(name: str) -> None:
    experiment = load(name)
    assert relative_difference(experiment) <= FLOPS_TOLERANCE and experiment.remarks() == []


@pytest.mark.parametrize("change", [DEEPER, "arms.t5like.model.encoder_layers=3", "arms.gpt.model.d_ff=700"])
def test_the_proposed_override_makes_arms_equal(change: str) -> None:
    experiment = apply_overrides(load("first_light"), [change])
    (remark,) = experiment.remarks()
    assert f"{relative_difference(experiment):.2%} apart" in remark and "(the certificate allows 1%)" in remark
    proposed = remark.partition("--match gpt makes them equal: ")[2].split()[0]
    assert proposed.startswith("arms.t5like.model.d_ff=")
    assert apply_overrides(experiment, [proposed]).remarks() == []


def test_the_proposal_changes_the_fewest_arms() -> None:
    experiment = apply_overrides(load("ladder"), ["arms.4-causal.model.d_ff=900"])
    (remark,) = experiment.remarks()
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
    assert main(["compare", "first_light", DEEPER, "--match", "gpt", "--print-config"]) == 0
    printed = capsys.readouterr()
    experiment = from_json(Experiment, json.loads(printed.out))
    assert relative_difference(experiment) <= FLOPS_TOLERANCE
    assert printed.err == f"--match gpt: arms.t5like.model.d_ff={experiment.arms['t5like'].model.d_ff}\n"
    assert main(["plan", "first_light", "--match", "gpt", "--print-config"]) == 0
    printed = capsys.readouterr()
    assert from_json(Experiment, json.loads(printed.out)) == load("first_light") and "all arms do" in printed.err


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
    assert main(["compare", "first_light", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_run_reports_the_difference_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise UserError("as far as the data")

    monkeypatch.setattr(comparison, "open_data", stop)
    assert main(["train", "first_light", "--arm", "gpt", "--run-dir", str(tmp_path / "run"), DEEPER]) == 2
    printed = capsys.readouterr()
    assert "as far as the data" in printed.err
    assert "training FLOPs of a step are" in " ".join(printed.out.split())
