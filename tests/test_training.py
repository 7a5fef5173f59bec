"""Training: schedules and recipes against their sources, the loop against one written by hand."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from helpers import evaluation, training
from helpers.data import Dataset
from helpers.loader import Augmentation, Loader
from helpers.models import build_model
from helpers.recipes import RECIPES, Recipe, learning_rate_at
from helpers.training import EpochRecord, TrainingDiverged, train

SGD = Recipe("test", "sgd", 0.05, "constant", batch_size=16, epochs=2)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compute_dtype", lambda device: torch.float32)


def network(name: str = "simple_cnn", dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(name, num_classes=10, image_size=16, width=0.25, dropout=dropout)


def assert_same_weights(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> None:
    weights = first.state_dict(), second.state_dict()
    torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance)


class Failing(nn.Module):
    """A network whose forward pass fails, or gives NaN, from the training step `step` on."""

    def __init__(self, step: int, message: str | None = None) -> None:
        super().__init__()
        self.network, self.steps, self.message = network(), step, message

    def forward(self, images: Tensor) -> Tensor:
        self.steps -= self.training
        if self.steps >= 0:
            return self.network(images)
        if self.message is None:
            return self.network(images) * math.nan
        raise RuntimeError(self.message)


def rates_of(schedule: str, peak: float, steps: int) -> list[float]:
    recipe = replace(SGD, schedule=schedule, learning_rate=peak)
    return [learning_rate_at(recipe, step, steps) for step in range(steps)]


@pytest.mark.parametrize("steps", [4, 7, 10, 64, 500])
@pytest.mark.parametrize("schedule", ["onecycle", "step"])
def test_schedules_are_torchs(schedule: str, steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    if schedule == "onecycle":
        options = {"max_lr": 0.4, "total_steps": steps, "cycle_momentum": False}
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, **options)
    else:
        milestones = [math.ceil(0.5 * steps), math.ceil(0.75 * steps)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates_of(schedule, 0.4, steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("steps", [10, 100, 505])
def test_triangular_rises_over_a_fifth_and_falls_to_zero(steps: int) -> None:
    expected = np.interp(np.arange(steps), [-1, 0.2 * steps - 1, 0.2 * steps, steps], [0, 2, 2, 0])
    assert rates_of("triangular", 2.0, steps) == pytest.approx(list(expected))


@pytest.mark.parametrize("schedule", ["constant", "step", "triangular", "onecycle"])
def test_every_schedule_is_defined_for_the_shortest_runs(schedule: str) -> None:
    assert all(0 < rate <= 0.4 for steps in (1, 2, 3) for rate in rates_of(schedule, 0.4, steps))


def test_where_a_batch_size_is_given_with_the_rate_the_rate_scales_with_its_root() -> None:
    assert RECIPES["fast"].peak_learning_rate == pytest.approx(0.2 * (512 / 500) ** 0.5)
    assert replace(RECIPES["fast"], batch_size=125).peak_learning_rate == pytest.approx(0.1)
    assert replace(RECIPES["adam"], batch_size=512).peak_learning_rate == 1e-3


@pytest.mark.parametrize(
    ("changes", "kind", "settings"),
    [
        ({"nesterov": True, "momentum": 0.8}, "SGD", {"nesterov": True, "momentum": 0.8}),
        ({"weight_decay": 0.01}, "SGD", {"nesterov": False, "weight_decay": 0.01}),
        ({"optimizer": "adam"}, "Adam", {"betas": (0.9, 0.999), "weight_decay": 0.0}),
        ({"optimizer": "adamw", "weight_decay": 0.1}, "AdamW", {"weight_decay": 0.1}),
    ],
)
def test_the_optimizer_is_built_as_the_recipe_says(
    changes: dict[str, Any], kind: str, settings: dict[str, Any]
) -> None:
    model = network()
    optimizer = training.make_optimizer(model, replace(SGD, reference_batch_size=32, **changes))
    assert type(optimizer).__name__ == kind
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in settings} == settings
    assert group["lr"] == pytest.approx(0.05 * 0.5**0.5)  # the scaled peak
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


def test_momentum_that_begins_with_zeros_is_momentum() -> None:
    """As on a GPU, where torch would leave it unwritten if the first step is left out."""
    weights = []
    for begins in (True, False):
        layer = nn.Linear(3, 1)
        nn.init.ones_(layer.weight)
        options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "fused": True}
        optimizer = torch.optim.SGD([layer.weight], 0.1, **options)
        if begins:
            optimizer.state[layer.weight]["momentum_buffer"] = torch.zeros_like(layer.weight)
        for step in range(3):
            layer.weight.grad = torch.tensor([[0.3, -0.2, 0.7]]) * (step + 1)
            optimizer.step()
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)


def test_parameter_groups_hold_each_parameter_once_and_scale_by_distance() -> None:
    model = network("resnet18")
    groups = training.parameter_groups(model, 0.5)
    assert [group["scale"] for group in groups] == [0.5**n for n in range(7)]
    assert groups[0]["params"][0] is model.fc.weight
    assert groups[-1]["params"][0] is model.conv1.weight
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def hand_written(
    model: nn.Module, dataset: Dataset, recipe: Recipe, rates: list[float], epochs: int
) -> list[float]:
    """Train as a textbook would write it; return the mean loss of each epoch."""
    model.to(memory_format=torch.channels_last)  # deep networks amplify another order of sums
    optimizer = torch.optim.Adam(model.parameters())
    if recipe.optimizer == "sgd":
        options = {"nesterov": recipe.nesterov, "weight_decay": recipe.weight_decay}
        optimizer = torch.optim.SGD(model.parameters(), 1.0, recipe.momentum, **options)
    statistics, smoothing = dataset.channel_statistics, recipe.label_smoothing
    loader = Loader(dataset.train, *statistics, recipe.batch_size, recipe.augmentation, seed=5)
    means = []
    for epoch in range(epochs):
        model.train()
        losses = []
        for step, (images, labels) in enumerate(loader.batches(epoch), epoch * len(loader)):
            targets = (1 - smoothing) * nn.functional.one_hot(labels, 10) + smoothing / 10
            loss = -(targets * model(images).log_softmax(1)).sum(1).mean()
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(float(np.mean(losses)))
    return means


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("simple_cnn", {"optimizer": "adam", "learning_rate": 1e-3}),
        ("simple_cnn", {"nesterov": True, "weight_decay": 0.01, "label_smoothing": 0.2}),
        ("resnet20", {"schedule": "triangular", "augmentation": Augmentation(cutout=8)}),
    ],
)
def test_the_loop_equals_one_written_by_hand(
    name: str, changes: dict[str, Any], small_shapes: Dataset
) -> None:
    recipe, model, twin = replace(SGD, **changes), network(name), network(name)
    trained = train(model, small_shapes, recipe, epochs=2, seed=5)
    rates = [recipe.learning_rate] * 10
    if recipe.schedule == "triangular":
        rates = list(np.interp(np.arange(10), [-1, 1, 2, 10], [0, 0.05, 0.05, 0]))
    losses = hand_written(twin, small_shapes, recipe, rates, epochs=2)
    assert [record.train_loss for record in trained.history] == pytest.approx(losses, rel=1e-6)
    assert_same_weights(model, twin, tolerance=1e-6)
    with pytest.raises(AssertionError):  # the tolerance is far below what training did
        assert_same_weights(model, network(name), tolerance=1e-3)


def test_the_history_holds_what_was_measured(small_shapes: Dataset, tmp_path: Path) -> None:
    model, told, written = network(), [], []

    def on_epoch(record: EpochRecord) -> None:
        told.append(record)
        written.append(list(pd.read_csv(tmp_path / "history.csv")["epoch"]))

    recipe = replace(SGD, schedule="step")
    options = {"epochs": 4, "seed": 0, "folder": tmp_path, "on_epoch": on_epoch}
    untested = replace(small_shapes, test=None)  # training has no business there
    assert train(model, untested, recipe, **options).history == told
    assert written == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]  # readable while training runs
    assert [record.learning_rate for record in told] == pytest.approx([0.05, 0.05, 5e-3, 5e-4])
    validation = small_shapes.validation
    logits = training.predict(model, validation, *small_shapes.channel_statistics)
    expected = evaluation.metrics(logits, validation.labels)
    assert told[-1].validation_loss == pytest.approx(expected["loss"], rel=1e-5)
    assert told[-1].validation_accuracy == expected["accuracy"]
    assert all(record.seconds > 0 for record in told)


def test_training_accuracy_is_that_of_the_images_seen(small_shapes: Dataset) -> None:
    recipe = replace(SGD, learning_rate=1e-6, batch_size=30)
    assert len(small_shapes.train) % recipe.batch_size, "some images are left out of each epoch"
    last = network()
    with torch.no_grad():
        last.fc2.weight.zero_()
        last.fc2.bias.copy_(torch.eye(10)[9])
    labels = torch.full_like(small_shapes.train.labels, 9)
    dataset = replace(small_shapes, train=replace(small_shapes.train, labels=labels))
    for mixup in (0.0, 0.4):  # also of class probabilities
        changed = replace(recipe, augmentation=Augmentation(mixup=mixup))
        trained = train(copy.deepcopy(last), dataset, changed, epochs=2, seed=0)
        assert [record.train_accuracy for record in trained.history] == [1.0, 1.0]


def test_training_repeats_bit_for_bit_and_the_seed_matters(small_shapes: Dataset) -> None:
    models = [network(dropout=0.5) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(3)  # the global generator's state doesn't enter
        train(model, small_shapes, replace(SGD, augmentation=Augmentation()), epochs=1, seed=seed)
    assert_same_weights(models[0], models[1])
    with pytest.raises(AssertionError):
        assert_same_weights(models[0], models[2])


def test_dropout_alone_draws_from_a_generator_of_the_seed(small_shapes: Dataset) -> None:
    before, states = torch.get_rng_state(), []
    options = {"epochs": 1, "seed": 3, "on_epoch": lambda _: states.append(torch.get_rng_state())}
    for dropout in (0.0, 0.5):
        train(network(dropout=dropout), small_shapes, SGD, **options)
        assert torch.equal(torch.get_rng_state(), before)  # put back
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        assert torch.equal(states[0], torch.get_rng_state())
        assert not torch.equal(states[1], torch.get_rng_state())


def test_kernels_repeat_in_training_and_the_settings_are_put_back(small_shapes: Dataset) -> None:
    def settings() -> tuple[Any, ...]:
        filling, cudnn = torch.utils.deterministic, torch.backends.cudnn
        mode, fills = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
        return mode, fills, cudnn.deterministic, cudnn.benchmark

    before, seen = settings(), []
    options = {"epochs": 1, "seed": 0, "on_epoch": lambda _: seen.append(settings())}
    train(network(), small_shapes, SGD, **options)
    assert seen == [(1, False, True, False)] and settings() == before == (0, True, False, False)


def test_batch_norms_with_frozen_parameters_stay_in_evaluation_mode() -> None:
    model = network("resnet20").eval()
    model.bn1.requires_grad_(False)
    training.set_training_mode(model)
    assert [name for name, module in model.named_modules() if not module.training] == ["bn1"]


def test_a_batch_larger_than_the_training_set_is_refused(small_shapes: Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size is 81; expected at most 80"):
        train(network(), small_shapes, replace(SGD, batch_size=81), epochs=1, seed=0)
    train(network(), small_shapes, replace(SGD, batch_size=80), epochs=1, seed=0)  # all may


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_give_nearly_the_same_training(
    monkeypatch: pytest.MonkeyPatch, small_shapes: Dataset, dtype: torch.dtype
) -> None:
    losses = []
    for used in (torch.float32, dtype):
        monkeypatch.setattr(training, "compute_dtype", lambda _, used=used: used)
        trained = train(network(), small_shapes, SGD, epochs=2, seed=0)
        losses.append([record.train_loss for record in trained.history])
    assert trained.scaler.is_enabled() == (dtype == torch.float16)
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def prescribe(patch: pytest.MonkeyPatch, confidences: list[float]) -> list[dict[str, Tensor]]:
    """Have epoch i end with a validation loss that falls with confidences[i]; collect weights."""
    weights: list[dict[str, Tensor]] = []

    def predict(model: nn.Module, split: Any, *_: object, **__: object) -> Tensor:
        confidence = confidences[len(weights)]
        weights.append(copy.deepcopy(model.state_dict()))
        return confidence * nn.functional.one_hot(split.labels, 10).float()

    patch.setattr(training, "predict", predict)
    return weights


@pytest.mark.parametrize(
    "case",  # then: epochs, the best of them, the one whose weights stay
    [
        ([1.0, 2.0, 3.0, 2.5, 2.9, 9.0], 2, (5, 3, 3)),  # the last never comes
        ([1.0, 2.0, 3.0, 2.5, 2.9, 9.0], 3, (6, 6, 6)),  # one epoch more of patience reaches it
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2, (3, 1, 1)),  # the same loss is no improvement
        ([1.0, 2.0, 3.0, 4.0, 5.0, 4.0], 2, (6, 5, 5)),  # ends with its last epoch, not early
        ([1.0, 2.0, 3.0, 4.0, 5.0, 4.0], None, (6, 5, 6)),
    ],
)
def test_early_stopping_stops_and_takes_the_best_weights(
    monkeypatch: pytest.MonkeyPatch, small_shapes: Dataset, case: tuple[Any, ...]
) -> None:
    confidences, patience, expected = case
    weights, model = prescribe(monkeypatch, confidences), network()
    trained = train(model, small_shapes, SGD, epochs=6, seed=0, patience=patience)
    final = model.state_dict()
    same = [all(torch.equal(state[n], final[n]) for n in final) for state in weights]
    assert same.count(True) == 1
    assert (len(trained.history), trained.best_epoch, same.index(True) + 1) == expected


def test_a_loss_that_is_not_finite_stops_with_the_epoch_and_the_advice(
    monkeypatch: pytest.MonkeyPatch, small_shapes: Dataset
) -> None:
    recipe = replace(SGD, schedule="triangular", learning_rate=1.0)
    rate = f"{learning_rate_at(recipe, 9, 15):.3g}"
    expected = (
        f"training loss stopped being finite in epoch 2, which ended at learning rate {rate}. "
        "Lower the learning rate (recipe 'test': 1), or check the data for wrong values."
    )
    with pytest.raises(TrainingDiverged) as caught:
        train(Failing(7), small_shapes, recipe, epochs=3, seed=0)
    assert expected in str(caught.value)
    prescribe(monkeypatch, [1.0, math.nan])
    with pytest.raises(TrainingDiverged, match="validation loss .* epoch 2"):
        train(network(), small_shapes, SGD, epochs=3, seed=0)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        None,  # what torch says on this machine
    ],
)
@pytest.mark.parametrize("compiled", [(), ("cpu",)])
@pytest.mark.filterwarnings("error")  # in a compiled network this isn't taken for its failure
def test_out_of_memory_names_batch_size_model_and_remedy(
    monkeypatch: pytest.MonkeyPatch, small_shapes: Dataset, message: str, compiled: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(training, "COMPILED_DEVICES", compiled)
    if message is None:
        with pytest.raises(RuntimeError) as refused:
            torch.empty(2**55)
        message = str(refused.value)
    expected = r"Failing \([\d,]+ parameters\) with batch_size 16 on 16-pixel .*BATCH_SIZE=8, or"
    with pytest.raises(training.OutOfMemory, match=expected):
        train(Failing(2, message), small_shapes, SGD, epochs=1, seed=0)
    if not compiled:
        with pytest.raises(RuntimeError, match="^shapes don't fit$"):  # another error passes
            train(Failing(2, "shapes don't fit"), small_shapes, SGD, epochs=1, seed=0)


@pytest.mark.parametrize("failure", [None, "forward", "backward"])
def test_a_network_is_compiled_or_runs_eagerly_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, small_shapes: Dataset, failure: str | None
) -> None:
    """Tried on the CPU, with a compiler that fails when it is first used, as torch's does."""
    plain, model = network("resnet20", dropout=0.5), network("resnet20", dropout=0.5)
    train(plain, small_shapes, SGD, epochs=2, seed=0)
    calls, compile_with_torch = [], torch.compile

    def fail(*_: Tensor) -> None:
        raise NotImplementedError("no compiler here")

    def compile_(module: nn.Module, mode: str, dynamic: bool) -> Callable[[Tensor], Tensor]:
        forward = compile_with_torch(module, backend="eager")

        def counted(images: Tensor) -> Tensor:
            calls.append(mode)
            logits = fail() if failure == "forward" else forward(images)
            if failure == "backward":
                logits.register_hook(fail)
            return logits

        return counted

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(training, "COMPILED_DEVICES", ("cpu",))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, small_shapes, SGD, epochs=2, seed=0)
    # Three steps are tried; then it is used for all, or never again.
    assert calls == ["reduce-overhead"] * (1 if failure else 3 + 10)
    said = [str(w.message) for w in caught if "torch.compile" in str(w.message)]
    expected = "not compiled, so slower: torch.compile failed (no compiler here)"
    assert said == [expected] * bool(failure)
    assert_same_weights(model, plain, tolerance=0 if failure else 1e-6)
