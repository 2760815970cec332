"""Lines by seconds: where a run and its stages are, and when they end."""

import io
import re

import pytest
import torch
from train_helpers import GRIDS, noise_images, tiny_config, tiny_trainer

from revit_fast.train.labels import predict_lengths
from revit_fast.train.log import RunLog
from revit_fast.train.meter import Meter
from revit_fast.train.pace import Pace, ahead, duration
from revit_fast.train.progress import RunProgress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_stage_says_every_ten_seconds_how_far_it_is():
    said, clock = [], Clock()
    pace = Pace(said.append, "predicted", clock)
    for done in range(0, 101):
        clock.now = 0.25 * done
        pace(done, 100)
    assert len(said) == 2
    assert re.fullmatch(r"predicted: 40 of 100 \(40%\), 0 min 15 s left, until \d\d:\d\d( on .*)?", said[0])
    assert said[1].startswith("predicted: 80 of 100 (80%), 0 min 05 s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5.9, "0 min 05 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (47 * 3600, "47 h 00 min"),
        (2e6, "23 days 3 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
    assert ahead(seconds).startswith(f"{text} left, until ")


def test_ends_that_no_calendar_has():
    assert ahead(1e18).endswith(" left")


@pytest.fixture
def run():
    """Lines, clock and the reports of a run of 300 updates of 128 images."""
    stream, clock = io.StringIO(), Clock()
    config = tiny_config(epochs=3, batch_size=64, grad_accum_steps=2)
    progress = RunProgress(config, RunLog(None, terminal=stream), 0, 300, 1, clock)
    return stream, clock, progress


def test_what_is_ahead_is_said_after_twenty_seconds_of_a_slow_update(run):
    stream, clock, progress = run
    for n_images in range(8, 128, 8):  # six seconds for every pack of eight images
        clock.now += 6.0
        progress.passed(0, 0, n_images, Meter(len(GRIDS)))
    first, second, *others = stream.getvalue().splitlines()
    assert first.startswith("epoch 1/3  update 0/300 and 16 of 128 images  loss ")
    assert re.match(r"ahead: 300 updates of about 96 s, 7 h 59 min left, until \d\d:\d\d", second)
    assert len(others) == 5


def test_of_fast_updates_two_are_timed_and_short_runs_need_no_word(run):
    stream, clock, progress = run
    for step in (1, 2, 3):
        clock.now = float(step)
        progress.passed(step, 0, 0, Meter(len(GRIDS)))
    assert stream.getvalue().startswith("ahead: 298 updates of about 1 s, 4 min 58 s left")
    assert len(stream.getvalue().splitlines()) == 1
    stream.truncate(stream.seek(0))
    short = RunProgress(tiny_config(), RunLog(None, terminal=stream), 0, 9, 1, clock)
    for step in range(1, 10):
        clock.now += 1.0
        short.passed(step, 0, 0, Meter(len(GRIDS)))
    assert stream.getvalue() == ""


def test_a_trainer_reports_every_pack():
    passed = []
    trainer = tiny_trainer(tiny_config(micro_batch=3))
    trainer._progress.passed = lambda step, epoch, n_images, meter: passed.append((step, epoch, n_images))
    trainer._update([next(trainer.loader.epoch(0))])
    assert passed == [(0, 0, 3), (0, 0, 6), (1, 0, 0)]


def test_the_mean_loss_between_two_rows():
    meter = Meter(2)
    assert meter.loss() == 0.0
    target = torch.tensor([0, 1])
    meter.batch([0, 1], torch.tensor([1.0, 3.0]), torch.zeros(2, 2, 3), target)
    assert meter.loss() == 2.0


def test_predictions_count_their_passes():
    done = []
    trainer = tiny_trainer()
    predict_lengths(trainer.plain(), noise_images(20), pack_tokens=160, progress=lambda *a: done.append(a))
    assert done == [(5, 20), (11, 20), (16, 20), (17, 20), (20, 20)]
