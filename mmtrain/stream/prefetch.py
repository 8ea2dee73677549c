"""Batches prepared ahead of the training step: by one background thread, or by processes that share the rows."""

import multiprocessing
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from mmtrain.config import UserError
from mmtrain.config.signals import deaf_children
from mmtrain.stream.batch import Batch, BatchCounts, interleave
from mmtrain.stream.stream import Stream, merge_states

POLL_SECONDS = 0.1  # how fast the thread notices that nobody reads any more
END_SECONDS = 5.0  # how long a worker process gets to end by itself

Prepared = tuple[int, Batch, BatchCounts]


class Batches:
    """Iterator over (step, batch, counts), and the state of the stream behind any of the last few steps."""

    def __init__(self, prepared: Iterator[Prepared], parts: "Sequence[_Here | _Process]") -> None:
        self._prepared, self._parts = prepared, parts

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Prepared:
        return next(self._prepared)

    def state(self, step: int) -> dict[str, Any]:
        """As `Stream.state(step, rank, world)`: the lanes of this rank."""
        return merge_states([part.state(step) for part in self._parts])


@contextmanager
def prefetch(
    stream: Stream,
    steps: Sequence[int],
    rank: int = 0,
    world: int = 1,
    depth: int | None = None,
    workers: int | None = None,
) -> Iterator[Batches]:
    """Iterate over (step, batch, counts) of `steps` with up to `depth` of them prepared ahead.

        with prefetch(stream, range(start, end), rank, world) as batches:
            for step, batch, counts in batches: ...

    depth: default `stream.config.prefetch`; 0 prepares each batch when it is asked for. workers: default
    `stream.config.workers`; each of n processes makes every n-th row of the rank, so there are at most as many as
    rows, and they share the work best where n divides the rows and the lanes. An exception of the thread or of
    a process is raised where its batch would have come. Leaving the `with` block ends them.
    """
    depth = stream.config.prefetch if depth is None else depth
    workers = stream.config.workers if workers is None else workers
    workers = min(workers, stream.config.global_batch // world)
    with ExitStack() as stack:
        parts: list[_Here | _Process] = [] if workers else [_Here(stream, rank, world)]
        for number in range(workers):
            process = _Process(stream, steps, rank + number * world, world * workers)
            stack.callback(process.close)
            parts.append(process)
        prepared: Iterator[Prepared] = ((step, *interleave([part.prepare(step) for part in parts])) for step in steps)
        if depth:
            prepared = stack.enter_context(_in_background(prepared, depth))
        yield Batches(prepared, parts)


@contextmanager
def _in_background(prepared: Iterator[Prepared], depth: int) -> Iterator[Iterator[Prepared]]:
    ready: queue.Queue[Prepared | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Prepared | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in prepared:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # the consumer decides what it means
            put(error)

    def read() -> Iterator[Prepared]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        stopped.set()
        thread.join()


class _Here:
    """The rows of a rank, made in this process."""

    def __init__(self, stream: Stream, rank: int, world: int) -> None:
        self._stream, self._rank, self._world = stream, rank, world

    def prepare(self, step: int) -> tuple[Batch, BatchCounts]:
        return self._stream.prepare(step, self._rank, self._world)

    def state(self, step: int) -> dict[str, Any]:
        return self._stream.state(step, self._rank, self._world)


class _Process:
    """Rows made in a process of their own, one step ahead of the one that is asked for."""

    def __init__(self, stream: Stream, steps: Sequence[int], rank: int, world: int) -> None:
        # A fork of this process would copy its threads and CUDA; the server forks one that has only read the imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._batches, batches = context.Pipe(duplex=False)
        self._states, states = context.Pipe()
        self._process = context.Process(target=_work, args=(stream, steps, rank, world, batches, states), daemon=True)
        with deaf_children():
            self._process.start()
        batches.close()
        states.close()

    def prepare(self, step: int) -> tuple[Batch, BatchCounts]:
        received = self._receive(self._batches)
        arrays, counts = received
        return cast(Batch, {name: torch.from_numpy(array) for name, array in arrays.items()}), counts

    def state(self, step: int) -> dict[str, Any]:
        self._states.send(step)
        return self._receive(self._states)

    def close(self) -> None:
        self._batches.close()  # the process ends at its next batch
        self._states.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, connection: Connection) -> Any:
        try:
            received = connection.recv()
        except EOFError as error:
            raise RuntimeError(
                f"a process that prepares batches ended by itself (exit code {self._process.exitcode}); "
                "it may have run out of memory"
            ) from error
        if isinstance(received, BaseException):
            raise received
        return received


def _work(
    stream: Stream, steps: Sequence[int], rank: int, world: int, batches: Connection, states: Connection
) -> None:
    """Send a batch, as numpy arrays, for each of `steps`, and meanwhile a state for each step received."""
    torch.set_num_threads(1)

    def answer() -> None:
        with suppress(EOFError, OSError):
            while True:
                try:
                    state: Any = stream.state(states.recv(), rank, world)
                except UserError as error:
                    state = error
                states.send(state)

    thread = threading.Thread(target=answer, name="states", daemon=True)
    thread.start()
    with suppress(BrokenPipeError, ConnectionResetError):
        for step in steps:
            try:
                batch, counts = stream.prepare(step, rank, world)
                item: Any = ({name: tensor.numpy() for name, tensor in batch.items()}, counts)  # type: ignore[attr-defined]
            except Exception as error:
                item = error
            batches.send(item)
        thread.join()  # states of the last steps are asked for after they were made
