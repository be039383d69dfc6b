"""The process of the command: Ctrl-C ends it in one line, and so does a reader of its output that goes away."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    import socket

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
_BROKEN_PIPE = 141  # and of one whose output nobody reads any more, as for `yes | head -1`
_ending = threading.Lock()


def own_process(work: Callable[[], int]) -> int:
    """Do the work of a process and return its exit status.

    The first Ctrl-C is a KeyboardInterrupt, so that work can keep what it has. While modules are imported it ends the process,
    since some libraries swallow the exception there. The second ends the process even while C code runs.
    """
    _on_ctrl_c()
    try:
        status = work()
    except SystemExit as ended:  # of --help, and of a wrong option
        status = ended.code if isinstance(ended.code, int) else 0
    except BrokenPipeError:
        status = _BROKEN_PIPE
    except KeyboardInterrupt:
        _end()
    signal.signal(signal.SIGINT, lambda *_: _end())  # all is done: what is left is Python's own end
    status = _flush(sys.stdout) or _flush(sys.stderr) or status
    if status == INTERRUPTED:
        os._exit(status)  # which has been said
    return status


def any_number_of_threads() -> None:
    """Let matrix products be the same bits with any number of threads, as torchrun gives its processes one thread each.

    To be called before torch is imported. MKL otherwise splits the sums of small products among threads.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _on_ctrl_c() -> None:
    signal.signal(signal.SIGINT, _interrupt)
    import socket  # only now: from here on there is no traceback

    sys.unraisablehook = _swallowed
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(ours,), daemon=True).start()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    while frame is not None:
        if "importlib._bootstrap" in frame.f_code.co_filename:
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _swallowed(what: sys.UnraisableHookArgs) -> None:
    """Called for an exception in a destructor or callback, which Python would print and forget."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(what)


def _count(signals: socket.socket) -> None:
    """End the process at the second Ctrl-C; this thread is told of it at once, while Python waits for C code."""
    for _ in range(2):
        while signals.recv(1)[0] != signal.SIGINT:
            pass
    _end()


def _end() -> NoReturn:
    try:
        if _ending.acquire(blocking=False):
            new_line = b"\n" if os.isatty(2) else b""  # after the ^C that a terminal shows, or a progress bar
            os.write(2, new_line + b"tl-looped: interrupted\n")  # a buffered stream may be in the middle of a write
        else:
            time.sleep(0.5)  # the other thread is saying so
    finally:
        os._exit(INTERRUPTED)


def _flush(stream: TextIO | None) -> int:
    """Write what is left, and return an exit status where that fails; Python would do it as it ends, with a traceback."""
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        assert stream is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still left is for nobody
        if isinstance(error, BrokenPipeError):
            return _BROKEN_PIPE
        print(f"tl-looped: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1
    return 0
