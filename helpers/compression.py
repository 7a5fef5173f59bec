"""What makes a trained network smaller: pruned weights, pruned channels, 8-bit integers.

Pruning takes away what counts least: `prune_weights` sets single weights to zero, `prune_channels`
removes whole channels, so that the network really shrinks. `quantize` computes in 8-bit integers
instead of 32-bit floating point. `stored_bytes` says what a file of the network takes.
"""

from __future__ import annotations

import copy
import gzip
import warnings

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn.utils import prune

# --- Pruning -----------------------------------------------------------------------------------

PRUNED = ("weights", "channels")


def prune_network(model: nn.Module, kind: str, share: float, image_size: int) -> None:
    """Prune a network in place: `kind` is one of PRUNED; see `prune_weights`, `prune_channels`."""
    if kind == "weights":
        prune_weights(model, share)
    else:
        prune_channels(model, share, image_size)


def prune_weights(model: nn.Module, share: float) -> None:
    """Mask the `share` of smallest weights, over all convolutions and linear layers together.

    The masks stay in place while the network trains; `make_permanent` writes the zeros into the
    weights.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(
        [(layer, "weight") for layer in layers], prune.L1Unstructured, amount=share
    )
    for layer in layers:  # recomputed before each forward pass; a copy of the graph can't be made
        layer.weight = layer.weight.detach()


def make_permanent(model: nn.Module) -> None:
    """Replace masked weights by plain ones that are zero where the mask is."""
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")


def prune_channels(model: nn.Module, share: float, image_size: int) -> None:
    """Remove a `share` of the channels of every layer, those of the smallest filters.

    Channels that a shortcut adds together are removed together (DepGraph; Fang et al., CVPR 2023,
    with their package torch-pruning). The classes stay. `image_size` is in pixels.
    """
    import torch_pruning

    example = torch.zeros(1, 3, image_size, image_size)
    last = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
    torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=share,
        ignored_layers=[last],
    ).step()
    for parameter in model.parameters():
        parameter.grad = None


def fit_to(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Return the network with its layers cut to the shapes of `weights`, which are loaded.

    For weights of a network whose channels were pruned. Others fit as they are.
    """
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        weight = weights.get(f"{name}.weight")
        if weight is None or weight.shape == module.weight.shape:
            continue
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        else:
            module.num_features = weight.shape[0]
        for own in (module._parameters, module._buffers):
            for key, value in own.items():
                if value is not None and value.ndim:
                    shaped = torch.empty_like(weights[f"{name}.{key}"])
                    own[key] = nn.Parameter(shaped) if own is module._parameters else shaped
    model.load_state_dict(weights)
    return model


# --- Quantization ------------------------------------------------------------------------------

CALIBRATION_BATCH = 64


class QuantizationUnavailable(RuntimeError):
    """This torch can't compute in 8-bit integers on this processor."""


def quantize(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a network that computes in 8-bit integers, on the CPU.

    Post-training quantization (Jacob et al., CVPR 2018): batch norm is folded into the
    convolutions, weights get one scale a channel (where the processor's engine can), activations
    one scale a layer, from the range they take on `images`. These are N x 3 x H x W, normalised,
    and come from the training split. The copy has no parameters that could be trained.

    Raises QuantizationUnavailable if this torch or processor can't.
    """
    supported = torch.backends.quantized.supported_engines
    engine = next((e for e in ("x86", "fbgemm", "qnnpack") if e in supported), None)
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    except ImportError:
        engine = None
    if engine is None:
        raise QuantizationUnavailable(
            f"torch {torch.__version__} has no 8-bit integers for this processor (engines: "
            f"{', '.join(supported)}; quantize_fx is needed, which torch 2.6 to 2.15 have)"
        )
    torch.backends.quantized.engine = engine
    network = copy.deepcopy(model).cpu().eval()
    batches = images.cpu().split(CALIBRATION_BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        # torch announces that this way is to move to the package torchao, from release to release.
        warnings.simplefilter("ignore")
        network = prepare_fx(network, get_default_qconfig_mapping(engine), (batches[0],))
        for batch in batches:
            network(batch)
        return convert_fx(network)


# --- What is left ------------------------------------------------------------------------------


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a file of a network has to hold, by name.

    That is its state; of quantized weights the integers, their scales and zero points.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        parts = value if isinstance(value, tuple) else (value,)  # a linear layer packs two
        for number, part in enumerate(parts):
            key = f"{name}.{number}" if number else name
            if isinstance(part, Tensor) and part.is_quantized:
                tensors[key] = part.int_repr()
                if part.qscheme() == torch.per_channel_affine:
                    scale, zero = part.q_per_channel_scales(), part.q_per_channel_zero_points()
                else:
                    scale, zero = torch.tensor(part.q_scale()), torch.tensor(part.q_zero_point())
                tensors |= {f"{key}.scale": scale.float(), f"{key}.zero": zero.to(torch.int8)}
            elif isinstance(part, Tensor):
                tensors[key] = part.detach().cpu().contiguous()
    return tensors


def stored_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a network's safetensors file, plain and compressed by gzip."""
    content = save_safetensors(stored_tensors(model))
    return len(content), len(gzip.compress(content, compresslevel=6, mtime=0))
