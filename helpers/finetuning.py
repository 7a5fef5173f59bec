"""Networks that start from trained ones: transferred to other classes, or pruned.

`transfer` takes over the weights of a trained network but for its last layer. Pruning takes away
what counts least: `prune_weights` sets single weights to zero, `prune_channels` removes whole
channels, so that the network really shrinks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import get_model_weights

# The name torchvision gives its first set of ImageNet weights. They exist at full width only.
IMAGENET = "IMAGENET1K_V1"


def imagenet_weights(model: str, folder: Path) -> dict[str, Tensor]:
    """Return torchvision's ImageNet weights of a ResNet: from `folder`, or downloaded into it."""
    weights = get_model_weights(model)[IMAGENET]
    how = {"progress": False, "check_hash": True, "weights_only": True}
    try:
        return weights.get_state_dict(model_dir=str(folder), **how)
    except Exception as error:
        raise FileNotFoundError(
            f"{weights.url.rsplit('/', 1)[-1]}, ImageNet weights of {model}, isn't in {folder} and "
            f"downloading it failed ({error}). Without a network, put torchvision's file there."
        ) from error


def last_layer(model: nn.Module) -> str:
    """Return the name of the linear layer that gives the logits."""
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]


def transfer(model: nn.Module, weights: dict[str, Tensor], frozen: bool) -> None:
    """Copy all weights but the last layer's into a network; freeze them if wanted.

    The last layer keeps its random weights.
    """
    last = f"{last_layer(model)}."
    kept = {name: weight for name, weight in model.state_dict().items() if name.startswith(last)}
    model.load_state_dict(weights | kept)
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(last))


def prune_weights(model: nn.Module, sparsity: float) -> None:
    """Mask the smallest weights, that share of all convolutions' and linear layers' together.

    Han et al. (NIPS 2015). The masks stay in place while the network trains; `make_permanent`
    writes the zeros into the weights.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = [(layer, "weight") for layer in layers]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=sparsity)
    for layer in layers:  # recomputed before each forward pass; a copy of the graph can't be made
        layer.weight = layer.weight.detach()


def make_permanent(model: nn.Module) -> None:
    """Replace masked weights by plain ones that are zero where the mask is."""
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")


def prune_channels(model: nn.Module, sparsity: float, image_size: int) -> None:
    """Remove that share of the channels of every layer, those of the smallest filters.

    Li et al. (ICLR 2017). Channels that a shortcut adds together are removed together (DepGraph;
    Fang et al., CVPR 2023, with their package torch-pruning). The classes stay. `image_size` is
    in pixels.
    """
    import torch_pruning  # which Colab lacks until a notebook's set-up has run

    torch_pruning.pruner.MagnitudePruner(
        model,
        torch.zeros(1, 3, image_size, image_size),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=sparsity,
        ignored_layers=[model.get_submodule(last_layer(model))],
    ).step()
    for parameter in model.parameters():
        parameter.grad = None


def weights_file(model: nn.Module) -> bytes:
    """Return a network's weights as the content of a safetensors file."""
    weights = model.state_dict().items()
    return save_safetensors({name: w.detach().cpu().contiguous() for name, w in weights})


def load_weights(model: nn.Module, content: bytes) -> None:
    """Load a safetensors file into a network, its layers cut to the channels that are left."""
    weights = load_safetensors(content)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        value.data = weights[name].to(value.dtype)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.BatchNorm2d):
            layer.num_features = len(layer.weight)
