"""The certificate reports arms that differ, and names the step or field."""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.report.certificate import Certificate, certify
from common.report.checks import Check
from common.report.one_recipe import one_recipe
from common.report.parity import first_difference
from common.report.run_files import read_study
from common.report.tables import certificate_panel
from tests.common.report.studies import finished, study_of

Files = dict[str, Any]


def check(certificate: Certificate, part: str) -> Check:
    (found,) = [c for c in certificate.checks if part in c.name]
    return found


def test_equal_arms_agree_in_every_check(write_run: Callable[..., Path]) -> None:
    certificate = certify(read_study(write_run()))
    assert certificate.agrees and certificate.arms == ("enc-dec", "dec-only")
    names = [c.name for c in certificate.checks]
    assert names == [
        "same data in the same order",
        "same dataset version",
        "same tokenizer",
        "same steps, examples and tokens",
        "training FLOPs within 1 %",
        "one recipe",
        "ledger = XLA within 2 %",
    ]
    assert "model.d_ff (512 / 464)" in check(certificate, "recipe").detail  # sizes may differ, but are shown
    assert all(len(fact.values) == 2 for fact in certificate.facts)


def test_how_arms_are_computed_is_not_part_of_the_recipe() -> None:
    """It is shown, as sizes are. Precision is part of the recipe."""
    configs = {
        arm: {"train": {"mesh": {"fsdp": fsdp}, "execution": {"remat": "full", "dtype": dtype}}}
        for arm, fsdp, dtype in (("a", 4, "float32"), ("b", 2, "float32"), ("c", 2, "bfloat16"))
    }
    found = one_recipe({arm: configs[arm] for arm in ("a", "b")}, apart=())
    assert found.agrees and "train.mesh.fsdp (4 / 2)" in found.detail
    assert not one_recipe(configs, apart=()).agrees


def test_how_arms_are_watched_is_not_part_of_the_recipe() -> None:
    """A finished arm keeps its checkpoints where a later one is validated and saved at other steps."""
    configs = {
        arm: {"train": {"validate_every": n, "checkpoint_every": n, "seed": 0}} for arm, n in (("a", 4), ("b", 2))
    }
    assert one_recipe(configs, apart=()).agrees
    configs["b"]["train"]["seed"] = 1
    assert not one_recipe(configs, apart=()).agrees


MODEL = {"kind": "dec", "d_ff": 8, "num_layers": 2, "recipe": {"norm": "rms"}}
OTHER_FAMILY = {"kind": "enc-dec", "d_ff": 9, "encoder_layers": 2, "memory": "final", "recipe": {"norm": "rms"}}


@pytest.mark.parametrize(
    ("first", "second", "apart", "detail"),
    [
        ({"init": None}, {"init": {"path": "runs/x", "rules": []}}, (), "init.path: a absent, b runs/x"),
        ({"init": {"path": "runs/x", "rules": []}}, {}, (), "init.path: a runs/x, b absent"),
        ({"data": {"words": {}}}, {"data": {}}, (), "data.words: a {}, b absent"),
        ({"seed": "absent"}, {}, (), "seed: a absent, b absent"),  # the text "absent" is a value
        ({"model": MODEL}, {"model": MODEL | {"memory": "final"}}, (), "model.memory: a absent, b final"),
        ({"model": MODEL}, {"model": OTHER_FAMILY | {"recipe": {}}}, (), "model.recipe.norm: a rms, b absent"),
        ({"init": None}, {"init": {"path": "runs/x"}}, ("init",), None),
        ({"init": None}, {"init": None}, (), None),
        ({"model": MODEL}, {"model": OTHER_FAMILY}, (), None),
    ],
)
def test_a_field_that_one_arm_lacks_is_a_difference(
    first: dict[str, Any], second: dict[str, Any], apart: tuple[str, ...], detail: str | None
) -> None:
    """Fields of one family only are no difference, but they are shown."""
    for configs in ({"a": first, "b": second}, {"b": second, "a": first}):
        found = one_recipe(configs, apart)
        assert found.agrees is (detail is None), found.detail
        for part in (detail or "").split(": ")[-1].split(", "):
            assert part in found.detail
    if "memory" in second.get("model", {}) and detail is None:
        assert "model.memory (final / absent)" in found.detail
        three = one_recipe(configs | {"c": {"model": OTHER_FAMILY | {"memory": "layerwise"}}}, apart)
        assert not three.agrees and "model.memory: b final, a absent, c layerwise" in three.detail


def differ_from(step: int) -> Callable[[Files], None]:
    """Changes the order from `step` on: once chained fingerprints differ, they stay different."""

    def edit(files: Files) -> None:
        for row in files["dec-only/metrics.jsonl"]:
            if row["step"] >= step:
                row["fingerprint"] = "f" + row["fingerprint"][1:]
        files["dec-only/result.json"]["fingerprint"] = files["dec-only/metrics.jsonl"][-1]["fingerprint"]

    return edit


def setting(path: str, *keys: str, value: Any) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        place = files[path]
        for key in keys[:-1]:
            place = place[key]
        assert place[keys[-1]] != value
        place[keys[-1]] = value

    return edit


def stop_early(files: Files) -> None:
    del files["dec-only/metrics.jsonl"][100:]
    files["dec-only/result.json"] |= {"steps": 100, "fingerprint": files["dec-only/metrics.jsonl"][-1]["fingerprint"]}


