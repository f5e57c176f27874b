"""nskd.data, what its chapter can't show well: broken archives, wrong layouts, caches, no network, CIFAR as JPEG."""

import io
import os
import pickle
import sys
import tarfile
import time
import tracemalloc
import types
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from nskd import data, image_files
from nskd.data import list_datasets, load_dataset
from nskd.dataset import Dataset
from nskd.engine.vision import torchvision

CIFAR = Path(__file__).resolve().parents[1] / "../shared/data/cifar10_jpeg.tar.xz"
GOOD = {
    f"{split}/{c}/{i}.png": None for split, n in (("train", 5), ("test", 3)) for c in ("cat", "dog") for i in range(n)
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(name, size=(6, 4), mode="RGB", kind="PNG"):
    "Random pixels that depend on the name only, encoded."
    shape = size[::-1] + ((3,) if mode == "RGB" else ())
    rng = np.random.default_rng(list(name.encode()))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def members(names=GOOD, **kw):
    return {n: b if b is not None else picture(n, **kw) for n, b in dict(names).items()}


def as_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def as_zip(path, files):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return path


def as_tar(path, files, extra=()):
    with tarfile.open(path, "w:" + (path.suffix[1:] if path.suffix != ".tar" else "")) as t:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
        for info in extra:
            t.addfile(info)
    return path


def same(a, b):
    return (
        a.class_names == b.class_names
        and torch.equal(a.mean, b.mean)
        and torch.equal(a.std, b.std)
        and all(
            torch.equal(getattr(a, k), getattr(b, k))
            for k in ("train_images", "train_labels", "test_images", "test_labels")
        )
    )


@contextmanager
def fails(error, *words):
    "Expects an error of one line that holds all the words."
    with pytest.raises(error) as info:
        yield
    text = str(info.value)
    assert "\n" not in text and all(w in text for w in words), text


# ---- named sets


def test_digits_are_pinned():
    d, h = load_dataset("digits"), load_dataset("digits100")
    assert (len(d.train_labels), len(d.test_labels), d.shape) == (1347, 450, (1, 8, 8))
    assert (len(h.train_labels), len(h.test_labels), h.shape, h.num_classes) == (10_000, 2_000, (1, 8, 16), 100)
    assert d.fingerprint == load_dataset("digits").fingerprint == "2c226ad25b21127c"
    assert h.fingerprint == load_dataset("digits100").fingerprint == "7f778def6df9aadb"
    for ds in (d, h):
        assert ds.train_images.dtype == torch.float32 and ds.train_labels.dtype == torch.int64
        assert abs(ds.train_images.mean()) < 1e-5 and abs(ds.train_images.std(correction=0) - 1) < 1e-5
        back = ds.unnormalise(ds.test_images) * 16
        assert (back - back.round()).abs().max() < 1e-4 and back.max() <= 16 and back.min() >= 0
        assert ds.source and not ds.note


def test_digits100_shares_no_source_image_and_repeats_no_pair():
    h = load_dataset("digits100")
    half = {s: {x.numpy().tobytes() for p in h.pixels[s] for x in (p[..., :8], p[..., 8:])} for s in ("train", "test")}
    assert not half["train"] & half["test"]
    for s in ("train", "test"):
        assert len({x.numpy().tobytes() for x in h.pixels[s]}) == len(h.pixels[s])
    left, right = h.pixels["test"][h.test_labels == 37].split(8, 3)
    d = load_dataset("digits")
    label = {x.numpy().tobytes(): int(y) for x, y in zip(d.pixels["test"], d.test_labels)}
    assert {label[x.numpy().tobytes()] for x in left} == {3} and {label[x.numpy().tobytes()] for x in right} == {7}


@pytest.mark.parametrize(
    "wrong, right", [("cifra10", "cifar10"), ("CIFAR100", "cifar100"), ("digit", "digits"), ("nmist", "mnist")]
)
def test_unknown_name_suggests_the_nearest(wrong, right):
    with fails(ValueError, repr(wrong), f"did you mean {right!r}"):
        load_dataset(wrong)


def test_bad_arguments():
    for bad in (None, 7):
        with fails(ValueError, "name must be"):
            load_dataset(bad)
    with fails(ValueError, "image_size", "'32'"):
        load_dataset("digits", image_size="32")
    with fails(ValueError, "digits has image_size 8"):
        load_dataset("digits", image_size=32)
    ds = load_dataset("digits", image_size=8)
    with fails(ValueError, "did you mean 'train'"):
        ds.batches("trian", 4)
    for bad in (0, -1, 2.0, True, None):
        with fails(ValueError, "batch_size"):
            ds.batches("train", bad)
    with fails(FileNotFoundError, "photos.zip"):
        load_dataset("nowhere/photos.zip")


def test_batches_are_an_epoch():
    ds = load_dataset("digits")

    def epoch(seed=None):
        g = None if seed is None else torch.Generator().manual_seed(seed)
        xs, ys = zip(*ds.batches("test", 64, generator=g))
        assert [len(y) for y in ys] == [64] * 7 + [2]
        return torch.cat(xs), torch.cat(ys)

    x, y = epoch()
    assert torch.equal(x, ds.test_images) and torch.equal(y, ds.test_labels)
    (a, p), (b, q), (c, _) = epoch(1), epoch(1), epoch(2)
    assert torch.equal(a, b) and torch.equal(p, q) and not torch.equal(a, c)
    order = torch.randperm(450, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, x[order]) and torch.equal(p, y[order])


def test_a_generator_is_used_when_batches_is_called():
    ds, g = load_dataset("digits"), torch.Generator().manual_seed(0)
    first, second = ds.batches("test", 450, g), ds.batches("test", 450, g)
    y2, y1 = next(iter(second))[1], next(iter(first))[1]  # asked for in the other order
    h = torch.Generator().manual_seed(0)
    assert torch.equal(y1, ds.test_labels[torch.randperm(450, generator=h)])
    assert torch.equal(y2, ds.test_labels[torch.randperm(450, generator=h)])


def test_fingerprint_sees_every_change():
    def make(pixel=1, label=0, names=("a", "b"), mean=(0.5,)):
        pixels = {"train": torch.ones(2, 1, 2, 2, dtype=torch.uint8), "test": torch.ones(2, 1, 2, 2, dtype=torch.uint8)}
        pixels["test"][1, 0, 1, 1] = pixel
        return Dataset(
            "x", pixels, {"train": torch.tensor([0, 1]), "test": torch.tensor([label, 1])}, names, mean, (1.0,)
        )

    prints = [
        make().fingerprint,
        make(pixel=2).fingerprint,
        make(label=1).fingerprint,
        make(names="ac").fingerprint,
        make(mean=(0.4,)).fingerprint,
    ]
    assert make().fingerprint == prints[0] and len(set(prints)) == 5


# ---- downloads: torchvision replaced by a stand-in, so that no test needs or reaches a network


def pretend_torchvision(monkeypatch, **kinds):
    fake = types.ModuleType("nskd.engine.vision")
    fake.torchvision = types.SimpleNamespace(datasets=types.SimpleNamespace(**kinds))
    monkeypatch.setitem(sys.modules, "nskd.engine.vision", fake)


@pytest.mark.parametrize(
    "error",
    [
        URLError("Name or service not known"),
        RuntimeError("Error downloading\nTried a\n"),
        TimeoutError("timed out"),
        ConnectionResetError("reset"),
        EOFError("ended"),
    ],
)
def test_no_network_says_which_files_to_put_where(monkeypatch, tmp_path, error):
    def unreachable(root, train, download):
        raise error

    pretend_torchvision(monkeypatch, CIFAR10=unreachable, MNIST=unreachable)
    monkeypatch.setenv("NSKD_DATA", str(tmp_path / "here"))
    with fails(
        FileNotFoundError,
        "cifar-10-python.tar.gz",
        "cs.toronto.edu",
        f"into {tmp_path / 'here'} ",
        type(error).__name__,
    ):
        load_dataset("cifar10")
    with fails(FileNotFoundError, "t10k-labels-idx1-ubyte.gz", str(tmp_path / "there/MNIST/raw")):
        load_dataset("mnist", root=tmp_path / "there")
    with fails(FileNotFoundError, "download=False", "cifar-10-python.tar.gz"):
        load_dataset("cifar10", download=False)


def test_layouts_of_torchvision_become_nchw(monkeypatch):
    rng = np.random.default_rng(0)

    def pixels(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    def cifar(root, train, download):
        return types.SimpleNamespace(data=pixels(6, 32, 32, 3), targets=[0, 1, 2, 3, 4, 5], classes=list("abcdefghij"))

    def mnist(root, train, download):
        return types.SimpleNamespace(
            data=torch.from_numpy(pixels(4, 28, 28)), targets=torch.arange(4), classes=["0 - zero"]
        )

    def svhn(root, split, download):
        return types.SimpleNamespace(data=pixels(5, 3, 32, 32), labels=np.arange(5, dtype=np.int64))

    pretend_torchvision(monkeypatch, CIFAR10=cifar, MNIST=mnist, SVHN=svhn)
    for name, shape, n, constant in (
        ("cifar10", (3, 32, 32), 6, 0.4914),
        ("mnist", (1, 28, 28), 4, 0.1307),
        ("svhn", (3, 32, 32), 5, 0.4377),
    ):
        ds = load_dataset(name)
        assert ds.shape == shape and ds.train_images.shape == (n, *shape) and ds.test_labels.tolist() == list(range(n))
        assert ds.num_classes == 10 and ds.mean[0] == torch.tensor(constant) and not ds.note
    assert ds.class_names == list("0123456789")


def test_what_is_said_about_torchvision_is_true():
    sets = torchvision.datasets
    assert list_datasets() == ["digits", "digits100", *data._DOWNLOADS]
    for name, (kind, mean, std, files, below, url) in data._DOWNLOADS.items():
        cls = getattr(sets, kind)
        assert len(mean) == len(std) in (1, 3)
        if "CIFAR" in kind:
            assert (files, url + files) == (cls.filename, cls.url)
        elif kind == "SVHN":
            assert [url + f for f in files.split()] == [cls.split_list[s][0] for s in ("train", "test")]
        else:
            assert files.split() == [f for f, _ in cls.resources] and url in cls.mirrors and below == f"{kind}/raw"


def test_real_torchvision_without_the_files(tmp_path):
    for name in data._DOWNLOADS:
        with fails(FileNotFoundError, name, str(tmp_path), "download=False"):
            load_dataset(name, root=tmp_path, download=False)


def test_a_cifar_file_runs_no_code(tmp_path, monkeypatch):
    "torchvision unpickles what it finds: with its checksums switched off, only our unpickler stands in between."
    cifar = torchvision.datasets.cifar
    monkeypatch.setattr(cifar, "check_integrity", lambda *a, **k: True)
    monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    good = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    for name, _ in cifar.CIFAR10.train_list + cifar.CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps(good, 4))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, 4))
    assert load_dataset("cifar10", root=tmp_path, download=False).train_labels.tolist() == [0, 1] * 5
    (folder / "data_batch_3").write_bytes(pickle.dumps(good | {"labels": Evil()}, 4))
    with fails(ValueError, "mkdir"):
        load_dataset("cifar10", root=tmp_path, download=False)
    assert not (tmp_path / "ran").exists() and cifar.pickle is pickle


