"""Names of the files in a run directory, for whoever writes or reads them."""


class RunFiles:
    """Files of a run directory."""

    CONFIG = "config.json"
    """The resolved config of the run."""
    ENVIRONMENT = "environment.json"
    """Versions, machine and commit of the first launch, and hashes that identify the data."""
    TOKENIZER = "tokenizer"
    """Folder of the files that `common.data.tokenizers.saved` reads."""
    INITIAL = "init.json"
    """Where the parameters came from, unless the model started fresh."""
    CHECKPOINTS = "checkpoints"
    """Folder with one folder for each saved step."""
    METRICS = "metrics.jsonl"
    """One row per step of what was computed."""
    TIMINGS = "timings.jsonl"
    """One row per step of the time it took."""
    LAUNCHES = "launches.jsonl"
    """When each launch began (Unix seconds) and which config fields it changed."""
    ROLLBACKS = "rollbacks.jsonl"
    """Which batches are skipped because the run was rolled back, and why."""
    PROFILE = "profile"
    """Folder of profiler traces."""
    LOCK = ".lock"
    """Held by the process that trains; contains its process id."""
    WORKER = ".worker"
    """Held by the process that trains and scores the run as part of a study; contains its machine's name."""
    FAILURE = "failure.json"
    """Why the run's last launch failed; removed once the run is finished."""
    RESULT = "result.json"
    """Summary of the finished run: counts, losses, scores."""
    SAMPLES = "samples.jsonl"
    """One row per decoded example."""

    OF_ONE_STUDY = (RESULT, SAMPLES, FAILURE, LOCK, WORKER)
    """What another study does not take when it copies the run."""

    @staticmethod
    def stacks(process: int) -> str:
        """Stacks of all threads of a process that hung."""
        return f"stacks-{process}.txt"


class StudyFiles:
    """Files of a study's directory, next to one directory for each run."""

    STUDY = "study.json"
    """The resolved config of the study."""
    RUNS = "runs.json"
    """Which runs the study has so far, where they are, and which learning rates were chosen."""
    REPORT = "report.html"
    EARLIER = "experiment.json"
    """What versions before studies wrote instead of the first two."""
