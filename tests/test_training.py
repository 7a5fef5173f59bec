"""Training: schedules and recipes against their sources, the loop against one written by hand."""

from __future__ import annotations

import copy
import csv
import math
import signal
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import training
from helpers.data import Augmentation, Dataset, load_dataset, make_loader
from helpers.models import build_model
from helpers.training import RECIPES, Recipe, TrainingDiverged, learning_rate_at, train

SGD = Recipe("test", "sgd", 0.05, "constant", batch_size=16, epochs=2)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    sizes = {"train_size": 80, "validation_size": 40, "test_size": 40}
    return load_dataset("shapes", image_size=16, **sizes)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compute_dtype", lambda device: torch.float32)


def network(name: str = "simple_cnn", seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(name, num_classes=10, image_size=16, width=0.25, dropout=dropout)


def assert_same_weights(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


# --- Recipes and schedules ---------------------------------------------------------------------


def torch_rates(make_scheduler: Callable[[Any], Any], peak: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates_of(schedule: str, peak: float, steps: int) -> list[float]:
    recipe = replace(SGD, schedule=schedule, learning_rate=peak)
    return [learning_rate_at(recipe, step, steps) for step in range(steps)]


@pytest.mark.parametrize("steps", [4, 7, 10, 37, 500])
def test_onecycle_is_torchs(steps: int) -> None:
    expected = torch_rates(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.4, total_steps=steps, cycle_momentum=False
        ),
        0.4,
        steps,
    )
    assert rates_of("onecycle", 0.4, steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_onecycle_is_defined_for_the_shortest_runs(steps: int) -> None:
    rates = rates_of("onecycle", 0.4, steps)
    assert all(0 < rate <= 0.4 for rate in rates)


@pytest.mark.parametrize("steps", [8, 64, 500])
def test_step_is_a_tenth_from_half_and_a_hundredth_from_three_quarters(steps: int) -> None:
    milestones = [steps // 2, 3 * steps // 4]
    expected = torch_rates(
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones), 0.1, steps
    )
    assert rates_of("step", 0.1, steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [10, 100, 505])
def test_triangular_rises_over_a_fifth_and_falls_to_zero(steps: int) -> None:
    rates = rates_of("triangular", 2.0, steps)
    rise = 0.2 * steps
    expected = np.interp(np.arange(steps), [-1, rise - 1, rise, steps], [0, 2, 2, 0])
    assert rates == pytest.approx(list(expected))
    assert rates[0] == pytest.approx(2.0 / rise)  # the first step already moves
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 / (steps - rise))  # one step further it would be 0


def test_constant_is_the_peak() -> None:
    assert set(rates_of("constant", 0.3, 20)) == {0.3}


PUBLISHED = {
    "adam": ("adam", 1e-3, "constant", 64, 5, None, False, 0.0, (False, 0, 0)),
    "onecycle": ("sgd", 0.1, "onecycle", 128, 30, None, False, 5e-4, (True, 4, 0)),
    "textbook": ("sgd", 0.1, "step", 128, 164, None, False, 1e-4, (True, 4, 0)),
    "fast": ("sgd", 0.2, "triangular", 512, 80, 500, True, 5e-4, (True, 4, 12)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_their_published_settings(name: str) -> None:
    recipe, shown = RECIPES[name], RECIPES[name].augmentation
    assert (
        recipe.optimizer,
        recipe.learning_rate,
        recipe.schedule,
        recipe.batch_size,
        recipe.epochs,
        recipe.reference_batch_size,
        recipe.nesterov,
        recipe.weight_decay,
        (shown.flip, shown.crop_padding, shown.cutout),
    ) == PUBLISHED[name]
    assert recipe.name == name
    assert (recipe.momentum, recipe.label_smoothing) == (0.9, 0.0)


def test_the_four_recipes_are_there() -> None:
    assert list(RECIPES) == list(PUBLISHED)


def test_peak_learning_rate_scales_with_the_root_of_the_batch_only_with_a_reference() -> None:
    fast = RECIPES["fast"]
    assert fast.peak_learning_rate == pytest.approx(0.2 * (512 / 500) ** 0.5)
    assert replace(fast, batch_size=125).peak_learning_rate == pytest.approx(0.1)
    assert replace(fast, batch_size=5).peak_learning_rate == pytest.approx(0.02)
    assert replace(RECIPES["adam"], batch_size=512).peak_learning_rate == 1e-3


BAD_SETTINGS = [
    ("name", ""),
    ("name", "../elsewhere"),
    ("optimizer", "lion"),
    ("learning_rate", 0),
    ("learning_rate", -0.1),
    ("learning_rate", math.inf),
    ("learning_rate", math.nan),
    ("learning_rate", "0.1"),
    ("schedule", "cosine"),
    ("batch_size", 0),
    ("batch_size", 16.0),
    ("epochs", 0),
    ("epochs", 2.5),
    ("reference_batch_size", 0),
    ("reference_batch_size", 0.5),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("nesterov", 1),
    ("weight_decay", -1e-4),
    ("weight_decay", math.inf),
    ("label_smoothing", 1.0),
    ("label_smoothing", -0.1),
    ("augmentation", "flip"),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_a_recipe_refuses_what_is_not_allowed(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*expected "):
        replace(SGD, **{name: value})


def test_every_field_of_a_recipe_has_a_refusal() -> None:
    assert {name for name, _ in BAD_SETTINGS} == set(Recipe.__dataclass_fields__)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov is True with momentum 0"):
        replace(SGD, momentum=0.0, nesterov=True)


def test_a_whole_number_is_the_same_setting_as_its_float() -> None:
    assert repr(replace(SGD, learning_rate=1)) == repr(replace(SGD, learning_rate=1.0))


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"epochs": 1.5}, {"patience": 0}])
def test_train_refuses_bad_lengths(dataset: Dataset, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(setting))} is .*expected a positive"):
        train(network(), dataset, SGD, **{"epochs": 1, "seed": 0} | setting)


def test_a_batch_larger_than_the_training_set_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size is 81, but there are 80 training images"):
        train(network(), dataset, replace(SGD, batch_size=81), epochs=1, seed=0)
    train(network(), dataset, replace(SGD, batch_size=80), epochs=1, seed=0)  # the whole set may


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
    recipe = replace(SGD, reference_batch_size=32, **changes)
    optimizer = training.make_optimizer(model, recipe)
    assert type(optimizer).__name__ == kind
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in settings} == settings
    assert group["lr"] == pytest.approx(0.05 * 0.5**0.5)  # the scaled peak
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


# --- The loop ----------------------------------------------------------------------------------


def hand_written(
    model: nn.Module, dataset: Dataset, recipe: Recipe, rates: list[float], epochs: int
) -> list[float]:
    """Train as a textbook would write it; return the mean loss of each epoch.

    In the same memory format, since another order of sums is amplified by deep networks.
    """
    model.to(memory_format=torch.channels_last)
    if recipe.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(
            model.parameters(),
            lr=1.0,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
    else:
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=recipe.weight_decay)
    loader = make_loader(
        dataset,
        batch_size=recipe.batch_size,
        augmentation=recipe.augmentation,
        seed=5,
        device=torch.device("cpu"),
    )
    smoothing, step, means = recipe.label_smoothing, 0, []
    for epoch in range(epochs):
        model.train()
        losses = []
        for images, labels in loader.batches(epoch):
            targets = torch.full((len(labels), 10), smoothing / 10)
            targets[torch.arange(len(labels)), labels] += 1 - smoothing
            logits = model(images)
            loss = -(targets * logits.log_softmax(1)).sum(1).mean()
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
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
@pytest.mark.usefixtures("in_float32")
def test_the_loop_equals_one_written_by_hand(
    name: str, changes: dict[str, Any], dataset: Dataset
) -> None:
    recipe = replace(SGD, **changes)
    model, twin = network(name), network(name)
    trained = train(model, dataset, recipe, epochs=2, seed=5)
    if recipe.schedule == "constant":
        rates = [recipe.learning_rate] * 10
    else:
        rates = list(np.interp(np.arange(10), [-1, 1, 2, 10], [0, 0.05, 0.05, 0]))
    losses = hand_written(twin, dataset, recipe, rates, epochs=2)
    assert [record.train_loss for record in trained.history] == pytest.approx(losses, rel=1e-6)
    assert_same_weights(model, twin, tolerance=1e-6)
    changed = max(
        (after - before).abs().max().item()
        for after, before in zip(model.parameters(), network(name).parameters(), strict=True)
    )
    assert changed > 1e-3  # the tolerance is far below what training did


@pytest.mark.usefixtures("in_float32")
def test_the_history_holds_what_was_measured(dataset: Dataset) -> None:
    model = network()
    recipe = replace(SGD, schedule="step", epochs=4)
    reports = []
    trained = train(model, dataset, recipe, epochs=4, seed=0, on_progress=reports.append)
    assert [record.epoch for record in trained.history] == [1, 2, 3, 4]
    rates = [record.learning_rate for record in trained.history]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.0005])
    logits = training.predict(model, dataset.validation, *dataset.channel_statistics)
    loss = nn.functional.cross_entropy(logits, dataset.validation.labels)
    assert trained.history[-1].validation_loss == pytest.approx(float(loss), rel=1e-5)
    right = (logits.argmax(1) == dataset.validation.labels).double().mean()
    assert trained.history[-1].validation_accuracy == float(right)
    assert all(0 <= record.train_accuracy <= 1 for record in trained.history)
    seconds = sum(record.seconds for record in trained.history)
    assert trained.seconds == pytest.approx(seconds, rel=1e-6) and seconds > 0
    ends = [report for report in reports if report.step == report.steps]
    assert [(r.epoch, r.epochs, r.steps) for r in ends] == [(n, 4, 5) for n in (1, 2, 3, 4)]
    for report, record in zip(ends, trained.history, strict=True):
        assert report.loss == pytest.approx(record.train_loss)
        assert report.accuracy == pytest.approx(record.train_accuracy)
        assert report.images_per_second > 0


