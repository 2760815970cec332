"""The results of a session as an async generator."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from contextlib import aclosing, nullcontext, suppress

from revit_fast.io.images import ImageSource
from revit_fast.streaming.decoding import End
from revit_fast.streaming.results import Result
from revit_fast.streaming.session import Session


async def streamed(
    start: Callable[[], Session], sources: AsyncIterable[ImageSource] | Iterable[ImageSource], max_ahead: int
) -> AsyncIterator[Result]:
    """Yields the results of sources in order. The session is closed at the end, or at once if the results are left.

    Args:
        start: starts the session that computes the results.
        sources: images. A task iterates an async iterable; a thread iterates any other, because `next()` may block.
            Generators are closed at the end.
        max_ahead: number of sources that may be submitted before the consumer takes their results.
    """
    loop = asyncio.get_running_loop()
    submitted: asyncio.Queue[Future[Result] | End] = asyncio.Queue()

    def tell(item: Future[Result] | End) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(submitted.put_nowait, item)

    session, submitting = start(), None
    try:
        if isinstance(sources, AsyncIterable):
            room = asyncio.Semaphore(max_ahead)
            submitting = asyncio.create_task(_submit_all(session, sources, room, submitted))
        else:
            room = threading.Semaphore(max_ahead)
            session.submit_all(sources, room, tell, lambda error: tell(End(error)))
        while isinstance(future := await submitted.get(), Future):
            yield await asyncio.wrap_future(future)
            room.release()
        if future.error is not None:
            raise future.error
    finally:
        session.close(cancel=True, wait=False)
        with suppress(RuntimeError):  # the generator was dropped after its loop: nothing can be awaited
            try:
                if submitting is not None:
                    # At the end of its loop it is cancelled already; again would cut off the end of an async generator.
                    if not getattr(submitting, "cancelling", int)():  # Python 3.11 and later
                        submitting.cancel()
                    await asyncio.wait([submitting])
            finally:
                await asyncio.to_thread(session.close)


async def _submit_all(
    session: Session,
    sources: AsyncIterable[ImageSource],
    room: asyncio.Semaphore,
    submitted: asyncio.Queue[Future[Result] | End],
) -> None:
    end = End()
    try:
        iterator = aiter(sources)
        async with aclosing(iterator) if isinstance(iterator, AsyncGenerator) else nullcontext():
            async for source in iterator:
                await room.acquire()
                submitted.put_nowait(session.submit(source))
    except BaseException as error:  # the consumer raises it again, unless it has left and cancelled this task
        end = End(error)
    submitted.put_nowait(end)
