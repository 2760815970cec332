"""TimeSformer on clips of several lengths: every grid and frame count of a batch in one packed forward pass.

The model is that of "Is Space-Time Attention All You Need for Video Understanding?" (arXiv 2102.05095). Parameters have
the names of its authors' code. Norms have a leading length axis (TAL-LN, arXiv 2307.02092). Results are those of
Hugging Face's `TimesformerModel`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast.grids import check_grids
from revit_fast.layers.attention import Attention, Queries
from revit_fast.layers.mlp import Mlp, make_activation
from revit_fast.layers.norm import TALLayerNorm, add_and_norm
from revit_fast.layers.patch_embed import PatchEmbed
from revit_fast.layers.positions import PositionTables, Resampling
from revit_fast.models.inputs import is_uniform
from revit_fast.models.loading import LoadsWeights
from revit_fast.models.weights import state_dict_of
from revit_fast.ops._modes import NotScriptable, as_saved
from revit_fast.ops.tokens import assemble_tokens, mean_pool
from revit_fast.packing import Layout
from revit_fast.packing.tensors import check_pixels, check_plain
from revit_fast.video.clips import ClipLayout, PackedClips
from revit_fast.video.transformers_import import config_from_transformers, names_from_transformers

ATTENTION_TYPES = ("divided_space_time", "joint_space_time")

SETTINGS = {"mean": (0.45,) * 3, "std": (0.225,) * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
"""How the authors prepare frames, under timm's names."""

NORM_PARAMETER = re.compile(r"(^|\.)(temporal_norm1|norm1|norm2|norm)\.(weight|bias)$")


class SpaceTimeBlock(nn.Module):
    """Temporal attention, spatial attention and MLP, each after a norm; joint attention has no temporal part.

    The residual stream is passed as a pair (x, delta) and is their sum, as in `layers.Block`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        n_lengths: int,
        act: nn.Module,
        *,
        divided: bool = True,
        eps: float = 1e-6,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.divided = divided
        if divided:
            self.temporal_norm1 = TALLayerNorm(n_lengths, dim, eps)
            self.temporal_attn = Attention(dim, num_heads, dim // num_heads, qkv_bias)
            self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = TALLayerNorm(n_lengths, dim, eps)
        self.attn = Attention(dim, num_heads, dim // num_heads, qkv_bias)
        self.norm2 = TALLayerNorm(n_lengths, dim, eps)
        self.mlp = Mlp(dim, hidden, act)

    def forward(
        self, x: Tensor, delta: Tensor | None, layout: ClipLayout, pooled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Maps the stream x + delta `[T, C]` (x alone if delta is None) to the next such pair.

        With `pooled` it returns the pair of the class tokens alone, `[B, C]`, and computes only what they need.
        """
        if self.divided:
            h, x = add_and_norm(self.temporal_norm1, x, delta, layout.stream)
            delta = self._over_time(h, layout.temporal)
            delta[layout.n_patch_rows :] = 0  # temporal attention does not change class tokens
        h, x = add_and_norm(self.norm1, x, delta, layout.stream)
        h = h.index_select(0, layout.to_space)
        rows = layout.stream
        if pooled:
            copies = self.attn(h, layout.spatial, Queries(layout.class_rows, layout.class_queries))
            x, delta, rows = x[layout.n_patch_rows :], mean_pool(copies, layout.copies), layout.classes
        else:
            attended = self.attn(h, layout.spatial)
            delta = attended.index_select(0, layout.to_stream)
            copies = attended.index_select(0, layout.class_rows)
            delta[layout.n_patch_rows :] = mean_pool(copies, layout.copies)
        h, x = self.norm2(delta, rows, residual=x)
        return x, self.mlp(h)

    def _over_time(self, h: Tensor, layout: Layout) -> Tensor:
        """Temporal attention and the linear layer after it."""
        return self.temporal_fc(self.temporal_attn(h, layout))


