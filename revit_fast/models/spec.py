"""A Vision Transformer as data. All that reads an architecture reads it here: modules, files, engines, multiply-adds.

Blocks may differ from one another in every field. `keywords` has the way from and to keyword arguments and files.
"""

from __future__ import annotations

from dataclasses import dataclass

from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.layers.mlp import Activation
from revit_fast.layers.norm import NORMS
from revit_fast.layers.rope import Rope

POOLS = ("token", "avg", "token_avg", "map", "")
INTERPOLATIONS = ("bicubic", "bilinear")
GELU = Activation("gelu")


@dataclass(frozen=True)
class Norm:
    """A norm with parameters of its own for every token length.

    Attributes:
        eps: added to the variance, or to the mean square.
        kind: "layer" (LayerNorm) or "rms" (RMSNorm, arXiv 1910.07467: no mean is subtracted, and there is no bias).
    """

    eps: float = 1e-6
    kind: str = "layer"

    def __post_init__(self) -> None:
        if self.kind not in NORMS:
            raise ValueError(f'norm_layer: expected "layer" or "rms", got {self.kind!r}')


@dataclass(frozen=True)
class Attention:
    """Multi-head self-attention within an image.

    Attributes:
        heads: number of heads.
        head_dim: channels of a head.
        qkv_bias: whether queries, keys and values have a bias; "qv": queries and values alone (BEiT, EVA).
        out_bias: whether the output projection has one.
        scale: factor of the scores; None for `head_dim ** -0.5`.
        kv_heads: heads of keys and values, each for `heads / kv_heads` of queries (arXiv 2305.13245); None: `heads`.
        qk_norm: norm of every query and key over its channels (arXiv 2302.05442), one for all lengths; None for none.
        out_norm: norm before the output projection; None for none.
        gate: whether a sigmoid of a linear layer multiplies the result before the output projection.
    """

    heads: int
    head_dim: int
    qkv_bias: bool | str = True
    out_bias: bool = True
    scale: float | None = None
    kv_heads: int | None = None
    qk_norm: Norm | None = None
    out_norm: Norm | None = None
    gate: bool = False

    def __post_init__(self) -> None:
        if self.qkv_bias not in (True, False, "qv"):
            raise ValueError(f'qkv_bias: expected True, False or "qv", got {self.qkv_bias!r}')
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads: expected a divisor of {self.heads} heads, got {self.kv_heads}")

    @property
    def n_kv(self) -> int:
        """Number of heads of keys and values."""
        return self.kv_heads or self.heads


@dataclass(frozen=True)
class Mlp:
    """Two linear layers with an activation between them.

    Attributes:
        hidden: channels between the layers.
        act: the activation.
        bias: whether the layers have a bias.
        gated: the first layer has twice as many channels, and the activation of the first half multiplies the second
            half (GLU variants, arXiv 2002.05202; SwiGLU with SiLU).
        norm: norm of the hidden channels (NormFormer, arXiv 2110.09456); None for none.
    """

    hidden: int
    act: Activation = GELU
    bias: bool = True
    gated: bool = False
    norm: Norm | None = None


@dataclass(frozen=True)
class LayerScale:
    """A learned factor per channel of a branch (CaiT, arXiv 2103.17239).

    Attributes:
        init: initial value.
    """

    init: float


@dataclass(frozen=True)
class Divide:
    """A constant that a branch is divided by (LV-ViT, arXiv 2104.10858: `skip_lam`).

    Attributes:
        by: the divisor, positive.
    """

    by: float

    def __post_init__(self) -> None:
        if not self.by > 0:
            raise ValueError(f"residual_scale: expected a positive divisor, got {self.by!r}")


@dataclass(frozen=True)
class Block:
    """A pre-norm transformer block.

    Attributes:
        attn: attention, after `norm1`.
        mlp: MLP, after `norm2`.
        norm1: norm before attention.
        norm2: norm before the MLP.
        scale: of both branches before they are added; None for none.
        scales_mlp: whether it is that of the MLP too, and not of attention alone.
        drop: dropout after the projection and in the MLP, in training.
        drop_path: stochastic depth of both branches, in training.
    """

    attn: Attention
    mlp: Mlp
    norm1: Norm = Norm()
    norm2: Norm = Norm()
    scale: LayerScale | Divide | None = None
    scales_mlp: bool = True
    drop: float = 0.0
    drop_path: float = 0.0


@dataclass(frozen=True)
class Positions:
    """Position embeddings, learned for one grid and resampled to others.

    Attributes:
        base_grid: (rows, columns) of the grid that they are stored for.
        factorized: stored for rows and columns apart, see `layers.positions.Resampling`.
        keep_aspect: both sides are resampled alike, see `layers.positions.Resampling`.
        interpolation: "bicubic" or "bilinear".
        antialias: whether a smaller grid is resampled with a wider filter.
        align_corners: whether the centres of the corner patches stay, and not the corners of the grid.
        drop: dropout after they are added, in training.
    """

    base_grid: tuple[int, int]
    factorized: bool = False
    keep_aspect: bool = False
    interpolation: str = "bicubic"
    antialias: bool = True
    align_corners: bool = False
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f'pos_interpolation: expected "bicubic" or "bilinear", got {self.interpolation!r}')