# ---- folders and archives


def test_folder_and_archives_hold_the_same(tmp_path, cache):
    files = members()
    below = {f"top/{n}": b for n, b in files.items()} | {"top/README.txt": b"hello", "top/train/cat/.hidden.png": b"x"}
    sets = [
        load_dataset(as_folder(tmp_path / "a", files)),
        load_dataset(as_folder(tmp_path / "b", below)),
        load_dataset(as_zip(tmp_path / "c.zip", files)),
        load_dataset(as_zip(tmp_path / "d.zip", below)),
        load_dataset(as_tar(tmp_path / "e.tar", below)),
        load_dataset(as_tar(tmp_path / "f.tar.gz", files)),
        load_dataset(as_tar(tmp_path / "g.v2.tar.xz", {f"./{n}": b for n, b in reversed(files.items())})),
    ]
    first = sets[0]
    assert first.class_names == ["cat", "dog"] and first.train_labels.tolist() == [0] * 5 + [1] * 5
    assert first.shape == (3, 4, 6) and first.image_size == (4, 6) and len(first.test_labels) == 6
    assert all(same(first, ds) and ds.fingerprint == first.fingerprint for ds in sets)
    assert [ds.name for ds in sets] == ["a", "b", "c", "d", "e", "f", "g.v2"]
    inside = np.asarray(Image.open(io.BytesIO(files["test/dog/2.png"])))
    assert np.array_equal((first.unnormalise(first.test_images)[5] * 255).round().permute(1, 2, 0).numpy(), inside)
    assert same(load_dataset("a", root=tmp_path), first)


