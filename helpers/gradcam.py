"""Class activation maps: where in an image a convolutional network finds its evidence.

Grad-CAM (Selvaraju et al., ICCV 2017) takes four steps:

1. run the network and keep the activations A (C x h x w) of one convolutional layer;
2. differentiate the class score S, a logit, with respect to A: the gradients G;
3. average G over the positions, which gives one weight a channel: w_c = mean_ij G_cij;
4. add the channels up with these weights and keep what speaks for the class:
   map = ReLU(sum_c w_c A_c).

The other methods change steps 3 and 4 only. Each is a rule of a few lines in `METHODS`; to add one,
write a function and an entry, `METHODS["my-cam"] = Method(my_rule)`.

The cost is about one forward pass: a hook makes the layer's output a leaf of the autograd graph, so
that only the operations after it are recorded. The network is left as it was found.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.config import images_at_once

Target = int | Sequence[int] | Tensor | str | Callable[[Tensor], Tensor] | None
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
    - "scores": `rule(A, probe)`, see `Probe`, returns a weight for each channel and each of the T
      explained scores, N x C x T; the map is the sum of the channels under these weights.
    """

    rule: Callable[..., Tensor]
    uses: str = "gradients"


@dataclass(frozen=True)
class Probe:
    """Asks the network for scores of its images (N x 3 x H x W) when parts of them are hidden."""

    model: nn.Module
    images: Tensor
    target: Target

    def masked(self, index: int, masks: Tensor) -> Tensor:
        """Scores M x T of one image multiplied by each of M masks (M x H x W)."""
        image = self.images[index]
        target = self.target[index] if isinstance(self.target, Tensor) else self.target
        at_once = images_at_once(image.device, *image.shape[1:], CHANNELS_AT_ONCE)
        seen = (image * part for part in masks[:, None].to(image).split(at_once))
        return torch.cat([_wide(_scores(target, self.model(part))) for part in seen])


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


def score_cam(activations: Tensor, probe: Probe) -> Tensor:
    """Softmax over channels of the score of the image seen through each channel.

    Each channel is enlarged to the image and scaled to [0, 1], the image is multiplied by it, and
    the score is read (Wang et al., CVPR workshops 2020, algorithm 1; the baseline's score cancels
    in the softmax). C forward passes an image. Returns weights N x C x T.
    """
    weights = []
    for index, channels in enumerate(activations):
        scores = []
        for chunk in channels.split(CHANNELS_AT_ONCE):
            masks = F.interpolate(chunk[:, None], probe.images.shape[2:], mode="bilinear")[:, 0]
            low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
            masks = torch.where(high > low, (masks - low) / (high - low), 0)
            scores.append(probe.masked(index, masks))
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
    """Maps and what they explain; maps and all_zero are dicts by layer if `layers` was a list.

    A map without any positive value is all zeros: it says nothing and should be counted apart.
    """

    maps: Tensor | dict[str, Tensor]  # N x H x W, at least float32; N x K x H x W for "all"
    logits: Tensor  # the model's output, N x K
    targets: Tensor | None  # the class explained, int64 (N,); None for "all" and functions
    all_zero: Tensor | dict[str, Tensor]  # bool (N,), (N, K) for "all"


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
    """Class activation maps of a batch of images, in evaluation mode.

    model: any network that puts convolutional activations, N x C x h x w, on the way from images
        to logits N x K. Compiled and DataParallel-like wrappers are looked through.
    images: N x 3 x H x W or 3 x H x W, floating point, normalised as in training.
    target: None for the predicted class; a class for all images; a list or tensor with a class for
        each; "all" for every class; or a function from the model's output to one score a row, for
        example `lambda z: z[:, 3] - z[:, 5]` (rows may come in parts).
    layers: a layer's name or the module, or a list of them (one pass for all); None for
        `default_layer`. Of a layer that runs several times, the last call is explained.
    method: a key of `METHODS`.
    size: "input" enlarges the maps to H x W (bilinear); "layer" leaves them h x w.
    normalise: divide each map by its maximum; False leaves the values that the method gives.

    Raises ValueError for anything else, and for NaN or infinity in images, logits or maps.
    """
    if method not in list(METHODS):
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if size not in ["input", "layer"]:
        raise ValueError(f"size must be 'input' or 'layer', not {size!r}.")
    model, several = _unwrap(model), isinstance(layers, (list, tuple))
    names = [_layer_name(model, layer) for layer in (layers or [[]] if several else [layers])]
    with undisturbed(model) as model:
        images, target = _checked(model, images, target)
        at_once = images_at_once(images.device, *images.shape[2:], IMAGES_AT_ONCE)
        targets = target.split(at_once) if isinstance(target, Tensor) else [target] * len(images)
        explain = functools.partial(_explain, model, names, METHODS[method], size, normalise)
        parts = zip(*map(explain, images.split(at_once), targets), strict=True)
        logits, targets, *rest = (None if x[0] is None else torch.cat(x) for x in parts)
    by_layer = (dict(zip(names, rest[i::2], strict=True)) for i in (0, 1))
    maps, all_zero = by_layer if several else rest
    return CamResult(maps, logits, targets, all_zero)


