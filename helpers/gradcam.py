"""Class activation maps: where in an image a convolutional network finds its evidence.

Grad-CAM (Selvaraju et al., ICCV 2017) takes four steps:

1. run the network and keep the activations A (C x h x w) of one convolutional layer;
2. differentiate the class score S, a logit, with respect to A: the gradients G;
3. average G over the positions, which gives one weight a channel: w_c = mean_ij G_cij;
4. add the channels up with these weights and keep what speaks for the class:
   map = ReLU(sum_c w_c A_c).

The other methods change steps 3 and 4 only, each by a rule of a few lines; `METHODS["my-cam"] =
Method(my_rule)` adds one. The cost is about one forward pass: a hook makes the layer's output a
leaf of the autograd graph, so that only what follows is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.config import images_at_once
from helpers.models import undisturbed

Target = int | Sequence[int] | Tensor | str | Callable[[Any], Tensor] | None
Layer = str | nn.Module

IMAGES_AT_ONCE = 128  # more images, on a CPU fewer, are explained in parts
CHANNELS_AT_ONCE = 64  # of Score-CAM, which runs the network once a channel
PIXELS_FOR_CHANNELS_LAST = 2**16  # from here on, a CPU is faster on images in that order


@dataclass(frozen=True)
class Method:
    """One way to turn activations A (N x C x h x w, at least float32) into a map.

    `uses` says what the rule gets and returns:

    - "gradients": `rule(A, G)`, G the gradients of the score (as A), returns maps N x h x w;
    - "activations": `rule(A)`, blind to the class, returns maps N x h x w;
    - "scores": `rule(A, images, ask)` returns a weight for each channel and each of the T explained
      scores, N x C x T; the map is the sum of the channels under these weights. `ask(i, versions)`
      gives the scores, M x T, of M versions of image i.
    """

    rule: Callable[..., Tensor]
    uses: str = "gradients"


def _weighted(weights: Tensor, activations: Tensor) -> Tensor:
    maps = weights[:, None] @ activations.flatten(2)
    return maps.view(len(maps), *activations.shape[2:])


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c mean(G_c) A_c (Selvaraju et al., ICCV 2017, equations 1 and 2)."""
    return _weighted(gradients.mean((2, 3)), activations)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c w_c A_c with w_c = sum_ij alpha_cij ReLU(G_cij) (Chattopadhay et al., WACV 2018).

    Their equation 19, alpha = G^2 / (2 G^2 + sum(A) G^3), is computed as 1 / (2 + sum(A) G): the
    powers, which vanish in float32, cancel. Where the denominator is 0, alpha is 0.
    """
    denominator = 2 + activations.sum((2, 3), keepdim=True) * gradients
    alpha = torch.where(denominator == 0, 0, 1 / denominator)
    return _weighted((alpha * gradients.relu()).sum((2, 3)), activations)


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c G_c * A_c, position by position (Draelos and Carin, 2020, HiResCAM)."""
    return torch.einsum("nchw,nchw->nhw", gradients, activations)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c ReLU(G_c) * A_c, position by position (Jiang et al., TIP 2021, equations 4 to 6)."""
    return torch.einsum("nchw,nchw->nhw", gradients.relu(), activations)


def xgrad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c w_c A_c with w_c = sum(G_c * A_c) / sum(A_c) (Fu et al., BMVC 2020, equation 8).

    A channel whose activations add up to 0 gets the weight 0.
    """
    total = activations.sum((2, 3))
    attributed = (gradients * activations).sum((2, 3))
    return _weighted(torch.where(total == 0, 0, attributed / total), activations)


def eigen_cam(activations: Tensor) -> Tensor:
    """A v, v the first right singular vector of A as hw x C (Muhammad and Yeasin, IJCNN 2020).

    The class plays no part. A singular vector has no sign of its own; the one with a positive sum
    over the map is taken (for activations after a ReLU the whole map is then non-negative).
    """
    n, _, height, width = activations.shape
    left, singular, _ = torch.linalg.svd(activations.flatten(2).mT, full_matrices=False)
    maps = left[:, :, 0] * singular[:, :1]
    maps = torch.where(maps.sum(1, keepdim=True) < 0, -maps, maps)
    return maps.reshape(n, height, width)


