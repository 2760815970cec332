"""`optimize`: an inference copy of a model, fused with packed weights on a CPU, replayed from CUDA graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from revit_fast.inference import cpu, cuda_graphs, fusable, packed_weights
from revit_fast.inference.calibration import calibration_batches
from revit_fast.inference.cuda_graphs import MAX_GRAPHS, MAX_ROWS, GraphCache, bucket_of
from revit_fast.inference.inference_copy import InferenceCopy, in_turn
from revit_fast.inference.modular import ModularReViT
from revit_fast.layers.derived import Derived
from revit_fast.models.embeddings import Output
from revit_fast.models.inputs import PatchRows
from revit_fast.models.vit import ReViT
from revit_fast.ops._modes import own_modes
from revit_fast.ops.linear import cpu_multiplies_bf16
from revit_fast.packing import PackedBatch

ENGINES = ("fused", "modules")
"""Ways to run a copy, see `optimize`."""


def needing_weights(what: str, method: Callable) -> Callable:
    """A method of `OptimizedReViT` that a copy without weights refuses under the name `what`."""

    @wraps(method)
    def checked(self: OptimizedReViT, *args: Any, **options: Any) -> Any:
        if not self._keeps_weights:
            raise RuntimeError(
                f"model: {what} needs the weights, and this copy has dropped them (keep_weights=False); make another "
                "copy with keep_weights=True for it"
            )
        return method(self, *args, **options)

    return checked


class OptimizedReViT(InferenceCopy, ReViT):
    """An inference copy of a `ReViT`; make one with `optimize`."""

    _packed_dtype: torch.dtype | None = None  # of the blocks' packed weights; None: the parameters' dtype
    _calibration: tuple[PackedBatch, ...] = ()  # batches that int8 weights are calibrated on whenever they are packed
    _keeps_weights = True

    def __init__(
        self,
        model: ReViT,
        dtype: torch.dtype | None,
        calibration: tuple[PackedBatch, ...],
        keep_weights: bool,
        max_rows: int,
        max_graphs: int,
    ) -> None:
        self._take(model)
        if dtype is not None:
            self._packed_dtype = torch.int8 if dtype == torch.int8 else None
            self._calibration = calibration
            self.to(dtype=torch.float32 if dtype == torch.int8 else dtype)
        self.max_rows, self.max_graphs = max_rows, max_graphs
        self._derive()
        if not keep_weights:
            self._drop_weights()

    def _drop_weights(self) -> None:
        """Packs the weights and drops the originals of the blocks' linear layers, almost all there are."""
        if not self._fuses():
            raise ValueError(
                "keep_weights: only a copy that runs fused on a CPU, in float32 or bfloat16 with the C++ extension, "
                "can do without its weights; leave it True"
            )
        self._packed.pin(self)
        self._calibration = ()
        for block in self.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
        self._keeps_weights = False

    _embed = needing_weights("code that does not run fused", ReViT._embed)
    _apply = needing_weights("a change of device or dtype", InferenceCopy._apply)
    state_dict = needing_weights("state_dict", ReViT.state_dict)
    load_state_dict = needing_weights("load_state_dict", InferenceCopy.load_state_dict)
    refresh = needing_weights("refresh", InferenceCopy.refresh)
    __getstate__ = needing_weights("a pickle or a copy", InferenceCopy.__getstate__)

    def _derive(self) -> None:
        self._packed = Derived(_packed)
        self._graphs = Derived(partial(GraphCache, max_rows=self.max_rows, max_graphs=self.max_graphs))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._derive()

    @property
    def dtype_used(self) -> torch.dtype:
        """Dtype of the weights that the blocks multiply with; without the C++ extension that of the parameters."""
        return self._packed_dtype if self._packed_dtype and fusable.serves(self) else self.pos_embed.dtype

    @property
    def input_device(self) -> torch.device:
        """Device on which the copy expects its batches; it is the CPU if graphs are replayed, which copy a batch."""
        return torch.device("cpu") if self._replays() else self.pos_embed.device

    @in_turn
    def forward(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> Tensor:
        """Logits as in `ReViT.forward`, without autograd."""
        if isinstance(x, fx.Proxy):
            return self._trace(x)
        return self._as_given(self._logits(x), x)

    forward_features = in_turn(ReViT.forward_features)
    forward_head = in_turn(ReViT.forward_head)
    forward_embeddings = in_turn(ReViT.forward_embeddings)
    forward_intermediates = in_turn(ReViT.forward_intermediates)
    attention_maps = in_turn(ReViT.attention_maps)

    def _logits(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> Tensor:
        """Logits as rows, one for every image or, without pooling, for every token."""
        replays = self._replays()
        fuses = not replays and self._fuses()
        if not fuses and not replays:
            with torch.no_grad():
                return self._run(self._inputs(x))
        with own_modes():
            images = self._on_known_device(self._patch_rows(x))
            return cpu.fused_logits(self, self._packed, images) if fuses else self._replayed(images, "logits")

    def _embeddings(self, batch: PackedBatch, tokens: bool) -> tuple[Tensor, Tensor | None]:
        replays = self._replays()
        fuses = not replays and self._fuses()
        if not fuses and not replays:
            with torch.no_grad():
                return super()._embeddings(batch, tokens)
        with own_modes():
            images = self._on_known_device(self._patch_rows(batch))
            if fuses:
                return cpu.fused_embeddings(self, self._packed, images, tokens)
            if not tokens:
                return self._replayed(images, "pooled"), None
            rows, plan = self._replayed(images, "tokens"), images.plan.for_lengths(self.lengths)
            layout = plan.tokens(self.num_prefix_tokens).layout(rows.device)
            return self._classify(rows, layout, pre_logits=True), rows

    def _replayed(self, images: PatchRows, output: Output) -> Tensor:
        """An output of a batch from a CUDA graph; batches beyond `max_rows` and empty ones run eagerly."""
        bucket = bucket_of(images.plan.n_rows, len(images.plan.seqlens), self.lengths[-1])
        if images.plan.seqlens and bucket.n_rows <= self.max_rows:
            with self._graphs.of(self) as graphs:
                return graphs.run(images, bucket, output)
        return self._run(self._inputs(PackedBatch.from_plan(*images).to(self.pos_embed.device)), output)

    def _on_known_device(self, images: PatchRows) -> PatchRows:
        device = self.pos_embed.device
        if images.rows.device not in (device, torch.device("cpu")):
            raise ValueError(f"x: batch is on {images.rows.device}, model on {device}; move one with .to(device)")
        return images

    def _replays(self) -> bool:
        if self._packed_dtype is not None:
            check_integer_device(self.pos_embed.device)
        # A float64 model on a GPU runs the reference, which reads lengths back to the host: no graph can capture that.
        known = self.pos_embed.device.type in cuda_graphs.BACKENDS and self.pos_embed.dtype != torch.float64
        return known and not torch.compiler.is_compiling()

    def _fuses(self) -> bool:
        return not torch.compiler.is_compiling() and not self._replays() and fusable.serves(self)

    def _normed_tokens(self, batch: PackedBatch) -> Tensor:
        if not self._fuses():
            return super()._normed_tokens(batch)
        with own_modes():
            return cpu.fused_tokens(self, self._packed, self._on_known_device(self._patch_rows(batch)))

    def _queries_and_keys(self, batch: PackedBatch, blocks: Collection[int]) -> dict[int, tuple[Tensor, Tensor]]:
        if not self._fuses():
            return super()._queries_and_keys(batch, blocks)
        with own_modes():
            images = self._on_known_device(self._patch_rows(batch))
            return {i: cpu.fused_queries_and_keys(self, self._packed, images, i) for i in blocks}


def _packed(model: OptimizedReViT) -> packed_weights.Packed:
    return packed_weights.pack_model(model, model._packed_dtype, training=True, calibration=model._calibration)


def chosen_dtype(model: ReViT, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that `optimize` takes for "auto"; any other as it is."""
    if dtype != "auto":
        return dtype
    if model.pos_embed.device.type == "cpu":
        return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32
    native = model.pos_embed.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def check_integer_device(device: torch.device) -> None:
    """Raises a ValueError if there are no kernels for int8 weights."""
    if device.type != "cpu":
        raise ValueError(
            f"dtype: torch.int8 is served on the CPU only, and the model is on {device}; use bfloat16 there"
        )


def optimize(
    model: ReViT,
    dtype: torch.dtype | Literal["auto"] | None = None,
    *,
    calibrate: Iterable[Tensor | Sequence[Tensor] | PackedBatch] | None = None,
    engine: str = "fused",
    keep_weights: bool = True,
    max_rows: int = MAX_ROWS,
    max_graphs: int = MAX_GRAPHS,
) -> OptimizedReViT | ModularReViT:
    """An inference copy of `model` with the same methods and, within rounding, the same results; `model` is unchanged.

    On a CPU `forward` and `forward_features` run fused. The first call packs the weights; the copy then holds them
    twice, packed and as its parameters. An image's result is bitwise the same whatever else is in its batch. Several
    threads may call the copy concurrently.

    bfloat16 weights take half the memory. CPUs with AVX512_BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later) also
    multiply in bfloat16: rows, queries, keys, values and attention's probabilities are rounded to bfloat16 where they
    meet weights or each other; sums, residuals, norms and activations are in float32. That is almost twice as fast as
    float32. On other CPUs the weights are widened when they are read, and all arithmetic is in float32. `revit-fast
    env` says which it is.

    int8, on a CPU only, is faster and takes a quarter of the memory, but is less accurate. The weights of the blocks
    are rounded to symmetric 8-bit integers, with a scale for every output. Each row that is multiplied by them is
    rounded too, with a scale for every part of at most 512 values (`ops.packed_linear`). Sums of products are exact
    within a part. Embedding, attention, norms, residuals, activations and head stay in float32, as do the parameters
    and everything that does not run fused. In every dtype a pixel that is NaN or infinite makes the logits of its image
    NaN, and no others. docs/notes/cpu-engine.md lists costs and gains; check the accuracy of your own model.

    `calibrate` makes int8 more accurate, most of all for models in which some channels are much larger than the others.
    Weights are prepared for the inputs that they meet on these batches (`inference.smoothing`), which takes seconds to
    minutes whenever weights are packed. The first block's qkv stays in float32. The parameters stay as they are. The
    copy keeps the batches, in pickles and deep copies too, and calibrates on them again when its weights have changed.
    Arithmetic in another order can round a few weights otherwise, so a deep copy or an unpickled copy may differ a
    little in its results. With keep_weights=False the copy drops the batches.

    On a GPU the forward pass is replayed from CUDA graphs, so one call launches all kernels. A graph is captured for
    the first batch of a new shape; shapes are rounded up, see `inference.cuda_graphs`. A batch may be on the CPU,
    ideally as uint8 rows: these are copied once, and their normalisation is folded into the embedding. A call returns
    once its work is queued; the caller may then write to the batch. Hooks run only at capture. Batches beyond
    `max_rows` and all other methods run eagerly. Calls from several threads run one after another.

    The engine "modules" calls every module instead, so it serves what the fused engine refuses: hooks, adapters,
    replaced modules, any activation. On a CPU in float32, plain linear layers, MLPs and patch embeddings run on weights
    packed once. In bfloat16, and on a GPU, it runs the model's own code, without CUDA graphs.

    float64 models, other methods, code under `torch.compile` and a CPU without the C++ extension use the model's own
    code. The precision is that of `dtype`: `torch.autocast` changes nothing of what runs fused. The copy notices
    changed parameters (`load_state_dict`, `.to`, in-place updates, new modules). It cannot notice a write through
    `.data` that keeps the memory: call `copy.refresh()` after one. `load_state_dict` and `.to` wait for the calls of
    other threads, so each result belongs to either the old or the new weights. Pickles and deep copies contain only the
    parameters and derive the rest again.

    From the first copy on, the process keeps freed memory, see `revit_fast.io.memory.keep_freed_pages`.

    Args:
        model: the model to copy.
        dtype: dtype of the copy, float32, bfloat16 or float16; by default that of the model. int8 means a float32 copy
            with packed weights in int8. "auto" is bfloat16 where the device multiplies in bfloat16, else float32 on a
            CPU and float16 on a GPU; the copy's `dtype_used` says which.
        calibrate: for int8, batches of whatever the model takes, a few dozen images of the kinds and sizes that it
            will see; None for no calibration.
        engine: "fused", or "modules" to call every module.
        keep_weights: False drops the original weights of the blocks' linear layers once they are packed, so the copy
            takes half the memory (on a CPU only). Everything that needs them is then refused: `forward_intermediates`,
            `state_dict` and saving, `load_state_dict`, `.to`, copies, pickles, exports of one grid, compilation.
        max_rows: patch rows (padding included) of the largest batch that is captured. The graphs share one memory pool
            of about the size that the largest of them needs.
        max_graphs: number of graphs kept; the least recently used one is dropped first.

    Raises:
        TypeError: if `model` is not a `ReViT`; for another dtype; if `calibrate` is no iterable of batches.
        ValueError: for bounds below 1; for `calibrate` without int8, or without images; for int8 on any device but a
            CPU; on a CPU for float16, and for a model with hooks or replaced modules that fused code would not run (the
            message names them); for an unknown engine.
    """
    if type(model) not in (ReViT, OptimizedReViT, ModularReViT):  # a subclass may compute something else
        raise TypeError(f"model: expected a revit_fast.ReViT, got {type(model).__name__}; use ReViT.from_timm(vit)")
    dtype = chosen_dtype(model, dtype)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.int8):
        raise TypeError(
            f'dtype: expected torch.float32, torch.bfloat16, torch.float16, torch.int8 or "auto", got {dtype!r}'
        )
    if engine not in ENGINES:
        raise ValueError(f"engine: expected {' or '.join(map(repr, ENGINES))}, got {engine!r}")
    for name, value in (("max_rows", max_rows), ("max_graphs", max_graphs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    if dtype == torch.int8:
        check_integer_device(model.pos_embed.device)
        if engine == "modules":
            raise ValueError('dtype: engine="modules" has no int8 weights; use engine="fused", or bfloat16')
    if model.pos_embed.device.type == "cpu":
        if (dtype or model.pos_embed.dtype) == torch.float16:
            raise ValueError("dtype: float16 is not served on the CPU; use torch.bfloat16 or torch.float32")
        if engine == "fused":
            fusable.check_fusable(model)
    if calibrate is not None and dtype != torch.int8:
        raise ValueError(f"calibrate: it prepares int8 weights; give dtype=torch.int8 too, got {dtype}")
    if engine == "modules":
        if not keep_weights:
            raise ValueError('keep_weights: engine="modules" needs the weights; leave it True, or use engine="fused"')
        return ModularReViT(model, dtype)
    calibration = () if calibrate is None else calibration_batches(model, calibrate)
    return OptimizedReViT(model, dtype, calibration, keep_weights, max_rows, max_graphs)
