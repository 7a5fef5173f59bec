"""Class activation maps: where in an image a convolutional network finds its evidence.

Grad-CAM (Selvaraju et al., ICCV 2017) takes four steps:

1. run the network and keep the activations A (C x h x w) of one convolutional layer;
2. differentiate the class score S, a logit, with respect to A: the gradients G;
3. average G over the positions, which gives one weight a channel: w_c = mean_ij G_cij;
4. add the channels up with these weights and keep what speaks for the class:
   map = ReLU(sum_c w_c A_c).

The other methods change step 3 and 4 only. Each is a rule of a few lines in `METHODS`. To add one,
write a function and add an entry, `METHODS["my-cam"] = Method(my_rule, uses="gradients")`; the
class `Method` says what a rule gets and returns. Nothing else changes.

The cost is about one forward pass. A hook on the target layer replaces its output by a leaf of
the autograd graph. Only the operations after it are recorded, and `torch.autograd.grad` asks for
the gradient of that leaf alone. The network is left as it was found: no hook, no `.grad`, no
changed flag and no changed batch-norm statistic, also when an exception passes through.

Two notes on what a map means. It is computed in evaluation mode. If a module runs several times
in one forward pass, the last call is the one explained.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from helpers.config import images_at_once

Target = int | Sequence[int] | Tensor | str | Callable[[Tensor], Tensor] | None
Layer = str | nn.Module

# More images than this, on a CPU fewer, are explained in parts: memory stays bounded.
IMAGES_AT_ONCE = 128

# From this many pixels on, convolutions on a CPU are faster on images in channels_last order.
PIXELS_FOR_CHANNELS_LAST = 2**16

# Score-CAM and Ablation-CAM run the network once a channel, this many at a time.
CHANNELS_AT_ONCE = 64


# --------------------------------------------------------------------------- methods
@dataclass(frozen=True)
class Method:
    """One way to turn activations into a map.

    `uses` says what the rule gets, with A the activations (N x C x h x w):

    - "gradients": `rule(A, G)`, G the gradients of the score (as A), returns maps N x h x w;
    - "activations": `rule(A)`, blind to the class, returns maps N x h x w;
    - "scores": `rule(A, probe)`, see `Probe`, returns a weight for each channel and each of the T
      explained scores, N x C x T; the map is the sum of the channels under these weights.

    A and G are at least float32. `cam` applies the ReLU, the resizing and the normalisation.
    """

    rule: Callable[..., Tensor]
    uses: str = "gradients"


@dataclass(frozen=True)
class Probe:
    """Asks the network for its scores when something is changed.

    `masked(i, masks)` multiplies image i by each of M masks (M x H x W); `replaced(i, outputs)`
    lets the target layer put out each of M activations (M x C x h x w) for image i. Both return
    scores M x T. `scores` (N x T) are those of the unchanged images, `image_size` is (H, W).
    """

    scores: Tensor
    image_size: tuple[int, int]
    masked: Callable[[int, Tensor], Tensor]
    replaced: Callable[[int, Tensor], Tensor]


def _weighted(weights: Tensor, activations: Tensor) -> Tensor:
    maps = weights[:, None] @ activations.flatten(2)
    return maps.view(len(maps), *activations.shape[2:])


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c mean(G_c) A_c (Selvaraju et al., ICCV 2017, equations 1 and 2).

    Takes N x C x h x w activations and gradients, returns N x h x w.
    """
    return _weighted(gradients.mean((2, 3)), activations)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c w_c A_c with w_c = sum_ij alpha_cij ReLU(G_cij) (Chattopadhay et al., WACV 2018).

    Their equation 19, alpha = G^2 / (2 G^2 + sum(A) G^3), is computed as 1 / (2 + sum(A) G): the
    powers, which vanish in float32, cancel. Where the denominator is 0, alpha is 0. Takes
    N x C x h x w activations and gradients, returns N x h x w.
    """
    denominator = 2 + activations.sum((2, 3), keepdim=True) * gradients
    alpha = torch.where(denominator == 0, 0, 1 / denominator)
    return _weighted((alpha * gradients.relu()).sum((2, 3)), activations)


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c G_c * A_c, position by position (Draelos and Carin, 2020, HiResCAM).

    Takes N x C x h x w activations and gradients, returns N x h x w.
    """
    return torch.einsum("nchw,nchw->nhw", gradients, activations)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c ReLU(G_c) * A_c, position by position (Jiang et al., TIP 2021, equations 4 to 6).

    Takes N x C x h x w activations and gradients, returns N x h x w.
    """
    return torch.einsum("nchw,nchw->nhw", gradients.relu(), activations)


def xgrad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_c w_c A_c with w_c = sum(G_c * A_c) / sum(A_c) (Fu et al., BMVC 2020, equation 8).

    A channel whose activations add up to 0 gets the weight 0. Takes N x C x h x w activations and
    gradients, returns N x h x w.
    """
    total = activations.sum((2, 3))
    attributed = (gradients * activations).sum((2, 3))
    return _weighted(torch.where(total == 0, 0, attributed / total), activations)


