"""Metrics against hand-made cases, intervals against simulated data, cost against known counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from helpers import evaluation
from helpers.corruptions import CORRUPTIONS, corrupt, corrupt_all
from helpers.data import Split
from helpers.evaluation import (
    Interval,
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
    seeds_intervals,
    verdict,
)
from helpers.models import build_model


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


def test_perfect_predictions_and_a_class_without_images() -> None:
    perfect = metrics(torch.eye(4) * 100, torch.arange(4))
    best = {"loss": 0, "calibration_error": 0}
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1) | best, abs=1e-9)
    two_of_three = metrics(torch.eye(3)[:2] * 100, torch.arange(2))
    assert two_of_three["accuracy"] == 1
    assert two_of_three["recall"] == pytest.approx(2 / 3)  # of no images none are found
    extreme = metrics(torch.tensor([[3e4, -3e4]]), torch.tensor([1]))
    assert extreme["loss"] == pytest.approx(6e4)


@pytest.mark.parametrize(
    ("confidences", "right", "expected"),
    [
        ([0.8] * 5, [1, 1, 1, 1, 0], 0.0),  # 80 % sure and 80 % right
        ([0.9] * 4, [0, 0, 0, 0], 0.9),
        ([1.0] * 4, [1, 1, 0, 0], 0.5),  # full confidence belongs to the last bin
        ([0.55, 0.95], [1, 0], (0.45 + 0.95) / 2),  # gaps in two bins don't cancel
        ([0.81, 0.85], [1, 0], 0.33),  # in one bin they do
    ],
)
def test_calibration_error_of_known_cases(
    confidences: list[float], right: list[int], expected: float
) -> None:
    logits = logits_of([[p, 1 - p] for p in confidences])
    found = expected_calibration_error(logits, 1 - torch.tensor(right))
    assert found == pytest.approx(expected, abs=1e-6)


def test_reliability_by_hand() -> None:
    logits = logits_of([[p, 1 - p] for p in (0.9, 0.8, 0.6, 1.0)])
    table = reliability(logits, torch.tensor([0, 1, 0, 0]), bins=4)
    assert table["images"].tolist() == [0, 0, 1, 3]
    np.testing.assert_allclose(table["confidence"], [math.nan, math.nan, 0.6, 0.9], atol=1e-6)
    np.testing.assert_allclose(table["accuracy"], [math.nan, math.nan, 1, 2 / 3])


@pytest.mark.parametrize(("right", "of"), [(6, 10), (99, 100)])
@pytest.mark.parametrize("sharpness", [0.5, 7.0])
def test_temperature_in_closed_form(right: int, of: int, sharpness: float) -> None:
    # Logits (a, 0) always predict class 0. The best fit is as sure as it is right:
    # sigmoid(a / T) = right / of.
    logits = torch.tensor([[sharpness, 0.0]]).expand(of, 2)
    labels = (torch.arange(of) >= right).long()
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(sharpness / math.log(right / (of - right)), rel=1e-9)
    assert expected_calibration_error(logits / found, labels) == pytest.approx(0, abs=1e-6)


def test_temperature_undoes_a_scaling() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.02)
    assert fit_temperature(3 * logits + 7, labels) == pytest.approx(3, abs=0.06)
    assert expected_calibration_error(logits, labels) < 0.01
    assert expected_calibration_error(3 * logits, labels) > 0.1


def test_temperature_stays_within_bounds() -> None:
    logits = torch.eye(4)
    assert fit_temperature(logits, torch.arange(4)) == pytest.approx(0.05)  # all right
    assert fit_temperature(logits, torch.tensor([1, 2, 3, 0])) == pytest.approx(20)  # all wrong


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


def test_reduced_precision_returns_float32_near_the_exact_logits(split: Split) -> None:
    model = small_model()
    exact = predict(model, split, MEAN, DEVIATION)
    found = predict(model, split, MEAN, DEVIATION, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.05 * float(exact.abs().max()), rtol=0)


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


def test_the_interval_of_one_network_is_students_over_images() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = seeds_interval(values[None])
    half = stats.t.ppf(0.975, 399) * values.std(ddof=1) / 20
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 1)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))


def right_or_wrong(generator: np.random.Generator, seeds: int, *shifts: float) -> np.ndarray:
    """Networks' answers, seeds x 300 images: seeds have an effect on all images of a network."""
    difficulty = generator.normal(1.5, 1.5, 300)
    effects = generator.normal(0, 0.15, (len(shifts), seeds, 1)) + np.reshape(shifts, (-1, 1, 1))
    chances = 1 / (1 + np.exp(-(difficulty + effects)))
    return (generator.random((seeds, 300)) < chances).astype(float)


