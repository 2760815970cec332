"""vit_forward, the fused forward pass of a packed ViT, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_as_accurate, cu_seqlens_of, examples, fewer_if_emulated, full, only_on, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from revit_fast import ops, reference
from revit_fast.ops import _library
from revit_fast.ops.linear import (
    ACTIVATIONS,
    PACKED_DTYPES,
    cpu_multiplies_bf16,
    pack_weight,
    round_rows,
    unpacked,
)
from revit_fast.ops.vit import NO_NORM, NORMS, PARTS, BlockWeights, TokenNorm, ViTWeights, pack_parts

NARROW_PRODUCTS = "dtype"
pytestmark = only_on("cpu", reason="a CPU op")

N_LENGTHS = 3

EPS = 1e-6


def multiplies(dtype):
    """Whether products with such weights are of bfloat16, whose rounding is far above that of the sums."""
    return dtype == torch.bfloat16 and cpu_multiplies_bf16()


def luck(dtype, truth):
    """A term of the error rule: among a few values the largest error is a matter of luck. Values are of order 10."""
    return 2**-7 * max(1.0, truth.abs().max().item()) if multiplies(dtype) and truth.numel() else 2e-5


class Net:
    """Random weights of a small ViT, plain for the reference and packed for the op.

    All blocks have the same shape, or each has the arguments in its entry of `blocks` (see `block`).

    Weights are rounded to `dtype` first: how well bfloat16 holds them is not the op's matter. With int8 the truth has
    the blocks' rounded weights, and rounds the rows that meet them by the same rule.
    """

    def __init__(
        self,
        *,
        channels=24,
        n_heads=3,
        head_dim=8,
        hidden=40,
        depth=2,
        patch_values=12,
        n_prefix=1,
        activation="gelu",
        pre_norm=False,
        final_norm=True,
        rms=False,
        outer_eps=(EPS, EPS),
        patch_norm=None,
        rope=None,
        blocks=None,
        dtype=torch.float32,
        seed=0,
    ):
        self.seed = 1000 * seed
        self.dtype = dtype
        self.outer_dtype = torch.float32 if dtype == torch.int8 else dtype
        self.embed = self.linear(channels, patch_values)
        self.norm_pre = self.norm(channels, outer_eps[0], rms) if pre_norm else reference.NO_NORM
        self.final = self.norm(channels, outer_eps[1], rms) if final_norm else reference.NO_NORM
        self.patch_norm = self.maybe_norm(channels, patch_norm)
        same = {"n_heads": n_heads, "head_dim": head_dim, "hidden": hidden, "activation": activation, "rms": (rms, rms)}
        self.blocks = [self.block(channels, **arguments) for arguments in blocks or [same] * depth]
        self.prefix, self.table, self.rope = self.draw(n_prefix, channels), self.draw(300, channels), None
        if rope is not None:
            n_tables, n_of_heads, width = rope
            angle = self.draw(n_tables, 300, n_of_heads, width // 2, scale=2.0)
            self.rope = torch.stack([angle.cos(), angle.sin()], dim=3)

    def block(
        self, channels, *, n_heads, head_dim, hidden, activation, eps=(EPS, EPS), scale=None, rms=(False, False),
        qk_norm=None, out_norm=None, mlp_norm=None, gated_attention=False, gated_mlp=False,
    ):  # fmt: skip
        """`qk_norm`, `out_norm` and `mlp_norm` are None or (eps, rms)."""
        width = n_heads * head_dim
        return reference.BlockWeights(
            self.norm(channels, eps[0], rms[0]),
            self.linear((3 + gated_attention) * width, channels),
            self.linear(channels, width),
            self.norm(channels, eps[1], rms[1]),
            self.linear((1 + gated_mlp) * hidden, channels),
            self.linear(channels, hidden),
            n_heads,
            activation,
            scale,
            self.maybe_norm(head_dim, qk_norm, 1),
            self.maybe_norm(head_dim, qk_norm, 1),
            self.maybe_norm(width, out_norm),
            self.maybe_norm(hidden, mlp_norm),
            gated_attention,
            gated_mlp,
        )

    def draw(self, *shape, scale=1.0):
        self.seed += 1
        return randn(*shape, seed=self.seed, scale=scale)

    def linear(self, n_out, depth):
        return self.draw(n_out, depth, scale=depth**-0.5).to(self.outer_dtype).float(), self.draw(n_out)

    def norm(self, channels, eps, rms=False, n_lengths=N_LENGTHS):
        weight, bias = 1 + 0.3 * self.draw(n_lengths, channels), 0.3 * self.draw(n_lengths, channels)
        return weight, torch.empty(0) if rms else bias, eps

    def maybe_norm(self, channels, norm, n_lengths=N_LENGTHS):
        return reference.NO_NORM if norm is None else self.norm(channels, *norm, n_lengths)

    def packed(self):
        def norm(n):
            return TokenNorm(*n) if n[0].numel() else NO_NORM

        def block(b):
            n_parts = {"qkv": 3 + b.gated_attention, "fc1": 1 + b.gated_mlp}
            packed = {
                name: norm(value) if name in NORMS else pack_parts(n_parts.get(name, 1), *value, self.dtype)
                for name, value in zip(b._fields, b, strict=True)
                if name in PARTS
            }
            others = {name: value for name, value in zip(b._fields, b, strict=True) if name not in PARTS}
            return BlockWeights(**packed, **others, head_dim=b.proj[0].shape[1] // b.n_heads)

        return ViTWeights(
            pack_weight(*self.embed, self.outer_dtype),
            norm(self.norm_pre),
            norm(self.final),
            [block(b) for b in self.blocks],
            self.prefix,
            N_LENGTHS,
            norm(self.patch_norm),
        )

    def rows(self, seqlens, seed=7):
        return randn(sum(seqlens), self.embed[0].shape[1], seed=seed)

    def run(self, seqlens, rows, n_pooled, index=None, offset=None):
        index = self.index(seqlens, index, offset)
        return ops.vit_forward(rows, cu_seqlens_of(seqlens), *index, self.table, self.packed(), n_pooled, self.rope)

    def arguments(self, seqlens, weights):
        """The op's arguments before the descriptor."""
        index = self.index(seqlens)
        return (self.rows(seqlens), cu_seqlens_of(seqlens), *index, self.table, self.prefix, weights.tensors)

    def truth(self, seqlens, rows, n_pooled, dtype=torch.float64, index=None, offset=None):
        def to(value):
            """Tensors of `value`, a tensor or a tuple, in `dtype`."""
            if isinstance(value, tuple):
                return tuple(map(to, value))
            return value.to(dtype) if isinstance(value, torch.Tensor) else value

        def rounded(name, value):
            if self.dtype != torch.int8 or name not in ("qkv", "proj", "fc1", "fc2"):
                return to(value)
            return unpacked(*pack_weight(*value, self.dtype), dtype)

        blocks = [reference.BlockWeights(*map(rounded, block._fields, block)) for block in self.blocks]
        return reference.vit_forward(
            to(rows), cu_seqlens_of(seqlens), *self.index(seqlens, index, offset), to(self.table), to(self.prefix),
            to(self.embed), to(self.norm_pre), to(self.final), blocks, n_pooled=n_pooled,
            patch_norm=to(self.patch_norm), rope=to(self.rope),
            **self.rounding(dtype),
        )  # fmt: skip

    def rounding(self, dtype):
        """The op's rounding of factors, for the reference; the float64 truth does not round to bfloat16."""
        rounding = {"round_rows": round_rows} if self.dtype == torch.int8 else {}
        if self.dtype != torch.float32 and cpu_multiplies_bf16() and dtype != torch.float64:
            places = ("round_factors",) if self.dtype == torch.int8 else ("round_rows", "round_factors")
            rounding |= dict.fromkeys(places, lambda factor: factor.bfloat16().to(factor.dtype))
        return rounding

    @staticmethod
    def index(seqlens, index=None, offset=None):
        order = torch.arange(len(seqlens), dtype=torch.int32)
        return order * 2 % N_LENGTHS if index is None else index, order * 3 % 7 if offset is None else offset

    def check(self, seqlens, n_pooled, what=""):
        rows = self.rows(seqlens)
        ours, same = self.run(seqlens, rows, n_pooled), self.truth(seqlens, rows, n_pooled, torch.float32)
        truth = self.truth(seqlens, rows, n_pooled)
        if self.dtype == torch.int8:
            return assert_rounds_alike(ours, same, truth, what)
        assert_as_accurate(ours, same, truth, what)

    def check_pooled(self, seqlens, n_pooled, what=""):
        """Pooled tokens alone have the same bits as among all tokens."""
        rows = self.rows(seqlens)
        tokens = self.run(seqlens, rows, 0).split([n + self.prefix.shape[0] for n in seqlens])
        assert torch.equal(self.run(seqlens, rows, n_pooled), torch.cat([t[:n_pooled] for t in tokens])), what


