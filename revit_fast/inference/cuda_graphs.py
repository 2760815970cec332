"""Replays a model's forward pass from CUDA graphs instead of launching kernels one by one.

A graph replays fixed shapes, so batches are rounded up to buckets:

- Patch rows: multiples of 128 up to 1,024, then eight sizes per octave, so that beyond 1,024 rows less than 12.5 % of
  the real rows are added. The added rows are padding; every op leaves their results zero.
- Sequences: one slot for each sequence of the shortest configured length that fits into the bucket (doubled if a batch
  of smaller images needs more). Slots without an image are sequences without patches. `assemble_tokens` still writes
  their prefix tokens, but the layout of the tokens ends before them: for every later op they are padding and cost no
  tile.
- Tiles of each class: the most that the bucket's batches have needed so far, rounded up. A class that has not occurred
  launches nothing.

Everything up to the replay is host arithmetic on lengths that the host knows: no device memory is read back, and one
copy transfers all index tensors of a batch. A call returns when it has queued its copies and the replay, so the host
can pack the next batch meanwhile; `staging` says what it may wait for.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revit_fast.inference.staging import Buffer, staging
from revit_fast.kernels.constants import KEY_CLASSES, PADDING, TILE_ROWS
from revit_fast.layers.conv_stem import ConvStem
from revit_fast.layers.patch_embed import FoldedEmbedding
from revit_fast.layers.positions import KnownGrids
from revit_fast.models.embeddings import Output
from revit_fast.models.inputs import Inputs, PatchRows
from revit_fast.models.vit import ReViT
from revit_fast.packing import Layout, PackPlan
from revit_fast.packing.batch import normalization_on

MAX_ROWS = 16384
"""Patch rows of the largest bucket. The memory that a graph keeps grows with it."""

MAX_GRAPHS = 48
"""Graphs kept; the least recently used one goes first. A stream of all batch sizes up to `MAX_ROWS` needs 40."""

Run = Callable[[], Tensor]


class Bucket(NamedTuple):
    """Shape of the batches that share a graph: patch rows, and slots for sequences."""

    n_rows: int
    n_sequences: int


def round_up(n: int, step: int, steps_per_octave: int) -> int:
    """Rounds `n` up to a multiple of `step` and of its octave over `steps_per_octave`.

    The octave is the largest power of two below `n`. Both arguments are powers of two.
    """
    octave = 1 << max(n - 1, 0).bit_length() >> 1
    step = max(step, octave // steps_per_octave)
    return -(-n // step) * step


def bucket_of(n_rows: int, n_sequences: int, shortest: int) -> Bucket:
    """The bucket of a batch.

    Args:
        n_rows: patch rows of the batch.
        n_sequences: number of images of the batch.
        shortest: patches of the shortest configured length.
    """
    rows = round_up(max(n_rows, 1), 128, 8)
    slots = -(-rows // shortest)
    while slots < n_sequences:
        slots *= 2
    return Bucket(rows, slots)


def tile_capacity(counts: Sequence[int], known: Sequence[int] | None, n_tokens: int, n_sequences: int) -> tuple:
    """Number of tiles of each class that a graph has room for: at least `counts` and `known`, with room to grow.

    Args:
        counts: tiles of each class of the batch at hand.
        known: the capacity that was too small for the batch; None for the bucket's first batch.
        n_tokens: token rows of the bucket; they bound the number of tiles of any batch.
        n_sequences: slots of the bucket.
    """
    known = known or (0,) * len(counts)
    fewest_keys = (1, *(keys + 1 for keys in KEY_CLASSES), n_tokens + 1)  # the last: padding is one sequence
    capacity = []
    for class_, (count, before) in enumerate(zip(counts, known, strict=True)):
        if count > before:
            partial = 1 if class_ == PADDING else min(n_sequences, n_tokens // fewest_keys[class_])
            room = round_up(count * 3 // 2 if before else count * 5 // 4, 4, 4)
            before = max(count, min(room, n_tokens // TILE_ROWS + partial))
        capacity.append(before)
    return tuple(capacity)


class Index(NamedTuple):
    """The index tensors of a bucket, views of one vector, each aligned to 16 bytes.

    Attributes:
        patch_cu_seqlens: int32 `[S + 1]` of the patch rows; slots without an image are empty.
        cu_seqlens: int32 `[S + 1]` of the tokens; it ends after the last real token.
        length_index: int32 `[S]`.
        pos_offset: int32 `[S]`.
        tiles: int32 `[n_tiles, 3]`, class by class; rows without work have class -1.
    """

    patch_cu_seqlens: np.ndarray | Tensor
    cu_seqlens: np.ndarray | Tensor
    length_index: np.ndarray | Tensor
    pos_offset: np.ndarray | Tensor
    tiles: np.ndarray | Tensor

    @staticmethod
    @lru_cache(maxsize=MAX_GRAPHS)
    def slices(bucket: Bucket, capacity: tuple[int, ...]) -> tuple[slice, ...]:
        """The slice of the vector for each tensor."""
        slots = bucket.n_sequences
        sizes = (slots + 1, slots + 1, slots, slots, 3 * sum(capacity))
        begins = accumulate((-(-size // 4) * 4 for size in sizes[:-1]), initial=0)
        return tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))

    @classmethod
    def over(cls, vector: np.ndarray | Tensor, bucket: Bucket, capacity: tuple[int, ...]) -> Index:
        """The index tensors as views of `vector`."""
        parts = [vector[part] for part in cls.slices(bucket, capacity)]
        return cls(*parts[:-1], parts[-1].reshape(-1, 3))


def write_index(
    vector: np.ndarray,
    patches: PackPlan,
    tokens: PackPlan,
    pos_offset: Sequence[int],
    bucket: Bucket,
    capacity: tuple[int, ...],
) -> None:
    """Writes all index tensors of a batch into one vector (see `Index`).

    Args:
        vector: int32, as long as `Index` says, whatever it holds.
        patches: plan of the batch's patch rows.
        tokens: plan of its tokens, over all token rows of the bucket.
        pos_offset: first row of each image's grid in the position table.
        bucket: bucket of the batch.
        capacity: number of tiles of each class.
    """
    vector.fill(0)
    parts = Index.over(vector, bucket, capacity)
    patches.write_cu_seqlens(parts.patch_cu_seqlens)
    tokens.write_cu_seqlens(parts.cu_seqlens)
    parts.length_index[: len(pos_offset)] = tokens.length_index
    parts.pos_offset[: len(pos_offset)] = pos_offset
    tokens.write_tiles(parts.tiles, capacity)


class GraphKey(NamedTuple):
    """Selects a batch's graph: its bucket, the dtype of its rows, whether they must still be normalised, its output."""

    bucket: Bucket
    dtype: torch.dtype
    folded: bool
    output: Output


