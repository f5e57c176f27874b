"""Damaged and hostile files for every loader of nskd: each is read, or refused by a ValueError of one line, and
nothing else happens.

`python tests/fuzz.py [N] [SEED]` makes N files, each from its own number, and lets the loaders read them in forked
processes. A finding is any other exception, a message of several lines, more than `SECONDS` a file, a process that
dies, and any change outside the case's own folder; the payloads of hostile files leave a file there. `--case NUMBER`
reads one case again, in this process. Notebooks of the library have none of this.
"""

import argparse
import collections
import contextlib
import faulthandler
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

from nskd.engine import files
from nskd.experiments import claims, explain, parameters
from nskd.practice import loading
from nskd.data import load_dataset
from nskd.tables.methods import TableParameters

SECONDS, WAIT = 5, 60  # for one file: of computing, and on the clock of a machine that may be busy
CHUNK = 100  # files a process reads
ROOM = 4 * 2**30  # bytes of address space that a process may take on top of PyTorch's own


# ---- mutations of bytes

MAGIC = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"\x80\x02}",
    b"\x1f\x8b\x08",
    b"\xfd7zXZ\x00",
    b"BM",
    b"GIF89a",
    b"II*\x00",
    b"{}",
    b"\x00" * 8,
    b"\xff" * 8,
    b"\x00\x00\x00\x80",
    b"../",
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
)


def flip(data, rng):
    "Some bits the other way."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(data, rng):
    return data[: rng.randrange(len(data) + 1)]


def _slice(data, rng):
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 16, 512, 4096)))


def repeat(data, rng):
    a, b = _slice(data, rng)
    return data[:b] + data[a:b] * rng.choice((1, 1, 3)) + data[b:]


def drop(data, rng):
    a, b = _slice(data, rng)
    return data[:a] + data[b:]


def splice(data, rng):
    "Another format's first bytes, here or there."
    at, word = rng.choice((0, rng.randrange(len(data) + 1))), rng.choice(MAGIC)
    return data[:at] + word + data[at + rng.choice((0, len(word))) :]


def overwrite(data, rng):
    "A small, a large or a negative number over what may have been one."
    word = struct.pack(rng.choice(("<I", ">I", "<Q", ">Q")), rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + word + data[at + len(word) :]


MUTATIONS = (flip, flip, cut, repeat, drop, splice, overwrite)


def damage(data, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data = rng.choice(MUTATIONS)(data, rng)
    return data


# ---- mutations of structure

ODD = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a\nb",
    "../../x",
    "/etc/passwd",
    "\x00",
    "\ud800",
    "9" * 5000,
    [],
    {},
    [[]],
    [0] * 1000,
    {"": {}},
    "ü" * 300,
)


def leaves(value, path=()):
    "Paths of everything inside a JSON-like value."
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from leaves(part, (*path, key))


def odd(value, rng, words=ODD):
    "A JSON-like value with one part replaced, removed or renamed."
    paths = list(leaves(value))
    if not paths:
        return rng.choice(words)
    *above, key = rng.choice(paths)
    value = json.loads(json.dumps(value))
    place = value
    for step in above:
        place = place[step]
    kind = rng.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice(("x", "", "a\nb", key + "s", "\x1b[2J"))] = place.pop(key)
    else:
        place[key] = rng.choice(words)
    return value


class Payload:
    "A pickle of this makes the folder `path` when it is read."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def payload(canary):
    return f"{canary}/ran-{random.randrange(10**9)}"


