"""What a GPU would show, without one: fake CUDA tensors, and CUDA graphs played on the CPU.

Fake tensors have a device, a shape and a type, but no values: an operation of two devices raises,
and whatever needs a value, for which the host would wait, is collected or raises. Autograd doesn't
run on them, so gradients are made up.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
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
from helpers.config import ROOT
from helpers.data import Dataset, Split
from helpers.evaluation import predict
from helpers.loader import NO_AUGMENTATION, Augmentation, Loader
from helpers.models import BasicBlock, ResNet
from helpers.recipes import Recipe
from helpers.training import State, train, train_epoch

SGD = Recipe("test", "sgd", 0.05, "constant", batch_size=16, epochs=2, momentum=0.9)
CHANNELS = torch.full((3,), 0.5), torch.full((3,), 0.2)
EVERY = Augmentation(True, 4, 8, 0.3, True, 0.4)
CUDA = torch.device("cuda:0")


def network(**options: Any) -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"stem": "cifar", "residual": True, "projection": True, "dropout": 0.0}
        return ResNet(BasicBlock, (1, 1), (4, 8), num_classes=10, **settings | options)


class Fake(TorchDispatchMode):
    """What happens on a fake GPU: copies and values that the host waits for, types on devices."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: list[Tensor] = []
        self.types: set[tuple[str, torch.dtype]] = set()
        self.model = nn.Module()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func.namespace == "aten" and func._can_decompose()
        ):  # as in inference mode, where `to` comes whole
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self.types.add((out.device.type, out.dtype))
        copies = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}
        if func in copies and (source := args[copies[func]]).device != out.device:
            pinned = any(source is tensor for tensor in self.pinned)
            if not (pinned and kwargs.get("non_blocking")):
                self.waits.append(f"{source.device} to {out.device}: {tuple(source.shape)}")
        return out

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def value(self, tensor: Tensor) -> float:
        if tensor.device.type != "cpu":
            self.waits.append(f"value of {tensor.device}")
        return 0.0

    def network(self, device: torch.device) -> ResNet:
        with device:
            self.model = network(dropout=0.1)
        self.waits.clear()
        return self.model

    def make_gradients(self, loss: Tensor) -> None:
        assert loss.shape == () and loss.dtype == torch.float32
        for parameter in self.model.parameters():
            parameter.grad = torch.empty_like(parameter)


def one_hot(labels: Tensor) -> Tensor:
    assert labels.device.type == "cpu", "the number of classes is a value"
    return labels.new_zeros(len(labels), 10)


def untouched(images: Tensor, seeds: Tensor) -> Tensor:
    assert images.device.type == seeds.device.type == "cpu"
    assert images.dtype == torch.uint8
    return images


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    found = Fake()
    monkeypatch.setattr(Tensor, "__float__", lambda tensor: found.value(tensor))
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: found.pin(tensor))
    monkeypatch.setattr(Tensor, "backward", lambda loss: found.make_gradients(loss))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: None)  # torch's has no fake form
    monkeypatch.setattr(loader.F, "one_hot", one_hot)
    monkeypatch.setattr(loader, "trivial_augment", untouched)
    monkeypatch.setattr(loader, "fits", lambda device, size: True)
    with FakeTensorMode(allow_non_fake_inputs=True), found:
        yield found


