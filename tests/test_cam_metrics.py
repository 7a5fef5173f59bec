"""Metrics of maps: perfect, inverted, random and uniform maps get the scores theory gives them."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from helpers import cam_metrics as metrics
from helpers.gradcam import cam
from tests.test_gradcam import SmallNet


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes(count: int, size: int = 16, side: int = 8) -> torch.Tensor:
    """Square masks that cover (side / size)^2 of the image, at random places."""
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    corners = torch.randint(0, size - side + 1, (count, 2), generator=rng(3)).tolist()
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[top : top + side, left : left + side] = True
    return masks


MASKS = boxes(400)
PERFECT = MASKS.float()
INVERTED = 1 - PERFECT
UNIFORM = torch.ones_like(PERFECT)
RANDOM = torch.rand(PERFECT.shape, generator=rng(1))
AREA = 0.25


class Reader(nn.Module):
    """Its probability of class 0 is the mean brightness of the image within the image's mask.

    The masks are matched by position: images must come in order, in parts or whole.
    """

    def __init__(self, masks: torch.Tensor):
        super().__init__()
        self.masks, self.position = masks.double(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masks = self.masks[self.position : self.position + len(x)]
        self.position = (self.position + len(x)) % len(self.masks)
        share = (x.double().mean(1) * masks).sum((1, 2)) / masks.sum((1, 2))
        share = share.clamp(1e-12, 1 - 1e-12)
        return torch.stack([share.log(), (1 - share).log()], 1)


ONES = torch.ones(len(MASKS), 3, 16, 16)
ZEROS = torch.zeros(len(MASKS), dtype=torch.long)


@pytest.mark.parametrize("metric", [metrics.pointing_game, metrics.energy_in_mask])
def test_placement_of_known_maps(metric):
    assert (metric(PERFECT, MASKS).values == 1).all()
    assert (metric(INVERTED, MASKS).values == 0).all()
    assert metric(UNIFORM, MASKS).values == pytest.approx(AREA)
    assert metric(RANDOM, MASKS).interval().mean == pytest.approx(AREA, abs=0.05)
    scaled = metric(PERFECT * 7 + 0.1, MASKS).values
    assert scaled == pytest.approx(metric((PERFECT * 7 + 0.1) / 3, MASKS).values)


def test_placement_values_worked_out_by_hand():
    maps = torch.tensor([[[4.0, 4, 1], [0, 2, 1]]])
    masks = torch.tensor([[[True, False, True], [False, True, False]]])
    assert metrics.pointing_game(maps, masks).values == pytest.approx([1 / 2])
    rounded = maps * torch.tensor([[[1 - 1e-7, 1, 1], [1, 1, 1]]])  # still the same maximum
    assert metrics.pointing_game(rounded, masks).values == pytest.approx([1 / 2])
    assert metrics.energy_in_mask(maps, masks).values == pytest.approx([7 / 12])


@pytest.mark.parametrize("metric", [metrics.pointing_game, metrics.energy_in_mask])
def test_empty_masks_and_zero_maps_have_no_score(metric):
    maps, masks = PERFECT.clone(), MASKS.clone()
    maps[:3] = 0
    masks[2:7] = False
    scores = metric(maps, masks)
    assert scores.all_zero == 3
    assert np.isnan(scores.values[:7]).all() and (scores.values[7:] == 1).all()
    two = metrics.Scores(np.stack([scores.values, np.where(np.arange(len(maps)) < 8, np.nan, 0)]))
    assert two.interval().n == 2 and two.interval().mean == 0.5
    assert metric(maps * 0, MASKS).interval() == metrics.Interval(0, -1, 1, 0)


def test_mosaics_show_what_they_say():
    images = torch.arange(30.0).view(30, 1, 1, 1).expand(30, 3, 4, 6)
    labels = torch.arange(30) % 10
    for grid in ((2, 2), (3, 3), (1, 2)):
        made, classes = metrics.mosaics(images, labels, grid=grid, count=50)
        assert made.shape == (50, 3, 4 * grid[0], 6 * grid[1])
        assert all(len(row.unique()) == grid[0] * grid[1] for row in classes)
        shown = made[:, 0, ::4, ::6].flatten(1).long()
        assert torch.equal(labels[shown], classes)
        again, _ = metrics.mosaics(images, labels, grid=grid, count=50)
        assert torch.equal(again, made)
    with pytest.raises(ValueError, match="needs 16 classes"):
        metrics.mosaics(images, labels, grid=(4, 4), count=1)


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (1, 2), (2, 3)])
def test_grid_pointing_game_of_known_maps(grid):
    rows, columns = grid
    cells = rows * columns
    perfect = torch.zeros(5, cells, 6 * rows, 8 * columns)
    for cell in range(cells):
        top, left = 6 * (cell // columns), 8 * (cell % columns)
        perfect[:, cell, top : top + 6, left : left + 8] = 2
    game = metrics.grid_pointing_game
    assert (game(perfect, grid).values == 1).all()
    assert game(torch.ones_like(perfect), grid).values == pytest.approx(1 / cells)
    assert (game(2 - perfect, grid).values == 0).all()
    noise = torch.rand(200, cells, 6 * rows, 8 * columns, generator=rng())
    assert game(noise, grid).interval().mean == pytest.approx(1 / cells, abs=0.01)
    assert game(noise, grid).values.std() > 0
    blind = noise[:, :1].expand(-1, cells, -1, -1)
    assert game(blind, grid).values == pytest.approx(1 / cells)
    perfect[0, 1:] = 0
    perfect[1] = 0
    scores = game(perfect, grid)
    assert scores.all_zero == 2 * cells - 1 and scores.values[0] == 1 and np.isnan(scores.values[1])
    with pytest.raises(ValueError, match="don't fit"):
        game(perfect[..., :-1], grid)
    with pytest.raises(ValueError, match="don't fit"):
        game(perfect[:, :-1], grid)


def test_grid_pointing_game_of_a_network_that_sees_one_class_a_cell():
    """End to end: colour-coded classes, a network that is a colour detector."""
    images = torch.eye(4)[torch.arange(40) % 4][:, :, None, None].expand(40, 4, 8, 8).clone()
    detector = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        detector[0].weight.copy_(torch.eye(4)[:, :, None, None])
    made, classes = metrics.mosaics(images, torch.arange(40) % 4, grid=(2, 2), count=10)
    maps = cam(detector, made, "all", "0").maps
    maps = maps[torch.arange(10)[:, None], classes]
    assert metrics.grid_pointing_game(maps, (2, 2)).interval().mean == 1


def test_insertion_and_deletion_of_known_maps():
    def areas(maps, images=ONES):
        found = metrics.insertion_deletion(Reader(MASKS), images, maps, ZEROS)
        return [scores.interval().mean for scores in found]

    # Deleting the quarter that matters first empties it after a quarter of the steps.
    assert areas(PERFECT)[1] == pytest.approx(AREA / 2, abs=1e-6)
    assert areas(INVERTED)[1] == pytest.approx(1 - AREA / 2, abs=1e-6)
    assert areas(RANDOM)[1] == pytest.approx(0.5, abs=0.01)
    # All values tie: the order is a seeded shuffle, as good as chance and not by position.
    assert areas(UNIFORM)[1] == pytest.approx(0.5, abs=0.01)
    # A blurred uniform image is the image: insertion has nothing to add.
    assert areas(PERFECT)[0] == pytest.approx(1, abs=1e-5)
    lit = MASKS[:, None].expand(-1, 3, -1, -1).float()
    begin = gaussian_blur(lit, 11, 5.0)[:, 0]
    begin = ((begin * MASKS).sum((1, 2)) / MASKS.sum((1, 2))).mean().item()
    assert 0.1 < begin < 0.9
    assert areas(PERFECT, lit)[0] == pytest.approx(1 - (1 - begin) * AREA / 2, abs=1e-3)
    assert areas(INVERTED, lit)[0] == pytest.approx(begin + (1 - begin) * AREA / 2, abs=1e-3)
    assert areas(RANDOM, lit)[0] == pytest.approx((1 + begin) / 2, abs=0.01)


def test_removal_goes_by_rank_where_most_of_the_map_is_zero():
    maps = torch.zeros(1, 10, 10)
    maps[0, 0, :3] = torch.tensor([1.0, 3, 2])
    order = metrics.removal_order(maps, seed=0)
    assert order[0, 0, :3].tolist() == [2, 0, 1]
    assert sorted(order.flatten().tolist()) == list(range(100))
    zeros = order[0].flatten()[3:]
    assert not torch.equal(zeros, zeros.sort().values), "ties follow the pixels' position"
    assert torch.equal(order, metrics.removal_order(maps, seed=0))
    assert not torch.equal(order, metrics.removal_order(maps, seed=1))


def test_average_drop():
    def drop(maps, targets=ZEROS):
        return metrics.average_drop(Reader(MASKS), ONES, maps, targets).values

    half = PERFECT * 0.5 + INVERTED
    assert drop(PERFECT * 9) == pytest.approx(0, abs=1e-9)
    assert drop(INVERTED) == pytest.approx(1, abs=1e-9)
    assert drop(half * 9) == pytest.approx(0.5)
    assert drop(half, ZEROS + 1).max() == 0  # the other class gains when the evidence goes


def test_imputation_solves_its_equations():
    images = torch.randn(6, 3, 12, 9, generator=rng(), dtype=torch.float64)
    removed = torch.rand(6, 12, 9, generator=rng(1)) < torch.linspace(0.1, 0.95, 6)[:, None, None]
    filled = metrics.impute(images, removed)
    keep = ~removed[:, None].expand_as(images)
    assert torch.equal(filled[keep], images[keep])
    total, weights = torch.zeros_like(filled), torch.zeros(12, 9, dtype=torch.float64)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            weight = {0: 0, 1: 1 / 6, 2: 1 / 12}[abs(dy) + abs(dx)]
            here = slice(max(dy, 0), 12 + min(dy, 0)), slice(max(dx, 0), 9 + min(dx, 0))
            there = slice(max(-dy, 0), 12 + min(-dy, 0)), slice(max(-dx, 0), 9 + min(-dx, 0))
            total[:, :, here[0], here[1]] += weight * filled[:, :, there[0], there[1]]
            weights[here] += weight
    torch.testing.assert_close(filled[~keep], (total / weights)[~keep], rtol=1e-8, atol=1e-9)
    constant = torch.full_like(images, 0.3)
    torch.testing.assert_close(metrics.impute(constant, removed), constant)
    assert torch.equal(metrics.impute(images, removed & False), images)
    with pytest.raises(ValueError, match="leave some"):
        metrics.impute(images, removed | True)


def test_road_of_known_maps():
    masks = MASKS[:100]  # each is a system of equations for every share removed
    lit = masks[:, None].expand(-1, 3, -1, -1).float()
    maps = [x[:100] for x in (PERFECT, INVERTED, RANDOM, UNIFORM)]
    scores = [metrics.road(Reader(masks), lit, x, ZEROS[:100]).interval().mean for x in maps]
    perfect, inverted, *chance = scores
    assert perfect > 0.3 and inverted == pytest.approx(-perfect, abs=0.02)
    assert all(abs(score) < 0.02 for score in chance)


def test_road_adds_as_much_noise_as_its_authors():
    """A deviation of 0.01, where pixels were removed (Rong et al., ICML 2022)."""
    model, seen = Reader(MASKS[:50]), []
    model.register_forward_pre_hook(lambda _model, inputs: seen.append(inputs[0] - ONES[:50]))
    metrics.road(model, ONES[:50], RANDOM[:50], ZEROS[:50])
    noise = torch.stack(seen)  # ones are filled in with ones
    assert noise[noise != 0].std() == pytest.approx(0.01, rel=0.02)
    assert (noise != 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_faithfulness_agrees_with_grad_cam(monkeypatch):
    """Its drop is absolute, the paper's relative; its ROAD removes by percentile, the same here."""
    pytest.importorskip("pytorch_grad_cam", reason="peer library grad-cam is not installed")
    from pytorch_grad_cam.metrics import cam_mult_image, road
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    model = SmallNet().float()
    images = torch.randn(8, 3, 16, 16, generator=rng())
    maps = torch.rand(8, 16, 16, generator=rng(1))
    maps = maps / maps.amax((1, 2), keepdim=True)
    classes = torch.arange(8) % 5
    targets = [ClassifierOutputSoftmaxTarget(k) for k in classes.tolist()]
    peer = images, maps.numpy(), targets, model
    before = model(images).softmax(1)[range(8), classes].detach().numpy()
    drop = metrics.average_drop(model, images, maps, classes).values
    assert drop == pytest.approx(cam_mult_image.DropInConfidence()(*peer) / before, abs=1e-5)
    theirs = road.ROADCombined(percentiles=[25, 50, 75])
    for metric in (theirs.morf_averager, theirs.lerf_averager):
        metric.imputer = functools.partial(without_noise, metric.imputer)
    monkeypatch.setattr(metrics, "ROAD_SHARES", (0.25, 0.5, 0.75))
    monkeypatch.setattr(metrics, "ROAD_NOISE", 0)
    ours = metrics.road(model, images, maps, classes)
    assert ours.values == pytest.approx(theirs(*peer), abs=1e-4)


