"""The host's part of a call that replays graphs: it waits for no copy, and no copy reads what is written later."""

import json
from contextlib import nullcontext
from itertools import islice

import numpy as np
import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from small_models import GRIDS, PATCH, make_model
from torch.utils._python_dispatch import TorchDispatchMode

import revit_fast as rf
from bench import gpu_host
from revit_fast.inference import cuda_graphs
from revit_fast.inference.cuda_graphs import CudaGraphs, DirectCalls, Index, bucket_of, tile_capacity, write_index
from revit_fast.inference.staging import N_BUFFERS, Buffer
from revit_fast.kernels.constants import KEY_CLASSES, PADDING, TILE_ROWS
from revit_fast.packing import PackedBatch, PackPlan

WIDTH = 3 * PATCH**2
NORMALIZATION = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.1]])


class Mark:
    """An event of a `Queue`."""

    def __init__(self, queue):
        self.queue, self.end, self.n_waits = queue, 0, 0

    def record(self):
        self.end = len(self.queue.tasks)

    def synchronize(self):
        self.n_waits += 1
        self.queue.work_until(self.end)


class Queue(DirectCalls):
    """A device that does nothing before the host waits for it. Results of replays go to `results`."""

    last = None
    mark = Mark

    def __init__(self, device):
        super().__init__(device)
        self.tasks, self.n_done, self.results, self.marks, self.n_allocated = [], 0, [], [], 0
        Queue.last = self

    def work_until(self, end=None):
        for task in islice(self.tasks, self.n_done, end):
            task()
            self.n_done += 1

    def allocate(self, n_bytes):
        self.n_allocated += 1
        return super().allocate(n_bytes)

    def event(self):
        self.marks.append(self.mark(self))
        return self.marks[-1]

    def send(self, source, target):
        self.tasks.append(lambda: target.copy_(source))

    def capture(self, run):
        def replay():
            self.tasks.append(lambda: self.results.append(run()))
            return torch.zeros(4096, 40)

        return replay


class Careless(Mark):
    """An event that nobody waits for."""

    def synchronize(self):
        pass


def batches(n, dtype=torch.float32):
    """Batches of mixes in another order each, all in the same memory: filling the next one overwrites the last."""
    memory = torch.empty(sum(g * g for g in GRIDS) * 4, WIDTH, dtype=dtype)
    for i in range(n):
        grids = [*GRIDS * (1 + i % 2), *GRIDS[i % 3 :], (1, 3)]
        grids = [g if isinstance(g, tuple) else (g, g) for g in np.roll(np.array(grids, dtype=object), i).tolist()]
        seqlens = [h * w for h, w in grids]
        rows = memory[: sum(seqlens)]
        rows.copy_(randn(*rows.shape, seed=i) if dtype.is_floating_point else 40 * randn(*rows.shape, seed=i) + 128)
        normalization = None if dtype.is_floating_point else NORMALIZATION
        yield PackedBatch.from_rows(rows, seqlens, grids=grids, lengths=(36, 16, 4), normalization=normalization)


def run_ahead(monkeypatch, mark, dtype, n=9):
    """Results of a device that lags behind the host, the right ones, and the device."""
    monkeypatch.setattr(Queue, "mark", mark)
    monkeypatch.setitem(cuda_graphs.BACKENDS, "cpu", Queue)
    model = make_model()
    fast, expected = rf.optimize(model), []
    fast(next(batches(1, dtype)))
    queue = Queue.last
    queue.work_until()
    queue.results.clear()
    for i, batch in enumerate(batches(n, dtype)):
        with torch.no_grad():
            expected.append(model(batch))
        fast(batch)
        assert queue.n_done < len(queue.tasks), "the host must not wait for the replay that it has queued"
        assert len(queue.results) >= (i - N_BUFFERS if mark is Mark else 0)
    queue.work_until()
    return [out[: len(right)] for out, right in zip(queue.results, expected, strict=True)], expected, queue


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_results_are_right_however_far_the_device_lags_behind(monkeypatch, dtype):
    results, expected, queue = run_ahead(monkeypatch, Mark, dtype)
    torch.testing.assert_close(results, expected)
    assert len(queue.marks) == N_BUFFERS
    assert sum(mark.n_waits for mark in queue.marks) == 10, "one wait a call, for the call's own buffer"
    assert queue.n_allocated <= 4 * N_BUFFERS, "buffers are used again"


def test_a_device_that_lags_behind_notices_a_buffer_written_too_early(monkeypatch):
    with pytest.raises((AssertionError, RuntimeError)):  # the kernels may refuse offsets of another batch
        torch.testing.assert_close(*run_ahead(monkeypatch, Careless, torch.float32)[:2])


def test_parts_of_a_turn_are_apart_and_their_memory_is_used_again():
    queue = Queue(None)
    buffer = Buffer(queue.allocate, queue.event())
    for _ in range(3):
        with buffer.turn():
            parts = [buffer.part(n, dtype) for n, dtype in ((5, torch.int32), (0, torch.bfloat16), (9, torch.uint8))]
            for value, part in enumerate(parts):
                part.fill_(value)
            assert [part.tolist() for part in parts] == [[0] * 5, [], [2] * 9]
        assert queue.n_allocated == 3
    with buffer.turn():
        assert buffer.part(300, torch.float32).shape == (300,)
    assert queue.n_allocated == 4, "a part that is too small makes room"


