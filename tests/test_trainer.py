import contextlib
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import full
from train_helpers import GRIDS, MODEL_KWARGS, noise_images, tiny_config, tiny_trainer

import revit_fast as rf
from revit_fast.io.images import ImageError
from revit_fast.train.checkpoint import load_state
from revit_fast.train.config import TrainConfig
from revit_fast.train.data import ArrayImages
from revit_fast.train.loader import UnreadableError
from revit_fast.train.log import EPOCHS, STEPS, read_rows
from revit_fast.train.run import build_model
from revit_fast.train.stopping import Interrupted, NotFiniteError
from revit_fast.train.trainer import BEST, CHECKPOINT, FINAL, Trainer, cached_images


def losses_of(folder):
    """Loss and gradient norm of every update, as they were written."""
    return {int(row["step"]): (row["loss"], row["gradient_norm"]) for row in read_rows(folder / STEPS)}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


def test_learns_what_can_be_learned(tmp_path):
    trainer = tiny_trainer(tiny_config(epochs=8, lr=3e-3), folder=tmp_path)
    before = trainer.evaluate().accuracy
    accuracy = trainer.fit()
    assert min(accuracy.accuracy) == 1.0, f"from {before} to {accuracy.accuracy}"
    rows = read_rows(tmp_path / STEPS)
    assert [row["step"] for row in rows] == list(range(1, 49))
    assert {f"{what}_{grid}" for what in ("loss", "accuracy") for grid in GRIDS} <= rows[0].keys()
    assert [row["epoch"] for row in read_rows(tmp_path / EPOCHS)] == list(range(1, 9))
    model, _ = build_model(trainer.config, 3)
    model.load_checkpoint(tmp_path / FINAL)
    assert_same_weights(model.state_dict(), trainer.model.state_dict())
    assert (tmp_path / BEST).exists()


def test_an_update_is_the_plain_step_of_pytorch():
    """Three updates by hand: dense images, the loss written out, SGD of PyTorch.

    Not Adam, which makes whole steps of the rounding errors of gradients that are zero (biases of keys).
    """
    config = tiny_config(augment={"preset": "none"}, opt="sgd", lr=0.1, sched="none", weight_decay=0.0)
    trainer = tiny_trainer(config, held_out=False)
    torch.manual_seed(config.seed)
    model, _ = build_model(config, 3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, nesterov=True)
    for b in range(3):
        batch = next(trainer.loader.epoch(0, b))
        n = len(batch.target)
        sequences = batch.images.split()
        logits = []
        for i, grid in enumerate(GRIDS):
            rows = torch.stack(sequences[i * n : (i + 1) * n])
            x = rows.view(n, grid, grid, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, 2 * grid, 2 * grid)
            logits.append(model(x))
        teacher = (logits[0].detach() / 2).softmax(1)
        total = F.cross_entropy(logits[0], batch.target)
        for z in logits[1:]:
            divergence = F.kl_div(F.log_softmax(z / 2, 1), teacher, reduction="batchmean")
            total = total + 0.5 * F.cross_entropy(z, batch.target) + 0.5 * 4 * divergence
        optimizer.zero_grad()
        (total / 3).backward()
        optimizer.step()
        trainer._update([batch])
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-5, atol=2e-6, msg=name)


