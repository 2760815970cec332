"""The pack contract: offsets, work list, length rule, prefix convention, and its errors."""

import contextlib
from dataclasses import fields

import pytest
import torch
from helpers import randn
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from revit_fast import PackedBatch
from revit_fast.grids import check_grids
from revit_fast.kernels.constants import KEY_CLASSES, N_CLASSES, PADDING, STREAMING, TILE_ROWS
from revit_fast.packing import nearest_length, work_list

LENGTHS = (196, 100, 49)


def class_of(n_keys):
    return next((i for i, most in enumerate(KEY_CLASSES) if n_keys <= most), STREAMING)


@given(st.lists(st.integers(0, 1100), max_size=12), st.integers(0, 200))
def test_work_list_covers_every_row_once(seqlens, n_padding):
    covered = [set() for _ in [*seqlens, n_padding]]
    tiles, counts = work_list(seqlens, n_padding=n_padding)
    for sequence, first_row, tile_class in tiles.tolist():
        n_rows = [*seqlens, n_padding][sequence]
        rows = range(first_row, min(first_row + TILE_ROWS, n_rows))
        assert len(rows) > 0, f"tile ({sequence}, {first_row}) holds no row"
        assert covered[sequence].isdisjoint(rows)
        covered[sequence].update(rows)
        assert tile_class == (PADDING if sequence == len(seqlens) else class_of(seqlens[sequence]))
    assert [len(c) for c in covered] == [*seqlens, n_padding]
    assert tiles[:, 2].tolist() == [c for c in range(N_CLASSES) for _ in range(counts[c])]


def test_a_sequence_has_the_same_tiles_in_every_pack():
    alone = work_list([577]).tiles[:, 1:]
    packed = work_list([3, 577, 0, 1025]).tiles
    assert torch.equal(packed[packed[:, 0] == 1][:, 1:], alone)


def test_work_list_takes_its_classes_from_the_keys():
    tiles, counts = work_list([1, 1, 1, 1], [KEY_CLASSES[-1], KEY_CLASSES[-1] + 1, 0, 50])
    assert tiles.tolist() == [[2, 0, 0], [3, 0, 1], [0, 0, STREAMING - 1], [1, 0, STREAMING]]
    assert counts == (1, 1, 0, 0, 0, 1, 1, 0)


@pytest.mark.parametrize(
    ("count", "index"), [(196, 0), (400, 0), (148, 0), (147, 1), (100, 1), (75, 1), (74, 2), (49, 2), (1, 2), (0, 2)]
)
def test_nearest_length_with_ties_to_the_longer(count, index):
    # 148 lies midway between 196 and 100; 74.5 midway between 100 and 49.
    assert nearest_length(torch.tensor([count]), LENGTHS).tolist() == [index]


def test_from_list_round_trip_and_fields():
    items = [randn(n, 5, seed=n) for n in (49, 0, 196, 100, 49)]
    batch = PackedBatch.from_list(items)
    assert len(batch) == 5
    assert batch.cu_seqlens.tolist() == [0, 49, 49, 245, 345, 394]
    assert batch.cu_seqlens.dtype == batch.length_index.dtype == batch.tiles.dtype == torch.int32
    assert batch.length_index.tolist() == [2, 2, 0, 1, 2]
    assert batch.grids == ((7, 7), (0, 0), (14, 14), (10, 10), (7, 7))
    assert batch.max_seqlen == 196
    assert torch.equal(batch.tiles, work_list(batch.seqlens).tiles)
    assert batch.tile_counts == work_list(batch.seqlens).counts
    for item, part in zip(items, batch.split(), strict=True):
        assert torch.equal(item, part)


def test_from_images_cuts_patches_in_row_column_channel_order():
    p = 4
    images = [randn(3, 2 * p, 3 * p, seed=1), randn(3, p, p, seed=2)]
    batch = PackedBatch.from_images(images, p)
    assert batch.grids == ((2, 3), (1, 1))
    for image, rows in zip(images, batch.split(), strict=True):
        n_columns = image.shape[2] // p
        for index, row in enumerate(rows):
            top, left = index // n_columns * p, index % n_columns * p
            patch = image[:, top : top + p, left : left + p]
            assert torch.equal(row, patch.permute(1, 2, 0).reshape(-1)), f"patch {index}"


