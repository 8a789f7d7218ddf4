"""From a run to training: its data, and what its training needs."""

import dataclasses
import functools

import jax

from common.compute.chips import chip_of
from common.config import to_json
from common.data.cache import default_cache_dir
from common.data.config import DataConfig
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
from common.sharding.shape import MeshShape
from common.train.config import InitFrom
from common.train.programs import Setup, check_rows, lower_step, make_programs
from common.train.task import Task
from experiments.families import builder
from experiments.models.initial import INITIAL_CONTENT, make_initial
from experiments.run import Run, complete_run

OPEN_DATA = 8
"""How many data configs a process keeps open: the seeds of a study take turns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data that a run trains on."""

    content_id: str
    """Identifies the training text."""
    tokenizer: Tokenizer
    train: Loader | StagedLoader
    validation: Loader

    @property
    def identity(self) -> dict[str, str]:
        """Hashes that identify the data; a run of other data is another run."""
        return {"content_id": self.content_id, "tokenizer_hash": self.tokenizer.content_hash}


def open_data(name: str, run: Run) -> Data:
    """Opens the data of the arm `name`, making what the cache does not hold; data that are open are opened once.

    Raises UserError where the model's token table has too few rows for the tokenizer.
    """
    data = _open(_Rows(data=run.data, mesh=run.train.mesh, accumulation=run.train.accumulation, run=run))
    if run.model.vocab_size < data.tokenizer.table_size:
        raise UserError(
            f"arms.{name}.model.vocab_size is {run.model.vocab_size}; the tokenizer needs {data.tokenizer.table_size}"
        )
    return data


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """What this process reads for a run. Runs that agree in it share their open data."""

    data: DataConfig
    mesh: MeshShape
    accumulation: int
    run: Run = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=OPEN_DATA)
def _open(rows: _Rows) -> Data:
    cache_dir, config = default_cache_dir(), rows.data
    text = open_training_text(config, cache_dir)
    tokenizer = open_tokenizer_of(config, text, cache_dir)
    host = Host() if jax.process_count() == 1 else Host(_local_rows(rows.run))
    return Data(
        content_id=text.content_id,
        tokenizer=tokenizer,
        train=open_training(config, tokenizer, cache_dir, host),
        validation=open_validation(config, tokenizer, cache_dir, host),
    )


def _local_rows(run: Run) -> list[int]:
    """Returns which rows of a batch this process feeds."""
    setup = make_setup(run)
    check_rows(setup)
    return make_programs(setup).local_rows


def make_setup(run: Run) -> Setup:
    return Setup(
        build=builder(run.model, run.train.execution),
        model=run.model,
        train=run.train,
        learning_rate=run.learning_rate,
        steps=run.steps,
        row_slots=run.row_slots,
    )


def check_devices(run: Run) -> None:
    """Raises UserError where the mesh needs more devices than there are, or does not divide rows or parameters."""
    setup = make_setup(run)
    make_programs(setup)
    check_rows(setup)


def make_task(
    run: Run, data: Data, init: InitFrom | None, *, initial_content: str | None = None, profile_steps: int = 0
) -> Task:
    """Returns all that training needs.

    Args:
      init: the model on disk that the run starts from: its own `init`, or where the run that it comes after is.
      initial_content: a hash of that model for the run directory to record; None to record none.
      profile_steps: how many steps of this launch are traced into the run directory.
    """
    chip = chip_of(jax.devices()[0].device_kind)
    return Task(
        setup=make_setup(run),
        stream=data.train,
        seeker=data.train,
        validation=tuple(data.validation.validation_batches(run.evaluation.validation_batches)),
        config=to_json(run),
        complete_config=complete_run,
        data=data.identity | ({} if initial_content is None else {INITIAL_CONTENT: initial_content}),
        tokenizer_files=saved_files(data.tokenizer),
        initial=make_initial(init),
        peak_flops_per_second=None if chip is None else chip.flops_per_second,
        profile_steps=profile_steps,
    )


def compiled_step(run: Run) -> jax.stages.Compiled:
    """Compiles the run's training step ahead of time for its mesh; needs no data."""
    setup = make_setup(run)
    return lower_step(setup, make_programs(setup)).compile()