def test_accumulated_gradients_are_those_of_one_batch():
    config = tiny_config(augment={"preset": "none"}, weight_decay=0.0)
    one, two = tiny_trainer(config), tiny_trainer(config.with_changes(grad_accum_steps=2, batch_size=4))
    batch = next(one.loader.epoch(0))
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        images = one.loader.images.subset(batch.index[part].tolist())
        loader = tiny_trainer(config.with_changes(batch_size=4), images=images).loader
        half = next(loader.epoch(0))
        halves.append(half)
    one._update([batch])
    two._update(halves)
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert two.updates_per_epoch == 6


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_micro_batches_give_the_gradient_and_the_log_of_one_pack(micro_batch):
    config = tiny_config(augment={"mixup": 0.8})
    one, some = tiny_trainer(config), tiny_trainer(config.with_changes(micro_batch=micro_batch))
    seen = []
    some.model.register_forward_pre_hook(lambda model, args: seen.append(len(args[0])))
    batch = next(one.loader.epoch(0))
    one._update([batch])
    some._update([batch])
    assert len(seen) == math.ceil(8 / micro_batch)
    assert sum(seen) == 8 * len(config.grids)
    assert max(seen) <= micro_batch * len(config.grids)
    for (name, a), b in zip(one.model.named_parameters(), some.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(one._meter.sums, some._meter.sums, rtol=1e-6, atol=0)
    assert some._meter.gradients[1] == 1, "updates are counted, not packs"


def test_packs_of_a_cpu_are_bounded(monkeypatch):
    trainer = tiny_trainer()
    rows = sum(grid * grid + trainer.model.num_prefix_tokens for grid in trainer.model.grids)
    monkeypatch.setattr("revit_fast.train.trainer.FEWEST_ROWS", 1)
    monkeypatch.setattr("revit_fast.train.trainer.CACHED_ACTIVATIONS", 2 * rows * trainer.model.embed_dim)
    assert cached_images(trainer.model) == 2
    assert tiny_trainer()._micro_batch == 2
    assert tiny_trainer(tiny_config(micro_batch=5))._micro_batch == 5
    monkeypatch.setattr("revit_fast.train.trainer.FEWEST_ROWS", 4 * rows)
    assert cached_images(trainer.model) == 4
    monkeypatch.setattr("revit_fast.train.trainer.FEWEST_ROWS", 1)
    monkeypatch.setattr("revit_fast.train.trainer.CACHED_ACTIVATIONS", 1)
    assert cached_images(trainer.model) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9, "opt": "nmuon", "lr": 0.01},
        {"model_kwargs": MODEL_KWARGS | {"drop_rate": 0.1, "drop_path_rate": 0.2}, "augment": {"mixup": 0.5}},
        {"grad_accum_steps": 2, "micro_batch": 3, "amp": "bfloat16", "grad_checkpointing": True, "clip_grad": 0.5},
        {"layer_decay": 0.8, "log_steps": 5},
        {"opt": "lamb", "lr": 0.01},
    ],
    ids=["plain", "average, muon", "dropout, mixup", "accumulated, 16 bit", "layer decay", "steps counted in groups"],
)
@pytest.mark.parametrize("cut", [full(2), 6, full(7)])
def test_a_resumed_run_gives_the_same_bits(tmp_path, changes, cut):
    config = tiny_config(**changes)
    whole = tiny_trainer(config, folder=tmp_path / "whole")
    cut = min(cut, whole.n_updates - 1)
    whole.fit()

    first = tiny_trainer(config, folder=tmp_path / "cut")
    update = first._update

    def stop_after(batches):
        update(batches)
        if first.step == cut:
            first._stop.number = signal.SIGTERM

    first._update = stop_after
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM after update {cut} of {whole.n_updates}"):
        first.fit()
    torch.manual_seed(123)  # whatever the new process has drawn
    second = tiny_trainer(config, folder=tmp_path / "cut")
    second.resume()
    assert second.step == cut
    second.fit()
    assert_same_weights(whole.weights(), second.weights())
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")
    assert len(losses_of(tmp_path / "whole")) == whole.n_updates // config.log_steps
    # Also where it was cut off between an epoch's last update and its evaluation.
    assert read_rows(tmp_path / "whole" / EPOCHS) == read_rows(tmp_path / "cut" / EPOCHS)
    assert (tmp_path / "whole" / BEST).read_bytes() == (tmp_path / "cut" / BEST).read_bytes()