class TestFromNaFlex:
    """Padded batches of patches; that they are those of an image processor is tested beside the models."""

    def batch(self, **changes):
        shapes = torch.tensor([[2, 3], [4, 1]])
        mask = torch.tensor([[1] * 6 + [0], [1] * 4 + [0] * 3])
        values = torch.arange(2 * 7 * 12.0).view(2, 7, 12)
        return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes} | changes

    def test_padding_is_left_out(self):
        given = self.batch()
        batch = PackedBatch.from_naflex(**given, lengths=(9, 4))
        assert batch.grids == ((2, 3), (4, 1))
        assert (batch.seqlens, batch.lengths) == ((6, 4), (9, 4))
        for values, rows in zip(given["pixel_values"], batch.split(), strict=True):
            assert torch.equal(rows, values[: len(rows)])
        for changes in (
            {"pixel_attention_mask": None},
            {"pixel_attention_mask": given["pixel_attention_mask"].bool()},
            {"spatial_shapes": [(2, 3), (4, 1)]},
            {"spatial_shapes": given["spatial_shapes"].int()},
        ):
            again = PackedBatch.from_naflex(**self.batch(**changes))
            assert torch.equal(again.data, batch.data)
            assert again.grids == batch.grids

    def test_no_images(self):
        empty = PackedBatch.from_naflex(torch.empty(0, 7, 12), torch.empty(0, 2, dtype=torch.int64))
        assert (len(empty), empty.data.shape) == (0, (0, 12))

    def test_gradients_reach_the_patches_alone(self):
        given = self.batch()
        values = given["pixel_values"].requires_grad_()
        PackedBatch.from_naflex(**given).data.sum().backward()
        assert torch.equal(values.grad[..., 0], given["pixel_attention_mask"].float())

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (
                {"pixel_values": [[1.0]]},
                TypeError,
                r"pixel_values: expected a tensor .*got list; give torch\.as_tensor",
            ),
            ({"pixel_values": torch.zeros(2, 3, 8, 8)}, ValueError, "pixel_values: expected patches .*from_images"),
            ({"spatial_shapes": [(2, 3)]}, ValueError, "spatial_shapes: expected .* of 2 images .*got 1"),
            ({"spatial_shapes": [(2, 3), (4,)]}, TypeError, r"spatial_shapes\[1\]: expected two whole .*got \(4,\)"),
            ({"spatial_shapes": torch.ones(2, 2)}, TypeError, r"spatial_shapes\[0\]: expected two whole numbers"),
            ({"spatial_shapes": [(2, 3), (4, 2)]}, ValueError, r"spatial_shapes\[1\]: .*at most 7 patches .*got 4x2"),
            ({"spatial_shapes": [(0, 3), (4, 1)]}, ValueError, r"spatial_shapes\[0\]: expected at least .*got 0x3"),
            ({"spatial_shapes": [(2, 3), (3, 1)]}, ValueError, r"mask\[1\]: expected 3 ones for 3x1 .*got 4"),
            ({"pixel_attention_mask": torch.ones(2, 6)}, ValueError, r"mask: expected \[2, 7\] as in .*got \[2, 6\]"),
            ({"pixel_attention_mask": [[1] * 7] * 2}, TypeError, "mask: expected a tensor .* or None, got list"),
            (
                {"pixel_attention_mask": torch.tensor([[1] * 6 + [0], [0] + [1] * 4 + [0, 0]])},
                ValueError,
                r"pixel_attention_mask\[1\]: expected ones and then zeros, got a zero before a one; put the patches",
            ),
        ],
    )
    def test_what_does_not_fit_is_named(self, changes, error, message):
        with pytest.raises(error, match=message):
            PackedBatch.from_naflex(**self.batch(**changes))


