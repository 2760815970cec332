"""Folders that are saved to: what they keep, what a reader meets meanwhile, and what is on disk when."""

import errno
import functools
import hashlib
import json
import os
import re
import stat
import tempfile
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_bundle import CLASSES, edit, make_model
from test_bundle import make_assigner as calibrated_assigner

import revit_fast as rf
from revit_fast.cli.arguments import UsageError, check_file
from revit_fast.cli.export import check_output
from revit_fast.cli.report import open_output
from revit_fast.deploy import export
from revit_fast.io import atomic, tensors, verified
from revit_fast.io.atomic import LEFTOVER, make_folder, replaced, replaced_folder, write_json
from revit_fast.models.folder import ASSIGNER, CARD, CONFIG, MODEL
from revit_fast.models.weights import read_checkpoint
from revit_fast.streaming.bundle import read_bundle, save_bundle
from revit_fast.train.checkpoint import save_state, save_weights

OWN = {CONFIG, MODEL, ASSIGNER, CARD}
make_assigner = functools.cache(calibrated_assigner)
OLD, NEW = [f"old {i}" for i in range(5)], [f"new {i}" for i in range(5)]


def save(folder, classes=CLASSES, tla=True, value=0.0):
    """Saves a model whose head's biases are `value`."""
    model = make_model(depth=1)
    torch.nn.init.constant_(model.head.bias, value)
    save_bundle(folder, model, make_assigner() if tla else None, classes=classes)


def version(folder):
    """Names of the classes and the head's bias, which show of which save they are."""
    bundle = read_bundle(folder)
    return list(bundle.classes), bundle.model.head.bias[0].item()


def names(folder):
    return {path.name for path in folder.iterdir()}


def without_facts(folder):
    """The folder as older versions wrote it."""
    config = json.loads((folder / CONFIG).read_text())
    del config["files"]
    (folder / CONFIG).write_text(json.dumps(config))


@contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "bundle", OLD, value=1)
    return tmp_path / "bundle"


