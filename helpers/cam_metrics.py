"""How well placed, how faithful and how steady class activation maps are.

Maps are tensors N x H x W, non-negative, at image size; masks are bool tensors of that shape;
images are N x 3 x H x W, normalised as the model wants them. Every metric returns `Scores`; an
all-zero map points nowhere and an empty mask can't be hit, so both are left out. A method says
something only where it beats the random, centred, edge and uniform maps that `compare` adds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse, stats
from scipy.sparse.linalg import splu
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from helpers.config import images_at_once
from helpers.evaluation import Interval, seeds_interval
from helpers.models import undisturbed

BATCH = 256  # images in one forward pass at most
STEPS = 16  # of insertion and deletion
ROAD_SHARES, ROAD_NOISE = (0.1, 0.3, 0.5, 0.7, 0.9), 0.01  # of the pixels; standard deviation


@dataclass(frozen=True, eq=False)
class Scores:
    """One value for each image, or networks x images (float64, NaN where there is none)."""

    values: np.ndarray
    all_zero: int = 0  # maps

    def interval(self) -> Interval:
        """Mean of the images that all networks score, see `seeds_interval`; of none, the widest."""
        values = np.atleast_2d(self.values)
        scored = values[:, ~np.isnan(values).any(0)]
        return seeds_interval(scored) if scored.size else Interval(0.0, -1.0, 1.0, 0)


def pointing_game(maps: Tensor, masks: Tensor) -> Scores:
    """1 where the map's maximum lies in the mask, else 0 (Zhang et al., IJCV 2018).

    Where several pixels share it (to a millionth, since enlarging rounds), the share of them that
    lies in the mask: a uniform map gets its chance level, not a hit.
    """
    maps, masks = _check(maps, masks)
    peaks = maps >= (1 - 1e-6) * maps.amax((1, 2), keepdim=True)
    return _scores((peaks & masks).sum((1, 2)) / peaks.sum((1, 2)), maps, masks)


def energy_in_mask(maps: Tensor, masks: Tensor) -> Scores:
    """Share of the map's sum that lies in the mask (Wang et al., Score-CAM, CVPRW 2020)."""
    maps, masks = _check(maps, masks)
    return _scores((maps * masks).sum((1, 2)) / maps.sum((1, 2)), maps, masks)


def mosaics(
    images: Tensor, labels: Tensor, grid: tuple[int, int], count: int
) -> tuple[Tensor, Tensor]:
    """Draw mosaics of rows x columns images, no class twice (Böhle et al., CVPR 2021).

    Returned are `count` large images and the classes, count x cells, in reading order.
    """
    rows, columns = grid
    classes = labels.unique()
    if len(classes) < rows * columns:
        raise ValueError(f"a mosaic needs {rows * columns} classes; got {len(classes)}.")
    generator = np.random.default_rng(0)
    members = {int(k): np.flatnonzero((labels == k).cpu().numpy()) for k in classes}
    sources = np.empty((count, rows * columns), np.int64)
    for row in sources:
        chosen = generator.choice(list(members), rows * columns, replace=False)
        row[:] = [generator.choice(members[int(k)]) for k in chosen]
    sources = torch.from_numpy(sources)
    tiles = images[sources.to(images.device)].unflatten(1, grid)
    whole = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return whole, labels[sources.to(labels.device)]


