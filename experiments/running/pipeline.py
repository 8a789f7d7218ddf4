"""From an experiment to training: its data, and what each arm's training needs."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax

from common.compute.chips import chip_of
from common.config import to_json
from common.data.cache import default_cache_dir
from common.data.loader import Loader
from common.data.streams import (
    Host,
    StagedLoader,
    open_tokenizer_of,
    open_training,
    open_training_text,
    open_validation,
)
from common.data.tokenizers.saved import saved_files
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.train.loop import Fitted, fit
from common.train.programs import Setup, check_rows, lower_step, make_programs
from common.train.task import Task, Watcher
from experiments.config import Arm, Experiment, complete_run_config
from experiments.families import builder
from experiments.models.initial import make_initial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data that all arms of an experiment share."""

    content_id: str
    """Identifies the training text."""
    tokenizer: Tokenizer
    train: Loader | StagedLoader
    validation: Loader

    @property
    def identity(self) -> dict[str, str]:
        """Hashes that identify the data; a run of other data is another run."""
        return {"content_id": self.content_id, "tokenizer_hash": self.tokenizer.content_hash}


def open_data(experiment: Experiment, arms: Iterable[str] | None = None) -> Data:
    """Opens the experiment's data, making what the cache does not hold.

    Raises UserError where the token table of one of `arms` (None: any) has too few rows for the tokenizer.
    """
    cache_dir, config = default_cache_dir(), experiment.data
    source = open_training_text(config, cache_dir)
    tokenizer = open_tokenizer_of(config, source, cache_dir)
    for name in experiment.arms if arms is None else arms:
        rows = experiment.arms[name].model.vocab_size
        if rows < tokenizer.table_size:
            raise UserError(f"arms.{name}.model.vocab_size is {rows}; the tokenizer needs {tokenizer.table_size}")
    host = Host() if jax.process_count() == 1 else Host(_local_rows(experiment))
    return Data(
        content_id=source.content_id,
        tokenizer=tokenizer,
        train=open_training(config, tokenizer, cache_dir, host),
        validation=open_validation(config, tokenizer, cache_dir, host),
    )


def _local_rows(experiment: Experiment) -> list[int]:
    """Returns which rows of a batch this process feeds: the same for every arm, since all arms share a mesh."""
    arm = next(iter(experiment.arms.values()))
    setup = make_setup(experiment, arm)
    check_rows(setup)
    return make_programs(setup).local_rows


def make_setup(experiment: Experiment, arm: Arm) -> Setup:
    return Setup(
        build=builder(arm.model, experiment.train.execution),
        model=arm.model,
        train=experiment.train,
        learning_rate=arm.learning_rate,
        steps=experiment.steps(),
        row_slots=experiment.row_slots(),
    )


def check_devices(experiment: Experiment, arms: Iterable[str]) -> None:
    """Raises UserError where the mesh needs more devices than there are, or does not divide rows or parameters."""
    for name in arms:
        setup = make_setup(experiment, experiment.arms[name])
        make_programs(setup)
        check_rows(setup)


def make_task(experiment: Experiment, name: str, data: Data) -> Task:
    """Returns all that training the arm `name` needs."""
    arm = experiment.arms[name]
    chip = chip_of(jax.devices()[0].device_kind)
    validation = data.validation.validation_batches(experiment.evaluation.validation_batches)
    return Task(
        setup=make_setup(experiment, arm),
        stream=data.train,
        seeker=data.train,
        validation=tuple(validation),
        config=to_json(experiment.run_config(name)),
        complete_config=complete_run_config,
        data=data.identity,
        tokenizer_files=saved_files(data.tokenizer),
        initial=make_initial(arm),
        peak_flops_per_second=None if chip is None else chip.flops_per_second,
    )


def train_arm(
    experiment: Experiment, name: str, data: Data, run_dir: Path, watcher: Watcher, profile_steps: int = 0
) -> Fitted:
    """Trains an arm in `run_dir/name`, from its newest checkpoint if there is one."""
    task = dataclasses.replace(make_task(experiment, name, data), profile_steps=profile_steps)
    return fit(task, run_dir / name, watcher)


def compiled_step(experiment: Experiment, arm: Arm) -> jax.stages.Compiled:
    """Compiles the arm's training step ahead of time for the experiment's mesh; needs no data."""
    setup = make_setup(experiment, arm)
    return lower_step(setup, make_programs(setup)).compile()