def test_cache_gives_the_first_load_bit_for_bit(tmp_path, monkeypatch, cache):
    path = as_tar(tmp_path / "pets.tar.xz", members())
    first = load_dataset(path)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(image_files, "_decode", None)  # a second decoding would fail
    again = load_dataset(path)
    assert same(first, again) and again.fingerprint == first.fingerprint and repr(first) == repr(again)
    assert (again.source, again.note) == (first.source, first.note)


def test_cache_notices_a_changed_source(tmp_path):
    folder = as_folder(tmp_path / "pets", members())
    first = load_dataset(folder)
    (folder / "train/cat/0.png").write_bytes(picture("other"))
    os.utime(folder / "train/cat/0.png", ns=(1, 1))
    assert load_dataset(folder).fingerprint != first.fingerprint
    assert load_dataset(folder, image_size=3).image_size == 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_cache_is_made_again(tmp_path, cache, damage):
    path = as_zip(tmp_path / "pets.zip", members())
    first = load_dataset(path)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    at = whole.index(first.pixels["train"].numpy().tobytes()) + 11
    file.write_bytes(
        {
            "cut": whole[:-40],
            "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "empty": b"",
            "text": b"not a cache at all",
        }[damage]
    )
    with pytest.warns(UserWarning, match="damaged"):
        again = load_dataset(path)
    assert same(first, again) and file.read_bytes() == whole and len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NSKD_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(load_dataset(as_zip(tmp_path / "pets.zip", members())).train_labels) == 10