def rezip(data, change):
    """The zip archive `data` with `change(name, content)` for each of its members, and right checksums.

    None leaves one out.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            if (content := change(info.filename, old.read(info))) is not None:
                new.writestr(info.filename, content)
    return out.getvalue()


def one_member(data, rng, change, only=lambda name: True):
    "The zip archive `data` with `change(content)` for one of its members."
    chosen = rng.choice([n for n in zipfile.ZipFile(io.BytesIO(data)).namelist() if only(n)])
    return rezip(data, lambda name, content: change(content) if name == chosen else content)


# ---- safetensors


def safetensors_originals():
    tensors = {
        "fc.weight": torch.randn(3, 4),
        "fc.bias": torch.zeros(3),
        "n": torch.tensor(7),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    from safetensors.torch import save

    return [save(tensors, {"job": '{"step": 3}'}), save({})]


WORDS = (*ODD, "F64", "F8_E4M3", "F4", "C64", "BOOL", "U16", [2**40, 2**40], [-1], [0, 2**62], [10**18], "__metadata__")


def safetensors_damage(data, rng, canary):
    if rng.random() < 0.5:
        return damage(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(odd(json.loads(data[8 : 8 + size]), rng, WORDS)).encode()
    if rng.random() < 0.1:
        header = b"[" * 200_000
    length = rng.choice((len(header), len(header), len(header), 2**63, len(header) + len(data), 99_999_999))
    return struct.pack("<Q", length) + header + data[8 + size :]


def read_safetensors(path):
    for read in (files.load_tensors, files.read_meta, loading.file_kind, loading.read_weights):
        _each(read, path)


def _each(read, path):
    """Several loaders may read one file.

    A refusal by one doesn't keep it from the next, and the file counts as refused if all refuse it.
    """
    try:
        read(path)
        READ.append(read)
    except ValueError as e:
        if not ours(e):
            raise
        REFUSED.append(str(e))


def ours(error):
    return "\n" not in str(error) and not isinstance(error, (UnicodeError, json.JSONDecodeError))


READ, REFUSED = [], []


# ---- files of torch.save


def state_originals():
    state, made = {"fc.weight": torch.randn(3, 4), "fc.bias": torch.zeros(3), "steps": torch.tensor(7)}, []
    circle = {}
    circle["state_dict"] = circle
    wide = {"w": torch.zeros(1).expand(10**12)}
    for value in (
        state,
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        {"model": state, 3: torch.ones(2)},
        [1, 2],
        circle,
        wide,
        {"w": torch.ones(3).to_sparse()},
        {3: torch.ones(2)},
        {"w": torch.empty(3, device="meta")},
    ):
        for new in (True, False):
            with io.BytesIO() as f, contextlib.suppress(RuntimeError, NotImplementedError):
                torch.save(value, f, _use_new_zipfile_serialization=new)
                made.append(f.getvalue())
    return made


def state_damage(data, rng, canary):
    kind, zipped = rng.randrange(10), data[:2] == b"PK"
    evil = pickle.dumps({"w": Payload(payload(canary))}, protocol=rng.choice((2, 4)))
    if kind == 0:
        return evil
    if kind == 1 and zipped:
        return rezip(data, lambda name, content: evil if name.endswith("data.pkl") else content)
    if kind < 6 and zipped:
        return one_member(
            data, rng, lambda content: damage(content, rng), lambda name: kind > 2 or name.endswith("data.pkl")
        )
    if kind == 6 and zipped:
        return _bomb(data)
    return damage(data, rng)


def _bomb(data):
    "With a member that unfolds to a thousand times its size."
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data/9", bytes(10**8))
    return out.getvalue()


# ---- programs


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).flatten(1))


def script_originals():
    with io.BytesIO() as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Small().eval(), torch.randn(4, 1, 4, 4)), f)
        return [f.getvalue()]


def program_originals():
    with io.BytesIO() as f:
        x = torch.randn(4, 1, 4, 4)
        torch.export.save(torch.export.export(Small().eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), f)
        return [f.getvalue()]


def script_damage(data, rng, canary):
    if rng.random() < 0.4:
        return damage(data, rng)
    evil = pickle.dumps(Payload(payload(canary)), protocol=2)
    if rng.random() < 0.2:
        return one_member(data, rng, lambda content: evil, lambda name: name.endswith(".pkl"))
    return one_member(data, rng, lambda content: damage(content, rng))


def hostile_strings(canary):
    "Python code in places where a loader might run it."
    run = f"__import__('os').mkdir('{payload(canary)}')"
    return (
        run,
        f"x = 1; {run} #",
        f"exec({run!r})",
        f"s0 if {run} else s0",
        f"x\n  {run}",
        "torch.os.mkdir",
        "torch.ops.aten.nothing.default",
        "_operator.methodcaller",
        "torch.serialization.load",
    )


def program_damage(data, rng, canary):
    evil = pickle.dumps(Payload(payload(canary)), protocol=2)
    top = zipfile.ZipFile(io.BytesIO(data)).namelist()[0].partition("/")[0]
    kind = rng.randrange(8)
    if kind < 2:
        return damage(data, rng)
    if kind == 2:
        return rezip(data, lambda name, content: evil if name.endswith(".pt") else content)
    if kind == 3:
        new = {
            "data/constants/opaque_obj_0": evil,
            "data/constants/custom_obj_0": evil,
            "data/aotinductor/model/a.so": b"\x7fELF",
            "data/weights/model.pt": evil,
            "../../evil.txt": b"evil",
        }
        name = rng.choice(list(new))
        config = {
            "config": {
                "c": {
                    "path_name": name.rpartition("/")[2],
                    "is_param": False,
                    "use_pickle": rng.random() < 0.5,
                    "tensor_meta": None,
                }
            }
        }
        data = rezip(
            data,
            lambda n, content: (
                json.dumps(config).encode()
                if n.endswith(f"{name.split('/')[1]}/model_constants_config.json")
                else content
            ),
        )
        return _with(data, f"{top}/{name}", new[name])
    if kind == 4:
        old = {
            "version": b"8.8",
            "serialized_exported_program.json": b"{}",
            "serialized_state_dict.json": evil,
            "serialized_constants.json": evil,
            "serialized_example_inputs.pt": evil,
        }
        data = rezip(
            data, lambda name, content: None if name.endswith("model.json") and rng.random() < 0.5 else content
        )
        for name, content in old.items():
            data = _with(data, name, content)
        return data
    if kind == 5:
        return one_member(data, rng, lambda content: damage(content, rng))

    def change(content):
        return json.dumps(odd(json.loads(content), rng, hostile_strings(canary) if kind == 6 else ODD)).encode()

    return one_member(data, rng, change, lambda name: name.endswith(".json"))


def _with(data, name, content):
    with io.BytesIO(data) as out:
        with warnings.catch_warnings(), zipfile.ZipFile(out, "a") as z:
            warnings.simplefilter("ignore")
            z.writestr(name, content)
        return out.getvalue()


def read_program(path):
    loading.load_teacher(path, input_shape=(1, 4, 4))


# ---- JSON, and what is read from it


def json_originals():
    made = {"seeds": 2, "teacher": "wrn28", "dataset": "digits", "norms": ["bn", "ln"], "device": "auto"}
    about = {
        "commit": "0" * 40,
        "uncommitted_changes": False,
        "versions": {"torch": "2"},
        "device": "cpu",
        "threads": 1,
        "started": "2026-01-01T00:00:00+00:00",
    }
    check = {
        "id": "table2.cs",
        "statement": "s",
        "source": "here",
        "verdict": "holds",
        "evidence": {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 5},
    }
    return [
        json.dumps(v).encode()
        for v in (
            {"parameters": made, "provenance": about, "seconds_of_all_students": 1.5},
            [check],
            {"accuracy": {"cs": 91.5}, "history": [1, 2]},
        )
    ]


def json_damage(data, rng, canary):
    kind = rng.randrange(8)
    if kind == 0:
        return (b"[" if rng.random() < 0.5 else b'{"a":') * rng.choice((1000, 100_000))
    if kind == 1:
        return rng.choice(
            (
                b"",
                b"null",
                b"NaN",
                b"9" * 5000,
                b'"\\ud800"',
                "[1]".encode("utf-16"),
                b"\xef\xbb\xbf{}",
                b'{"a": 1e999}',
            )
        )
    if kind < 5:
        return json.dumps(odd(json.loads(data), rng)).encode()
    return damage(data, rng)


def read_results(path):
    "As claims.json beside good results where it may be one, else as results.json beside good claims."
    folder, (results, checks, _) = Path(path).parent / "table2", json_originals()
    folder.mkdir()
    (folder / "records.csv").write_text("seed,cs\n0,1.5\n")
    mine, other, content = (
        ("claims.json", "results.json", results)
        if Path(path).read_bytes()[:1] == b"["
        else ("results.json", "claims.json", checks)
    )
    shutil.copy(path, folder / mine)
    (folder / other).write_bytes(content)
    _each(claims._read_run, folder)
    if mine == "results.json":
        _each(lambda p: repr(explain.explain(p)), folder / mine)


# ---- files of parameters


def yaml_originals():
    folder = Path(__file__).resolve().parents[1] / "params"
    return [p.read_bytes() for p in sorted(folder.rglob("*.yaml"))] + [
        b"teacher: wrn28\nseeds: [0, 1]\nwidth: {wrn28: 1, wrn16: 1}\nstudents: paper\n"
        b"lr: 1.0e-3\ndevice: cpu\nprecision: fp32\n"
    ]


def yaml_damage(data, rng, canary):
    kind = rng.randrange(8)
    if kind == 0:
        return f"teacher: !!python/object/apply:os.mkdir ['{payload(canary)}']\n".encode()
    if kind == 1:
        return (
            b"a: &a [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9))
            + b"teacher: *h\n"
        )
    if kind == 2:
        return b"teacher: " + b"[" * rng.choice((10, 500))
    if kind < 6:
        value = yaml.safe_load(data)
        words = (
            *ODD[:-1],
            "wrn82",
            "cuda:99",
            "cpu:x",
            "bn,bn",
            ["bn", ["ln"]],
            {"wrn28": -1},
            {"wrn28": {}},
            [["paper"]],
        )
        value = odd(json.loads(json.dumps(value)), rng, words) if value else rng.choice(words)
        return (
            json.dumps(value).encode() if rng.random() < 0.5 else yaml.safe_dump(value).encode("utf-8", "surrogatepass")
        )
    return damage(data, rng)


def read_parameters(path):
    "As papermill does, which refuses what is no YAML itself."
    try:
        given = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise ValueError("not YAML") from e
    if not isinstance(given, dict):
        raise ValueError("no mapping")
    given = {str(k): v for k, v in given.items()}
    for model in (TableParameters, parameters.DistillStudy):
        _each(lambda g: parameters.check_parameters(g, model), dict(given))


# ---- archives and images


def picture(kind, size=(6, 4), seed=0):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def class_folders(suffix="png", kind="PNG"):
    return {
        f"{split}/{c}/{i}.{suffix}": picture(kind, seed=i)
        for split in ("train", "test")
        for c in ("cat", "dog")
        for i in range(2)
    }


def pack(files, how, specials=()):
    "An archive: `files` {name: content}, `specials` [(name, type, target, size)] for tar."
    out = io.BytesIO()
    if how == "zip":
        with warnings.catch_warnings(), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            warnings.simplefilter("ignore")
            for name, content in files:
                info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode() or "x")  # zip's names are text
                info.external_attr = 0o100644 << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                z.writestr(info, content)
            for name, kind, target, _ in specials:
                info = zipfile.ZipInfo(name)
                info.external_attr = (0o120777 if kind == tarfile.SYMTYPE else 0o020644) << 16
                z.writestr(info, target)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:" + how.partition(".")[2]) as t:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
        for name, kind, target, size in specials:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, size
            t.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    return out.getvalue()


HOW = ("zip", "tar", "tar.gz", "tar.xz")


def archive_originals():
    return [json.dumps(how).encode() for how in HOW]  # the content is made with the damage


def archive_damage(data, rng, canary):
    how, files, specials = json.loads(data), list(class_folders().items()), []
    kind = rng.randrange(10)
    if kind < 4:
        return damage(pack(files, how), rng)
    names = (
        "../../canary/evil.png",
        f"{canary}/evil.png",
        "train/../../../canary/x.png",
        "train/cat/../../../e.png",
        "..\\..\\evil.png",
        "C:\\evil.png",
        "train/c\nat/1.png",
        "train/\x1b[2J/1.png",
        "train/cat/" + "n" * 5000 + ".png",
        "",
        ".",
        "train",
        "train/cat",
        "train//cat/1.png",
        "train/cat/2.png/3.png",
        "/",
        "//x.png",
        "train/cat/\udce4.png",
        "trai\x00n/cat/1.png",
    )
    if kind == 4:
        files.append((rng.choice(names), b"evil"))
    if kind == 5:
        specials.append(
            (
                f"train/cat/{rng.randrange(3)}.png",
                rng.choice(
                    (
                        tarfile.SYMTYPE,
                        tarfile.LNKTYPE,
                        tarfile.CHRTYPE,
                        tarfile.FIFOTYPE,
                        tarfile.DIRTYPE,
                        tarfile.GNUTYPE_SPARSE,
                    )
                ),
                rng.choice(("/etc/passwd", f"{canary}/secret.txt", "../../..", "train/cat/0.png", "")),
                0,
            )
        )
    if kind == 6:
        files.append(("train/cat/zeros.bmp", bytes(rng.choice((10**6, 10**8)))))
    if kind == 7:
        specials.append(
            (
                "train/cat/x.png",
                rng.choice((tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE)),
                "",
                rng.choice((2**31, 2**40, 10**6)),
            )
        )
    if kind == 8:
        files = [(n, c) for n, c in files if rng.random() < 0.8] + files[: rng.randrange(3)]
    if kind == 9:
        at = rng.randrange(len(files))
        files[at] = (files[at][0], image_damage(files[at][1], rng, canary))
    packed = pack(files, how, specials)
    if how == "zip" and kind == 7:
        packed = packed.replace(struct.pack("<I", len(files[0][1])), struct.pack("<I", rng.choice((0, 1, 2**32 - 2))))
    return packed


def image_originals():
    made = [picture(kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")]
    return [*made, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"]


def image_damage(data, rng, canary):
    if data[:4] == b"\x89PNG" and rng.random() < 0.4:
        size = struct.pack(">II", rng.choice((0, 4, 2**16, 2**31 - 1, 2**32 - 1)), rng.choice((0, 6, 2**16, 2**31)))
        ihdr = b"IHDR" + size + data[24:29]
        return data[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + data[33:]
    return damage(data, rng)


def read_archive(how, path):
    place = Path(path).with_name(f"pets.{how}")
    Path(path).rename(place)
    load_dataset(place, max_bytes=50 * 10**6, image_size=4)


def read_image(path):
    "As one of a folder's images, under any name that an image may have."
    folder = Path(path).with_name("pets")
    for name, content in class_folders().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    Path(path).rename(folder / "train/cat/1.png")
    load_dataset(folder, max_bytes=50 * 10**6)


# ---- the targets


class Target(NamedTuple):
    weight: int
    originals: Callable  # () -> [bytes]
    damage: Callable  # (bytes, Random, canary) -> bytes
    read: Callable  # (path), which reads or raises ValueError


TARGETS = {
    "safetensors": Target(20, safetensors_originals, safetensors_damage, read_safetensors),
    "state dict": Target(18, state_originals, state_damage, loading.read_weights),
    "TorchScript": Target(6, script_originals, script_damage, read_program),
    "program": Target(2, program_originals, program_damage, read_program),
    "JSON": Target(6, json_originals, json_damage, files.read_json),
    "results": Target(8, json_originals, json_damage, read_results),
    "parameters": Target(12, yaml_originals, yaml_damage, read_parameters),
    **{
        how: Target(4, lambda how=how: [json.dumps(how).encode()], archive_damage, partial(read_archive, how))
        for how in HOW
    },
    "image": Target(12, image_originals, image_damage, read_image),
}


# ---- running cases


class Case(NamedTuple):
    number: int
    target: str
    outcome: str  # read, refused, or what went wrong
    said: str


class Hang(BaseException):
    pass


def make(number, seed, targets, originals, canary):
    "The case `number`: (name of its target, the bytes of its file)."
    rng = random.Random(f"{seed}-{number}")
    random.seed(f"{seed}-{number}")
    name = rng.choices(list(targets), [t.weight for t in targets.values()])[0]
    data = rng.choice(originals[name])
    return name, data if rng.random() < 0.03 else targets[name].damage(data, rng, canary)


def tree(folder):
    "All that is in `folder`: names, sizes, times."
    return {str(p): (s.st_size, s.st_mtime_ns, s.st_mode) for p in sorted(folder.rglob("*")) if (s := p.lstat())}


def read_case(number, seed, targets, originals, root):
    "Make a case in root/box, read it, and say what became of it."
    box, canary = root / "box", root / "canary"
    shutil.rmtree(box, ignore_errors=True)
    (box / "in").mkdir(parents=True)
    os.environ["NSKD_CACHE"], os.environ["NSKD_OUTPUTS"] = str(box / "cache"), str(box / "out")
    os.chdir(box / "in")
    name, data = make(number, seed, targets, originals, canary)
    path = box / "in/file"
    path.write_bytes(data)
    before, here = tree(canary), set(os.listdir(root))
    outcome, said = _outcome(targets[name].read, path)
    if tree(canary) != before or set(os.listdir(root)) != here:
        outcome, said = "changed something outside its folder", said or "-"
    return Case(number, name, outcome, said)


def _outcome(read, path):
    def late(*_):
        raise Hang

    signal.signal(signal.SIGPROF, late)
    READ.clear()
    REFUSED.clear()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
        return ("refused", REFUSED[-1]) if REFUSED and not READ else ("read", "")
    except ValueError as e:
        return ("refused", str(e)) if ours(e) else ("a message of several lines, or not ours", repr(e))
    except Hang:
        return f"more than {SECONDS} s", ""
    except BaseException as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        return f"{type(e).__name__}", f"{str(e)[:300]!r} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _child(numbers, seed, targets, originals, root, pipe):
    "In a forked process: read the cases, a line each into `pipe` before and after."
    quiet = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(quiet, fd)
    faulthandler.disable()  # pytest's own would write among its dots
    _limit_memory()
    with os.fdopen(pipe, "w") as out:
        for n in numbers:
            print(json.dumps(n), file=out, flush=True)
            print(json.dumps(read_case(n, seed, targets, originals, root)), file=out, flush=True)


def _limit_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fork(numbers, *args):
    "The cases that one process got through, and how it ended: '' if well."
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            _child(numbers, *args, write_end)
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(write_end)
    cases, begun = [], None
    with os.fdopen(read_end) as lines, _killed_when_silent(pid) as heard:
        for line in lines:
            heard()
            value = json.loads(line)
            if isinstance(value, list):
                cases.append(Case(*value))
                begun = None
            else:
                begun = value
    status = os.waitpid(pid, 0)[1]
    died = (
        f"the process died of signal {os.WTERMSIG(status)}"
        if os.WIFSIGNALED(status)
        else "the process ended early"
        if status
        else ""
    )
    return cases, begun, died


@contextlib.contextmanager
def _killed_when_silent(pid):
    "A process that says nothing for `WAIT` seconds waits for something, or hangs where no alarm reaches it: kill it."

    def kill(*_):
        os.kill(pid, signal.SIGKILL)

    old = signal.signal(signal.SIGALRM, kill)

    def heard():
        return signal.alarm(WAIT)

    heard()
    try:
        yield heard
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def fuzz(n, seed=0, targets=None, first=0, progress=False):
    "Read cases `first` … `first + n - 1` of `seed`; a list of `Case`."
    targets = TARGETS if targets is None else targets
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    originals = {name: t.originals() for name, t in targets.items()}
    root, here = Path(tempfile.mkdtemp(prefix="nskd-fuzz-")), os.getcwd()
    (root / "canary").mkdir()
    (root / "canary/secret.txt").write_text("not for you")
    cases, todo = [], list(range(first, first + n))
    try:
        while todo:
            got, begun, died = _fork(todo[:CHUNK], seed, targets, originals, root)
            cases += got
            if died and begun is not None:
                cases.append(Case(begun, make(begun, seed, targets, originals, root / "canary")[0], died, ""))
            elif died:
                raise RuntimeError(f"{died} before its first case")
            done = {c.number for c in cases}
            todo = [i for i in todo if i not in done]
            if progress:
                print(
                    f"{len(cases)} of {n} files, {len(findings(cases))} findings",
                    end="\r" if sys.stderr.isatty() else "\n",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        os.chdir(here)
        shutil.rmtree(root, ignore_errors=True)
    return cases


def findings(cases):
    return [c for c in cases if c.outcome not in ("read", "refused")]


def summary(cases):
    "A line a target: how many files were read, refused, and found something."
    counts = collections.Counter(
        (c.target, c.outcome if c.outcome in ("read", "refused") else "findings") for c in cases
    )
    names = dict.fromkeys(
        c.target for c in sorted(cases, key=lambda c: list(TARGETS).index(c.target) if c.target in TARGETS else -1)
    )
    lines = [f"{'':12} {'files':>6} {'read':>6} {'refused':>8} {'findings':>9}"]
    for name in names:
        read, refused, found = (counts[name, o] for o in ("read", "refused", "findings"))
        lines.append(f"{name:12} {read + refused + found:6} {read:6} {refused:8} {found:9}")
    return "\n".join(lines)


def main(n=10_000, seed=0):
    "Read `n` cases and print what became of them; the number of findings."
    start = time.monotonic()
    cases = fuzz(n, seed, progress=True)
    found = findings(cases)
    print(summary(cases))
    print(f"{len(cases)} files, {len(found)} findings, {time.monotonic() - start:.0f} s")
    for c in found:
        print(
            f"case {c.number}, {c.target}: {c.outcome} {c.said}  (python tests/fuzz.py --case {c.number} --seed {seed})"
        )
    return len(found)


def again(number, seed):
    "One case in this process, with its traceback."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "canary").mkdir()
        originals = {name: t.originals() for name, t in TARGETS.items()}
        name, data = make(number, seed, TARGETS, originals, Path(root) / "canary")
        Path(root, "file").write_bytes(data)
        os.environ["NSKD_CACHE"], os.environ["NSKD_OUTPUTS"] = f"{root}/cache", f"{root}/out"
        print(f"{name}: {len(data)} bytes, {data[:60]!r}")
        TARGETS[name].read(Path(root, "file"))
        print("read", *REFUSED, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", nargs="?", type=int, default=10_000, help="how many files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="one case again, here")
    given = parser.parse_args()
    sys.exit(again(given.case, given.seed) if given.case is not None else bool(main(given.n, given.seed)))