@dataclass(frozen=True)
class Prefix:
    """Tokens before the patches.

    Attributes:
        cls: whether there is a class token.
        dist: whether there is DeiT's distillation token, with a second head.
        registers: number of register tokens.
        positioned: whether they carry position embeddings.
    """

    cls: bool = True
    dist: bool = False
    registers: int = 0
    positioned: bool = True

    @property
    def count(self) -> int:
        """Number of tokens."""
        return int(self.cls) + int(self.dist) + self.registers


@dataclass(frozen=True)
class Embed:
    """From images to the tokens that enter the blocks.

    Attributes:
        patch_size: side P of a patch in pixels.
        in_chans: image channels.
        positions: position embeddings that are added to the patches; None for none.
        prefix: tokens before the patches.
        bias: whether the linear embedding has a bias.
        stem: channels of LV-ViT's convolutional stem, see `layers.conv_stem`; None: patches are embedded directly.
        norm: norm of the tokens; None for none.
        rope: rotary position embedding in every block; None for none.
        patch_norm: norm of the embedded patches, before position embeddings are added (AIMv2); None for none.
    """

    patch_size: int
    in_chans: int
    positions: Positions | None
    prefix: Prefix = Prefix()
    bias: bool = True
    stem: int | None = None
    norm: Norm | None = None
    rope: Rope | None = None
    patch_norm: Norm | None = None


@dataclass(frozen=True)
class AttentionPool:
    """Pooling by attention: a learned query reads the tokens of an image (SigLIP's "map" head, arXiv 2106.04560).

    An MLP's result is added to what the query has read.

    Attributes:
        heads: number of heads; the channels of the model are divided among them.
        mlp: the MLP.
        norm: norm before the MLP.
        bias: whether queries, keys and values have a bias.
    """

    heads: int
    mlp: Mlp
    norm: Norm | None = Norm()
    bias: bool = True


@dataclass(frozen=True)
class Head:
    """From the tokens after the last block to logits.

    Attributes:
        classes: number of classes; 0 for no head.
        pool: "token" (class token), "avg" (mean of the patch tokens), "token_avg" (both side by side), "map" (by
            attention) or "" (none).
        norm: the final norm; None for none.
        norm_pooled: the norm stands after pooling instead of before.
        pool_prefix: "avg" and "map" pool the prefix tokens too.
        token_labels: LV-ViT's second head: half the largest of its logits over the patch tokens is added.
        drop: dropout before the head, in training.
        attention: how "map" pools.
    """

    classes: int
    pool: str = "token"
    norm: Norm | None = Norm()
    norm_pooled: bool = False
    pool_prefix: bool = False
    token_labels: bool = False
    drop: float = 0.0
    attention: AttentionPool | None = None


@dataclass(frozen=True)
class ViTSpec:
    """A Resizable ViT.

    Attributes:
        dim: channels C.
        embed: from images to tokens.
        blocks: one entry for every block.
        head: from tokens to logits.
        grids: configured square token grids, strictly decreasing; index 0 is the longest.
    """

    dim: int
    embed: Embed
    blocks: tuple[Block, ...]
    head: Head
    grids: tuple[int, ...] = DEFAULT_GRIDS

    def __post_init__(self) -> None:
        prefix, head = self.embed.prefix, self.head
        if head.pool not in POOLS:
            raise ValueError(f'global_pool: expected "token", "avg", "token_avg", "map" or "", got {head.pool!r}')
        if head.pool == "map" and head.attention is None:
            raise ValueError('global_pool: "map" needs an attention pool; only models that were made with one have it')
        if self.embed.rope is not None:
            self._check_rope(self.embed.rope)
        if head.pool.startswith("token") and not prefix.cls:
            raise ValueError(f'global_pool: "{head.pool}" needs a class token; use "avg"')
        if head.pool == "token_avg" and head.norm is not None and head.norm_pooled:
            raise ValueError('global_pool: "token_avg" pools tokens after the final norm; set fc_norm=False')
        if prefix.dist and head.pool != "token":
            raise ValueError('global_pool: a distilled model reads its class and distillation tokens; use "token"')
        if head.token_labels and (head.pool != "token" or prefix.dist):
            raise ValueError(
                'aux_head: its logits are added to those of one class token; use global_pool="token" and no '
                "distillation token, or aux_head=False"
            )

    def _check_rope(self, rope: Rope) -> None:
        shapes = {(block.attn.heads, block.attn.n_kv, block.attn.head_dim) for block in self.blocks}
        dims = {head_dim for _, _, head_dim in shapes}
        step = 2 if rope.kind == "interleaved" else 4
        if len(dims) > 1 or any(dim % step for dim in dims):
            raise ValueError(f"rope: expected heads of one size, a multiple of {step} channels, got {sorted(dims)}")
        if rope.kind == "mixed" and (len(shapes) > 1 or any(heads != n_kv for heads, n_kv, _ in shapes)):
            raise ValueError("rope: mixed frequencies need blocks of equally many heads, and as many of keys")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of every configured grid."""
        return tuple(g * g for g in self.grids)
