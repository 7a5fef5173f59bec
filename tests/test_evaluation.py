"""Metrics against hand-made cases, intervals against simulated data, cost against known counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import evaluation
from helpers.corruptions import CORRUPTIONS, corrupt, corrupt_all
from helpers.data import Split
from helpers.evaluation import (
    Interval,
    bootstrap_interval,
    confusion,
    epochs_to_accuracy,
    expected_calibration_error,
    fit_temperature,
    gradient_norms,
    metrics,
    multiply_adds,
    percent,
    predict,
    reliability,
    robustness,
    seeds_interval,
    summarise,
)
from helpers.models import build_model, count_parameters


def logits_of(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities).log()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- Metrics -----------------------------------------------------------------------------------

# Three classes; true 0 0 0 1 1 2, predicted 0 0 1 1 2 0.
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
LOGITS = logits_of(
    [
        [0.7, 0.2, 0.1],
        [0.5, 0.3, 0.2],
        [0.2, 0.6, 0.2],
        [0.1, 0.8, 0.1],
        [0.1, 0.3, 0.6],
        [0.9, 0.05, 0.05],
    ]
)


def test_metrics_by_hand() -> None:
    found = metrics(LOGITS, LABELS)
    chosen = [0.7, 0.5, 0.2, 0.8, 0.3, 0.05]
    precisions, recalls = [2 / 3, 1 / 2, 0], [2 / 3, 1 / 2, 0]
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["loss"] == pytest.approx(-sum(map(math.log, chosen)) / 6, rel=1e-6)
    assert found["precision"] == pytest.approx(sum(precisions) / 3)
    assert found["recall"] == pytest.approx(sum(recalls) / 3)
    assert found["f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # Confidences .5, .6 twice, .7, .8 and .9 fall into five of fifteen bins. Both of the .6 and
    # the .9 are wrong, so these count with their whole confidence.
    gaps = [abs(1 - 0.5), 0.6 + 0.6, abs(1 - 0.7), abs(1 - 0.8), 0.9]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 6, rel=1e-5)


def test_precision_and_recall_differ_where_they_should() -> None:
    # True 0 0 0 1, all predicted 0: precision (3/4, 0), recall (1, 0), F1 (6/7, 0).
    found = metrics(logits_of([[0.9, 0.1]] * 4), torch.tensor([0, 0, 0, 1]))
    assert (found["precision"], found["recall"]) == (pytest.approx(3 / 8), pytest.approx(1 / 2))
    assert found["f1"] == pytest.approx(3 / 7)


def test_a_class_without_images_still_counts() -> None:
    found = metrics(logits_of([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), torch.tensor([0, 1]))
    assert found["accuracy"] == 1
    assert found["recall"] == pytest.approx(2 / 3)


def test_perfect_predictions() -> None:
    logits = torch.eye(4) * 100
    found = metrics(logits, torch.arange(4))
    assert found == {
        "accuracy": 1,
        "loss": pytest.approx(0, abs=1e-9),
        "precision": 1,
        "recall": 1,
        "f1": 1,
        "calibration_error": pytest.approx(0, abs=1e-9),
    }


def test_loss_survives_extreme_logits() -> None:
    found = metrics(torch.tensor([[3e4, -3e4]]), torch.tensor([1]))
    assert found["loss"] == pytest.approx(6e4)


def test_confusion_has_truth_in_rows() -> None:
    np.testing.assert_array_equal(confusion(LOGITS, LABELS), [[2, 1, 0], [0, 1, 1], [1, 0, 0]])


def test_confusion_keeps_absent_classes() -> None:
    logits = logits_of([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    table = confusion(logits, torch.tensor([0, 0]))
    np.testing.assert_array_equal(table, [[1, 1, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("confidences", "right", "bins", "expected"),
    [
        ([0.8] * 5, [1, 1, 1, 1, 0], 15, 0.0),  # 80 % sure and 80 % right
        ([0.9] * 4, [0, 0, 0, 0], 15, 0.9),
        ([1.0] * 4, [1, 1, 0, 0], 15, 0.5),  # full confidence belongs to the last bin
        ([0.55, 0.95], [1, 0], 15, (0.45 + 0.95) / 2),  # gaps in two bins don't cancel
        ([0.55, 0.95], [1, 0], 1, 0.25),  # in one bin they do
        ([0.55, 0.95], [1, 0], 2, 0.25),
    ],
)
def test_calibration_error_of_known_cases(
    confidences: list[float], right: list[int], bins: int, expected: float
) -> None:
    logits = logits_of([[p, 1 - p] for p in confidences])
    labels = torch.tensor([0 if r else 1 for r in right])
    found = expected_calibration_error(logits, labels, bins=bins)
    assert found == pytest.approx(expected, abs=1e-6)


def test_calibration_error_vanishes_when_labels_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert expected_calibration_error(logits, labels) < 0.01
    assert expected_calibration_error(3 * logits, labels) > 0.1


def test_reliability_by_hand() -> None:
    logits = logits_of([[p, 1 - p] for p in (0.9, 0.8, 0.6, 1.0)])
    table = reliability(logits, torch.tensor([0, 1, 0, 0]), bins=4)
    assert table["images"].tolist() == [0, 0, 1, 3]
    np.testing.assert_allclose(table["confidence"], [math.nan, math.nan, 0.6, 0.9], atol=1e-6)
    np.testing.assert_allclose(table["accuracy"], [math.nan, math.nan, 1, 2 / 3])


@pytest.mark.parametrize(("right", "of"), [(6, 10), (9, 10), (99, 100)])
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 7.0])
def test_temperature_in_closed_form(right: int, of: int, sharpness: float) -> None:
    # Logits (a, 0) always predict class 0. The best fit is as sure as it is right:
    # sigmoid(a / T) = right / of.
    logits = torch.tensor([[sharpness, 0.0]]).expand(of, 2)
    labels = (torch.arange(of) >= right).long()
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(sharpness / math.log(right / (of - right)), rel=1e-9)
    assert expected_calibration_error(logits / found, labels) == pytest.approx(0, abs=1e-6)


def test_temperature_undoes_a_scaling_and_keeps_predictions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.02)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, abs=0.06)
    assert fit_temperature(3 * logits + 7, labels) == pytest.approx(3, abs=0.06)
    assert expected_calibration_error(3 * logits / 3, labels) < 0.01


def test_temperature_is_the_minimum_of_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(200, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(6, (200,), generator=generator)
    labels[:120] = logits[:120].argmax(1)
    found = fit_temperature(logits, labels)
    losses = [
        float(nn.functional.cross_entropy(logits / t, labels))
        for t in (0.99 * found, found, 1.01 * found)
    ]
    assert losses[1] == min(losses)


def test_temperature_stays_within_bounds() -> None:
    logits = torch.eye(4)
    assert fit_temperature(logits, torch.arange(4)) == pytest.approx(0.05)  # all right
    assert fit_temperature(logits, torch.tensor([1, 2, 3, 0])) == pytest.approx(20)  # all wrong


@pytest.mark.parametrize("logits", [torch.zeros(0, 3), torch.tensor([[1.0, math.nan]])])
def test_temperature_refuses_logits_it_cannot_fit(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="expected finite logits of validation images"):
        fit_temperature(logits, torch.zeros(len(logits), dtype=torch.int64))


# --- Predictions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(23) % 5)


MEAN, DEVIATION = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet18", num_classes=5, width=0.125, dropout=0.5)


def test_predictions_are_the_networks_logits_in_the_splits_order(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 7)
    model = small_model().train()
    before = state_of(model)
    found = predict(model, split, MEAN, DEVIATION)
    assert found.shape == (23, 5) and found.dtype == torch.float32
    assert model.training and same_state(model, before)
    inputs = (split.images.double() / 255 - MEAN.view(-1, 1, 1)) / DEVIATION.view(-1, 1, 1)
    with torch.no_grad():
        expected = model.eval()(inputs.float())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_mirror_gives_the_logits_of_the_mirror_images(split: Split) -> None:
    model = small_model()
    mirrored = Split(split.images.flip(-1), split.labels)
    both = [predict(model, part, MEAN, DEVIATION) for part in (split, mirrored)]
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    found = predict(model, split, MEAN, DEVIATION, mirror=True)
    torch.testing.assert_close(found, both[1], atol=1e-5, rtol=1e-4)


def test_reduced_precision_returns_float32_near_the_exact_logits(split: Split) -> None:
    model = small_model()
    exact = predict(model, split, MEAN, DEVIATION)
    found = predict(model, split, MEAN, DEVIATION, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.05 * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_mode_puts_every_submodule_back(training: bool, fails: bool) -> None:
    model = small_model().train()
    model.bn1.eval()  # a frozen batch norm in a network that trains
    model.layer2.eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    try:
        with evaluation.mode(model, training=training):
            assert {module.training for module in model.modules()} == {training}
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [module.training for module in model.modules()] == before


# --- Robustness --------------------------------------------------------------------------------


def test_robustness_is_accuracy_on_corrupted_images(split: Split) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    found = robustness(model, corrupt_all(split.images), split.labels, MEAN, DEVIATION)
    assert found.shape == (len(CORRUPTIONS), 6, 23)
    assert (found[:, 1] != found[:, 5]).sum() > 3  # severity makes a difference
    for i, name in enumerate(CORRUPTIONS):
        for severity in range(6):
            images = corrupt(split.images, name, severity) if severity else split.images
            logits = predict(model, Split(images, split.labels), MEAN, DEVIATION)
            expected = (logits.argmax(1) == split.labels).double()
            np.testing.assert_array_equal(found[i, severity], expected)


# --- Intervals ---------------------------------------------------------------------------------


def coverage(cover: list[bool]) -> float:
    return sum(cover) / len(cover)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says(level: float) -> None:
    generator = np.random.default_rng(0)
    cover = []
    for trial in range(500):
        found = bootstrap_interval(generator.random(100), seed=trial, resamples=400, level=level)
        cover.append(found.low <= 0.5 <= found.high)
    assert abs(coverage(cover) - level) < 3 * (level * (1 - level) / 500) ** 0.5


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 400)
    assert (found.low, found.high) == (
        pytest.approx(values.mean() - half, abs=0.03),
        pytest.approx(values.mean() + half, abs=0.03),
    )


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(2).random(50)
    first = bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values.tolist(), seed=5) == first
    assert bootstrap_interval(values, seed=6) != first


def test_bootstrap_of_many_values_stays_within_memory() -> None:
    found = bootstrap_interval(np.random.default_rng(3).random(1_500_000), resamples=5)
    assert found.low <= found.high and found.n == 1_500_000


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"finite values to resample, found {len(values)}"):
        bootstrap_interval(values)


def test_seeds_interval_covers_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    cover = []
    for trial in range(200):
        # What makes a seed good, what makes an image easy, and chance.
        table = generator.normal(0, 1, (10, 1)) + generator.normal(0, 2, (1, 60))
        table = table + generator.normal(0, 1, (10, 60))
        found = seeds_interval(table, seed=trial, resamples=200)
        cover.append(found.low <= 0 <= found.high)
    assert 0.88 <= coverage(cover) <= 0.985


def test_seeds_interval_resamples_whole_seeds() -> None:
    # Two seeds, one always right, one always wrong: resampled means are 0, 1/2 and 1.
    found = seeds_interval(np.array([[1.0] * 30, [0.0] * 30]))
    assert found == Interval(0.5, 0.0, 1.0, 2)


def test_seeds_interval_resamples_whole_images() -> None:
    # Seeds that agree on every image add nothing to what one seed knows.
    row = (np.random.default_rng(0).random(200) < 0.8).astype(float)
    found = seeds_interval(np.tile(row, (3, 1)))
    alone = bootstrap_interval(row)
    assert found.mean == pytest.approx(alone.mean)
    assert found.low == pytest.approx(alone.low, abs=0.015)
    assert found.high == pytest.approx(alone.high, abs=0.015)
    assert found.n == 3


def test_seeds_interval_of_a_paired_difference_is_narrower() -> None:
    generator = np.random.default_rng(0)
    easy = generator.random((1, 300))
    first, second = (((generator.random((3, 300)) + easy) / 2 > 0.4).astype(float) for _ in "ab")
    paired = seeds_interval(first - second)
    single = seeds_interval(first)
    assert paired.high - paired.low < 2**0.5 * (single.high - single.low)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 4)), np.array([[1.0, math.nan]])])
def test_seeds_interval_refuses_anything_but_a_table(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="seeds x images of finite values, found shape"):
        seeds_interval(values)


def test_intervals_as_percentages() -> None:
    interval = Interval(0.9123, 0.9, 0.92349, 3)
    assert interval.percent() == "91.2 [90.0, 92.3]"
    assert [percent(x) for x in (0.6535, 0.2035, -0.0005, 0.1)] == ["65.4", "20.4", "-0.1", "10.0"]
    assert [percent(x, "+") for x in (0.013, -0.013)] == ["+1.3", "-1.3"]
    assert [percent(x) for x in (-0.0001, 0.0, -0.0)] == ["0.0"] * 3


@pytest.mark.parametrize(
    ("target", "expected"), [(0.1, 1), (0.5, 2), (0.6, 2), (0.61, 4), (0.9, 4), (0.91, None)]
)
def test_epochs_to_accuracy_counts_from_one(target: float, expected: int | None) -> None:
    assert epochs_to_accuracy([0.2, 0.6, 0.4, 0.9], target) == expected


def test_epochs_to_accuracy_of_an_empty_history() -> None:
    assert epochs_to_accuracy([], 0.5) is None


# --- Cost --------------------------------------------------------------------------------------


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, **options)


@pytest.mark.parametrize(
    ("name", "classes", "size", "expected"),
    [
        ("resnet18", 1000, 224, 1.814e9),
        ("resnet50", 1000, 224, 4.089e9),
        ("resnet18", 10, 32, 0.555e9),
        ("resnet34", 10, 32, 1.159e9),
        ("resnet20", 10, 32, 0.041e9),
    ],
)
def test_multiply_adds_of_the_published_networks(
    name: str, classes: int, size: int, expected: float
) -> None:
    model = on_meta(name, num_classes=classes, image_size=size)
    assert multiply_adds(model, size) == pytest.approx(expected, rel=0.012)


def test_multiply_adds_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 7)
    )
    assert multiply_adds(model, 6, in_channels=2) == 36 * 9 * 2 * 5 + 5 * 36 * 7


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18", "resnet50", "resnet20"])
def test_summary_adds_up(name: str) -> None:
    model = on_meta(name, num_classes=10)
    rows = summarise(model, 32)
    assert sum(row.parameters for row in rows) == count_parameters(model)
    assert sum(row.multiply_adds for row in rows) == multiply_adds(model, 32)


def test_summary_rows_of_resnet18() -> None:
    model = small_model()
    model.layer1.eval()
    before = state_of(model), [module.training for module in model.modules()]
    rows = {row.name: row for row in summarise(model, 32)}
    assert list(rows) == [
        *("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4"),
        *("avgpool", "dropout", "fc"),
    ]
    assert rows["conv1"].kind == "Conv2d"
    assert rows["conv1"].output_shape == (8, 32, 32)
    assert rows["conv1"].parameters == 8 * 3 * 9
    assert rows["conv1"].multiply_adds == 8 * 3 * 9 * 32 * 32
    assert rows["layer4"].output_shape == (64, 4, 4)
    assert rows["fc"].output_shape == (5,)
    assert rows["fc"].multiply_adds == 64 * 5
    assert same_state(model, before[0])
    assert [module.training for module in model.modules()] == before[1]
    assert not any(module._forward_hooks for module in model.modules())


def test_summary_goes_as_deep_as_asked() -> None:
    model = small_model()
    rows = summarise(model, 32, depth=2)
    names = [row.name for row in rows]
    assert {"layer1.0", "layer1.1", "layer1"} <= set(names)
    assert not [name for name in names if name.count(".") > 1]
    blocks = [row for row in rows if row.name.startswith("layer2.")]
    stage = next(row for row in rows if row.name == "layer2")
    assert sum(row.multiply_adds for row in blocks) == stage.multiply_adds > 0
    assert names.index("layer1.1") < names.index("layer1") < names.index("layer2.0")


def test_summary_takes_its_hooks_away_after_an_error() -> None:
    model = small_model()
    with pytest.raises(RuntimeError):
        summarise(model, 32, in_channels=4)
    assert not any(module._forward_hooks for module in model.modules())


def test_measure_counts_warmups_apart() -> None:
    calls = []
    timing = evaluation.measure(
        lambda: calls.append(0), repeats=4, warmups=3, device=torch.device("cpu")
    )
    assert len(calls) == 7 and timing.repeats == 4
    assert 0 <= timing.low <= timing.median <= timing.high


def test_latency_grows_with_the_batch_and_leaves_the_network_alone() -> None:
    model = build_model("resnet18", num_classes=5, width=0.25).train()
    before = state_of(model)
    single, many = (evaluation.latency(model, 32, batch_size=n, repeats=3) for n in (1, 64))
    assert many.low > single.low
    assert model.training and same_state(model, before)


# --- Gradients ---------------------------------------------------------------------------------


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 5


def test_gradient_norms_are_those_of_a_backward_pass() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=5, width=0.25)
    found = gradient_norms(model, *batch())
    images, labels = batch()
    nn.functional.cross_entropy(model.train()(images), labels).backward()
    expected = [
        (name, module.weight.grad.norm().item())
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert len(found) == 19 and found[0][0] == "conv1"
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_gradient_norms_leave_out_projections() -> None:
    names = [name for name, _ in gradient_norms(small_model(), *batch())]
    assert len(names) == 17 and not [name for name in names if "downsample" in name]


def test_gradient_norms_leave_the_network_untouched() -> None:
    model = small_model().eval()
    model.layer3.train()
    images, labels = batch(1)
    nn.functional.cross_entropy(model(images), labels).backward()
    before = state_of(model), [module.training for module in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():  # works all the same
        gradient_norms(model, *batch())
    assert same_state(model, before[0])
    assert [module.training for module in model.modules()] == before[1]
    kept = zip(model.parameters(), gradients, strict=True)
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in kept)