class TestWhatStays:
    def test_the_folder_that_a_process_stands_in(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_model().save_pretrained(".")
        make_model(depth=1).save_pretrained(".", classes=NEW)
        assert Path.cwd() == tmp_path
        assert len(rf.ReViT.from_pretrained(".").blocks) == 1
        assert names(tmp_path) == OWN - {ASSIGNER}

    def test_its_name_is_that_of_the_upload(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(rf.ReViT, "push_to_hub", lambda self, repo_id: repo_id)
        assert make_model().save_pretrained(".", push_to_hub=True) == tmp_path.name

    def test_a_folder_that_cannot_be_renamed(self, tmp_path, monkeypatch):
        """A mount point: it can be neither renamed nor replaced, and a new file system may have its own entries."""
        point = tmp_path / "mount"
        (point / "lost+found").mkdir(parents=True)
        (point / ".snapshot").mkdir()

        def busy(of):
            def rename(source, target, **options):
                if point in (Path(source), Path(target)):
                    raise OSError(errno.EBUSY, "Device or resource busy")
                return of(source, target, **options)

            return rename

        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, busy(getattr(os, name)))
        for classes, value in ((OLD, 1), (NEW, 2)):
            save(point, classes, value=value)
            assert version(point) == (classes, value)
        assert names(point) == OWN | {"lost+found", ".snapshot"}

    @pytest.mark.parametrize("busy", [CONFIG, MODEL])
    def test_a_file_that_is_a_mount_point_is_written_into(self, folder, monkeypatch, busy):
        rename, before = os.replace, (folder / busy).stat().st_ino

        def replace(source, target):
            if Path(target) == folder / busy:
                raise OSError(errno.EBUSY, "Device or resource busy")
            rename(source, target)

        monkeypatch.setattr(os, "replace", replace)
        save(folder, NEW, value=2)
        assert version(folder) == (NEW, 2)
        assert (folder / busy).stat().st_ino == before
        write_json(folder / CONFIG, [1])
        assert json.loads((folder / CONFIG).read_text()) == [1]
        assert names(folder) == OWN

    def test_a_folder_below_one_that_may_not_be_written(self, tmp_path):
        parent = Path(tempfile.mkdtemp())  # not below pytest's, which is closed to other users
        folder = parent / "bundle"
        folder.mkdir()
        user = os.geteuid()
        if user == 0:  # root may write everywhere
            os.chown(folder, 65534, 65534)
        parent.chmod(0o555)
        try:
            os.seteuid(65534 if user == 0 else user)
            for classes, value in ((OLD, 1), (NEW, 2)):
                save(folder, classes, value=value)
                assert version(folder) == (classes, value)
            with pytest.raises(PermissionError):
                save(parent / "another")
        finally:
            os.seteuid(user)
            parent.chmod(0o755)
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            parent.rmdir()

    def test_a_command_writes_into_a_folder_whose_parent_it_may_not_write(self, tmp_path, monkeypatch):
        folder = tmp_path / "onnx"
        folder.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == folder)
        check_output(Namespace(format="onnx", grid=None, output=str(folder)))
        with pytest.raises(UsageError, match="--output: cannot write"):
            check_output(Namespace(format="onnx", grid=None, output=str(tmp_path / "new")))

    def test_mode_setgid_and_other_files(self, folder):
        group = 65534 if os.geteuid() == 0 else os.getegid()
        os.chown(folder, -1, group)
        folder.chmod(0o2771)
        before = folder.stat()
        (folder / "logs").mkdir()
        (folder / "logs" / "run.txt").write_text("loss 1")
        os.link(folder / "logs" / "run.txt", folder / "same.txt")
        os.mkfifo(folder / "pipe")
        (folder / "gone").symlink_to("nowhere")
        (folder / MODEL).chmod(0o640)
        (folder / ASSIGNER).unlink()
        others = names(folder) - OWN
        with umask(0o027):
            save(folder, NEW, value=2)
        after = folder.stat()
        assert version(folder) == (NEW, 2)
        assert (after.st_ino, after.st_mode, after.st_gid) == (before.st_ino, before.st_mode, group)
        assert names(folder) == OWN | others
        assert (folder / "logs" / "run.txt").samefile(folder / "same.txt")
        assert os.readlink(folder / "gone") == "nowhere"
        modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir() if path.name in OWN}
        assert modes == {MODEL: "0o640", ASSIGNER: "0o640", CONFIG: "0o644", CARD: "0o644"}
        assert (folder / ASSIGNER).stat().st_gid == group, "a new file has the group of a folder with setgid"

    def test_a_folder_of_onnx_files(self, folder, tmp_path, monkeypatch):
        for name in ("write_single_onnx", "write_onnx"):
            monkeypatch.setattr(export, name, lambda *arguments, **options: arguments[-2].write_text("new"))
        bundle = read_bundle(folder)
        place = tmp_path / "onnx"
        place.mkdir()
        monkeypatch.chdir(place)
        for name in ("grid-14.onnx", "grid-4.onnx", ".gitignore"):
            (place / name).write_text("old")
        export.write_adaptive_onnx(bundle, ".")
        assert Path.cwd() == place
        new = {"grid-4.onnx", "grid-3.onnx", "grid-2.onnx", "assigner.onnx"}
        assert {path.name: path.read_text() for path in place.iterdir()} == dict.fromkeys(new, "new") | {
            ".gitignore": "old"
        }
        (place / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"folder: \. holds other files; give a new folder"):
            export.write_adaptive_onnx(bundle, ".")

    def test_an_assigner_that_the_new_model_lacks_goes(self, folder):
        save(folder, NEW, tla=False, value=2)
        assert read_bundle(folder).tla is None
        assert names(folder) == OWN - {ASSIGNER}

    def test_a_folder_in_the_place_of_a_file_is_named_before_anything_changes(self, folder):
        (folder / CARD).unlink()
        (folder / CARD).mkdir()
        with pytest.raises(IsADirectoryError, match=CARD):
            save(folder, NEW, value=2)
        assert version(folder) == (OLD, 1)
        assert names(folder) == OWN