def expected_accuracy(shift: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    values = 1 / (1 + np.exp(-(1.5 + shift + np.hypot(1.5, 0.15) * nodes)))
    return float((weights * values).sum() / weights.sum())


GAINS = {k: {k + 1: 1, k: -1} for k in (0, 2, 4, 6)}
CHAIN = {f"{b} over {a}": {b: 1, a: -1} for a, b in zip("abcd", "bcde", strict=True)}
CHAIN |= {"b and c against a and d": {"b": 1, "c": 1, "a": -1, "d": -1}}


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("what", ["accuracy", "gain", "value a seed", "chain", "apart"])
def test_intervals_cover_what_they_say(seeds: int, what: str) -> None:
    generator = np.random.default_rng(seeds)
    hits, count, shift, how = 0, 0, 0.1, {}
    truth = {
        "accuracy": expected_accuracy(0),
        "gain": expected_accuracy(shift) - expected_accuracy(0),
    }.get(what, 0.0)
    for _ in range(400):
        if what == "accuracy":
            given = {k: right_or_wrong(generator, seeds, 0)[0] for k in range(8)}
        elif what == "gain":
            given = dict(
                zip(range(8), right_or_wrong(generator, seeds, *[0, shift] * 4), strict=True)
            )
            how = {"contrasts": GAINS}
        else:
            given = {name: generator.normal(0, 1, seeds) for name in "abcdefgh"}
        if what == "chain":  # of networks that have something in common, seed by seed
            common, how = generator.normal(0, 3, seeds), {"contrasts": CHAIN}
            given = {name: own + common for name, own in given.items()}
        if what == "apart":
            given |= {name: 5 * given[name] for name in "gh"}
            how = {"contrasts": {n: {n: 1} for n in "abg"} | {"": {"a": 1, "h": -1}}, "apart": "gh"}
        found = seeds_intervals(given, **how).values()
        hits, count = hits + sum(i.low <= truth <= i.high for i in found), count + len(found)
    assert 0.93 <= hits / count <= 0.97


def test_the_variance_of_seeds_is_pooled_and_students() -> None:
    values = {"a": np.array([0.5, 0.7]), "b": np.array([0.2, 0.2])}
    found = seeds_intervals(values)
    # Two degrees of freedom: (0.02 + 0) / 2 is the variance of a seed, half of it that of a mean.
    half = 4.302652729911275 * math.sqrt(0.01 / 2)
    for name, mean in (("a", 0.6), ("b", 0.2)):
        expected = Interval(*map(pytest.approx, (mean, mean - half, mean + half)), 2)
        assert found[name] == expected
    alone = seeds_interval(values["a"])
    assert alone.high - alone.mean == pytest.approx(12.706204736432095 * 0.1)


def test_seeds_that_only_one_has_count_for_the_variance() -> None:
    values = {"a": np.array([0.5, 0.7]), "b": np.array([0.2, 0.2, 0.8])}
    gain = {"a - b": {"a": 1, "b": -1}}
    found = seeds_intervals(values, gain, apart="b")["a - b"]
    by_seed = {1: 0.02 / 2, 2: 0.12 / 2}  # by degrees of freedom; two seeds are compared
    variance = sum(by_seed.values())
    freedom = variance**2 / sum(part**2 / n for n, part in by_seed.items())
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert found == Interval(*map(pytest.approx, (0.4, 0.4 - half, 0.4 + half)), 2)
    assert seeds_intervals(values, gain) == seeds_intervals(values | {"b": [0.2, 0.2]}, gain)


def test_a_single_seed_has_the_interval_of_its_images() -> None:
    answers = (np.random.default_rng(0).random((1, 400)) < 0.8).astype(float)
    found = seeds_interval(answers)
    assert found.high - found.mean == pytest.approx(1.966 * answers.std(ddof=1) / 20, rel=1e-3)
    assert seeds_interval(np.array([0.3])) == Interval(0.3, 0.3, 0.3, 1)


@pytest.mark.parametrize(
    "values", [np.ones((0, 3)), np.ones((2, 0)), np.ones((2, 2, 2)), np.array([[1.0, np.nan]])]
)
def test_seeds_intervals_refuse_anything_but_a_table(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="named: expected seeds x images of finite values"):
        seeds_intervals({"named": values})


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 3)