class TimeSformer(NotScriptable, LoadsWeights, nn.Module):
    """A Vision Transformer for clips with attention over time and space, at several lengths.

    Takes `Tensor [B, F, 3, H, W]`, a list of tensors `[F_i, 3, h_i, w_i]` of mixed sizes and frame counts, or
    `PackedClips`. Every side is a multiple of the patch size. Each clip uses the LayerNorm parameters of the configured
    length nearest to the patches of a frame, ties to the longer. For another grid, position embeddings are resampled as
    in timm (bicubic, antialiased; Hugging Face takes the nearest). For another frame count, time embeddings are
    resampled by the nearest, as in Hugging Face.

    Args:
        grids: configured square token grids of a frame, strictly decreasing; index 0 is the longest. Default: one
            square grid with the longer side of `base_grid`.
        base_grid: (rows, columns) of the grid that `pos_embed` is stored for.
        num_frames: frames that `time_embed` is stored for.
        patch_size: P in pixels.
        in_chans: channels of a frame.
        num_classes: classes of the head; 0 for none.
        embed_dim: channels C.
        depth: number of blocks.
        num_heads: attention heads.
        hidden_dim: width of the MLP; default 4 * embed_dim.
        qkv_bias: whether query, key and value have a bias.
        attention_type: "divided_space_time" (over a patch's frames, then over a frame's patches) or
            "joint_space_time" (over all patches of a clip).
        act_layer: activation of the MLP, see `layers.make_activation`.
        eps: epsilon of every norm.

    Raises:
        ValueError: if grids do not decrease, heads do not divide the channels, or the attention type is unknown.
    """

    norm_parameter = NORM_PARAMETER
    _n_prefix_embedded = 1

    def __init__(
        self,
        *,
        grids: Sequence[int] | None = None,
        base_grid: tuple[int, int] = (14, 14),
        num_frames: int = 8,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 400,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden_dim: int | None = None,
        qkv_bias: bool = True,
        attention_type: str = "divided_space_time",
        act_layer: str = "gelu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_attention_type(attention_type)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}")
        self.base_grid = tuple(base_grid)
        self.grids = check_grids((max(self.base_grid),) if grids is None else grids)
        self.lengths = tuple(g * g for g in self.grids)
        self.num_frames, self.patch_size, self.in_chans = num_frames, patch_size, in_chans
        self.num_classes, self.embed_dim, self.num_heads = num_classes, embed_dim, num_heads
        self.num_prefix_tokens = 1
        self.attention_type = attention_type
        self.joint = attention_type == "joint_space_time"
        self.pretrained_cfg: dict[str, Any] = dict(SETTINGS)

        norm = partial(TALLayerNorm, len(self.grids), embed_dim, eps)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, self.base_grid)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.base_grid[0] * self.base_grid[1], embed_dim))
        self.time_embed = nn.Parameter(torch.zeros(1, num_frames, embed_dim))
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(
                embed_dim,
                num_heads,
                hidden_dim or 4 * embed_dim,
                len(self.grids),
                make_activation(act_layer),
                divided=not self.joint,
                eps=eps,
                qkv_bias=qkv_bias,
            )
            for _ in range(depth)
        )
        self.norm = norm()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self._positions = PositionTables(Resampling(self.base_grid), [(g, g) for g in self.grids])
        self.init_weights()

    def init_weights(self) -> None:
        """The authors' initialisation: truncated normal weights; zero biases and time embeddings.

        Temporal projections after the first block are zero too, so that a model begins as one without time.
        """
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "pos_embed") or (name.endswith(".weight") and not NORM_PARAMETER.search(name)):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        for block in self.blocks[1:] if not self.joint else ():
            nn.init.zeros_(block.temporal_fc.weight)

    @classmethod
    def from_transformers(cls, model: nn.Module, grids: Sequence[int] | None = None) -> TimeSformer:
        """A TimeSformer with the weights of a Hugging Face model; its LayerNorms are repeated for every length.

        At the model's own grid and frame count the result equals the Hugging Face model's.

        Args:
            model: a `TimesformerModel` (the result has no head) or `TimesformerForVideoClassification`.
            grids: configured token grids, strictly decreasing; default: the model's own grid alone.

        Raises:
            TypeError: if `model` is neither.
            ValueError: if it uses a feature that is not supported; the message names it.
        """
        try:
            from transformers import TimesformerForVideoClassification, TimesformerModel
        except ImportError:
            raise ImportError("model: from_transformers needs transformers: pip install transformers") from None
        if type(model) not in (TimesformerModel, TimesformerForVideoClassification):
            raise TypeError(
                f"model: expected a TimesformerModel or TimesformerForVideoClassification, got {type(model).__name__}"
            )
        ours = cls.from_state_dict(model.state_dict(), model.config.to_dict(), grids)
        parameter = next(model.parameters())
        return ours.to(device=parameter.device, dtype=parameter.dtype).train(model.training)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], grids: Sequence[int] | None = None
    ) -> TimeSformer:
        """A TimeSformer with weights under Hugging Face's or our own names, in their dtype and in evaluation mode.

        Args:
            state_dict: weights of a `TimesformerModel`, a `TimesformerForVideoClassification` or a `TimeSformer`.
            config: configuration of the Hugging Face model as a mapping (`config.to_dict()`, or the content of
                `config.json`); missing entries have Hugging Face's defaults.
            grids: configured token grids, strictly decreasing; default: the model's own grid alone.

        Raises:
            ValueError: if a feature is not supported, or the weights do not fit the configuration.
        """
        state_dict = names_from_transformers(state_dict_of(state_dict, "state_dict"))
        head = state_dict.get("head.weight")
        n_classes = 0 if head is None else head.shape[0]
        dtype = next((value.dtype for value in state_dict.values() if value.is_floating_point()), None)
        with as_saved():
            model = cls(grids=grids, num_classes=n_classes, **config_from_transformers(config)).to(dtype=dtype)
            model.load_weights(state_dict, "state_dict", grids=config.get("grids"))
        return model.eval()

    def convert_state_dict(self, state_dict: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """See `LoadsWeights`; names may be Hugging Face's or our own."""
        return super().convert_state_dict(names_from_transformers(state_dict), **options)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: the class token, embeddings and every TAL-LN parameter."""
        names = {"pos_embed", "cls_token", "time_embed"}
        return names | {name for name, _ in self.named_parameters() if NORM_PARAMETER.search(name)}

    @property
    def input_device(self) -> torch.device:
        """Device on which the model expects its batches."""
        return self.pos_embed.device

    def pack(self, x: Tensor | Sequence[Tensor] | PackedClips) -> PackedClips:
        """Converts any input of the model to `PackedClips`.

        Raises:
            TypeError, ValueError: if the input does not fit; the message names the clip and what is wrong with it.
        """
        if isinstance(x, PackedClips):
            return x
        if is_uniform(x) and x.dim() != 5:
            raise ValueError(
                f"x: expected shape [B, F, {self.in_chans}, H, W], got {tuple(x.shape)}; x[None] for one clip"
            )
        if not isinstance(x, (Tensor, Sequence)):
            raise TypeError(
                f"x: expected a tensor [B, F, 3, H, W], a list of tensors or PackedClips, got {type(x).__name__}"
            )
        if is_uniform(x):
            check_plain("x", x)
        return PackedClips.from_list(x, self.patch_size, lengths=self.lengths)

    def forward(self, x: Tensor | Sequence[Tensor] | PackedClips) -> Tensor:
        """Logits `[B, num_classes]` in the given order; without a head the class tokens after the norm, `[B, C]`.

        The last block computes only what the class tokens need.
        """
        clips = self.pack(x)
        layout = self._layout(clips)
        return self._logits(self._class_tokens(self._embed(clips, layout), layout))

    def attention_maps(self, x: Tensor | Sequence[Tensor] | PackedClips, block: int = -1) -> Any:
        """Refused: tokens of a clip attend over time and over space in turn, so there is no map of all tokens."""
        raise NotImplementedError(
            "attention_maps: a ReViT has them; a TimeSformer attends over time and space in turn, see its blocks"
        )

    class_attention = attention_maps

    def forward_features(self, x: Tensor | Sequence[Tensor] | PackedClips) -> Tensor | list[Tensor]:
        """All tokens after the norm: the class token, then patch after patch, F frames each (Hugging Face's order).

        Returns:
            `[B, 1 + n * F, C]` for a tensor, else a list with `[1 + n_i * F_i, C]` for every clip.
        """
        clips = self.pack(x)
        layout = self._layout(clips)
        rows = self._tokens(self._embed(clips, layout), layout)
        n_rows = [h * w * n for (h, w), n in zip(clips.grids, clips.n_frames, strict=True)]
        patches, classes = rows[: layout.n_patch_rows].split(n_rows), rows[layout.n_patch_rows :].split(1)
        tokens = [torch.cat(pair) for pair in zip(classes, patches, strict=True)]
        return torch.stack(tokens) if is_uniform(x) else tokens

    def _layout(self, clips: PackedClips) -> ClipLayout:
        frames, width = clips.frames, self.patch_size**2 * self.in_chans
        if frames.data.dim() != 2 or frames.data.shape[1] != width:
            raise ValueError(f"x: expected patch rows [T, {width}], got {tuple(frames.data.shape)}")
        if frames.data.dtype == torch.uint8 and frames.normalization is None:
            raise ValueError("x: uint8 rows need a normalization [2, 3] in their pack (resize_patchify gives it)")
        check_pixels("x", frames.data.dtype, raw=True)
        if clips.device != self.pos_embed.device:
            raise ValueError(
                f"x: clips are on {clips.device}, model on {self.pos_embed.device}; move one with .to(device)"
            )
        return clips.layout(self.lengths, self.joint)

    def _embed(self, clips: PackedClips, layout: ClipLayout) -> Tensor:
        """The stream `[T, C]` that enters the blocks."""
        frames = clips.frames.without_padding()
        known = self._positions.learn(frames.grids)
        table, offset = self._positions.table(known, self.pos_embed, 1), known.offsets(frames.grid_hw)
        patches = self.patch_embed(frames.data, frames.normalization).to(self.pos_embed.dtype)
        placed = assemble_tokens(patches, self.pos_embed.new_empty(0, self.embed_dim), table, offset, frames.cu_seqlens)
        time = self._time_embedding(clips.n_frames, layout)
        classes = self.cls_token[0] + self.pos_embed[0, :1]
        return torch.cat([placed.index_select(0, layout.from_frames) + time, classes.expand(len(clips), -1)])

    def _time_embedding(self, n_frames: Sequence[int], layout: ClipLayout) -> Tensor:
        """Time embeddings of the stream's patch rows, `[Tp, C]`; resampled by the nearest for another frame count."""
        counts = sorted(set(n_frames))
        tables = [self.time_embed.transpose(1, 2)] * len(counts)
        tables = [
            t if n == self.num_frames else F.interpolate(t, size=n, mode="nearest")
            for t, n in zip(tables, counts, strict=True)
        ]
        first = {n: sum(counts[:i]) for i, n in enumerate(counts)}
        starts = torch.tensor([first[n] for n in n_frames], dtype=torch.int64, device=layout.time.device)
        rows_of_clip = layout.stream.cu_seqlens[: len(n_frames) + 1].diff()
        rows = layout.time + starts.repeat_interleave(rows_of_clip, output_size=layout.n_patch_rows)
        return torch.cat(tables, dim=2)[0].t().index_select(0, rows)

    def _logits(self, classes: Tensor) -> Tensor:
        return self.head(classes)

    def _class_tokens(self, x: Tensor, layout: ClipLayout) -> Tensor:
        """Class tokens `[B, C]` after blocks and norm."""
        delta = None
        for block in self.blocks[:-1]:
            x, delta = block(x, delta, layout)
        for block in self.blocks[-1:]:
            x, delta = block(x, delta, layout, pooled=True)
        return add_and_norm(self.norm, x if len(self.blocks) else x[layout.n_patch_rows :], delta, layout.classes)[0]

    def _tokens(self, x: Tensor, layout: ClipLayout) -> Tensor:
        """The stream `[T, C]` after blocks and norm."""
        delta = None
        for block in self.blocks:
            x, delta = block(x, delta, layout)
        return add_and_norm(self.norm, x, delta, layout.stream)[0]


def check_attention_type(attention_type: str) -> None:
    """Raises a ValueError for an unknown attention type; the message says what to use instead."""
    if attention_type == "space_only":
        raise ValueError(
            "attention_type: 'space_only' has no time: it is a ViT on every frame by itself; give its frames as images "
            "to a ReViT and average the logits"
        )
    if attention_type not in ATTENTION_TYPES:
        raise ValueError(f"attention_type: expected one of {', '.join(ATTENTION_TYPES)}, got {attention_type!r}")
