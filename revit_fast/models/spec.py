"""A Vision Transformer as data. All that reads an architecture reads it here: modules, files, engines, multiply-adds.

Blocks may differ from one another in every field. `keywords` has the way from and to keyword arguments and files.
"""

from __future__ import annotations

from dataclasses import dataclass

from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.layers.mlp import Activation
from revit_fast.layers.norm import NORMS

POOLS = ("token", "avg", "token_avg", "")
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
        qkv_bias: whether queries, keys and values have a bias.
        out_bias: whether the output projection has one.
        scale: factor of the scores; None for `head_dim ** -0.5`.
    """

    heads: int
    head_dim: int
    qkv_bias: bool = True
    out_bias: bool = True
    scale: float | None = None


@dataclass(frozen=True)
class Mlp:
    """Two linear layers with an activation between them.

    Attributes:
        hidden: channels between the layers.
        act: the activation.
        bias: whether the layers have a bias.
    """

    hidden: int
    act: Activation = GELU
    bias: bool = True


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
        drop: dropout after the projection and in the MLP, in training.
        drop_path: stochastic depth of both branches, in training.
    """

    attn: Attention
    mlp: Mlp
    norm1: Norm = Norm()
    norm2: Norm = Norm()
    scale: LayerScale | Divide | None = None
    drop: float = 0.0
    drop_path: float = 0.0


@dataclass(frozen=True)
class Positions:
    """Position embeddings, learned for one grid and resampled to others.

    Attributes:
        base_grid: (rows, columns) of the grid that they are stored for.
        factorized: stored for rows and columns apart, see `layers.positions.Resampling`.
        keep_aspect: both sides are resampled alike, see `layers.positions.Resampling`.
        drop: dropout after they are added, in training.
    """

    base_grid: tuple[int, int]
    factorized: bool = False
    keep_aspect: bool = False
    drop: float = 0.0


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
        positions: position embeddings.
        prefix: tokens before the patches.
        bias: whether the linear embedding has a bias.
        stem: channels of LV-ViT's convolutional stem, see `layers.conv_stem`; None: patches are embedded directly.
        norm: norm of the tokens; None for none.
    """

    patch_size: int
    in_chans: int
    positions: Positions
    prefix: Prefix = Prefix()
    bias: bool = True
    stem: int | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Head:
    """From the tokens after the last block to logits.

    Attributes:
        classes: number of classes; 0 for no head.
        pool: "token" (class token), "avg" (mean of the patch tokens), "token_avg" (both side by side) or "" (none).
        norm: the final norm; None for none.
        norm_pooled: the norm stands after pooling instead of before.
        pool_prefix: "avg" pools the prefix tokens too.
        token_labels: LV-ViT's second head: half the largest of its logits over the patch tokens is added.
        drop: dropout before the head, in training.
    """

    classes: int
    pool: str = "token"
    norm: Norm | None = Norm()
    norm_pooled: bool = False
    pool_prefix: bool = False
    token_labels: bool = False
    drop: float = 0.0


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
            raise ValueError(f'global_pool: expected "token", "avg", "token_avg" or "", got {head.pool!r}')
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

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of every configured grid."""
        return tuple(g * g for g in self.grids)