@pytest.mark.parametrize(
    ("effect", "word"),
    [
        (interval(0.01, 0.03), "holds"),
        (interval(0.005, 0.02), "holds"),
        (interval(0.001, 0.03), "not decided"),  # above 0, perhaps too small to be of interest
        (interval(-0.01, 0.004), "does not hold"),
        ({"a": interval(0.01, 0.03), "b": interval(0.02, 0.04)}, "holds"),
        ({"a": interval(0.01, 0.03), "b": interval(-0.02, 0.04)}, "not decided"),
        ({"a": interval(0.01, 0.03), "b": interval(-0.02, 0.00)}, "does not hold"),
    ],
)
def test_verdicts(effect: object, word: str) -> None:
    assert verdict("A beats B", effect).word == word
    assert verdict("A beats B", effect, trained_out=False).word == "budget too small"


def test_a_verdict_is_one_line() -> None:
    found = verdict("A beats B", interval(0.012, 0.02))
    assert str(found) == "**Holds.** A beats B: +1.6 points [+1.2, +2.0]."
    several = verdict("All do", {"A": interval(0.1, 0.3), "B": interval(-1, 1)}, unit="nats")
    assert str(several) == (
        "**Not decided.** All do: A +0.200 nats [+0.100, +0.300]; B +0.000 nats [-1.000, +1.000]."
    )
    assert verdict("Wide", interval(0.04, 0.2), smallest=0.05).word == "not decided"


def test_intervals_as_percentages() -> None:
    interval = Interval(0.9123, 0.9, 0.92349, 3)
    assert interval.percent() == "91.2 [90.0, 92.3]"
    assert [percent(x) for x in (0.6535, 0.2035, -0.0005, 0.1)] == ["65.4", "20.4", "-0.1", "10.0"]
    assert [percent(x, "+") for x in (0.013, -0.013)] == ["+1.3", "-1.3"]
    assert [percent(x) for x in (-0.0001, 0.0, -0.0)] == ["0.0"] * 3


@pytest.mark.parametrize(
    ("name", "classes", "size", "expected"),
    [
        ("resnet18", 1000, 224, 1.814e9),
        ("resnet50", 1000, 224, 4.089e9),
        ("resnet34", 10, 32, 1.159e9),
        ("resnet20", 10, 32, 0.041e9),
    ],
)
def test_multiply_adds_of_the_published_networks(
    name: str, classes: int, size: int, expected: float
) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=classes, image_size=size)
    assert multiply_adds(model, size) == pytest.approx(expected, rel=0.012)


def test_multiply_adds_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 7)
    )
    assert multiply_adds(model, 6) == 36 * 9 * 3 * 5 + 5 * 36 * 7


def test_latency_grows_with_the_batch_and_leaves_the_network_alone() -> None:
    model = build_model("resnet18", num_classes=5, width=0.25).train()
    before = state_of(model)
    single, many = (evaluation.latency(model, 32, batch_size=n, repeats=3) for n in (1, 64))
    assert many > single > 0
    assert model.training and same_state(model, before)


def test_gradient_norms_are_those_of_a_backward_pass_and_leave_the_network_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 5
    model = build_model("resnet18", num_classes=5, width=0.125).eval()
    model.layer3.train()
    before = state_of(model), [module.training for module in model.modules()]
    with torch.no_grad():  # works all the same
        found = gradient_norms(model, images, labels)
    assert same_state(model, before[0])
    assert [module.training for module in model.modules()] == before[1]
    assert all(parameter.grad is None for parameter in model.parameters())
    nn.functional.cross_entropy(model.train()(images), labels).backward()
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    expected = [float(m.weight.grad.norm()) for n, m in layers if "downsample" not in n]
    assert len(found) == 17 and found == pytest.approx(expected, rel=1e-4)