def eigen_cam(activations: Tensor) -> Tensor:
    """A v, v the first right singular vector of A as hw x C (Muhammad and Yeasin, IJCNN 2020).

    The class plays no part. A singular vector has no sign of its own; the one with a positive sum
    over the map is taken (for activations after a ReLU the whole map is then non-negative). Takes
    N x C x h x w, returns N x h x w.
    """
    n, _, height, width = activations.shape
    left, singular, _ = torch.linalg.svd(activations.flatten(2).mT, full_matrices=False)
    maps = left[:, :, 0] * singular[:, :1]
    maps = torch.where(maps.sum(1, keepdim=True) < 0, -maps, maps)
    return maps.reshape(n, height, width)


def score_cam(activations: Tensor, probe: Probe) -> Tensor:
    """Softmax over channels of the score of the image seen through each channel.

    Each channel is enlarged to the image and scaled to [0, 1], the image is multiplied by it, and
    the score is read (Wang et al., CVPR workshops 2020, algorithm 1; the baseline's score cancels
    in the softmax). C forward passes an image. Takes N x C x h x w, returns weights N x C x T.
    """
    weights = []
    for index, channels in enumerate(activations):
        scores = []
        for chunk in channels.split(CHANNELS_AT_ONCE):
            masks = _resize(chunk, probe.image_size)
            low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
            masks = torch.where(high > low, (masks - low) / (high - low), 0)
            scores.append(probe.masked(index, masks))
        weights.append(torch.cat(scores).softmax(0))
    return torch.stack(weights)


def ablation_cam(activations: Tensor, probe: Probe) -> Tensor:
    """(S - S_c) / |S|, S_c the score when channel c is set to 0.

    Desai and Ramaswamy (WACV 2020, equation 3) divide by S, which turns the map around when the
    logit is negative; its absolute value keeps the order. C passes through the network's tail an
    image. Takes N x C x h x w, returns weights N x C x T.
    """
    weights = []
    for index, channels in enumerate(activations):
        scores = []
        for chunk in torch.arange(len(channels), device=channels.device).split(CHANNELS_AT_ONCE):
            outputs = channels.repeat(len(chunk), 1, 1, 1)
            outputs[torch.arange(len(chunk), device=channels.device), chunk] = 0
            scores.append(probe.replaced(index, outputs))
        whole = probe.scores[index]
        weights.append((whole - torch.cat(scores)) / torch.where(whole == 0, 1, whole.abs()))
    return torch.stack(weights)


METHODS: dict[str, Method] = {
    "grad-cam": Method(grad_cam),
    "grad-cam++": Method(grad_cam_plus_plus),
    "hirescam": Method(hires_cam),
    "layercam": Method(layer_cam),
    "xgrad-cam": Method(xgrad_cam),
    "eigen-cam": Method(eigen_cam, uses="activations"),
    "score-cam": Method(score_cam, uses="scores"),
    "ablation-cam": Method(ablation_cam, uses="scores"),
}