def score_cam(activations: Tensor, images: Tensor, ask: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Softmax over channels of the score of the image seen through each channel.

    Each channel is enlarged to the image and scaled to [0, 1], the image is multiplied by it, and
    the score is read (Wang et al., CVPR workshops 2020, algorithm 1; the baseline's score cancels
    in the softmax). C forward passes an image. Returns weights N x C x T.
    """
    weights = []
    for index, image in enumerate(images):
        scores = []
        for channels in activations[index, :, None].split(CHANNELS_AT_ONCE):
            masks = F.interpolate(channels, image.shape[1:], mode="bilinear")
            low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
            masks = torch.where(high > low, (masks - low) / (high - low), 0)
            scores.append(ask(index, image * masks.to(image)))
        weights.append(torch.cat(scores).softmax(0))
    return torch.stack(weights)


METHODS: dict[str, Method] = {
    "grad-cam": Method(grad_cam),
    "grad-cam++": Method(grad_cam_plus_plus),
    "hirescam": Method(hires_cam),
    "layercam": Method(layer_cam),
    "xgrad-cam": Method(xgrad_cam),
    "eigen-cam": Method(eigen_cam, uses="activations"),
    "score-cam": Method(score_cam, uses="scores"),
}


@dataclass(frozen=True, eq=False)
class CamResult:
    """Maps and what they explain; maps and all_zero are dicts by layer if `layers` was a list."""

    maps: Tensor | dict[str, Tensor]  # N x H x W, at least float32; N x K x H x W for "all"
    logits: Tensor | None  # the model's output, N x K; None if it is no tensor
    targets: Tensor | None  # the class explained, int64 (N,); None for "all" and functions
    all_zero: Tensor | dict[str, Tensor]  # maps that say nothing: bool (N,), (N, K) for "all"


def cam(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers: Layer | Sequence[Layer] | None = None,
    method: str = "grad-cam",
    *,
    size: str = "input",
    normalise: bool = True,
    reshape: Callable[[Tensor], Tensor] | None = None,
) -> CamResult:
    """Class activation maps of a batch of images, in evaluation mode; ValueError for bad input.

    images: N x 3 x H x W or 3 x H x W, floating point, normalised as in training.
    target: None for the predicted class; a class, or a list or tensor with one for each image;
        "all" for every class; or a function from what the model returns to one score a row, such
        as `lambda z: z[:, 3] - z[:, 5]` (rows may come in parts).
    layers: a layer's name or the module, or a list of them (one pass for all); None for
        `default_layer`. Of a layer that runs several times, the last call is explained.
    size: "input" enlarges the maps to H x W (bilinear); "layer" leaves them h x w.
    normalise: divide each map by its maximum; False leaves the values that the method gives.
    reshape: puts activations (and gradients) of another order into N x C x h x w. Channels last, as
        in a Swin: `lambda a: a.permute(0, 3, 1, 2)`. Tokens, as in a ViT with 14 x 14 patches, at
        `ln_1` of its last block (what follows depends on the class token alone):
        `lambda a: a[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)`.
    """
    for what, given, known in (("method", method, METHODS), ("size", size, ("input", "layer"))):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}.")
    several = isinstance(layers, (list, tuple))
    names = dict.fromkeys(_layer_name(model, x) for x in (layers if several else [layers]))
    with undisturbed(model):
        images, target = _checked(model, images, target)
        at_once = images_at_once(images.device, *images.shape[2:], IMAGES_AT_ONCE)
        targets = target.split(at_once) if isinstance(target, Tensor) else [target] * len(images)
        explain = functools.partial(_explain, model, names, METHODS[method], reshape)
        parts = zip(*map(explain, images.split(at_once), targets), strict=True)
        logits, classes, *maps = (None if x[0] is None else torch.cat(x) for x in parts)
        maps, all_zero = dict(zip(names, maps, strict=True)), {}
        for name, values in maps.items():
            _check_finite(f"maps at {name!r}", values)
            values = values.relu()
            if size == "input":
                values = F.interpolate(values, images.shape[2:], mode="bilinear")
            peak = values.amax((2, 3), keepdim=True)
            if normalise:
                values = values / torch.where(peak > 0, peak, 1)
            scores = slice(None) if isinstance(target, str) else 0
            maps[name], all_zero[name] = values[:, scores], peak[:, scores, 0, 0] == 0
    if not several:
        ((maps, all_zero),) = zip(maps.values(), all_zero.values(), strict=True)
    return CamResult(maps, logits, classes, all_zero)


def default_layer(model: nn.Module) -> str:
    """Name of a ResNet's last stage, `layer4` or the highest `layerN`; ValueError if none is."""
    stages = sorted(
        (name.count("."), -int(match[1]), name)
        for name, _ in model.named_modules()
        if (match := re.search(r"(?:^|\.)layer(\d+)$", name))
    )
    if not stages or (len(stages) > 1 and stages[0][:2] == stages[1][:2]):
        parts = ", ".join(dict(model.named_children()))
        raise ValueError(f"no single last stage layerN in {parts}: pass the target layer.")
    return stages[0][2]


def _explain(model, names, method, reshape, images, target):
    """Logits, classes, and maps N x T x h x w of each layer, of images explained at once."""
    output, leaves = _forward(model, names, reshape, images, record=method.uses == "gradients")
    with torch.enable_grad():
        scores, target = _scores(target, output, len(images))
    logits = output.detach() if isinstance(output, Tensor) else None
    _check_finite("logits", scores if logits is None else logits)
    activations = [_wide(reshape(leaf) if reshape else leaf) for leaf in leaves.values()]
    with torch.autocast(images.device.type, enabled=False):
        if method.uses == "gradients":
            gradients = _gradients(leaves, reshape, scores)
            maps = [[*map(method.rule, activations, of_score)] for of_score in gradients]
            maps = [torch.stack(of_layer, 1) for of_layer in zip(*maps, strict=True)]
        elif method.uses == "activations":
            maps = [torch.stack([method.rule(a)] * scores.shape[1], 1) for a in activations]
        else:
            ask = functools.partial(_ask, model, target)
            weigh = functools.partial(method.rule, images=images, ask=ask)
            maps = [torch.einsum("nct,nchw->nthw", weigh(a), a) for a in activations]
    return logits, target if isinstance(target, Tensor) else None, *maps


def _forward(model, names, reshape, images, record):
    """What the network returns, and the layers' outputs; recorded, these are the graph's leaves."""
    kept = dict.fromkeys(names)

    def keep(name, _module, _inputs, output):
        _check_layer(name, reshape(output) if reshape else output, images, strict=not reshape)
        torch.set_grad_enabled(record)
        # Both copies matter: later operations in place would otherwise change the kept
        # activations, or move the gradient to the point after them.
        kept[name] = output.clone().requires_grad_() if record else output.detach().clone()
        return kept[name].clone() if record else None

    fast = images.device.type == "cpu" and images[:, 0].numel() >= PIXELS_FOR_CHANNELS_LAST
    order = torch.channels_last if fast else torch.preserve_format
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(record))
        for name in names:
            hook = functools.partial(keep, name)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        try:
            output = model(images.clone(memory_format=order))
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            output = model(images.contiguous())  # `view` can't flatten channels_last
        except AssertionError as error:  # a vision transformer checks its images so
            raise ValueError(f"the model refuses images of {_shown(images)}: {error}.") from error
    if missing := [name for name, leaf in kept.items() if leaf is None]:
        raise ValueError(f"the forward pass never ran {missing}; choose other layers.")
    return output, kept


