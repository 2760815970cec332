"""Fuzzing of decode and pack: a short run, and that a crash, a hang and a programming error are noticed."""

import io
import os
import random
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
from PIL import Image

from bench.fuzz import decode
from bench.fuzz.inputs import MUTATIONS, damaged, damaged_files, real_files, with_right_checksums
from revit_fast.io import images

pytestmark = pytest.mark.beside


def test_damaged_files_give_an_image_or_one_error(tmp_path):
    found = decode.fuzz(0, tmp_path, n_inputs=240)
    assert found["findings"] == []
    assert found["inputs"] == sum(found["outcomes"].values()) == 240
    assert found["outcomes"]["image"] > 10
    assert found["outcomes"]["error: OSError"] > 10, "damage that the decoder sees"


def fragile(connection):
    """A child that dies of some files and hangs at others."""
    connection.send("ready")
    while (batch := connection.recv()) is not None:
        if b"crash" in batch:
            os.kill(os.getpid(), signal.SIGSEGV)
        while b"hang" in batch:
            pass
        connection.send((["image"] * len(batch), [(i, "odd") for i, data in enumerate(batch) if data == b"odd"]))


def test_crashes_and_hangs_are_found_and_their_files_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "HANG_CPU_S", 0.2)
    contents = [b"good", b"crash", b"good", b"odd", b"good"] + [b"good"] * 19 + [b"hang"]
    files = iter([(f"file{i}", data) for i, data in enumerate(contents)])
    found = decode.fuzz(7, tmp_path, n_inputs=len(contents), files=files, work=fragile)
    assert found["outcomes"] == {"crash": 1, "hang": 1, "image": 23}
    kept = [(one["finding"], (tmp_path / one["file"]).read_bytes()) for one in found["findings"]]
    assert kept == [("crash (exit code -11)", b"crash"), ("odd", b"odd"), ("hang", b"hang")]


def outcome_of(decoding):
    return decode.outcome_of(SimpleNamespace(prep=SimpleNamespace(decode=decoding)), b"data")


class TestOutcomes:
    def test_a_mistake_in_a_line_of_the_package_is_a_finding(self):
        def ours(data):
            with images.as_image_error():
                images._checked_array(None)

        def theirs(data):
            with images.as_image_error():
                raise TypeError("as decoders do")

        name, finding = outcome_of(ours)
        assert name == "error: AttributeError"
        assert "AttributeError at images.py:" in finding
        assert outcome_of(theirs) == ("error: TypeError", None)
        assert outcome_of(lambda data: images.read_rgb(b"")) == ("error: ImageError", None)

    def test_what_is_no_image_error_is_a_finding(self):
        name, finding = outcome_of(lambda data: 1 / 0)
        assert (name, finding) == ("raised ZeroDivisionError", "no ImageError: ZeroDivisionError: division by zero")


class TestInputs:
    def test_a_seed_gives_the_same_files_again(self):
        first, again, other = (damaged_files(seed) for seed in (3, 3, 4))
        drawn = [next(first) for _ in range(50)]
        assert drawn == [next(again) for _ in range(50)]
        assert drawn != [next(other) for _ in range(50)]

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
    def test_every_mutation_changes_files(self, mutation):
        rng, data = random.Random(0), bytes(range(256))
        changed = Counter(mutation(rng, bytearray(data), data[::-1]) != data for _ in range(20))
        assert changed[True] > 15
        mutation(rng, bytearray(b"a"), b"")  # the shortest

    def test_checksums_are_made_anew(self):
        png = real_files()["png-RGB"]
        at = png.index(b"IHDR") + 4  # the width
        wrong = png[:at] + b"\x00\x00\x00\x07" + png[at + 4 :]
        assert with_right_checksums(png) == png
        assert with_right_checksums(wrong) != wrong
        assert damaged(random.Random(0), b"", b"") == b""
        assert Image.open(io.BytesIO(with_right_checksums(wrong))).size[0] == 7
