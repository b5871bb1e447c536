"""What every script here shares: one-line errors with exit code 2, and output folders that appear whole or not at all.

Imports neither torch nor NeMo: scripts must be able to refuse bad input before anything heavy loads.
"""

from __future__ import annotations

import gc
import os
import re
import select
import shutil
import signal
import sys
import threading
import uuid
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from nano3.errors import UserError
from nano3.file_system import LOCK, locked, remove_folder
from nano3.sealed_folder import MARKER, came_later, is_ours, mark, owner_of, seal

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


def free_disk(path: Path) -> tuple[Path, int]:
    """The nearest folder above `path`, or itself, that exists, and the bytes that are free on its disk."""
    path = path.resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return there, shutil.disk_usage(there).free


def check_output(out: Path | str, kind: str) -> Path:
    """Refuses an output path that holds something we did not write; an empty or absent folder, or our own, is fine."""
    out = Path(out).resolve()
    if out.is_file():
        raise UserError(f"output {out} is a file; give a folder that does not exist yet")
    if out.is_mount():
        raise UserError(
            f"output {out} is where a disk is mounted, which no folder can replace; give a folder inside it"
        )
    if out.is_dir() and any(out.iterdir()) and owner_of(out) != kind:
        raise UserError(
            f"output folder {out} exists and holds files that are not a {kind} of this project; "
            "choose another folder or remove it"
        )
    later = came_later(out)
    if later:
        raise UserError(
            f"output folder {out} holds {later[0]}, which its tool did not write and would remove; move it, or choose "
            "another folder"
        )
    return out


@contextmanager
def alone(folder: Path, refusal: str) -> Iterator[None]:
    """Holds the lock of a folder whose files change while it stays, and which is there (`claim`). `UserError` with the
    text `refusal` while another process holds it."""
    with locked(folder / LOCK) as mine:
        if not mine:
            raise UserError(refusal)
        yield


@contextmanager
def fresh_output(out: Path | str, kind: str, grows: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside `out`; on success it replaces `out`, on an error nothing of it stays.

    The finished folder carries `nano3.json` with its `kind`, so that a second run may replace it and a stranger's
    folder is never touched, and the hashes of its files (`nano3.sealed_folder`), unless it `grows` from then on.

    A killed run leaves the old result or the new one, under its name or, for the blink between two renames, as a hidden
    `.NAME.old-*` that the next run puts back; and at most a hidden `.NAME.partial-*`, which no reader accepts and the
    next run removes.
    """
    out = check_output(out, kind)
    with only_writer(out):
        temporary = hidden_beside(out, "partial")
        temporary.mkdir()
        try:
            mark(temporary, kind)
            yield temporary
            if not grows:
                seal(temporary)
            replace_folder(temporary, out)
        except BaseException:
            _remove(temporary)
            raise


def claim(out: Path | str, kind: str) -> Path:
    """Makes the folder `out`, whose files change while it stays, one of `kind`, unless it is one. Returns its path.

    Raises `UserError` where it holds something else.
    """
    out = check_output(out, kind)
    if owner_of(out) != kind:
        with fresh_output(out, kind, grows=True):
            pass
    return out


@contextmanager
def fresh_file(out: Path | str) -> Iterator[Path]:
    """Gives a temporary file name beside `out`; on success the file replaces `out`, on an error nothing of it stays."""
    with fresh_files(out) as (temporary,):
        yield temporary


@contextmanager
def fresh_files(out: Path | str, *beside: Path | str) -> Iterator[list[Path]]:
    """`fresh_file` for a file and those `beside` it that speak of it. A kill leaves none of an older run beside one of
    this: the old ones go before `out` is replaced, and theirs come after it."""
    places = [Path(place).resolve() for place in (out, *beside)]
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(only_writer(place))
        temporaries = [hidden_beside(place, "partial") for place in places]
        try:
            yield temporaries
            for place in places[1:]:
                place.unlink(missing_ok=True)
            for temporary, place in zip(temporaries, places, strict=True):
                os.replace(temporary, place)
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output `out`, for what is needed on the way to it."""
    with only_writer(out):
        scratch = hidden_beside(out, "partial")
        scratch.mkdir()
        try:
            mark(scratch, "scratch")
            yield scratch
        finally:
            _remove(scratch)


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Nobody else writes the output `out` meanwhile, on this host or on others that share the disk.

    What a killed writer left beside it is put back or removed. The lock: `nano3.file_system`.

    The lock is a hidden file `.NAME.lock` beside it. `UserError` while another process holds it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent / f".{out.name}.lock", remove=True) as mine:
        if not mine:
            raise UserError(f"another process is writing {out}; wait for it, or choose another output")
        _tidy(out)
        yield


def put_back(out: Path) -> None:
    """Puts back the output `out` that a killed writer was replacing, and removes what else it left."""
    with only_writer(out):
        pass


def replace_folder(new: Path, out: Path) -> None:
    """Renames `new` to `out`, in place of the folder there; that one comes back when the renaming fails."""
    old = hidden_beside(out, "old")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(new, out)
    except BaseException:
        if old.exists():
            os.rename(old, out)
        raise
    if old.exists():
        discard(old, out)


def discard(folder: Path, out: Path) -> None:
    """Removes a folder of ours that lies beside the output `out`: out of sight first, so that a kill while it goes
    leaves no half of it under its name."""
    going = hidden_beside(out, "partial")
    os.rename(folder, going)
    _remove(going)


def hidden_beside(out: Path, what: str) -> Path:
    """A name that nobody has, for what is `partial` or `old` of the output `out`."""
    return out.parent / f".{out.name}.{what}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _tidy(out: Path) -> None:
    """Puts back what a killed run left half-replaced and removes what it left half-written.

    Who holds the lock of `out` is its only writer, so whatever else has one of these names is of a run that ended.
    """
    for what in ("old", "partial"):
        name = re.compile(rf"\.{re.escape(out.name)}\.{what}-\d+-[0-9a-f]{{8}}")
        for left in [path for path in out.parent.iterdir() if name.fullmatch(path.name)]:
            if left.is_file():
                left.unlink()
            elif what == "old" and is_ours(left) and not out.exists():
                os.rename(left, out)
            elif is_ours(left):
                _remove(left)


def _remove(hidden: Path) -> None:
    """Removes a hidden folder, or leaves what cannot be removed to the next run."""
    with suppress(OSError):
        remove_folder(hidden, MARKER)


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
