"""What a run can start from instead of random weights: a trained network, transferred or pruned.

A `Transfer` takes the weights of a trained network and gives it a new last layer; a `Pruning` takes
weights or whole channels away from it. Either is a field of a Run, so that a fine-tuned network has
a key of its own, is trained once and can be resumed, like any other.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from helpers.compression import PRUNED
from helpers.config import as_float, check

if TYPE_CHECKING:
    from helpers.runs import Run

# The name torchvision gives its first set of ImageNet weights. They exist at full width only.
IMAGENET = "IMAGENET1K_V1"


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
        check("frozen", self.frozen, isinstance(self.frozen, bool), "True or False")
        factor = as_float("rate_factor", self.rate_factor)
        check("rate_factor", factor, 0 < factor <= 1, "above 0, at most 1")


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
        check("kind", self.kind, self.kind in PRUNED, " or ".join(PRUNED))
        check("share", self.share, 0 <= as_float("share", self.share) < 1, "0 to below 1")


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
    model.load_state_dict(weights | kept)
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(f"{last}."))