def stemmed_trainer(config, folder):
    """The trainer of a model whose forward pass changes buffers: statistics of batch norms."""
    torch.manual_seed(config.seed)
    size = {"embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 32, "stem_chans": 4}
    model = rf.ReViT(grids=GRIDS, patch_size=2, num_classes=3, **size)
    return Trainer(model, noise_images(), config, folder=folder)


@pytest.mark.parametrize(
    ("make", "lost"),
    [(tiny_trainer, True), (stemmed_trainer, False), full(tiny_trainer, False), full(stemmed_trainer, True)],
)
def test_a_stop_within_an_update_throws_it_away(tmp_path, make, lost):
    config = tiny_config(micro_batch=3, log_steps=5)
    whole = make(config, folder=tmp_path / "whole")
    whole.fit()
    first = make(config, folder=tmp_path / "cut")
    forward, packs = first.forward, []

    def asked_during(batch):
        packs.append(first.step)
        result = forward(batch)
        if packs.count(7) == 2:
            with contextlib.suppress(KeyboardInterrupt) if lost else contextlib.nullcontext():
                os.kill(os.getpid(), signal.SIGINT)
        return result

    first.forward = asked_during
    with pytest.raises(Interrupted, match="stopped by SIGINT after update 7 of 12; resume to go on"):
        first.fit()
    assert packs.count(7) == 2, "the third pack of the update was run"
    second = make(config, folder=tmp_path / "cut")
    second.resume()
    assert second.step == 7
    second.fit()
    assert_same_weights(whole.weights(), second.weights())
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


@pytest.mark.parametrize("split", ["training", "held out"])
def test_a_stop_while_images_are_read(tmp_path, split):
    """In the middle of a batch, by code that takes other exceptions for faults of an image."""

    class Asking(ArrayImages):
        def image(self, i):
            try:
                if i == 20:
                    os.kill(os.getpid(), signal.SIGTERM)
            except Exception as error:
                raise ImageError("torn") from error
            return super().image(i)

    images = Asking([noise_images().image(i) for i in range(48)], noise_images().labels, noise_images().classes)
    sets = {"images": images} if split == "training" else {"held_out": images}
    trainer = tiny_trainer(folder=tmp_path, **sets)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after update"):
        trainer.fit()
    state = load_state(tmp_path / CHECKPOINT)
    assert state["step"] == trainer.step
    assert state["epoch"] == 0


def test_a_run_that_was_killed_while_it_evaluated_evaluates_once(tmp_path):
    """The checkpoint of an epoch's last update is there, and its row of the log, but not the checkpoint after it."""
    config = tiny_config(checkpoint_steps=3)
    whole = tiny_trainer(config, folder=tmp_path / "whole")
    whole.fit()
    first = tiny_trainer(config, folder=tmp_path / "cut")
    end_epoch = first._end_epoch

    def killed_after(epoch):
        end_epoch(epoch)
        raise KeyboardInterrupt

    first._end_epoch = killed_after
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = tiny_trainer(config, folder=tmp_path / "cut")
    second.resume()
    assert (second.step, second.epoch) == (6, 0)
    second.fit()
    assert read_rows(tmp_path / "whole" / EPOCHS) == read_rows(tmp_path / "cut" / EPOCHS)
    assert_same_weights(whole.weights(), second.weights())


RUN = """
import sys
from pathlib import Path
from train_helpers import tiny_config, tiny_trainer
trainer = tiny_trainer(tiny_config(checkpoint_steps=1, epochs=3), folder=Path(sys.argv[1]))
if (Path(sys.argv[1]) / "checkpoint.safetensors").exists():
    trainer.resume()
trainer.fit()
"""


@pytest.mark.processes
def test_killed_at_any_moment_it_goes_on_from_the_last_checkpoint(tmp_path):
    """SIGKILL again and again, at moments that do not depend on the run."""
    whole = tiny_trainer(tiny_config(epochs=3), folder=tmp_path / "whole")
    whole.fit()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    folder, kills = tmp_path / "killed", 0
    rng = np.random.default_rng(0)
    while not (folder / FINAL).exists():
        process = subprocess.Popen([sys.executable, "-c", RUN, str(folder)], env=environment, stderr=subprocess.PIPE)
        before = load_state(folder / CHECKPOINT)["step"] if (folder / CHECKPOINT).exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            # Let it get some updates further, and then to anywhere within one.
            if (folder / CHECKPOINT).exists() and load_state(folder / CHECKPOINT)["step"] >= before + 7:
                time.sleep(rng.uniform(0, 0.05))
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.wait(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read().decode()[-2000:]
        process.stderr.close()
    assert kills >= 2, "it ended before it was killed"
    resumed = tiny_trainer(tiny_config(epochs=3), folder=folder)
    resumed.resume()
    assert_same_weights(whole.weights(), resumed.weights())
    assert losses_of(tmp_path / "whole") == losses_of(folder)


def test_nan_stops_with_the_update_the_batch_and_the_checkpoint_kept(tmp_path):
    trainer = tiny_trainer(folder=tmp_path)
    forward = trainer.forward

    def poisoned(batch):
        loss, logits = forward(batch)
        return (loss * math.nan if trainer.step == 8 else loss), logits

    trainer.forward = poisoned
    with pytest.raises(
        NotFiniteError, match=r"loss is nan at update 9, in a batch that begins with .*; the last check"
    ):
        trainer.fit()
    state = load_state(tmp_path / CHECKPOINT)
    assert state["step"] == 6
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path):
    trainer = tiny_trainer(folder=tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NotFiniteError, match=r"norm of the gradient is .* at update 1"):
        trainer.fit()
    assert_same_weights(before, trainer.model.state_dict())


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    tiny_trainer(tiny_config(epochs=1), folder=tmp_path).fit()
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_in_a_thread(tmp_path):
    """Where signals cannot be caught."""
    results = []
    trainer = tiny_trainer(tiny_config(epochs=1), folder=tmp_path)
    thread = threading.Thread(target=lambda: results.append(trainer.fit()))
    thread.start()
    thread.join()
    assert len(results) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lr": 2e-3}, "has lr = 0.001; resume it with the same"), ({"seed": 3}, "has seed = 0")],
)
def test_a_run_is_resumed_as_it_was(tmp_path, changes, message):
    tiny_trainer(folder=tmp_path).fit()
    other = tiny_trainer(tiny_config(**changes), folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        other.resume()
    tiny_trainer(tiny_config(log_steps=4), folder=tmp_path).resume()


def test_lists_and_tuples_are_the_same_choice(tmp_path):
    config = tiny_config(mean=(0.5, 0.5, 0.5), augment={"preset": "none", "scale": (0.5, 1.0)})
    tiny_trainer(config, folder=tmp_path).fit()
    tiny_trainer(config, folder=tmp_path).resume()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: noise_images(56), r"then 48 of 3 classes, now 56 of 3 classes; bring them back"),
        (lambda: relabelled(noise_images()), r"then 48 of 3 classes, now 48 of 3 classes"),
    ],
    ids=["more images", "other labels"],
)
def test_other_images_are_no_run_to_go_on_with(tmp_path, other, message):
    tiny_trainer(folder=tmp_path).fit()
    with pytest.raises(ValueError, match=f"resume: the images are not those that the run in .*: {message}"):
        tiny_trainer(folder=tmp_path, images=other()).resume()


