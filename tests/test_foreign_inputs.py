"""Tensors and tracers that the package cannot serve are refused by name, with what to use; nested images are lists."""

import io

import pytest
import torch
from helpers import cu_seqlens_of, only_on, randn
from small_models import images_of, make_model
from test_transforms import OPS
from torch.nested import nested_tensor

import revit_fast as rf
from revit_fast import ops
from revit_fast.packing import PackedBatch
from revit_fast.video import engine
from revit_fast.video.model import TimeSformer

pytestmark = [
    only_on("cpu", reason="checks of the host"),
    pytest.mark.filterwarnings("ignore:.*(nested|jagged|Masked|prototype|sparse|jit|onnx|legacy).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
CU_SEQLENS = cu_seqlens_of((4, 0, 3))


class Distributed(torch.Tensor):
    """Has the methods of a DTensor that the message names."""

    full_tensor = to_local = torch.Tensor.detach


FOREIGN = {
    "sparse": (lambda x: x.to_sparse(), r"a tensor of layout torch.sparse_coo; give {}.to_dense\(\)"),
    "sparse rows": (
        lambda x: x.flatten(1).to_sparse_csr(),
        r"a tensor of layout torch.sparse_csr; give {}.to_dense\(\)",
    ),
    "onednn": (lambda x: x.to_mkldnn(), r"a tensor of layout torch._mkldnn; give {}.to_dense\(\)"),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), r"a masked tensor; give {}.to_tensor"),
    "distributed": (lambda x: x.as_subclass(Distributed), r"a distributed tensor; give {}.to_local\(\)"),
    "nested": (lambda x: nested_tensor(list(x.split(4))), r"a nested tensor; give torch.cat\({}.unbind\(\)\)"),
    "jagged": (lambda x: nested_tensor(list(x.split(4)), layout=torch.jagged), r"a nested tensor; give {}.values\(\)"),
}
MODELS = {
    "model": lambda model: model,
    "fused": rf.optimize,
    "modules": lambda model: rf.optimize(model, engine="modules"),
}
OF_HEADS = ("varlen_attention", "rotary", "rotary of learned angles")
every_model = pytest.mark.parametrize("kind", MODELS)


class TestOps:
    @pytest.mark.parametrize("foreign", FOREIGN)
    @pytest.mark.parametrize("name", [n for n in OPS if n not in OF_HEADS and n != "tal_layer_norm_residual"])
    def test_rows(self, name, foreign):
        make, message = FOREIGN[foreign]
        with pytest.raises(TypeError, match=r"^\w+: expected a plain tensor, got " + message.format(r"\w+")):
            OPS[name](make(randn(7, 8)))

    @pytest.mark.parametrize("foreign", [name for name in FOREIGN if name != "sparse rows"])
    def test_heads(self, foreign):
        make, message = FOREIGN[foreign]
        q, foreign_q = randn(7, 2, 4), make(randn(7, 2, 4))
        for name, args in (("q", (foreign_q, q, q)), ("v", (q, q, foreign_q))):
            with pytest.raises(TypeError, match=f"^{name}: expected a plain tensor, got " + message.format(name)):
                ops.varlen_attention(*args, CU_SEQLENS)
        angle, foreign_angle = randn(7, 2, 2), make(randn(7, 2, 2))
        for name, args in (
            ("q", (foreign_q, q, angle, angle)),
            ("k", (q, foreign_q, angle, angle)),
            ("cos", (q, q, foreign_angle, angle)),
            ("sin", (q, q, angle, foreign_angle)),
        ):
            with pytest.raises(TypeError, match=f"^{name}: expected a plain tensor, got " + message.format(name)):
                ops.rotary(*args)

    def test_indices_and_weights(self):
        with pytest.raises(TypeError, match=r"^cu_seqlens: expected a plain tensor"):
            ops.mean_pool(randn(7, 8), CU_SEQLENS.to_sparse())
        with pytest.raises(TypeError, match=r"^weight: expected a plain tensor"):
            ops.pack_weight(randn(4, 8).to_sparse())
        pixels = torch.zeros(4, 4, 3, dtype=torch.uint8)
        with pytest.raises(TypeError, match=r"^images\[1\]: expected a plain tensor"):
            ops.resize_patchify([pixels, pixels.to_sparse()], 4, 2)

    def test_a_nested_tensor_is_what_its_message_says(self):
        parts = [randn(4, 2, 4), randn(3, 2, 4, seed=1)]
        nested = nested_tensor(parts, layout=torch.jagged)
        q, cu_seqlens = nested.values(), nested.offsets().to(torch.int32)
        expected = ops.varlen_attention(*(torch.cat(parts),) * 3, cu_seqlens_of((4, 3)))
        assert torch.equal(ops.varlen_attention(q, q, q, cu_seqlens), expected)