def default_layer(model: nn.Module) -> str:
    """Name of the last stage of a ResNet-like model: its `layer4`, or the highest `layerN`.

    Raises ValueError, which lists the layers to choose from, for no such stage or several.
    """
    stages = sorted(
        (name.count("."), -int(match[1]), name)
        for name, _ in _unwrap(model).named_modules()
        if (match := re.search(r"(?:^|\.)layer(\d+)$", name))
    )
    if not stages or (len(stages) > 1 and stages[0][:2] == stages[1][:2]):
        raise ValueError(f"no single last stage layerN: pass the target layer. {_listed(model)}")
    return stages[0][2]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode, frozen and uncompiled; everything put back on leaving.

    Frozen parameters keep the trunk, up to the target layer, from being recorded, and their casts
    out of autocast's cache. Flags are set one by one: `model.eval()` may be overridden, and
    `model.train()` would lose the mode of single submodules. Networks made under inference_mode
    can't be differentiated: a copy can.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        modules = list(model.modules())
        own = (tensors for m in modules for tensors in (m._parameters, m._buffers))
        tensors = [tensor for group in own for tensor in group.values() if tensor is not None]
        if any(map(Tensor.is_inference, tensors)):
            yield stack.enter_context(undisturbed(copy.deepcopy(model)))
            return
        if any(m._compiled_call_impl or "_orig_mod" in m._modules for m in modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled, no hook fires
        flags = [(module, "training") for module in modules if module.training]
        flags += [(x, "requires_grad") for x in tensors if x.requires_grad and x.is_leaf]
        for owner, flag in flags:
            stack.callback(setattr, owner, flag, True)
            setattr(owner, flag, False)
        yield model


def _explain(model, names, method, size, normalise, images, target):
    """Logits, classes, and maps and all_zero of each layer, of images explained at once."""
    logits, kept = _forward(model, names, images, record=method.uses == "gradients")
    target = logits.detach().argmax(-1) if target is None else target
    with torch.enable_grad():
        scores = _scores(target, logits)
    activations = {name: _wide(tensor) for name, tensor in kept.items()}
    if method.uses == "gradients":
        maps = _from_gradients(method.rule, kept, activations, scores)
    elif method.uses == "activations":
        maps = {name: [method.rule(a)] * scores.shape[1] for name, a in activations.items()}
    else:
        probe = Probe(model, images, target)
        weights = {name: method.rule(a, probe) for name, a in activations.items()}
        with torch.autocast(images.device.type, enabled=False):
            mix = functools.partial(torch.einsum, "nct,nchw->nthw")
            maps = {name: mix(weights[name], a).unbind(1) for name, a in activations.items()}
    found = [logits.detach(), target if isinstance(target, Tensor) else None]
    for name in names:
        here = torch.stack(tuple(maps[name]), 1)
        _check_finite(f"maps at {name!r}", here)
        here = here.relu()
        zero = here.amax((2, 3)) == 0
        if size == "input":
            here = F.interpolate(here, images.shape[2:], mode="bilinear")
        if normalise:
            peak = here.amax((2, 3), keepdim=True)
            here = here / torch.where(peak > 0, peak, 1)
        found += [here, zero] if isinstance(target, str) else [here[:, 0], zero[:, 0]]
    return found


def _forward(model, names, images, record):
    """Logits, and activations by layer; with `record`, these are leaves where the graph starts."""
    kept = {}

    def keep(name, _module, _inputs, output):
        fits = isinstance(output, Tensor) and output.ndim == 4 and len(output) == len(images)
        if not fits or output[0, 0].numel() == 1:
            expected = f"{len(images)} x C x h x w above 1 x 1: take an earlier convolutional layer"
            raise ValueError(f"layer {name!r} puts out {_shown(output)}; expected {expected}.")
        torch.set_grad_enabled(record)
        # Both copies matter: later operations in place would otherwise change the kept
        # activations, or move the gradient to the point after them.
        kept[name] = output.clone().requires_grad_() if record else output.detach().clone()
        return kept[name].clone() if record else None

    fast = images.device.type == "cpu" and images[:, 0].numel() >= PIXELS_FOR_CHANNELS_LAST
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(record))
        for name in names:
            hook = functools.partial(keep, name)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        try:
            logits = model(images.contiguous(memory_format=torch.channels_last) if fast else images)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if "view size is not compatible" not in str(error):
                raise ValueError(f"the model fails on {_shown(images)}: {error}") from error
            logits = model(images)  # a network that flattens with view can't take channels_last
    if missing := set(names) - set(kept):
        raise ValueError(f"the forward pass never ran {sorted(missing)}. {_listed(model)}")
    _check_finite("logits", logits)
    return logits, kept