def relabelled(images):
    images.labels = images.labels[::-1].copy()
    return images


class Unreadable(ArrayImages):
    def image(self, i):
        if i % 8 == 3:
            raise ImageError("truncated")
        return super().image(i)


def test_unreadable_images_are_counted_and_a_share_is_too_much(tmp_path):
    rng = np.random.default_rng(0)
    images = Unreadable(rng.integers(0, 255, (48, 8, 8, 3), dtype=np.uint8), np.arange(48) % 3, ("a", "b", "c"))
    terminal = io.StringIO()
    trainer = tiny_trainer(tiny_config(max_unreadable=0.2), images=images, folder=tmp_path, terminal=terminal)
    trainer.fit()
    assert len(trainer.unreadable) == 6
    assert "6 training images could not be read so far, first image " in terminal.getvalue()
    resumed = tiny_trainer(trainer.config, images=images, folder=tmp_path)
    resumed.resume()
    assert resumed.unreadable == resumed.loader.unreadable == trainer.unreadable, "a resumed run counts anew"
    with pytest.raises(UnreadableError, match="cannot be read, more than max_unreadable allows"):
        tiny_trainer(tiny_config(max_unreadable=0.01), images=images).fit()


def test_as_many_held_out_images_may_be_unreadable_as_training_images():
    pixels = noise_images(24, seed=1)
    held_out = Unreadable([pixels.image(i) for i in range(24)], pixels.labels, pixels.classes)
    terminal = io.StringIO()
    trainer = tiny_trainer(tiny_config(max_unreadable=0.2), held_out=held_out, terminal=terminal)
    assert trainer.fit().n_images == 21
    assert " of 21 images, 3 more could not be read" in terminal.getvalue()
    with pytest.raises(UnreadableError, match="3 cannot be read, more than max_unreadable allows"):
        tiny_trainer(tiny_config(max_unreadable=0.1), held_out=held_out).evaluate()


def test_more_processes_than_held_out_images(monkeypatch):
    trainer = tiny_trainer(held_out=noise_images(3).subset([0, 2]))
    monkeypatch.setattr(trainer.world, "sum", lambda values: values)
    trainer.world.size, counted = 3, []
    for rank in range(3):
        trainer.world.rank = rank
        counted.append(trainer.evaluate().n_images)
    assert counted == [1, 1, 0]


def test_a_set_too_small_for_an_update_is_refused():
    with pytest.raises(ValueError, match=r"batch_size: .*use smaller batches"):
        tiny_trainer(tiny_config(grad_accum_steps=10))


