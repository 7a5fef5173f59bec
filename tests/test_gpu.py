"""What a GPU would show, without one: fake CUDA tensors, and CUDA graphs played on the CPU.

Fake tensors have a device, a shape and a type but no values: operations of two devices raise; what
needs a value, for which the host would wait, is collected or raises; gradients are made up.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import config, finetuning, gradcam, loader, training
from helpers.data import Dataset, Split
from helpers.evaluation import predict
from helpers.loader import NO_AUGMENTATION, Augmentation, Loader
from helpers.models import BasicBlock, ResNet
from helpers.recipes import Recipe

SGD = Recipe("test", "sgd", 0.05, "constant", batch_size=16, epochs=2, momentum=0.9)
EVERY = Augmentation(True, 4, 8, 0.3, True, 0.4)
CUDA, COPIES = torch.device("cuda:0"), {"_to_copy": 0, "copy_": 1}
Patch = pytest.MonkeyPatch


def network(dropout: float = 0.0) -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"stem": "cifar", "residual": True, "projection": True, "dropout": dropout}
        return ResNet(BasicBlock, (1, 1), (4, 8), num_classes=10, **options)


class Waits(TorchDispatchMode):
    """Collects the values, and the copies but for those from pinned memory, of the fake GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._can_decompose():  # inference mode leaves `to` whole
            with self:
                return func.decompose(*args, **kwargs)
        out, name = func(*args, **kwargs), func.overloadpacket.__name__
        if name in COPIES and (source := args[COPIES[name]]).device != out.device:
            free = hasattr(source, "pinned") and kwargs.get("non_blocking")
            self.seen += [f"{source.device} to {out.device}: {tuple(source.shape)}"] * (not free)
        return out


@pytest.fixture
def waits(monkeypatch: Patch) -> Iterator[Waits]:
    found = Waits()

    def value(tensor: Tensor) -> float:
        found.seen += [f"value of {tensor.device}"] * (tensor.device.type != "cpu")
        return 0.0

    def pin_memory(tensor: Tensor) -> Tensor:
        tensor.pinned = True
        return tensor

    monkeypatch.setattr(Tensor, "__float__", value)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: None)  # torch's has no fake form
    monkeypatch.setattr(loader, "fits", lambda device, size: True)
    monkeypatch.setattr(loader.F, "one_hot", lambda labels: labels.new_zeros(len(labels), 10))
    monkeypatch.setattr(loader, "trivial_augment", lambda images, seeds: images.cpu())
    with FakeTensorMode(allow_non_fake_inputs=True), found:
        try:
            torch.zeros(2, device=CUDA)[:1]
        except RuntimeError:
            pytest.skip("this torch wants a driver even for fake tensors")
        yield found


def split(images: int) -> Split:
    return Split(torch.zeros(images, 3, 16, 16).byte(), torch.zeros(images).long())


def batches(count: int, augmentation: Augmentation) -> Loader:
    return Loader(split(16 * count), torch.zeros(3), torch.ones(3), 16, augmentation, device=CUDA)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, EVERY])
