"""Runs that start from a trained network: transferred, frozen, pruned, and what they refuse."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import nbformat
import pytest
import torch

from benchmarks.soak import make_study
from helpers import compression, data, evaluation, models, runs, starts, training
from helpers.config import ROOT, Study
from helpers.runs import Run
from helpers.starts import IMAGENET, Pruning, Transfer
from helpers.training import Recipe

RECIPE = Recipe("test", "sgd", 0.05, "triangular", batch_size=20, epochs=2, weight_decay=1e-3)
SIZES = {"image_size": 16, "train_size": 80, "validation_size": 20, "test_size": 20}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("starts") / "study")


def make_run(dataset: str = "shapes", **changes) -> Run:
    fingerprint = data.load_dataset(dataset, **SIZES).fingerprint
    settings = {"recipe": RECIPE, "epochs": 1, "seed": 0, "width": 0.125, **SIZES}
    return Run(dataset, fingerprint, changes.pop("model", "resnet18"), **settings | changes)


@pytest.fixture(scope="module")
def source(study: Study) -> runs.Result:
    return runs.load_or_train(make_run(), study)


def weights_of(run: Run, study: Study) -> dict[str, torch.Tensor]:
    return runs.load_or_train(run, study).load_model().state_dict()


# --- Keys --------------------------------------------------------------------------------------


def test_every_setting_of_a_start_changes_the_key(source: runs.Result) -> None:
    run = make_run("digits", start=Transfer(source.run))
    different = [
        replace(run, start=None),
        replace(run, start=Transfer(source.run, frozen=True)),
        replace(run, start=Transfer(source.run, rate_factor=0.5)),
        replace(run, start=Transfer(replace(source.run, seed=1))),
        make_run(start=Pruning(source.run, "weights", 0.5)),
        make_run(start=Pruning(source.run, "weights", 0.6)),
        make_run(start=Pruning(source.run, "channels", 0.5)),
    ]
    keys = {r.key for r in (run, *different)}
    assert len(keys) == 8
    for other in different:
        assert runs.run_from_dict(json.loads(json.dumps(asdict(other)))) == other


def test_the_place_of_the_sources_folder_does_not_enter_the_key(source: runs.Result) -> None:
    here, there = (replace(source.run, dataset=f"/{place}/birds") for place in ("here", "there"))
    run = make_run("digits")
    assert replace(run, start=Transfer(here)).key == replace(run, start=Transfer(there)).key


# --- Transfer ----------------------------------------------------------------------------------


def test_all_weights_but_the_last_layers_are_copied(source: runs.Result) -> None:
    model = make_run("digits", seed=5).build(10, 16)
    own = model.fc.weight.clone()
    weights = source.load_model().state_dict()
    starts.transfer(model, weights, frozen=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]) != name.startswith("fc."), name
    assert torch.equal(model.fc.weight, own)
    assert all(p.requires_grad for p in model.parameters())


def test_another_number_of_classes_fits(source: runs.Result) -> None:
    model = make_run("digits").build(3, 16)
    starts.transfer(model, source.load_model().state_dict(), frozen=True)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


def test_frozen_features_stay_bit_for_bit_and_the_last_layer_learns(
    study: Study, source: runs.Result
) -> None:
    run = make_run("digits", start=Transfer(source.run, frozen=True), epochs=2)
    trained, before = weights_of(run, study), source.load_model().state_dict()
    for name, value in trained.items():
        assert torch.equal(value, before[name]) != name.startswith("fc."), name


def test_fine_tuning_moves_everything(study: Study, source: runs.Result) -> None:
    trained = weights_of(make_run("digits", start=Transfer(source.run)), study)
    before = source.load_model().state_dict()
    moved = [name for name in trained if not torch.equal(trained[name], before[name])]
    assert {"conv1.weight", "bn1.running_mean", "layer4.1.conv2.weight"} <= set(moved)


def test_earlier_parts_move_less_with_a_rate_factor(study: Study, source: runs.Result) -> None:
    before = source.load_model().state_dict()

    def moved(factor: float, name: str) -> float:
        start = Transfer(source.run, rate_factor=factor)
        recipe = replace(RECIPE, weight_decay=0.0)
        trained = weights_of(make_run("digits", start=start, recipe=recipe), study)
        return float((trained[name] - before[name]).norm())

    for name in ("conv1.weight", "layer2.0.conv1.weight"):
        assert moved(0.2, name) < 0.3 * moved(1.0, name)


def test_parameter_groups_name_each_parameter_once_and_scale_by_distance() -> None:
    model = models.build_model("resnet18", num_classes=10, width=0.125)
    groups = training.parameter_groups(model, 0.5)
    assert [g["scale"] for g in groups] == [0.5**n for n in range(7)]
    assert groups[0]["params"][0] is model.fc.weight
    assert groups[-1]["params"][0] is model.conv1.weight
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_a_transferred_run_resumes_bit_for_bit(study: Study, source: runs.Result) -> None:
    start = Transfer(source.run, rate_factor=0.5)
    run = make_run("digits", start=start, epochs=3, dropout=0.2)
    whole = weights_of(run, study)
    other = replace(study, runs_dir=study.runs_dir.parent / "cut")

    def stop(progress: training.Progress) -> None:
        if progress.epoch == 2:
            raise KeyboardInterrupt

    runs.load_or_train(source.run, other)
    with pytest.raises(KeyboardInterrupt):
        runs.load_or_train(run, other, on_progress=stop, checkpoint_seconds=0.0)
    assert (other.runs_dir / run.key / "resume.pt").exists()
    resumed = weights_of(run, other)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_source_is_trained_when_it_is_missing(study: Study) -> None:
    source = make_run(seed=7)
    folder = study.runs_dir / source.key
    assert not folder.exists()
    runs.load_or_train(make_run("digits", seed=7, start=Transfer(source)), study)
    assert (folder / "result.json").exists()


# --- ImageNet weights --------------------------------------------------------------------------


def test_imagenet_weights_come_from_a_file(tmp_path: Path, monkeypatch) -> None:
    from torchvision.models import ResNet18_Weights

    name = ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    network = models.build_model("resnet18", num_classes=1000, stem="imagenet")
    torch.save(network.state_dict(), tmp_path / name)
    found = starts.imagenet_weights("resnet18", tmp_path)
    assert torch.equal(found["conv1.weight"], network.conv1.weight)
    mine = models.build_model("resnet18", num_classes=10, stem="imagenet")
    starts.transfer(mine, found, frozen=False)
    assert torch.equal(mine.layer4[1].conv2.weight, network.layer4[1].conv2.weight)


def test_missing_imagenet_weights_name_the_file(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(
        FileNotFoundError, match="ImageNet weights of resnet18.*put torchvision's file resnet18-"
    ):
        starts.imagenet_weights("resnet18", tmp_path)


def test_downloading_imagenet_weights_prints_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    network = models.build_model("resnet18", num_classes=1000, stem="imagenet")

    def download(url: str, path: str, *_: object, **__: object) -> None:
        torch.save(network.state_dict(), path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    found = starts.imagenet_weights("resnet18", tmp_path)
    assert torch.equal(found["conv1.weight"], network.conv1.weight)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("width", "there", "expected"),
    [
        (1.0, True, (IMAGENET, 128, "imagenet")),
        (1.0, False, ("shapes", 16, "auto")),
        (0.125, True, ("shapes", 16, "auto")),
    ],
)
def test_the_transfer_notebook_takes_imagenet_weights_where_they_fit(
    study: Study, monkeypatch, width: float, there: bool, expected: tuple
) -> None:
    def weights(*_: object) -> dict:
        if not there:
            raise FileNotFoundError
        return {}

    monkeypatch.setattr(starts, "imagenet_weights", weights)
    notebook = nbformat.read(ROOT / "notebooks" / "08_transfer.ipynb", as_version=4)
    cell = next(cell.source for cell in notebook.cells if "def choose_source" in cell.source)
    names = {"contextlib": contextlib, "runs": runs, "starts": starts, "IMAGENET": IMAGENET}
    exec(cell.split("\n\n\n")[0], names)
    wide = replace(study, profile=replace(study.profile, width=width))
    sources, image_size, stem = names["choose_source"](wide)
    kinds = {getattr(source, "dataset", source) for source in sources.values()}
    assert (*kinds, image_size, stem) == expected
    assert set(sources) == set(study.profile.seeds)


# --- Pruning -----------------------------------------------------------------------------------


def test_pruned_weights_stay_zero_through_training(study: Study, source: runs.Result) -> None:
    run = make_run(start=Pruning(source.run, "weights", 0.9), epochs=2)
    expected = source.load_model()
    compression.prune_weights(expected, 0.9)
    compression.make_permanent(expected)
    trained = weights_of(run, study)
    moved = 0
    for name, weight in expected.state_dict().items():
        if name.endswith("weight") and weight.ndim > 1:
            assert (trained[name][weight == 0] == 0).all(), name
            moved += int((trained[name] != weight).sum())
    assert moved > 100
    plain = run.build(10, 16).state_dict()
    assert set(plain) == set(trained)  # no masks are left


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_pruned_channels_are_gone_and_the_network_loads_again(study: Study, model: str) -> None:
    source = make_run(model=model, width=0.25)
    run = replace(source, start=Pruning(source, "channels", 0.5))
    result = runs.load_or_train(run, study)
    network = result.load_model()
    whole = source.build(10, 16)
    assert models.count_parameters(network) < 0.4 * models.count_parameters(whole)
    assert evaluation.multiply_adds(network, 16) < 0.4 * evaluation.multiply_adds(whole, 16)
    assert network.fc.out_features == 10
    dataset = run.load_data(study.data_dir)
    logits = evaluation.predict(network, dataset.test, *dataset.channel_statistics)
    assert torch.equal(logits, result.test_logits)


# --- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: Transfer("resnet18.pth"), "source is 'resnet18.pth'; expected a Run or"),
        (lambda s: Transfer(s, rate_factor=0), "rate_factor is 0.0; expected above 0"),
        (lambda s: Transfer(s, rate_factor=1.5), "rate_factor is 1.5; expected above 0"),
        (lambda s: Pruning(s, "layers", 0.5), "kind is 'layers'; expected weights or channels"),
        (lambda s: Pruning(s, "weights", 1.0), "share is 1.0; expected 0 to below 1"),
        (lambda s: make_run(width=0.25, start=Transfer(s)), "width is 0.25, but the run to start"),
        (lambda s: make_run(model="resnet34", start=Transfer(s)), "model is 'resnet34', but"),
        (lambda s: make_run("digits", start=Pruning(s, "weights", 0.5)), "dataset is 'digits', "),
        (lambda s: make_run(start=Transfer(IMAGENET)), "no weights for resnet18 at width 0.125"),
        (
            lambda s: make_run(model="simple_cnn", width=1.0, start=Transfer(IMAGENET)),
            "no weights for simple_cnn",
        ),
    ],
)
def test_what_cannot_be_is_refused(source: runs.Result, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(source.run)