def assert_rounds_alike(ours, same, truth, what):
    """The error rule on the median, where rows are rounded to integers.

    In float32 a value beside the middle of two integers may go to the other one than in float64, by luck alone: the
    largest error is that of a few such steps, in ours as in torch's, and attention hands 1e-5 of it on to other tokens.
    Rounding itself makes a difference of 1e-2.
    """
    got, torch_error = ((x.double() - truth).abs() for x in (ours, same))
    assert torch.isfinite(ours).all(), what
    assert got.median() <= 2 * torch_error.median() + 3e-5, f"{what}: {got.median():.3e}, {torch_error.median():.3e}"
    assert got.max() <= 1e-2 * truth.abs().max(), f"{what}: max error {got.max():.3e}"


MIX = (5, 0, 49, 1, 100, 17, 196, 2)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 0},
        {"depth": 1, "activation": "relu"},
        {"depth": 3, "activation": "silu", "n_prefix": 5},
        {"depth": 1, "activation": "quick_gelu"},
        {"pre_norm": True, "final_norm": False, "activation": "gelu_tanh"},
        {"pre_norm": True, "rms": True},
        {"channels": 40, "n_heads": 5, "head_dim": 7, "hidden": 33, "patch_values": 75},
        {"channels": 7, "n_heads": 1, "head_dim": 1, "hidden": 1, "patch_values": 1},
        {"channels": 64, "n_heads": 1, "head_dim": 64, "hidden": 600, "patch_values": 588},
        {"channels": 300, "n_heads": 4, "head_dim": 75, "hidden": 31, "depth": 1},
    ],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()) or "plain",
)
def test_matches_reference(isa, options, dtype):
    net = Net(dtype=dtype, **options)
    net.check(MIX, 0)
    net.check_pooled(MIX, 1)