def grid_pointing_game(maps: Tensor, grid: tuple[int, int]) -> Scores:
    """Share of each map's sum that lies in its own cell, averaged over a mosaic's cells.

    maps: M x rows * columns x H x W, the map for the class of each cell in reading order (Böhle et
    al., CVPR 2021). A map that is the same for every class gets chance, 1 / (rows * columns).
    """
    rows, columns = grid
    count, cells, height, width = maps.shape
    if cells != rows * columns or height % rows or width % columns:
        raise ValueError(f"maps {tuple(maps.shape)} don't fit a {rows} x {columns} mosaic.")
    maps = _check(maps.flatten(0, 1))[0].view(maps.shape)
    sums = maps.view(count, cells, rows, height // rows, columns, width // columns).sum((3, 5))
    own = sums.flatten(2).diagonal(dim1=1, dim2=2)
    total = sums.sum((2, 3))
    share = torch.where(total > 0, own / total, torch.nan)
    return Scores(share.nanmean(1).cpu().numpy(), all_zero=int((total == 0).sum()))


def insertion_deletion(
    model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor
) -> tuple[Scores, Scores]:
    """Areas under the insertion and the deletion curve (Petsiuk et al., RISE, BMVC 2018).

    The class's probability while pixels, the most important first, are put into a blurred image
    (insertion: high is good) or set to 0, the mean colour (deletion: low is good), all in `STEPS`
    equal shares. The blur is the paper's, 11 pixels wide.
    """
    maps, _ = _check(maps)
    order = removal_order(maps, seed=0)[:, None].to(images.device)
    ends = [round(step / STEPS * order[0].numel()) for step in range(STEPS + 1)]

    def area(start: Tensor, finish: Tensor) -> Scores:
        changed = (torch.where(order < end, finish, start) for end in ends)
        curve = torch.stack([_probabilities(model, x, targets) for x in changed], 1)
        return _scores(((curve[:, 1:] + curve[:, :-1]) / 2).mean(1), maps)

    return area(gaussian_blur(images, 11, 5.0), images), area(images, torch.zeros_like(images))


def average_drop(model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor) -> Scores:
    """Relative drop of the probability when the image is multiplied by the map; low is good.

    max(0, 1 - after / before), maps scaled to 1 (Chattopadhay et al., Grad-CAM++, WACV 2018).
    """
    maps, _ = _check(maps)
    peak = maps.amax((1, 2), keepdim=True)
    seen = images * (maps / torch.where(peak > 0, peak, 1))[:, None].to(images)
    before, after = (_probabilities(model, x, targets) for x in (images, seen))
    drop = (before - after).clamp(min=0) / before.clamp(min=torch.finfo(before.dtype).tiny)
    return _scores(drop, maps)


def road(model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor) -> Scores:
    """Remove and debias: (probability with least - with most important pixels removed) / 2.

    Averaged over ROAD_SHARES; positive is good, 0 is chance. `impute` fills in what is removed, so
    that the shape of the hole gives nothing away (Rong et al., ICML 2022).
    """
    maps, _ = _check(maps)
    order = removal_order(maps, seed=0).to(images.device)
    pixels = order[0].numel()
    generator = torch.Generator().manual_seed(0)

    def without(removed: Tensor) -> Tensor:
        drawn = torch.randn(images.shape, generator=generator).to(images)
        filled = impute(images, removed) + removed[:, None] * ROAD_NOISE * drawn
        return _probabilities(model, filled, targets)

    gap = 0
    for cut in (round(share * pixels) for share in ROAD_SHARES):
        gap = gap + without(order >= pixels - cut) - without(order < cut)
    return _scores(gap / (2 * len(ROAD_SHARES)), maps)


def impute(images: Tensor, removed: Tensor) -> Tensor:
    """Images N x C x H x W with the removed pixels (bool, N x H x W) filled in from neighbours.

    Each becomes the weighted mean of its eight neighbours, removed ones included: 1/6 beside, above
    and below, 1/12 diagonally, scaled at the border to a sum of 1 (Rong et al., ICML 2022, section
    4), which is a sparse linear system.
    """
    if removed.flatten(1).all(1).any():
        raise ValueError("all pixels of an image are removed; leave some to fill in from.")
    sides = images.shape[2:]
    rows, columns = (sparse.diags([1.0, 1.0], [-1, 1], (n, n)) for n in sides)
    weights = sparse.kronsum(columns, rows) / 6 + sparse.kron(rows, columns) / 12
    laplacian = (sparse.diags(weights.sum(1).A1) - weights).tocsr()
    filled = images.detach().cpu().double().flatten(2).numpy().copy()
    for image, hole in zip(filled, removed.flatten(1).cpu().numpy(), strict=True):
        if hole.any():
            inside, around = laplacian[hole][:, hole].tocsc(), laplacian[hole][:, ~hole]
            image[:, hole] = splu(inside).solve(-around @ image[:, ~hole].T).T
    return torch.from_numpy(filled).view(images.shape).to(images)


def _probabilities(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Softmax probability of each image's target, float64 (N,)."""
    if targets.shape != (len(images),):
        raise ValueError(f"expected a class for each image; got {tuple(targets.shape)}.")
    at_once = images_at_once(images.device, *images.shape[-2:], BATCH)
    with undisturbed(model):
        logits = torch.cat([model(part) for part in images.split(at_once)]).cpu().double()
        return logits.softmax(1).gather(1, targets.cpu()[:, None].long())[:, 0]


def removal_order(maps: Tensor, seed: int) -> Tensor:
    """Rank of each pixel, 0 for the most important; ties in a seeded random order."""
    flat = maps.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.rand(flat.shape, generator=generator).argsort(1).to(flat.device)
    by_value = flat.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    return shuffle.gather(1, by_value).argsort(1).view(maps.shape)


def rank_correlation(maps: Tensor, others: Tensor) -> Scores:
    """Spearman's rank correlation of two maps of each image, 0 where one is constant."""
    maps, others = _check(maps)[0], _check(others)[0]
    if maps.shape != others.shape:
        raise ValueError(f"maps differ: {tuple(maps.shape)} and {tuple(others.shape)}.")
    ranks = [stats.rankdata(x.flatten(1).cpu(), axis=1) for x in (maps, others)]
    first, second = (torch.from_numpy(x - x.mean(1, keepdims=True)) for x in ranks)
    scale = (first.square().sum(1) * second.square().sum(1)).sqrt()
    values = torch.where(scale > 0, (first * second).sum(1) / scale, 0)
    return _scores(values, torch.minimum(maps.amax((1, 2)), others.amax((1, 2)))[:, None])


def agreement(maps: Sequence[Tensor]) -> Scores:
    """Mean rank correlation over all pairs of maps of the same images: is the explanation stable?

    From layer to layer, or from seed to seed (Fel et al., WACV 2022).
    """
    pairs = [rank_correlation(maps[i], maps[j]).values for j in range(len(maps)) for i in range(j)]
    zero = torch.stack([x.flatten(1).amax(1) == 0 for x in maps])
    table = np.ma.masked_invalid(np.stack(pairs))
    return Scores(table.mean(0).filled(np.nan).astype(float), all_zero=int(zero.sum()))


def parameter_randomisation(
    model: nn.Module, explain: Callable[[nn.Module], Tensor], *, seed: int = 0
) -> dict[str, Scores]:
    """Rank correlation with the original maps as weights are randomised from the output backwards.

    The model's children that have parameters are initialised afresh, the last first, and stay so
    (cascading; Adebayo et al., NeurIPS 2018): a map that explains the network must change.
    `explain` gets a copy of the model and returns maps. Returns scores by the part randomised last.
    """
    original, network, scores = explain(model), copy.deepcopy(model), {}
    parts = [(name, part) for name, part in network.named_children() if [*part.parameters()]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in reversed(parts):
            for where, module in part.named_modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                elif next(module.parameters(recurse=False), None) is not None:
                    raise ValueError(f"{name}.{where} has parameters but no reset_parameters()")
            scores[name] = rank_correlation(original, explain(network))
    return scores


def control_maps(images: Tensor, layer_size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Maps that know nothing of the network, N x H x W in [0, 1].

    random: uniform noise, drawn at `layer_size` and enlarged like a map of that layer, or pixel by
    pixel; centred: a Gaussian with a standard deviation of a quarter of each side; edges: Sobel
    gradient magnitude, summed over channels; uniform: ones.
    """
    count, channels, height, width = images.shape
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(count, 1, *(layer_size or (height, width)), generator=generator)
    random = F.interpolate(random, (height, width), mode="bilinear")
    rows, columns = torch.linspace(-2, 2, height), torch.linspace(-2, 2, width)
    centred = torch.exp(-(rows[:, None] ** 2 + columns**2) / 2).expand(count, -1, -1)
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).to(images)
    kernels = torch.stack([sobel, sobel.T]).repeat(channels, 1, 1)[:, None]
    slopes = F.conv2d(F.pad(images, (1, 1, 1, 1), "replicate"), kernels, groups=channels)
    edges = slopes.square().sum(1).sqrt()
    edges = edges / edges.amax((1, 2), keepdim=True).clamp(min=torch.finfo(edges.dtype).tiny)
    return {
        "random": random[:, 0].to(images),
        "centred": centred.to(images),
        "edges": edges,
        "uniform": torch.ones_like(edges),
    }


def compare(
    maps: Mapping[str, Tensor],
    measure: Callable[[Tensor], Mapping[str, Scores]],
    images: Tensor,
    *,
    layer_size: tuple[int, int] | None = None,
) -> dict[str, dict[str, Scores]]:
    """Return the scores of each method's maps and of the controls, by metric and method.

    `measure` turns maps into scores by the metric's name. Two methods are compared in pairs by
    `Scores(a.values - b.values).interval()`.
    """
    controls = control_maps(images, layer_size=layer_size)
    if clash := controls.keys() & maps.keys():
        raise ValueError(f"methods named like controls: {', '.join(sorted(clash))}; rename them.")
    found: dict[str, dict[str, Scores]] = {}
    for method, tensor in {**maps, **controls}.items():
        for metric, scores in measure(tensor).items():
            found.setdefault(metric, {})[method] = scores
    return found


def _check(maps: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Maps in float64 and masks, on the CPU (Apple's GPUs have no float64); or full masks."""
    if maps.ndim != 3 or not maps.numel():
        raise ValueError(f"maps must be N x H x W and not empty; got {tuple(maps.shape)}.")
    maps = maps.cpu().double()
    if not torch.isfinite(maps).all() or maps.min() < 0:
        raise ValueError("maps must be finite and not negative; take the positive part.")
    if masks is None:
        return maps, torch.ones_like(maps, dtype=torch.bool)
    if masks.shape != maps.shape or masks.dtype != torch.bool:
        found = f"{masks.dtype} {tuple(masks.shape)}"
        raise ValueError(f"masks must be bool {tuple(maps.shape)}, as the maps; got {found}.")
    return maps, masks.to(maps.device)


def _scores(values: Tensor, maps: Tensor, masks: Tensor | None = None) -> Scores:
    """Scores without those of all-zero maps, which are counted, and of empty masks."""
    zero = maps.flatten(1).amax(1) == 0
    unscored = zero if masks is None else zero | ~masks.flatten(1).any(1)
    values = torch.where(unscored.to(values.device), torch.nan, values.double())
    return Scores(values.cpu().numpy(), int(zero.sum()))
