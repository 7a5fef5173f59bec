"""Networks that start from trained ones: transferred or pruned, as functions and as runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from helpers import finetuning, models
from helpers.config import Study
from helpers.data import Dataset, load_dataset
from helpers.evaluation import multiply_adds, predict
from helpers.recipes import RECIPES
from helpers.runs import IMAGENET, Pruning, Result, Run, Transfer, load_or_train
from helpers.training import EpochRecord

MakeRun = Callable[..., Run]
WEIGHTS_FILE = ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]


def network(name: str = "resnet18", classes: int = 4, seed: int = 0, **options: Any) -> nn.Module:
    """A small network whose batch-norm statistics aren't the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build_model(name, num_classes=classes, **{"width": 0.125} | options)
        with torch.no_grad():
            model(torch.randn(8, 3, 40, 40))
    return model.eval()


def weights_of(result: Result) -> dict[str, Tensor]:
    return result.load_model().state_dict()


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "simple_cnn"])
@pytest.mark.parametrize("frozen", [False, True])
def test_all_weights_but_the_last_layers_are_copied(name: str, frozen: bool) -> None:
    model, source = network(name, classes=3, seed=5), network(name, classes=4)
    own, last = copy.deepcopy(model.state_dict()), finetuning.last_layer(model)
    assert last == ("fc2" if name == "simple_cnn" else "fc")
    finetuning.transfer(model, source.state_dict(), frozen)
    for key, value in model.state_dict().items():
        expected = own if key.startswith(f"{last}.") else source.state_dict()
        assert torch.equal(value, expected[key]), key
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    every = {key for key, _ in model.named_parameters()}
    assert trainable == ({f"{last}.weight", f"{last}.bias"} if frozen else every)


def test_imagenet_weights_are_taken_from_a_file_or_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = network(classes=1000, stem="imagenet", width=1.0)
    asked: list[str] = []

    def download(url: str, path: str, *_: object, **__: object) -> None:
        asked.append(url)
        torch.save(source.state_dict(), path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    for _ in range(2):  # the second time it is there
        found = finetuning.imagenet_weights("resnet18", tmp_path / "weights")
        assert torch.equal(found["conv1.weight"], source.conv1.weight)
    assert asked == [ResNet18_Weights.IMAGENET1K_V1.url]
    assert (tmp_path / "weights" / WEIGHTS_FILE).exists()


def test_missing_imagenet_weights_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError, match="no route to host") as caught:
        finetuning.imagenet_weights("resnet18", tmp_path)
    assert str(caught.value).startswith(f"{WEIGHTS_FILE}, ImageNet weights of resnet18, isn't in ")


def sizes_of_weights(model: nn.Module) -> Tensor:
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return torch.cat([layer.weight.detach().abs().flatten() for layer in layers])


def test_the_smallest_weights_of_the_whole_network_are_masked() -> None:
    model = network()
    before, names = sizes_of_weights(model), set(model.state_dict())
    finetuning.prune_weights(model, 0.8)
    finetuning.make_permanent(model)
    after = sizes_of_weights(model)
    gone = (after == 0) & (before > 0)
    assert abs(gone.double().mean() - 0.8) < 1e-4
    assert before[gone].max() <= after[after > 0].min()  # a weight can be drawn as exactly 0
    assert torch.equal(after[~gone], before[~gone])
    assert set(model.state_dict()) == names


def test_masked_weights_stay_zero_while_the_others_learn() -> None:
    model = network("simple_cnn")
    finetuning.prune_weights(model, 0.5)
    before = sizes_of_weights(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
    finetuning.make_permanent(model)
    after = sizes_of_weights(model)
    assert (after[before == 0] == 0).all() and (after != before).sum() > 100


def two_layers(filters: list[Tensor]) -> nn.Sequential:
    """A convolution with these filters and a linear layer whose weights are as the channel's."""
    convolution = nn.Conv2d(3, len(filters), 3, bias=False)
    linear = nn.Linear(len(filters), 2)
    with torch.no_grad():
        convolution.weight.copy_(torch.stack(filters))
        linear.weight.copy_(convolution.weight.abs().mean((1, 2, 3)).expand(2, -1))
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def test_channels_with_the_smallest_filters_go() -> None:
    model = two_layers([torch.full((3, 3, 3), size) for size in (3.0, 1.0, 4.0, 2.0)])
    finetuning.prune_channels(model, 0.5, 8)
    assert model[0].weight[:, 0, 0, 0].tolist() == [3.0, 4.0]
    assert model[4].weight.tolist() == [[3.0, 4.0]] * 2  # the classes stay
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_filters_size_is_the_sum_of_its_absolute_weights() -> None:
    even, single = torch.full((3, 3, 3), 0.4), torch.zeros(3, 3, 3)  # sums 10.8 and 6
    single[0, 0, 0] = -6  # squares 4.3 and 36
    model = two_layers([even, single])
    with torch.no_grad():
        model[4].weight.fill_(1)
    finetuning.prune_channels(model, 0.5, 8)
    assert torch.equal(model[0].weight[0], even)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "simple_cnn"])
