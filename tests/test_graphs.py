"""CUDA graphs behind `optimize`: buckets, padded index tensors, upkeep; direct calls stand in for capture."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from small_models import MIX, PATCH, check, images_of, make_model
from torch._subclasses.fake_tensor import FakeTensorMode

import revit_fast as rf
from revit_fast import ops
from revit_fast.inference import cuda_graphs
from revit_fast.inference.cuda_graphs import (
    Bucket,
    DirectCalls,
    Index,
    bucket_of,
    round_up,
    tile_capacity,
    write_index,
)
from revit_fast.kernels.constants import KEY_CLASSES, N_CLASSES, PADDING, TILE_ROWS
from revit_fast.models.inputs import Inputs
from revit_fast.packing import Layout, PackedBatch, PackPlan, work_list


def index_vector(patches, tokens, pos_offset, bucket, capacity):
    vector = np.full(Index.slices(bucket, capacity)[-1].stop, -7, dtype=np.int32)
    write_index(vector, patches, tokens, pos_offset, bucket, capacity)
    return vector


@pytest.fixture(autouse=True)
def graphs_on_the_cpu(monkeypatch):
    monkeypatch.setitem(cuda_graphs.BACKENDS, "cpu", DirectCalls)


@given(st.integers(0, 20_000), st.integers(1, 500))
def test_a_bucket_holds_its_batch_and_little_more(n_rows, n_sequences):
    bucket = bucket_of(n_rows, n_sequences, 49)
    assert bucket.n_rows >= n_rows
    assert bucket.n_sequences >= n_sequences
    assert bucket == bucket_of(bucket.n_rows, n_sequences, 49)
    if n_rows > 1024:
        assert bucket.n_rows - n_rows < n_rows / 8
    assert bucket.n_sequences <= max(-(-bucket.n_rows // 49), 2 * n_sequences)


def test_a_copy_expects_batches_on_the_cpu_where_graphs_copy_them(monkeypatch):
    assert rf.optimize(make_model()).input_device == torch.device("cpu")
    elsewhere = rf.optimize(make_model().to("meta"))
    assert elsewhere.input_device == torch.device("meta"), "nothing is replayed there"
    monkeypatch.setitem(cuda_graphs.BACKENDS, "meta", DirectCalls)
    assert elsewhere.input_device == torch.device("cpu")
    assert elsewhere.double().input_device == torch.device("meta"), "float64 runs eagerly"


def test_sizes_are_eight_an_octave():
    assert [round_up(n, 128, 8) for n in (1, 128, 129, 1024, 1025, 2048, 2049, 4000, 4097)] == [
        128, 128, 256, 1024, 1152, 2048, 2304, 4096, 4608,
    ]  # fmt: skip
    sizes = {round_up(n, 128, 8) for n in range(1, cuda_graphs.MAX_ROWS + 1)}
    assert len(sizes) == 40 <= cuda_graphs.MAX_GRAPHS


@given(
    st.lists(st.integers(0, 700), min_size=1, max_size=20),
    st.lists(st.integers(0, 700), min_size=1, max_size=20),
    st.integers(0, 5),
)
def test_tile_capacity_holds_what_came_and_is_bounded_by_what_can_come(first, second, n_prefix):
    bucket = bucket_of(max(sum(first), sum(second)), max(len(first), len(second)), 49)
    n_tokens = bucket.n_rows + n_prefix * bucket.n_sequences
    capacity = None
    for seqlens in (first, second):
        tokens = [n + n_prefix for n in seqlens]
        counts = work_list(tokens, n_padding=n_tokens - sum(tokens)).counts
        capacity = tile_capacity(counts, capacity, n_tokens, bucket.n_sequences)
        assert all(room >= count for room, count in zip(capacity, counts, strict=True))
        assert all(room <= n_tokens // TILE_ROWS + bucket.n_sequences + 1 for room in capacity)
        assert tile_capacity(counts, capacity, n_tokens, bucket.n_sequences) == capacity


def test_index_tensors_of_a_bucket():
    bucket, n_token_rows = Bucket(128, 5), 128 + 2 * 5
    patches = PackPlan.of([16, 0, 100], (100, 16, 9), grids=[(4, 4), (0, 0), (10, 10)])
    tokens = patches.tokens(2, n_token_rows - 122)
    capacity = tile_capacity(tokens.work.counts, None, n_token_rows, 5)
    index = Index.over(index_vector(patches, tokens, [36, 0, 7], bucket, capacity), bucket, capacity)
    assert index.patch_cu_seqlens.tolist() == [0, 16, 16, 116, 116, 116]
    assert index.cu_seqlens.tolist() == [0, 18, 20, 122, 122, 122], "empty slots must hold no tokens"
    assert index.length_index.tolist() == [1, 2, 0, 0, 0]
    assert index.pos_offset.tolist() == [36, 0, 7, 0, 0]
    assert all(part.start % 4 == 0 for part in Index.slices(bucket, capacity)), "parts must be aligned"
    expected = work_list([18, 2, 102], n_padding=138 - 122).tiles
    assert torch.equal(torch.from_numpy(index.tiles[index.tiles[:, 2] >= 0]), expected)
    begin = 0
    for class_, room in enumerate(capacity):
        assert set(index.tiles[begin : begin + room, 2].tolist()) <= {class_, -1}
        begin += room
    assert begin == len(index.tiles)


def test_a_thousand_random_mixes_settle_into_few_graphs(monkeypatch):
    """1 to 64 images of random configured grids, as a service meets them: 33 row sizes come, one graph each."""

    class Nothing(DirectCalls):
        def capture(self, run):
            return lambda: torch.zeros(512, 5)

    monkeypatch.setitem(cuda_graphs.BACKENDS, "cpu", Nothing)
    generator = random.Random(0)
    fast = rf.optimize(make_model(grids=(14, 10, 7), embed_dim=3, depth=0))
    waste, launched = [], []
    captures = []
    for _ in range(1000):
        grids = [generator.choice((14, 10, 7)) for _ in range(generator.randint(1, 64))]
        n_rows = sum(g * g for g in grids)
        rows = torch.zeros(n_rows, 3 * PATCH**2)
        fast(PackedBatch.from_rows(rows, [g * g for g in grids]))
        (bucket, *_), graph = next(reversed(fast._graphs.value.graphs.items()))
        n_tokens = n_rows + len(grids)
        if n_tokens > 1024:
            waste.append((bucket.n_rows + bucket.n_sequences) / n_tokens - 1)
        launched.append(sum(graph.capacity) / sum(work_list([g * g + 1 for g in grids]).counts))
        captures.append(fast._graphs.value.n_captures)
    assert len(fast._graphs.value.graphs) <= 33
    assert captures[-1] <= 110, f"{captures[-1]} captures"
    assert captures[-1] - captures[499] <= 20, "captures must become rare"
    assert max(waste) < 0.125 + 1 / 49, f"at most {max(waste):.1%} more token rows"
    assert sum(waste) / len(waste) < 0.08, f"on average {sum(waste) / len(waste):.1%} more token rows"
    assert sum(launched) / len(launched) < 2.5, "slots for tiles beside tiles with work"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": ""},
        {"global_pool": "token_avg", "reg_tokens": 2},
        {"distilled": True},
        {"reg_tokens": 4, "init_values": 0.1, "no_embed_class": True},
        {"pre_norm": True, "fc_norm": True},
        {"norm_layer": "rms", "pre_norm": True},
        {"depth": 0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_padded_run_equals_the_eager_run(options):
    model = make_model(**options)
    fast = rf.optimize(model)
    for grids in (MIX, [6], [2] * 40, [(1, 1)] * 70, [6, 0, 2]):
        if 0 in grids:
            rows = [randn(g * g, 3 * PATCH**2, seed=g) for g in grids]
            x = PackedBatch.from_list(rows, grids=[(g, g) for g in grids], lengths=model.lengths)
        else:
            x = images_of(grids)
        check(fast, model, x)
    assert fast._graphs.value.n_captures >= 1


def test_our_ops_are_bitwise_the_same_in_a_bucket():
    """Matrix products aside, which PyTorch rounds by their size, padding and empty slots change no bit."""
    model = make_model()
    seqlens, n_prefix, channels = [16, 36, 4, 100], 1, 24
    n_rows, n_tokens = sum(seqlens), sum(seqlens) + len(seqlens)
    exact = PackedBatch.from_rows(randn(n_rows, channels), seqlens, lengths=model.lengths)
    bucket = bucket_of(n_rows, 4, 4)
    n_token_rows = bucket.n_rows + n_prefix * bucket.n_sequences
    tokens = exact.plan.tokens(n_prefix, n_token_rows - n_tokens)
    capacity = tile_capacity(tokens.work.counts, None, n_token_rows, bucket.n_sequences)
    vector = index_vector(exact.plan, tokens, [36, 0, 52, 0], bucket, capacity)
    padded = Index.over(torch.from_numpy(vector), bucket, capacity)
    layouts = exact.layout(1), Layout(padded.cu_seqlens, padded.length_index, padded.tiles, capacity)
    filled = torch.full((bucket.n_rows, channels), torch.nan)
    filled[:n_rows] = exact.data
    table, prefix = randn(200, channels, seed=1), randn(1, channels, seed=2)

    results = []
    for rows, cu_seqlens, offset, layout in (
        (exact.data, exact.cu_seqlens, padded.pos_offset[:4], layouts[0]),
        (filled, padded.patch_cu_seqlens, padded.pos_offset, layouts[1]),
    ):
        tokens = ops.assemble_tokens(rows, prefix, table, offset, cu_seqlens)
        normed, total = model.blocks[0].norm1(tokens, layout, residual=tokens)
        qkv = normed.view(-1, 1, 24).expand(-1, 3, -1).reshape(-1, 3, 3, 8)
        attended = ops.varlen_attention(
            *qkv.unbind(1), layout.cu_seqlens, tiles=layout.tiles, tile_counts=layout.tile_counts
        )
        pooled = ops.mean_pool(attended.flatten(1), layout.cu_seqlens, 1)
        results.append((tokens, normed, total, attended, pooled))
    for name, a, b in zip(("tokens", "normed", "total", "attended", "pooled"), *results, strict=True):
        n = 4 if name == "pooled" else n_tokens
        assert torch.equal(a[:n], b[:n]), name
        if name not in ("tokens", "pooled"):
            assert not b[n:].any(), f"{name}: padding must be zero"


def test_every_form_of_input_and_every_other_method():
    model = make_model()
    fast = rf.optimize(model)
    x = torch.stack(images_of([6, 6]))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast(model.pack(list(x))), model(x))
        features = fast.forward_features(list(x))
        assert torch.equal(features.data, model.forward_features(list(x)).data)
        assert torch.equal(fast.forward_head(features), model.forward_head(features))
        padded = PackedBatch.from_rows(torch.cat([model.pack(x).data, torch.full((3, 12), torch.nan)]), [36, 36])
        torch.testing.assert_close(fast(padded), model(x))
        assert fast(PackedBatch.from_rows(torch.empty(0, 12), [])).shape == (0, 40)
    with torch.inference_mode():
        inside = fast(x)
    outside = fast(x)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad
    again = fast(torch.stack(images_of([6, 6], seed=5)))
    assert not torch.equal(again, outside), "a result must not be the memory that the next replay overwrites"


def test_dtype_and_the_source_untouched():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    fast = rf.optimize(model.train(), dtype=torch.bfloat16)
    model.eval()
    assert fast(images_of(MIX)).dtype == torch.bfloat16
    check(fast, copy.deepcopy(model).bfloat16(), model.pack(images_of(MIX)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert fast.state_dict().keys() == before.keys()
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())


def test_pixels_stay_bytes_and_their_normalization_is_folded_once(monkeypatch):
    model = make_model()
    fast = rf.optimize(model)
    folds = []
    fold = model.patch_embed.fold
    monkeypatch.setattr(fast.patch_embed, "fold", lambda n: folds.append(n) or fold(n))
    generator = torch.Generator().manual_seed(0)

    def pixels(normalization):
        rows = torch.randint(0, 256, (36 + 4, 12), generator=generator, dtype=torch.uint8)
        return PackedBatch.from_rows(rows, [36, 4], lengths=model.lengths, normalization=normalization)

    first = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.1]])
    for _ in range(3):
        batch = pixels(first.clone())
        check(fast, model, batch)
        assert batch.to("cpu").data.dtype == torch.uint8
    assert len(folds) == 1
    check(fast, model, pixels(first / 2))
    assert len(folds) == 2
    assert fast._graphs.value.n_captures == 1, "other values of the same kind need no new graph"
    assert set(fast._graphs.value._rows) == {torch.uint8}
    float_pixels = pixels(first).with_data(pixels(first).data.float() + 0.5)
    check(fast, model, float_pixels)
    assert pixels(first).to("cpu").normalization is pixels(first.clone()).to("cpu").normalization


def test_new_grids_find_room_or_make_it():
    model = make_model()
    fast = rf.optimize(model)
    check(fast, model, images_of(MIX))
    table = fast._graphs.value._tables[0]
    check(fast, model, images_of([(1, 3), 6]))
    assert fast._graphs.value._tables[0] is table
    check(fast, model, images_of([(12, 13), (9, 2), 6]))
    assert fast._graphs.value._tables[0] is not table
    check(fast, model, images_of([*MIX, (1, 3)]))
    for side in range(1, 90):  # past what is remembered, so that the table starts anew
        fast(images_of([(1, side)]))
    check(fast, model, images_of([*MIX, (12, 13)]))


def test_graphs_are_bounded_and_large_batches_run_eagerly():
    model = make_model()
    fast = rf.optimize(model, max_rows=512, max_graphs=2)
    for count in (1, 4, 8, 12):
        check(fast, model, images_of([6] * count))
    assert len(fast._graphs.value.graphs) == 2
    captured = fast._graphs.value.n_captures
    check(fast, model, images_of([6] * 17))
    assert fast._graphs.value.n_captures == captured, "612 rows are beyond the largest bucket"
    fast(images_of([6] * 12))
    assert fast._graphs.value.n_captures == captured, "the graph used last must still be there"


@pytest.mark.parametrize("change", ["in place", "load", "dtype", "head", "replaced"])
def test_changed_parameters_drop_the_graphs(change):
    model = make_model()
    fast = rf.optimize(model)
    x = images_of(MIX)
    fast(x)
    before = fast._graphs.value
    for m in (model, fast):
        if change == "in place":
            m.pos_embed.detach().mul_(2)
        elif change == "load":
            m.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})
        elif change == "dtype":
            m.bfloat16()
        elif change == "head":
            torch.manual_seed(1)
            m.reset_classifier(3)
        else:
            m.blocks[0].attn.proj.weight = torch.nn.Parameter(randn(24, 24))
    if change == "load":
        fast.load_state_dict(model.state_dict())
    check(fast, model, [image.to(model.pos_embed.dtype) for image in x])
    assert fast._graphs.value is not before
    captured = fast._graphs.value.n_captures
    fast([image.to(model.pos_embed.dtype) for image in x])
    assert fast._graphs.value.n_captures == captured


def test_pickle_and_deepcopy_capture_their_own():
    model = make_model()
    fast = rf.optimize(model)
    x = images_of(MIX)
    expected = fast(x)
    for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), rf.optimize(fast)):
        assert other._graphs.value is None
        assert torch.equal(other(x), expected)
    assert fast._graphs.value is not None


def test_bad_arguments_are_named():
    model = make_model()
    with pytest.raises(TypeError, match="got Linear; use ReViT"):
        rf.optimize(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="dtype: expected"):
        rf.optimize(model, torch.int16)
    with pytest.raises(ValueError, match="max_graphs: expected an int of at least 1, got 0"):
        rf.optimize(model, max_graphs=0)
    fast = rf.optimize(model)
    with pytest.raises(ValueError, match="mode: this is an inference copy"):
        fast.train()
    with pytest.raises(ValueError, match="batch is on meta"):
        fast(PackedBatch.from_list([randn(4, 12)]).to("meta"))
    with pytest.raises(ValueError, match=r"patch rows \[T, 12\]"):
        fast(PackedBatch.from_list([randn(4, 16)]))
    with pytest.raises(ValueError, match="x: expected 3 channels first, got 4"):
        fast(torch.zeros(1, 4, 4, 4))


def test_the_captured_function_reads_nothing_back():
    """Under fake tensors any value that the host wants from the device is an error."""
    bucket, capacity = Bucket(256, 8), (4,) * N_CLASSES
    fake = make_model(distilled=True, reg_tokens=2)
    with FakeTensorMode(), torch.no_grad():
        for owner in fake.modules():
            for name, parameter in owner._parameters.items():
                owner._parameters[name] = None if parameter is None else torch.empty(parameter.shape, device="cuda")
        vector = torch.zeros(Index.slices(bucket, capacity)[-1].stop, dtype=torch.int32, device="cuda")
        index = Index.over(vector, bucket, capacity)
        layout = Layout(index.cu_seqlens, index.length_index, index.tiles, capacity)
        rows, table = torch.empty(256, 12, device="cuda"), torch.empty(99, 24, device="cuda")
        out = fake._run(Inputs(rows, index.patch_cu_seqlens, layout, table, index.pos_offset, None))
    assert out.shape == (8, 40)
    assert out.device.type == "cuda"


def test_classes_are_those_of_the_work_list():
    assert PADDING == len(KEY_CLASSES) + 1 == N_CLASSES - 1