# Widths 35, 16, 192 and 8: narrower and wider than the block before, whole panels and not.
MIXED_BLOCKS = (
    {"n_heads": 5, "head_dim": 7, "hidden": 33, "activation": "gelu", "eps": (1e-6, 1e-3)},
    {"n_heads": 1, "head_dim": 16, "hidden": 300, "activation": "quick_gelu", "eps": (0.1, 1e-5), "scale": 1.0},
    {"n_heads": 3, "head_dim": 64, "hidden": 1, "activation": "relu", "eps": (1e-12, 2.0), "rms": (True, False)},
    {"n_heads": 8, "head_dim": 1, "hidden": 96, "activation": "none", "eps": (0.5, 0.5), "scale": -0.3},
)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), full((3, 2, 1, 0)), (2, 0), full((1,))], ids=str)
def test_blocks_that_differ(isa, order, dtype):
    """Batches of fewer than 144 rows a thread are shared by columns; larger ones are cut into tiles."""
    net = Net(
        channels=40, pre_norm=True, outer_eps=(0.3, 1e-4), blocks=[MIXED_BLOCKS[i] for i in order], n_prefix=2,
        dtype=dtype,
    )  # fmt: skip
    for seqlens in ((60, 0, 49, 17, 2), (290, 17, 3)):
        net.check(seqlens, 0, str(seqlens))
        net.check_pooled(seqlens, 2, str(seqlens))


# On one thread. Few rows go layer by layer, from 144 on in tiles. A step of int8 moves a whole image: they are short.
BY_LAYERS_AND_TILES = [(30, 0, 17, 2), (9, 0, 3) * 11]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FIELDS = {
    "qk_norm": {"qk_norm": (1e-3, False)},
    "qk_norm of RMS": {"qk_norm": (0.1, True)},
    "out_norm": {"out_norm": (0.1, False)},
    "out_norm of RMS": {"out_norm": (1e-3, True)},
    "mlp_norm": {"mlp_norm": (0.1, False)},
    "mlp_norm of RMS": {"mlp_norm": (1e-3, True)},
    "gated_attention": {"gated_attention": True},
    "gated_mlp": {"gated_mlp": True},
}
EVERY_FIELD = {name: value for field in FIELDS.values() for name, value in field.items()}
FIELD_SIZES = [(3, 8, 40), (2, 20, 300), (1, 6, 1), (2, 64, 33)]


