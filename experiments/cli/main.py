"""The command line: `twinstack run` and its companions; `twinstack --help` lists them.

Each command is one typed function in its own file. That file is imported only when the command runs, so that
`twinstack --help` answers at once.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError, nearest
from experiments.cli.arguments import parsers, take_late_overrides
from experiments.cli.endings import RESUMABLE, ending
from experiments.cli.options import check_text

COMMANDS = {
    "list": "list_studies",
    "plan": "plan",
    "data": "data",
    "run": "run",
    "status": "status",
    "results": "results",
    "new": "new",
    "launch": "launch",
    "report": "report",
    "convert": "convert",
    "score": "score",
    "generate": "generate",
}
"""The module of each command in this folder; its function has the same name, and the options as its parameters."""
PCI, GOOGLE = Path("/sys/bus/pci/devices"), "0x1ae0"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    It is 1 if a run of a study failed, 2 for a mistake of the user's, 130 for an interruption.

    A run that SIGTERM ends is saved first, and raises SystemExit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return ending(lambda: _run(arguments), arguments)


def _run(arguments: list[str]) -> int:
    check_text(arguments)
    parser, commands = parsers()
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    if first is not None and first not in commands:
        raise UserError(f"unknown command {first!r}: {nearest(first, commands)}")
    parsed, rest = parser.parse_known_args(arguments)
    take_late_overrides(parsed, rest, commands.get(parsed.command, parser))
    options = vars(parsed)
    version, command = options.pop("version"), options.pop("command")
    if version:
        print(f"twinstack {_version()}")
    elif command is None:
        parser.print_help()
        return 2
    else:
        skip_tpu_search()
        if command in RESUMABLE:
            keep_memory_on_cpu()
        return load_command(command)(**options) or 0
    return 0


def load_command(command: str) -> Callable[..., int | None]:
    """Imports the module of a command and returns its function, which may return an exit status."""
    module = importlib.import_module(f"experiments.cli.{COMMANDS[command]}")
    found: Callable[..., int | None] = getattr(module, COMMANDS[command])
    return found


def skip_tpu_search() -> None:
    """Keeps JAX from searching for TPUs on a machine without any; must be called before JAX is imported.

    Where libtpu is installed for planning alone, JAX would query the network for TPUs and print warnings.
    """
    no_libtpu = importlib.util.find_spec("libtpu") is None
    if no_libtpu or any(path.read_text().strip() == GOOGLE for path in PCI.glob("*/vendor")):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if importlib.util.find_spec("jax_plugins") is None:  # no plugin of any other accelerator
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def keep_memory_on_cpu() -> None:
    """Makes freed memory stay in the process if JAX will compute on CPU; must be called before JAX is imported.

    It will where JAX_PLATFORMS says so, or where no plugin of an accelerator is installed.
    """
    plugins = ("libtpu", "jax_plugins")
    named = os.environ.get("JAX_PLATFORMS")
    if named == "cpu" or (not named and all(importlib.util.find_spec(name) is None for name in plugins)):
        from common.allocator import keep_freed_memory  # imports ctypes, which `--help` does not need

        keep_freed_memory()


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("twinstack")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
