"""The networks under study: a simple CNN and residual networks, with or without their shortcuts.

Two families of residual networks, both from He et al., "Deep Residual Learning for Image
Recognition" (CVPR 2016):

    resnet18, 34, 50, 101, 152     four stages of 64 to 512 channels (table 1); named parameter by
                                   parameter as in torchvision, so its weights load strictly
    resnet20, 32, 44, 56, 110      three stages of 16 to 64 channels for CIFAR (section 4.2), with
                                   shortcuts that have no parameters (option A)

Each can be had *plain*, with the additions left out, which is the paper's control.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# An image up to this size gets the CIFAR stem: the ImageNet stem would shrink it fourfold first.
LARGEST_CIFAR_STEM_SIZE = 64
# Below, the ImageNet stem leaves a single pixel to the last stages, and on processors with
# bfloat16 instructions oneDNN gets the weight gradient of a strided convolution wrong there.
SMALLEST_IMAGENET_STEM_SIZE = 33

Shortcut = nn.Module | None  # None: the input as it is


def every_nth_pixel(x: Tensor, stride: int) -> Tensor:
    """Return N x C x H/stride x W/stride: the pixels that a 1x1 convolution of this stride sees.

    In place of that stride, since on CPUs the gradient of such a convolution writes past its
    memory, or is wrong, for fewer than 16 channels in channels_last (oneDNN issue 6035). Pooling
    single pixels leaves them as they are; unlike indexing it keeps channels_last on the way back.
    """
    return x if stride == 1 else F.avg_pool2d(x, 1, stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them: y = relu(F(x) + x).

    He et al. (2016), figure 5 left. With `residual=False` the block computes relu(F(x)).
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, residual: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut or nn.Identity()
        self.stride, self.residual = stride, residual

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> N x channels x H/stride x W/stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.residual:
            out = out + self.downsample(every_nth_pixel(x, self.stride))
        return F.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: fewer channels for the 3x3, four times as many after.

    He et al. (2016), figure 5 right. The stride sits on the 3x3 convolution, as in torchvision.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, residual: bool
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut or nn.Identity()
        self.stride, self.residual = stride, residual

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> N x 4*channels x H/stride x W/stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.residual:
            out = out + self.downsample(every_nth_pixel(x, self.stride))
        return F.relu(out)


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pooling, and one linear layer.

    `blocks[i]` blocks of `channels[i]` channels make stage i (layer1, layer2, ...); each stage
    but the first halves the resolution. `stem` is "imagenet" (7x7 convolution of stride 2 and
    max-pooling) or "cifar" (one 3x3 convolution). `projection` says what a shortcut does where
    the shape changes: a 1x1 convolution (option B), or, if False, zeros for the new channels and
    no parameters (option A; He et al., 2016, section 3.3).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        channels: tuple[int, ...],
        *,
        num_classes: int,
        stem: str,
        residual: bool,
        projection: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem is {stem!r}; expected "cifar" or "imagenet"')
        width = channels[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(blocks)))
        self.stem = stem
        for i, name in enumerate(self.stages):
            wider = channels[i] * block.expansion
            stage = []
            for j in range(blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut: Shortcut = None
                if residual and (stride != 1 or width != wider):
                    shortcut = nn.ZeroPad3d((0, 0, 0, 0, 0, wider - width))
                    if projection:
                        convolution = nn.Conv2d(width, wider, 1, bias=False)
                        shortcut = nn.Sequential(convolution, nn.BatchNorm2d(wider))
                stage.append(block(width, channels[i], stride, shortcut, residual))
                width = wider
            setattr(self, name, nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images N x 3 x H x W (float) -> logits N x num_classes."""
        check_stem(self.stem, x.shape[-2], x.shape[-1])
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(self.dropout(x))


