"""The plain definition of a ViT by its spec, for one image: dense tensors, PyTorch's own functions, no packing."""

import numpy as np
import torch
import torch.nn.functional as F

from revit_fast.layers.positions import resample
from revit_fast.models.spec import Divide, LayerScale


def turned(x, rope, frequencies, grid, n_prefix):
    """Queries or keys `[H, N, D]` of an image, each pair of channels turned by its angle, token by token."""
    out, (rows, columns), f32 = x.clone(), grid, np.float32
    for patch in range(rows * columns):
        place = []
        for axis, at in enumerate((patch // columns, patch % columns)):
            side = {"separate": grid[axis], "min": min(grid), "max": max(grid)}[rope.normalize]
            if rope.coords == "centered":
                place.append(f32(2) * ((f32(at) + f32(0.5) + f32(rope.offset)) / f32(side)) - f32(1))
            elif rope.reference is None:
                place.append(f32(at) + f32(rope.offset))
            else:
                place.append((f32(at) + f32(rope.offset)) / f32(grid[axis]) * f32(rope.reference[axis]))
        first, second = place if rope.order == "ij" else place[::-1]
        angle = float(first) * frequencies[0] + float(second) * frequencies[1]  # [H or 1, D / 2]
        token = x[:, n_prefix + patch]
        if rope.half:
            real, imaginary = token.chunk(2, dim=-1)
        else:
            real, imaginary = token[:, ::2], token[:, 1::2]
        real, imaginary = real.to(angle.dtype), imaginary.to(angle.dtype)  # there are no 16-bit complex numbers
        pair = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        parts = (pair.real, pair.imag)
        out[:, n_prefix + patch] = torch.cat(parts, -1) if rope.half else torch.stack(parts, -1).flatten(1)
    return out


def frequencies_of(rope, head_dim, learned, like):
    """Frequencies `[2, H or 1, D / 2]` of a block."""
    wide = torch.promote_types(like.dtype, torch.float32)
    if rope.kind == "mixed":
        return learned.to(wide)
    n = head_dim // rope.step
    found = np.zeros((2, head_dim // 2))
    for j in range(n):
        power = float(rope.temperature ** torch.tensor(j / n, dtype=torch.float32))
        f = 2 * np.pi / power if rope.coords == "centered" else float(np.float32(1) / np.float32(power))
        if rope.kind == "axial":
            found[0, j] = found[1, n + j] = f
        elif j % 3 and j < 3 * rope.sections[j % 3 - 1]:
            found[j % 3 - 1, j] = f
    return torch.from_numpy(found).unsqueeze(1).to(wide)


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

    def norm(x, name, norm, index=index):
        weight = state[f"{name}.weight"][index]
        if norm.kind == "rms":
            return F.rms_norm(x, weight.shape, weight, norm.eps)
        return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"][index], norm.eps)

    def mlp_of(x, name, mlp):
        h, act = linear(x, f"{name}.fc1"), mlp.act.build()
        h = act(h[:, : mlp.hidden]) * h[:, mlp.hidden :] if mlp.gated else act(h)
        return linear(h if mlp.norm is None else norm(h, f"{name}.norm", mlp.norm), f"{name}.fc2")

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    weight, bias = state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias")
    patches = F.conv2d(image[None], weight, bias, stride=p).flatten(2)[0].t()
    if spec.embed.patch_norm is not None:
        patches = norm(patches, "patch_embed.norm", spec.embed.patch_norm)
    at, n_positioned = spec.embed.positions, 0
    if at is not None:
        n_positioned, table = prefix.count if prefix.positioned else 0, state["pos_embed"][0]
        positions = table[n_positioned:]
        positions = positions.to(torch.promote_types(positions.dtype, torch.float32))  # resampling has no 16-bit kernel
        sampling = (at.interpolation, at.antialias, at.align_corners)
        patches = patches + resample(positions, at.base_grid, grid, *sampling).to(patches.dtype)
    tokens = [state[f"{name}_token"][0] for name in ("cls", "dist", "reg") if f"{name}_token" in state]
    if tokens:
        front = torch.cat(tokens)
        patches = torch.cat([front + table[:n_positioned] if n_positioned else front, patches])
    x = patches
    if spec.embed.norm is not None:
        x = norm(x, "norm_pre", spec.embed.norm)
    for i, block in enumerate(spec.blocks):
        name, attn = f"blocks.{i}", block.attn

        def scaled(branch, ls, block=block, name=name):
            if ls == "ls2" and not block.scales_mlp:
                return branch
            if isinstance(block.scale, LayerScale):
                return branch * state[f"{name}.{ls}.gamma"]
            return branch / block.scale.by if isinstance(block.scale, Divide) else branch

        rows = norm(x, f"{name}.norm1", block.norm1)
        h = linear(rows, f"{name}.attn.qkv")
        widths = [attn.heads * attn.head_dim, *[attn.n_kv * attn.head_dim] * 2]
        if attn.qkv_bias == "qv":
            q_bias, v_bias = state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"]
            h = h + torch.cat([q_bias, torch.zeros_like(v_bias), v_bias])
        q, k, v = (t.unflatten(1, (-1, attn.head_dim)).transpose(0, 1) for t in h.split(widths, dim=1))
        if attn.qk_norm is not None:
            q, k = (norm(t, f"{name}.attn.{n}_norm", attn.qk_norm, ...) for n, t in (("q", q), ("k", k)))
        rope = spec.embed.rope
        if rope is not None:
            learned = state["rope.freqs"][:, i] if rope.kind == "mixed" else None
            frequencies = frequencies_of(rope, attn.head_dim, learned, x)
            q, k = (turned(t, rope, frequencies, grid, prefix.count) for t in (q, k))
        k, v = (t.repeat_interleave(attn.heads // attn.n_kv, dim=0) for t in (k, v))
        scale = attn.head_dim**-0.5 if attn.scale is None else attn.scale
        attention = ((q @ k.transpose(1, 2)) * scale).softmax(dim=-1)
        if maps is not None:
            maps.append(attention)
        h = (attention @ v).transpose(0, 1).flatten(1)
        h = h if attn.out_norm is None else norm(h, f"{name}.attn.norm", attn.out_norm)
        h = h * linear(rows, f"{name}.attn.gate").sigmoid() if attn.gate else h
        x = x + scaled(linear(h, f"{name}.attn.proj"), "ls1")
        x = x + scaled(mlp_of(norm(x, f"{name}.norm2", block.norm2), f"{name}.mlp", block.mlp), "ls2")
    head = spec.head
    if head.norm is not None and not head.norm_pooled:
        x = norm(x, "norm", head.norm)
    tokens = x
    mean = x[0 if head.pool_prefix else prefix.count :].mean(dim=0)
    if head.pool == "map":
        read = x[0 if head.pool_prefix else prefix.count :]
        k, v = linear(read, "attn_pool.kv").unflatten(1, (2, head.attention.heads, -1)).permute(1, 2, 0, 3)
        q = linear(state["attn_pool.latent"][0], "attn_pool.q").unflatten(1, (head.attention.heads, -1)).transpose(0, 1)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        mean = linear((scores @ v).transpose(0, 1).flatten(1), "attn_pool.proj")
        y = mean if head.attention.norm is None else norm(mean, "attn_pool.norm", head.attention.norm)
        mean = (mean + mlp_of(y, "attn_pool.mlp", head.attention.mlp))[0]
    pooled = {"": x, "token": x[0], "avg": mean, "map": mean, "token_avg": torch.cat([x[0], mean])}[head.pool]
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
