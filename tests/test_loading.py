"""Files that would run code, write files or fill the memory if a loader trusted them: each is refused in one
sentence, and nothing happens.
"""

import io
import json
import os
import pickle
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from nskd.practice.loading import load_teacher, read_weights, tensors_only
from nskd.engine.files import load_tensors, read_json, read_meta

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import Payload, program_originals, rezip, script_originals, _with

SHAPE = (1, 4, 4)


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "ran"


@pytest.fixture(scope="module")
def program():
    return program_originals()[0]


def refused(path, *words, read=lambda p: load_teacher(p, input_shape=SHAPE)):
    with pytest.raises(ValueError) as e:
        read(path)
    text = str(e.value)
    assert "\n" not in text and all(w in text for w in (path.name, *words)), text


def changed(program, change):
    "The program with `change(graph)` made to its JSON."

    def edit(name, content):
        if not name.endswith("models/model.json"):
            return content
        graph = json.loads(content)
        change(graph)
        return json.dumps(graph).encode()

    return rezip(program, edit)


def nodes(graph):
    return graph["graph_module"]["graph"]["nodes"]


def test_a_program_as_it_is_saved_is_read(program, tmp_path):
    (tmp_path / "a.pt2").write_bytes(rezip(program, lambda name, content: content))
    assert "1 BatchNorms" in load_teacher(tmp_path / "a.pt2", input_shape=SHAPE).origin["possible"]


def sizes(graph):
    "All symbolic sizes in a graph: the dicts that hold an expression."
    found, todo = [], [graph]
    while todo:
        v = todo.pop()
        if isinstance(v, dict):
            if "expr_str" in v:
                found.append(v)
            todo += v.values()
        elif isinstance(v, list):
            todo += v
    return found


def hostile_graphs(ran):
    run = f"__import__('os').mkdir({str(ran)!r})"

    def size(expression):
        def change(graph):
            for v in sizes(graph):
                v["expr_str"] = expression

        return change

    def name(graph):
        for v in graph["graph_module"]["graph"]["outputs"]:
            v["as_tensor"]["name"] = f"linear; {run}"
        last = nodes(graph)[-1]
        last["name"] = f"linear; {run}"
        for v in last["outputs"]:
            v["as_tensor"]["name"] = f"linear; {run}"
        graph["graph_module"]["graph"]["tensor_values"][f"linear; {run}"] = graph["graph_module"]["graph"][
            "tensor_values"
        ].pop("linear")
        for v in graph["graph_module"]["signature"]["output_specs"]:
            v["user_output"]["arg"]["as_tensor"]["name"] = f"linear; {run}"

    def target(word):
        def change(graph):
            nodes(graph)[0]["target"] = word

        return change

    def arguments(graph):
        for call in graph["graph_module"]["module_call_graph"]:
            if call.get("signature"):
                call["signature"]["forward_arg_names"] = [f"x, y={run}"]

    def ranges(graph):
        graph["range_constraints"]["u999999999999"] = {"min_val": 2, "max_val": None}

    return {
        "size": size(run),
        "sizes without quotes": size("exec(chr(49))"),
        "endless power": size("9**9**9**9"),
        "name": name,
        "function": target("torch.os.mkdir"),
        "file": target("torch.ops.aten.from_file.default"),
        "methods": target("torch.ops.aten.__class__.mro"),
        "arguments": arguments,
        "counter": ranges,
    }


@pytest.mark.parametrize("kind", hostile_graphs(Path("x")))
def test_a_graph_with_python_in_it_is_refused(kind, program, tmp_path, ran):
    (tmp_path / "a.pt2").write_bytes(changed(program, hostile_graphs(ran)[kind]))
    refused(tmp_path / "a.pt2", "code")
    assert not ran.exists()


def test_guards_are_not_run(program, tmp_path, ran):
    "They are Python in a string; the network is read without them."

    def guards(graph):
        graph["guards_code"] = [f"__import__('os').mkdir({str(ran)!r}) is None"]

    (tmp_path / "a.pt2").write_bytes(changed(program, guards))
    net = load_teacher(tmp_path / "a.pt2", input_shape=SHAPE)
    net(torch.randn(3, *SHAPE))
    assert not ran.exists()


def with_constant(program, name, content, **entry):
    "The program with a constant that its configuration names."
    entry = {"path_name": name, "is_param": False, "use_pickle": False, "tensor_meta": None, **entry}
    config = json.dumps({"config": {"c": entry}}).encode()
    top = zipfile.ZipFile(io.BytesIO(program)).namelist()[0].partition("/")[0]
    return _with(
        rezip(program, lambda n, c: config if n.endswith("model_constants_config.json") else c),
        f"{top}/data/constants/{name}",
        content,
    )


