"""Modules on packed weights: the bits of the packed kernels, the plain module's results whatever is done to them."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, only_on, randn
from small_models import drawn
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from revit_fast.inference.packed_modules import PackedLinear, PackedMlp, PackedPatchEmbed, prepack
from revit_fast.layers import Attention, Mlp, PatchEmbed, Queries, make_activation
from revit_fast.layers.attention import outputs_of
from revit_fast.layers.patch_embed import FoldedEmbedding
from revit_fast.ops import _library
from revit_fast.ops.linear import pack_weight, packed_linear
from revit_fast.packing import PackPlan

pytestmark = [
    only_on("cpu", reason="about the CPU's packed weights"),
    pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the extension is not built"),
]


def ready(module):
    """The module as in an inference copy, with packed modules in the place of plain ones."""
    module = drawn(module).requires_grad_(False)
    prepack(module)
    return module


def linear(n_in=24, n_out=40, **options):
    holder = ready(nn.ModuleList([nn.Linear(n_in, n_out, **options)]))
    assert type(holder[0]) is PackedLinear
    return holder[0]


def mlp(dim=24, hidden=40, act="gelu", **options):
    module = ready(Mlp(dim, hidden, make_activation(act), **options))
    assert type(module) is PackedMlp
    return module


def runs_packed(module, x):
    """Whether a call derives packed weights of the module itself."""
    module._packed.refresh()
    module(x)
    return bool(module._packed.value)


def plain(module):
    """A copy that computes as before packing."""
    same = copy.deepcopy(module)
    for part in same.modules():
        if "stands_for" in vars(type(part)):
            part.__class__ = type(part).stands_for
    return same


def close(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol)


class TestLinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("n_in", "n_out"), [(24, 40), (7, 1), (1, 50), (257, 101)])
    def test_bits_are_those_of_the_packed_kernel(self, isa, bias, n_in, n_out):
        layer, x = linear(n_in, n_out, bias=bias), randn(50, n_in)
        got = layer(x)
        assert torch.equal(got, packed_linear(x, pack_weight(layer.weight, layer.bias)))
        close(got, F.linear(x, layer.weight, layer.bias))

    @pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (0, 24), (1, 24), (2, 0, 24)])
    def test_any_number_of_axes(self, shape):
        layer = linear()
        x = randn(*shape)
        close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer(x).shape == (*shape[:-1], 40)

    def test_rows_are_the_same_bits_in_every_batch(self, isa):
        layer, x = linear(), randn(300, 24)
        assert torch.equal(torch.cat([layer(rows) for rows in x.split(7)]), layer(x))

    def test_a_part_of_the_outputs(self, isa):
        layer, x = linear(), randn(5, 24)
        for part in (slice(0, 8), slice(8, None), slice(None)):
            weight = pack_weight(layer.weight[part], layer.bias[part])
            assert torch.equal(outputs_of(layer)(x, part), packed_linear(x, weight))
        wide = layer.double()
        close(outputs_of(wide)(x.double(), slice(3, 9)), wide(x.double())[:, 3:9])

    def test_other_dtypes_and_devices_are_the_plain_layers(self):
        layer, x = linear(), randn(5, 24)
        layer(x)
        assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
        assert layer.to("meta")(x.to("meta")).device.type == "meta"
        with pytest.raises(RuntimeError):
            linear()(x.double())
        with pytest.raises(RuntimeError):
            linear()(randn(5, 23))
        narrow = linear().bfloat16()
        assert torch.equal(narrow(x.bfloat16()), F.linear(x.bfloat16(), narrow.weight, narrow.bias))

    def test_gradients_flow(self):
        layer, x = linear(), randn(5, 24).requires_grad_()
        layer(x).sum().backward()
        close(x.grad, layer.weight.sum(0).expand_as(x))
        layer.requires_grad_(True)
        layer(x).sum().backward()
        close(layer.bias.grad, torch.full((40,), 5.0))
        with torch.no_grad():
            assert runs_packed(layer, x)

    def test_a_weight_that_is_computed_anew_is_not_packed_for_every_call(self):
        x = randn(5, 24)
        for change in ("pruned", "a parametrisation", "weight norm", "spectral norm"):
            layer = linear()
            CHANGES[change](layer)
            assert not runs_packed(layer, x), change
        layer, others = linear(), {"weight": randn(40, 24, seed=9), "bias": randn(40)}
        close(torch.func.functional_call(layer, others, x), F.linear(x, **others))
        assert not layer._packed.value

    def test_autocast_acts(self):
        layer, x = linear(), randn(5, 24)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16

    def test_compiled_code_has_the_plain_layer(self):
        layer, x = linear(), randn(5, 24)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), F.linear(x, layer.weight, layer.bias))

    def test_without_the_extension(self, monkeypatch):
        layer, x = linear(), randn(5, 24)
        monkeypatch.setattr(_library, "HAS_EXTENSION", False)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))

    def test_tensors_of_inference_mode(self):
        x = randn(5, 24)
        with torch.inference_mode():
            layer = linear()
            first = layer(x)
            close(first, F.linear(x, layer.weight, layer.bias))
            layer.weight = nn.Parameter(randn(40, 24, seed=5), requires_grad=False)
            close(layer(x), F.linear(x, layer.weight, layer.bias))
            layer.weight.mul_(2)
            close(layer(x), F.linear(x, layer.weight, layer.bias))
        outside = linear()
        with torch.inference_mode():
            expected = outside(x)
        assert torch.equal(outside(x), expected), "what was packed there serves here"

    def test_another_instruction_set_packs_again(self):
        layer, x = linear(), randn(5, 24)
        before = _library.cpu_isa()
        try:
            for isa in _library.cpu_isas():
                torch.ops.revit_fast.select_cpu_isa(isa)
                close(layer(x), F.linear(x, layer.weight, layer.bias))
        finally:
            torch.ops.revit_fast.select_cpu_isa(before)


def doubled(kind):
    """A subclass that computes something else."""
    return type("Doubled", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "of the bias": lambda layer: layer.bias.add_(1),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": randn(40, 24, seed=7), "bias": randn(40)}),
    "assigned": lambda layer: layer.load_state_dict({"weight": randn(40, 24, seed=7), "bias": randn(40)}, assign=True),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(randn(40, 24, seed=8), False)),
    "without bias": lambda layer: setattr(layer, "bias", None),
    "new data": lambda layer: setattr(layer.weight, "data", randn(40, 24, seed=8)),
    "a hook": lambda layer: layer.register_forward_hook(lambda module, args, output: output * 1.5),
    "a pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, args: args[0] * 1.5),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "a parametrisation": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "weight norm": lambda layer: parametrizations.weight_norm(layer).parametrizations.weight.original0.data.mul_(1.3),
    "weight norm by a hook": lambda layer: nn.utils.weight_norm(layer).weight_g.data.mul_(1.3),
    "spectral norm": lambda layer: nn.utils.spectral_norm(layer),
    "a forward of its own": lambda layer: setattr(layer, "forward", lambda x: F.linear(x, layer.weight) * 3),
    "a subclass": lambda layer: setattr(layer, "__class__", doubled(type(layer))),
}
"""What may be done to a linear layer of 24 inputs and 40 outputs."""


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
class TestChanges:
    """After a change a packed module computes what the plain one does, whenever the change is made."""

    @staticmethod
    def make(change, layer):
        torch.manual_seed(0)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)
            change(layer)

    @pytest.mark.parametrize("called", [True, False], ids=["after a call", "before the first call"])
    def test_of_a_packed_layer(self, change, called):
        layer, x = linear(), randn(5, 24)
        unchanged = layer(x) if called else plain(layer)(x)
        expected = plain(layer)
        for one in (layer, expected):
            self.make(change, one)
        with torch.no_grad():
            assert not torch.allclose(expected(x), unchanged, atol=1e-3), "it must do something"
            close(layer(x), expected(x))
            close(layer(x), expected(x))

    def test_before_packing(self, change):
        expected = drawn(nn.Linear(24, 40)).requires_grad_(False)
        self.make(change, expected)
        holder, x = nn.ModuleList([copy.deepcopy(expected)]), randn(5, 24)
        prepack(holder)
        with torch.no_grad():
            close(holder[0](x), expected(x))

    def test_of_an_mlps_first_layer(self, change):
        module, x = mlp(), randn(5, 24)
        module(x)
        expected = plain(module)
        for one in (module, expected):
            self.make(change, one.fc1)
        with torch.no_grad():
            close(module(x), expected(x))


class TestMlp:
    @pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "relu", "quick_gelu"])
    @pytest.mark.parametrize("hidden", [40, 1024])
    def test_bits_are_those_of_the_packed_kernels(self, isa, act, hidden):
        """A hidden width that is a multiple of 1,024 has zeros more, which change no sum."""
        module, x = mlp(hidden=hidden, act=act), randn(50, 24)
        fc1, fc2 = (pack_weight(layer.weight, layer.bias) for layer in (module.fc1, module.fc2))
        got = module(x)
        expected = packed_linear(packed_linear(x, fc1, act), fc2)
        error = (got - expected).abs().max() / expected.abs().max()
        assert error == 0 if hidden == 40 else error <= 1e-6
        assert module._packed.value[0].n_out == (40 if hidden == 40 else 1056)
        assert_as_accurate(got, plain(module)(x), plain(module).double()(x.double()))

    def test_an_activation_without_a_kernel_leaves_packed_layers(self):
        module, x = ready(Mlp(24, 40, nn.Softsign())), randn(5, 24)
        close(module(x), plain(module)(x))
        assert module._packed.value is None
        assert module.fc1._packed.value
        assert module.fc2._packed.value

    @pytest.mark.parametrize("part", ["fc1", "act", "fc2", "drop"])
    def test_hooks_of_parts_run(self, part):
        module, x, seen = mlp(), randn(5, 24), []
        assert runs_packed(module, x)
        handle = getattr(module, part).register_forward_hook(lambda *args: seen.append(part))
        assert not runs_packed(module, x)
        assert seen
        handle.remove()
        assert runs_packed(module, x)

    def test_hooks_that_write_down_the_time_do_not_pack_again(self):
        module, x = mlp(), randn(5, 24)
        module(x)
        weights, n_calls = module._packed.value, iter(range(9))
        module.register_forward_hook(lambda module, *_: setattr(module, "n_calls", next(n_calls)))
        for _ in range(3):
            module(x)
        assert module.n_calls == 2
        assert module._packed.value is weights

    def test_replaced_parts_are_called(self):
        module, x = mlp(), randn(5, 24)
        module(x)
        for part, other in (("act", nn.Tanh()), ("fc2", drawn(nn.Linear(40, 24))), ("drop", nn.Identity())):
            setattr(module, part, other.requires_grad_(False))
            close(module(x), plain(module)(x))
        module.fc1 = nn.Sequential(module.fc1, nn.ReLU())
        close(module(x), plain(module)(x))

    def test_dropout_in_training_acts(self):
        module, x = mlp(drop=0.5), randn(5, 24)
        module(x)
        module.drop.train()
        torch.manual_seed(0)
        got = module(x)
        torch.manual_seed(0)
        close(got, plain(module)(x))
        assert not torch.allclose(got, module.eval()(x))


class TestPatchEmbed:
    def make(self):
        module = ready(PatchEmbed(2, 3, 24, (4, 4)))
        assert type(module) is PackedPatchEmbed
        return module

    def test_bits_are_those_of_the_packed_kernel(self, isa):
        module, rows = self.make(), randn(50, 12)
        assert torch.equal(module(rows), packed_linear(rows, pack_weight(*module.matrix())))
        close(module(rows.double()), plain(module)(rows))

    def test_normalisation_is_folded_in_by_value(self, isa):
        module = self.make()
        rows = torch.randint(0, 256, (50, 12), dtype=torch.uint8)
        for shift in (0.0, 0.1, 0.0):
            normalization = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.1]]) + shift
            expected = packed_linear(rows.float(), pack_weight(*module.fold(normalization)))
            assert torch.equal(module(rows, normalization), expected)
            kept = list(module._packed.value)
            assert torch.equal(module(rows, normalization.clone()), expected)
            assert list(module._packed.value) == kept
            assert len(kept) == 1, "the last one is kept"
            close(module(rows, normalization), plain(module)(rows, normalization), atol=1e-4)
        folded = module.fold(normalization)
        assert isinstance(folded, FoldedEmbedding)
        close(module(rows, folded), expected, atol=1e-4)

    @pytest.mark.parametrize("change", ["in place", "replaced", "hook", "pruned", "adapter", "double", "bias"])
    def test_changes(self, change):
        module, rows = self.make(), randn(5, 12)
        raw, normalization = torch.randint(0, 256, (5, 12), dtype=torch.uint8), torch.tensor([[0.4] * 3, [0.2] * 3])
        before = module(rows), module(raw, normalization)
        if change == "in place":
            module.proj.weight.mul_(2)
        elif change == "replaced":
            module.proj = drawn(nn.Conv2d(3, 24, 2, 2), 0.5).requires_grad_(False)
        elif change == "hook":
            module.proj.register_forward_hook(lambda module, args, output: output * 2)
        elif change == "pruned":
            prune.l1_unstructured(module.proj, "weight", amount=0.5)
        elif change == "adapter":
            module.proj = nn.Sequential(module.proj, nn.Tanh())
        elif change == "double":
            module.double()
        else:
            module.proj.bias = None
        same = plain(module)
        with torch.no_grad():
            for got, expected, old in (
                (module(rows), same(rows), before[0]),
                (module(raw, normalization), same(raw, normalization), before[1]),
            ):
                close(got, expected, atol=1e-4)
                assert change == "double" or not torch.allclose(got, old, atol=1e-3)


class TestAttention:
    """Queries of few rows: two packed weights, one for the queries and one for keys and values."""

    layout = PackPlan.of([4, 5], (4,), grids=[(2, 2), (1, 5)]).layout("cpu")
    queries = Queries(torch.tensor([0, 4]), PackPlan((1, 1), (0, 0)).layout("cpu"))

    def test_of_plain_layers(self, isa):
        module, x = ready(Attention(24, 3, 8)), randn(9, 24)
        assert torch.equal(module(x, self.layout, self.queries), module(x, self.layout)[[0, 4]])
        assert set(module.qkv._packed.value) == {(0, 24), (24, None), (None, None)}
        close(module(x, self.layout, self.queries), plain(module)(x, self.layout, self.queries))

    def test_hooks_and_other_layers_are_called(self):
        for change in (
            lambda m: m.qkv.register_forward_hook(lambda module, args, output: output * 1.5),
            lambda m: setattr(m, "qkv", nn.Sequential(m.qkv, nn.Tanh())),
            lambda m: parametrize.register_parametrization(m.qkv, "weight", nn.Tanh()),
            lambda m: CHANGES["a subclass"](m.qkv),
            lambda m: prune.l1_unstructured(m.qkv, "weight", amount=0.5),
            lambda m: m.qkv.weight.mul_(2),
        ):
            module, x = ready(Attention(24, 3, 8)), randn(9, 24)
            before = module(x, self.layout, self.queries)
            expected = plain(module)
            with torch.no_grad():
                change(module)
                change(expected)
                got = module(x, self.layout, self.queries)
                close(got, expected(x, self.layout, self.queries))
            assert not torch.allclose(got, before, atol=1e-4)


class TestPrepack:
    def make(self):
        return nn.Sequential(nn.Linear(8, 8), Mlp(8, 12, nn.GELU()), nn.Sequential(nn.Linear(8, 3)))

    def test_names_and_values_stay(self):
        module = drawn(self.make()).requires_grad_(False)
        before, x = copy.deepcopy(module.state_dict()), randn(5, 8)
        expected = module(x)
        prepack(module)
        assert [type(part) for part in (module[0], module[1], module[1].fc1, module[2][0])] == [
            PackedLinear,
            PackedMlp,
            PackedLinear,
            PackedLinear,
        ]
        close(module(x), expected)
        assert list(module.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        module.load_state_dict({name: 2 * value for name, value in before.items()})
        same = self.make().eval()
        same.load_state_dict(module.state_dict())
        close(module(x), same(x).detach(), atol=1e-4)

    def test_copies_and_pickles_hold_the_parameters_alone(self):
        module, x = ready(self.make()), randn(5, 8)
        size = len(pickle.dumps(module))
        expected = module(x)
        assert len(pickle.dumps(module)) == size
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert other[0]._packed.value is None
            assert torch.equal(other(x), expected)
            with torch.no_grad():
                other[0].weight.mul_(3)
            assert not torch.equal(other(x), expected)
            assert torch.equal(module(x), expected)

    def test_what_is_not_plain_stays(self):
        module = self.make()
        module[0].register_forward_hook(print)
        module[1].forward = lambda x: x
        parametrize.register_parametrization(module[2][0], "weight", nn.Tanh())
        prepack(module)
        assert type(module[0]) is nn.Linear
        assert type(module[1]) is Mlp
        assert not isinstance(module[2][0], PackedLinear)
        assert type(module[1].fc1) is PackedLinear

    def test_threads_may_call_it_while_weights_change(self):
        """A result is that of the old weights or of the new ones."""
        module, x, stop = ready(nn.Sequential(nn.Linear(64, 64))), randn(20, 64), threading.Event()
        weights = [randn(64, 64, seed=i) for i in range(2)]
        results, got = [], []
        for weight in weights:
            module[0].weight.copy_(weight)
            results.append(module(x))

        def call():
            while not stop.is_set():
                got.append(module(x))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(50):
            module[0].weight = nn.Parameter(weights[i % 2], requires_grad=False)
        stop.set()
        for thread in threads:
            thread.join()
        assert got
        assert all(any(torch.equal(one, result) for result in results) for one in got)