class TestModels:
    @every_model
    @pytest.mark.parametrize("foreign", ["sparse", "onednn", "masked", "distributed"])
    def test_images(self, kind, foreign):
        make, message = FOREIGN[foreign]
        model, image = MODELS[kind](make_model(depth=1)), images_of([4])[0]
        with pytest.raises(TypeError, match=r"^x: expected a plain tensor, got " + message.format("x")):
            model(make(image[None]))
        with pytest.raises(TypeError, match=r"^images\[1\]: expected a plain tensor, got "):
            model([image, make(image)])

    @every_model
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_pixels_that_are_no_floats(self, kind, dtype):
        """They would be taken for normalised pixels; of complex numbers the imaginary part would be lost."""
        model, image = MODELS[kind](make_model(depth=1)), images_of([4])[0].to(dtype)
        for name, x in (("x", image[None]), (r"images\[0\]", [image]), ("x", PackedBatch.from_images([image], 2))):
            message = "normalization" if dtype == torch.uint8 and isinstance(x, PackedBatch) else f"got {dtype}; "
            with pytest.raises((TypeError, ValueError), match=f"^{name}: .*{message}"):
                model(x)

    @pytest.mark.parametrize("kind", ["model", "fused", "modules"])
    @pytest.mark.parametrize("pool", ["token", ""])
    def test_nested_images_are_a_list(self, kind, pool):
        model = MODELS[kind](make_model(global_pool=pool))
        images = images_of([6, (3, 5), 2])
        nested = nested_tensor(images)
        assert torch.equal(model(nested), model(images))
        assert torch.equal(model.forward_features(nested).data, model.forward_features(images).data)
        for ours, theirs in zip(*(model.forward_intermediates(x)[1][0] for x in (nested, images)), strict=True):
            assert torch.equal(ours, theirs)

    def test_gradients_of_nested_images(self):
        model, images = make_model(depth=1), images_of([4, 2])
        nested = nested_tensor(images, requires_grad=True)
        model(nested).sum().backward()
        ours = [g.clone() for g in nested.grad.unbind()]
        leaves = [image.requires_grad_() for image in images]
        model(leaves).sum().backward()
        assert all(torch.equal(a, b.grad) for a, b in zip(ours, leaves, strict=True))

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    def test_packs_of_nested_rows(self, layout):
        parts = [randn(4, 12), randn(16, 12, seed=1)]
        pack = PackedBatch.from_list(nested_tensor(parts, layout=layout))
        assert torch.equal(pack.data, torch.cat(parts))
        assert pack.seqlens == (4, 16)
        with pytest.raises(TypeError, match=r"^items\[0\]: expected a plain tensor"):
            PackedBatch.from_list([parts[0].to_sparse()])
        with pytest.raises(TypeError, match=r"^data: expected a plain tensor, got a nested tensor"):
            PackedBatch.from_rows(nested_tensor(parts, layout=layout), [4, 16])


def clip_model():
    return TimeSformer(
        grids=(2,), base_grid=(2, 2), num_frames=2, patch_size=2, num_classes=4, embed_dim=12, depth=1, num_heads=2
    ).eval()


@pytest.mark.parametrize("kind", [lambda m: m, engine.optimize])
def test_clips(kind):
    model, clips = kind(clip_model()), [randn(2, 3, 4, 4), randn(1, 3, 4, 4, seed=1)]
    assert torch.equal(model(nested_tensor(clips)), model(clips))
    with pytest.raises(TypeError, match=r"^x: expected a plain tensor"):
        model(clips[0][None].to_sparse())
    with pytest.raises(TypeError, match=r"^x: expected pixels in float32, .* got torch.int64; convert them"):
        model(clips[0][None].long())
    with pytest.raises(
        NotImplementedError, match=r"torch.jit.trace would keep the lengths of its example; for a ReViT"
    ):
        torch.jit.trace(model, clips[0][None])
    with pytest.raises(NotImplementedError, match=r"TimeSformer: torch.jit.script cannot compile it; for a ReViT"):
        torch.jit.script(model)


class TestPrograms:
    @every_model
    def test_of_torchscript(self, kind):
        """A trace would be wrong, without a word, for images of another grid that give as many rows."""
        model, x = MODELS[kind](make_model(depth=1)), torch.stack(images_of([4, 4]))
        with pytest.raises(NotImplementedError, match=r"torch.jit.trace would keep .* export_single\(model, grid\)"):
            torch.jit.trace(model, x)
        with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile it; .* export_packed\(model\)"):
            torch.jit.script(model)
        with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile it; "):
            torch.jit.script(torch.nn.Sequential(model))

    @pytest.mark.parametrize("name", OPS)
    def test_of_an_op(self, name):
        with pytest.raises(NotImplementedError, match=f"^revit_fast::{name.split()[0]}: torch.jit.trace would keep"):
            torch.jit.trace(OPS[name], randn(7, 8))

    @every_model
    def test_of_torch_fx(self, kind):
        with pytest.raises(NotImplementedError, match=r"torch.fx would trace into patch_embed, blocks.0, norm, which"):
            torch.fx.symbolic_trace(MODELS[kind](make_model(depth=1)))

    @every_model
    def test_of_onnx(self, kind):
        pytest.importorskip("onnx")
        model, x = MODELS[kind](make_model(depth=1)), torch.stack(images_of([4, 4]))
        with pytest.raises(
            NotImplementedError, match=r"torch.onnx.export has no ONNX .* write_single_onnx\(model, gri"
        ):
            torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)

    def test_of_onnx_by_dynamo(self):
        pytest.importorskip("onnxscript")
        with pytest.raises(
            torch.onnx.errors.OnnxExporterError, match=r"write_single_onnx\(model, grid, path, "
        ) as caught:
            torch.onnx.export(make_model(depth=1), (images_of([4])[0][None],), io.BytesIO(), dynamo=True, verbose=False)
        assert isinstance(caught.value.__cause__, NotImplementedError)

    def test_the_assigners_trace_is_right_for_other_thumbnails(self):
        tla = rf.TokenLengthAssigner((4, 2), thumbnail_px=16, widths=(8, 16)).eval()
        traced = torch.jit.trace(tla, randn(2, 3, 16, 16))
        others = randn(5, 3, 16, 16, seed=1)
        assert torch.equal(traced(others), tla(others))
        with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile it; use torch.jit.trace\(tla"):
            torch.jit.script(tla)