def _check_layer(name, maps, images, strict):
    """Refuse what isn't N x C x h x w or, if `strict`, not in proportion to these images."""
    fits = isinstance(maps, Tensor) and maps.ndim == 4 and len(maps) == len(images)
    if fits and strict:
        (h, w), (height, width) = maps.shape[2:], images.shape[2:]
        # Rounding changes a side by a pixel, convolutions without padding by a few per cent.
        distorted = abs(h * width - w * height) > height + width + 0.05 * w * height
        fits = h * w <= height * width and not distorted
    if not fits or maps[0, 0].numel() == 1:
        expected = f"{len(images)} x C x h x w above 1 x 1, in proportion to the images"
        remedy = "take an earlier convolutional layer, or `reshape` tokens or channels last"
        raise ValueError(f"layer {name!r} gives {_shown(maps)}; expected {expected}: {remedy}.")


def _gradients(leaves, reshape, scores):
    """Of each of T scores (N x T) the gradients at the leaves, by a backward pass of the tail."""
    with torch.enable_grad():
        # Images don't mix in evaluation mode, so one sum has the gradients of all of them.
        totals = scores.sum(0).unbind()
    for total in totals:
        found, more = [None] * len(leaves), total is not totals[-1]
        if total.requires_grad:
            found = torch.autograd.grad(total, [*leaves.values()], None, more, allow_unused=True)
        if unused := [n for n, gradient in zip(leaves, found, strict=True) if gradient is None]:
            raise ValueError(f"the score doesn't depend on {unused}, or is cut off: choose others.")
        yield [_wide(reshape(gradient) if reshape else gradient) for gradient in found]