# --------------------------------------------------------------------------- maps
@dataclass(frozen=True, eq=False)
class CamResult:
    """Maps and what they explain.

    maps: float32 (float64 for a float64 model) on the model's device, N x H x W, or N x K x H x W
        for target="all"; a dict from layer name to such a tensor when `layers` was a list.
    logits: the model's output, N x K.
    targets: the explained class of each image, int64 (N,); for target="all" the classes (K,);
        None when the target was a callable.
    all_zero: bool (N,) or (N, K), or a dict of them as `maps`: maps without any positive value.
        They are all zeros, say nothing about the image and should be counted apart.
    """

    maps: Tensor | dict[str, Tensor]
    logits: Tensor
    targets: Tensor | None
    all_zero: Tensor | dict[str, Tensor]


def cam(
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    layers: Layer | Sequence[Layer] | None = None,
    method: str = "grad-cam",
    *,
    size: str = "input",
    normalise: bool = True,
) -> CamResult:
    """Class activation maps of a batch of images.

    Args:
        model: any torch network that puts convolutional activations, N x C x h x w, on the way
            from images to logits N x K. Compiled and DataParallel-like wrappers are looked through.
        images: N x 3 x H x W or 3 x H x W (taken as N = 1), floating point, normalised as in
            training. They are moved to the model's device and dtype.
        target: None for the predicted class; a class for all images; a list or integer tensor with
            a class for each; "all" for every class; or a function from the model's output to one
            score a row, for example `lambda z: z[:, 3] - z[:, 5]` (rows may come in parts).
        layers: name or module, or a list of them (one pass for all); None for `default_layer`.
            Activations must be channels first, which cannot be told from their shape.
        method: a key of `METHODS`.
        size: "input" enlarges the maps to H x W (bilinear); "layer" leaves them h x w.
        normalise: divide each map by its maximum, so that 0 still means no evidence; False leaves
            the values that the method gives.

    Raises:
        ValueError: unknown method, layer or size; a layer without spatial extent, of another model
            or without influence on the score; classes out of range or too few; NaN or infinite
            images, logits or maps; logits of another shape; images that the model fails on.
        TypeError: a model that is no network, images that are no floating-point tensor, or classes
            that are no integers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch network; got {type(model).__name__}.")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if not isinstance(size, str) or size not in ("input", "layer"):
        raise ValueError(f"size must be 'input' or 'layer', not {size!r}.")
    model = _unwrap(model)
    names = _layer_names(model, layers)
    images = _check_images(model, images)
    at_once = images_at_once(images.device, *images.shape[-2:], IMAGES_AT_ONCE)
    if len(images) > at_once:
        targets = _split_target(target, len(images), at_once)
        parts = zip(images.split(at_once), targets, strict=False)
        options = {"size": size, "normalise": normalise}
        results = [cam(model, x, t, layers, method, **options) for x, t in parts]
        return _join(results, all_classes=isinstance(target, str))
    rule, uses = METHODS[method].rule, METHODS[method].uses

    with undisturbed(model) as model:
        output, kept, calls = _forward(model, names, images, record=uses == "gradients")
        targets, score = _resolve_target(target, output)
        with torch.enable_grad():
            scores = score(output, torch.arange(len(images), device=output.device))
        if uses == "gradients":
            found = _from_gradients(rule, kept, scores)
        elif uses == "activations":
            found = {name: rule(_wide(kept[name]))[:, None] for name in names}
            found = {name: maps.expand(-1, scores.shape[1], -1, -1) for name, maps in found.items()}
        else:
            found = {}
            for name in names:
                probe = _make_probe(model, name, calls[name], images, scores, score)
                weights = rule(_wide(kept[name]), probe)
                with torch.autocast(images.device.type, enabled=False):
                    found[name] = torch.einsum("nct,nchw->nthw", weights, _wide(kept[name]))

    maps, all_zero = {}, {}
    for name in names:
        here = found[name] if isinstance(target, str) else found[name][:, 0]
        if not torch.isfinite(here.sum()):  # NaN and infinity both end up in the sum
            raise ValueError(
                f"the maps at {name!r} hold NaN or infinite values: activations or gradients "
                "overflowed. Use float32 (or bfloat16 instead of float16)."
            )
        here = here.relu()
        all_zero[name] = here.amax((-2, -1)) == 0
        if size == "input":
            here = _resize(here, images.shape[-2:])
        if normalise:
            peak = here.amax((-2, -1), keepdim=True)
            here = here / torch.where(peak > 0, peak, 1)
        maps[name] = here
    several = isinstance(layers, Sequence) and not isinstance(layers, str)
    return CamResult(
        maps=maps if several else maps[names[0]],
        logits=output.detach(),
        targets=targets,
        all_zero=all_zero if several else all_zero[names[0]],
    )


def _split_target(target: Target, count: int, at_once: int) -> Iterable[Target]:
    """The target of each part, of `at_once` images, of a batch of `count`."""
    if target is None or callable(target) or isinstance(target, str):
        return itertools.repeat(target)
    classes = _as_classes(target)
    if classes.ndim == 0:
        return itertools.repeat(target)
    _check_target_count(classes, count)
    return classes.split(at_once)


def _join(parts: list[CamResult], all_classes: bool) -> CamResult:
    def join(tensors: list) -> Tensor | dict[str, Tensor]:
        if isinstance(tensors[0], dict):
            return {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
        return torch.cat(tensors)

    targets = parts[0].targets
    if targets is not None and not all_classes:
        targets = torch.cat([part.targets for part in parts])
    return CamResult(
        maps=join([part.maps for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        targets=targets,
        all_zero=join([part.all_zero for part in parts]),
    )


def default_layer(model: nn.Module) -> str:
    """Name of the last stage of a ResNet-like model: its `layer4`, or the highest `layerN`.

    Raises:
        ValueError: no such stage, or several; the message lists the layers to choose from.
    """
    stages = [
        (name.count("."), -int(match[1]), name)
        for name, _ in _unwrap(model).named_modules()
        if (match := re.search(r"(?:^|\.)layer(\d+)$", name))
    ]
    stages.sort()
    if not stages or (len(stages) > 1 and stages[0][:2] == stages[1][:2]):
        raise ValueError(
            "this model has no single last stage named layer1, layer2, ...: pass the target layer. "
            f"{_candidates(_unwrap(model))}"
        )
    return stages[0][2]


def guided_grad_cam(
    model: nn.Module, images: Tensor, target: Target = None, layer: Layer | None = None
) -> Tensor:
    """Guided backpropagation times Grad-CAM (Selvaraju et al., ICCV 2017, section 3.3).

    For comparison only: guided backpropagation hardly changes when the network's weights are
    randomised (Adebayo et al., NeurIPS 2018), so it shows edges of the image more than what the
    network uses; a warning says so. Gradients pass each ReLU (module or function) only where they
    are positive (Springenberg et al., 2015). Arguments and errors as in `cam`, but one layer and
    one target an image. Returns signed maps, N x 3 x H x W.
    """
    warnings.warn(
        "Guided Grad-CAM fails sanity checks (Adebayo et al., 2018): it hardly depends on the "
        "network's weights. Show it for comparison, not as an explanation.",
        stacklevel=2,
    )
    if (isinstance(target, str) and target == "all") or isinstance(layer, (list, tuple)):
        raise ValueError("guided_grad_cam takes one target an image and one layer.")
    maps = cam(model, images, target, layer, normalise=False).maps
    model = _unwrap(model)
    images = _check_images(model, images)
    with undisturbed(model) as model, _GuidedReLU(), torch.enable_grad():
        leaf = images.clone().requires_grad_()
        output = model(leaf)
        _, score = _resolve_target(target, output)
        scores = score(output, torch.arange(len(images), device=output.device))
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    return _wide(gradient) * maps[:, None]


# --------------------------------------------------------------------------- the passes
@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode, frozen and uncompiled; everything put back on leaving.

    Frozen parameters keep the trunk, up to the target layer, from being recorded, and their casts
    out of autocast's cache. Flags are set one by one because `model.eval()` may be overridden and
    `model.train()` would lose the mode of single submodules. Networks made under inference_mode
    can't be differentiated: a copy can.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        modules, tensors = _parts(model)
        if any(map(Tensor.is_inference, tensors)):
            model = copy.deepcopy(model)
            modules, tensors = _parts(model)
        if any(m._compiled_call_impl or "_orig_mod" in m._modules for m in modules):
            # Hooks don't fire inside compiled code.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        training = [module for module in modules if module.training]
        trainable = [tensor for tensor in tensors if tensor.requires_grad and tensor.is_leaf]
        try:
            for module in training:
                module.training = False
            for tensor in trainable:
                tensor.requires_grad_(False)
            yield model
        finally:
            for module in training:
                module.training = True
            for tensor in trainable:
                tensor.requires_grad_(True)


def _parts(model: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """All modules, and all parameters and buffers; several times faster than the iterators."""
    modules, tensors = [model], []
    for module in modules:  # grows as it is walked
        if module._modules:
            modules += [child for child in module._modules.values() if child is not None]
        for own in (module._parameters, module._buffers):
            if own:
                tensors += [tensor for tensor in own.values() if tensor is not None]
    return modules, tensors


@contextlib.contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Callable]) -> Iterator[None]:
    handles = []
    try:
        for name, hook in hooks.items():
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(
    model: nn.Module, names: list[str], images: Tensor, record: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
    """Output, activations of the named layers, and how often each ran.

    With `record`, the graph starts at the first of these layers: its output becomes a leaf.
    """
    kept: dict[str, Tensor] = {}
    calls = dict.fromkeys(names, 0)

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
            _check_activations(name, output, len(images))
            calls[name] += 1
            torch.set_grad_enabled(record)
            # Both copies matter: later operations in place would otherwise change the kept
            # activations, or move the gradient to the point after them.
            kept[name] = output.clone().requires_grad_() if record else output.detach().clone()
            return kept[name].clone() if record else None

        return hook

    hooks = {name: keep(name) for name in names}
    with torch.set_grad_enabled(record), _hooked(model, hooks):
        try:
            output = model(_in_fast_order(images))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if "view size is not compatible" not in str(error):
                raise ValueError(
                    f"the model fails on images of shape {tuple(images.shape)}: {error}"
                ) from error
            # A network that flattens with view can't take channels_last.
            calls.update(dict.fromkeys(names, 0))
            output = model(images)
    if missing := [name for name in names if not calls[name]]:
        raise ValueError(
            f"the forward pass never ran {', '.join(map(repr, missing))}, so there is nothing to "
            f"explain there. {_candidates(model)}"
        )
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model returned a {type(output).__name__}; expected a tensor of logits N x K. "
            "Wrap it in a module that returns them."
        )
    if not torch.isfinite(output).all():
        raise ValueError("the model returned NaN or infinite logits; check its weights and input.")
    return output, kept, calls


def _in_fast_order(images: Tensor) -> Tensor:
    """The same images in the memory order in which the network runs fastest."""
    pixels = len(images) * images.shape[-2] * images.shape[-1]
    if images.device.type == "cpu" and pixels >= PIXELS_FOR_CHANNELS_LAST:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def _from_gradients(rule: Callable, kept: dict[str, Tensor], scores: Tensor) -> dict[str, Tensor]:
    """Maps N x T x h x w for each layer, by one backward pass through the tail for each score."""
    if not scores.requires_grad:
        raise ValueError(
            f"the score does not depend on {', '.join(map(repr, kept))} through differentiable "
            "operations (a later no_grad, detach or argmax?). Choose a layer closer to the output."
        )
    layers, activations = list(kept), [_wide(tensor) for tensor in kept.values()]
    maps: dict[str, list[Tensor]] = {name: [] for name in layers}
    with torch.enable_grad():
        # Images don't mix in evaluation mode, so one sum has the gradients of all of them.
        totals = scores.sum(0).unbind()
    for total in totals:
        gradients = torch.autograd.grad(
            total, list(kept.values()), retain_graph=total is not totals[-1], allow_unused=True
        )
        with torch.autocast(scores.device.type, enabled=False), torch.no_grad():
            for name, activation, gradient in zip(layers, activations, gradients, strict=True):
                if gradient is None:
                    raise ValueError(
                        f"layer {name!r} does not influence the score; choose another."
                    )
                maps[name].append(rule(activation, _wide(gradient)))
    return {name: torch.stack(found, 1) for name, found in maps.items()}


def _make_probe(
    model: nn.Module, name: str, calls: int, images: Tensor, scores: Tensor, score: Callable
) -> Probe:
    def read(output: Tensor, index: int) -> Tensor:
        return score(output, torch.full((len(output),), index, device=output.device))

    def masked(index: int, masks: Tensor) -> Tensor:
        at_once = images_at_once(images.device, *images.shape[-2:], CHANNELS_AT_ONCE)
        parts = masks[:, None].to(images.dtype).split(at_once)
        return torch.cat([_wide(read(model(images[index] * part), index)) for part in parts])

    def replaced(index: int, outputs: Tensor) -> Tensor:
        seen = 0

        def swap(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
            nonlocal seen
            seen += 1
            return outputs.to(output.dtype) if seen == calls else output

        # One image through the trunk and many activations through the tail is all the work there
        # is. Networks that join both by more than broadcasting need as many images.
        with _hooked(model, {name: swap}):
            try:
                output = model(images[index : index + 1])
            except RuntimeError:
                output = None
            if output is None or len(output) != len(outputs):
                seen = 0
                output = model(images[index : index + 1].expand(len(outputs), -1, -1, -1))
        return _wide(read(output, index))

    return Probe(_wide(scores), tuple(images.shape[-2:]), masked, replaced)


class _GuidedReLU(TorchFunctionMode):
    """Lets only positive gradients through every ReLU, module or function, in place or not."""

    rectifiers = {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
    rectifiers |= {F.hardtanh, F.hardtanh_}  # nn.ReLU6

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in self.rectifiers and output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp(min=0))
        return output


# --------------------------------------------------------------------------- checks
def _unwrap(model: nn.Module) -> nn.Module:
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _layer_names(model: nn.Module, layers: Layer | Sequence[Layer] | None) -> list[str]:
    if layers is None:
        return [default_layer(model)]
    if isinstance(layers, (str, nn.Module)):
        layers = [layers]
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(
            f"layers is {layers!r}; pass a name, a module, or a list of at least one, or None for "
            "the default."
        )
    names = []
    for layer in layers:
        name: str | None
        if isinstance(layer, str):
            name = layer
            try:
                model.get_submodule(layer)
            except AttributeError:
                name = None
        else:
            modules = model.named_modules(remove_duplicate=False)
            name = next((name for name, module in modules if module is layer), None)
        if name is None:
            given = isinstance(layer, nn.Module)
            shown = f"the {type(layer).__name__} given" if given else repr(layer)
            raise ValueError(f"{shown} is no layer of this model. {_candidates(model)}")
        names.append(name)
    return names


def _candidates(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    stages = list(dict.fromkeys(name.split(".")[0] for name in names if "." in name))
    listed = stages + names[-10:]
    return f"Candidates: {', '.join(listed)}." if listed else "It has no 2-D convolution."


def _check_images(model: nn.Module, images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images must be a floating-point tensor, normalised as in training; got {found}."
        )
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or not images.numel():
        raise ValueError(
            f"images must be N x C x H x W or C x H x W, not empty; got {tuple(images.shape)}."
        )
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values; find out where they come from.")
    with torch.inference_mode(False):
        reference = next((p for p in model.parameters() if p.is_floating_point()), images)
        images = images.detach().to(reference.device, reference.dtype)
        return images.clone() if images.is_inference() else images


def _check_activations(name: str, output: object, count: int) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(f"layer {name!r} puts out a {type(output).__name__}, not one tensor.")
    shape = tuple(output.shape)
    if output.ndim != 4 or shape[0] != count:
        raise ValueError(
            f"layer {name!r} puts out shape {shape}; expected {count} x C x h x w, one for each "
            "image. Choose a convolutional layer or stage."
        )
    if shape[2] * shape[3] == 1:
        raise ValueError(
            f"layer {name!r} has no spatial extent (1 x 1 positions) at this image size, so it "
            "says nothing about where. Choose an earlier layer or larger images."
        )


def _resolve_target(
    target: Target, output: Tensor
) -> tuple[Tensor | None, Callable[[Tensor, Tensor], Tensor]]:
    """Explained classes, and a function (output M x K, image index of each row M) -> scores M x T.

    The index is needed where rows are variants of one image (Score-CAM, Ablation-CAM).
    """
    if callable(target):

        def from_callable(rows: Tensor, _index: Tensor) -> Tensor:
            scores = target(rows)
            if not isinstance(scores, Tensor) or scores.shape != (len(rows),):
                found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ValueError(
                    f"the target function must return one score a row, ({len(rows)},); got {found}."
                )
            return scores[:, None]

        return None, from_callable

    if output.ndim != 2:
        raise ValueError(
            f"the model returned shape {tuple(output.shape)}; expected logits N x K. For other "
            "outputs pass a target function that returns one score an image."
        )
    count, classes = output.shape
    if isinstance(target, str):
        if target != "all":
            raise ValueError(f"target must be None, classes, 'all' or a function, not {target!r}.")
        return torch.arange(classes, device=output.device), lambda rows, _index: rows
    if target is None:
        chosen = output.detach().argmax(1)
    else:
        chosen = _as_classes(target).to(output.device)
        chosen = chosen.long().expand(count) if chosen.ndim == 0 else chosen.long()
        _check_target_count(chosen, count)
        if chosen.min() < 0 or chosen.max() >= classes:
            raise ValueError(
                f"targets must be classes 0 to {classes - 1}; got {chosen.min()} to {chosen.max()}."
            )
    return chosen, lambda rows, index: rows.gather(1, chosen[index, None])


def _as_classes(target: object) -> Tensor:
    try:
        classes = torch.as_tensor(target)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"target is {target!r}; expected None, a class, a class for each image, 'all' or a "
            "function."
        ) from error
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"classes must be integers; got {classes.dtype}.")
    return classes


def _check_target_count(classes: Tensor, count: int) -> None:
    if classes.shape != (count,):
        raise ValueError(
            f"got targets of shape {tuple(classes.shape)} for {count} images; pass one class for "
            "all or one for each."
        )


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, without a graph."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """N x H x W or N x K x H x W maps at another size, by half-pixel bilinear interpolation."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    stacked = maps[:, None] if maps.ndim == 3 else maps
    resized = F.interpolate(stacked, size=tuple(size), mode="bilinear", align_corners=False)
    return resized[:, 0] if maps.ndim == 3 else resized