@pytest.mark.parametrize(
    ("field", "dtype"), [*((field, torch.float32) for field in FIELDS), *(("all", dtype) for dtype in PACKED_DTYPES)]
)
def test_fields_beyond_the_plain_block(isa, one_thread, field, dtype):
    """Alone and all together: by columns and in tiles, pooled tokens with the bits of all tokens, and not without."""
    options = EVERY_FIELD if field == "all" else FIELDS[field]
    sizes = FIELD_SIZES if (field, dtype) == ("all", torch.float32) else FIELD_SIZES[1:2]
    for n_heads, head_dim, hidden in sizes:
        block = {"n_heads": n_heads, "head_dim": head_dim, "hidden": hidden, "activation": "silu"}
        blocks = [block | options, block, block | options]
        for seqlens in BY_LAYERS_AND_TILES:
            what = f"{field}, {block}, {seqlens}"
            net = Net(channels=40, blocks=blocks, n_prefix=2, dtype=dtype)
            net.check(seqlens, 0, what)
            net.check_pooled(seqlens, 2, what)
        without = Net(channels=40, blocks=[block] * 3, n_prefix=2, dtype=dtype)
        rows = net.rows((9, 4))
        without.embed, without.table, without.prefix = net.embed, net.table, net.prefix
        assert not torch.allclose(net.run((9, 4), rows, 0), without.run((9, 4), rows, 0), atol=1e-2)


@pytest.mark.parametrize(
    ("tables", "n_heads", "head_dim", "dtype"),
    [
        ("one", 3, 8, torch.float32),
        ("one", 1, 2, torch.float32),
        ("blocks", 2, 20, torch.float32),
        ("heads", 3, 72, torch.float32),
        *(("both", 2, 64, dtype) for dtype in PACKED_DTYPES),
    ],
)
def test_heads_turn(isa, one_thread, tables, n_heads, head_dim, dtype):
    block = {"n_heads": n_heads, "head_dim": head_dim, "hidden": 20, "activation": "gelu"}
    rope = 3 if tables in ("blocks", "both") else 1, n_heads if tables in ("heads", "both") else 1, head_dim
    fields = EVERY_FIELD if tables == "both" else {}
    blocks = [block, block | fields, block | fields]
    for seqlens in BY_LAYERS_AND_TILES:
        net = Net(channels=40, blocks=blocks, n_prefix=2, dtype=dtype, rope=rope)
        net.check(seqlens, 0, str(seqlens))
        net.check_pooled(seqlens, 2, str(seqlens))
    rows = net.rows((9, 4))
    turned = net.run((9, 4), rows, 0)
    net.rope = None
    assert not torch.allclose(turned, net.run((9, 4), rows, 0), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [(0.1, False), (1e-3, True)], ids=["layer", "rms"])
def test_patches_are_normed_before_their_positions(isa, norm, dtype):
    net = Net(channels=40, patch_norm=norm, n_prefix=2, dtype=dtype)
    net.check(MIX, 0)
    net.check_pooled(MIX, 1)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("n_pooled", [full(0), 2])
def test_blocks_that_differ_are_bitwise_alone_and_in_any_pack(isa, n_pooled, dtype):
    blocks = [*MIXED_BLOCKS, *({**block, **EVERY_FIELD} for block in MIXED_BLOCKS)]
    net = Net(channels=40, blocks=blocks, n_prefix=2, patch_norm=(0.1, False), dtype=dtype)
    seqlens = (49, 196, 3, 100, 0, 49, 196, 14)
    rows, (index, offset) = net.rows(seqlens).split(seqlens), Net.index(seqlens)
    packed = net.run(seqlens, torch.cat(rows), n_pooled).split([n_pooled or n + 2 for n in seqlens])
    for i in fewer_if_emulated(isa, *range(8)):
        alone = net.run(seqlens[i : i + 1], rows[i], n_pooled, index[i : i + 1], offset[i : i + 1])
        assert torch.equal(alone, packed[i]), f"sequence {i}"


