"""ReViT models under timm's names: importing this module registers them with timm's model registry.

    import timm
    import revit_fast.timm_models

    model = timm.create_model("revit_small_patch16_224", num_classes=10, drop_path_rate=0.1)

The models are `revit_fast.ReViT` with the architectures and data settings of timm's ViT, distilled DeiT, DINOv2,
DINOv3, EVA-02 and SigLIP, and of LV-ViT, which timm does not have. timm's builder makes them, so timm's features work
with them: optimizer groups, feature extraction (`features_only=True`, also `feature_cls="fx"`), checkpoints, averages.
There are no pretrained weights; a checkpoint of the plain ViT can serve as a start. `torch.jit.script` is not
supported; `torch.compile` is.

If timm itself has been reloaded, `importlib.reload` of this module registers the models again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revit_fast.grids import scaled_grids
from revit_fast.layers.attention import AttentionPool
from revit_fast.layers.block import Block
from revit_fast.layers.conv_stem import ConvStem
from revit_fast.layers.norm import NORMS
from revit_fast.layers.patch_embed import PatchEmbed
from revit_fast.layers.rope import RotaryEmbedding
from revit_fast.models.from_timm import config_from_timm
from revit_fast.models.lvvit import ARCHITECTURES, CROP_PCT, MLP_RATIO
from revit_fast.models.timm_api import NORM_PARAMETER
from revit_fast.models.vit import ReViT

try:
    import timm
except ImportError:
    raise ImportError('revit_fast.timm_models needs timm: pip install "revit-fast[timm]"') from None
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import FeatureGraphNet
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_filter_fn
from timm.models.vision_transformer import checkpoint_filter_fn

__all__: list[str] = []  # register_model adds the entry points

for _kind in (AttentionPool, Block, ConvStem, PatchEmbed, RotaryEmbedding, *NORMS.values()):
    register_notrace_module(_kind)

WIDTHS: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
GRIDS = {224: (14, 10, 7), 256: (16, 12, 8), 384: (24, 17, 12), 518: (37, 26, 18)}
"""Token grids of the models by their image size in pixels; all have about 1, 1/2 and 1/4 of the tokens."""

COUNTERPARTS = {
    **{
        f"revit_{size}_patch16_dinov3": f"vit_{size}_patch16_dinov3"
        for size in ("small", "small_plus", "base", "large", "huge_plus", "7b")
    },
    **{f"revit_{size}_patch14_eva02": f"eva02_{size}_patch14_224" for size in ("tiny", "small", "base", "large")},
    "revit_base_patch16_siglip": "vit_base_patch16_siglip_224",
    "revit_large_patch16_siglip": "vit_large_patch16_siglip_256",
    "revit_so400m_patch14_siglip": "vit_so400m_patch14_siglip_224",
    "revit_so400m_patch16_siglip": "vit_so400m_patch16_siglip_256",
}
"""Models that are read from timm's, by the names of both. timm's have one for every image size, ours take any."""

NEUTRAL: dict[str, tuple] = {
    "attn_drop_rate": (0,),
    "patch_drop_rate": (0,),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "pos_embed": ("learn",),
    "dynamic_img_pad": (False,),
    "dynamic_img_size": (True, False),
    "strict_img_size": (True, False),
    "weight_init": ("", "skip"),
    "fix_init": (False,),
    "use_naflex": (False,),
}
"""Arguments of timm's `VisionTransformer` that ReViT does not have, and their values that change nothing."""


