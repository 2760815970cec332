"""ReViT: one Vision Transformer for several token lengths; one packed forward pass computes all lengths of a batch.

The method is "Make A Long Image Short" (arXiv 2307.02092); names, meanings and state-dict keys are those of timm's
`VisionTransformer`; norm parameters have a leading length axis.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.layers.attention import Queries
from revit_fast.layers.block import Block
from revit_fast.layers.conv_stem import ConvStem
from revit_fast.layers.patch_embed import PatchEmbed
from revit_fast.layers.positions import PositionTables, Resampling
from revit_fast.layers.rope import Rotation
from revit_fast.layers.segments import rows_without_first, sequence_max
from revit_fast.models.attention_maps import AttentionMaps
from revit_fast.models.build import block_of, norm_of, pool_of, rope_of
from revit_fast.models.embeddings import Embeddings, Output
from revit_fast.models.hub import Pretrained
from revit_fast.models.inputs import Inputs, TakesImages, is_uniform, rows_apart
from revit_fast.models.keywords import keywords_of, spec_of
from revit_fast.models.loading import LoadsWeights
from revit_fast.models.spec import Norm, Positions, ViTSpec
from revit_fast.models.timm_api import NORM_PARAMETER, TimmInterface
from revit_fast.ops.tokens import assemble_tokens, mean_pool
from revit_fast.packing import Layout, PackedBatch, device_cu_seqlens

# torch.fx cannot trace functions that check their arguments or make tensors of a size that it does not know.
fx.wrap("assemble_tokens")
fx.wrap("mean_pool")
fx.wrap("rows_apart")
fx.wrap("rows_without_first")
fx.wrap("sequence_max")

IS_NORM = re.compile(r"norm\d?(_pre)?\.weight$")
STEM_PARAMETER = re.compile(r"^patch_embed\.(conv|bn)\d\.")


class ReViT(TakesImages, LoadsWeights, TimmInterface, AttentionMaps, Embeddings, Pretrained, nn.Module):
    """Resizable Vision Transformer.

    Takes `Tensor [B, 3, H, W]`, a list or nested tensor of tensors `[3, h_i, w_i]` of mixed sizes, or a `PackedBatch`
    of patch rows; every side must be a multiple of the patch size. Each image uses the norm parameters of the
    configured length nearest to its number of patches; ties go to the longer. An image may have any grid; position
    embeddings are resampled to it as in timm. A pixel that is NaN or infinite makes the logits of its image NaN, and
    changes no other image.

    Args:
        spec: the architecture.
        **keywords: in its place the keyword arguments of `keywords.spec_of`: grids, patch_size, embed_dim, depth, ...

    Raises:
        TypeError, ValueError: for keywords that no model can have, or that stand beside a spec.
    """

    norm_parameter = NORM_PARAMETER

    def __init__(self, spec: ViTSpec | None = None, /, **keywords: Any) -> None:
        if spec is not None and keywords:
            raise TypeError(f"spec: expected it alone, got {', '.join(keywords)} too; change the spec instead")
        super().__init__()
        self._spec = spec = spec_of(**keywords) if spec is None else spec
        embed, prefix, head, n_lengths = spec.embed, spec.embed.prefix, spec.head, len(spec.grids)
        self.grids, self.lengths = spec.grids, spec.lengths
        positions = embed.positions
        self.base_grid = (spec.grids[0],) * 2 if positions is None else positions.base_grid
        self.patch_size = embed.patch_size
        self.in_chans = embed.in_chans
        self.num_classes = head.classes
        self.num_features = self.embed_dim = spec.dim
        self.num_reg_tokens = prefix.registers
        self.has_class_token = prefix.cls
        self.distilled = prefix.dist
        self.distilled_training = False
        self.has_aux_head = head.token_labels
        self.num_prefix_tokens = prefix.count
        self.no_embed_class = positions is None or not prefix.positioned
        self.pool_include_prefix = head.pool_prefix
        self.global_pool = head.pool
        self.grad_checkpointing = False
        self.pretrained_cfg: dict[str, Any] = {}

        def norm(norm: Norm | None) -> nn.Module:
            return nn.Identity() if norm is None else norm_of(norm, spec.dim, n_lengths)

        options = {"dim": spec.dim, "grid_size": self.base_grid, "bias": embed.bias}
        if embed.stem is None:
            patch_norm = embed.patch_norm and norm(embed.patch_norm)
            self.patch_embed = PatchEmbed(embed.patch_size, embed.in_chans, **options, norm=patch_norm)
        else:
            self.patch_embed = ConvStem(embed.patch_size, embed.in_chans, embed.stem, **options)
        self.cls_token = nn.Parameter(torch.empty(1, 1, spec.dim)) if prefix.cls else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, spec.dim)) if prefix.dist else None
        self.reg_token = nn.Parameter(torch.empty(1, prefix.registers, spec.dim)) if prefix.registers else None
        self.resampling = resampling_of(positions, self.base_grid)
        if positions is None:  # without rows; it still has the model's device and dtype
            none = self.patch_embed.proj.weight.detach().new_empty(1, 0, spec.dim)
            self.register_buffer("pos_embed", none, persistent=False)
        else:
            n_embedded = self._n_prefix_embedded + self.resampling.n_stored
            self.pos_embed = nn.Parameter(torch.empty(1, n_embedded, spec.dim))
        self.pos_drop = nn.Dropout(0.0 if positions is None else positions.drop)
        self.rope = rope_of(spec)
        self.norm_pre = norm(embed.norm)
        self.blocks = nn.ModuleList(block_of(block, spec.dim, n_lengths) for block in spec.blocks)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": spec.dim, "reduction": embed.patch_size}
            for i in range(len(spec.blocks))
        ]
        self.norm = norm(None if head.norm_pooled else head.norm)
        self.attn_pool = pool_of(head.attention, spec.dim, n_lengths)
        self.fc_norm = norm(head.norm if head.norm_pooled else None)
        self.head_drop = nn.Dropout(head.drop)
        self.head = self._linear_head()
        self.head_dist = self._linear_head() if prefix.dist else None
        self.aux_head = self._token_label_head()

        coordinates = None if self.rope is None else embed.rope.coordinates
        self._positions = PositionTables(self.resampling, [(g, g) for g in self.grids], coordinates)
        self.init_weights()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name in ("rope", "attn_pool"):
            if not hasattr(self, name):  # pickled before there was a choice
                setattr(self, name, None)
        arguments = self.__dict__.pop("_arguments", None)
        if arguments is not None:  # pickled before there were specs
            now = {"num_classes": self.num_classes, "global_pool": self.global_pool}
            self._spec = spec_of(**arguments | now)

    @property
    def spec(self) -> ViTSpec:
        """The architecture, as it is after `reset_classifier` and `prune_intermediate_layers`."""
        return self._spec

    @property
    def num_heads(self) -> int:
        """Attention heads, where all blocks have the same number; the name is LV-ViT's and TimeSformer's."""
        heads = {block.attn.heads for block in self.spec.blocks}
        if len(heads) != 1:
            raise ValueError(f"num_heads: the blocks have {sorted(heads)} heads; read them from `spec.blocks`")
        return heads.pop()

    @property
    def config(self) -> dict[str, Any]:
        """The keyword arguments for this architecture as JSON values; `from_config` accepts them.

        Raises:
            ValueError: for an activation that no file can hold.
        """
        return keywords_of(self.spec)

    @classmethod
    def unsaid_arguments(cls, config: Mapping[str, Any]) -> list[str]:
        """Arguments that only the subclass has and `config` lacks: the saved model may have had other values."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        own = {n for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind in named and n != "self"}
        return sorted(own - set(inspect.signature(spec_of).parameters) - set(config))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ReViT:
        """A model of the architecture that `config` describes, with new weights.

        Raises:
            TypeError, ValueError: for arguments that the constructor does not know or refuses.
        """
        return cls(**config)

    def init_weights(self) -> None:
        """timm's initialisation: truncated normal weights, zero biases. A convolutional stem keeps PyTorch's."""
        for name, parameter in self.named_parameters():
            if STEM_PARAMETER.search(name):
                continue
            if name in ("pos_embed", "attn_pool.latent") or (name.endswith(".weight") and not IS_NORM.search(name)):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name in ("cls_token", "dist_token", "reg_token"):
                nn.init.normal_(parameter, std=1e-6)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        if self.rope is not None:
            self.rope.init_weights()

    def _linear_head(self) -> nn.Module:
        return nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def _token_label_head(self) -> nn.Module | None:
        return self._linear_head() if self.has_aux_head and self.num_classes > 0 else None

    @classmethod
    def from_timm(cls, vit: nn.Module, grids: Sequence[int] = DEFAULT_GRIDS) -> ReViT:
        """A ReViT with the weights of a timm `VisionTransformer` or `NaFlexVit`, norms repeated for every length.

        For images of a single grid the result equals that of the timm model at that input size (with
        `dynamic_img_size=True`). For a `NaFlexVit` this is also true of grids that are not square.

        Args:
            vit: one of the models that docs/models.md counts: ViT, DeiT, DINOv2, DINOv3, EVA-02, SigLIP, CLIP, and
                others of their fields.
            grids: configured token grids, strictly decreasing.

        Raises:
            TypeError: if `vit` is none of these classes.
            ValueError: if it uses a feature that ReViT does not have; the message names it.
        """
        from revit_fast.models.from_timm import model_from_timm

        return model_from_timm(cls, vit, grids)

    @classmethod
    def from_transformers(
        cls, vit: nn.Module | str | Path, grids: Sequence[int] = DEFAULT_GRIDS, *, processor: Any = None
    ) -> ReViT:
        """A ReViT with the weights of a ViT of transformers, its LayerNorms repeated for every length.

        At any grid results equal those of `vit` (with `interpolate_pos_encoding=True`): `forward` returns its logits or
        `image_embeds`, else its pooled features, `forward_features` its `last_hidden_state`. Pooled features of ViT,
        DeiT and DINO are the class token: ViT's pooler is left out, and so are mask tokens and text models.

        Args:
            vit: a model of one of the classes in `models.from_transformers.KINDS`, or the folder of a saved one.
            grids: configured token grids, strictly decreasing.
            processor: the model's image processor, or the content of its `preprocessor_config.json`, which is looked
                for in a folder; without it `pretrained_cfg` describes DeiT's preprocessing.

        Raises:
            ImportError: if transformers is not installed.
            FileNotFoundError: if there is no such folder.
            TypeError: if `vit` is not a model of transformers, or `processor` is something else.
            ValueError: if either uses a feature that is not supported; the message names it.
        """
        from revit_fast.models.from_transformers import model_from_transformers

        return model_from_transformers(cls, vit, grids, processor)

    def convert_state_dict(self, state_dict: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """See `LoadsWeights`; a token-label head is left out if this model has none."""
        spare = "aux_head." if self.aux_head is None else ()
        kept = {name: value for name, value in state_dict.items() if not name.startswith(spare)}
        return super().convert_state_dict(kept, **options)

    @property
    def _n_prefix_embedded(self) -> int:
        """Number of prefix tokens that have a row in `pos_embed`."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _prefix(self) -> Tensor:
        """Prefix tokens with their position embeddings, `[n_prefix, C]`."""
        tokens = [t[0] for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        prefix = torch.cat(tokens) if tokens else self.pos_embed.new_empty(0, self.embed_dim)
        return prefix if self.no_embed_class else prefix + self.pos_embed[0, : self.num_prefix_tokens]

    def _embed(self, inputs: Inputs) -> Tensor:
        """Tokens `[T, C]` that enter the blocks."""
        # Under autocast the linear layers give 16-bit rows; the residual stream stays in the parameters' precision.
        patches = self.patch_embed(inputs.rows, inputs.normalization).to(self.pos_embed.dtype)
        if self.spec.embed.patch_norm is not None:
            patches = self.patch_embed.norm(patches, inputs.layout._replace(cu_seqlens=inputs.cu_seqlens, tiles=None))
        x = assemble_tokens(patches, self._prefix(), inputs.pos_table, inputs.pos_offset, inputs.cu_seqlens)
        return _normed(self.norm_pre, self.pos_drop(x), inputs.layout)

    def _rotations(self, inputs: Inputs) -> list[Rotation | None]:
        """How queries and keys turn, for every block."""
        if self.rope is None:
            return [None] * len(self.blocks)
        table = inputs.coordinates
        if self.training:
            table = self.spec.embed.rope.augmented(table)
        rows, prefix = (table.new_zeros(n, 2) for n in (inputs.rows.shape[0], self.num_prefix_tokens))
        coordinates = assemble_tokens(rows, prefix, table, inputs.pos_offset, inputs.cu_seqlens)
        return self.rope(coordinates, self.pos_embed.dtype, len(self.blocks))

    def _run_block(
        self,
        block: Block,
        x: Tensor,
        delta: Tensor | None,
        layout: Layout,
        rotation: Rotation | None,
        queries: Queries | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, delta, layout, queries, rotation, use_reentrant=False)
        return block(x, delta, layout, queries, rotation)

    def _add_and_norm(self, x: Tensor, delta: Tensor | None, layout: Layout) -> Tensor:
        """The stream x + delta after the final norm."""
        if delta is None or type(self.norm) is nn.Identity:
            return _normed(self.norm, x if delta is None else x + delta, layout)
        return self.norm(delta, layout, residual=x)[0]

    def _pooled_tokens(self, layout: Layout) -> Queries:
        """The tokens that "token" pooling reads: class token, and distillation token if there is one."""
        n = 2 if self.distilled else 1
        starts = layout.cu_seqlens[:-1]
        token = torch.arange(n, device=starts.device, dtype=starts.dtype)
        cu_seqlens = device_cu_seqlens(n, starts.shape[0], starts.device)
        rows = (starts.unsqueeze(1) + token).flatten()
        return Queries(rows, Layout(cu_seqlens, layout.length_index, None), still=n <= self.num_prefix_tokens)

    def forward(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `[B, num_classes]` in the given order (two tensors for a distilled model in distilled training).

        Without pooling there are logits for every token: `[B, N, num_classes]` for an image tensor, else rows
        `[T, num_classes]`. With class-token pooling the last block computes only what the head reads: its queries are
        the pooled tokens.
        """
        if isinstance(x, fx.Proxy):
            return self._trace(x)
        return self._as_given(self._run(self._inputs(x)), x)

    def _as_given(self, logits: Tensor, x: Tensor | Sequence[Tensor] | PackedBatch) -> Tensor:
        """Logits of every token of an image tensor as `[B, N, num_classes]`; others unchanged."""
        if self.global_pool or not is_uniform(x):
            return logits
        n_patches = (x.shape[2] // self.patch_size) * (x.shape[3] // self.patch_size)
        return logits.view(x.shape[0], self.num_prefix_tokens + n_patches, logits.shape[1])

    def _trace(self, x: fx.Proxy) -> fx.Proxy:
        """`forward` for images of one size as torch.fx traces it, with `[B, N, C]` between the blocks.

        Blocks, norms and the embedding must be leaves of the trace.
        """
        self._check_leaves(x)
        inputs = self._uniform_inputs(x)
        tokens, rotations = self._embed(inputs).view(x.shape[0], -1, self.embed_dim), self._rotations(inputs)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, None, inputs.layout, None, rotations[i])
        rows = pooled = self._add_and_norm(tokens.flatten(0, 1), None, inputs.layout)
        if self.global_pool == "token":
            tokens = rows.view(x.shape[0], -1, self.embed_dim)
            pooled = tokens[:, : 2 if self.distilled else 1].flatten(0, 1)
        else:
            pooled = self.pool(rows, inputs.layout)
        logits = self._add_token_labels(self._head(pooled, inputs.layout), rows, inputs.layout)
        return logits if self.global_pool else logits.view(x.shape[0], -1, logits.shape[1])

    def _run(self, inputs: Inputs, output: Output = "logits") -> Tensor | tuple[Tensor, Tensor]:
        """The forward pass on prepared inputs. It runs on the device only; the inputs' shapes determine all shapes."""
        pre_logits = output == "pooled"
        tokens, delta, layout = self._embed(inputs), None, inputs.layout
        rotations = self._rotations(inputs)
        reads_few = output != "tokens" and self.global_pool == "token" and (pre_logits or self.aux_head is None)
        queries = self._pooled_tokens(layout) if reads_few else None
        for i, (block, rotation) in enumerate(zip(self.blocks, rotations, strict=True), start=1):
            few = queries if i == len(self.blocks) else None
            tokens, delta = self._run_block(block, tokens, delta, layout, rotation, few)
        if queries is None:
            tokens = self._add_and_norm(tokens, delta, layout)
            return tokens if output == "tokens" else self._classify(tokens, layout, pre_logits)
        if not self.blocks:
            tokens = tokens.index_select(0, queries.rows)
        return self._head(self._add_and_norm(tokens, delta, queries.layout), layout, pre_logits)

    def _classify(self, tokens: Tensor, layout: Layout, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pools all tokens after the final norm, and classifies."""
        if self.global_pool == "token":
            pooled = tokens.index_select(0, self._pooled_tokens(layout).rows)
        else:
            pooled = self.pool(tokens, layout)
        logits = self._head(pooled, layout, pre_logits)
        return logits if pre_logits else self._add_token_labels(logits, tokens, layout)

    def _add_token_labels(self, logits: Tensor, tokens: Tensor, layout: Layout) -> Tensor:
        """The class token's logits, plus those of the token-label head if there is one."""
        if self.aux_head is None:
            return logits
        return logits + 0.5 * sequence_max(self.aux_head(tokens), layout.cu_seqlens, self.num_prefix_tokens)

    def pool(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Pools tokens `[T, C]` to the rows that the head reads; with "token" pooling the last block does it."""
        if not self.global_pool:
            return tokens
        cu_seqlens, n_skipped = layout.cu_seqlens, 0 if self.pool_include_prefix else self.num_prefix_tokens
        if self.global_pool == "map":
            read, own = rows_without_first(tokens, layout, n_skipped)
            return self.attn_pool(read, own)
        mean = mean_pool(tokens, cu_seqlens, n_skipped)
        if self.global_pool == "avg":
            return mean
        return torch.cat([tokens.index_select(0, cu_seqlens[:-1]), mean], dim=1)

    def _head(self, pooled: Tensor, layout: Layout, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of pooled rows: one per sequence, two for a distilled model, all tokens without pooling."""
        own = rows_apart(pooled, layout) if self.global_pool else layout
        pooled = self.head_drop(_normed(self.fc_norm, pooled, own))
        if not self.distilled:
            return pooled if pre_logits else self.head(pooled)
        x, x_dist = pooled.view(-1, 2, self.embed_dim).unbind(1)
        if pre_logits:
            return (x + x_dist) / 2
        x, x_dist = self.head(x), self.head_dist(x_dist)
        if self.distilled_training and self.training:
            return x, x_dist
        return (x + x_dist) / 2

    def forward_features(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> Tensor | PackedBatch:
        """All tokens after the final norm: `[B, N, C]` for an image tensor, else a `PackedBatch` of tokens."""
        batch = self.pack(x)
        tokens = self._normed_tokens(batch)
        if is_uniform(x):
            return tokens.view(x.shape[0], -1, self.embed_dim)
        return batch.with_tokens(tokens, self.num_prefix_tokens)

    def _normed_tokens(self, batch: PackedBatch) -> Tensor:
        """All tokens `[T, C]` after the final norm."""
        return self._run(self._inputs(batch), "tokens")

    def forward_head(self, x: Tensor | PackedBatch, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pools and classifies the result of `forward_features`; with `pre_logits` it only pools."""
        shape = x.shape[:2] if isinstance(x, Tensor) and not self.global_pool else None
        if isinstance(x, Tensor):
            seqlens = (x.shape[1],) * x.shape[0]
            x = PackedBatch.from_rows(x.flatten(0, 1), seqlens, lengths=self.lengths, n_prefix=self.num_prefix_tokens)
        logits = self._classify(x.data, x.layout(self.num_prefix_tokens), pre_logits)
        return logits if shape is None else logits.view(*shape, logits.shape[1])


def resampling_of(positions: Positions | None, base_grid: tuple[int, int]) -> Resampling:
    """How the position embeddings of a model become those of any grid; without any, nothing is stored."""
    if positions is None:
        return Resampling(base_grid, none=True)
    p = positions
    return Resampling(base_grid, p.factorized, p.keep_aspect, p.interpolation, p.antialias, p.align_corners)


def _normed(norm: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    """A norm's result, or that of an identity in its place; both are called, whatever was put around them."""
    return norm(x) if type(norm) is nn.Identity else norm(x, layout)
