"""Are a device's fast kernels right? Each layer's are compared with float32 before a training.

Silently wrong kernels exist: oneDNN's bfloat16 gradient of a strided convolution on maps of a
single pixel leaves memory unwritten, and that of its strided 1x1 convolution of few channels is
wrong (oneDNN issue 6035).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Relative error of a layer's output or gradient from which on a kernel counts as wrong. Over 2,500
# layers (six networks, both stems, widths 0.125 to 1, 16 to 64 pixels) honest errors of bfloat16
# were 0.003 in the median and 0.010 at most, on processors with AVX512-BF16 and with AMX; unwritten
# memory gave NaN or more than 1e20.
LARGEST_ERROR = 0.05
_checked: dict[tuple, str | None] = {}


def faulty_layer(
    model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> str | None:
    """Return the first layer whose output or gradients in `dtype` aren't those in float32, or None.

    `images` are a batch as in training, `loss` turns their logits into a number. In whole networks
    rounding grows from layer to layer, so one pass in float32 gives every convolution and linear
    layer its input and output gradient, and from these both formats compute the layer's output and
    gradients. The model stays as it is; a structure is checked once.
    """
    key = (str(model), images.shape, images.device, dtype)
    if key in _checked:
        return _checked[key]
    network = copy.deepcopy(model)
    seen = {}

    def keep(name: str, _layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen[name] = (inputs[0].detach(), output)

    hooks = [
        layer.register_forward_hook(functools.partial(keep, name))
        for name, layer in network.requires_grad_().named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):  # of dropout
        loss(network(images)).backward()
    for hook in hooks:
        hook.remove()
    for name, (inputs, output) in seen.items():
        largest = output.grad.abs().max().clamp(min=1e-38)  # where no gradient arrives it is 0
        layer, gradient = network.get_submodule(name), output.grad / largest
        both = (_values(layer, inputs, gradient, kind) for kind in (dtype, torch.float32))
        for fast, exact in zip(*both, strict=True):
            if not (fast.float() - exact).norm() <= LARGEST_ERROR * exact.norm():  # NaN is wrong
                return _checked.setdefault(key, name)
    return _checked.setdefault(key, None)


def _values(
    layer: nn.Module, inputs: Tensor, gradient: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return a layer's output and the gradients of its input and weight, computed in `dtype`."""
    inputs = inputs.clone().requires_grad_()
    # What a kernel leaves unwritten shows if the memory that it gets held NaN before.
    freed = [torch.full_like(layer.weight, torch.nan, dtype=dtype) for _ in range(8)]
    del freed
    with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        output = layer(inputs)
    wanted = [inputs, layer.weight]
    return output.detach(), *torch.autograd.grad(output, wanted, gradient.to(output.dtype))