def test_every_number_of_a_block_counts(isa):
    """A change of one number of one block gives another result, that of the reference; pooled tokens have its bits."""
    plain = {"n_heads": 2, "head_dim": 6, "hidden": 20, "activation": "gelu"}
    changes = (
        {"n_heads": 3, "head_dim": 4}, {"activation": "gelu_tanh"}, {"activation": "quick_gelu"}, {"scale": 0.9},
        {"eps": (0.2, EPS)}, {"eps": (EPS, 0.2)},
    )  # fmt: skip
    seqlens = (49, 17, 30)
    before = Net(blocks=[plain] * 3, pre_norm=True)
    rows = before.rows(seqlens)
    unchanged = before.run(seqlens, rows, 0)

    def check(what, **arguments):
        net = Net(pre_norm=True, **arguments)
        net.check(seqlens, 0, what)
        tokens = net.run(seqlens, rows, 0)
        assert not torch.equal(tokens, unchanged), what
        net.check_pooled(seqlens, 1, what)

    for block in range(3):
        for change in (*changes, *(FIELDS.values() if block == 1 else ())):
            check(f"block {block}, {change}", blocks=[plain | change if i == block else plain for i in range(3)])
    for outer_eps in ((0.2, EPS), (EPS, 0.2)):
        check(f"outer eps {outer_eps}", blocks=[plain] * 3, outer_eps=outer_eps)


def test_no_prefix_two_pooled_and_empty_batches(isa):
    Net(n_prefix=0).check((0, 3, 0, 40), 0)
    Net(n_prefix=3).check((4, 0, 25), 2)
    for n_pooled in (0, 1):
        assert Net().run((), torch.empty(0, 12), n_pooled).shape == (0, 24)
    Net().check((0, 0, 0), 1, "sequences of nothing but their prefix")


