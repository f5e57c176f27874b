"""A step on a GPU: never a look at a value, for which the processor would wait, and nothing on the wrong device.

Most of it is rehearsed without one. PyTorch's fake tensors know a device, a type and a shape and no values, so that
any look at one is an error, and so is an operation on tensors of two devices. What they can't do here is learn: that
half is watched on a CPU.
"""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import nskd.distillation
import nskd.engine.hardware
from nskd.engine.hardware import _alone
from nskd.distillation import DistillConfig, distill, prepare
from nskd.supervision import TeacherBatches
from nskd.models import create_model
from nskd.norms import teacher_context
from nskd.engine.shared_batch import Group
from nskd.samplers import create_sampler

SHAPE = (3, 32, 32)
GPU = torch.device("cuda:0")
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")  # so what is rehearsed is rehearsed in float32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Pretended(TorchFunctionMode):
    "The calls that enter a device before they reach a fake tensor, said in those that don't."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.contiguous:
            return torch.empty_like(args[0], **kwargs)
        if func is torch.Tensor.__getitem__ and args[0].device == GPU:
            return self.picked(*args)
        if func is torch.Tensor.__setitem__ and args[0].device == GPU:
            return self.put(*args)
        return func(*args, **kwargs)

    def put(self, t, index, values):
        torch.ops.aten.index_put(t, [index], values)

    def picked(self, t, index):
        for axis, i in reversed(list(enumerate(index if isinstance(index, tuple) else (index,)))):
            if isinstance(i, torch.Tensor):
                if i.dtype == torch.bool:
                    raise DataDependentOutputException("a mask as an index")
                t = torch.ops.aten.index(t, [None] * axis + [i])
            else:
                t = (
                    t.unsqueeze(axis)
                    if i is None
                    else t.select(axis, i)
                    if isinstance(i, int)
                    else torch.ops.aten.slice(t, axis, i.start, i.stop, i.step or 1)
                )
        return t


@pytest.fixture
def pretend(monkeypatch):
    "A context in which tensors on `GPU` are fake."
    monkeypatch.setattr(nskd.engine.hardware, "bf16_is_faster", lambda kind: True)
    generator = torch.Generator
    monkeypatch.setattr(nskd.distillation.torch, "Generator", lambda device=None: generator())
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    class Both:
        def __enter__(self):
            fake.__enter__()
            self.said = Pretended()
            self.said.__enter__()

        def __exit__(self, *error):
            self.said.__exit__(*error)
            fake.__exit__(*error)

    return Both


def on_gpu(net):
    "The network with fake tensors, to be called where they are pretended."
    for m in net.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype, device=GPU), requires_grad=False
                )
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=GPU)
    return net


def noise(name):
    return create_sampler(name, SHAPE, **dict(mean=[0.5] * 3, std=[0.2] * 3) if name == "ddg" else {})


def batch(draw, cfg, norm="bn", net="r18"):
    teacher = on_gpu(create_model(net, 10, 3, 32, norm=norm, width=8 if net == "r18" else None, seed=0))
    batches = TeacherBatches(teacher, draw, cfg, 10, GPU, "bf16")
    with teacher_context(teacher, cfg.teacher_mode, 0.5):
        return batches(torch.Generator())[:2]


@pytest.mark.parametrize(
    "norm,changes",
    [
        ("bn", {}),
        ("ln", {}),
        ("gn", {}),
        ("bn", {"k": 1}),
        ("bn", {"joint_pool": True}),
        ("bn", {"requery": False}),
        ("ln", {"teacher_mode": "rs"}),
    ],
    ids=str,
)
def test_a_batch_is_made_on_a_gpu_without_a_look_at_it(pretend, norm, changes):
    cfg = DistillConfig(**{"batch_size": 24, "k": 3, **changes})
    with pretend():
        x, z = batch(noise("gaussian"), cfg, norm)
    assert x.device == z.device == GPU and x.shape == (24, *SHAPE) and z.shape == (24, 10) and z.dtype == torch.float32


@pytest.mark.parametrize("name", ["uniform", "perlin", "ddg"])
def test_other_noise_is_made_there_too(pretend, name):
    draw = noise(name)
    if name == "ddg":
        draw.sample((1, *SHAPE), device="cpu")
    with pretend():
        x, z = batch(draw, DistillConfig(batch_size=24, k=2))
    assert x.device == z.device == GPU


@pytest.mark.parametrize("changes", [{}, {"mixup": True}, {"target_contexts": 2}], ids=str)
def test_a_batch_from_a_fixed_pool(pretend, changes):
    with pretend():
        x, z = batch(noise("gaussian"), DistillConfig(batch_size=24, k=2, pool_size=48, **changes))
    assert x.device == z.device == GPU and x.shape == (24, *SHAPE)


def test_what_pretends_would_notice(pretend):
    "A look at a value, a choice by a mask, and a tensor left on the processor."
    with pretend():
        x, here = torch.empty(4, 3, device=GPU), torch.empty(4, 3)
        for wrong in (
            lambda: x.sum().item(),
            lambda: bool((x > 0).all()),
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: x + here,
        ):
            with pytest.raises((DataDependentOutputException, RuntimeError)):
                wrong()