def make_revit(
    native_px: int,
    *,
    img_size: int | Sequence[int] | None = None,
    grids: Sequence[int] | None = None,
    patch_size: int | Sequence[int] = 16,
    embed_dim: int = 768,
    mlp_ratio: float = 4.0,
    pre_norm: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> ReViT:
    """A ReViT from the arguments of timm's `VisionTransformer`.

    Args:
        native_px: image size of the architecture, a key of `GRIDS`.
        img_size: side or (height, width) in pixels of the images that position embeddings are stored for; by default
            `native_px`.
        grids: configured token grids; by default those of `native_px`, scaled to the grid of `img_size`.
        patch_size: side of the patches in pixels.
        embed_dim: channels C.
        mlp_ratio: width of the MLP divided by `embed_dim`.
        pre_norm: whether there is a norm between embedding and blocks; the embedding then has no bias.
        device: device to create the model on.
        dtype: dtype of the parameters.
        kwargs: arguments of `ReViT`.

    Raises:
        ValueError: for a size that is not a multiple of the patch size, or for an option that ReViT does not have.
        TypeError: for an argument that is unknown.
    """
    for name, values in NEUTRAL.items():
        if kwargs.pop(name, values[0]) not in values:
            raise ValueError(f"{name}: not supported by ReViT; leave it at {values[0]!r}")
    patch_size = _square(patch_size)
    base_grid = _grid(native_px if img_size is None else img_size, patch_size)
    options = {
        "grids": scaled_grids(GRIDS[native_px], base_grid) if grids is None else grids,
        "base_grid": base_grid,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "hidden_dim": int(embed_dim * mlp_ratio),
        "pre_norm": pre_norm,
        "patch_bias": not pre_norm,
    }
    with contextlib.nullcontext() if device is None else torch.device(device):
        return _for_timm(ReViT(**options | kwargs), dtype)


def make_like(
    counterpart: str,
    *,
    grids: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> ReViT:
    """A ReViT with new weights and the architecture of one of timm's models.

    Args:
        counterpart: name of timm's model.
        grids: configured token grids; by default about 1, 1/2 and 1/4 of the tokens of `img_size`.
        device: device to create the model on.
        dtype: dtype of the parameters.
        kwargs: arguments of timm's model, such as `img_size`, `embed_dim`, `num_classes` or `drop_path_rate`.

    Raises:
        ValueError: for what ReViT does not have; the message names it.
        TypeError: for an argument that is unknown.
    """
    config = config_from_timm(_meta_model(counterpart, **kwargs))
    side = max(config["base_grid"])
    of_side = next((g for g in GRIDS.values() if g[0] == side), None) or scaled_grids(GRIDS[224], config["base_grid"])
    with contextlib.nullcontext() if device is None else torch.device(device):
        return _for_timm(ReViT(grids=of_side if grids is None else grids, **config), dtype)


def _meta_model(name: str, **kwargs: Any) -> nn.Module:
    """timm's model without values."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def _for_timm(model: ReViT, dtype: torch.dtype | None) -> ReViT:
    """The model, ready for timm's builder."""
    # timm writes state dicts unchanged, and safetensors accepts only contiguous tensors.
    model.patch_embed.proj.weight.data = model.patch_embed.proj.weight.data.contiguous()
    model.register_load_state_dict_pre_hook(adapt_state_dict)
    return model.to(dtype=dtype)


def _square(patch_size: int | Sequence[int]) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) != 1:
        raise ValueError(f"patch_size: expected square patches, got {tuple(patch_size)}")
    return sides.pop()


def _grid(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"img_size: expected positive multiples of the patch size {patch_size}, got {height}x{width}; "
            f"nearest: {max(1, round(height / patch_size)) * patch_size}x"
            f"{max(1, round(width / patch_size)) * patch_size}"
        )
    return height // patch_size, width // patch_size


def adapt_state_dict(model: ReViT, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Lets `load_state_dict` accept a plain ViT's weights, other base grids and other numbers of classes.

    This is a pre-hook because timm calls only `load_state_dict` for `checkpoint_path`. Norm parameters are repeated for
    every length and position embeddings are resampled. A head for other classes is not loaded, with a warning.
    """
    inner = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    adapted = model.convert_state_dict(inner)
    own = model.state_dict()
    for head in ("head", "head_dist"):
        names = [name for name in (f"{head}.weight", f"{head}.bias") if name in inner]
        if names and any(name not in own or own[name].shape != inner[name].shape for name in names):
            warnings.warn(
                f"{prefix}{head}: the checkpoint's {tuple(inner[names[0]].shape)} is for other classes than the "
                f"model's {model.num_classes}; it is not loaded",
                stacklevel=2,
            )
            for name in names:
                del adapted[name]
                adapted |= {name: own[name]} if name in own else {}
    for name in inner.keys() - adapted.keys():
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in adapted.items()})


def filter_state_dict(
    state_dict: dict[str, Tensor], model: ReViT, make_timms: Callable[[], nn.Module] | None = None
) -> dict[str, Tensor]:
    """Converts the weights that `pretrained=True` reads from a given file to the shapes of the model.

    Accepts a ReViT's weights and all that timm's ViTs accept, including original files of DeiT-III, DINOv2, DINOv3 and
    EVA-02 and other patch sizes.

    Args:
        state_dict: the weights.
        model: the model.
        make_timms: makes timm's counterpart of the model, whose parameters may have other names; None if they have not.
    """
    if any(isinstance(v, Tensor) and v.dim() == 2 and NORM_PARAMETER.search(name) for name, v in state_dict.items()):
        return model.convert_state_dict(state_dict)  # a ReViT's: timm might misread a grid that is not square
    timms = model if make_timms is None else make_timms()
    if isinstance(timms, Eva):
        return model.convert_state_dict(eva_filter_fn(state_dict, timms))
    return model.convert_state_dict(checkpoint_filter_fn(state_dict, timms, adapt_layer_scale=True))


def _create(variant: str, arguments: dict[str, Any], pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The model `variant`, or its feature extractor, made by timm's builder."""
    arguments = arguments | kwargs
    extractor = arguments.get("feature_cls", "getter")
    if extractor not in ("getter", "fx", FeatureGetterNet, FeatureGraphNet):
        raise ValueError(
            f'feature_cls: expected "getter" or "fx", got {extractor!r}; between the blocks of a ReViT a stream is '
            "a pair of packed tensors, which the others would misread"
        )
    make, filter_fn = None, filter_state_dict
    if variant in COUNTERPARTS:
        make = partial(make_like, COUNTERPARTS[variant])
        own = ("feature_cls", "out_indices", "features_only", "grids", "device", "dtype")
        of_timm = {n: v for n, v in arguments.items() if n not in own and not n.startswith("pretrained")}
        filter_fn = partial(filter_fn, make_timms=partial(_meta_model, COUNTERPARTS[variant], **of_timm))
    return build_model_with_cfg(
        make or partial(make_revit, arguments.pop("native_px")),
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )


def _cfg(px: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, px, px),
        "pool_size": None,
        "crop_pct": 0.9 if px == 224 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "Make A Long Image Short: Adaptive Token Length for Vision Transformers",
        "paper_ids": "arXiv:2307.02092",
        **kwargs,
    }


def _variants() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments and default cfg of every model by name."""
    inception = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
    registers = {"reg_tokens": 4, "no_embed_class": True}
    variants = {}
    for size, widths in WIDTHS.items():
        for px in (224, 384):
            arguments = widths | {"patch_size": 16, "native_px": px}
            variants[f"revit_{size}_patch16_{px}"] = arguments, _cfg(px, **inception)
            if size != "large" and (px == 224 or size == "base"):
                cfg = _cfg(px, classifier=("head", "head_dist"))
                variants[f"revit_{size}_distilled_patch16_{px}"] = arguments | {"distilled": True}, cfg
        if size != "tiny":
            arguments = widths | {"patch_size": 14, "native_px": 518, "init_values": 1e-5}
            # As in timm: DINOv2 is trained without labels, so there is no head unless num_classes is given.
            variants[f"revit_{size}_patch14_dinov2"] = arguments, _cfg(518, num_classes=0)
            variants[f"revit_{size}_patch14_reg4_dinov2"] = arguments | registers, _cfg(518, num_classes=0)
    for size in ("s", "m", "l"):
        arguments = ARCHITECTURES[size] | {"mlp_ratio": MLP_RATIO, "patch_size": 16, "native_px": 224}
        cfg = _cfg(224, crop_pct=CROP_PCT[size], first_conv="patch_embed.conv1")
        variants[f"revit_lvvit_{size}"] = arguments, cfg
    for name, counterpart in COUNTERPARTS.items():
        cfg = timm.get_pretrained_cfg(counterpart)
        kept = ("input_size", "num_classes", "crop_pct", "interpolation", "mean", "std", "classifier")
        variants[name] = {}, _cfg(cfg.input_size[1], **{key: getattr(cfg, key) for key in kept})
    return variants


VARIANTS = _variants()
default_cfgs = generate_default_cfgs({name: cfg for name, (_, cfg) in VARIANTS.items()})


def _entry_point(name: str, arguments: dict[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, arguments, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    made = f"`make_like` {COUNTERPARTS[name]}" if name in COUNTERPARTS else f"`make_revit` with {arguments}"
    create.__doc__ = f"{name}: {made} and timm's builder options."
    return create


with warnings.catch_warnings():
    for _variant, (_arguments, _) in VARIANTS.items():
        # When this module is reloaded, it replaces only its own models.
        if timm.models.is_model_in_modules(_variant, ["timm_models"]):
            warnings.filterwarnings("ignore", message=f"Overwriting {_variant} in registry")
        globals()[_variant] = register_model(_entry_point(_variant, _arguments))