def without_noise(metric, percentile):
    made = metric(percentile)
    made.perturbation.imputer.noise = 0
    return made


def test_rank_correlation():
    first = torch.randint(0, 5, (20, 7, 7), generator=rng()).float()
    second = (first + torch.randint(0, 6, (20, 7, 7), generator=rng(1))).clamp(min=3)
    scores = metrics.rank_correlation(first, second)
    for index, value in enumerate(scores.values):
        expected = stats.spearmanr(first[index].flatten(), second[index].flatten()).statistic
        assert value == pytest.approx(expected)
    assert metrics.rank_correlation(RANDOM, RANDOM**3).values == pytest.approx(1)
    assert metrics.rank_correlation(RANDOM, 1 - RANDOM).values == pytest.approx(-1)
    noise = torch.rand(RANDOM.shape, generator=rng(5))
    assert metrics.rank_correlation(RANDOM, noise).interval().mean == pytest.approx(0, abs=0.02)
    assert (metrics.rank_correlation(RANDOM, UNIFORM).values == 0).all()
    gone = RANDOM.clone()
    gone[:5] = 0
    scores = metrics.rank_correlation(RANDOM, gone)
    assert scores.all_zero == 5 and np.isnan(scores.values[:5]).all()
    apart = torch.zeros(2, 1, 4, 4)
    apart[0, 0, :, 0] = apart[1, 0, :, 1] = 1  # which share no column
    assert metrics.rank_correlation(*apart).values == pytest.approx(-1 / 3)
    with pytest.raises(ValueError, match="maps differ"):
        metrics.rank_correlation(RANDOM, RANDOM[:, :4])


