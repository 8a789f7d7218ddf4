"""What a study takes on this machine: runs, FLOPs and disk by closed forms, and which steps are timed."""

import dataclasses
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from rich.console import Console

from common.train.config import Adafactor, Anomalies, Budget, Linear
from common.train.programs import abstract_batch, make_programs
from common.train.state import init_state
from experiments.members import Key, members_of
from experiments.planning import here, timing
from experiments.planning.timing import Measured, StepTime, measure, shape, step_time, to_measure
from experiments.planning.totals import RunCount, describe_runs, kept_checkpoints, state_bytes
from experiments.run import After, Run
from experiments.running.pipeline import compiled_step, make_setup
from experiments.search import LogRange, Search
from experiments.study import Study
from tests.experiments.tiny_study import tiny_run, tiny_study, with_data, with_model, with_train


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return tiny_study(tmp_path)


def run_all(study: Study, loss: Callable[[str, float], float]) -> int:
    """Returns how many runs `members_of` adds up to if a run's loss follows from its arm and learning rate."""
    losses: dict[Key, float] = {}
    while not (members := members_of(study, losses)).complete:
        losses |= {member.key: loss(member.arm, member.run.learning_rate) for member in members.members}
    return len(members.members)


@pytest.mark.parametrize("trial_seeds", [1, 2, 5])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_runs_are_those_that_a_search_leads_to(study: Study, trial_seeds: int, seeds: int) -> None:
    """The least where the best rate lies inside, the most where one arm's is the lowest and the other's the highest."""
    search = Search(rates=(1e-3, 1e-2, 1e-1), seeds=trial_seeds, extend=2)
    study = dataclasses.replace(study, seeds=seeds, search=search)
    count = RunCount.of(study)
    assert count.first == 2 * 3 * min(trial_seeds, seeds)
    assert count.least == run_all(study, lambda arm, rate: abs(rate - 1e-2))
    assert count.most == run_all(study, lambda arm, rate: rate if arm == "gpt" else -rate)


def test_arms_that_start_from_others_are_counted(study: Study) -> None:
    """They are not known before those that they start from have a rate."""
    after = dataclasses.replace(study.arms["gpt"], after=After(arm="gpt"))
    search = Search(rates=(1e-3, 1e-2, 1e-1))
    study = dataclasses.replace(study, arms={**study.arms, "after": after}, seeds=2, search=search)
    count = RunCount.of(study)
    assert count.first == 2 * 3 and count.least == run_all(study, lambda arm, rate: abs(rate - 1e-2)) == 3 * (3 + 1)


def test_without_a_search_every_arm_is_trained_with_every_seed(study: Study) -> None:
    study = dataclasses.replace(study, seeds=3)
    count = RunCount.of(study)
    assert count == RunCount(first=6, least=6, most=6)
    assert describe_runs(study, count) == "6 (2 arms x 3 seeds)"
    assert count.over({"gpt": 1.0, "t5like": 10.0}) == (33.0, 33.0)


def test_a_search_is_described(study: Study) -> None:
    study = dataclasses.replace(study, seeds=3, search=Search(rates=(1e-3, 1e-2), extend=1))
    assert describe_runs(study, RunCount.of(study)) == (
        "8 (2 arms x 2 rates x 1 seed, then 2 more seeds at the best rate); 12 if the search is extended all the way"
    )
    decay = LogRange(path="train.optimizer.weight_decay", low=0.01, high=1.0)
    several = Search(rates=(1e-3, 1e-2), also=(decay,), extend=0)
    study = dataclasses.replace(study, search=several)
    assert describe_runs(study, RunCount.of(study)) == (
        "16 (2 arms x 2 rates x 3 values of weight_decay x 1 seed, then 2 more seeds with the best trial)"
    )
    study = dataclasses.replace(study, search=dataclasses.replace(several, draws=16, seeds=3, extend=2))
    assert describe_runs(study, RunCount.of(study)) == "96 (2 arms x 16 random draws x 3 seeds)"


@pytest.mark.parametrize(
    ("steps", "every", "keep_last", "kept"),
    [(40, 5, 2, 3), (40, 40, 2, 1), (41, 40, 2, 2), (40, 20, 1, 2), (10, 50, 2, 1), (100, 1, 5, 6)],
)
def test_kept_checkpoints(tmp_path: Path, steps: int, every: int, keep_last: int, kept: int) -> None:
    """There is one every so many steps and one at the end; the newest ones stay, and the best one."""
    budget = Budget(unit="steps", amount=steps)
    run = with_train(tiny_run(tmp_path), budget=budget, checkpoint_every=every, keep_last=keep_last)
    assert kept_checkpoints(run) == kept


@pytest.mark.parametrize("optimizer", [None, Adafactor()], ids=["adamw", "adafactor"])
def test_a_checkpoint_holds_parameters_and_the_optimizers_state(tmp_path: Path, optimizer: Adafactor | None) -> None:
    run = tiny_run(tmp_path)
    if optimizer is not None:
        run = with_train(run, optimizer=optimizer)
    programs, parameters = make_programs(make_setup(run)), run.model.param_count()
    state = init_state(programs.model, programs.optimizer, 0, programs.shardings)
    assert state_bytes(run) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if optimizer is None:
        assert 0 <= state_bytes(run) - 12 * parameters <= 16  # and a few scalars
    else:
        assert 4 * parameters < state_bytes(run) < 12 * parameters


