"""What is derived from parameters follows them in every thread, and no call sees a model that is half changed."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import randn
from small_models import MIX, images_of, make_model
from torch import nn

import revit_fast as rf
from revit_fast.deploy import export
from revit_fast.inference.inference_copy import Turns
from revit_fast.layers.derived import Derived
from revit_fast.ops import _library


def doubled(linear):
    return linear.weight * 2


def fails_once(linear, calls=[]):  # noqa: B006
    calls.append(1)
    if len(calls) == 1:
        raise OSError("no memory")
    return calls


class TestDerived:
    def test_it_is_made_once_and_anew_when_its_source_changes(self):
        linear, derived = nn.Linear(3, 2), Derived(doubled)
        assert derived.value is None
        first = derived.get(linear)
        assert derived.get(linear) is first
        assert not first.requires_grad
        changes = [
            lambda: linear.weight.data.__setitem__(0, 7.0) or derived.refresh(),
            lambda: linear.weight.detach().mul_(3),
            lambda: setattr(linear, "weight", nn.Parameter(randn(2, 3))),
            lambda: setattr(linear.weight, "data", randn(2, 3, seed=5)),
            lambda: linear.register_forward_hook(lambda *a: None),
            lambda: linear.bfloat16(),
        ]
        for i, change in enumerate(changes):
            before = derived.get(linear)
            change()
            assert derived.get(linear) is not before, i
            assert torch.equal(derived.get(linear), 2 * linear.weight), i

    def test_another_source_has_another_value(self):
        derived, one, other = Derived(doubled), nn.Linear(3, 2), nn.Linear(3, 2)
        assert torch.equal(derived.get(one), 2 * one.weight)
        assert torch.equal(derived.get(other), 2 * other.weight)

    @pytest.mark.skipif(len(_library.cpu_isas()) < 2, reason="needs two instruction sets")
    def test_another_instruction_set_has_another_value(self):
        derived, linear = Derived(doubled), nn.Linear(3, 2)
        first, isa = derived.get(linear), _library.cpu_isa()
        try:
            torch.ops.revit_fast.select_cpu_isa(_library.cpu_isas()[1])
            assert derived.get(linear) is not first
        finally:
            torch.ops.revit_fast.select_cpu_isa(isa)

    def test_a_write_through_data_leaves_no_trace(self):
        """As documented. If PyTorch ever counts such writes, the documentation of `optimize` can say so."""
        derived, linear = Derived(doubled), nn.Linear(3, 2)
        first = derived.get(linear)
        linear.weight.data.add_(1)
        assert derived.get(linear) is first
        derived.refresh()
        assert torch.equal(derived.get(linear), 2 * linear.weight)

    def test_copies_and_pickles_keep_the_maker_alone(self):
        derived, linear = Derived(doubled), nn.Linear(3, 2)
        derived.get(linear)
        for other in (copy.deepcopy(derived), pickle.loads(pickle.dumps(derived))):
            assert other.value is None
            assert torch.equal(other.get(linear), derived.get(linear))

    def test_a_value_made_in_inference_mode_serves_outside(self):
        derived, linear = Derived(doubled), nn.Linear(3, 2)
        with torch.inference_mode():
            assert not derived.get(linear).is_inference()

    def test_a_maker_that_failed_is_asked_again(self):
        derived, linear = Derived(fails_once), nn.Linear(3, 2)
        with pytest.raises(OSError, match="no memory"):
            derived.get(linear)
        assert derived.get(linear) == [1, 1]

    def test_inference_tensors_are_refused_by_name(self):
        with torch.inference_mode():
            linear, norm = nn.Linear(3, 2), nn.BatchNorm1d(3)
        with pytest.raises(ValueError, match=r"parameter weight was made under torch.inference_mode\(\)"):
            Derived(doubled).get(linear)
        norm.weight, norm.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        with pytest.raises(ValueError, match="buffer running_mean was made"):
            Derived(doubled).get(norm)

    def test_threads_make_it_once(self):
        made, gate = [], threading.Barrier(8)

        def slowly(linear):
            made.append(1)
            threading.Event().wait(0.02)
            return linear.weight * 2

        derived, linear = Derived(slowly), nn.Linear(3, 2)

        def job(_):
            gate.wait()
            return derived.get(linear)

        with ThreadPoolExecutor(8) as pool:
            values = list(pool.map(job, range(8)))
        assert len(made) == 1
        assert all(value is values[0] for value in values)


class TestTurns:
    def test_a_change_waits_for_calls_and_later_calls_for_the_change(self):
        turns, order = Turns(), []
        inside, leave, waiting = threading.Event(), threading.Event(), threading.Event()

        def long_call():
            with turns.call(), turns.call():
                inside.set()
                leave.wait(10)
                order.append("call")

        def change():
            waiting.set()
            with turns.change():
                order.append("change")

        def later():
            with turns.call():
                order.append("later")

        threads = [threading.Thread(target=job) for job in (long_call, change, later)]
        threads[0].start()
        assert inside.wait(10)
        threads[1].start()
        assert waiting.wait(10)
        while not turns._changes:  # until the change is waiting
            pass
        threads[2].start()
        leave.set()
        for thread in threads:
            thread.join(10)
        assert order == ["call", "change", "later"]

    def test_a_change_may_call_and_a_call_may_not_change(self):
        turns = Turns()
        with turns.change(), turns.change(), turns.call():
            pass
        with turns.call(), pytest.raises(RuntimeError, match="change it after the call"), turns.change():
            pass
        with turns.call(), turns.call():
            assert turns._running == 1
        assert turns._running == turns._changes == 0

    def test_an_error_ends_the_turn(self):
        turns = Turns()
        for turn in (turns.call, turns.change):
            with pytest.raises(OSError, match="x"), turn():
                raise OSError("x")
        with turns.change(), turns.call():
            pass


class TestCopies:
    @pytest.mark.parametrize("make", [rf.optimize, copy.deepcopy, lambda m: m.to(torch.float64).to(torch.float32)])
    def test_a_copy_made_in_inference_mode_follows_a_reload(self, make):
        model = make_model()
        new = {name: 1.5 * value for name, value in model.state_dict().items()}
        fast = rf.optimize(model)
        with torch.inference_mode():
            fast = make(fast)
            fast(images_of(MIX))
            fast.load_state_dict(new)
            got = fast(images_of(MIX))
        model.load_state_dict(new)
        assert torch.equal(got, rf.optimize(model)(images_of(MIX)))

    def test_a_model_made_in_inference_mode_is_copied_and_assigned_tensors_are_refused(self):
        with torch.inference_mode():
            model = make_model()
            fast = rf.optimize(model)
            expected = model(images_of(MIX))
            torch.testing.assert_close(fast(images_of(MIX)), expected, rtol=1e-4, atol=1e-5)
            state = {name: value.clone() for name, value in model.state_dict().items()}
        fast.load_state_dict(state, assign=True)
        with pytest.raises(ValueError, match=r"the parameter .* was made under torch.inference_mode"):
            fast(images_of(MIX))

    def test_refresh_follows_writes_through_data(self):
        model = make_model()
        fast = rf.optimize(model)
        fast(images_of(MIX))
        for m in (model, fast):
            for parameter in m.parameters():
                parameter.data.mul_(1.25)
        fast.refresh()
        assert torch.equal(fast(images_of(MIX)), rf.optimize(model)(images_of(MIX)))

    def test_an_assigner_loaded_in_inference_mode_works(self, tmp_path):
        images = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8) for i in range(3)]
        assigner = rf.TokenLengthAssigner((6, 4, 2)).eval()
        assigner.save(tmp_path / "a.safetensors")
        with torch.inference_mode():
            loaded = rf.TokenLengthAssigner.load(tmp_path / "a.safetensors")
            assert torch.equal(loaded.predict_proba(images), assigner.predict_proba(images))


class TestWithoutWeights:
    """keep_weights=False: half the memory, and names for what is then refused."""

    @pytest.fixture
    def model(self):
        return make_model(embed_dim=48, num_heads=3)

    @pytest.mark.skipif(not _library.HAS_EXTENSION, reason="needs the C++ extension")
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
    def test_same_bits_and_little_left(self, model, dtype):
        fast, small = rf.optimize(model, dtype), rf.optimize(model, dtype, keep_weights=False)
        batch = fast.pack(images_of(MIX))
        assert torch.equal(small(batch), fast(batch))
        assert torch.equal(small.forward_features(batch).data, fast.forward_features(batch).data)
        kept, all_of_them = (
            sum(p.nbytes for name, p in m.named_parameters() if name.startswith("blocks.") and not p.is_meta)
            for m in (small, fast)
        )
        assert kept < 0.1 * all_of_them
        assert small.spec == fast.spec

    @pytest.mark.skipif(not _library.HAS_EXTENSION, reason="needs the C++ extension")
    def test_what_needs_weights_is_refused_by_name(self, model, tmp_path):
        small = rf.optimize(model, keep_weights=False)
        x = images_of(MIX)
        small(x)
        for needs in (
            lambda: small.forward_intermediates(x),
            lambda: small.state_dict(),
            lambda: small.load_state_dict(model.state_dict()),
            lambda: small.save_pretrained(tmp_path / "model"),
            lambda: small.to(torch.bfloat16),
            lambda: small.float(),
            lambda: small.refresh(),
            lambda: copy.deepcopy(small),
            lambda: pickle.dumps(small),
            lambda: torch.compile(small, backend="eager")(torch.stack(images_of([6, 6]))),
        ):
            with pytest.raises(RuntimeError, match="this copy has dropped them"):
                needs()
        for needs in (lambda: rf.optimize(small), lambda: export.export_single(small, 6)):
            with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight has no values"):
                needs()
        assert torch.equal(small(x), rf.optimize(model)(x)), "a refused call changes nothing"

    @pytest.mark.skipif(len(_library.cpu_isas()) < 2, reason="needs two instruction sets")
    def test_another_instruction_set_is_refused(self, model):
        small, isa = rf.optimize(model, keep_weights=False), _library.cpu_isa()
        try:
            torch.ops.revit_fast.select_cpu_isa(_library.cpu_isas()[1])
            with pytest.raises(RuntimeError, match=f"packed for {isa}"):
                small(images_of(MIX))
        finally:
            torch.ops.revit_fast.select_cpu_isa(isa)
        small(images_of(MIX))

    def test_it_is_for_fused_copies_alone(self, model):
        with pytest.raises(ValueError, match="keep_weights: only a copy that runs fused"):
            rf.optimize(model.double(), keep_weights=False)


class TestManyThreads:
    """Eight threads run everything that derives, and another reloads: each result is the old or the new model's."""

    @pytest.fixture(autouse=True)
    def one_thread_each(self):
        """PyTorch's matrix products, which eager code and position tables use, round by their number of threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    def test_forwards_features_pipelines_and_reloads(self):
        model = make_model(embed_dim=32, num_heads=2)
        states = [{n: factor * v for n, v in model.state_dict().items()} for factor in (1.0, 1.25)]
        generator = np.random.default_rng(0)
        photographs = [
            generator.integers(0, 256, (int(h), int(w), 3), dtype=np.uint8)
            for h, w in generator.integers(30, 90, (24, 2))
        ]
        mixes = [[(1 + (i + j) % 7, 1 + (3 * i + j) % 9) for j in range(3)] for i in range(24)]
        inputs = [images_of(mix) for mix in mixes]

        def pipeline_of(fast):
            prep = rf.AdaptivePreprocessor.for_model(fast, policy=("fixed", fast.grids[0]), aspect="keep")
            return rf.AdaptivePipeline(fast, prep, token_budget=80, n_decoders=1)

        def pipelined(pipe, i):
            return [r.logits for r in pipe(photographs[i % 6 :: 6])]

        def job(fast, pipe, i):
            kind = i % 4
            if kind == 0:
                return [fast(inputs[i])]
            if kind == 1:
                final, taken = fast.forward_intermediates(inputs[i])
                return [final.data, *[t for level in taken for t in level]]
            if kind == 2:
                return [fast.forward_features(inputs[i]).data]
            return pipelined(pipe, i)

        expected = []
        for state in states:
            fast = rf.optimize(model)
            fast.load_state_dict(state)
            pipe = pipeline_of(fast)
            expected.append([job(fast, pipe, i) for i in range(24)])
        assert not torch.equal(expected[0][0][0], expected[1][0][0]), "the test tells the two apart"

        fast = rf.optimize(model)
        pipe, done, n_loads = pipeline_of(fast), threading.Event(), 0

        def worker(first):
            torch.set_num_threads(1)
            wrong = []
            for turn in range(6):
                for i in range(first, 24, 8):
                    for k, got in enumerate(job(fast, pipe, i)):
                        right = [torch.equal(got, e[i][k]) for e in expected]
                        if not any(right):
                            wrong.append((turn, i, k))
            return wrong

        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(worker, first) for first in range(8)]
            pool_done = threading.Thread(target=lambda: ([f.exception() for f in futures], done.set()))
            pool_done.start()
            while not done.is_set():
                fast.load_state_dict(states[n_loads % 2])
                n_loads += 1
                done.wait(0.005)
            assert [f.result() for f in futures] == [[]] * 8
        assert n_loads >= 4, "there were reloads meanwhile"

    def test_new_grids_from_many_threads_leave_a_model_whole(self):
        """Both the model and its copy, with more new grids than are kept."""
        model = make_model()
        grids = [(1 + i % 13, 1 + i // 13) for i in range(160)]
        inputs = [images_of([grid]) for grid in grids]
        with torch.no_grad():
            expected = [model(x) for x in inputs]
            for m in (make_model(), rf.optimize(model)):
                m.load_state_dict(model.state_dict())
                gate = threading.Barrier(8)

                def job(first, m=m, gate=gate):
                    gate.wait()
                    with torch.no_grad():
                        return [
                            i
                            for i in range(first, 160, 8)
                            if not torch.allclose(m(inputs[i]), expected[i], rtol=1e-4, atol=1e-5)
                        ]

                with ThreadPoolExecutor(8) as pool:
                    assert list(pool.map(job, range(8))) == [[]] * 8
                for i in range(0, 160, 7):
                    torch.testing.assert_close(m(inputs[i]), expected[i], rtol=1e-4, atol=1e-5)