def _from_gradients(rule, leaves, activations, scores):
    """N x h x w maps of each score (N x T) by layer, each by a backward pass through the tail."""
    maps = {name: [] for name in leaves}
    with torch.enable_grad():
        # Images don't mix in evaluation mode, so one sum has the gradients of all of them.
        totals = scores.sum(0).unbind()
    for total in totals:
        found, more = [None] * len(leaves), total is not totals[-1]
        if total.requires_grad:
            found = torch.autograd.grad(total, [*leaves.values()], None, more, allow_unused=True)
        for (name, a), gradient in zip(activations.items(), found, strict=True):
            if gradient is None:
                cause = "it isn't used, or cut off by a later no_grad, detach or argmax"
                raise ValueError(f"the score doesn't depend on {name!r} ({cause}): choose another.")
            with torch.autocast(scores.device.type, enabled=False):
                maps[name].append(rule(a, _wide(gradient)))
    return maps


def _scores(target, logits):
    """Scores M x T of logits M x K (of any output for a function): T = K for "all", else 1."""
    if callable(target):
        scores = target(logits)
        if not isinstance(scores, Tensor) or scores.shape != logits.shape[:1]:
            raise ValueError(f"the target function returned {_shown(scores)}, not one score a row.")
        return scores[:, None]
    if logits.ndim != 2:
        raise ValueError(f"logits must be N x K (or pass a target function); got {_shown(logits)}.")
    if isinstance(target, str):
        return logits
    if target.min() < 0 or target.max() >= logits.shape[1]:
        raise ValueError(f"targets must be classes 0 to {logits.shape[1] - 1}; got {target}.")
    return logits.gather(1, target.to(logits.device).expand(len(logits))[:, None])


def _wide(tensor):
    """At least float32, without a graph."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _unwrap(model):
    """The network in DataParallel-like and compiled wrappers."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch network; got {_shown(model)}.")
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = model.module if parallel else model._modules.get("_orig_mod")
    return model if inner is None else _unwrap(inner)


def _layer_name(model, layer):
    if layer is None:
        return default_layer(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if layer is module or layer == name:
            return name
    shown = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
    raise ValueError(f"{shown} is no layer of this model. {_listed(model)}")


def _listed(model):
    names = [name for name, m in _unwrap(model).named_modules() if isinstance(m, nn.Conv2d)]
    stages = dict.fromkeys(name.split(".")[0] for name in names if "." in name)
    return f"Candidates: {', '.join([*stages, *names[-10:]]) or 'none, no 2-D convolution'}."


def _checked(model, images, target):
    """Images N x C x H x W where the model is, and classes as int64 (N,)."""
    floating = isinstance(images, Tensor) and images.is_floating_point()
    if not floating or images.ndim not in (3, 4) or not images.numel():
        expected = "floating point, N x C x H x W, normalised as in training"
        raise ValueError(f"images must be {expected}; got {_shown(images)}.")
    _check_finite("images", images)
    images = images[None] if images.ndim == 3 else images
    reference = next((p for p in model.parameters() if p.is_floating_point()), images)
    images = images.detach().to(reference.device, reference.dtype)
    images = images.clone() if images.is_inference() else images
    if target is None or callable(target) or (isinstance(target, str) and target == "all"):
        return images, target
    with contextlib.suppress(ValueError, TypeError, RuntimeError, OverflowError):
        classes = torch.as_tensor(target)
        integers = classes.dtype != torch.bool and not classes.is_floating_point()
        if integers and not classes.is_complex() and classes.shape in ((), (len(images),)):
            return images, classes.long().expand(len(images))
    expected = f"None, a class or one for each of {len(images)} images, 'all' or a function"
    raise ValueError(f"target is {target!r}; expected {expected}.")


def _check_finite(what, values):
    if not isinstance(values, Tensor) or not torch.isfinite(values).all():
        found = "NaN or infinity" if isinstance(values, Tensor) else _shown(values)
        raise ValueError(f"{what} must be a tensor of finite numbers; got {found}.")


def _shown(value):
    tensor = isinstance(value, Tensor)
    return f"{value.dtype} {tuple(value.shape)}" if tensor else f"a {type(value).__name__}"