def test_runs_that_differ_in_numbers_only_have_one_shape(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    same = [
        dataclasses.replace(run, learning_rate=1.0, labels={"a": 1}, about="?"),
        with_data(with_train(run, seed=3), seed=3),
        with_train(run, budget=Budget(unit="tokens", amount=1e6), schedule=Linear(), validate_every=7),
    ]
    others = [with_data(run, rows=8), with_model(run, d_ff=64), with_train(run, accumulation=2)]
    assert {shape(one) for one in same} == {shape(run)}
    assert len({shape(one) for one in (run, *others)}) == 4


def widths(tmp_path: Path, count: int) -> list[Run]:
    return [with_model(tiny_run(tmp_path), d_ff=32 + 8 * i) for i in range(count)]


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9])])
def test_the_measured_shapes_are_spread_over_all(tmp_path: Path, count: int, chosen: list[int]) -> None:
    runs = widths(tmp_path, count)
    assert to_measure(runs[::-1]) == [runs[i] for i in chosen]


def measured(run: Run, seconds: float | None) -> Measured:
    return Measured(flops=run.flops_per_step, arguments_bytes=0, temporaries_bytes=0, seconds=seconds)


def test_steps_that_are_not_timed_are_estimated_by_flops(tmp_path: Path) -> None:
    cheap, near, dear = widths(tmp_path, 10)[0], widths(tmp_path, 10)[8], widths(tmp_path, 10)[9]
    found = {shape(cheap): measured(cheap, 1.0), shape(dear): measured(dear, 3.0)}
    assert step_time(cheap, found) == StepTime(seconds=1.0, by_flops=False)
    expected = StepTime(seconds=3.0 * near.flops_per_step / dear.flops_per_step, by_flops=True)
    assert step_time(near, found) == step_time(near, found | {shape(near): measured(near, None)}) == expected
    assert step_time(near, {}) is None


@pytest.mark.parametrize("anomalies", [Anomalies(), Anomalies(on_nonfinite="skip")], ids=["plain", "guarded"])
def test_a_step_is_measured(tmp_path: Path, anomalies: Anomalies) -> None:
    """The program is the one that training would run; a random batch has the shapes that it takes."""
    run = with_train(tiny_run(tmp_path), anomalies=anomalies)
    setup = make_setup(run)
    programs = make_programs(setup)
    batch = programs.put(timing._random_batch(setup, programs))
    expected = abstract_batch(setup.row_slots, programs.batch_sharding)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    found, memory = measure(run, {}), compiled_step(run).memory_analysis()
    assert found.seconds is not None and found.seconds > 0 and not found.untimed
    assert found.arguments_bytes == memory.argument_size_in_bytes >= state_bytes(run)
    assert found.temporaries_bytes == memory.temp_size_in_bytes


def test_a_step_that_does_not_fit_or_takes_too_long_is_not_timed(tmp_path: Path, monkeypatch) -> None:
    run = tiny_run(tmp_path)
    monkeypatch.setattr(timing, "_seconds", lambda *args: pytest.fail("timed"))
    slow = measured(run, 2 * timing.SLOWEST_STEP_SECONDS)
    assert "too long" in measure(run, {shape(run): slow}).untimed
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable:      100 kB\n")
    monkeypatch.setattr(timing, "MEMORY", tmp_path / "meminfo")
    assert "and 0.0 are free" in measure(run, {}).untimed


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that are timed: a second for every 1e6 FLOPs."""
    runs: list[Run] = []

    def stand_in(run: Run, before: object) -> Measured:
        runs.append(run)
        return measured(run, run.flops_per_step / 1e6)

    monkeypatch.setattr(here, "measure", stand_in)
    return runs


def shown(study: Study) -> str:
    out = io.StringIO()
    here.plan_here(study, Console(file=out, width=80))
    return out.getvalue()


def test_the_totals_are_those_of_all_runs(timed: list[Run], study: Study) -> None:
    """Both arms with both seeds, 40 steps each; three checkpoints are kept."""
    lines = shown(dataclasses.replace(study, seeds=2)).splitlines()
    flops = 2 * 40 * sum(run.flops_per_step for run in study.arms.values())
    assert lines[0] == "runs: 4 (2 arms x 2 seeds)"
    name, value = lines[1].split(": ")
    assert name == "training FLOPs" and float(value) == pytest.approx(flops, rel=0.005)
    size = 2 * 3 * sum(map(state_bytes, study.arms.values())) / 2**20
    assert lines[2].startswith(f"checkpoints: {size:.0f} MiB at most; a run keeps up to 3 of them")
    assert lines[2].endswith("state, 12 bytes a parameter")
    minutes = round(flops / 1e6 / 60)
    assert lines[3].startswith("training here, one run at a time: ") and "by FLOPs" not in lines[3]
    hours, rest = divmod(minutes, 60)
    assert f"time: {f'{hours} h {rest:02d}' if hours else minutes} min" in lines[3]
    assert len(timed) == 2


def test_a_study_of_many_arms_is_a_line_an_arm_and_times_a_few(timed: list[Run], study: Study) -> None:
    """The study has 48 arms in 8 shapes. Four shapes are timed, which half of the arms have."""
    arms = {
        f"{family}-{width}-{rate}": dataclasses.replace(
            with_model(study.arms[family], d_ff=width), learning_rate=rate, labels={}
        )
        for family, width, rate in itertools.product(study.arms, (32, 40, 48, 56), (1, 2, 3, 4, 5, 6))
    }
    text = shown(dataclasses.replace(study, arms=arms))
    assert len(timed) == 4
    assert "; 24 of 48 arms by FLOPs from the timed ones;" in text
    for name in arms:
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{name} ")]
        assert re.search(r" ~?[\d.]+ s +~?[\dhmins ]+$", line.strip()) and len(line) <= 80


def test_an_unknown_time_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    monkeypatch.setattr(
        here, "measure", lambda run, before: dataclasses.replace(measured(run, None), untimed="it is Monday")
    )
    text = shown(study)
    assert "time here: unknown" in text and "gpt is not timed: it is Monday" in text