class Graph(NamedTuple):
    """A forward pass over static memory.

    Attributes:
        capacity: number of tiles of each class.
        index: the vector that a batch's index tensors are copied to.
        replay: computes the output from the content of the static memory.
    """

    capacity: tuple[int, ...]
    index: Tensor
    replay: Run


class CudaGraphs:
    """Captures functions as CUDA graphs. They share one memory pool because no two run at the same time.

    No test executes this: `docs/gpu.md` says what has run on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def turn(self):
        """Gives the device to one call: it waits for the previous call's stream, because both share memory."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.stream is not None and self.stream != stream:
                stream.wait_stream(self.stream)
            self.stream = stream
            yield

    def capture(self, run: Run) -> Run:
        """Records the kernels that `run` launches; the result replays them into the same output tensor."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and makes libraries allocate their workspaces
            run()
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    @staticmethod
    def allocate(n_bytes: int) -> Tensor:
        """Page-locked memory, uint8 `[n_bytes]`: copies from it are queued like kernels."""
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    @staticmethod
    def event() -> torch.cuda.Event:
        """An event of the current stream. A thread that waits for it sleeps, so that others may decode images."""
        return torch.cuda.Event(blocking=True)

    @staticmethod
    def send(source: Tensor, target: Tensor) -> None:
        """Queues a copy from page-locked memory, which must stay as it is until the copy is done."""
        target.copy_(source, non_blocking=True)


class DirectCalls:
    """Stands in for `CudaGraphs` where there is no GPU: "replay" calls the function on the same static memory."""

    class event:
        """A mark that is passed at once, since nothing is queued."""

        def record(self) -> None:
            """Marks nothing."""

        def synchronize(self) -> None:
            """Waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.turn = contextlib.nullcontext

    def capture(self, run: Run) -> Run:
        """`run` itself."""
        return run

    @staticmethod
    def allocate(n_bytes: int) -> Tensor:
        """Any memory."""
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")

    @staticmethod
    def send(source: Tensor, target: Tensor) -> None:
        """Copies host values."""
        target.copy_(source)