@pytest.mark.parametrize(
    "how",
    [
        "opaque object",
        "custom object",
        "pickled tensor",
        "example inputs",
        "weights",
        "library",
        "older format",
        "twice",
    ],
)
def test_a_program_with_a_pickle_or_a_library_is_refused(how, program, tmp_path, ran):
    evil = pickle.dumps(Payload(str(ran)), 2)
    top = zipfile.ZipFile(io.BytesIO(program)).namelist()[0].partition("/")[0]
    meta = {
        "dtype": 7,
        "sizes": [{"as_int": 1}],
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
        "strides": [{"as_int": 1}],
        "storage_offset": {"as_int": 0},
        "layout": 7,
    }
    data = {
        "opaque object": lambda: with_constant(program, "opaque_obj_0", evil + bytes(-len(evil) % 4), tensor_meta=meta),
        "custom object": lambda: with_constant(program, "custom_obj_0", evil, use_pickle=True),
        "pickled tensor": lambda: with_constant(program, "tensor_0", evil, use_pickle=True),
        "example inputs": lambda: rezip(program, lambda n, c: evil if n.endswith("model.pt") else c),
        "weights": lambda: _with(program, f"{top}/data/weights/model.pt", evil),
        "library": lambda: _with(program, f"{top}/data/aotinductor/model/a.so", b"\x7fELF"),
        "older format": lambda: older(program, evil),
        "twice": lambda: _with(program, f"{top}/data/sample_inputs/model.pt", evil),
    }[how]()
    (tmp_path / "a.pt2").write_bytes(data)
    refused(tmp_path / "a.pt2")
    assert not ran.exists()


def older(program, evil):
    "What PyTorch 2.7 wrote, which is still read, beside a graph that can't be."
    data = rezip(program, lambda n, c: b"{}" if n.endswith("model.json") else c)
    for name, content in (
        ("version", b"8.8"),
        ("serialized_exported_program.json", b"{}"),
        ("serialized_state_dict.json", evil),
        ("serialized_constants.json", evil),
        ("serialized_example_inputs.pt", evil),
    ):
        data = _with(data, name, content)
    return data


def test_only_tensors_are_unpickled_where_a_library_asks_for_all(tmp_path, ran):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Payload(str(ran)), 2))
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=False)
    assert not ran.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class Writes(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x):
        torch.save([x], self.path)
        return x.flatten(1)


def test_torchscript_that_writes_files_is_refused(tmp_path, ran):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Writes(str(ran))).save(str(tmp_path / "a.pt"))
    refused(tmp_path / "a.pt", "calls save")
    assert not ran.exists()


def test_torchscript_that_claims_more_than_it_holds_is_refused(tmp_path):
    "Its reader would read on behind the end."
    data = script_originals()[0]
    (tmp_path / "a.pt").write_bytes(rezip(data, lambda name, content: content))
    load_teacher(tmp_path / "a.pt", input_shape=SHAPE)
    (tmp_path / "a.pt").write_bytes(
        rezip(data, lambda name, content: content[:4] if name.endswith("data/7") else content)
    )
    refused(tmp_path / "a.pt", "holds less than its tensor")


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def test_weights_that_are_no_weights(tmp_path, ran):
    circle = {}
    circle["state_dict"] = circle
    read = dict(read=read_weights)
    for zipped in (True, False):

        def save(value):
            return saved(tmp_path / "a.pth", value, _use_new_zipfile_serialization=zipped)

        refused(save({"w": Payload(str(ran))}), "pickled Python object", **read)
        refused(save(circle), "no weights", **read)
        refused(save({3: torch.ones(2)}), "no weights", **read)
        refused(save({"w": torch.zeros(1).expand(10**12)}), "claims the shape", **read)
        refused(save({"w": torch.ones(3).to_sparse()}), "sparse", **read)
    assert not ran.exists()
    with zipfile.ZipFile(saved(tmp_path / "b.pth", {"w": torch.ones(2)}), "a", zipfile.ZIP_DEFLATED) as z:
        z.writestr("b/data/9", bytes(10**8))
    refused(tmp_path / "b.pth", "times its size", **read)


def header(text, length=None):
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        header(b"{}", 2**63),
        header(b"{}", 2**62),
        header(b"{}", 99_999_999),
        header(b"[" * 10**6),
        header(b"{" + b'"a":{' * 10**5),
        header(b'{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}') + bytes(4),
        header(b'{"w":{"dtype":"F9","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}') + bytes(1),
        header(b'{"\\u0000":7}'),
        b"",
        b"\x00" * 8,
        b"{}",
    ],
    ids=range(14),
)
def test_absurd_safetensors_headers(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    for read in (load_tensors, read_weights, read_meta):
        try:
            read(path)
        except ValueError as e:
            assert "a.safetensors" in str(e) and "\n" not in str(e)
        else:
            assert read is read_meta  # the metadata of a file may be good where its tensors are not


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 10**6, b"9" * 5000, b"\xff\xfe{", b"\x00", "{}".encode("utf-16")], ids=range(7)
)
def test_damaged_json(tmp_path, data):
    (tmp_path / "done.json").write_bytes(data)
    refused(tmp_path / "done.json", "not valid JSON", read=read_json)


@pytest.mark.parametrize("read", [load_tensors, read_meta, read_json])
def test_a_missing_file_is_missing_and_not_damaged(read, tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")


def foreign_network(name):
    "A network of another library as its users export it, with few blocks."
    import nskd.engine.vision  # before timm, which imports torchvision

    if name == "torchvision:mobilenet_v2":
        return nskd.engine.vision.torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25)
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10, depth=1)


@pytest.mark.parametrize(
    "name, norms", [("torchvision:mobilenet_v2", "52 BatchNorms"), ("timm:vit_tiny_patch16_224", "3 LayerNorms")]
)
def test_exported_networks_of_other_libraries_are_read(tmp_path, name, norms):
    net, x = foreign_network(name).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.export.save(
            torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), tmp_path / "net.pt2"
        )
        other = load_teacher(tmp_path / "net.pt2", input_shape=(3, 32, 32))
        assert norms in other.origin["possible"]
        torch.testing.assert_close(other(x), net(x), atol=1e-5, rtol=1e-4)
