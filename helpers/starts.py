"""What a run can start from instead of random weights: a trained network, transferred or pruned.

A `Transfer` takes the weights of a trained network and gives it a new last layer; a `Pruning` takes
weights or whole channels away from it. Either is a field of a Run, so that a fine-tuned network has
a key of its own, is trained once and can be resumed, like any other.
"""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

if TYPE_CHECKING:
    from helpers.runs import Run

# The name torchvision gives its first set of ImageNet weights. They exist at full width only.
IMAGENET = "IMAGENET1K_V1"

PRUNED = ("weights", "channels")


@dataclass(frozen=True)
class Transfer:
    """Start from trained weights, with a new last layer for the run's own classes.

    `source` is a Run, or IMAGENET for torchvision's weights. With `frozen` the new layer alone is
    trained, on features that stay as they are, their batch-norm statistics included. `rate_factor`
    gives every part of the network that many times the learning rate of the part after it
    (discriminative fine-tuning; Howard and Ruder, ACL 2018, section 3.2).

    Raises ValueError for a setting outside what is allowed.
    """

    source: Run | str
    frozen: bool = False
    rate_factor: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.source, str) and self.source != IMAGENET:
            raise ValueError(f"source is {self.source!r}; expected a Run or {IMAGENET!r}")
        if not 0 < self.rate_factor <= 1:
            raise ValueError(f"rate_factor is {self.rate_factor!r}; expected above 0, at most 1")


@dataclass(frozen=True)
class Pruning:
    """Start from a trained network from which a `share` of what counts least is taken away.

    `kind` "weights" sets the convolutions' and linear layers' smallest weights to zero, compared
    over the whole network (Han et al., NIPS 2015), and keeps them there; "channels" removes whole
    channels, those of the smallest filters in each layer (Li et al., ICLR 2017), so that the
    network really shrinks.

    Raises ValueError for a setting outside what is allowed.
    """

    source: Run
    kind: str
    share: float

    def __post_init__(self) -> None:
        if self.kind not in PRUNED:
            raise ValueError(f"kind is {self.kind!r}; expected {' or '.join(PRUNED)}")
        if not 0 <= self.share < 1:
            raise ValueError(f"share is {self.share!r}; expected 0 to below 1")


def check_fit(run: Run) -> None:
    """Raise ValueError unless a run's network is that of its source."""
    source = run.start.source
    settings = ["model", "width", "stem", "residual"]
    if isinstance(run.start, Pruning):
        settings += ["dataset", "fingerprint"]
    if source == IMAGENET:
        if not run.model.startswith("resnet") or run.width != 1 or run.stem != "imagenet":
            raise ValueError(
                f"torchvision has no weights for {run.model} at width {run.width:g} with stem "
                f"{run.stem!r}; expected a resnet18 to resnet152 at width 1 with stem 'imagenet'"
            )
        return
    for name in settings:
        mine, theirs = getattr(run, name), getattr(source, name)
        if mine != theirs:
            raise ValueError(
                f"{name} is {mine!r}, but the run to start from has {theirs!r}; they have to be "
                "the same"
            )


# --- Transfer ----------------------------------------------------------------------------------


def imagenet_weights(model: str, folder: Path) -> dict[str, Tensor]:
    """Return torchvision's ImageNet weights of a ResNet: from `folder`, or downloaded into it.

    Raises FileNotFoundError, naming the file that is wanted, if they are neither there nor can be
    fetched.
    """
    from torchvision.models import get_model_weights

    weights = get_model_weights(model)[IMAGENET]
    try:
        # torch announces a download, on stdout or stderr according to its version.
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return weights.get_state_dict(
                model_dir=str(folder), progress=False, check_hash=True, weights_only=True
            )
    except Exception as error:
        name = weights.url.rsplit("/", 1)[-1]
        raise FileNotFoundError(
            f"the ImageNet weights of {model} aren't in {folder} and downloading them failed "
            f"({error}). Without a network, put torchvision's file {name} there."
        ) from error


def transfer(model: nn.Module, weights: dict[str, Tensor], frozen: bool) -> None:
    """Copy all weights but the last layer's into a network; freeze them if wanted.

    The last layer, the linear one that gives the logits, keeps its random weights.
    """
    last = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    kept = {name: w for name, w in model.state_dict().items() if name.startswith(f"{last}.")}
    copied = {name: w for name, w in weights.items() if not name.startswith(f"{last}.")}
    model.load_state_dict(copied | kept)
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(f"{last}."))


# --- Pruning -----------------------------------------------------------------------------------


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