def test_a_failed_call_leaves_its_copies_marked():
    queue = Queue(None)
    buffer = Buffer(queue.allocate, queue.event())
    target = torch.zeros(4, dtype=torch.uint8)

    def fail():
        with buffer.turn():
            queue.send(buffer.part(4, torch.uint8).fill_(3), target)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with buffer.turn():
        assert target.tolist() == [3] * 4, "the copy is done before its memory is given again"


class Elsewhere(CudaGraphs):
    """Graphs on the meta device, whose values nobody can read; copies are those of a GPU."""

    last = None
    capture, event = DirectCalls.capture, DirectCalls.event

    def __init__(self, device):
        self.turn, self.memory = nullcontext, []
        Elsewhere.last = self

    def allocate(self, n_bytes):
        self.memory.append(DirectCalls.allocate(n_bytes))
        return self.memory[-1]


class Copies(TorchDispatchMode):
    """Collects the copies from the host to another device that the host waits for, or that read memory not its own."""

    def __init__(self):
        super().__init__()
        self.n, self.waiting, self.foreign = 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type == "cpu" and out.device.type != "cpu":
                self.n += 1
                queued = (kwargs or {}).get("non_blocking", args[2] if len(args) > 2 else False)
                own = {part.data_ptr() for part in Elsewhere.last.memory}
                self.waiting += [] if queued else [source.shape]
                self.foreign += [] if source.data_ptr() in own else [source.shape]
        return out


@pytest.mark.parametrize("options", [{}, {"stem_chans": 8}, {"global_pool": "", "reg_tokens": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_no_copy_of_a_call_is_waited_for_and_nothing_is_read_back(monkeypatch, options, dtype):
    """A value read from the meta device is an error; copies that a GPU's host waits for are collected."""
    monkeypatch.setitem(cuda_graphs.BACKENDS, "meta", Elsewhere)
    fast = rf.optimize(make_model(**options).to("meta"))
    for batch in batches(3, dtype):  # captures, learns grids, folds the normalization
        fast(batch)
    with Copies() as copies:
        for batch in batches(3, dtype):
            assert fast(batch).device.type == "meta"
    assert copies.n == 6, "rows and index tensors"
    assert not copies.waiting
    assert not copies.foreign, "the caller may fill its memory again"


def plain_index(seqlens, n_prefix, length_index, pos_offset, bucket, capacity):
    """The vector of index tensors, number by number."""
    slots, n_tokens = bucket.n_sequences, bucket.n_rows + n_prefix * bucket.n_sequences
    empty = slots - len(seqlens)
    tokens = [n + n_prefix for n in seqlens]
    tiles = [[] for _ in capacity]
    for b, n in enumerate([*tokens, n_tokens - sum(tokens)]):
        fits = [class_ for class_, keys in enumerate(KEY_CLASSES) if n <= keys]
        class_ = PADDING if b == len(tokens) else min(fits, default=len(KEY_CLASSES))
        tiles[class_] += [(b, row, class_) for row in range(0, n, TILE_ROWS)]
    padded = [[*class_, *[(0, 0, -1)] * (room - len(class_))] for class_, room in zip(tiles, capacity, strict=True)]
    vector = []
    for part in (
        [sum(seqlens[:b]) for b in range(len(seqlens) + 1)] + [sum(seqlens)] * empty,
        [sum(tokens[:b]) for b in range(len(tokens) + 1)] + [sum(tokens)] * empty,
        [*length_index, *[0] * empty],
        [*pos_offset, *[0] * empty],
        [number for class_ in padded for tile in class_ for number in tile],
    ):
        vector += [*[0] * (-len(vector) % 4), *part]
    return vector


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=70),
    st.integers(0, 5),
    st.integers(0, 2),
)
def test_index_tensors_are_those_of_the_definition(grids, n_prefix, spare):
    seqlens = [h * w for h, w in grids]
    lengths = (196, 100, 49)
    bucket = bucket_of(sum(seqlens), len(seqlens), 49)
    patches = PackPlan.of(seqlens, lengths, grids=grids)
    n_tokens = sum(seqlens) + n_prefix * len(seqlens)
    n_token_rows = bucket.n_rows + n_prefix * bucket.n_sequences
    tokens = patches.tokens(n_prefix, n_token_rows - n_tokens)
    capacity = tile_capacity(tokens.tile_counts, None, n_token_rows, bucket.n_sequences)
    capacity = tuple(room + spare for room in capacity)
    nearest = [min(range(3), key=lambda i: (abs(lengths[i] - n), i)) for n in seqlens]
    offsets = [7 * b for b in range(len(seqlens))]
    vector = np.full(Index.slices(bucket, capacity)[-1].stop, -7, dtype=np.int32)
    write_index(vector, patches, tokens, offsets, bucket, capacity)
    assert vector.tolist() == plain_index(seqlens, n_prefix, nearest, offsets, bucket, capacity)


def test_the_bench_of_the_host_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_graphs, "BACKENDS", dict(cuda_graphs.BACKENDS))
    monkeypatch.setattr("sys.argv", ["gpu_host", "--rounds", "2", "--out", str(tmp_path)])
    n_threads = torch.get_num_threads()
    gpu_host.main()
    torch.set_num_threads(n_threads)
    result = json.loads((tmp_path / "gpu_host.json").read_text())
    assert list(result["ms"]) == list(gpu_host.MIXES)
    assert all(median > 0 for part in result["ms"].values() for median, _ in part.values())
    assert "index tensors from the plan" in capsys.readouterr().out
