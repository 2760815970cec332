"""Models made for images of different sizes: timm's NaFlexViT, padded, and vit-pytorch's NaViT, packed."""

from __future__ import annotations

from functools import lru_cache

import torch
from timm.models import VisionTransformer
from torch import nn

from bench.model_work import LONGEST, N_SETS, Case
from bench.peers.common import Peer, Unsuited, fastest


@lru_cache(maxsize=1)
def naflexvit(vit: VisionTransformer) -> nn.Module:
    """timm's NaFlexVit with the weights of `vit`."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg, checkpoint_filter_fn

    side = vit.patch_embed.grid_size
    config = NaFlexVitCfg(
        patch_size=vit.patch_embed.patch_size,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=vit.blocks[0].attn.num_heads,
        mlp_ratio=vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
        class_token=True,
        global_pool="token",
        fc_norm=False,
        pos_embed_grid_size=side,
        use_key_only_attn_mask=True,  # a mask of [B, 1, 1, N], not [B, 1, N, N]
    )
    model = NaFlexVit(num_classes=vit.num_classes, img_size=vit.patch_embed.img_size, cfg=config).eval()
    # The filter adds the class token's position embedding to the class token in place: it must not be that of `vit`.
    weights = {name: value.clone() for name, value in vit.state_dict().items()}
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    return model.requires_grad_(False)


def require_plain(vit: nn.Module) -> None:
    """Refuses a model whose architecture a packed peer does not have."""
    if not isinstance(vit, VisionTransformer):
        raise Unsuited(f"has no counterpart of {type(vit).__name__} with the same arithmetic")


def naflexvit_padded(case: Case) -> Peer:
    """One call: patches of every image padded to the longest one's, with a mask."""
    require_plain(case.vit)
    model, p = naflexvit(case.vit), case.patch
    n_longest = max(h * w for h, w in case.grids)
    batches = []
    for images in case.sets:
        patches = torch.zeros(len(images), n_longest, p * p * 3)
        coord = torch.zeros(len(images), n_longest, 2, dtype=torch.long)
        valid = torch.zeros(len(images), n_longest, dtype=torch.bool)
        for b, (image, (h, w)) in enumerate(zip(images, case.grids, strict=True)):
            patches[b, : h * w] = image.view(3, h, p, w, p).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
            coord[b, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
            valid[b, : h * w] = True
        batches.append({"patches": patches, "patch_coord": coord, "patch_valid": valid})
    run = torch.inference_mode()(lambda i: model(batches[i % N_SETS]))
    seqlens = [n_longest + case.shape.n_prefix] * len(case.grids)
    return Peer(run, range(len(case.grids)), case.shape.flops(seqlens))


@lru_cache(maxsize=1)
def navit(vit: VisionTransformer) -> nn.Module:
    """vit-pytorch's NaViT of the same sizes; its weights are random, as its architecture has other parameters."""
    from vit_pytorch.na_vit import NaViT

    attention = vit.blocks[0].attn
    model = NaViT(
        image_size=LONGEST * vit.patch_embed.patch_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        num_classes=vit.num_classes,
        dim=vit.embed_dim,
        depth=len(vit.blocks),
        heads=attention.num_heads,
        dim_head=attention.head_dim,
        mlp_dim=vit.blocks[0].mlp.fc1.out_features,
    )
    return model.eval().requires_grad_(False)


def navit_packed(case: Case) -> Peer:
    """One call: images packed into sequences of bounded length, with a mask that parts the images."""
    require_plain(case.vit)
    from vit_pytorch.na_vit import group_images_by_max_seq_len

    model, p = navit(case.vit), case.patch
    variants = {
        f"sequences up to {bound}": torch.inference_mode()(
            lambda i, bound=bound: model(case.sets[i % N_SETS], group_images=True, group_max_seq_len=bound)
        )
        for bound in (256, 512, 2048)
    }
    name, run = fastest(variants)
    packs = group_images_by_max_seq_len(case.sets[0], patch_size=p, max_seq_len=int(name.split()[-1]))
    n_longest = max(sum(image[0].numel() for image in pack) // (p * p) for pack in packs)
    flops = case.shape.flops([n_longest + case.shape.n_prefix] * len(packs))
    return Peer(run, None, flops, name)
