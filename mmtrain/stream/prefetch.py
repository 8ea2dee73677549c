"""Batches prepared ahead of the training step by one background thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mmtrain.stream.batch import Batch, BatchCounts
from mmtrain.stream.stream import Stream

POLL_SECONDS = 0.1  # how fast the thread notices that nobody reads any more

Prepared = tuple[int, Batch, BatchCounts]


@contextmanager
def prefetch(
    stream: Stream, steps: Iterable[int], rank: int = 0, world: int = 1, depth: int | None = None
) -> Iterator[Iterator[Prepared]]:
    """Iterate over (step, batch, counts) of `steps` with up to `depth` of them prepared ahead.

        with prefetch(stream, range(start, end), rank, world) as batches:
            for step, batch, counts in batches: ...

    depth: default `stream.config.prefetch`; 0 prepares each batch when it is asked for. An exception of the thread
    is raised where its batch would have come. Leaving the `with` block stops the thread.
    """
    depth = stream.config.prefetch if depth is None else depth
    prepared = ((step, *stream.prepare(step, rank, world)) for step in steps)
    if depth == 0:
        yield prepared
        return
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
