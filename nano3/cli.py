"""What every script here shares: one-line errors with exit code 2, and Ctrl-C. Their outputs: nano3/outputs.py.

Imports neither torch nor NeMo: scripts must be able to refuse bad input before anything heavy loads.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from nano3.errors import UserError

_INTERRUPTED = "interrupted"
"""All that Ctrl-C says."""
_LOOP = "Symlink loop"
"""How pathlib's error begins for symbolic links that lead to each other."""


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` as a script: exit code 0 or its own, 130 for Ctrl-C, 2 with one line for a `UserError` and for a
    file that cannot be read or written.

    Before that Ctrl-C ends a script whose imports still run: see `_interrupted_while_importing`.
    Libraries' warnings about their own dependencies are left out, here and in processes that are started from here;
    PYTHONWARNINGS brings them back.
    """
    if signal.getsignal(signal.SIGINT) is _interrupted_while_importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTHONWARNINGS" not in os.environ:
        os.environ["PYTHONWARNINGS"] = "ignore"
        warnings.simplefilter("ignore")
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # it would let libraries' torch.load run a file's code
    try:
        sys.exit(main() or 0)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():  # who read has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not str(error).startswith(_LOOP):
            raise
        print(f"error: {error}; remove the link or give another path", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    finally:
        gc.freeze()  # the interpreter would look once more at all that PyTorch made: a fifth of a short script's time


def _interrupted_while_importing(number: int, frame: FrameType | None) -> None:
    """Ctrl-C before `run` has begun: one line and 130, where a traceback through an import would stand.

    Nothing was begun that would have to be cleaned up. A KeyboardInterrupt would not do: an extension module whose
    import it meets prints it and goes on with another error. Outside imports it is raised as ever.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            print(_INTERRUPTED, file=sys.stderr, flush=True)
            os._exit(130)
        frame = frame.f_back
    signal.default_int_handler(number, frame)


def one_line(text: str) -> str:
    """Text for a terminal: what would end the line or act on the terminal is escaped. Names of files may hold it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _nobody_reads() -> bool:
    """Whether the reader of our stdout is gone; another pipe may break too, and that is an error."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def require_counts(options: Namespace, *names: str) -> None:
    """Raises `UserError` for one of these options that is below 1; None is one that was left out."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def _lock_of_its_own() -> None:
    """In a fork: the lock of tqdm's progress bars is one for all forks of a process, and they and their parent would
    wait for ever for one that was killed while it held it."""
    bars = sys.modules.get("tqdm.std")
    if bars is not None:
        bars.tqdm.set_lock(threading.RLock())


os.register_at_fork(after_in_child=_lock_of_its_own)


def _imported_for_a_script() -> bool:
    """Whether the file that Python was started with is what imports this module, by itself or through our modules."""
    frame: FrameType | None = sys._getframe()
    ours = (str(Path(__file__).parents[1]) + os.sep, "<frozen importlib.")
    while frame is not None and frame.f_globals["__name__"] != "__main__" and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    main = frame is not None and frame.f_globals["__name__"] == "__main__" and "__file__" in frame.f_globals
    return main and threading.current_thread() is threading.main_thread()


if _imported_for_a_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted_while_importing)