# --------------------------------------------------------------------------- pictures
# Dark blue to yellow with steadily rising lightness: legible without colour vision and in grey.
COLORMAP = cv2.COLORMAP_VIRIDIS


def colourise(heat: Tensor | np.ndarray, colormap: int = COLORMAP) -> np.ndarray:
    """A map H x W with values in [0, 1] as a uint8 RGB image, H x W x 3.

    `colormap` is one of OpenCV's constants. Raises ValueError for other shapes and values.
    """
    levels = np.rint(_as_heat(heat) * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, colormap), cv2.COLOR_BGR2RGB)


def overlay(
    image: Tensor | np.ndarray,
    heat: Tensor | np.ndarray,
    alpha: float = 0.5,
    colormap: int = COLORMAP,
) -> np.ndarray:
    """The coloured map over the image, uint8 RGB H x W x 3; `alpha` is the share of the map.

    The image is H x W x 3 or 3 x H x W, uint8 or floating point in [0, 1]; the map has values in
    [0, 1] and is enlarged to the image. Raises ValueError or TypeError otherwise.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 (image) and 1 (map); got {alpha}.")
    picture = _as_rgb(image)
    colours = colourise(_as_heat(heat, picture.shape[:2]), colormap)
    return cv2.addWeighted(colours, alpha, picture, 1 - alpha, 0)


def contour(
    image: Tensor | np.ndarray, heat: Tensor | np.ndarray, level: float = 0.5
) -> np.ndarray:
    """The image with the border of the region where the map is at least `level`, uint8 RGB.

    White on black, one and three pixels wide: enlarge small images first. Arguments as `overlay`.
    """
    picture = _as_rgb(image).copy()
    region = (_as_heat(heat, picture.shape[:2]) >= level).astype(np.uint8)
    borders = cv2.findContours(region, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
    for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.drawContours(picture, borders, -1, colour, width)
    return picture


def colourbar(
    height: int = 256, label: str = "share of the map's maximum", colormap: int = COLORMAP
) -> np.ndarray:
    """The colour scale with 0, 0.5 and 1 and, upright beside it, what is shown; uint8 RGB."""
    if height < 64:
        raise ValueError(f"a legible colourbar needs a height of at least 64 pixels; got {height}.")
    margin, font = 10, cv2.FONT_HERSHEY_SIMPLEX
    ramp = np.linspace(1, 0, height - 2 * margin)[:, None].repeat(16, axis=1)
    strip = np.full((height, 86, 3), 255, np.uint8)
    strip[margin:-margin, 8:24] = colourise(ramp, colormap)
    for value in (0.0, 0.5, 1.0):
        y = round(margin + (1 - value) * (height - 2 * margin - 1))
        cv2.line(strip, (24, y), (28, y), (0, 0, 0), 1)
        cv2.putText(strip, f"{value:g}", (31, y + 4), font, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    scale = min(0.45, 0.45 * (height - 4) / cv2.getTextSize(label, font, 0.45, 1)[0][0])
    width = cv2.getTextSize(label, font, scale, 1)[0][0]
    text = np.full((22, height, 3), 255, np.uint8)
    cv2.putText(text, label, ((height - width) // 2, 15), font, scale, (0, 0, 0), 1, cv2.LINE_AA)
    strip[:, 62:84] = cv2.rotate(text, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return strip


def side_by_side(
    image: Tensor | np.ndarray,
    heat: Tensor | np.ndarray,
    alpha: float = 0.5,
    height: int = 256,
) -> np.ndarray:
    """Image, map, overlay, contour at 0.5 and colourbar in a row, `height` pixels high, uint8 RGB.

    The image is enlarged without smoothing, the map smoothly. Arguments as `overlay`.
    """
    picture = _as_rgb(image)
    width = round(height * picture.shape[1] / picture.shape[0])
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST)
    heat = _as_heat(heat, (height, width))
    panels = [picture, colourise(heat), overlay(picture, heat, alpha), contour(picture, heat)]
    panels.append(colourbar(height))
    gap = np.full((height, 6, 3), 255, np.uint8)
    return np.hstack([part for panel in panels for part in (panel, gap)][:-1])


def _as_array(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _as_rgb(image: Tensor | np.ndarray) -> np.ndarray:
    array = _as_array(image)
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"an image must be H x W x 3 or 3 x H x W; got shape {array.shape}.")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= -1e-6 and array.max() <= 1 + 1e-6):  # also catches NaN
            raise ValueError(
                f"a floating-point image must lie in [0, 1]; got {array.min():.3g} to "
                f"{array.max():.3g}. Undo the normalisation, or pass uint8."
            )
        array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"an image must be uint8 or floating point; got {array.dtype}.")
    return np.ascontiguousarray(array)


def _as_heat(heat: Tensor | np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    array = _as_array(heat)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"a map must be H x W; got shape {array.shape}. Pass one map at a time.")
    array = array.astype(np.float32)
    if not (array.min() >= -1e-6 and array.max() <= 1 + 1e-6):
        raise ValueError(
            f"a map must lie in [0, 1]; got {array.min():.3g} to {array.max():.3g}. "
            "Use normalise=True."
        )
    if size is not None and array.shape != tuple(size):
        array = cv2.resize(array, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return array.clip(0, 1)