class SimpleCNN(nn.Module):
    """Three convolutions with pooling, then two fully connected layers: the study's baseline.

    The feature map is pooled to 4 x 4 in between, so that any image of 8 pixels or more fits.
    """

    def __init__(self, channels: tuple[int, int, int], *, num_classes: int, dropout: float) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = nn.Conv2d(3, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(4)
        self.fc1 = nn.Linear(third * 16, 2 * third)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(2 * third, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images N x 3 x H x W (float) -> logits N x num_classes."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        x = torch.flatten(self.avgpool(x), 1)
        x = F.relu(self.fc1(x))
        return self.fc2(self.dropout(x))


def initialise(model: nn.Module) -> None:
    """Draw convolutions from He et al. (ICCV 2015), equation 10, by fan-out; biases are 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# Block and blocks a stage: He et al. (2016), table 1 and section 4.2 (depth = 6n + 2).
IMAGENET_RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
CIFAR_RESNETS = {f"resnet{6 * n + 2}": (n, n, n) for n in (3, 5, 7, 9, 18)}
MODELS = ("simple_cnn", *IMAGENET_RESNETS, *CIFAR_RESNETS)


def default_stem(image_size: int) -> str:
    """Return the stem that fits an image size: "cifar" up to 64 pixels, else "imagenet"."""
    return "cifar" if image_size <= LARGEST_CIFAR_STEM_SIZE else "imagenet"


@torch.fx.wrap  # a tracer of the network calls it, and doesn't look into it
def check_stem(stem: str, *sides: int) -> None:
    """Raise ValueError for images, by their sides in pixels, too small for the ImageNet stem."""
    if stem == "imagenet" and min(sides) < SMALLEST_IMAGENET_STEM_SIZE:
        raise ValueError(
            f"images have {min(sides)} pixels a side; the ImageNet stem needs at least "
            f"{SMALLEST_IMAGENET_STEM_SIZE}. Set a larger image_size, or stem='cifar'."
        )


def build_model(
    name: str,
    *,
    num_classes: int,
    image_size: int = 32,
    width: float = 1.0,
    stem: str = "auto",
    residual: bool = True,
    dropout: float = 0.0,
) -> ResNet | SimpleCNN:
    """Build a network by name, with weights drawn from torch's global generator.

    `width` multiplies every channel count (at least 4 channels remain). `stem` is "cifar",
    "imagenet" or "auto", which picks by `image_size` (pixels). `residual=False` leaves the
    shortcuts out. `dropout` is the probability before the classifier. SimpleCNN has neither stem
    nor shortcuts.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(MODELS)}")
    if not 0 < width <= 16:
        raise ValueError(f"width is {width!r}; expected a multiplier above 0 and at most 16")

    def scaled(*channels: int) -> tuple[int, ...]:
        return tuple(max(4, round(c * width)) for c in channels)

    if name == "simple_cnn":
        return SimpleCNN(scaled(32, 64, 128), num_classes=num_classes, dropout=dropout)
    if name in CIFAR_RESNETS:
        block, blocks, channels = BasicBlock, CIFAR_RESNETS[name], scaled(16, 32, 64)
    else:
        (block, blocks), channels = IMAGENET_RESNETS[name], scaled(64, 128, 256, 512)
    return ResNet(
        block,
        blocks,
        channels,
        num_classes=num_classes,
        stem=default_stem(image_size) if stem == "auto" else stem,
        residual=residual,
        projection=name in IMAGENET_RESNETS,
        dropout=dropout,
    )


def count_parameters(model: nn.Module) -> int:
    """Return how many trainable numbers a network has."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, frozen: bool = True) -> Iterator[None]:
    """Have a network in evaluation mode, frozen and uncompiled; put everything back on leaving.

    Frozen parameters keep a trunk from being recorded, and their casts out of autocast's cache,
    where without `frozen` they serve several batches.
    Flags are set one by one, since `model.eval()` may be overridden.
    """
    modules = list(model.modules())
    flags = [(module, "training") for module in modules if module.training]
    flags += [(p, "requires_grad") for p in model.parameters() if frozen and p.requires_grad]
    eager = contextlib.nullcontext()
    if any(m._compiled_call_impl or "_orig_mod" in m._modules for m in modules):
        eager = torch.compiler.set_stance("force_eager")  # compiled, no hook fires
    try:
        for owner, flag in flags:
            setattr(owner, flag, False)
        with torch.inference_mode(False), torch.no_grad(), eager:
            yield
    finally:
        for owner, flag in flags:
            setattr(owner, flag, True)