def test_agreement_is_the_mean_over_pairs():
    others = [RANDOM, RANDOM**2, 1 - RANDOM]
    assert metrics.agreement(others).values == pytest.approx(-1 / 3)
    gone = (1 - RANDOM).clone()
    gone[:4] = 0
    scores = metrics.agreement([RANDOM, RANDOM**2, gone])
    assert scores.values[:4] == pytest.approx(1) and scores.values[4:] == pytest.approx(-1 / 3)
    assert scores.all_zero == 4


def test_parameter_randomisation_is_cascading_and_looks_at_the_copy():
    model = SmallNet().float().train()
    images = torch.randn(12, 3, 16, 16, generator=rng())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []

    def explain(network):
        seen.append({key: value.clone() for key, value in network.state_dict().items()})
        return cam(network, images, 1, "layer2", "hirescam").maps

    torch.manual_seed(7)
    expected_next = torch.rand(3)
    torch.manual_seed(7)
    scores = metrics.parameter_randomisation(model, explain)
    assert torch.equal(torch.rand(3), expected_next), "the global generator moved"
    assert list(scores) == ["fc", "layer3", "layer2", "layer1"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    for step, done in enumerate([[], ["fc"], ["fc", "layer3"], ["fc", "layer3", "layer2"]]):
        changed = {k.split(".")[0] for k, v in seen[step].items() if not torch.equal(v, before[k])}
        assert changed == set(done)
    assert scores["layer1"].interval().mean < 0.6
    edges = metrics.parameter_randomisation(
        model, lambda _network: metrics.control_maps(images)["edges"]
    )
    assert all(part.values == pytest.approx(1) for part in edges.values())
    with pytest.raises(ValueError, match="no layer of this model"):
        metrics.parameter_randomisation(
            model, lambda network: cam(network, images, 1, model.layer2).maps
        )


def test_parts_that_cannot_be_randomised_are_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    model = nn.Sequential(nn.Sequential(Scale()))
    with pytest.raises(ValueError, match=r"0\.0 has parameters"):
        metrics.parameter_randomisation(model, lambda _network: RANDOM)


def test_controls():
    images = torch.zeros(6, 3, 20, 20)
    images[:, :, :, 10:] = 1
    maps = metrics.control_maps(images)
    assert list(maps) == ["random", "centred", "edges", "uniform"]
    assert all(m.shape == (6, 20, 20) and m.min() >= 0 and m.max() <= 1 for m in maps.values())
    noise = torch.rand(1, 3, 8, 9, generator=rng())
    slopes = [ndimage.sobel(one, side, mode="nearest") for one in noise[0] for side in (0, 1)]
    edges = torch.tensor(np.square(slopes).sum(0)).sqrt()
    torch.testing.assert_close(metrics.control_maps(noise)["edges"][0], edges / edges.max())
    centre = maps["centred"][0]
    assert centre.argmax() in (9 * 20 + 9, 9 * 20 + 10, 10 * 20 + 9, 10 * 20 + 10)
    assert torch.allclose(centre, centre.flip(0)) and torch.allclose(centre, centre.T)
    odd = metrics.control_maps(torch.zeros(1, 3, 21, 41))["centred"][0]
    a_deviation_away = torch.tensor([odd[15, 20], odd[10, 30]])  # a quarter of each side
    assert torch.allclose(a_deviation_away, torch.tensor(-0.5).exp()) and odd[10, 20] == 1
    assert (maps["uniform"] == 1).all() and maps["random"].std() > 0.25
    assert torch.equal(maps["random"], metrics.control_maps(images)["random"])
    smooth = metrics.control_maps(images, layer_size=(4, 4))["random"]
    assert smooth.diff(dim=2).abs().mean() < 0.2 * maps["random"].diff(dim=2).abs().mean()
    assert torch.isfinite(metrics.control_maps(images * 0)["edges"]).all()


def test_the_table_always_holds_the_controls():
    maps = {"perfect": PERFECT, "nothing": PERFECT * 0}
    pointing, energy = metrics.pointing_game, metrics.energy_in_mask
    table = metrics.compare(
        maps, lambda m: {"pointing": pointing(m, MASKS), "energy": energy(m, MASKS)}, ONES
    )
    assert list(table) == ["pointing", "energy"]
    for by_method in table.values():
        assert list(by_method) == [*maps, "random", "centred", "edges", "uniform"]
    perfect, nothing, uniform = (table["energy"][m] for m in ("perfect", "nothing", "uniform"))
    assert (perfect.values == 1).all() and len(perfect.values) == 400
    assert np.isnan(nothing.values).all() and nothing.all_zero == 400
    assert table["pointing"]["uniform"].interval().mean == pytest.approx(AREA)
    assert table["pointing"]["random"].interval().mean < 0.35
    gain = metrics.Scores(perfect.values - uniform.values).interval()
    assert gain.mean == pytest.approx(1 - AREA) and gain.low > 0.9 * gain.mean
    with pytest.raises(ValueError, match="named like controls: random"):
        metrics.compare({"random": RANDOM}, dict, ONES)


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (RANDOM[0], MASKS[0], "N x H x W"),
        (RANDOM - 0.5, MASKS, "not negative"),
        (RANDOM * math.nan, MASKS, "finite"),
        (RANDOM, MASKS[:5], "masks must be bool"),
        (RANDOM, MASKS.float(), "masks must be bool"),
    ],
)
def test_wrong_maps_and_masks(maps, masks, message):
    with pytest.raises(ValueError, match=message):
        metrics.energy_in_mask(maps, masks)


def test_wrong_targets_and_state_is_kept():
    model = SmallNet().float().train()
    images = torch.randn(6, 3, 16, 16, generator=rng())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for count in (2, 7):
        with pytest.raises(ValueError, match="a class for each image"):
            metrics.average_drop(model, images, RANDOM[:6], ZEROS[:count])
    metrics.road(model, images, RANDOM[:6], torch.zeros(6, dtype=torch.long))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
