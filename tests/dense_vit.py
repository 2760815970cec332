"""The plain definition of a ViT by its spec, for one image: dense tensors, PyTorch's own functions, no packing."""

import torch
import torch.nn.functional as F

from revit_fast.layers.positions import resample
from revit_fast.models.spec import Divide, LayerScale


def logits(spec, state, image, maps=None):
    """Logits `[classes]` (of every token `[N, classes]` without pooling) of an image `[C, H, W]`.

    Args:
        spec: the architecture, without a convolutional stem and with positions stored as one learned table.
        state: the state dict of a `ReViT` of it.
        image: sides are multiples of the patch size.
        maps: a list that gets the attention `[heads, N, N]` of every block.
    """
    p, prefix = spec.embed.patch_size, spec.embed.prefix
    grid = (image.shape[1] // p, image.shape[2] // p)
    n = grid[0] * grid[1]
    index = min(range(len(spec.lengths)), key=lambda i: abs(spec.lengths[i] - n))

    def norm(x, name, norm):
        weight = state[f"{name}.weight"][index]
        if norm.kind == "rms":
            return F.rms_norm(x, (spec.dim,), weight, norm.eps)
        return F.layer_norm(x, (spec.dim,), weight, state[f"{name}.bias"][index], norm.eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    weight, bias = state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias")
    patches = F.conv2d(image[None], weight, bias, stride=p).flatten(2)[0].t()
    n_positioned = prefix.count if prefix.positioned else 0
    table = state["pos_embed"][0]
    base = spec.embed.positions.base_grid
    positions = table[n_positioned:]
    positions = positions.to(torch.promote_types(positions.dtype, torch.float32))  # resampling has no 16-bit kernel
    patches = patches + resample(positions, base, grid).to(patches.dtype)
    tokens = [state[f"{name}_token"][0] for name in ("cls", "dist", "reg") if f"{name}_token" in state]
    if tokens:
        front = torch.cat(tokens)
        patches = torch.cat([front + table[:n_positioned] if prefix.positioned else front, patches])
    x = patches
    if spec.embed.norm is not None:
        x = norm(x, "norm_pre", spec.embed.norm)
    for i, block in enumerate(spec.blocks):
        name, attn = f"blocks.{i}", block.attn

        def scaled(branch, ls, block=block, name=name):
            if isinstance(block.scale, LayerScale):
                return branch * state[f"{name}.{ls}.gamma"]
            return branch / block.scale.by if isinstance(block.scale, Divide) else branch

        h = linear(norm(x, f"{name}.norm1", block.norm1), f"{name}.attn.qkv")
        q, k, v = h.view(-1, 3, attn.heads, attn.head_dim).permute(1, 2, 0, 3)
        scale = attn.head_dim**-0.5 if attn.scale is None else attn.scale
        attention = ((q @ k.transpose(1, 2)) * scale).softmax(dim=-1)
        if maps is not None:
            maps.append(attention)
        h = attention @ v
        x = x + scaled(linear(h.transpose(0, 1).flatten(1), f"{name}.attn.proj"), "ls1")
        h = block.mlp.act.build()(linear(norm(x, f"{name}.norm2", block.norm2), f"{name}.mlp.fc1"))
        x = x + scaled(linear(h, f"{name}.mlp.fc2"), "ls2")
    head = spec.head
    if head.norm is not None and not head.norm_pooled:
        x = norm(x, "norm", head.norm)
    tokens = x
    mean = x[0 if head.pool_prefix else prefix.count :].mean(dim=0)
    pooled = {"": x, "token": x[0], "avg": mean, "token_avg": torch.cat([x[0], mean])}[head.pool]
    if head.norm is not None and head.norm_pooled:
        pooled = norm(pooled, "fc_norm", head.norm)
    if not head.classes:
        return (pooled + x[1]) / 2 if prefix.dist else pooled
    out = linear(pooled, "head")
    if prefix.dist:
        out = (out + linear(x[1], "head_dist")) / 2
    if head.token_labels:
        out = out + 0.5 * linear(tokens[prefix.count :], "aux_head").amax(dim=0)
    return out