class Looks(TorchDispatchMode):
    "Counts the operations for whose result a processor would wait."

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "cosine"},
        {"optimiser": "adamw", "average": 0.9, "warmup": 0.5},
        {"loss": "luminet"},
        {"loss": "pseudo_label"},
    ],
    ids=str,
)
def test_a_student_learns_without_a_look(monkeypatch, changes):
    cfg = DistillConfig(steps=40, batch_size=16, k=2, device="cpu", **changes)
    teacher, student = (create_model("wrn16", 10, 1, 8, width=1, seed=seed) for seed in (0, 1))
    job, _ = prepare(teacher, student, cfg, sampler=create_sampler("gaussian", (1, 8, 8)))
    check = job.check_losses
    monkeypatch.setattr(job, "check_losses", lambda: None)  # every 50 steps on a GPU, in each here
    with job.at_work():
        job.take_step()  # the optimiser makes its state
        with Looks() as looks:
            for _ in range(2):
                job.take_step()
        assert not looks.found
        with Looks() as looks:
            check()
        assert looks.found


def net(width, seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, width, 3, bias=False),
        torch.nn.BatchNorm2d(width),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * width, 10),
    )


TINY = DistillConfig(steps=6, eval_every=3, batch_size=32, k=2, precision="fp32")
tiny = partial(distill, sampler=create_sampler("gaussian", (1, 8, 8)), progress=False)


def test_compiled_networks_teach_and_learn_the_same(tmp_path):
    plain, quick = (tiny(net(8, 0), net(4, 1), TINY.replace(compile=c)) for c in (False, True))
    # Adam divides a gradient by its own size: where that is rounding, one step apart is as far as it gets
    assert quick.history.loss.tolist() == pytest.approx(plain.history.loss.tolist(), rel=1e-3)
    assert all(
        torch.allclose(a, b, atol=1e-2)
        for a, b in zip(plain.student.state_dict().values(), quick.student.state_dict().values())
    )


def test_what_cannot_be_compiled_is_refused_in_a_sentence(monkeypatch):
    with monkeypatch.context() as m, pytest.raises(ValueError, match="start one process"):
        m.setattr(nskd.distillation, "current", lambda: Group(0, 2))
        tiny(net(8, 0), net(4, 1), TINY.replace(compile=True))

    class Odd(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum().item() > 0 else -x)

    with pytest.raises(ValueError, match="Odd can't be compiled .*: set compile to False"):
        tiny(Odd(*net(8, 0)), net(4, 1), TINY.replace(compile=True))


@pytest.mark.parametrize("kind", ["gn", "ln"])
def test_aligned_networks_are_one_graph(kind):
    "What compiles is traced as one piece, aligned and frozen, and learning."
    network = (
        create_model("wrn16", 10, 3, 8, norm="gn", width=1, seed=0)
        if kind == "gn"
        else torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Flatten(), torch.nn.Linear(192, 10)
        )
    )

    def trace():
        return torch.compile(_alone(network), backend="eager", fullgraph=True, dynamic=False)

    x = torch.randn(4, 3, 8, 8)
    with teacher_context(network), torch.no_grad():
        torch.testing.assert_close(trace()(x), network(x), rtol=1e-4, atol=1e-5)
    assert trace()(x).requires_grad


def test_a_gpu_is_named_by_what_pytorch_has(monkeypatch):
    "Of the functions that a run asks of a GPU outside its steps, all are PyTorch's."
    from nskd.benchmark import peak_memory
    from nskd.engine.runs import provenance

    asked = []
    for name, answer in (("get_device_name", "a GPU"), ("synchronize", None), ("max_memory_allocated", 7)):
        monkeypatch.setattr(
            torch.cuda, name, lambda device, name=name, answer=answer: asked.append(name) or answer
        )  # of what is not there: AttributeError
    gpu = torch.device("cuda", 1)
    assert (
        provenance(gpu)["device"] == nskd.engine.hardware.device_name("cuda") == "a GPU"
        and nskd.engine.hardware.timed(lambda: 3, gpu)[1] == 3
        and peak_memory(gpu) == 7
    )
    assert asked == ["get_device_name"] * 2 + ["synchronize"] * 2 + ["max_memory_allocated"]


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("norm", ["bn", "ln"])
def test_no_step_waits_on_a_real_one(norm, compile):
    cfg = DistillConfig(steps=40, batch_size=64, k=2, device="cuda", compile=compile)
    job, _ = prepare(
        create_model("r18", 10, 3, 32, norm=norm, width=8, seed=0),
        create_model("r18", 10, 3, 32, width=8, seed=1),
        cfg,
        sampler=noise("gaussian"),
    )
    with job.at_work():
        for _ in range(4):
            job.take_step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                job.take_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        job.check_losses()


@needs_gpu
def test_a_compiled_run_on_a_gpu_learns_the_same():
    plain, quick = (tiny(net(8, 0), net(4, 1), TINY.replace(compile=c, device="cuda")) for c in (False, True))
    assert quick.history.loss.tolist() == pytest.approx(plain.history.loss.tolist(), rel=1e-2)
