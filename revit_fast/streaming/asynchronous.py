"""The results of a session as an async generator."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing, suppress

from revit_fast.io.images import ImageSource
from revit_fast.io.threads import SOURCE_S
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

    async with AsyncExitStack() as leaving:
        session = start()
        leaving.push_async_callback(asyncio.to_thread, session.close, cancel=True)
        if isinstance(sources, AsyncIterable):
            room = asyncio.Semaphore(max_ahead)
            submitting = asyncio.create_task(_submit_all(session, sources, room, submitted))
            leaving.push_async_callback(asyncio.wait, [submitting])
            leaving.callback(submitting.cancel)
        else:
            room = threading.Semaphore(max_ahead)
            feeder = session.submit_all(sources, room, tell, lambda error: tell(End(error)))
            leaving.push_async_callback(asyncio.to_thread, feeder.join, SOURCE_S)
            leaving.callback(feeder.stop)
        while isinstance(future := await submitted.get(), Future):
            yield await asyncio.wrap_future(future)
            room.release()
        if future.error is not None:
            raise future.error


async def _submit_all(
    session: Session,
    sources: AsyncIterable[ImageSource],
    room: asyncio.Semaphore,
    submitted: asyncio.Queue[Future[Result] | End],
) -> None:
    end = End()
    try:
        async with AsyncExitStack() as closing:
            iterator = aiter(sources)
            if isinstance(iterator, AsyncGenerator):
                await closing.enter_async_context(aclosing(iterator))
            async for source in iterator:
                await room.acquire()
                submitted.put_nowait(session.submit(source))
    except BaseException as error:  # the consumer raises it again, unless it has left and cancelled this task
        end = End(error)
    submitted.put_nowait(end)
