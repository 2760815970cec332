"""What is left early ends at once, takes its threads along and leaves no future pending; so does an ending process."""

import asyncio
import contextlib
import gc
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import make_model
from test_train_loader import train

import revit_fast as rf
from revit_fast.io import threads
from revit_fast.train import stopping

pytestmark = pytest.mark.timeout(60)

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
WAIT_S = 20.0


@pytest.fixture(scope="module")
def pipe():
    return rf.pipeline(make_model(), n_decoders=1, token_budget=200)


@pytest.fixture
def packs(pipe, monkeypatch):
    """A list that gets an entry for each pack that is computed; packs take a while."""
    made, logits = [], pipe.logits

    def slow(batch):
        made.append(len(batch))
        time.sleep(0.01)
        return logits(batch)

    monkeypatch.setattr(pipe, "logits", slow)
    return made


def own_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("revit-fast")]


def wait_until(holds):
    end = time.monotonic() + WAIT_S
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.01)
    return held


@pytest.fixture(autouse=True)
def no_threads_are_left():
    assert wait_until(lambda: not own_threads())
    yield
    assert wait_until(lambda: not own_threads()), own_threads()


class Producer:
    """Sources that go on without end; `closed` once their generator has run its `finally`."""

    def __init__(self, encoded=False):
        self.closed, self.n_taken, self.go_on = threading.Event(), 0, threading.Event()
        buffer = io.BytesIO()
        Image.fromarray(PIXELS).save(buffer, "PNG")
        self.one = buffer.getvalue() if encoded else PIXELS

    def __iter__(self):
        try:
            while True:
                self.n_taken += 1
                yield self.one
        finally:
            self.closed.set()

    def stuck(self):
        """Waits in `next()` after two sources, as a socket would."""
        try:
            yield self.one
            yield self.one
            self.go_on.wait(WAIT_S)
            yield self.one
        finally:
            self.closed.set()

    async def asynchronous(self):
        try:
            while True:
                self.n_taken += 1
                yield self.one
        finally:
            await asyncio.sleep(0)
            self.closed.set()

    async def slow(self):
        try:
            yield self.one
            await asyncio.sleep(1000)
        finally:
            self.closed.set()

    def listed(self):
        self.closed.set()  # there is nothing to close
        return [self.one] * 3000


async def by_break(results):
    async for _ in results:
        break


async def by_exception(results):
    try:
        async for result in results:
            raise KeyError(result.index)
    except KeyError:
        pass


async def by_aclosing(results):
    async with contextlib.aclosing(results):
        await anext(results)


async def by_cancelling(results):
    first = asyncio.Event()

    async def consume():
        async for _ in results:
            first.set()

    task = asyncio.create_task(consume())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_timeout(results):
    async def consume():
        async for _ in results:
            await asyncio.sleep(0.02)

    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(consume(), 0.3)


async def by_forgetting(results):
    await anext(results)


WAYS = [by_break, by_exception, by_aclosing, by_cancelling, by_timeout, by_forgetting]
SOURCES = {
    "generator": Producer.__iter__,
    "iterable": lambda producer: producer,
    "list": Producer.listed,
    "async generator": Producer.asynchronous,
    "slow async generator": Producer.slow,
    "stuck": Producer.stuck,
}