def test_batches_wait_for_the_gpu_once_an_epoch(
    monkeypatch: Patch, waits: Waits, fits: bool, augmentation: Augmentation
) -> None:
    monkeypatch.setattr(loader, "fits", lambda device, size: fits)
    counts = []
    for count in (2, 4):
        waits.seen.clear()
        for images, labels in batches(count, augmentation).batches(0):
            assert images.device == labels.device == CUDA
        counts.append(len(waits.seen))
    assert counts[0] == counts[1], waits.seen


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_waits_for_the_gpu_once_an_epoch(
    monkeypatch: Patch, waits: Waits, capability: tuple[int, int], optimizer: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype = config.compute_dtype(CUDA)
    recipe = replace(SGD, optimizer=optimizer, augmentation=EVERY)
    with CUDA:
        model = network(dropout=0.1)

    def backward(loss: Tensor) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    counts = []
    for count in (2, 4):
        made = training.make_optimizer(model, recipe)
        assert made.defaults["fused"]
        if optimizer == "sgd":  # else a first step that the scaler leaves out leaves it unwritten
            assert all("momentum_buffer" in made.state[p] for p in model.parameters())
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        state = training.State(model, made, scaler, dtype, [])
        waits.seen.clear()
        training.train_epoch(state, model, batches(count, EVERY), recipe, 0, count)
        counts.append(len(waits.seen))
    assert counts[0] == counts[1], waits.seen


def test_predict_waits_for_the_logits_alone(waits: Waits) -> None:
    with CUDA:
        model = network()
    waits.seen.clear()
    logits = predict(model, split(1200), torch.zeros(3), torch.ones(3), dtype=torch.bfloat16)
    assert logits.shape == (1200, 10) and logits.device.type == "cpu"
    assert waits.seen[2:] == ["cuda:0 to cpu: (1200, 10)"]  # after mean and standard deviation


@pytest.mark.parametrize("method", gradcam.METHODS)
@pytest.mark.parametrize("target", [None, "all", [1, 2, 3, 4]])
@pytest.mark.usefixtures("waits")
def test_maps_are_computed_where_the_model_is(monkeypatch: Patch, method: str, target: Any) -> None:
    def gradients(total: Tensor, leaves: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
        return [torch.empty_like(leaf) for leaf in leaves]

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: False)  # no class is out of range
    with CUDA:
        model = network()
    found = gradcam.cam(model, torch.zeros(4, 3, 16, 16), target, "layer2", method)
    assert found.maps.device == found.logits.device == found.all_zero.device == CUDA


class Graphs:
    """Compiles as torch does, and keeps outputs as CUDA graphs do: until the next step begins."""

    def __init__(self) -> None:
        self.memory: list[dict[int, Tensor]] = []
        self.sizes_known: list[bool] = []  # of each graph
        self.backend = aot_autograd(fw_compiler=self.record, bw_compiler=self.record)

    def record(self, module: nn.Module, inputs: list[Any]) -> Any:
        self.sizes_known.append(not any(isinstance(value, torch.SymInt) for value in inputs))
        self.memory.append(own := {})

        def replay(*values: Any) -> list[Any]:
            results = module(*values)
            for place, result in enumerate(results):
                if isinstance(result, Tensor):
                    own.setdefault(place, result.clone()).copy_(result)
            return [own[n].detach() if n in own else x for n, x in enumerate(results)]

        return make_boxed_func(replay)

    def begin_step(self) -> None:
        for tensor in (tensor for own in self.memory for tensor in own.values()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 0)


@pytest.fixture
def graphs(monkeypatch: Patch) -> Graphs:
    played, compile_with_torch = Graphs(), torch.compile

    def compile_(model: nn.Module, *, mode: str, **options: Any) -> Any:
        return compile_with_torch(model, backend=played.backend, **options)

    monkeypatch.setattr(training, "_compiled", [])
    monkeypatch.setattr(training, "compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(training, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", played.begin_step)
    return played


CASES = {
    "plain": {},
    "Adam": {"recipe": replace(SGD, optimizer="adam", learning_rate=1e-3)},
    "mixup": {"recipe": replace(SGD, augmentation=Augmentation(mixup=0.4))},
    "patience": {"patience": 1, "recipe": replace(SGD, learning_rate=0.5)},
    **{case: {} for case in ("pruned", "frozen", "wrong: gradients outlive their step")},
}


def weights(data: Dataset, case: str = "plain", **changes: Any) -> Tensor:
    model = network(changes.pop("dropout", 0.0))
    if case == "pruned":
        finetuning.prune_weights(model, 0.5)
    if case == "frozen":
        finetuning.transfer(model, model.state_dict(), frozen=True)
    training.train(model, data, **{"recipe": SGD, "epochs": 3, "seed": 0} | CASES[case] | changes)
    return torch.cat([x.flatten().double() for x in model.state_dict().values()])


@pytest.mark.parametrize("case", CASES)
def test_training_in_cuda_graphs_gives_the_weights_of_training_without(
    monkeypatch: Patch, graphs: Graphs, small_shapes: Dataset, case: str
) -> None:
    right, zero_grad = not case.startswith("wrong"), torch.optim.Optimizer.zero_grad
    with monkeypatch.context() as patch:
        if not right:
            patch.setattr(torch.optim.SGD, "zero_grad", lambda self, **_: zero_grad(self, False))
        found = weights(small_shapes, case)
    assert len(graphs.sizes_known) == 2, "of the forward and of the backward pass"
    monkeypatch.setattr(training, "COMPILED_DEVICES", ())
    with contextlib.nullcontext() if right else pytest.raises(AssertionError):
        torch.testing.assert_close(found, weights(small_shapes, case))


def test_one_graph_a_structure_batch_and_image_size(graphs: Graphs, small_shapes: Dataset) -> None:
    train = small_shapes.train
    cropped = replace(small_shapes, train=Split(train.images[..., :12, :12], train.labels))
    every = [(small_shapes, 16, 0.0), (small_shapes, 20, 0.0), (cropped, 20, 0.0)]
    every += [(small_shapes, 20, dropout) for dropout in (0.1, 0.2, 0.3)]
    with torch._dynamo.config.patch(cache_size_limit=2):  # beyond, torch compiles no more
        for data, size, dropout in every:
            recipe = replace(SGD, batch_size=size)
            for seed in (0, 1):
                weights(data, dropout=dropout, recipe=recipe, epochs=1, seed=seed)
    assert graphs.sizes_known == [True] * 2 * len(every)
    loader_of_16 = Loader(train, *small_shapes.channel_statistics, 16)
    forward = training.compiled(network(), loader_of_16, torch.float32)
    assert len(forward(torch.zeros(8, 3, 16, 16))) == 8 and all(graphs.sizes_known)