def test_a_network_without_half_of_its_channels_computes_loads_and_is_small(name: str) -> None:
    model, whole = network(name, width=0.25), network(name, width=0.25, seed=1)
    finetuning.prune_channels(model, 0.5, 16)
    assert models.count_parameters(model) < 0.4 * models.count_parameters(whole)
    assert multiply_adds(model, 16) < 0.4 * multiply_adds(whole, 16)
    finetuning.load_weights(whole, finetuning.weights_file(model))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole(images), model(images)) and whole(images).shape == (2, 4)
    assert repr(whole) == repr(model)  # so that it can be pruned again
    finetuning.prune_channels(whole, 0.5, 16)
    assert models.count_parameters(whole) < 0.4 * models.count_parameters(model)


@pytest.fixture
def digits(shared_data: Path) -> Dataset:
    sizes = {"image_size": 16, "train_size": 80, "validation_size": 40, "test_size": 40}
    return load_dataset("digits", data_dir=shared_data, **sizes)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_features_stay_bit_for_bit_and_fine_tuning_moves_everything(
    small_study: Study, small_run: MakeRun, digits: Dataset, frozen: bool
) -> None:
    source = small_run(model="resnet18", width=0.125)  # not there yet: it is trained first
    run = small_run(digits, model="resnet18", width=0.125, start=Transfer(source, frozen))
    trained = weights_of(load_or_train(run, small_study))
    assert (small_study.runs_dir / source.key / "result.json").exists()
    for name, value in weights_of(load_or_train(source, small_study)).items():
        assert torch.equal(value, trained[name]) == (frozen and not name.startswith("fc.")), name


def test_earlier_parts_move_less_with_a_rate_factor(
    small_study: Study, small_run: MakeRun, digits: Dataset
) -> None:
    before, moved = weights_of(load_or_train(small_run(), small_study)), []
    for factor in (1.0, 0.2):
        run = small_run(digits, start=Transfer(small_run(), rate_factor=factor))
        after = weights_of(load_or_train(run, small_study))
        moved.append(float((after["conv1.weight"] - before["conv1.weight"]).norm()))
    assert 0 < moved[1] < 0.1 * moved[0]


def test_a_run_starts_from_imagenet_weights(study: Study, small_run: MakeRun) -> None:
    source = network(classes=1000, stem="imagenet", width=1.0)
    folder = study.data_dir / "weights"
    folder.mkdir(parents=True)
    torch.save(source.state_dict(), folder / WEIGHTS_FILE)
    sizes = {"image_size": 40, "train_size": 20, "validation_size": 10, "test_size": 10}
    digits = load_dataset("digits", **sizes)
    settings = sizes | {"model": "resnet18", "width": 1.0, "stem": "imagenet", "epochs": 1}
    run = small_run(digits, start=Transfer(IMAGENET, frozen=True), **settings)
    trained = weights_of(load_or_train(run, study))
    assert torch.equal(trained["layer4.1.conv2.weight"], source.layer4[1].conv2.weight)


def stop(record: EpochRecord) -> None:
    raise InterruptedError


@pytest.mark.parametrize("start", ["transfer", "weights", "channels"])
def test_runs_that_start_from_others_resume_load_and_predict_the_same(
    small_study: Study,
    small_run: MakeRun,
    tmp_path: Path,
    differing: Callable[..., list[str]],
    start: str,
) -> None:
    source = small_run(recipe=replace(RECIPES["fast"], batch_size=16))
    change = Transfer(source, False, 0.5) if start == "transfer" else Pruning(source, start, 0.75)
    run = replace(source, start=change, epochs=3)
    result = load_or_train(run, small_study)
    weights = weights_of(result)
    if start == "weights":
        layers = [w for w in weights.values() if w.ndim > 1]
        zeros = sum(int((w == 0).sum()) for w in layers)
        assert zeros == pytest.approx(0.75 * sum(w.numel() for w in layers), rel=1e-3)
    if start == "channels":
        assert weights["conv2.weight"].shape == (4, 2, 3, 3)
    assert set(weights) == set(run.build(10, 16).state_dict())  # no masks are left
    dataset = run.load_data(small_study.data_dir)
    logits = predict(result.load_model(), dataset.test, *dataset.channel_statistics)
    torch.testing.assert_close(result.test_logits, logits)
    other = replace(small_study, runs_dir=tmp_path / "cut")
    load_or_train(source, other)
    with pytest.raises(InterruptedError):
        load_or_train(run, other, on_epoch=stop, checkpoint_seconds=0.0)
    assert (other.runs_dir / run.key / "resume.pt").exists()
    assert differing(result, load_or_train(run, other)) == []