class TestLinks:
    @pytest.mark.parametrize("target", ["there", "absent", "absent/deep"])
    def test_to_a_folder_is_followed(self, tmp_path, target):
        (tmp_path / "there").mkdir()
        (tmp_path / "link").symlink_to(target)
        for classes, value in ((OLD, 1), (NEW, 2)):
            save(tmp_path / "link", classes, value=value)
            assert version(tmp_path / target) == version(tmp_path / "link") == (classes, value)
        assert (tmp_path / "link").is_symlink()

    def test_in_the_place_of_files_are_replaced(self, folder, tmp_path):
        """As in a cache of the Hub, whose blobs belong to other snapshots, too."""
        blob = (folder / MODEL).rename(tmp_path / "blob")
        (folder / MODEL).symlink_to(blob)
        (folder / CARD).unlink()
        (folder / CARD).symlink_to(tmp_path / "absent" / "card")
        assert version(folder) == (OLD, 1)
        content = blob.read_bytes()
        save(folder, NEW, value=2)
        assert version(folder) == (NEW, 2)
        assert blob.read_bytes() == content
        assert not (folder / MODEL).is_symlink()
        assert not (folder / CARD).is_symlink()

    def test_to_the_folder_of_a_run_that_leads_nowhere(self, tmp_path):
        (tmp_path / "run").symlink_to("disk/run")
        make_folder(tmp_path / "run" / "logs")
        make_folder(tmp_path / "run")
        assert (tmp_path / "disk" / "run" / "logs").is_dir()
        made = re.compile(r"\.mkdir\(|makedirs")
        package = Path(rf.__file__).parent
        assert [path.name for path in package.rglob("*.py") if made.search(path.read_text())] == ["atomic.py"]

    def test_that_lead_nowhere_pass_the_check_of_an_option(self, tmp_path):
        (tmp_path / "link").symlink_to("absent/file")
        check_file("--output", str(tmp_path / "link"))
        with open_output(str(tmp_path / "link")) as file:
            file.write("x")
        assert (tmp_path / "link").read_text() == "x"
        with pytest.raises(UsageError, match="--output: cannot write"):
            check_file("--output", str(tmp_path / "absent" / "file"))

    def test_in_the_place_of_one_file(self, tmp_path):
        (tmp_path / "there").mkdir()
        for name, target, place in (
            ("followed", "there/file", "there/file"),
            ("made", "there/new", "there/new"),
            ("leads nowhere", "absent/file", "leads nowhere"),
            ("in a circle", "in a circle", "in a circle"),
        ):
            (tmp_path / name).symlink_to(target)
            for value in (1, 2):
                write_json(tmp_path / name, value)
                assert json.loads((tmp_path / place).read_text()) == value
            assert (tmp_path / name).is_symlink() == (name != place)
        assert {path.name for path in tmp_path.rglob("*") if LEFTOVER.search(path.name)} == set()


class TestFiles:
    def test_have_the_mode_of_an_open_and_keep_it(self, tmp_path):
        state = {"weights": torch.ones(2)}
        writers = (
            lambda path: write_json(path, 1),
            lambda path: save_state(path, state),
            lambda path: save_weights(path, state),
            make_assigner().save,
        )
        for i, write in enumerate(writers):
            path = tmp_path / f"{i}.safetensors"
            with umask(0o027):
                write(path)
                assert stat.S_IMODE(path.stat().st_mode) == 0o640
                path.chmod(0o604)
                write(path)
                assert stat.S_IMODE(path.stat().st_mode) == 0o604

    def test_are_never_open_to_others_than_the_old_one(self, tmp_path):
        (tmp_path / "secret").touch(mode=0o600)
        with umask(0), replaced(tmp_path / "secret") as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            temporary.write_text("x")
        assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600

    def test_that_several_threads_write_are_one_of_theirs(self, tmp_path):
        """A name with the process's id alone would be the same for all of them."""
        inside = threading.Barrier(4)

        def write(value):
            with replaced(tmp_path / "file") as temporary:
                inside.wait(timeout=30)
                temporary.write_text(value * 1000)
                inside.wait(timeout=30)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, "abcd"))
        assert (tmp_path / "file").read_text() in [value * 1000 for value in "abcd"]
        assert names(tmp_path) == {"file"}

    def test_may_have_names_as_long_as_any(self, tmp_path):
        write_json(tmp_path / ("é" * 127), 1)
        write_json(tmp_path / ("x" * 255), 1)
        assert len(names(tmp_path)) == 2

    def test_that_cannot_be_written_say_so(self, tmp_path):
        with pytest.raises(UsageError, match=r"--output: cannot write .*absent/out.csv: No such file"):
            open_output(str(tmp_path / "absent" / "out.csv")).__enter__()

    def test_are_read_in_one_go(self, tmp_path, monkeypatch):
        """Readers that open the path twice put one file's header over another's data."""
        path = tmp_path / "best.safetensors"
        save_weights(path, {"a": torch.ones(3)})
        misfit = tensors.misfit

        def replaced_when_open(file, name):
            save_weights(path, {"b": torch.zeros(7)})
            return misfit(file, name)

        monkeypatch.setattr(tensors, "misfit", replaced_when_open)
        assert torch.equal(read_checkpoint(path)["a"], torch.ones(3))
        assert torch.equal(read_checkpoint(path)["b"], torch.zeros(7))