class TestStream:
    @pytest.mark.parametrize("leave", WAYS)
    @pytest.mark.parametrize("sources", SOURCES)
    def test_leaving(self, pipe, packs, sources, leave):
        producer, at_leaving = Producer(), []

        async def main():
            await leave(pipe.stream(SOURCES[sources](producer)))
            at_leaving.append(len(packs))

        asyncio.run(main())
        assert len(packs) <= at_leaving[0] + 4, "it went on computing"
        producer.go_on.set()
        assert wait_until(producer.closed.is_set)

    def test_the_loop_ends_by_an_exception_first(self, pipe):
        producer = Producer()

        async def main():
            async for _ in pipe.stream(producer.asynchronous()):
                raise SystemExit(3)

        with pytest.raises(SystemExit):
            asyncio.run(main())
        assert producer.closed.is_set()

    @pytest.mark.parametrize("sources", ["generator", "list"])
    def test_dropped_after_its_loop(self, pipe, sources):
        producer = Producer()
        loop = asyncio.new_event_loop()
        results = pipe.stream(SOURCES[sources](producer))
        assert loop.run_until_complete(anext(results)).index == 0
        loop.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del results
            gc.collect()
        assert wait_until(producer.closed.is_set)

    def test_next_does_not_block_the_loop(self, pipe):
        producer = Producer()

        async def main():
            results = pipe.stream(producer.stuck())
            await anext(results)
            begin = time.monotonic()
            await asyncio.sleep(0.01)
            assert time.monotonic() - begin < WAIT_S / 2
            await results.aclose()

        asyncio.run(main())
        assert not producer.closed.is_set(), "it is still in next()"
        producer.go_on.set()
        assert producer.closed.wait(WAIT_S)

    @pytest.mark.parametrize("is_async", [False, True])
    def test_it_waits_for_its_consumer(self, pipe, is_async):
        producer = Producer()

        async def main():
            async with contextlib.aclosing(pipe.stream(producer.asynchronous() if is_async else producer)) as results:
                await anext(results)
                await asyncio.sleep(0.3)
                assert producer.n_taken <= 1024 + 2

        asyncio.run(main())

    def test_an_error_of_the_sources_comes_after_what_came_before_it(self, pipe):
        def broken():
            yield from [PIXELS] * 3
            raise OSError("gone")

        async def main(got):
            async for result in pipe.stream(broken()):
                got.append(result.index)

        got = []
        with pytest.raises(OSError, match="gone"):
            asyncio.run(main(got))
        assert got == [0, 1, 2]


class TestCall:
    @pytest.mark.parametrize("method", ["__call__", "assign"])
    @pytest.mark.parametrize("encoded", [False, True])
    @pytest.mark.parametrize("sources", ["generator", "iterable"])
    def test_break_closes_the_generator(self, pipe, method, sources, encoded):
        producer = Producer(encoded)
        for _ in getattr(pipe, method)(SOURCES[sources](producer)):
            break
        assert producer.closed.wait(WAIT_S)
        assert not [name for name in own_threads() if "decode" not in name]

    def test_what_the_caller_still_refers_to(self, pipe):
        """A generator that ran ahead is closed with the results; an iterator that is none stays open."""
        producer = Producer()
        generator = iter(producer)
        for _ in pipe(generator):
            break
        assert producer.closed.is_set()
        numbers = itertools.count()
        for _ in pipe(map(lambda i: PIXELS, numbers)):
            break
        assert next(numbers) > 0

    def test_a_source_that_is_stuck(self, pipe):
        producer = Producer()
        for result in pipe(producer.stuck()):
            if result.index == 1:
                break
        assert not producer.closed.is_set()
        producer.go_on.set()
        assert producer.closed.wait(WAIT_S)

    def test_left_half_way_in_a_thread(self, pipe):
        producer = Producer()
        thread = threading.Thread(target=lambda: next(pipe(producer)))
        thread.start()
        thread.join()
        assert producer.closed.wait(WAIT_S)

    def test_a_generator_that_refuses_to_end_is_shown(self, pipe, monkeypatch):
        shown = []
        monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(str(args.exc_value)))

        def stubborn():
            try:
                while True:
                    yield PIXELS
            finally:
                raise ValueError("cannot close")

        for _ in pipe(stubborn()):
            break
        assert wait_until(lambda: shown == ["cannot close"])


class TestSession:
    def test_an_exception_cancels_what_waits(self, pipe, packs):
        futures = []

        def fail():
            with pipe.session() as outer, pipe.session() as session:
                futures.extend(one.submit(PIXELS) for one in (outer, session) for _ in range(2000))
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert all(future.done() for future in futures)
        assert sum(packs) < 2000

    def test_close_can_cancel(self, pipe, packs):
        session = pipe.session()
        futures = [session.submit(PIXELS) for _ in range(2000)]
        first = futures[0].result(WAIT_S)
        session.close(cancel=True)
        assert first.error is None
        assert all(future.done() for future in futures)
        assert futures[-1].cancelled()

    def test_cancelled_images_are_not_computed(self, pipe, packs):
        with pipe.session() as session:
            futures = [session.submit(PIXELS) for _ in range(300)]
            cancelled = sum(future.cancel() for future in futures[1:-1])
        assert cancelled > 0
        assert futures[0].result(WAIT_S).error is futures[-1].result(WAIT_S).error is None
        assert sum(packs) < 300 - cancelled // 2  # those that were being decoded are computed

    def test_dropped_it_finishes_and_ends(self, pipe):
        with pytest.warns(ResourceWarning, match="never closed"):
            futures = [pipe.session().submit(PIXELS) for _ in range(3)]
        assert [future.result(WAIT_S).error for future in futures] == [None] * 3

    def test_closed_by_its_own_result(self, pipe):
        session = pipe.session()
        closed = threading.Event()
        session.submit(PIXELS).add_done_callback(lambda _: (session.close(), closed.set()))
        assert closed.wait(WAIT_S)

    def test_what_waits_when_the_process_ends(self, pipe, packs):
        session = pipe.session()
        futures = [session.submit(PIXELS) for _ in range(2000)]
        threads._end_all()
        assert all(future.done() for future in futures)
        assert sum(packs) < 2000
        with pytest.raises(RuntimeError, match="closed"):
            session.submit(PIXELS)


