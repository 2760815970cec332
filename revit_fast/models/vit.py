"""ReViT: one Vision Transformer for several token lengths; one packed forward pass computes all lengths of a batch.

The method is "Make A Long Image Short" (arXiv 2307.02092); names, meanings and state-dict keys are those of timm's
`VisionTransformer`; norm parameters have a leading length axis.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from revit_fast.grids import DEFAULT_GRIDS, check_grids
from revit_fast.layers.attention import Queries
from revit_fast.layers.block import Block
from revit_fast.layers.conv_stem import ConvStem
from revit_fast.layers.mlp import ACTIVATIONS, activation_name, make_activation
from revit_fast.layers.norm import TALLayerNorm
from revit_fast.layers.patch_embed import FoldedEmbedding, PatchEmbed, patchify
from revit_fast.layers.positions import PositionTables, Resampling, resample, wide_patches
from revit_fast.layers.segments import sequence_max
from revit_fast.models.hub import Pretrained
from revit_fast.models.weights import load_fitting, read_checkpoint
from revit_fast.ops.tokens import assemble_tokens, mean_pool
from revit_fast.packing import Layout, PackedBatch, image_grid, nearest_length, patch_rows

# torch.fx cannot trace functions that check their arguments or make tensors of a size that it does not know.
fx.wrap("assemble_tokens")
fx.wrap("mean_pool")
fx.wrap("sequence_max")

NORM_PARAMETER = re.compile(r"(^|\.)(norm1|norm2|norm_pre|fc_norm|norm)\.(weight|bias)$")
STEM_PARAMETER = re.compile(r"^patch_embed\.(conv|bn)\d\.")


class Inputs(NamedTuple):
    """A batch on its way into the model.

    Attributes:
        rows: `[Tp, P*P*3]` patch rows; for a model with a convolutional stem, the rows of its features.
        cu_seqlens: int32 `[B + 1]` of the patches.
        layout: layout of the tokens, including prefix tokens.
        pos_table: `[R, C]` position embeddings of several grids, one after another.
        pos_offset: int32 `[B]`, row of `pos_table` where the grid of each image starts.
        normalization: `[2, 3]` mean and std that must still be applied to uint8 rows, or an embedding with them folded
            in.
    """

    rows: Tensor
    cu_seqlens: Tensor
    layout: Layout
    pos_table: Tensor
    pos_offset: Tensor
    normalization: Tensor | FoldedEmbedding | None


class PatchRows(NamedTuple):
    """Patch rows of a batch and what the host knows about them.

    Attributes:
        rows: `[Tp, P*P*3]`, one image after another, without padding.
        grids: (rows, columns) of every image.
        normalization: `[2, 3]` mean and std that must still be applied to uint8 rows.
    """

    rows: Tensor
    grids: Sequence[tuple[int, int]]
    normalization: Tensor | None = None


@fx.wrap
def uniform_inputs(
    x: Tensor,
    pos_embed: Tensor,
    patch_size: int,
    resampling: Resampling,
    n_prefix: tuple[int, int],
    lengths: Sequence[int],
) -> Inputs:
    """Inputs for images of one size by tensor arithmetic only, so that a compiler sees no packing on the host.

    Args:
        x: `[B, C, gh*P, gw*P]`.
        pos_embed: the model's stored position embeddings.
        patch_size: P in pixels.
        resampling: how `pos_embed` is resampled to other grids.
        n_prefix: number of prefix tokens, and the number of those that have a row in `pos_embed`.
        lengths: the configured lengths.
    """
    grid_h, grid_w = image_grid(x[0], patch_size, "x")
    n_patches = grid_h * grid_w
    sequences = torch.arange(x.shape[0] + 1, device=x.device, dtype=torch.int32)
    counts = torch.full((x.shape[0],), n_patches, device=x.device)
    layout = Layout(sequences * (n_patches + n_prefix[0]), nearest_length(counts, lengths), None)
    patches = resampling.resampled(wide_patches(pos_embed, n_prefix[1]), (grid_h, grid_w))
    table = patches.to(pos_embed.dtype)
    return Inputs(patchify(x, patch_size), sequences * n_patches, layout, table, torch.zeros_like(sequences[1:]), None)


@fx.wrap
def rows_apart(rows: Tensor, layout: Layout) -> Layout:
    """Layout of pooled rows, one row for every sequence of `layout`."""
    sequences = torch.arange(rows.shape[0] + 1, device=rows.device, dtype=torch.int32)
    return Layout(sequences, layout.length_index, None)


class ReViT(Pretrained, nn.Module):
    """Resizable Vision Transformer.

    Takes `Tensor [B, 3, H, W]`, a list of tensors `[3, h_i, w_i]` of mixed sizes, or a `PackedBatch` of patch rows;
    every side must be a multiple of the patch size. Each image uses the LayerNorm parameters of the configured length
    nearest to its number of patches; ties go to the longer. An image may have any grid; position embeddings are
    resampled to it as in timm.

    Args:
        grids: configured square token grids, strictly decreasing; index 0 is the longest.
        base_grid: (rows, columns) of the grid that `pos_embed` is stored for; default: the first of `grids`.
        patch_size: P in pixels.
        in_chans: image channels.
        num_classes: classes of the head; 0 for none.
        global_pool: "token" (class token), "avg" (mean of the patch tokens), "token_avg" (both side by side, `[B, 2C]`,
            as DINOv2's linear classifiers read them) or "" (none).
        embed_dim: channels C.
        depth: number of blocks.
        num_heads: attention heads.
        head_dim: channels of a head; default embed_dim // num_heads.
        hidden_dim: width of the MLP; default 4 * embed_dim.
        qkv_bias, proj_bias, mlp_bias, patch_bias: which linear layers have a bias.
        init_values: initial LayerScale; None for no LayerScale.
        residual_scale: divisor of the blocks' branches before they are added (LV-ViT's `skip_lam`).
        stem_chans: channels of LV-ViT's convolutional stem, see `ConvStem`; None: patches are embedded directly.
        aux_head: LV-ViT's token-label head: half the largest of its logits over the patch tokens is added to those of
            the class token.
        class_token: whether there is a class token.
        reg_tokens: number of register tokens.
        distilled: DeiT's distillation token and second head.
        no_embed_class: prefix tokens carry no position embedding.
        pos_factorized: position embeddings are stored separately for rows and columns, see `Resampling`.
        pos_keep_aspect: position embeddings of both sides are resampled by the same factor, see `Resampling`.
        pre_norm: a norm between embedding and blocks.
        final_norm: a norm after the blocks.
        fc_norm: apply the final norm after pooling; default: if global_pool is "avg".
        pool_include_prefix: "avg" pools the prefix tokens too.
        act_layer: activation of the MLP: its constructor, or one of the names in `layers.ACTIVATIONS`.
        eps: added to the variance in every norm.
        drop_rate, pos_drop_rate, proj_drop_rate: dropout before the head, of the embedding, after projections.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        *,
        grids: Sequence[int] = DEFAULT_GRIDS,
        base_grid: tuple[int, int] | None = None,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        patch_bias: bool = True,
        init_values: float | None = None,
        residual_scale: float = 1.0,
        stem_chans: int | None = None,
        aux_head: bool = False,
        class_token: bool = True,
        reg_tokens: int = 0,
        distilled: bool = False,
        no_embed_class: bool = False,
        pos_factorized: bool = False,
        pos_keep_aspect: bool = False,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        act_layer: str | type[nn.Module] | partial = "gelu",
        eps: float = 1e-6,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.grids = check_grids(grids)
        self.lengths = tuple(g * g for g in self.grids)
        self.base_grid = (self.grids[0], self.grids[0]) if base_grid is None else tuple(base_grid)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_reg_tokens = reg_tokens
        self.has_class_token = class_token
        self.distilled = distilled
        self.distilled_training = False
        self.has_aux_head = aux_head
        self.num_prefix_tokens = int(class_token) + int(distilled) + reg_tokens
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix
        self.grad_checkpointing = False
        self.pretrained_cfg: dict[str, Any] = {}
        self._check_pool(global_pool, fc_norm)
        self.global_pool = global_pool
        if not residual_scale > 0:
            raise ValueError(f"residual_scale: expected a positive divisor, got {residual_scale!r}")
        if init_values and residual_scale != 1:
            raise ValueError(
                f"residual_scale: LayerScale (init_values={init_values}) scales the branches already, got "
                f"{residual_scale}; give one of the two"
            )

        norm = partial(TALLayerNorm, len(self.grids), embed_dim, eps)
        if stem_chans is None:
            self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, self.base_grid, bias=patch_bias)
        else:
            self.patch_embed = ConvStem(patch_size, in_chans, stem_chans, embed_dim, self.base_grid, bias=patch_bias)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if distilled else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.resampling = Resampling(self.base_grid, pos_factorized, pos_keep_aspect)
        n_embedded = self._n_prefix_embedded + self.resampling.n_stored
        self.pos_embed = nn.Parameter(torch.empty(1, n_embedded, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = norm() if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                head_dim or embed_dim // num_heads,
                hidden_dim or 4 * embed_dim,
                len(self.grids),
                make_activation(act_layer),
                eps=eps,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                mlp_bias=mlp_bias,
                init_values=init_values,
                residual_scale=residual_scale,
                proj_drop=proj_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        use_fc_norm = global_pool == "avg" if fc_norm is None else fc_norm
        # fc_norm is stored because reset_classifier may change the pooling that it defaults to.
        self._arguments = arguments | {"grids": self.grids, "base_grid": self.base_grid, "fc_norm": use_fc_norm}
        self.norm = norm() if final_norm and not use_fc_norm else nn.Identity()
        self.fc_norm = norm() if final_norm and use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._linear_head()
        self.head_dist = self._linear_head() if distilled else None
        self.aux_head = self._token_label_head()

        self._positions = PositionTables(self.resampling, [(g, g) for g in self.grids])
        self.init_weights()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments for this architecture as JSON values; `from_config` accepts them.

        Raises:
            ValueError: for an activation that has no name in `layers.ACTIVATIONS`.
        """
        now = {"num_classes": self.num_classes, "global_pool": self.global_pool}
        activation = make_activation(self._arguments["act_layer"])
        if activation_name(activation) is None:
            kind = type(activation).__name__
            raise ValueError(f"act_layer: {kind} has no name that a file could keep; use {', '.join(ACTIVATIONS)}")
        config = self._arguments | now | {"act_layer": activation_name(activation)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ReViT:
        """A model of the architecture that `config` describes, with new weights.

        Raises:
            TypeError, ValueError: for arguments that the constructor does not know or refuses.
        """
        return cls(**config)

    @classmethod
    def unsaid_arguments(cls, config: Mapping[str, Any]) -> list[str]:
        """Arguments that only the subclass has and `config` lacks: the saved model may have had other values."""
        rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = {n for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind not in rest}
        return sorted(named - set(inspect.signature(ReViT.__init__).parameters) - set(config))

    def init_weights(self) -> None:
        """timm's initialisation: truncated normal weights, zero biases. A convolutional stem keeps PyTorch's."""
        for name, parameter in self.named_parameters():
            if STEM_PARAMETER.search(name):
                continue
            if name == "pos_embed" or (name.endswith(".weight") and not NORM_PARAMETER.search(name)):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name in ("cls_token", "dist_token", "reg_token"):
                nn.init.normal_(parameter, std=1e-6)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    @property
    def head_hidden_size(self) -> int:
        """Number of channels that the head reads; the name is timm's."""
        return self.embed_dim * (2 if self.global_pool == "token_avg" else 1)

    def _linear_head(self) -> nn.Module:
        return nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def _token_label_head(self) -> nn.Module | None:
        return self._linear_head() if self.has_aux_head and self.num_classes > 0 else None

    def _check_pool(self, global_pool: str, fc_norm: bool | None) -> None:
        if global_pool not in ("token", "avg", "token_avg", ""):
            raise ValueError(f'global_pool: expected "token", "avg", "token_avg" or "", got {global_pool!r}')
        if global_pool.startswith("token") and not self.has_class_token:
            raise ValueError(f'global_pool: "{global_pool}" needs a class token; use "avg"')
        if global_pool == "token_avg" and fc_norm:
            raise ValueError('global_pool: "token_avg" pools tokens after the final norm; set fc_norm=False')
        if self.distilled and global_pool != "token":
            raise ValueError('global_pool: a distilled model reads its class and distillation tokens; use "token"')
        if self.has_aux_head and (global_pool != "token" or self.distilled):
            raise ValueError(
                'aux_head: its logits are added to those of one class token; use global_pool="token" and no '
                "distillation token, or aux_head=False"
            )

    @classmethod
    def from_timm(cls, vit: nn.Module, grids: Sequence[int] = DEFAULT_GRIDS) -> ReViT:
        """A ReViT with the weights of a timm `VisionTransformer` or `NaFlexVit`, LayerNorms repeated for every length.

        For images of a single grid the result equals that of the timm model at that input size (with
        `dynamic_img_size=True`). For a `NaFlexVit` this is also true of grids that are not square.

        Args:
            vit: ViT, DeiT, distilled DeiT, with LayerScale, register tokens, class-token or average pooling; or a
                `NaFlexVit` with the same, its position embeddings learned (bicubic, antialiased) or factorized.
            grids: configured token grids, strictly decreasing.

        Raises:
            TypeError: if `vit` is neither.
            ValueError: if it uses a feature that ReViT does not have; the message names it.
        """
        from revit_fast.models.from_timm import config_from_timm, weights_from_timm

        model = cls(grids=grids, **config_from_timm(vit))
        parameter = next(vit.parameters())
        # The dtype is set before the weights are loaded: float32 would round those of a float64 model.
        model = model.to(device=parameter.device, dtype=parameter.dtype)
        model.load_state_dict(model.convert_state_dict(weights_from_timm(vit)))
        model.pretrained_cfg = dict(getattr(vit, "pretrained_cfg", None) or {})
        return model.train(vit.training)

    @classmethod
    def from_transformers(cls, vit: nn.Module, grids: Sequence[int] = DEFAULT_GRIDS, *, processor: Any = None) -> ReViT:
        """A ReViT with the weights of a ViT, DeiT or DINOv2 of transformers, its LayerNorms repeated for every length.

        At the grid that the position embeddings are stored for, the results equal those of `vit`: `forward` returns its
        logits (its class token if it has no classifier), `forward_features` its `last_hidden_state`. At other grids
        position embeddings are resampled as in timm, with antialiasing; transformers does this only for DINOv2 with
        registers. A pooler and a mask token are left out.

        Args:
            vit: a model of one of the classes in `models.from_transformers.KINDS`.
            grids: configured token grids, strictly decreasing.
            processor: the model's image processor, or the content of its `preprocessor_config.json`; without it
                `pretrained_cfg` describes DeiT's preprocessing.

        Raises:
            ImportError: if transformers is not installed.
            TypeError: if `vit` is not a model of transformers, or `processor` is something else.
            ValueError: if either uses a feature that is not supported; the message names it.
        """
        from revit_fast.models import from_transformers as source

        config = source.config_from_transformers(vit)
        settings = {} if processor is None else source.settings_from_processor(processor)
        model = cls(grids=grids, **config).to(device=vit.device, dtype=vit.dtype)
        model.load_weights(source.state_dict_from_transformers(vit.state_dict(), config), type(vit).__name__)
        model.pretrained_cfg = settings | {"label_names": source.class_names(vit) if model.num_classes else None}
        return model.train(vit.training)

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts the state dict of a plain ViT to the shapes of this model; that of a ReViT stays unchanged.

        Norm parameters are repeated for every length and position embeddings are resampled to the base grid. A
        token-label head is left out if this model has none.
        """
        converted = {}
        for name, value in state_dict.items():
            if name.startswith("aux_head.") and self.aux_head is None:
                continue
            if NORM_PARAMETER.search(name) and value.dim() == 1:
                value = value.expand(len(self.grids), -1)
            elif name == "pos_embed" and value.dim() == 3 and value.shape[1] != self.pos_embed.shape[1]:
                value = self._resample_checkpoint_positions(value)
            converted[name] = value
        return converted

    def _resample_checkpoint_positions(self, value: Tensor) -> Tensor:
        n_prefix = self._n_prefix_embedded
        side = math.isqrt(max(value.shape[1] - n_prefix, 0))
        if side * side != value.shape[1] - n_prefix or self.resampling.factorized:
            return value  # the caller reports the error
        patches = resample(wide_patches(value, n_prefix), (side, side), self.base_grid).to(value.dtype)
        return torch.cat([value[:, :n_prefix], patches.unsqueeze(0)], dim=1)

    def load_checkpoint(self, path: str | Path) -> None:
        """Loads the weights of a plain ViT or of a ReViT from `.safetensors` or `.pth` (with `weights_only=True`).

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: where names or shapes do not fit; the message lists missing, unexpected and misshapen ones.
        """
        self.load_weights(read_checkpoint(Path(path)), path)

    def load_weights(self, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
        """Loads the state dict of a plain ViT or of a ReViT.

        Args:
            state_dict: state dict of either.
            source: name of the state dict in errors.

        Raises:
            ValueError: where names or shapes do not fit; the message lists missing, unexpected and misshapen ones.
        """
        load_fitting(self, self.convert_state_dict(state_dict), source)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: tokens, position embeddings and every TAL-LN parameter."""
        names = {"pos_embed", "cls_token", "reg_token", "dist_token"}
        return names | {name for name, _ in self.named_parameters() if NORM_PARAMETER.search(name)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the activations of every block in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def set_distilled_training(self, enable: bool = True) -> None:
        """Makes a distilled model return (class logits, distillation logits) while training."""
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, or both heads of a distilled model."""
        return (self.head, self.head_dist) if self.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Sets a new head for `num_classes` classes (0: none), and another pooling if `global_pool` is given."""
        if global_pool is not None:
            self._check_pool(global_pool, isinstance(self.fc_norm, TALLayerNorm))
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = self._linear_head().to(**like).train(self.training)
        if self.distilled:
            self.head_dist = self._linear_head().to(**like).train(self.training)
        if self.has_aux_head:
            self.aux_head = self._token_label_head()
            if self.aux_head is not None:
                self.aux_head.to(**like).train(self.training)

    @property
    def _n_prefix_embedded(self) -> int:
        """Number of prefix tokens that have a row in `pos_embed`."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _prefix(self) -> Tensor:
        """Prefix tokens with their position embeddings, `[n_prefix, C]`."""
        tokens = [t[0] for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        prefix = torch.cat(tokens) if tokens else self.pos_embed.new_empty(0, self.embed_dim)
        return prefix if self.no_embed_class else prefix + self.pos_embed[0, : self.num_prefix_tokens]

    def pack(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> PackedBatch:
        """Any input of the model as a `PackedBatch` of patch rows without padding.

        Raises:
            TypeError, ValueError: for an invalid input; the message names the image and what is wrong with it.
        """
        if isinstance(x, PackedBatch):
            # Padding rows would cost time and, if they hold NaN, reach a weight's gradient.
            return x if torch.compiler.is_compiling() else x.without_padding()
        rows, grids, _ = self._patch_rows(x)
        return PackedBatch.from_rows(rows, [h * w for h, w in grids], grids=grids, lengths=self.lengths)

    def _patch_rows(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> PatchRows:
        """Any input of the model as patch rows; nothing is copied to another device."""
        if isinstance(x, PackedBatch):
            self._check_pack(x)
            return PatchRows(x.data[: sum(x.seqlens)], x.grids, x.normalization)
        if isinstance(x, Tensor):
            if x.dim() != 4:
                raise ValueError(
                    f"x: expected shape [B, {self.in_chans}, H, W], got {tuple(x.shape)}; x[None] for one image"
                )
            self._check_channels(x.shape[1], "x")
            grid = image_grid(x[0] if len(x) else x.new_empty(x.shape[1:]), self.patch_size, "x")
            return PatchRows(patchify(x, self.patch_size), (grid,) * x.shape[0])
        if isinstance(x, Sequence):
            images = PatchRows(*patch_rows(x, self.patch_size))
            self._check_channels(x[0].shape[0], "images[0]")
            return images
        raise TypeError(
            f"x: expected a tensor [B, 3, H, W], a list of tensors or a PackedBatch, got {type(x).__name__}"
        )

    def _check_channels(self, n: int, name: str) -> None:
        if n != self.in_chans:
            raise ValueError(f"{name}: expected {self.in_chans} channels first, got {n}; convert the images")

    def _inputs(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> Inputs:
        if isinstance(x, Tensor) and x.dim() == 4 and torch.compiler.is_compiling():
            return self._uniform_inputs(x)
        batch = self.pack(x)
        self._check_pack(batch)
        if batch.device != self.pos_embed.device:
            raise ValueError(
                f"x: batch is on {batch.device}, model on {self.pos_embed.device}; move one with .to(device)"
            )
        if not torch.compiler.is_compiling():
            self._positions.learn(batch.grids)
        offset = self._positions.offsets(batch.grid_hw)  # -1 for a new grid in compiled code: the op reports it
        layout = batch.layout(self.num_prefix_tokens)
        if batch.lengths != self.lengths:
            layout = layout._replace(length_index=nearest_length(batch.cu_seqlens.diff(), self.lengths))
        table = self._positions.table(self.pos_embed, self._n_prefix_embedded)
        images = self._stemmed(PatchRows(self._finite_rows(batch), batch.grids, batch.normalization))
        return Inputs(images.rows, batch.cu_seqlens, layout, table, offset, images.normalization)

    def _stemmed(self, images: PatchRows) -> PatchRows:
        """The input rows of the embedding: the rows of a convolutional stem's features if there is a stem."""
        if not isinstance(self.patch_embed, ConvStem):
            return images
        rows = images.rows.to(self.pos_embed.device, non_blocking=True)  # an optimised copy takes batches on the CPU
        return PatchRows(self.patch_embed.feature_rows(rows, images.grids, images.normalization), images.grids)

    def _check_pack(self, batch: PackedBatch) -> None:
        if batch.n_prefix:
            raise ValueError("x: this pack holds tokens (n_prefix > 0) already; give patch rows, or call forward_head")
        self._check_rows(batch.data, batch.normalization)
        if batch.grid_hw is None:
            raise ValueError(
                "x: patch counts are not squares and the pack has no grids; give grids=[(rows, columns), ...]"
            )

    def _check_rows(self, rows: Tensor, normalization: Tensor | None) -> None:
        width = self.patch_size**2 * self.in_chans
        if rows.dim() != 2 or rows.shape[1] != width:
            raise ValueError(f"x: expected patch rows [T, {width}], got {tuple(rows.shape)}")
        if rows.dtype == torch.uint8 and normalization is None:
            raise ValueError("x: uint8 rows need a normalization [2, 3] in their pack (resize_patchify gives it)")

    def _finite_rows(self, batch: PackedBatch) -> Tensor:
        """The batch's rows. Compiled code cannot cut off padding, so it zeroes padding if gradients are needed."""
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            return batch.data  # the token ops zero the results of padding
        rows = torch.arange(batch.data.shape[0], device=batch.device).unsqueeze(1)
        return torch.where(rows < batch.cu_seqlens[-1], batch.data, 0)

    def _uniform_inputs(self, x: Tensor) -> Inputs:
        n_prefix = (self.num_prefix_tokens, self._n_prefix_embedded)
        patch_size = self.patch_size
        if isinstance(self.patch_embed, ConvStem):
            x, patch_size = self.patch_embed.features(x), patch_size // 2
        return uniform_inputs(x, self.pos_embed, patch_size, self.resampling, n_prefix, self.lengths)

    def _embed(self, inputs: Inputs) -> Tensor:
        """Tokens `[T, C]` that enter the blocks."""
        # Under autocast the linear layers give 16-bit rows; the residual stream stays in the parameters' precision.
        patches = self.patch_embed(inputs.rows, inputs.normalization).to(self.pos_embed.dtype)
        x = assemble_tokens(patches, self._prefix(), inputs.pos_table, inputs.pos_offset, inputs.cu_seqlens)
        x = self.pos_drop(x)
        return self.norm_pre(x, inputs.layout) if isinstance(self.norm_pre, TALLayerNorm) else x

    def _run_block(self, block: Block, x: Tensor, delta: Tensor | None, layout: Layout, queries: Queries | None = None):
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, delta, layout, queries, use_reentrant=False)
        return block(x, delta, layout, queries)

    def _add_and_norm(self, x: Tensor, delta: Tensor | None, layout: Layout) -> Tensor:
        """The stream x + delta after the final norm."""
        if isinstance(self.norm, TALLayerNorm):
            return self.norm(x, layout) if delta is None else self.norm(delta, layout, residual=x)[0]
        return x if delta is None else x + delta

    def _pooled_tokens(self, layout: Layout) -> Queries:
        """The tokens that "token" pooling reads: class token, and distillation token if there is one."""
        n = 2 if self.distilled else 1
        starts = layout.cu_seqlens[:-1]
        token = torch.arange(n, device=starts.device, dtype=starts.dtype)
        sequences = torch.arange(starts.shape[0] + 1, device=starts.device, dtype=starts.dtype)
        return Queries((starts.unsqueeze(1) + token).flatten(), Layout(n * sequences, layout.length_index, None))

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
        if self.global_pool or not isinstance(x, Tensor):
            return logits
        n_patches = (x.shape[2] // self.patch_size) * (x.shape[3] // self.patch_size)
        return logits.view(x.shape[0], self.num_prefix_tokens + n_patches, logits.shape[1])

    def _trace(self, x: fx.Proxy) -> fx.Proxy:
        """`forward` for images of one size as torch.fx traces it, with `[B, N, C]` between the blocks.

        Blocks, norms and the embedding must be leaves of the trace.
        """
        inputs = self._uniform_inputs(x)
        tokens = self._embed(inputs).view(x.shape[0], -1, self.embed_dim)
        for block in self.blocks:
            tokens = block(tokens, None, inputs.layout)
        rows = pooled = self._add_and_norm(tokens.flatten(0, 1), None, inputs.layout)
        if self.global_pool == "token":
            tokens = rows.view(x.shape[0], -1, self.embed_dim)
            pooled = tokens[:, : 2 if self.distilled else 1].flatten(0, 1)
        else:
            pooled = self.pool(rows, inputs.layout.cu_seqlens)
        logits = self._add_token_labels(self._head(pooled, inputs.layout), rows, inputs.layout)
        return logits if self.global_pool else logits.view(x.shape[0], -1, logits.shape[1])

    def _run(self, inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        """The forward pass on prepared inputs. It runs on the device only; the inputs' shapes determine all shapes."""
        tokens, delta, layout = self._embed(inputs), None, inputs.layout
        reads_few = self.global_pool == "token" and self.aux_head is None
        queries = self._pooled_tokens(layout) if reads_few else None
        for block in self.blocks[:-1]:
            tokens, delta = self._run_block(block, tokens, delta, layout)
        for block in self.blocks[-1:]:
            tokens, delta = self._run_block(block, tokens, delta, layout, queries)
        if queries is None:
            return self._classify(self._add_and_norm(tokens, delta, layout), layout)
        if not self.blocks:
            tokens = tokens.index_select(0, queries.rows)
        return self._head(self._add_and_norm(tokens, delta, queries.layout), layout)

    def _classify(self, tokens: Tensor, layout: Layout, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pools all tokens after the final norm, and classifies."""
        if self.global_pool == "token":
            pooled = tokens.index_select(0, self._pooled_tokens(layout).rows)
        else:
            pooled = self.pool(tokens, layout.cu_seqlens)
        logits = self._head(pooled, layout, pre_logits)
        return logits if pre_logits else self._add_token_labels(logits, tokens, layout)

    def _add_token_labels(self, logits: Tensor, tokens: Tensor, layout: Layout) -> Tensor:
        """The class token's logits, plus those of the token-label head if there is one."""
        if self.aux_head is None:
            return logits
        return logits + 0.5 * sequence_max(self.aux_head(tokens), layout.cu_seqlens, self.num_prefix_tokens)

    def pool(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Pools tokens `[T, C]` to the rows that the head reads; with "token" pooling the last block does it."""
        if not self.global_pool:
            return tokens
        mean = mean_pool(tokens, cu_seqlens, 0 if self.pool_include_prefix else self.num_prefix_tokens)
        if self.global_pool == "avg":
            return mean
        return torch.cat([tokens.index_select(0, cu_seqlens[:-1]), mean], dim=1)

    def _head(self, pooled: Tensor, layout: Layout, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of pooled rows: one per sequence, two for a distilled model, all tokens without pooling."""
        if isinstance(self.fc_norm, TALLayerNorm):
            pooled = self.fc_norm(pooled, rows_apart(pooled, layout) if self.global_pool else layout)
        pooled = self.head_drop(pooled)
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
        if isinstance(x, Tensor):
            return tokens.view(x.shape[0], -1, self.embed_dim)
        return batch.with_tokens(tokens, self.num_prefix_tokens)

    def _normed_tokens(self, batch: PackedBatch) -> Tensor:
        """All tokens `[T, C]` after the final norm."""
        inputs = self._inputs(batch)
        tokens, delta = self._embed(inputs), None
        for block in self.blocks:
            tokens, delta = self._run_block(block, tokens, delta, inputs.layout)
        return self._add_and_norm(tokens, delta, inputs.layout)

    def forward_head(self, x: Tensor | PackedBatch, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pools and classifies the result of `forward_features`; with `pre_logits` it only pools."""
        shape = x.shape[:2] if isinstance(x, Tensor) and not self.global_pool else None
        if isinstance(x, Tensor):
            seqlens = (x.shape[1],) * x.shape[0]
            x = PackedBatch.from_rows(x.flatten(0, 1), seqlens, lengths=self.lengths, n_prefix=self.num_prefix_tokens)
        logits = self._classify(x.data, x.layout(self.num_prefix_tokens), pre_logits)
        return logits if shape is None else logits.view(*shape, logits.shape[1])

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the modules that features after chosen blocks do not need, as timm's feature extraction does.

        Args:
            indices: blocks to keep, with all blocks before them (see `forward_intermediates`).
            prune_norm: also remove the norm after the blocks.
            prune_head: also remove the head, its norm and (except in a distilled model) the pooling.

        Returns:
            The chosen blocks, counted from the first.
        """
        take = sorted(self._block_indices(indices))
        self.blocks = self.blocks[: take[-1] + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.has_aux_head, self.aux_head = False, None
            self.reset_classifier(0, None if self.distilled else "")
        self._arguments |= {
            "depth": len(self.blocks),
            "drop_path_rate": self.blocks[-1].drop_path1.drop_prob,
            "final_norm": any(isinstance(norm, TALLayerNorm) for norm in (self.norm, self.fc_norm)),
            "fc_norm": isinstance(self.fc_norm, TALLayerNorm),
            "aux_head": self.has_aux_head,
        }
        return take

    def forward_intermediates(
        self,
        x: Tensor | Sequence[Tensor] | PackedBatch,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor | PackedBatch, list]:
        """Features after chosen blocks.

        Args:
            x: any input of the model.
            indices: blocks to take (negative from the end), the last n for an int, all for None.
            return_prefix_tokens: pair every feature map with its prefix tokens.
            norm: apply the final norm to the features.
            stop_early: do not run blocks after the last one taken.
            output_fmt: "NCHW" feature maps or "NLC" token rows, prefix tokens left out.
            intermediates_only: return the list alone.

        Returns:
            (`forward_features` result, intermediates), or the intermediates. For an image tensor each is a tensor
            `[B, C, gh, gw]` (or `[B, N, C]`); otherwise a list with a tensor `[C, gh, gw]` (or `[n, C]`) per image.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt: expected "NCHW" or "NLC", got {output_fmt!r}')
        take = self._block_indices(indices)
        batch = self.pack(x)
        inputs = self._inputs(batch)
        tokens, delta = self._embed(inputs), None
        intermediates = []
        for i, block in enumerate(self.blocks[: max(take) + 1] if stop_early else self.blocks):
            tokens, delta = self._run_block(block, tokens, delta, inputs.layout)
            if i in take:
                taken = self._add_and_norm(tokens, delta, inputs.layout) if norm else tokens + delta
                intermediates.append(
                    self._as_maps(taken, batch, isinstance(x, Tensor), output_fmt, return_prefix_tokens)
                )
        if intermediates_only:
            return intermediates
        tokens = self._add_and_norm(tokens, delta, inputs.layout)
        if isinstance(x, Tensor):
            return tokens.view(x.shape[0], -1, self.embed_dim), intermediates
        return batch.with_tokens(tokens, self.num_prefix_tokens), intermediates

    def _block_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            last = depth if indices is None else indices
            wanted = range(depth - last, depth)
        else:
            wanted = [i + depth if i < 0 else i for i in indices]
        if not wanted or any(not 0 <= i < depth for i in wanted):
            raise ValueError(f"indices: expected blocks of a model with {depth}, got {indices!r}")
        return set(wanted)

    def _as_maps(self, tokens: Tensor, batch: PackedBatch, uniform: bool, output_fmt: str, with_prefix: bool):
        n_prefix = self.num_prefix_tokens
        sequences = batch.with_tokens(tokens, n_prefix).split()
        prefixes = [s[:n_prefix] for s in sequences]
        maps = [s[n_prefix:] for s in sequences]
        if output_fmt == "NCHW":
            maps = [m.t().reshape(-1, h, w) for m, (h, w) in zip(maps, batch.grids, strict=True)]
        if uniform:
            maps, prefixes = torch.stack(maps), torch.stack(prefixes)
        return (maps, prefixes) if with_prefix else maps