def test_padding_rows_are_not_part_of_any_sequence():
    batch = PackedBatch.from_rows(torch.arange(10.0)[:, None], [4, 3])
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert [part.flatten().tolist() for part in batch.split()] == [[0, 1, 2, 3], [4, 5, 6]]
    assert batch.tiles.tolist() == work_list([4, 3], n_padding=3).tiles.tolist()
    assert batch.layout(1).tile_counts == work_list([5, 4], n_padding=3).counts
    trimmed = batch.without_padding()
    assert (trimmed.data.shape[0], trimmed.tile_counts) == (7, work_list([4, 3]).counts)
    assert torch.equal(trimmed.tiles, work_list([4, 3]).tiles)
    assert trimmed.without_padding() is trimmed


def test_select_copies_sequences_in_the_order_asked_for():
    pack = PackedBatch.from_rows(
        torch.arange(14.0)[:, None],  # the last row is padding
        (4, 0, 6, 3),
        grids=[(2, 2), (0, 0), (3, 2), (1, 3)],
        lengths=(6, 4),
        normalization=torch.tensor([[0.5] * 3, [0.25] * 3]),
    )
    some = pack.select([3, 0, 3])
    assert some.seqlens == (3, 4, 3)
    assert some.data[:, 0].tolist() == [10, 11, 12, 0, 1, 2, 3, 10, 11, 12]
    assert some.grids == ((1, 3), (2, 2), (1, 3))
    assert some.lengths == pack.lengths
    assert some.normalization is pack.normalization
    some.data.zero_()
    assert pack.data[0, 0] == 0
    assert pack.data[12, 0] == 12, "rows are copies"
    assert pack.select([]).data.shape == (0, 1)
    with pytest.raises(IndexError, match="sequences: expected 0 to 3, got 4"):
        pack.select([0, 4])


def test_layout_counts_prefix_tokens():
    batch = PackedBatch.from_list([randn(n, 2) for n in (63, 0, 64)], grids=[(9, 7), (0, 0), (8, 8)])
    layout = batch.layout(1)
    assert layout.cu_seqlens.tolist() == [0, 64, 65, 130]
    assert torch.equal(layout.tiles, work_list([64, 1, 65]).tiles)
    assert torch.equal(layout.length_index, batch.length_index)
    assert batch.layout(1) is layout, "the plan keeps it"
    tokens = batch.with_tokens(randn(130, 2), 1)
    assert tokens.n_prefix == 1
    assert tokens.seqlens == (64, 1, 65)
    assert torch.equal(tokens.layout(1).tiles, layout.tiles)
    with pytest.raises(ValueError, match="n_prefix"):
        tokens.layout(2)