EXIT = """
import io, sys, threading
sys.path.insert(0, sys.argv[1])
import numpy as np
from PIL import Image
from small_models import make_model
import revit_fast as rf

pipe = rf.pipeline(make_model(embed_dim=192, hidden_dim=768), n_decoders=1)
pixels = np.zeros((12, 12, 3), np.uint8)
file = io.BytesIO()
Image.fromarray(pixels).save(file, "PNG")

def endless():
    while True:
        yield pixels

def stuck():
    yield pixels
    threading.Event().wait()

def afterwards():
    threading.main_thread().join()
    print([r.error for r in pipe(iter([file.getvalue()] * 3))], flush=True)
    print(other.submit(file.getvalue()).result().error, flush=True)

session, other = pipe.session(), pipe.session()
futures = [session.submit(pixels) for _ in range(1000)]
left = [pipe(endless()), pipe(stuck()), pipe.assign(endless())]
for results in left:
    next(results)
threading.Thread(target=afterwards).start()
futures[0].result()
"""


@pytest.mark.processes
def test_exit_with_work_that_nobody_closed():
    """Status 0 and no message; a thread that outlives the main one still gets its results."""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", EXIT, here], capture_output=True, text=True, timeout=2 * WAIT_S, cwd=os.getcwd()
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["[None, None, None]", "None"]