def split(images: int) -> Split:
    pixels = torch.zeros(images, 3, 16, 16, dtype=torch.uint8)
    return Split(pixels, torch.zeros(images, dtype=torch.long))


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, EVERY])
def test_batches_wait_for_the_gpu_once_an_epoch(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, fits: bool, augmentation: Augmentation
) -> None:
    monkeypatch.setattr(loader, "fits", lambda device, size: fits)
    waits = []
    for count in (8, 16):
        fake.waits.clear()
        batches = Loader(split(count), *CHANNELS, 4, augmentation, device=CUDA)
        for images, labels in batches.batches(0):
            assert images.device == labels.device == CUDA
            assert images.is_contiguous(memory_format=torch.channels_last)
        waits.append(len(fake.waits))
    assert waits[0] == waits[1], fake.waits


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_waits_for_the_gpu_once_an_epoch(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, capability: tuple[int, int], optimizer: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype = config.compute_dtype(CUDA)
    assert dtype == {(8, 0): torch.bfloat16, (7, 5): torch.float16}[capability]
    recipe = replace(SGD, optimizer=optimizer, augmentation=EVERY)
    waits = []
    for count in (32, 64):
        model = fake.network(CUDA)
        made = training.make_optimizer(model, recipe)
        if optimizer == "sgd":  # else a first step that the scaler leaves out leaves it unwritten
            assert all("momentum_buffer" in made.state[p] for p in model.parameters())
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        batches = Loader(split(count), *CHANNELS, 16, EVERY, device=CUDA)
        train_epoch(State(model, made, scaler, dtype, []), model, batches, recipe, 0, len(batches))
        waits.append(len(fake.waits))
    assert waits[0] == waits[1], fake.waits
    assert ("cuda", dtype) in fake.types


def test_predict_waits_for_the_logits_alone(fake: Fake) -> None:
    channels = torch.zeros(3), torch.ones(3)
    logits = predict(fake.network(CUDA), split(1200), *channels, dtype=torch.bfloat16)
    assert logits.shape == (1200, 10) and logits.device.type == "cpu"
    sent = ["cpu to cuda:0: (3,)"] * 2  # mean and standard deviation
    assert fake.waits == [*sent, "cuda:0 to cpu: (1200, 10)"]


@pytest.mark.parametrize("method", gradcam.METHODS)
@pytest.mark.parametrize("target", [None, "all", [1, 2, 3, 4]])
def test_maps_are_computed_where_the_model_is(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, method: str, target: Any
) -> None:
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: False)  # no class is out of range

    def gradients(total: Tensor, leaves: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
        return [torch.empty_like(leaf) for leaf in leaves]

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    found = gradcam.cam(fake.network(CUDA), torch.zeros(4, 3, 16, 16), target, "layer2", method)
    assert found.maps.device == found.logits.device == found.all_zero.device == CUDA


# --- CUDA graphs --------------------------------------------------------------------------------


class Graphs:
    """Compiles as torch does, and keeps outputs as CUDA graphs do: until the next step begins."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.recorded = self.of_symbolic_size = 0
        self.backend = aot_autograd(fw_compiler=self.record, bw_compiler=self.record)

    def record(self, module: nn.Module, inputs: list[Any]) -> Any:
        self.recorded += 1
        self.of_symbolic_size += any(isinstance(value, torch.SymInt) for value in inputs)
        memory: list[Any] = []

        def replay(*values: Any) -> list[Any]:
            results = module(*values)
            if not memory:
                memory[:] = [x.clone() if isinstance(x, Tensor) else x for x in results]
                self.outputs += [x for x in memory if isinstance(x, Tensor)]
            for place, result in zip(memory, results, strict=True):
                if isinstance(place, Tensor):
                    place.copy_(result)
            return [x.detach() if isinstance(x, Tensor) else x for x in memory]

        return make_boxed_func(replay)

    def begin_step(self) -> None:
        for tensor in self.outputs:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    played, compile_with_torch = Graphs(), torch.compile

    def compile_(model: nn.Module, *, mode: str, dynamic: bool | None = None) -> Any:
        return compile_with_torch(model, backend=played.backend, dynamic=dynamic)

    torch.compiler.reset()
    monkeypatch.setattr(training, "_compiled", [])
    monkeypatch.setattr(training, "compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(training, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", played.begin_step)
    return played


def trained(model: nn.Module, dataset: Dataset, recipe: Recipe = SGD, **options: Any) -> Tensor:
    train(model, dataset, recipe, **{"epochs": 3, "seed": 0} | options)
    return torch.cat([x.flatten().double() for x in model.state_dict().values()])


CASES = {
    "plain": {},
    "Adam": {"recipe": replace(SGD, optimizer="adam", learning_rate=1e-3)},
    "mixup": {"recipe": replace(SGD, augmentation=Augmentation(mixup=0.4))},
    "patience": {"patience": 1, "recipe": replace(SGD, learning_rate=0.5)},
    "pruned": {},
    "frozen": {},
}


def made(case: str) -> ResNet:
    model = network()
    if case == "pruned":
        finetuning.prune_weights(model, 0.5)
    if case == "frozen":
        finetuning.transfer(model, model.state_dict(), frozen=True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_training_in_cuda_graphs_gives_the_weights_of_training_without(
    monkeypatch: pytest.MonkeyPatch, graphs: Graphs, small_shapes: Dataset, case: str
) -> None:
    found = trained(made(case), small_shapes, **CASES[case])
    assert graphs.recorded == 2 and len(graphs.outputs) > 2, "forward and backward"
    monkeypatch.setattr(training, "COMPILED_DEVICES", ())
    torch.testing.assert_close(found, trained(made(case), small_shapes, **CASES[case]))


def test_gradients_that_outlive_their_step_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, graphs: Graphs, small_shapes: Dataset
) -> None:
    zero_grad = torch.optim.SGD.zero_grad
    kept = lambda optimizer, set_to_none: zero_grad(optimizer, set_to_none=False)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "zero_grad", kept)
        with pytest.raises((training.TrainingDiverged, AssertionError)):
            found = trained(network(), small_shapes)
            monkeypatch.setattr(training, "COMPILED_DEVICES", ())
            torch.testing.assert_close(found, trained(network(), small_shapes))


def test_one_graph_a_structure_batch_and_image_size(graphs: Graphs, small_shapes: Dataset) -> None:
    smaller = [replace(part, images=part.images[..., :12, :12]) for part in (small_shapes.train,)]
    cropped = replace(small_shapes, train=smaller[0])
    variants = [(small_shapes, 16), (small_shapes, 16), (small_shapes, 20), (cropped, 20)]
    with torch._dynamo.config.patch(recompile_limit=2):  # beyond, torch compiles no more
        for seed, (dataset, batch_size) in enumerate(variants):
            recipe = replace(SGD, batch_size=batch_size)
            trained(network(), dataset, recipe, seed=seed, epochs=1)
        for dropout in (0.1, 0.2, 0.3):
            trained(network(dropout=dropout), small_shapes, epochs=1)
    assert (graphs.recorded, graphs.of_symbolic_size) == (2 * (3 + 3), 0)


def test_kernels_repeat_in_training_and_the_settings_are_put_back(small_shapes: Dataset) -> None:
    def settings() -> tuple[Any, ...]:
        filling = torch.utils.deterministic.fill_uninitialized_memory
        cudnn = torch.backends.cudnn
        return torch.get_deterministic_debug_mode(), filling, cudnn.deterministic, cudnn.benchmark

    before, seen = settings(), []
    trained(network(), small_shapes, epochs=1, on_epoch=lambda _: seen.append(settings()))
    assert seen == [(1, False, True, False)] and settings() == before == (0, True, False, False)


def test_every_process_asks_for_repeatable_kernels_before_cuda_is_used() -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC")
    code = f"import os; from helpers import config; print(*map(os.environ.get, {names}))"
    for own, expected in (({}, ":4096:8 1"), ({names[0]: ":16:8"}, ":16:8 1")):
        environment = {k: v for k, v in os.environ.items() if k not in names} | own
        command = [sys.executable, "-c", code]
        said = subprocess.check_output(command, text=True, cwd=ROOT, env=environment)
        assert said.strip() == expected
