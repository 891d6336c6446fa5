"""Rows tokenised by every core: processes that work on chunks of rows, answers in order.

Invariant: the answers are the same, in the same order, whatever the number of processes, and at
most two chunks a process are under way, so memory does not grow with the rows. A process that works
for us imports no MLX, gets its work through a pipe and ends when the pipe closes: none outlives the
program, however that ends. Rows that one process does in a second or two start no other.
Try it: ``mlx-slim train smollm2-lora data.path=rows.jsonl -o run`` and look at ``top``.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from mlx_slim.blas import physical_cores
from mlx_slim.errors import SlimError
from mlx_slim.interrupts import SIGNALS

ALONE = 32  # chunks that this process does itself before it starts others (8,192 rows)
_MOST = 16  # processes that one reader and writer can keep at work

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Workers(Generic[Item, Answer]):
    """Does ``work`` in several processes; a context manager.

    Args:
        work: Called with a task, here or in another process; picklable, as are tasks and answers.
            Raises SlimError on what the user must mend.
        count: Processes; None takes one a core. 1 does everything in this process.
    """

    def __init__(self, work: Callable[[Item], Answer], count: int | None = None) -> None:
        self._work = work
        self._count = min(_MOST, physical_cores()) if count is None else count
        self._alone = ALONE
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers[Item, Answer]:
        return self

    def __exit__(self, *_: object) -> None:
        """End every process at once: none holds anything."""
        for process in self._processes:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)  # its threads saw their pipes close
        for process in self._processes:
            process.close()

    def map(self, tasks: Iterable[Item]) -> Iterator[Answer]:
        """Yield the answers in the order of the tasks.

        Raises:
            SlimError: The first in the order of the tasks, be it from a task, from ``tasks``
                itself, or because a process died.
        """
        waiting: deque[Future[Answer]] = deque()
        remaining = iter(tasks)
        failure: SlimError | None = None  # of the tasks: those before it come first
        while True:
            room = max(1, 2 * len(self._processes)) - len(waiting)
            try:
                for task in islice(remaining, room):
                    waiting.append(self._submit(task))
            except SlimError as error:
                failure, remaining = error, iter(())
            if not waiting:
                break
            yield waiting.popleft().result()
        if failure is not None:
            raise failure

    def _submit(self, task: Item) -> Future[Answer]:
        if self._count > 1 and self._alone <= 0:
            if self._threads is None:
                self._start()
            assert self._threads is not None
            return self._threads.submit(self._elsewhere, task)
        self._alone -= 1
        done: Future[Answer] = Future()
        try:
            done.set_result(self._work(task))
        except SlimError as error:
            done.set_exception(error)
        return done

    def _start(self) -> None:
        work = pickle.dumps(self._work, pickle.HIGHEST_PROTOCOL)
        for _ in range(self._count):
            try:
                self._processes.append(_Process(work))
            except OSError as error:
                raise SlimError(
                    f"cannot start a process that tokenises rows: {error.strerror}",
                    "close other programs and start again",
                ) from error
            self._idle.put(self._processes[-1])
        self._threads = ThreadPoolExecutor(self._count)  # they only wait for pipes

    def _elsewhere(self, task: Item) -> Answer:
        process = self._idle.get()
        try:
            return process.ask(task)
        finally:
            self._idle.put(process)


@dataclass(frozen=True)
class _Failure:
    """What nobody foresaw, in another process: in one line, and as its traceback."""

    what: str
    told: str


class _Process:
    """One process and the pipes to it. ``multiprocessing`` would run the user's script again."""

    def __init__(self, work: bytes) -> None:
        path = [entry for entry in sys.path if isinstance(entry, str)]
        code = f"import sys; sys.path[:] = {path!r}; from {__name__} import main; main()"
        self._first = work
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=False,  # spawned, never forked: MLX and the tokenizers have threads
            env={
                **os.environ,
                "MLX_SLIM_BLAS": "off",
                "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )

    def ask(self, task: Any) -> Any:
        """Return the answer to a task, or raise what it raised."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(self._first)
            self._first = b""
            pickle.dump(task, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise SlimError(
                f"a process that tokenises rows died ({_ending(self._process.wait())})",
                "it may have run out of memory: close other programs and start again",
            ) from error
        if isinstance(answer, _Failure):
            raise RuntimeError(answer.what) from RuntimeError(answer.told)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Wait for the process and close its pipes; what they still hold is of no use."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                continue


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main() -> None:
    """Answer tasks from standard input on standard output until it closes."""
    for number in SIGNALS:  # they are for the program that started us; its end closes our pipe
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    try:
        work = pickle.load(sys.stdin.buffer)
        while True:
            task = pickle.load(sys.stdin.buffer)
            try:
                answer = work(task)
            except SlimError as error:
                answer = error
            except Exception as error:
                what = f"in a process that tokenises rows: {type(error).__name__}: {error}"
                answer = _Failure(what, traceback.format_exc())
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the program that started us has ended, or has no more work
