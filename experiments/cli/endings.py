"""How a command ends: its exit status, and a one-line message for what the user can fix."""

import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from common.errors import UserError
from common.paths import as_user_error
from common.terminal import harmless

RESUMABLE = ("run",)
STDOUT = 1


def ending(command: Callable[[], int], arguments: Sequence[str]) -> int:
    """Runs `command` and returns its exit status.

    The status is 2 after a mistake of the user's, including operating-system errors about a path; 130 after an
    interruption; 141 if the reader of the output has closed it, as `| head` does.
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
            print(f"\ntwinstack: terminated, step {step} is saved{_hint(arguments)}", file=sys.stderr)
        raise


def _refuse(mistake: UserError) -> int:
    print(f"twinstack: error: {harmless(' '.join(str(mistake).split()))}", file=sys.stderr)
    return 2


def _reader_has_gone() -> bool:
    """Whether the reader of standard output has closed it; if so, sends further output to the null device."""
    poll = select.poll()
    poll.register(STDOUT, 0)  # poll reports errors even with an empty mask
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def _hint(arguments: Sequence[str]) -> str:
    return f"; the same command resumes: twinstack {harmless(shlex.join(arguments))}"