def test_training_repeats_bit_for_bit_and_the_seed_matters(dataset: Dataset) -> None:
    recipe = replace(SGD, augmentation=Augmentation())
    models = [network(dropout=0.5) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(3)  # the global generator's state doesn't enter
        train(model, dataset, recipe, epochs=1, seed=seed)
    assert_same_weights(models[0], models[1])
    with pytest.raises(AssertionError):
        assert_same_weights(models[0], models[2])


def test_dropout_draws_from_the_seed(dataset: Dataset) -> None:
    for seed in (0, 3):
        states: list[Tensor] = []

        def record(_: object, states: list[Tensor] = states) -> None:
            states.append(torch.get_rng_state())

        train(network(), dataset, SGD, epochs=1, seed=seed, on_progress=record)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assert torch.equal(states[0], torch.get_rng_state())  # nothing else draws from it


def test_training_accuracy_is_that_of_the_images_seen(dataset: Dataset) -> None:
    recipe = replace(SGD, learning_rate=1e-6, batch_size=30)
    assert len(dataset.train) % recipe.batch_size, "some images are left out of each epoch"
    always_first = network()
    last = [m for m in always_first.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.eye(len(last.bias))[0])
    one_class = replace(dataset.train, labels=torch.zeros_like(dataset.train.labels))
    trained = train(always_first, replace(dataset, train=one_class), recipe, epochs=2, seed=0)
    assert [record.train_accuracy for record in trained.history] == [1.0, 1.0]


def test_the_global_generator_and_the_signal_handlers_are_put_back(dataset: Dataset) -> None:
    before = torch.get_rng_state()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    during = []
    train(
        network(dropout=0.5),
        dataset,
        SGD,
        epochs=1,
        seed=3,
        on_progress=lambda _: during.append(torch.get_rng_state()),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(during[-1], before)  # dropout did draw from it
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


class _WithoutTest:
    """A dataset whose test split can't be read."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        assert name != "test", "the test split was touched"
        return getattr(self.dataset, name)


def test_the_test_split_is_not_touched(dataset: Dataset) -> None:
    closed: Any = _WithoutTest(dataset)
    with pytest.raises(AssertionError, match="touched"):
        closed.test  # noqa: B018
    trained = train(network(), closed, SGD, epochs=2, seed=0, patience=1)
    assert trained.history


def test_training_works_outside_the_main_thread(dataset: Dataset) -> None:
    inside, outside = network(), network()
    train(inside, dataset, SGD, epochs=1, seed=0)
    thread = threading.Thread(target=lambda: train(outside, dataset, SGD, epochs=1, seed=0))
    thread.start()
    thread.join()
    assert_same_weights(inside, outside)


def test_history_csv_is_readable_while_training_runs(dataset: Dataset, tmp_path: Path) -> None:
    rows = []

    def read(report: training.Progress) -> None:
        if report.step == report.steps and report.epoch > 1:
            with open(tmp_path / "history.csv", newline="") as file:
                rows.append([int(row["epoch"]) for row in csv.DictReader(file)])

    train(network(), dataset, SGD, epochs=3, seed=0, folder=tmp_path, on_progress=read)
    assert rows == [[1], [1, 2]]


# --- Early stopping ----------------------------------------------------------------------------


def prescribe(
    monkeypatch: pytest.MonkeyPatch, confidences: list[float]
) -> list[dict[str, torch.Tensor]]:
    """Have epoch i end with a validation loss that falls with confidences[i]; collect weights."""
    weights: list[dict[str, torch.Tensor]] = []

    def predict(model: nn.Module, split: Any, *rest: object, **options: object) -> torch.Tensor:
        confidence = confidences[len(weights)]
        weights.append(copy.deepcopy(model.state_dict()))
        return confidence * nn.functional.one_hot(split.labels, 10).float()

    monkeypatch.setattr(training, "predict", predict)
    return weights


@pytest.mark.parametrize(
    ("confidences", "patience", "epochs", "best"),
    [
        ([1.0, 2.0, 3.0, 2.5, 2.9, 9.0], 2, 5, 3),  # the ninth never comes
        ([1.0, 2.0, 3.0, 2.5, 2.9, 9.0], 3, 6, 6),  # one epoch more of patience reaches it
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2, 3, 1),  # the same loss is no improvement
        ([1.0, 2.0, 3.0, 4.0, 5.0, 4.0], 2, 6, 5),  # ends with its last epoch, not early
    ],
)
def test_early_stopping_stops_and_restores_the_best_weights(
    monkeypatch: pytest.MonkeyPatch,
    dataset: Dataset,
    confidences: list[float],
    patience: int,
    epochs: int,
    best: int,
) -> None:
    weights = prescribe(monkeypatch, confidences)
    model = network()
    trained = train(model, dataset, SGD, epochs=6, seed=0, patience=patience)
    assert len(trained.history) == epochs
    assert (trained.best_epoch, trained.stopped_early) == (best, epochs < 6)
    final = model.state_dict()
    same = [all(torch.equal(state[n], final[n]) for n in final) for state in weights]
    assert [i for i, equal in enumerate(same, start=1) if equal] == [best]


def test_without_patience_the_last_weights_stay(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    weights = prescribe(monkeypatch, [1.0, 3.0, 2.0])
    model = network()
    trained = train(model, dataset, SGD, epochs=3, seed=0)
    assert (len(trained.history), trained.best_epoch, trained.stopped_early) == (3, 2, False)
    assert all(torch.equal(weights[2][n], value) for n, value in model.state_dict().items())


# --- What goes wrong ---------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float32")
def test_a_loss_that_is_not_finite_stops_with_the_place_and_the_advice(dataset: Dataset) -> None:
    recipe = replace(SGD, learning_rate=1e30)
    expected = (
        r"training loss stopped being finite in epoch 1, step 2 of 5, at learning rate 1e\+30\. "
        r"Lower the learning rate \(recipe 'test': 1e\+30\)"
    )
    with pytest.raises(TrainingDiverged, match=expected):
        train(network(), dataset, recipe, epochs=2, seed=0)


def test_the_first_bad_step_is_named(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    step = training._Loop._train_step

    def poisoned(self: Any, images: torch.Tensor, labels: torch.Tensor, *rest: int) -> None:
        if (self.epoch, self.step) == (1, 2):
            images = images * math.nan
        step(self, images, labels, *rest)

    monkeypatch.setattr(training._Loop, "_train_step", poisoned)
    recipe = replace(SGD, schedule="triangular", learning_rate=1.0, reference_batch_size=16)
    rate = learning_rate_at(recipe, 7, 15)
    with pytest.raises(TrainingDiverged, match=f"epoch 2, step 3 of 5, at .* {rate:.3g}\\."):
        train(network(), dataset, recipe, epochs=3, seed=0)


def test_a_validation_loss_that_is_not_finite_stops(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    prescribe(monkeypatch, [1.0, math.nan])
    with pytest.raises(TrainingDiverged, match="validation loss .* epoch 2, step 5 of 5"):
        train(network(), dataset, SGD, epochs=3, seed=0)


@pytest.mark.parametrize("message", [None, "CUDA out of memory. Tried to allocate 2.00 GiB."])
def test_out_of_memory_names_batch_size_model_and_remedy(
    monkeypatch: pytest.MonkeyPatch, dataset: Dataset, message: str | None
) -> None:
    def exhausted(*_: object) -> None:
        if message is None:
            torch.empty(2**55)  # what torch itself says on this machine
        raise RuntimeError(message)

    monkeypatch.setattr(training._Loop, "_train_step", exhausted)
    expected = (
        r"cpu ran out of memory training SimpleCNN \([\d,]+ parameters\) with batch_size 16 on "
        r"16-pixel images\. Lower batch_size"
    )
    with pytest.raises(training.OutOfMemory, match=expected):
        train(network(), dataset, SGD, epochs=1, seed=0)


def test_another_runtime_error_passes(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("shapes don't fit")

    monkeypatch.setattr(training._Loop, "_train_step", fails)
    with pytest.raises(RuntimeError, match="shapes don't fit") as caught:
        train(network(), dataset, SGD, epochs=1, seed=0)
    assert type(caught.value) is RuntimeError


# --- Compiling, tried on the CPU ---------------------------------------------------------------


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(training, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(training, "_compiled", {})
    return monkeypatch


@pytest.mark.usefixtures("in_float32")
def test_a_network_is_compiled_once_and_its_weights_reset_for_each_seed(
    compiling: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    compile_with_torch, compiled, called = torch.compile, [], []

    def counted(model: nn.Module, **options: object) -> Callable[[torch.Tensor], torch.Tensor]:
        compiled.append(options)
        forward = compile_with_torch(model, backend="eager")

        def counted_forward(images: torch.Tensor) -> torch.Tensor:
            called.append(len(images))
            return forward(images)

        return counted_forward

    compiling.setattr(torch, "compile", counted)
    models = {seed: network(seed=seed) for seed in (0, 1)}
    after_first = None
    for seed, model in models.items():
        train(model, dataset, SGD, epochs=1, seed=seed)
        after_first = after_first or copy.deepcopy(models[0])
    assert compiled == [{"mode": "reduce-overhead"}]
    assert called == [16] * 10  # every step went through the compiled network
    assert_same_weights(models[0], after_first)  # another seed's run left the first one alone
    compiling.setattr(training, "COMPILED_DEVICES", ())
    for seed, model in models.items():
        plain = network(seed=seed)
        train(plain, dataset, SGD, epochs=1, seed=seed)
        assert_same_weights(model, plain, tolerance=1e-6)
    compiling.setattr(training, "COMPILED_DEVICES", ("cpu",))
    train(network("resnet20"), dataset, SGD, epochs=1, seed=0)
    assert len(compiled) == 2 and len(training._compiled) == 1  # another structure replaces it


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_a_compile_failure_falls_back_with_one_warning(
    compiling: pytest.MonkeyPatch, dataset: Dataset, when: str
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise NotImplementedError("no compiler here")

    compiling.setattr(torch, "compile", broken if when == "compiling" else lambda *_, **__: broken)
    models = [network(seed=seed) for seed in (0, 1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed, model in enumerate(models):
            train(model, dataset, SGD, epochs=1, seed=seed)
    messages = [str(w.message) for w in caught if "torch.compile" in str(w.message)]
    assert len(messages) == 1
    assert "no compiler here" in messages[0] and "without it" in messages[0]
    compiling.setattr(training, "COMPILED_DEVICES", ())
    for seed, model in enumerate(models):
        plain = network(seed=seed)
        train(plain, dataset, SGD, epochs=1, seed=seed)
        assert_same_weights(model, plain)