def _scores(target, output, count):
    """Scores N x T of N images, T = K for "all", else 1; and the target, None made the classes."""
    if callable(target):
        scores = target(output)
        if not isinstance(scores, Tensor) or scores.shape != (count,):
            raise ValueError(f"the target function returned {_shown(scores)}, not one score a row.")
        return scores[:, None], target
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ValueError(f"logits must be N x K (or pass a target function); got {_shown(output)}.")
    if isinstance(target, str):
        return output, target
    classes = output.detach().argmax(1) if target is None else target.to(output.device)
    if classes.min() < 0 or classes.max() >= output.shape[1]:
        raise ValueError(f"targets must be classes 0 to {output.shape[1] - 1}; got {classes}.")
    return output.gather(1, classes.expand(count)[:, None]), classes


def _ask(model, target, index, versions):
    """Scores M x T of M versions of the image with this index."""
    target = target[index] if isinstance(target, Tensor) else target
    at_once = images_at_once(versions.device, *versions.shape[2:], CHANNELS_AT_ONCE)
    return torch.cat([_wide(_scores(target, model(x), len(x))[0]) for x in versions.split(at_once)])


def _wide(tensor):
    """At least float32, without a graph."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _layer_name(model, layer):
    if layer is None:
        return default_layer(model)
    names = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, nn.Module):
        layer = next((name for name, module in names.items() if module is layer), type(layer))
    if layer not in names:
        parts = ", ".join(dict(model.named_children()))
        raise ValueError(f"{layer!r} is no layer of this model, made of {parts}.")
    return layer


def _checked(model, images, target):
    """Images N x C x H x W where the model is, and classes as int64 (N,)."""
    floating = isinstance(images, Tensor) and images.is_floating_point()
    if not floating or images.ndim not in (3, 4) or not images.numel():
        raise ValueError(f"images must be floating point, N x C x H x W; got {_shown(images)}.")
    _check_finite("images", images)
    reference = next(model.parameters(), images)
    images = images.detach().to(reference.device, reference.dtype)
    images = images[None] if images.ndim == 3 else images
    if target is None or callable(target) or (isinstance(target, str) and target == "all"):
        return images, target
    classes = torch.as_tensor(math.nan if isinstance(target, str) else target)
    integers = torch.can_cast(classes.dtype, torch.int64) and classes.dtype != torch.bool
    if not integers or classes.shape not in ((), (len(images),)):
        expected = f"None, a class or one for each of {len(images)} images, 'all' or a function"
        raise ValueError(f"target is {target!r}; expected {expected}.")
    return images, classes.long().expand(len(images))


def _check_finite(what, values):
    if not math.isfinite(values.abs().max()):
        raise ValueError(f"{what} must be finite; found NaN or infinity.")


def _shown(value):
    tensor = isinstance(value, Tensor)
    return f"{value.dtype} {tuple(value.shape)}" if tensor else f"a {type(value).__name__}"