def test_fine_tuning_from_weights_of_other_classes_and_of_a_plain_vit(tmp_path):
    import timm
    from safetensors.torch import save_file

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **MODEL_KWARGS)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    config = tiny_config(weights=str(tmp_path / "vit.safetensors"))
    model, text = build_model(config, 3)
    assert text == ", with a new head"
    assert torch.equal(model.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    assert model.head.weight.shape == (3, 32)
    model, text = build_model(config, 5)
    assert text == ", with the head of the weights, which do not name its classes"
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), vit.eval()(x), rtol=1e-4, atol=1e-5)
    vit.reset_classifier(0)
    save_file(vit.state_dict(), tmp_path / "features.safetensors")
    model, text = build_model(tiny_config(weights=str(tmp_path / "features.safetensors")), 3)
    assert text == ", with a new head"
    assert torch.equal(model.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    with pytest.raises(ValueError, match=r"weights: .*vit.safetensors does not fit this model"):
        build_model(tiny_config(weights=config.weights, model_kwargs=MODEL_KWARGS | {"embed_dim": 64}), 5)


def test_progress_says_where_the_run_stands(tmp_path):
    stream = io.StringIO()
    trainer = tiny_trainer(folder=tmp_path)
    trainer._terminal = stream
    trainer.fit()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("epoch 1/2  update 1/12  loss ")
    assert "accuracy at 4/3/2: " in lines[0]
    assert any(line.startswith("epoch 2/2  held out at 4/3/2: ") for line in lines)


def test_the_learning_rate_that_is_told_is_that_of_the_head(tmp_path):
    config = tiny_config(layer_decay=0.5, warmup_epochs=0)
    tiny_trainer(config, folder=tmp_path).fit()
    assert read_rows(tmp_path / STEPS)[0]["lr"] == config.lr


def test_nan_before_the_first_checkpoint_promises_none(tmp_path):
    trainer = tiny_trainer(folder=tmp_path)
    trainer.forward = lambda batch: (torch.tensor(math.nan), None)
    with pytest.raises(NotFiniteError, match=r"at update 1, .*; there is no checkpoint yet\. Lower lr"):
        trainer.fit()


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    config = tiny_config(epochs=1)
    tiny_trainer(config, folder=tmp_path).fit()
    text = (tmp_path / STEPS).read_text()
    (tmp_path / STEPS).write_text(text + "7,1,0.0")
    again = tiny_trainer(config, folder=tmp_path)
    again.resume()
    again.fit()
    with (tmp_path / STEPS).open() as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["step", "1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "parallel"}, "mode: expected one of packed, length-parallel, got 'parallel'"),
        ({"epochs": 0}, "epochs: expected a whole number >= 1, got 0"),
        ({"epochs": 1.5}, "epochs: expected a whole number >= 1, got 1.5"),
        ({"lr": -1.0}, "lr: expected a number >= 0, got -1.0"),
        ({"weight_decay": math.nan}, "weight_decay: expected a number >= 0, got nan"),
        ({"held_out_share": 1.0}, r"held_out_share: expected a share in \[0, 1\), got 1.0"),
        ({"distill_weight": 2.0}, "distill_weight"),
        ({"augment": {"preset": "heavy"}}, "augment: expected preset deit, light, none, got 'heavy'"),
        ({"augment": {"cropp": 1}}, "augment: unknown cropp"),
        ({"grids": (2, 3)}, "grids"),
        ({"ema_decay": 1.0}, r"ema_decay: expected a number in \[0, 1\), got 1.0"),
        ({"sched": "plateau"}, "sched: plateau depends on the course of a run"),
        ({"sched": "none", "layer_decay": 0.5}, "layer_decay: timm's schedules apply it, and sched is none"),
    ],
)
def test_choices_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_choices_survive_json():
    config = tiny_config(augment={"preset": "light", "pad": 3}, mean=(0.1, 0.2, 0.3))
    again = TrainConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again.as_dict() == json.loads(json.dumps(config.as_dict()))
    with pytest.raises(ValueError, match="config: unknown batchsize"):
        TrainConfig.from_dict({"batchsize": 3})


def test_evaluation_counts_like_the_model_alone():
    trainer = tiny_trainer()
    accuracy = trainer.evaluate()
    model, held_out = trainer.model.eval(), trainer.held_out
    x = (
        torch.stack([torch.from_numpy(held_out.image(i)) for i in range(len(held_out))]).permute(0, 3, 1, 2).float()
        / 255
    )
    settings = trainer.config.input_settings(trainer.model)
    x = (x - torch.tensor(settings["mean"]).view(3, 1, 1)) / torch.tensor(settings["std"]).view(3, 1, 1)
    logits, labels = model(x), torch.from_numpy(held_out.labels)
    assert accuracy.n_images == 24
    assert accuracy.accuracy[0] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert accuracy.loss[0] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_noise_images_helper_differs_by_class():
    images = noise_images()
    assert images.image(0).mean() < images.image(1).mean() < images.image(2).mean()
