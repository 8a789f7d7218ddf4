"""Names of the files in a run directory, for whoever writes or reads them."""


class RunFiles:
    """Files of one arm's run directory."""

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
    RESULT = "result.json"
    """Summary of the finished run: counts, losses, scores."""
    SAMPLES = "samples.jsonl"
    """One row per decoded example."""

    @staticmethod
    def stacks(process: int) -> str:
        """Stacks of all threads of a process that hung."""
        return f"stacks-{process}.txt"


class ExperimentFiles:
    """Files of an experiment's directory, next to one run directory for each arm."""

    EXPERIMENT = "experiment.json"
    """The resolved config of the experiment."""
    REPORT = "report.html"