def in_child(*actions):
    """What each action raises in a forked process, or its result; fails if one of them waits without end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for action in actions:
            try:
                text = str(action())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, f"{text}\n".encode())
        os._exit(0)
    os.close(writer)
    ended = wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with open(reader) as file:
        texts = file.read().splitlines()
    assert ended, f"it waits without end after {texts}"
    return texts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
class TestFork:
    FORKED = "was made before os.fork(), and its threads are in process"

    def test_a_session(self, pipe, packs):
        with pipe.session() as session:
            done, waits = session.submit(PIXELS), [session.submit(PIXELS) for _ in range(200)][-1]
            done.result(WAIT_S)
            texts = in_child(
                lambda: session.submit(PIXELS), lambda: waits.result(), lambda: done.result().error, session.close
            )
            assert waits.result(WAIT_S).error is None, "the parent goes on"
        for text, name in zip(texts[:2], ("submit", "result"), strict=True):
            assert text.startswith(f"RuntimeError: {name}: this session {self.FORKED} {os.getpid()}")
            assert text.endswith("make a session of its own in each process")
        assert texts[2:] == ["None", "None"]

    @pytest.mark.parametrize("method", ["__call__", "assign"])
    def test_results_that_are_under_way(self, pipe, method):
        with contextlib.closing(getattr(pipe, method)(Producer())) as results:
            next(results)
            (text, closed) = in_child(lambda: [*itertools.islice(results, 10_000)], results.close)
            assert text.startswith(f"RuntimeError: sources: this stream of results {self.FORKED} {os.getpid()}")
            assert closed == "None"
            assert next(results).error is None

    def test_a_pipeline_computes_in_the_child_with_one_thread(self, pipe):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            list(pipe([PIXELS] * 40))
            texts = in_child(
                lambda: list(pipe([PIXELS])),
                lambda: rf.load("fashion-mnist"),
                lambda: rf.optimize(make_model()),
                lambda: next(train(workers=0).epoch(0)),
                lambda: torch.set_num_threads(1) or [r.error for r in pipe([PIXELS] * 3)],
            )
        finally:
            torch.set_num_threads(before)
        for text, name in zip(texts, ("sources", "bundle", "model", "images"), strict=False):
            assert text.startswith(
                f"RuntimeError: {name}: this process was forked from one that had computed on several"
            )
            assert "call torch.set_num_threads(1) first" in text
        assert texts[4] == "[None, None, None]"

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_epoch(self, workers):
        with contextlib.closing(train(workers=workers).epoch(0)) as batches:
            next(batches)
            (text,) = in_child(lambda: next(batches))
            assert text.startswith(f"RuntimeError: images: this iterator of batches {self.FORKED} {os.getpid()}")


class TestTraining:
    @pytest.fixture
    def workers(self):
        """Calls that say which worker processes this test has; other tests keep pools of their own."""
        before = {process.pid for process in multiprocessing.active_children()}
        return lambda: [process for process in multiprocessing.active_children() if process.pid not in before]

    def test_workers_leave_ctrl_c_to_their_process(self, workers):
        loader = train(workers=1)
        with contextlib.closing(loader.epoch(0)) as batches:
            next(batches)
            (worker,) = workers()
            os.kill(worker.pid, signal.SIGINT)
            assert len(list(batches)) == len(loader) - 1

    def test_an_epoch_that_is_left_ends_its_workers(self, workers):
        for _ in train(workers=1).epoch(0):
            assert workers()
            break
        assert wait_until(lambda: not workers())

    def test_ctrl_c_twice(self, monkeypatch):
        """The first asks to stop, the second ends at once; the first may arrive twice; SIGTERM only asks."""
        for number in (signal.SIGINT, signal.SIGTERM):
            with stopping.stoppable(lambda text: None) as stop:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            assert (stop.number, stop.asked) == (number, True)
        monkeypatch.setattr(stopping, "SAME_S", -1.0)
        with stopping.stoppable(lambda text: None) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            assert not stop.asked
        with pytest.raises(KeyboardInterrupt), stopping.stoppable(lambda text: None), stop.at_once():
            pytest.fail("it was asked before")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_at_once(self, number):
        """Also in code that takes any exception for a fault of an image; it comes once, and cleaning up is not cut."""
        cleaned = []

        def run():
            with stopping.stoppable(lambda text: None, lambda: " in the test") as stop, stop.at_once():
                try:
                    with contextlib.suppress(Exception):
                        os.kill(os.getpid(), number)
                        cleaned.append("not reached")
                finally:
                    os.kill(os.getpid(), number)
                    cleaned.append(True)

        with pytest.raises(stopping.Interrupted, match=f"^stopped by {number.name} in the test; resume to go on$"):
            run()
        assert cleaned == [True]

    def test_handlers_and_threads_are_given_back(self):
        before = [signal.getsignal(number) for number in stopping.HANDLED]
        running = set(threading.enumerate())
        with stopping.stoppable(lambda text: None), stopping.stoppable(lambda text: None):
            assert len(set(threading.enumerate()) - running) == 2
        assert [signal.getsignal(number) for number in stopping.HANDLED] == before
        assert signal.set_wakeup_fd(-1) == -1
        assert set(threading.enumerate()) == running


BUSY = """
import hashlib
from revit_fast.train import stopping

stopping.SAME_S = stopping.GRACE_S = 0.3
with stopping.stoppable(lambda text: print(text, flush=True)):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # an hour in C, without the lock of the interpreter
"""


def test_ctrl_c_is_answered_while_the_main_thread_is_in_c():
    """Where no handler in Python runs: the first is acknowledged, the second ends the process."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout.readline() == "busy\n"
        command.send_signal(signal.SIGINT)
        assert command.stdout.readline() == "SIGINT: stopping; a second Ctrl-C quits at once\n"
        while command.poll() is None:  # the first ones count as the same
            command.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert command.stdout.read() == "quitting\n"
    assert command.returncode == 130


COMMAND = """
import argparse, signal, sys, threading, time
from revit_fast.cli.arguments import run_command

def run(args):
    threading.Thread(target=time.sleep, args=(10,)).start()  # the interpreter waits for it at its end
    try:
        print("runs", flush=True)
        time.sleep(10)
    finally:
        print("cleaned up", flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a job in the background
sys.exit(run_command(argparse.ArgumentParser(prog="command"), run))
"""


def test_ctrl_c_twice_ends_a_command_with_one_line():
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with command:
        assert command.stdout.readline() == "runs\n"
        command.send_signal(signal.SIGINT)
        assert command.stderr.readline() == "command: interrupted\n"
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=8)  # before the thread has ended
    assert (out, err) == ("cleaned up\n", "")
    assert command.returncode == -signal.SIGINT  # 130 in a shell, like the code of a command that ends by itself