def test_wrong_layouts_are_named(tmp_path):
    def zipped(name, drop):
        return as_zip(tmp_path / name, {n: b for n, b in members().items() if drop not in n})

    with fails(ValueError, "none under train/"):
        load_dataset(zipped("a.zip", "train/"))
    with fails(ValueError, "none under test/"):
        load_dataset(zipped("b.zip", "test/"))
    with fails(ValueError, "same classes", "only in train/: dog"):
        load_dataset(zipped("c.zip", "test/dog"))
    with fails(ValueError, "same classes", "only in test/: cat"):
        load_dataset(zipped("d.zip", "train/cat"))
    with fails(ValueError, "none under train/"):
        load_dataset(as_zip(tmp_path / "e.zip", {"x.txt": b"x"}))
    with fails(ValueError, "none under test/"):
        load_dataset(as_folder(tmp_path / "f", {n: b for n, b in members().items() if "train" in n}))
    (tmp_path / "empty").mkdir()
    with fails(ValueError, "none under train/"):
        load_dataset(tmp_path / "empty")
    two = {f"{top}/{n}": b for top in ("one", "two") for n, b in members().items()}
    with fails(ValueError, "several: one, two"):
        load_dataset(as_folder(tmp_path / "g", two))
    assert load_dataset(tmp_path / "g" / "two").num_classes == 2


