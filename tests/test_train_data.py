"""Image sets: every format opened, every damage named, splits and folds stratified."""

import gzip
import io
import pickle
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from revit_fast.io.images import ImageError
from revit_fast.train import formats, shards
from revit_fast.train.data import ArrayImages, ImageSet, Sample, k_folds, split_off
from revit_fast.train.datasets import open_images

FASHION = "/usr/share/datasets/fashion-mnist"


def pixels(seed, height=5, width=7):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed):
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "PNG")
    return file.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def array_set(counts):
    """A set with the given number of images of every class, each image full of its place."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] + np.zeros((1, 3, 4), dtype=np.uint8)
    return ArrayImages(images, labels, [f"class {c}" for c in range(len(counts))])


class TestArrays:
    def test_samples(self):
        images = [pixels(0), pixels(1, 2, 3), pixels(2)[..., 0]]
        opened = ArrayImages(images, [1, 0, 1], ["a", "b"])
        assert len(opened) == 3
        assert opened.classes == ("a", "b")
        assert opened.labels.dtype == np.int64
        assert opened.name(2) == "image 2"
        for i, image in enumerate(images):
            assert isinstance(opened[i], Sample)
            assert np.array_equal(opened[i].image, image)
            assert opened[i].label == [1, 0, 1][i]
        assert [sample.label for sample in opened] == [1, 0, 1]
        assert opened[-1].label == 1

    def test_subset_of_a_subset(self):
        whole = array_set([5, 5])
        part = whole.subset([7, 3, 9]).subset(np.array([2, 0]))
        assert [part.name(i) for i in range(2)] == ["image 9", "image 7"]
        assert np.array_equal(part.image(0), whole.image(9))
        assert part.labels.tolist() == whole.labels[[9, 7]].tolist()
        assert part.classes == whole.classes

    @pytest.mark.parametrize(
        ("indices", "text"), [([10], "places 0 to 9, got 10"), ([-1], "got -1"), ([], "one place")]
    )
    def test_bad_subset(self, indices, text):
        with pytest.raises(ValueError, match=f"indices: .*{text}"):
            array_set([5, 5]).subset(indices)

    @pytest.mark.parametrize(
        ("images", "labels", "classes", "error", "text"),
        [
            (
                np.zeros((2, 3, 4), np.uint8),
                [0, 2],
                ["a", "b"],
                ValueError,
                "image 1 has label 2, but legal are 0 to 1",
            ),
            (np.zeros((2, 3, 4), np.uint8), [-1, -1], ["a", "b"], ValueError, r"image 0 has label -1 \(and 1 more\)"),
            (
                np.zeros((2, 3, 4), np.uint8),
                [0],
                ["a", "b"],
                ValueError,
                r"labels: expected one per image \(2\), got 1",
            ),
            (np.zeros((2, 3, 4), np.uint8), [0.0, 1.0], ["a", "b"], ValueError, "labels: .*float64"),
            (np.zeros((0, 3, 4), np.uint8), np.zeros(0, int), ["a"], ValueError, "labels: expected at least one"),
            (np.zeros((1, 3, 4), np.float32), [0], ["a"], TypeError, "images: expected uint8 pixels, got float32"),
            (np.zeros((1, 3, 4, 4), np.uint8), [0], ["a"], ValueError, r"images: expected images \[H, W, 3\]"),
            ([pixels(0), pixels(0).astype(int)], [0, 0], ["a"], TypeError, r"images\[1\]: expected uint8"),
            (np.zeros((1, 3, 4), np.uint8), [0], ["a", "a"], ValueError, "classes: .*'a' 2 times"),
            (np.zeros((1, 3, 4), np.uint8), [0], "ab", TypeError, "classes: expected a sequence of names"),
            (np.zeros((1, 3, 4), np.uint8), [0], [], ValueError, "classes: expected at least one"),
        ],
    )
    def test_errors(self, images, labels, classes, error, text):
        with pytest.raises(error, match=text):
            ArrayImages(images, labels, classes)

    def test_place_outside(self):
        with pytest.raises(IndexError, match="set of 2 images, got 2"):
            array_set([1, 1])[2]


class TestSplits:
    @pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5, 0.87])
    @pytest.mark.parametrize("counts", [[30, 30], [7, 11, 100, 2], [1, 1, 50]])
    def test_split_off_is_stratified(self, counts, share):
        whole = array_set(counts)
        rest, held = split_off(whole, share, seed=3)
        assert len(held) == round(share * len(whole))
        assert {rest.name(i) for i in range(len(rest))} | {held.name(i) for i in range(len(held))} == {
            whole.name(i) for i in range(len(whole))
        }
        assert len(rest) + len(held) == len(whole)
        exact = np.array(counts) * len(held) / len(whole)
        assert (np.abs(np.bincount(held.labels, minlength=len(counts)) - exact) < 1).all()

    def test_seed(self):
        whole = array_set([20, 20])
        names = [[h.name(i) for i in range(len(h))] for h in (split_off(whole, 0.3, seed)[1] for seed in (0, 0, 1))]
        assert names[0] == names[1]
        assert names[0] != names[2]
        assert names[0] != sorted(names[0], key=lambda name: int(name.split()[1]))[::-1]

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 0.001, 0.999])
    def test_bad_share(self, share):
        with pytest.raises(ValueError, match=r"share: .*"):
            split_off(array_set([10, 10]), share, 0)

    @pytest.mark.parametrize("k", [2, 3, 7])
    def test_folds(self, k):
        whole = array_set([13, 5, 40])
        folds = k_folds(whole, k, seed=1)
        assert sorted(np.concatenate(folds)) == list(range(58))
        for fold in folds:
            assert (np.diff(fold) > 0).all()
            assert (np.abs(np.bincount(whole.labels[fold], minlength=3) - np.array([13, 5, 40]) / k) < 1).all()
        assert all(np.array_equal(a, b) for a, b in zip(folds, k_folds(whole, k, seed=1), strict=True))
        assert any(not np.array_equal(a, b) for a, b in zip(folds, k_folds(whole, k, seed=2), strict=True))

    @pytest.mark.parametrize("k", [0, 1, 21, 2.0, True])
    def test_bad_k(self, k):
        with pytest.raises(ValueError, match="k: expected an int from 2 to the 20 images"):
            k_folds(array_set([10, 10]), k, 0)


class TestFolders:
    @pytest.fixture
    def root(self, tmp_path):
        for s, split in enumerate(("train", "validation")):
            for c, name in enumerate(("class 10", "class 9", "Bird")):
                for i in range(3 - s):
                    write(tmp_path / split / name / f"{i}.png", png(100 * s + 10 * c + i))
        write(tmp_path / "train" / "Bird" / "notes.txt", b"not an image")
        write(tmp_path / "train" / "Bird" / ".hidden.png", b"")
        return tmp_path

    def test_splits(self, root):
        train, val = open_images(root), open_images(root, "val")
        assert train.classes == val.classes == ("Bird", "class 9", "class 10")
        assert train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        assert val.labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
        assert np.array_equal(train.image(4), pixels(11))
        assert np.array_equal(val.image(5), pixels(101))
        assert train.name(4) == str(root / "train" / "class 9" / "1.png")
        assert len(open_images(root, "test")) == 6, "the only evaluation split"
        write(root / "test" / "Bird" / "0.png", png(0))
        assert open_images(root, "test").classes == ("Bird",)
        assert len(open_images(root, "val")) == 6, "validation comes before test"

    def test_as_timm(self, root):
        """Also classes in folders of folders, which are called by the innermost."""
        write(root / "train" / "animals" / "cat" / "x.png", png(5))
        (root / "train" / "Bird" / ".hidden.png").unlink()  # which timm takes
        reader = pytest.importorskip("timm.data.readers").create_reader("", str(root / "train"))
        ours = open_images(root)
        assert list(ours.classes) == sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        assert {(ours.name(i), int(ours.labels[i])) for i in range(len(ours))} == set(reader.samples)

    def test_digits_that_are_no_numbers(self, root):
        for name in ("①", "5²", "٣", "10"):
            write(root / "digits" / name / "a.png", png(0))
        assert open_images(root / "digits").classes == ("٣", "5²", "10", "①")

    def test_without_splits(self, root):
        for split in ("train", "val", "other"):
            assert len(open_images(root / "train", split)) == 9
        write(root / "flat" / "train" / "a.png", png(0))
        write(root / "flat" / "bus" / "a.png", png(1))
        assert open_images(root / "flat").classes == ("bus", "train"), "with images in it, a class of this name"

    def test_links_are_followed(self, root, tmp_path):
        (root / "linked").mkdir()
        (root / "linked" / "bird").symlink_to(root / "train" / "Bird")
        assert len(open_images(root / "linked")) == 3

    def test_shared_classes(self, root):
        classes = ("class 10", "Bird", "class 9")
        opened = open_images(root, "val", classes)
        assert opened.classes == classes
        assert opened.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert np.array_equal(opened.image(2), pixels(120))

    def test_classes_that_differ(self, root):
        with pytest.raises(
            ValueError, match=r"classes: .*train .*'class 10' not in `classes`; 'Cat' of `classes` not in"
        ):
            open_images(root, "train", ("Bird", "class 9", "Cat"))

    def test_other_split(self, root):
        with pytest.raises(ValueError, match=r"split: .* has no split 'extra'; it has 'train', 'validation'"):
            open_images(root, "extra")
        write(root / "only" / "val" / "a" / "0.png", png(0))
        with pytest.raises(ValueError, match="has no split 'train'; it has 'val'"):
            open_images(root / "only")

    def test_damage(self, root):
        (root / "train" / "Bird" / "0.png").write_bytes(png(0)[:-30])
        (root / "train" / "Bird" / "1.png").write_bytes(b"text")
        opened = open_images(root)
        with pytest.raises(ImageError, match=r"truncated|broken|end"):
            opened.image(0)
        with pytest.raises(ImageError, match="not an image that Pillow"):
            opened.image(1)
        (root / "train" / "Bird" / "2.png").unlink()
        with pytest.raises(ImageError, match="no such file"):
            opened.image(2)

    def test_errors(self, root, tmp_path):
        (root / "train" / "empty").mkdir()
        with pytest.raises(ValueError, match=r"class folder .*empty holds no image"):
            open_images(root)
        write(root / "loose" / "a" / "0.png", png(0))
        write(root / "loose" / "1.png", png(0))
        with pytest.raises(ValueError, match=r"image .*loose/1\.png is in no folder of a class"):
            open_images(root / "loose")
        (root / "nothing").mkdir()
        with pytest.raises(ValueError, match="nothing has no folders of classes"):
            open_images(root / "nothing")
        with pytest.raises(FileNotFoundError, match=r"path: nothing is at .*absent"):
            open_images(root / "absent")
        with pytest.raises(ValueError, match="is a file; give the folder"):
            open_images(root / "train" / "class 9" / "0.png")
        with pytest.raises(ValueError, match="split: expected a name"):
            open_images(root, "")


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


class TestIdx:
    IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5), dtype=np.uint8)
    LABELS = np.array([3, 1, 9, 0, 0, 2, 5], dtype=np.uint8)

    @pytest.fixture
    def root(self, tmp_path):
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(self.IMAGES))
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(self.LABELS)))
        (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(self.IMAGES[:2]))
        (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx(self.LABELS[:2]))
        return tmp_path

    def test_pixels_and_labels(self, root):
        train = open_images(root)
        assert train.classes == tuple("0123456789")
        assert np.array_equal([train.image(i) for i in range(7)], self.IMAGES)
        assert train.labels.tolist() == self.LABELS.tolist()
        assert train.name(6) == "train-images-idx3-ubyte[6]"
        assert len(open_images(root, "test")) == len(open_images(root, "val")) == 2
        named = open_images(root, classes=[f"digit {i}" for i in range(10)])
        assert named.classes[3] == "digit 3"

    def test_fashion_names(self, root):
        (root / "my-fashion-mnist").symlink_to(root)
        root = root.rename(root.with_name("Fashion-MNIST"))
        assert open_images(root).classes[9] == "Ankle boot"
        turned = formats.FASHION_MNIST_CLASSES[::-1]
        assert open_images(root, "train", turned).labels.tolist() == (9 - self.LABELS.astype(int)).tolist()
        with pytest.raises(ValueError, match=r"classes: .*'0', '1'.* of `classes` not in the set"):
            open_images(root, "train", list("0123456789"))

    @pytest.mark.parametrize(
        ("name", "data", "text"),
        [
            ("train-images-idx3-ubyte", lambda d: d[:-1], "is truncated: its header says 7x4x5, 156 bytes, it has 155"),
            ("train-images-idx3-ubyte", lambda d: d + b"x", "is too long"),
            ("train-images-idx3-ubyte", lambda d: d[:9], "is no idx file of bytes in 3 dimensions"),
            ("train-images-idx3-ubyte", lambda d: b"", "is no idx file .*got nothing and 0 bytes"),
            ("train-images-idx3-ubyte", lambda d: b"\0\0\x0d\x03" + d[4:], "to begin with 00000803.*got 00000d03"),
            ("train-labels-idx1-ubyte.gz", lambda d: d[:-5], "truncated or not gzip"),
            ("train-labels-idx1-ubyte.gz", lambda d: d[:12] + b"\xff\xff" + d[14:], "truncated or not gzip"),
            ("train-labels-idx1-ubyte.gz", lambda d: b"text", "truncated or not gzip"),
        ],
    )
    def test_damage(self, root, name, data, text):
        path = root / name
        path.write_bytes(data(path.read_bytes()))
        with pytest.raises(ValueError, match=f"path: .*{name}.*{text}"):
            open_images(root)

    def test_contradictions(self, root):
        (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(self.LABELS[:5])))
        with pytest.raises(ValueError, match=r"7 images, but .*labels-idx1-ubyte.gz has 5 labels"):
            open_images(root)
        (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(self.LABELS + 1)))
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\[2\] has label 10, but legal are 0 to 9"):
            open_images(root)
        (root / "train-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(ValueError, match="has no train-labels-idx1-ubyte"):
            open_images(root)
        with pytest.raises(ValueError, match="idx files hold 'train' and 'test', got 'extra'"):
            open_images(root, "extra")

    def test_fashion_mnist(self):
        if not formats.os.path.isdir(FASHION):
            pytest.skip("Debian's dataset-fashion-mnist is not installed")
        opened = open_images(FASHION, "test")
        assert len(opened) == 10_000
        assert np.bincount(opened.labels).tolist() == [1000] * 10
        assert opened.image(0).shape == (28, 28)
        assert opened.classes[opened.labels[0]] == "Ankle boot"


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(keys, labels):
    for key, label in zip(keys, labels, strict=True):
        yield f"{key}.png", png(int(key))
        yield f"{key}.cls", str(label).encode()
        yield f"{key}.json", b"{}"


class TestShards:
    @pytest.fixture
    def root(self, tmp_path):
        write_tar(tmp_path / "set-train-000.tar", samples(["0", "1"], [2, 0]))
        write_tar(tmp_path / "set-train-001.tar", samples(["2"], [1]))
        write_tar(tmp_path / "set-val-000.tar", samples(["3"], [0]))
        return tmp_path

    def test_random_access(self, root):
        opened = pickle.loads(pickle.dumps(open_images(root)))
        assert opened.classes == ("0", "1", "2")
        assert opened.labels.tolist() == [2, 0, 1]
        for i in (2, 0, 1, 0):
            assert np.array_equal(opened.image(i), pixels(i))
        assert opened.name(1) == f"{root}/set-train-000.tar:1"
        assert open_images(root, "test").name(0) == f"{root}/set-val-000.tar:3"

    @pytest.mark.parametrize(
        ("pattern", "n"), [("set-train-{000..001}.tar", 3), ("*.tar", 4), ("set-{train-001,val-000}.tar", 2)]
    )
    def test_patterns(self, root, pattern, n):
        assert len(open_images(root / pattern)) == n

    def test_braces(self):
        assert shards.expand_braces("a{08..11}b{x,y}") == [f"a{n}b{c}" for n in ("08", "09", "10", "11") for c in "xy"]
        assert shards.expand_braces("a{8..11}") == ["a8", "a9", "a10", "a11"]
        assert shards.expand_braces("a{b}c") == ["a{b}c"]

    def test_folders_and_class_names(self, root, tmp_path):
        write_tar(root / "f" / "train" / "0.tar", samples(["0", "1"], [0, 1]))
        write_tar(root / "f" / "val" / "0.tar", samples(["3"], [1]))
        assert open_images(root / "f", "val", ["x", "y"]).classes == ("x", "y")
        (root / "f" / "classes.txt").write_text("cat\ndog\n")
        assert open_images(root / "f").classes == ("cat", "dog")
        assert open_images(root / "f", "val", ("dog", "cat")).labels.tolist() == [0], "renumbered by name"
        with pytest.raises(ValueError, match="'cat' not in `classes`"):
            open_images(root / "f", "val", ("dog", "bird"))
        with pytest.raises(ValueError, match="has no split 'extra'; it has 'train', 'val'"):
            open_images(root / "f", "extra")
        (root / "classes.txt").write_text("a\nb\n")
        with pytest.raises(ValueError, match=r"set-train-000\.tar:0 has label 2, but legal are 0 to 1"):
            open_images(root)

    @pytest.mark.parametrize(
        ("files", "text"),
        [
            ([("7.png", b"x")], r"a\.tar: key '7' has no \.cls"),
            ([("d/7.cls", b"1")], r"a\.tar: key 'd/7' has no image"),
            ([("7.png", b"x"), ("7.cls", b"cat")], r"key '7' has a \.cls that is no number"),
            ([("7.png", b"x"), ("7.jpg", b"x"), ("7.cls", b"0")], "key '7' has more than one image"),
            ([("7.seg.png", b"x"), ("7.txt", b"0")], "no samples"),
            ([("7.png", b"x"), ("7.cls", b"-1")], r"a\.tar:7 has label -1"),
            ([(f"{i}.png", b"x") for i in range(9)], "; and 4 more"),
        ],
    )
    def test_bad_samples(self, tmp_path, files, text):
        write_tar(tmp_path / "a.tar", files)
        with pytest.raises(ValueError, match=text):
            open_images(tmp_path)

    def test_every_truncation(self, root):
        """A shard cut anywhere before its end mark is reported, also between two files."""
        path = root / "set-val-000.tar"
        whole = path.read_bytes()
        end = 6 * tarfile.BLOCKSIZE  # three files of one block each, and their headers
        assert whole[end : end + 512] == bytes(512)
        for size in (0, 1, 511, 512, 600, 1023, 1024, 2048, 2100, end - 1, end):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"set-val-000\.tar is truncated or no uncompressed tar"):
                open_images(root, "val")
        path.write_bytes(whole[: end + 512])
        assert len(open_images(root, "val")) == 1
        path.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
        with pytest.raises(ValueError, match="neither a file nor the end mark at byte 1024"):
            open_images(root, "val")
        path.write_bytes(gzip.compress(whole))
        with pytest.raises(ValueError, match="no uncompressed tar"):
            open_images(root, "val")

    def test_damage_after_opening(self, root):
        opened = open_images(root)
        path = root / "set-train-001.tar"
        path.write_bytes(path.read_bytes()[:560])
        with pytest.raises(ImageError, match=r"the shard ends .* bytes before"):
            opened.image(2)
        path.unlink()
        with pytest.raises(ImageError, match="no such file"):
            opened.image(2)

    def test_missing(self, root):
        with pytest.raises(FileNotFoundError, match=r"no shard is at .*set-train-002\.tar"):
            open_images(root / "set-train-{000..002}.tar")
        with pytest.raises(FileNotFoundError, match=r"no shard is at .*other-\*\.tar"):
            open_images(root / "other-*.tar")

    def test_as_webdataset_writes(self, tmp_path):
        webdataset = pytest.importorskip("webdataset")
        with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
            for i in range(3):
                writer.write({"__key__": f"sample{i}", "png": Image.fromarray(pixels(i)), "cls": i})
        opened = open_images(tmp_path)
        assert opened.labels.tolist() == [0, 1, 2]
        assert np.array_equal(opened.image(2), pixels(2))


class TestHuggingFace:
    @pytest.fixture
    def datasets(self):
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        return datasets

    @staticmethod
    def saved(datasets, labels=(1, 0, 1), **extra):
        columns = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"]), **extra}
        rows = {"picture": [pixels(i) for i in range(len(labels))], "kind": list(labels)}
        rows |= {name: rows["picture" if isinstance(extra[name], datasets.Image) else "kind"] for name in extra}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(columns))

    def test_dataset(self, datasets, tmp_path):
        self.saved(datasets, text=datasets.Value("int32")).save_to_disk(tmp_path / "a")
        opened = pickle.loads(pickle.dumps(open_images(tmp_path / "a")))
        assert opened.classes == ("cat", "dog")
        assert opened.labels.tolist() == [1, 0, 1]
        assert np.array_equal(opened.image(2), pixels(2))
        assert opened.name(2) == f"{tmp_path}/a[2]"
        assert open_images(tmp_path / "a", "val", ("dog", "cat")).labels.tolist() == [0, 1, 0]
        with pytest.raises(ValueError, match="'cat' not in `classes`; 'bird' of `classes` not in the set"):
            open_images(tmp_path / "a", "val", ("dog", "bird"))

    def test_dictionary(self, datasets, tmp_path):
        whole = self.saved(datasets)
        datasets.DatasetDict({"train": whole, "validation": whole.select([2, 1])}).save_to_disk(tmp_path)
        assert len(open_images(tmp_path)) == 3
        val = open_images(tmp_path, "test")
        assert val.labels.tolist() == [1, 0]
        assert np.array_equal(val.image(0), pixels(2))
        with pytest.raises(ValueError, match="has no split 'extra'; it has 'train', 'validation'"):
            open_images(tmp_path, "extra")

    def test_columns(self, datasets, tmp_path):
        self.saved(datasets, other=datasets.Image()).save_to_disk(tmp_path / "a")
        with pytest.raises(ValueError, match=r"exactly one column of type Image, got 2 .*kind: ClassLabel"):
            open_images(tmp_path / "a")
        self.saved(datasets).cast_column("kind", datasets.Value("int64")).save_to_disk(tmp_path / "b")
        with pytest.raises(ValueError, match=r"exactly one column of type ClassLabel, got 0 .*kind: Value"):
            open_images(tmp_path / "b")

    def test_labels(self, datasets, tmp_path):
        self.saved(datasets, labels=(0, -1)).save_to_disk(tmp_path / "a")
        with pytest.raises(ValueError, match=r"a\[1\] has label -1, but legal are 0 to 1"):
            open_images(tmp_path / "a")
        self.saved(datasets, labels=(0, None)).save_to_disk(tmp_path / "b")
        with pytest.raises(ValueError, match="have no 'kind'"):
            open_images(tmp_path / "b")

    def test_damage(self, datasets, tmp_path):
        whole = self.saved(datasets)
        write(tmp_path / "here.png", png(1))
        images = [{"bytes": png(0), "path": None}, {"bytes": None, "path": str(tmp_path / "here.png")}]
        images += [{"bytes": b"text", "path": None}, None]
        rows = {"picture": images, "kind": [0, 0, 0, 0]}
        datasets.Dataset.from_dict(rows, features=whole.features).save_to_disk(tmp_path / "a")
        opened = open_images(tmp_path / "a")
        for i in range(2):
            assert np.array_equal(opened.image(i), pixels(i))
        for i, text in ((2, "not a JPEG"), (3, "no image")):
            with pytest.raises(ImageError, match=text):
                opened.image(i)
        arrow = next((tmp_path / "a").glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:40])
        with pytest.raises(ValueError, match=f"{tmp_path}/a is a damaged Hugging Face data set"):
            open_images(tmp_path / "a")

    def test_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        for name in ("dataset_info.json", "state.json"):
            (tmp_path / name).write_text("{}")
        with pytest.raises(ImportError, match="pip install datasets"):
            open_images(tmp_path)


def test_base_class():
    with pytest.raises(NotImplementedError):
        ImageSet([0], ["a"]).image(0)


@pytest.mark.processes
def test_imports_stay_light():
    code = (
        "import sys, revit_fast.train.data, revit_fast.train.loader, revit_fast.train.formats; "
        "print([m for m in ('timm', 'PIL', 'datasets', 'webdataset', 'torchvision') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