@pytest.mark.parametrize(
    ("edit", "name", "detail"),
    [
        (differ_from(57), "same order", "agree up to step 56 and differ from step 57"),
        (differ_from(1), "same order", "differ from their first step (1)"),
        (stop_early, "same order", "differ from step 101"),
        (setting("dec-only/result.json", "fingerprint", value="0"), "same order", "dec-only: the last fingerprint"),
        (
            setting("dec-only/environment.json", "tokenizer_hash", value="beef"),
            "tokenizer",
            "enc-dec f00d, dec-only beef",
        ),
        (setting("dec-only/environment.json", "content_id", value="v2"), "dataset version", "dec-only v2"),
        (setting("dec-only/environment.json", "content_id", value=None), "dataset version", "dec-only None"),
        (setting("dec-only/result.json", "loss_tokens", value=371_999), "steps, examples", "371,999 with loss"),
        (setting("dec-only/result.json", "flops", "full_attention", value=4.2e14), "FLOPs", "2.44 % apart"),
        (setting("dec-only/result.json", "xla_flops_per_step", value=3.3e12), "XLA", "dec-only +3.55 %"),
        (setting("dec-only/result.json", "xla_flops_per_step", value=math.nan), "XLA", "dec-only nan %"),
        (setting("dec-only/config.json", "data", "seed", value=5), "recipe", "data.seed: enc-dec 0, dec-only 5"),
        (setting("dec-only/config.json", "model", "norm", value="layer"), "recipe", "model.norm"),
        (setting("dec-only/config.json", "optimizer", "kind", value="lion"), "recipe", "optimizer.kind"),
    ],
)
def test_only_the_check_of_a_difference_fails(
    write_run: Callable[..., Path], edit: Callable[[Files], None], name: str, detail: str
) -> None:
    certificate = certify(read_study(write_run(edit)))
    assert not certificate.agrees and "DIFFER" in certificate.headline
    failed = check(certificate, name)
    assert not failed.agrees and detail in failed.detail
    others = [c.name for c in certificate.checks if not c.agrees and c is not failed]
    assert others == (["same steps, examples and tokens"] if edit is stop_early else [])


def uncount(files: Files) -> None:
    files["dec-only/result.json"] |= {"xla_flops_per_step": None, "why_not_counted": "ValueError: no bound"}


@pytest.mark.parametrize("edit", [uncount, setting("dec-only/result.json", "xla_flops_per_step", value=0.0)])
def test_an_unmade_check_neither_agrees_nor_differs(
    write_run: Callable[..., Path], edit: Callable[[Files], None]
) -> None:
    """The certificate shows that nothing was counted (earlier versions wrote 0, except for CPU programs)."""
    certificate = certify(read_study(write_run(edit)))
    found = check(certificate, "XLA")
    why = " (ValueError: no bound)" if edit is uncount else ""
    assert found.agrees is None and found.detail == f"enc-dec −0.38 %, dec-only not counted{why}"
    assert certificate.agrees is None and certificate.headline == "no check differs, 1 could not be made"
    (fact,) = [fact for fact in certificate.facts if "XLA" in fact.name]
    assert fact.values == ("3.430e12", "not counted")


def test_a_difference_outranks_an_unmade_check(write_run: Callable[..., Path]) -> None:
    def edit(files: Files) -> None:
        uncount(files)
        files["enc-dec/result.json"]["xla_flops_per_step"] = 1.0
        files["dec-only/environment.json"]["tokenizer_hash"] = "beef"

    certificate = certify(read_study(write_run(edit)))
    assert certificate.agrees is False and check(certificate, "XLA").agrees is False
    assert certificate.headline == "2 of 7 checks DIFFER"

    def without(files: Files) -> None:
        uncount(files)
        files["dec-only/environment.json"]["tokenizer_hash"] = "beef"

    assert certify(read_study(write_run(without))).headline == "1 of 7 checks DIFFER, 1 could not be made"


def test_tolerances_hold_in_both_directions() -> None:
    base = finished("a")
    for factor, agrees in ((1.0099, True), (0.9902, True), (1.0101, False), (0.9899, False)):
        flops = dataclasses.replace(base.result.flops, full_attention=base.result.flops.full_attention * factor)
        assert check(certify(study_of(base, finished("b", flops=flops))), "FLOPs").agrees is agrees
    for factor, agrees in ((1.0199, True), (0.9801, True), (1.0201, False), (0.9799, False)):
        assert base.result.xla_flops_per_step is not None
        lone = finished("a", ledger_flops_per_step=base.result.xla_flops_per_step * factor)
        assert check(certify(study_of(lone)), "XLA").agrees is agrees


def test_a_lone_arm_is_checked_against_xla_only() -> None:
    certificate = certify(study_of(finished("a")))
    assert certificate.headline == "only one arm: nothing to compare"
    assert [c.name for c in certificate.checks] == ["ledger = XLA within 2 %"]


def test_the_middle_of_three_arms_differs() -> None:
    runs = [finished("a"), finished("b", fingerprint="1"), finished("c")]
    assert not check(certify(study_of(*runs)), "same order").agrees


def test_first_difference_equals_brute_force() -> None:
    for a, b in itertools.product(itertools.product("xy", repeat=3), repeat=2):
        want = next((i for i in range(3) if a[i] != b[i]), None)
        assert first_difference({"a": dict(enumerate(a)), "b": dict(enumerate(b))}) == want


def test_panel_shows_names_as_text_not_markup() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    other = finished("b", fingerprint="1", xla_flops_per_step=None, why_not_counted="[red]why")
    console.print(certificate_panel(certify(study_of(finished("[bold]a[/bold]"), other))))
    text = console.export_text()
    assert "[bold]a[/bold]" in text and "DIFFERS" in text and "agree" in text
    assert "unchecked" in text and "not counted ([red]why)" in text