BACKENDS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaGraphs}
"""The class that captures graphs, by device type; on any other device an optimised model runs eagerly."""


class GraphCache:
    """Runs a model through graphs, one per bucket and row dtype, over static memory that they share.

    One call uses it at a time. It belongs to the model's present parameters, see `layers.derived`.

    Args:
        model: the model.
        max_rows: patch rows of the largest bucket.
        max_graphs: number of graphs kept.
    """

    def __init__(self, model: ReViT, max_rows: int, max_graphs: int) -> None:
        self._model, self._backend = model, BACKENDS[model.pos_embed.device.type](model.pos_embed.device)
        self._buffers = staging(self._backend.allocate, self._backend.event)
        self._max_rows, self._max_graphs = max_rows, max_graphs
        self.n_captures = 0
        self.graphs: OrderedDict[GraphKey, Graph] = OrderedDict()
        self._rows: dict[torch.dtype, Tensor] = {}
        self._tables: list[Tensor | None] = [None, None]
        self._table_grids: KnownGrids | None = None
        self._folded: FoldedEmbedding | None = None
        self._folded_source: Any = None

    def run(self, images: PatchRows, bucket: Bucket, output: Output) -> Tensor:
        """An output for a batch on any device."""
        model = self._model
        patches, known = images.plan.for_lengths(model.lengths), model._positions.learn(images.plan.grids)
        n_tokens = patches.n_rows + model.num_prefix_tokens * len(patches.seqlens)
        n_token_rows = bucket.n_rows + model.num_prefix_tokens * bucket.n_sequences
        # Prefix tokens of slots without an image are padding.
        tokens = patches.tokens(model.num_prefix_tokens, n_token_rows - n_tokens)
        with self._backend.turn(), next(self._buffers).turn() as buffer:
            # First: the device copies rows while the host plans tiles.
            key = self._fill(images, known, bucket, buffer, output)
            graph = self._graph(key, tokens.tile_counts, n_token_rows)
            vector = buffer.part(graph.index.shape[0], torch.int32)
            write_index(vector.numpy(), patches, tokens, known.first_rows(patches.grids), bucket, graph.capacity)
            self._backend.send(vector, graph.index)
            per_token = model.global_pool == "" or output == "tokens"
            return graph.replay()[: n_tokens if per_token else len(patches.seqlens)].clone()

    def _fill(self, images: PatchRows, known: KnownGrids, bucket: Bucket, buffer: Buffer, output: Output) -> GraphKey:
        """Copies rows, position table and folded embedding into static memory."""
        model = self._model
        if isinstance(model.patch_embed, ConvStem):
            images = model._stemmed(self._moved(images, buffer))
        rows = images.rows
        # Float rows are converted to the model's dtype; pixels stay bytes.
        dtype = torch.uint8 if rows.dtype == torch.uint8 else model.pos_embed.dtype
        if dtype not in self._rows:
            self._rows[dtype] = rows.new_empty(
                self._max_rows, rows.shape[1], dtype=dtype, device=model.pos_embed.device
            )
        self._copy_rows(rows, self._rows[dtype][: rows.shape[0]], buffer)
        if known is not self._table_grids:
            table = model._positions.table(known, model.pos_embed, model._n_prefix_embedded)
            self._fill_tables(table, known.coordinates_on(table.device))
            self._table_grids = known
        if images.normalization is not None:
            self._fold(images.normalization)
        return GraphKey(bucket, dtype, images.normalization is not None, output)

    def _moved(self, images: PatchRows, buffer: Buffer) -> PatchRows:
        """Rows and their normalization on the model's device."""
        rows, normalization = torch.empty_like(images.rows, device=self._model.pos_embed.device), images.normalization
        self._copy_rows(images.rows, rows, buffer)
        return PatchRows(
            rows, images.plan, None if normalization is None else normalization_on(normalization, rows.device)
        )

    def _copy_rows(self, rows: Tensor, target: Tensor, buffer: Buffer) -> None:
        """Queues a copy of rows. Those of the host are read before this returns: their owner may fill them again."""
        if rows.device.type != "cpu":
            target.copy_(rows)
            return
        staged = buffer.part(rows.numel(), target.dtype).view(rows.shape)
        staged.copy_(rows)
        self._backend.send(staged, target)

    def _fill_tables(self, *tables: Tensor | None) -> None:
        """Copies position embeddings, and coordinates of rotary ones, into static memory."""
        for i, table in enumerate(tables):
            if table is None:
                continue
            static = self._tables[i]
            if static is None or static.shape[0] < table.shape[0]:  # there is no room for new grids
                static = self._tables[i] = table.new_zeros(2 * table.shape[0], table.shape[1])
                self.graphs.clear()
            static[: table.shape[0]].copy_(table)

    def _fold(self, normalization: Tensor) -> None:
        """Folds a normalization into the embedding unless it is the one folded last."""
        device = self._model.pos_embed.device
        on_host = normalization.device.type == "cpu"
        version = 0 if normalization.is_inference() else normalization._version
        source = normalization.tolist() if on_host else (normalization, version)
        known = self._folded_source
        same = known == source if on_host else known is not None and known[0] is source[0] and known[1] == source[1]
        if same:
            return
        folded = self._model.patch_embed.fold(normalization.to(device))
        if self._folded is None:
            self._folded = folded
        else:
            self._folded.weight.copy_(folded.weight)
            self._folded.bias.copy_(folded.bias)
        self._folded_source = source

    def _graph(self, key: GraphKey, counts: Sequence[int], n_token_rows: int) -> Graph:
        """The batch's graph: an existing one with room for its tiles, else a new one."""
        graph = self.graphs.get(key)
        if graph is None or any(count > room for count, room in zip(counts, graph.capacity, strict=True)):
            known = None if graph is None else graph.capacity
            graph = self._capture(key, tile_capacity(counts, known, n_token_rows, key.bucket.n_sequences))
            self.graphs[key] = graph
            while len(self.graphs) > self._max_graphs:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return graph

    def _capture(self, key: GraphKey, capacity: tuple[int, ...]) -> Graph:
        rows = self._rows[key.dtype][: key.bucket.n_rows]
        size = Index.slices(key.bucket, capacity)[-1].stop
        vector = torch.zeros(size, dtype=torch.int32, device=rows.device)
        index = Index.over(vector, key.bucket, capacity)
        index.tiles[:, 2] = -1  # the runs before the capture find no work
        layout = Layout(index.cu_seqlens, index.length_index, index.tiles, capacity)
        folded = self._folded if key.folded else None
        table, coordinates = self._tables
        inputs = Inputs(rows, index.patch_cu_seqlens, layout, table, index.pos_offset, folded, coordinates)
        self.n_captures += 1
        return Graph(capacity, vector, self._backend.capture(lambda: self._model._run(inputs, key.output)))