class TestDisk:
    @pytest.fixture
    def events(self, monkeypatch):
        """The calls of fsync and rename in their order, by inode."""
        seen, fsync, replace, rename = [], os.fsync, os.replace, os.rename

        def synced(descriptor):
            seen.append(("sync", os.fstat(descriptor).st_ino))
            fsync(descriptor)

        def renamed(do):
            def rename(source, target):
                seen.append(("rename", os.stat(source).st_ino, Path(target).name, os.stat(Path(target).parent).st_ino))
                do(source, target)

            return rename

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", renamed(replace))
        monkeypatch.setattr(os, "rename", renamed(rename))
        return seen

    def check(self, events):
        """Every renamed file was brought to disk before, and its folder after."""
        renames = [(i, *event[1:]) for i, event in enumerate(events) if event[0] == "rename"]
        for i, inode, name, parent in renames:
            assert ("sync", inode) in events[:i], f"{name} is renamed before it is on disk"
            assert ("sync", parent) in events[i:], f"the folder of {name} is not brought to disk"
        return [name for _, _, name, _ in renames]

    def test_has_a_file_before_it_takes_its_place(self, tmp_path, events):
        writers = {
            "a.json": lambda path: write_json(path, 1),
            "state.safetensors": lambda path: save_state(path, {"a": torch.ones(2)}),
            "weights.safetensors": lambda path: save_weights(path, {"a": torch.ones(2)}),
        }
        for name in [*writers] * 2:
            writers[name](tmp_path / name)
        with open_output(str(tmp_path / "out.csv")) as file:
            file.write("x")
        assert self.check(events) == [*writers, *writers, "out.csv"]

    def test_has_a_folder_before_it_takes_its_place(self, tmp_path, events):
        save(tmp_path / "bundle")
        assert self.check(events)[-1] == "bundle"

    def test_has_all_new_files_before_the_first_old_one_goes(self, folder, events):
        save(folder, NEW)
        order = self.check(events)[-4:]
        assert order[0] == CONFIG
        assert sorted(order) == sorted(OWN)
        first = next(i for i, event in enumerate(events) if event[0] == "rename" and event[2] == CONFIG)
        for event in events[first:]:
            if event[0] == "rename":
                assert ("sync", event[1]) in events[:first], event[2]

    def test_only_one_room_replaces_files(self):
        calls = re.compile(r"os\.(replace|rename)\(|shutil\.(move|rmtree)|mkstemp|\.rename\(")
        package = Path(rf.__file__).parent
        found = {
            path.relative_to(package).as_posix() for path in package.rglob("*.py") if calls.search(path.read_text())
        }
        assert found == {"io/atomic.py"}


