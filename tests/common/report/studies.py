"""Makes studies in memory, without files."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from common.report.claims import Parity
from common.report.results import ArmResult, Flops
from common.report.run_files import FinishedRun, MetricsRow, ScoredSample, StudyRuns
from common.report.run_list import Choice, ListedRun, RunList

STEPS, TOKENS_A_STEP = 120, 7300
RATE = 2e-3


def result_of(arm: str, **changes: Any) -> ArmResult:
    """Makes a finished run's result; `changes` replace fields."""
    flops = Flops(full_attention=4.1e14, causal_half=3.9e14, six_nd=3.7e14, useful_full_attention=3.55e14)
    result = ArmResult(
        arm=arm,
        parameters=2_310_000,
        steps=STEPS,
        flops=flops,
        examples=91_234,
        tokens=STEPS * TOKENS_A_STEP,
        loss_tokens=STEPS * 3100,
        slots=STEPS * 8192,
        input_fill=0.94,
        target_fill=0.88,
        train_loss=0.041,
        validation_loss=0.0512,
        train_seconds=171.0,
        tokens_per_second=5120.0,
        data_wait_share=0.004,
        fingerprint=f"{STEPS:032x}",
        xla_flops_per_step=3.43e12,
        ledger_flops_per_step=3.417e12,
        scores=(),
    )
    return dataclasses.replace(result, **changes)


def rows_of(chain: Sequence[str], source: Sequence[str] | None = None, loss: float = 1.0) -> tuple[MetricsRow, ...]:
    """Makes a row of metrics for each chained fingerprint; `source` are those of the source examples."""
    return tuple(
        MetricsRow(
            step=i + 1,
            loss=loss + 1 / (i + 1),
            tokens=(i + 1) * TOKENS_A_STEP,
            flops=(i + 1) * 3.417e12,
            fingerprint=value,
            source_fingerprint=None if source is None else source[i],
            validation_loss=loss if i + 1 == len(chain) else None,
        )
        for i, value in enumerate(chain)
    )


def finished(
    arm: str,
    *,
    seed: int = 0,
    rate: float = RATE,
    labels: Mapping[str, str | int | float] | None = None,
    compared: bool = True,
    tried: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    chain: Sequence[str] = (),
    source: Sequence[str] | None = None,
    samples: Sequence[ScoredSample] = (),
    **changes: Any,
) -> FinishedRun:
    """Makes a finished run; `chain` are its fingerprints step by step, `changes` replace fields of its result."""
    own = {"arm": arm, **(labels or {}), "seed": seed, "learning_rate": rate}
    name = f"{arm}-lr{rate:g}-s{seed}"
    name += "".join(f"-{value:g}" for value in (tried or {}).values())
    listed = ListedRun(
        **{"name": name, "identity": name, "folder": name, "arm": arm, "seed": seed, "labels": own},
        compared=compared,
        tried=dict(tried or {}),
    )
    if chain:
        changes = {"steps": len(chain), "fingerprint": chain[-1], **changes}
    return FinishedRun(
        listed=listed,
        result=result_of(arm, **changes),
        config={"seed": seed} if config is None else config,
        environment=environment or {},
        metrics=rows_of(chain, source, loss=changes.get("validation_loss", 1.0)),
        timings=(),
        samples=tuple(samples),
    )


def study_of(
    *runs: FinishedRun,
    parity: Sequence[Parity] = (Parity(),),
    rates: Sequence[float] = (),
    chosen: Mapping[str, Choice] | None = None,
    unfinished: Sequence[ListedRun] = (),
) -> StudyRuns:
    """Makes a study of runs; `rates` are those of its search, if it has one."""
    search = {"rates": list(rates), "seeds": 1, "extend": 2} if rates else None
    listed = RunList(runs=(*(run.listed for run in runs), *unfinished), chosen=dict(chosen or {}), complete=True)
    study = {"name": "made up", "question": "Which?", "search": search}
    return StudyRuns(study=study, parity=tuple(parity), listed=listed, runs=runs)