def test_many_sequences_run_in_groups():
    """12 KB of activations a token make groups of about 2,000 tokens; the result must not show where they end.

    Groups are those of all instruction sets.
    """
    net = Net(channels=512, n_heads=8, head_dim=64, hidden=16, depth=1)
    seqlens = (196, 49, 100) * 14
    for n_pooled in (0, 1):
        net.check(seqlens, n_pooled, f"n_pooled={n_pooled}")


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("n_pooled", [0, full(2)])
def test_bitwise_alone_and_in_any_pack(isa, n_pooled, dtype):
    """Few rows are shared among threads by columns, many in tiles: the sums must be the same."""
    net = Net(channels=64, n_heads=2, head_dim=32, hidden=600, n_prefix=2, dtype=dtype)
    seqlens = (49, 196, 3, 100, 100, 49, 196, 14)
    rows = net.rows(seqlens).split(seqlens)
    index, offset = Net.index(seqlens)
    starts = torch.tensor([0, *((torch.tensor(seqlens) + 2).cumsum(0).tolist())])

    def run(order):
        chosen = [seqlens[i] for i in order]
        out = net.run(chosen, torch.cat([rows[i] for i in order]), n_pooled, index[order], offset[order])
        return out.split([2] * len(order)) if n_pooled else out.split([n + 2 for n in chosen])

    together = run(list(range(8)))
    assert n_pooled or starts[-1] == sum(t.shape[0] for t in together)
    for order in fewer_if_emulated(isa, [1], [7, 6, 5, 4, 3, 2, 1, 0], [6, 2, 0, 6], [0], [2]):
        for i, got in zip(order, run(order), strict=True):
            assert torch.equal(got, together[i]), f"sequence {i} in {order}"


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_bitwise_for_any_number_of_threads(isa, dtype):
    net = Net(channels=64, n_heads=2, head_dim=32, hidden=600, dtype=dtype)
    seqlens = (196, 196, 100, 49, 1)
    rows, before = net.rows(seqlens), torch.get_num_threads()
    try:
        results = []
        for n in fewer_if_emulated(isa, 1, 2, 3, 16):
            torch.set_num_threads(n)
            results.append(net.run(seqlens, rows, 0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_every_dtype(isa, dtype):
    net = Net(patch_values=27)
    rows = (100 * net.rows((30, 4)).abs()).clamp(max=255).to(dtype)
    assert torch.equal(net.run((30, 4), rows, 0), net.run((30, 4), rows.float(), 0))


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_nan_stays_in_its_image(isa, dtype):
    net = Net(dtype=dtype)
    rows = net.rows((20, 30, 8))
    clean = net.run((20, 30, 8), rows, 1)
    rows[25] = float("nan")
    got = net.run((20, 30, 8), rows, 1)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@settings(max_examples=examples(25), deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=9),
    st.integers(8, 40),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(1, 300),
    st.sampled_from(ACTIVATIONS[1:]),
    st.integers(0, 2),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(seqlens, channels, n_heads, head_dim, hidden, activation, n_prefix, dtype):
    net = Net(
        channels=channels, n_heads=n_heads, head_dim=head_dim, hidden=hidden, activation=activation, n_prefix=n_prefix,
        depth=1, dtype=dtype, final_norm=False,
    )  # fmt: skip
    rows = net.rows(seqlens)
    for n_pooled in range(n_prefix + 1):
        truth = net.truth(seqlens, rows, n_pooled)
        same = net.truth(seqlens, rows, n_pooled, torch.float32)
        allowed = luck(dtype, truth) + (2 * (same - truth).abs().max().item() if truth.numel() else 0)
        torch.testing.assert_close(net.run(seqlens, rows, n_pooled).double(), truth, rtol=0, atol=allowed)


EPSILONS = [1e-12, 1e-6, 1e-3, 0.1, 1.0]
NORM = st.tuples(st.sampled_from(EPSILONS), st.booleans())
BLOCKS = st.fixed_dictionaries(
    {
        "n_heads": st.integers(1, 5),
        "head_dim": st.integers(1, 40),
        "hidden": st.integers(1, 300),
        "activation": st.sampled_from(ACTIVATIONS),
        "eps": st.tuples(*[st.sampled_from(EPSILONS)] * 2),
        "scale": st.none() | st.floats(-1, 1, width=32),
        "rms": st.tuples(st.booleans(), st.booleans()),
        "gated_attention": st.booleans(),
        "gated_mlp": st.booleans(),
    }
    | dict.fromkeys(("qk_norm", "out_norm", "mlp_norm"), st.none() | NORM)
)


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seqlens=st.lists(st.integers(0, 60), min_size=1, max_size=9),
    channels=st.integers(8, 40),
    blocks=st.lists(BLOCKS, min_size=1, max_size=4),
    n_prefix=st.integers(0, 2),
    pre_norm=st.booleans(),
    rms=st.booleans(),
    dtype=st.sampled_from(PACKED_DTYPES),
)
def test_any_blocks(isa, seqlens, channels, blocks, n_prefix, pre_norm, rms, dtype):
    """Blocks of any shapes: as accurate as the reference, and an image's bits do not depend on its pack."""
    net = Net(channels=channels, blocks=blocks, n_prefix=n_prefix, pre_norm=pre_norm, rms=rms, dtype=dtype)
    rows, (index, offset) = net.rows(seqlens), Net.index(seqlens)
    for n_pooled in range(n_prefix + 1):
        ours, same, truth = (
            net.run(seqlens, rows, n_pooled),
            net.truth(seqlens, rows, n_pooled, torch.float32),
            net.truth(seqlens, rows, n_pooled),
        )
        assert ours.shape == truth.shape
        if dtype == torch.int8:  # of few values one step of rounding moves the median; see test_blocks_that_differ
            assert torch.isfinite(ours).all()
        elif truth.numel():
            allowed = luck(dtype, truth) + 2 * (same - truth).abs().max().item()
            torch.testing.assert_close(ours.double(), truth, rtol=0, atol=allowed)
        last = len(seqlens) - 1
        alone = net.run(seqlens[last:], rows[sum(seqlens[:last]) :], n_pooled, index[last:], offset[last:])
        assert torch.equal(alone, ours[ours.shape[0] - alone.shape[0] :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_fallback_over_the_reference(dtype):
    every = {"n_heads": 2, "head_dim": 20, "hidden": 30, "activation": "silu", **EVERY_FIELD}
    net = Net(channels=40, blocks=[every] * 2, patch_norm=(0.1, False), rope=(2, 2, 20), dtype=dtype)
    weights, seqlens = net.packed(), (30, 0, 7)
    args = net.arguments(seqlens, weights)
    got = _library.reference_ops["vit_forward"](*args, weights.descriptor, 1, net.rope)
    # The reference widens bfloat16; where it is multiplied, int8 blocks have it in their attention.
    tolerance = 3e-2 if cpu_multiplies_bf16() else 1e-4
    torch.testing.assert_close(got, net.run(seqlens, args[0], 1), rtol=tolerance, atol=tolerance)
    with pytest.raises(RuntimeError, match="descriptor: version must be 2, got 1"):
        _library.reference_ops["vit_forward"](*args, torch.tensor([1.0, 1, 0, EPS, EPS], dtype=torch.float64), 1)


def test_opcheck():
    net = Net(rope=(1, 3, 8))
    seqlens, weights = (9, 4), net.packed()
    for n_pooled in (0, 1):
        torch.library.opcheck(
            torch.ops.revit_fast.vit_forward.default,
            (*net.arguments(seqlens, weights), weights.descriptor, n_pooled, net.rope if n_pooled else None),
            test_utils=("test_schema", "test_faketensor"),
        )


BAD = {
    "padding rows": (lambda a: a | {"rows": randn(14, 12)}, RuntimeError, "rows must end with the last sequence"),
    "row width": (lambda a: a | {"rows": randn(13, 11)}, RuntimeError, r"embed: panels must be those of a weight"),
    "integers": (lambda a: a | {"rows": torch.ones(13, 12, dtype=torch.int32)}, TypeError, "rows: expected a float"),
    "decreasing": (lambda a: a | {"cu_seqlens": torch.tensor([0, 14, 13]).int()}, RuntimeError, "must not decrease"),
    "int64 offsets": (lambda a: a | {"cu_seqlens": torch.tensor([0, 9, 13])}, TypeError, "cu_seqlens: expected int32"),
    "length": (lambda a: a | {"length_index": torch.tensor([0, 3]).int()}, RuntimeError, r"in \[0, 3\), got 3"),
    "lengths": (lambda a: a | {"length_index": torch.tensor([0]).int()}, ValueError, "one entry for each of the 2"),
    "position": (lambda a: a | {"pos_offset": torch.tensor([0, 299]).int()}, RuntimeError, "pos_offset of sequence 1"),
    "table": (lambda a: a | {"pos_table": randn(300, 23)}, RuntimeError, "pos_table must be a contiguous float32"),
    "pooled": (lambda a: a | {"n_pooled": 2}, ValueError, "n_pooled: expected 0 to 1 prefix tokens, got 2"),
    "rope": (
        lambda a: a | {"rope": randn(1, 299, 1, 2, 4)},
        RuntimeError,
        r"rope must be .* \[1 or 2, 300, 1 or",
    ),
    "wide rope": (
        lambda a: a | {"rope": randn(1, 300, 1, 2, 8)},
        RuntimeError,
        "1 heads of 16 channels; a block has",
    ),
    "rope of heads": (lambda a: a | {"rope": randn(2, 300, 2, 2, 4)}, RuntimeError, "2 heads of 8 channels; a block"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_named(case):
    net = Net()
    change, error, message = BAD[case]
    length_index, pos_offset = Net.index((9, 4))
    arguments = change(
        {
            "rows": net.rows((9, 4)), "cu_seqlens": cu_seqlens_of((9, 4)), "length_index": length_index,
            "pos_offset": pos_offset, "pos_table": net.table, "weights": net.packed(), "n_pooled": 1,
        }
    )  # fmt: skip
    with pytest.raises(error, match=message):
        ops.vit_forward(**arguments)


WHOLE = "must be a whole number in"
MIDDLE = 6 + 13  # the first number of blocks[1]
BAD_DESCRIPTORS = {
    "another version": ({0: 1}, "descriptor: version must be 2, got 1"),
    "half a version": ({0: 1.5}, "descriptor: version must be 2, got 1.5"),
    "no lengths": ({1: 0}, rf"descriptor: n_lengths {WHOLE} \[1, 2147483647\], got 0"),
    "half a length": ({1: 2.5}, rf"n_lengths {WHOLE} .*, got 2\.5"),
    "fewer blocks": ({2: 1}, "6 numbers and 13 for each of its n_blocks = 1 blocks, got 32"),
    "more blocks": ({2: 1e9}, "n_blocks = 1000000000 blocks, got 32"),
    "negative blocks": ({2: -1}, rf"n_blocks {WHOLE} \[0, 2147483647\], got -1"),
    "eps of norm_pre": ({3: -1}, "descriptor: norm_pre.eps must be finite and not negative, got -1"),
    "eps of norm": ({4: float("inf")}, "descriptor: norm.eps must be finite and not negative, got inf"),
    "eps of patch_norm": ({5: -1}, "descriptor: patch_norm.eps must be finite and not negative, got -1"),
    "no heads": ({6: 0}, rf"blocks\[0\].n_heads {WHOLE} \[1, 2147483647\], got 0"),
    "more heads": ({MIDDLE: 40}, "qkv: panels must be those of a weight"),
    "huge heads": ({MIDDLE: 1e300}, rf"blocks\[1\].n_heads {WHOLE} .*, got 1e\+300"),
    "head_dim": ({MIDDLE + 1: 257}, rf"descriptor: blocks\[1\].head_dim {WHOLE} \[1, 256\], got 257"),
    "NaN": ({MIDDLE + 1: float("nan")}, rf"blocks\[1\].head_dim {WHOLE} \[1, 256\], got -?nan"),
    "hidden": ({MIDDLE + 2: 0}, rf"blocks\[1\].hidden {WHOLE} \[1, 2147483647\], got 0"),
    "another hidden": ({MIDDLE + 2: 400}, "fc1: panels must be those of a weight"),
    "activation": ({MIDDLE + 3: 6}, rf"blocks\[1\].activation {WHOLE} \[0, 5\], got 6"),
    "gated MLP": ({MIDDLE + 4: 2}, rf"blocks\[1\].gated_mlp {WHOLE} \[0, 1\], got 2"),
    "gates that are not there": ({MIDDLE + 5: 1}, "qkv: panels must be those of a weight"),
    "eps of norm1": ({MIDDLE + 7: -1e-6}, r"blocks\[1\].norm1.eps must be finite and not negative, got -1e-06"),
    "eps of norm2": ({MIDDLE + 8: float("nan")}, r"blocks\[1\].norm2.eps must be finite and not negative, got -?nan"),
    "scale": ({MIDDLE + 6: float("-inf")}, r"blocks\[1\].scale must be a finite number, got -inf"),
}


@pytest.mark.parametrize("case", BAD_DESCRIPTORS)
def test_bad_descriptors_are_named(case):
    net, seqlens = Net(), (9, 4)
    changes, message = BAD_DESCRIPTORS[case]
    weights = net.packed()
    descriptor = weights.descriptor
    for place, value in changes.items():
        descriptor[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.revit_fast.vit_forward.default(*net.arguments(seqlens, weights), descriptor, 1)


def test_descriptors_of_another_form_are_named():
    net, seqlens = Net(), (9, 4)
    weights = net.packed()
    arguments, good = net.arguments(seqlens, weights), weights.descriptor
    bad = {
        "descriptor must be a contiguous float64 CPU vector": (good.float(), good[None], good.repeat(2)[::2]),
        r"6 numbers and 13 for each block, got [04]": (good[:0], good[:4]),
        "6 numbers and 13 for each of its n_blocks = 2 blocks, got 31": (good[:-1],),
        "weights must be 8 tensors and 20 for each of the descriptor's 0 blocks, got 48": (
            torch.cat([good[:2], torch.zeros(1, dtype=torch.float64), good[3:6]]),
        ),
    }
    for message, descriptors in bad.items():
        for descriptor in descriptors:
            with pytest.raises(RuntimeError, match=message):
                torch.ops.revit_fast.vit_forward.default(*arguments, descriptor, 1)


def test_bad_weights_are_named():
    net = Net()
    weights = net.packed()

    def run(**change):
        blocks = [weights.blocks[0], weights.blocks[1]._replace(**change)]
        index = Net.index((9, 4))
        changed = replace(weights, blocks=blocks)
        ops.vit_forward(net.rows((9, 4)), cu_seqlens_of((9, 4)), *index, net.table, changed, 1)

    with pytest.raises(ValueError, match=r"blocks\[1\].activation: expected one of none, gelu, .*, got 'mish'"):
        run(activation="mish")
    with pytest.raises(RuntimeError, match=rf"blocks\[1\].head_dim {WHOLE} \[1, 256\], got 0"):
        run(head_dim=0)
    with pytest.raises(RuntimeError, match=r"blocks\[1\].norm2.eps must be finite and not negative, got -1"):
        run(norm2=weights.blocks[1].norm2._replace(eps=-1.0))
