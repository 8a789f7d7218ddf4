"""How a command ends: its exit status, and one line for what the user can mend."""

import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from common.errors import UserError
from common.paths import as_user_error
from common.terminal import harmless

RESUMABLE = ("train", "compare")
STDOUT = 1


def ending(command: Callable[[], int], arguments: Sequence[str]) -> int:
    """Runs `command`, and returns its status, or that of how it ended.

    2 is a mistake of the user's, which an error of the system about a path is too; 130 is an interruption, and 141 that
    whoever reads the output has gone, as after `| head`.
    """
    try:
        status = command()
        sys.stdout.flush()
        return status
    except UserError as error:
        return _refuse(error)
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        if (mistake := as_user_error(error)) is None:
            raise
        return _refuse(mistake)
    except KeyboardInterrupt:
        resumable = bool(arguments) and arguments[0] in RESUMABLE
        print(f"\ntwinstack: interrupted{_hint(arguments) if resumable else ''}", file=sys.stderr)
        return 130
    except SystemExit as stopped:
        if (step := getattr(stopped, "step", None)) is not None:
            print(f"\ntwinstack: asked to end, step {step} is saved{_hint(arguments)}", file=sys.stderr)
        raise


def _refuse(mistake: UserError) -> int:
    print(f"twinstack: error: {harmless(' '.join(str(mistake).split()))}", file=sys.stderr)
    return 2


def _reader_has_gone() -> bool:
    """Whether the reader of standard output has gone; if so, sends further output to the null device."""
    asked = select.poll()
    asked.register(STDOUT, 0)  # poll reports errors even with an empty mask
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def _hint(arguments: Sequence[str]) -> str:
    return f"; the same command resumes: twinstack {harmless(shlex.join(arguments))}"