class TestReaders:
    def test_config_names_size_and_hash(self, folder):
        files = json.loads((folder / CONFIG).read_text())["files"]
        assert files == {
            name: {
                "bytes": (folder / name).stat().st_size,
                "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            }
            for name in (MODEL, ASSIGNER)
        }

    @pytest.mark.parametrize("name", [MODEL, ASSIGNER])
    @pytest.mark.parametrize("change", ["one bit", "shorter", "longer"])
    def test_another_file_is_refused(self, folder, name, change):
        content = bytearray((folder / name).read_bytes())
        wanted, n_bytes = hashlib.sha256(content).hexdigest(), len(content)
        if change == "one bit":
            content[-1] ^= 1
        (folder / name).write_bytes({"shorter": content[:-4], "longer": content + b"    "}.get(change, content))
        message = rf"bundle: .*{name} is not the file that config.json names: expected {n_bytes} bytes with SHA-256 "
        message += rf"{wanted}, got \d+ bytes with SHA-256 \w{{64}}; .*delete '{name}' under \"files\" in config.json"
        for read in (read_bundle, rf.ReViT.from_pretrained):
            with pytest.raises(ValueError, match=message):
                read(folder)

    def test_a_file_changed_on_purpose_is_taken_as_the_message_says(self, folder):
        other = make_model(depth=1)
        torch.nn.init.constant_(other.head.bias, 7)
        save_weights(folder / MODEL, other.state_dict())
        config = json.loads((folder / CONFIG).read_text())
        del config["files"][MODEL]
        (folder / CONFIG).write_text(json.dumps(config))
        assert version(folder) == (OLD, 7)

    def test_older_folders_and_edited_configs_are_read(self, folder):
        edit(folder, classes=NEW, note="by hand")
        assert version(folder) == (NEW, 1)
        without_facts(folder)
        assert version(folder) == (NEW, 1)

    @pytest.mark.parametrize("files", [None, [], "x", {MODEL: 3}, {MODEL: None}])
    def test_facts_that_are_none_are_named(self, folder, files):
        edit(folder, files=files)
        with pytest.raises(ValueError, match=r"bundle: .*config.json: files: expected bytes and sha256 of model"):
            read_bundle(folder)

    @pytest.mark.parametrize("older", [False, True])
    @pytest.mark.parametrize("tla", [False, True])
    def test_a_save_between_two_reads(self, folder, monkeypatch, older, tla):
        """Files of two saves fit each other by shape; they were loaded together without a word."""
        if older:
            without_facts(folder)
        loads, saved = json.loads, []

        def then_saved(*arguments, **options):
            value = loads(*arguments, **options)
            if not saved and isinstance(value, dict) and "format" in value:
                saved.append(True)
                save(folder, NEW, tla, value=2)
            return value

        monkeypatch.setattr(json, "loads", then_saved)
        assert version(folder) == (NEW, 2)
        assert saved

    @pytest.mark.parametrize("older", [False, True])
    @pytest.mark.parametrize("n_done", range(4))
    def test_a_save_that_stops_halfway(self, folder, monkeypatch, older, n_done):
        """Before the first rename there is the old content, after it the new one; the next save tidies up."""
        if older:
            without_facts(folder)
        replace, calls = os.replace, []

        def stops(source, target):
            if Path(target).parent == folder:
                calls.append(target)
                if len(calls) > n_done:
                    raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stops)
            with pytest.raises(KeyboardInterrupt):
                save(folder, NEW, value=2)
        assert version(folder) == ((NEW, 2) if n_done else (OLD, 1))
        assert n_done or names(folder) == OWN, "nothing is left of what never was valid"
        save(folder, OLD, value=3)
        assert version(folder) == (OLD, 3)
        assert names(folder) == OWN

    def test_an_error_before_anything_is_complete(self, folder, tmp_path):
        class Broken(rf.TokenLengthAssigner):
            def save(self, path):
                raise OSError(errno.ENOSPC, "No space left on device")

        for place, left in ((folder, OWN), (tmp_path / "new", None)):
            broken = Broken(make_assigner().grids, thumbnail_px=16, widths=(8, 8)).eval()
            with pytest.raises(OSError, match="No space"):
                save_bundle(place, make_model(), broken, classes=CLASSES)
            assert (names(place) if place.exists() else None) == left
        assert version(folder) == (OLD, 1)
        assert names(tmp_path) == {"bundle"}

    def test_a_save_into_an_empty_folder_that_stops_halfway(self, tmp_path, monkeypatch):
        def stops(source, target):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "_put", stops)
            with pytest.raises(KeyboardInterrupt):
                save_bundle(tmp_path, make_model(), None, classes=OLD)
        save(tmp_path, NEW, value=2)
        assert version(tmp_path) == (NEW, 2)
        assert names(tmp_path) == OWN

    def test_many_saves_and_reads_at_the_same_time(self, folder):
        """Two writers and a reader: every read is one save, and nothing is left."""
        versions, tla = {1: OLD, 2: NEW, 3: CLASSES}, make_assigner()
        done = threading.Event()
        errors = []

        def write(value):
            try:
                model = make_model(depth=1)
                torch.nn.init.constant_(model.head.bias, value)
                for i in range(8):
                    save_bundle(folder, model, tla if (i + value) % 2 else None, classes=versions[value])
            except BaseException as error:
                errors.append(error)

        def read():
            try:
                while not done.is_set():
                    classes, value = version(folder)
                    assert classes == versions[value]
            except BaseException as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        writers = [threading.Thread(target=write, args=(value,)) for value in (2, 3)]
        for thread in (reader, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        reader.join()
        assert not errors
        assert names(folder) - {ASSIGNER} == OWN - {ASSIGNER}

    def test_two_first_saves_at_the_same_time(self, tmp_path):
        """The one that is late replaces the files of the other's folder."""
        with replaced_folder(tmp_path / "new", ["a", "b"]) as late:
            for name in "abc":
                (late / name).write_text("late")
            with replaced_folder(tmp_path / "new", ["a", "b"]) as early:
                for name in "abd":
                    (early / name).write_text("early")
        assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {
            "a": "late",
            "b": "late",
            "c": "late",
            "d": "early",
        }
        assert names(tmp_path) == {"new"}

    def test_without_locks_of_folders(self, folder, monkeypatch):
        monkeypatch.setattr(atomic, "fcntl", None)
        save(folder, NEW, value=2)
        assert version(folder) == (NEW, 2)
        assert names(folder) == OWN
        monkeypatch.setattr(verified, "PAUSES_S", (0.0,))
        (folder / MODEL).write_bytes(b"x")
        with pytest.raises(ValueError, match="is not the file"):
            read_bundle(folder)