def test_a_fake_pack_leaves_nothing_to_real_ones():
    """Index tensors are shared by packs of the same lengths, but not with those of a FakeTensorMode."""
    for mode in (FakeTensorMode(), contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            data = torch.ones(7, 3)
            batch = PackedBatch.from_rows(data, [3, 4], lengths=(4,))
            assert type(batch.cu_seqlens) is type(batch.length_index) is type(data)
            shared = PackedBatch.from_rows(data, [3, 4], lengths=(4,))
        if type(data) is torch.Tensor:
            assert batch.cu_seqlens.tolist() == [0, 3, 7]
            assert shared.cu_seqlens is batch.cu_seqlens


def test_the_default_device_has_no_say():
    seqlens, data = (9, 3, 7), torch.zeros(21, 2)  # of no other test: layouts are kept
    with torch.device("meta"):
        batch = PackedBatch.from_rows(data, seqlens)
        layout = batch.layout(1)
    assert {t.device.type for t in (*layout[:3], batch.cu_seqlens, batch.length_index, batch.tiles)} == {"cpu"}
    assert layout.cu_seqlens.tolist() == [0, 10, 14, 22]


def test_prefix_tokens_do_not_count_for_the_length_index():
    batch = PackedBatch.from_list([randn(148 + 30, 2)], grids=[(37, 4)], n_prefix=30)
    assert batch.length_index.tolist() == [0]


def test_to_moves_every_tensor():
    batch = PackedBatch.from_list([randn(4, 2)]).to("meta")
    tensors = (batch.data, batch.cu_seqlens, batch.length_index, batch.tiles, batch.grid_hw)
    assert {t.device.type for t in tensors} == {"meta"}
    assert batch.seqlens == (4,)


def test_the_data_loader_of_torch_pins_every_tensor(pinned):
    normalization = torch.tensor([[0.5] * 3, [0.25] * 3])
    batch = PackedBatch.from_rows(randn(14, 12), [4, 9], normalization=normalization)
    for pin in (PackedBatch.pin_memory, torch_pin_memory, lambda b: torch_pin_memory({"images": (b, "a name")})):
        pinned.clear()
        got = pin(batch)
        got = got if isinstance(got, PackedBatch) else got["images"][0]
        copies = {id(original): copy for original, copy in pinned}
        tensors = {f.name for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}
        assert tensors == {"data", "cu_seqlens", "length_index", "grid_hw", "normalization"}
        assert len(pinned) == len(tensors)
        for f in fields(batch):
            if f.name in tensors:
                assert getattr(got, f.name) is copies[id(getattr(batch, f.name))], f.name
            else:
                assert getattr(got, f.name) is getattr(batch, f.name), f.name
        assert got.layout(1).cu_seqlens.tolist() == [0, 5, 15]


def test_a_pack_without_grids_is_pinned_too(pinned):
    got = PackedBatch.from_rows(randn(3, 2), [3]).pin_memory()
    assert got.grid_hw is got.normalization is None
    assert len(pinned) == 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PackedBatch.from_list([]), ValueError, "items: expected at least one"),
        (lambda: PackedBatch.from_list([randn(1, 2), [1]]), TypeError, r"items\[1\]: expected a tensor"),
        (lambda: PackedBatch.from_list([randn(1, 2), randn(1, 3)]), ValueError, r"items\[1\]: expected rows"),
        (lambda: PackedBatch.from_list([randn(1, 2), randn(1, 2).double()]), ValueError, r"items\[1\].*float64"),
        (lambda: PackedBatch.from_rows(randn(3, 2), [2, 2]), ValueError, "seqlens: 4 rows in all"),
        (lambda: PackedBatch.from_rows(randn(3, 2), [-1]), ValueError, "seqlens: .*negative, got -1"),
        (lambda: PackedBatch.from_rows([1], [1]), TypeError, "data: expected a tensor"),
        (lambda: PackedBatch.from_rows(randn(6, 2), [6], grids=[(2, 2)]), ValueError, "grids: sequence 0 has 6"),
        (lambda: PackedBatch.from_rows(randn(6, 2), [6], grids=[(2, 3), (1, 1)]), ValueError, "grids: expected 1"),
        (lambda: PackedBatch.from_rows(randn(6, 2), [6], lengths=(49, 100)), ValueError, "strictly decreasing"),
        (lambda: PackedBatch.from_images([], 16), ValueError, "images: expected at least one"),
        (lambda: PackedBatch.from_images([randn(3, 16, 17)], 16), ValueError, r"images\[0\]: .*16, got 16x17"),
        (lambda: PackedBatch.from_images([randn(3, 0, 16)], 16), ValueError, r"images\[0\]"),
        (lambda: PackedBatch.from_images([randn(16, 16)], 16), ValueError, r"images\[0\]: expected shape"),
        (lambda: PackedBatch.from_images([randn(3, 16, 16), randn(1, 16, 16)], 16), ValueError, r"images\[1\]"),
        (lambda: check_grids((7, 10)), ValueError, "strictly decreasing"),
        (lambda: check_grids(()), ValueError, "grids"),
        (lambda: check_grids(14), TypeError, "grids: expected a sequence"),
        (lambda: PackedBatch.from_rows(randn(6, 2), [6]).with_data(randn(5, 2)), ValueError, "data: expected 6 rows"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