def test_classes_called_train_and_test(tmp_path):
    files = {
        f"{s}/{c}/{i}.png": picture(f"{s}{c}{i}")
        for s in ("train", "test")
        for c in ("train", "test")
        for i in range(2)
    }
    a, b = load_dataset(as_folder(tmp_path / "a", files)), load_dataset(as_zip(tmp_path / "b.zip", files))
    assert a.class_names == ["test", "train"] and len(a.train_labels) == 4 and a.fingerprint == b.fingerprint


def test_broken_archives_and_images_are_named(tmp_path):
    (tmp_path / "text.tar.xz").write_text("no archive")
    with fails(ValueError, "text.tar.xz"):
        load_dataset(tmp_path / "text.tar.xz")
    (tmp_path / "text.zip").write_text("no archive")
    with fails(ValueError, "text.zip"):
        load_dataset(tmp_path / "text.zip")
    (tmp_path / "header.tar.gz").write_bytes(b"\x1f\x8b\x08\x04" + bytes(6))
    with fails(ValueError, "header.tar.gz"):
        load_dataset(tmp_path / "header.tar.gz")
    whole = as_tar(tmp_path / "cut.tar.xz", members()).read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(whole[: len(whole) // 2])
    with fails(ValueError, "cut.tar.xz"):
        load_dataset(tmp_path / "cut.tar.xz")
    half = picture("train/cat/3.png", size=(60, 40))[:900]
    for content in (b"no image", half, b""):
        files = members(GOOD | {"train/cat/3.png": content}, size=(60, 40))
        with fails(ValueError, "bad.zip: train/cat/3.png"):
            load_dataset(as_zip(tmp_path / "bad.zip", files))
        with fails(ValueError, "train/cat/3.png"):
            load_dataset(as_folder(tmp_path / "bad", files))
    deep = io.BytesIO()
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(deep, "PNG")
    with fails(ValueError, "test/cat/1.png", "8 bits"):
        load_dataset(as_zip(tmp_path / "deep.zip", members(GOOD | {"test/cat/1.png": deep.getvalue()})))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [23, 11])  # just above Pillow's limit it warns, above twice that it raises
def test_decompression_bombs_are_named(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with fails(ValueError, "bomb.zip: train/cat/0.png", "DecompressionBomb"):
        load_dataset(as_zip(tmp_path / "bomb.zip", members()))


def test_mixed_sizes(tmp_path):
    files = members(size=(16, 16)) | {"test/dog/1.png": picture("odd", size=(40, 24))}
    path = as_zip(tmp_path / "mixed.zip", files)
    with fails(ValueError, "test/dog/1.png is 40x24", "16x16", "image_size"):
        load_dataset(path)
    ds = load_dataset(path, image_size=16)
    assert ds.image_size == 16
    same_size = np.asarray(Image.open(io.BytesIO(files["train/cat/0.png"]))).transpose(2, 0, 1)
    assert np.array_equal(ds.pixels["train"][0], same_size)  # what has the size stays as it is
    assert load_dataset(path, image_size=8).train_images.shape == (10, 3, 8, 8)


def test_crop_is_resize_and_centre_crop():
    v2 = torchvision.transforms
    y, x = np.mgrid[:300, :420]
    image = np.stack([128 + 90 * np.sin(x / 17), 128 + 90 * np.cos(y / 23), (x + y) / 3], 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    ours = image_files._decode("x", file.getvalue(), (3, 224, 224)).astype(float)
    theirs = v2.CenterCrop(224)(v2.Resize(256)(Image.fromarray(image)))
    assert np.abs(ours - np.asarray(theirs).transpose(2, 0, 1)).mean() < 2


def test_grey_stays_grey_only_if_all_are(tmp_path):
    grey = members(mode="L")
    a = load_dataset(as_zip(tmp_path / "grey.zip", grey))
    b = load_dataset(as_zip(tmp_path / "both.zip", grey | {"test/dog/2.png": picture("colour")}))
    assert a.shape == (1, 4, 6) and b.shape == (3, 4, 6)
    assert all(torch.equal(b.pixels["train"][:, c], a.pixels["train"][:, 0]) for c in range(3))
    c = load_dataset(as_zip(tmp_path / "one.zip", {n: picture("same", mode="L") for n in GOOD}), image_size=3)
    assert c.shape == (1, 3, 3) and c.train_images.isfinite().all()


def test_constant_images_do_not_divide_by_zero(tmp_path):
    black = io.BytesIO()
    Image.new("RGB", (4, 4)).save(black, "PNG")
    ds = load_dataset(as_zip(tmp_path / "black.zip", {n: black.getvalue() for n in GOOD}))
    assert ds.train_images.abs().max() == 0 and torch.equal(ds.std, torch.ones(3))


CLIMBING = (
    "../../evil.png",
    "/evil.png",
    "../train/cat/9.png",
    "train/../../evil/1.png",
    "train/cat/../../../e.png",
    "..\\train\\cat\\8.png",
    "C:\\evil.png",
    "../notes.txt",
)


@pytest.mark.parametrize("name", CLIMBING)
def test_archives_with_names_that_climb_out_are_refused(tmp_path, cache, name):
    inner = tmp_path / "deep" / "er"
    inner.mkdir(parents=True)
    makers = [(as_zip, "evil.zip")] + (
        [] if "\\" in name else [(as_tar, "evil.tar"), (as_tar, "evil.tar.gz")]
    )  # in a tar, a backslash is a letter
    for make, file in makers:
        with fails(ValueError, file, "leads out of it"):
            load_dataset(make(inner / file, members() | {name: b"evil"}))
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {file for _, file in makers}


def special(kind, name="train/cat/9.png", target="/etc/passwd", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_archives_with_links_and_devices_are_refused(tmp_path, kind):
    with fails(ValueError, "odd.tar", "a link, a device", "train/cat/9.png"):
        load_dataset(as_tar(tmp_path / "odd.tar", members(), [special(kind)]))
    if kind in (tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE):
        return
    with zipfile.ZipFile(as_zip(tmp_path / "odd.zip", members()), "a") as z:
        info = zipfile.ZipInfo("train/cat/9.png")
        info.external_attr = {
            tarfile.SYMTYPE: 0o120777,
            tarfile.FIFOTYPE: 0o010644,
            tarfile.CHRTYPE: 0o020644,
            tarfile.BLKTYPE: 0o060644,
        }[kind] << 16
        z.writestr(info, "/etc/passwd")
    with fails(ValueError, "odd.zip", "a link, a device"):
        load_dataset(tmp_path / "odd.zip")


def test_archives_that_unfold_to_far_more_are_refused(tmp_path, monkeypatch):
    zeros = members() | {"train/cat/zeros.bmp": bytes(10**8)}
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in zeros.items():
            z.writestr(name, content)
    for path in (
        tmp_path / "bomb.zip",
        as_tar(tmp_path / "bomb.tar.gz", zeros),
        as_tar(tmp_path / "bomb.tar.xz", members() | {"notes.txt": bytes(10**8)}),
    ):
        with fails(ValueError, path.name, "times its size"):
            load_dataset(path)
    monkeypatch.setattr(image_files, "_MOST_MEMBERS", 10)
    with fails(ValueError, "many.zip", "more than 10 files"):
        load_dataset(as_zip(tmp_path / "many.zip", members()))


def test_a_zip_member_that_lies_about_its_size_is_not_unpacked_whole(tmp_path):
    path = tmp_path / "lies.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in (members() | {"train/cat/zeros.bmp": bytes(5 * 10**7)}).items():
            z.writestr(name, content)
    path.write_bytes(path.read_bytes().replace((5 * 10**7).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    tracemalloc.start()
    try:
        with fails(ValueError, "lies.zip"):
            load_dataset(path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_absurd_tar_headers_are_not_read_into_memory(tmp_path, kind):
    info = special(kind, size=2**40)
    whole = as_tar(tmp_path / "a.tar", members()).read_bytes()
    (tmp_path / "b.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + whole)
    with fails(ValueError, "b.tar", "1099511627776"):
        load_dataset(tmp_path / "b.tar")


def test_a_tar_that_is_damaged_or_cut_between_two_files_is_not_a_shorter_one(tmp_path):
    whole = as_tar(tmp_path / "a.tar", members()).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as t:
        last = t.getmembers()[-1]
    (tmp_path / "cut.tar").write_bytes(whole[: last.offset])
    (tmp_path / "bad.tar").write_bytes(whole[: last.offset] + b"\x01" * 512 + whole[last.offset + 512 :])
    for name in ("cut.tar", "bad.tar"):
        with fails(ValueError, name, "to its end"):
            load_dataset(tmp_path / name)


@pytest.mark.parametrize("name", ["train/c\nat/9.png", "train/cat/\x1b[2J.png"])
def test_names_that_cannot_be_printed_are_refused(tmp_path, name):
    for path in (
        as_zip(tmp_path / "odd.zip", members() | {name: picture("x")}),
        as_folder(tmp_path / "odd", members() | {name: picture("x")}),
    ):
        with fails(ValueError, path.name, "can't be printed"):
            load_dataset(path)


def test_an_image_is_one_of_the_usual_formats_whatever_its_name_says(tmp_path):
    "Pillow would start Ghostscript for this one."
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n%%EOF\n"
    with fails(ValueError, "train/cat/0.png", "JPEG, PNG"):
        load_dataset(as_zip(tmp_path / "a.zip", members() | {"train/cat/0.png": eps}))


def test_absurd_dimensions_are_refused_by_the_header_alone(tmp_path):
    png = picture("train/cat/0.png")
    ihdr = b"IHDR" + (10**5).to_bytes(4, "big") + (10**5).to_bytes(4, "big") + png[24:29]
    huge = png[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + png[33:]
    tracemalloc.start()
    try:
        with fails(ValueError, "train/cat/0.png", "DecompressionBomb"):
            load_dataset(as_zip(tmp_path / "a.zip", members() | {"train/cat/0.png": huge}))
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_a_folder_that_links_to_itself_is_refused(tmp_path):
    folder = as_folder(tmp_path / "pets", members())
    (folder / "train/cat/again").symlink_to(folder / "train")
    with fails(ValueError, "again", "a link to a folder that it lies in"):
        load_dataset(folder)


def test_odd_files_in_a_folder_are_left_alone(tmp_path):
    folder = as_folder(
        tmp_path / "pets", members() | {"train/cat/Thumbs.db": b"x", "train/.git/x.png": b"x", "train/stray.png": b"x"}
    )
    os.mkfifo(folder / "train/cat/pipe.png")  # reading one would wait forever
    (folder / "train/cat/dangling.png").symlink_to("nowhere")
    assert len(load_dataset(folder).train_labels) == 10


def test_linked_class_folders_are_followed(tmp_path):
    real = as_folder(tmp_path / "real", members())
    for split in ("train", "test"):
        (tmp_path / "linked" / split).mkdir(parents=True)
        for c in ("cat", "dog"):
            (tmp_path / "linked" / split / c).symlink_to(real / split / c)
    assert same(load_dataset(real), load_dataset(tmp_path / "linked"))


def test_only_re_encoded_benchmarks_carry_a_note(tmp_path):
    files = {n.replace(".png", ".jpg"): picture(n, size=(8, 8), kind="JPEG") for n in GOOD}
    assert "not comparable" in load_dataset(as_zip(tmp_path / "my_cifar.zip", files)).note
    assert load_dataset(as_zip(tmp_path / "pets.zip", files)).note == ""
    assert load_dataset(as_zip(tmp_path / "cifar.zip", members())).note == ""
    ds = load_dataset(tmp_path / "my_cifar.zip")
    assert ds.note and str(tmp_path) not in ds.note + ds.source  # results that quote them name no one's home


# ---- sets too large for memory


def test_a_streaming_set_equals_the_one_in_memory(tmp_path, cache):
    folder = as_folder(tmp_path / "pets", members())
    directory_lock = load_dataset(folder)
    stream = load_dataset(folder, max_bytes=100)
    assert (
        stream.shape == directory_lock.shape
        and torch.equal(stream.mean, directory_lock.mean)
        and torch.equal(stream.std, directory_lock.std)
    )
    assert torch.equal(stream.train_labels, directory_lock.train_labels) and repr(stream) == repr(directory_lock)
    for seed in (None, 3):
        g, h = (None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2))
        a, b = list(directory_lock.batches("train", 4, g)), list(stream.batches("train", 4, h))
        assert len(a) == len(b) == 3
        assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))
    for split in ("train", "test"):
        with fails(RuntimeError, "too large", f"batches('{split}'"):
            getattr(stream, f"{split}_images")
    assert stream.fingerprint == load_dataset(folder, max_bytes=100).fingerprint != directory_lock.fingerprint
    next(iter(stream.batches("train", 2)))  # stopping early leaves nothing hanging
    assert len(list(cache.iterdir())) == 1


def test_a_streaming_set_needs_one_size(tmp_path):
    files = members() | {"test/dog/2.png": picture("odd", size=(9, 9))}
    folder = as_folder(tmp_path / "pets", files)
    with fails(ValueError, "dog/2.png is 9x9", "image_size"):
        load_dataset(folder, max_bytes=100)
    a, b = load_dataset(folder, image_size=4), load_dataset(folder, image_size=4, max_bytes=100)
    assert torch.equal(next(iter(b.batches("test", 9)))[0], a.test_images)
    (folder / "test/dog/1.png").write_bytes(b"no image")
    ds = load_dataset(folder, image_size=4, max_bytes=100)
    with fails(ValueError, "test/dog/1.png"):
        list(ds.batches("test", 2))


@pytest.mark.parametrize("limit", [1000, 100_000])  # too small for the files; only for their 196,608 pixels
def test_a_large_archive_asks_to_be_unpacked(tmp_path, limit):
    plain = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(plain, "JPEG")
    path = as_zip(tmp_path / "big.zip", {n: plain.getvalue() for n in GOOD})
    with fails(ValueError, "unpack it"):
        load_dataset(path, max_bytes=limit)


# ---- the real thing


@pytest.mark.skipif(not CIFAR.exists(), reason="the CIFAR-10 JPEG archive is not beside this checkout")
def test_cifar_archive():
    start = time.monotonic()
    first = load_dataset(CIFAR)
    decoded = time.monotonic() - start
    start = time.monotonic()
    again = load_dataset(CIFAR)
    cached = time.monotonic() - start
    assert decoded < 60 and cached < 4, (decoded, cached)  # 13 s and 0.1 s on two idle cores
    assert first.fingerprint == again.fingerprint and first.shape == (3, 32, 32)
    assert first.class_names == "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert torch.equal(first.train_labels.bincount(), torch.full((10,), 5000))
    assert torch.equal(first.test_labels.bincount(), torch.full((10,), 1000))
    assert "not comparable" in first.note
    assert (first.mean - torch.tensor(data._DOWNLOADS["cifar10"][1])).abs().max() < 0.002  # it is CIFAR-10
