"""The networks: exactly the published ones, and what residual, plain, stem and width mean."""

from __future__ import annotations

import operator
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import Tensor, nn

from helpers.config import ROOT
from helpers.models import (
    CIFAR_RESNETS,
    IMAGENET_RESNETS,
    MODELS,
    BasicBlock,
    Bottleneck,
    ResNet,
    SimpleCNN,
    ZeroChannels,
    build_model,
    count_parameters,
    default_stem,
)

IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
CIFAR_PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


def on_meta(name: str, **options: object) -> nn.Module:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return build_model(name, **options)


def images(count: int = 2, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator)


def random_batch_norm(model: nn.Module) -> None:
    """Give every batch norm its own scale, shift and running statistics."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.2, 0.2, generator=generator)
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


# --- The published networks --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), IMAGENET_PARAMETERS.items())
def test_parameters_and_names_are_torchvisions(name: str, expected: int) -> None:
    ours = on_meta(name, num_classes=1000, image_size=224)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    assert count_parameters(ours) == expected
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize(("name", "expected"), CIFAR_PARAMETERS.items())
def test_parameters_of_the_cifar_networks(name: str, expected: int) -> None:
    model = on_meta(name, num_classes=10)
    assert count_parameters(model) == expected
    # Depth counts the layers with weights; shortcuts have none.
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))
    assert not [key for key in model.state_dict() if "downsample" in key]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_weights_load_and_give_its_logits(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    random_batch_norm(theirs)
    # Logits of order one, so that 1e-5 means something.
    x = images(2, 64)
    with torch.inference_mode():
        scale = theirs(x).abs().max()
        theirs.fc.weight /= scale
        theirs.fc.bias /= scale
    ours = build_model(name, num_classes=1000, stem="imagenet").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)


def test_simple_cnn_is_three_convolutions_and_two_linear_layers() -> None:
    model = build_model("simple_cnn", num_classes=10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [type(layer) for layer in layers] == [nn.Conv2d] * 3 + [nn.Linear] * 2
    convolutions = (3 * 32 + 32 * 64 + 64 * 128) * 9 + 32 + 64 + 128
    assert count_parameters(model) == convolutions + 2048 * 256 + 256 + 256 * 10 + 10


def test_count_leaves_out_frozen_parameters() -> None:
    model = build_model("simple_cnn", num_classes=10)
    before = count_parameters(model)
    model.fc2.requires_grad_(False)
    assert count_parameters(model) == before - 2570


# --- Blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("block", "last"), [(BasicBlock, "bn2"), (Bottleneck, "bn3")])
def test_a_silent_branch_leaves_relu_of_the_identity(
    block: type[nn.Module], last: str, training: bool
) -> None:
    x = images(3, 5, channels=8)
    silent = {}
    for residual in (True, False):
        module = block(8, 8 // block.expansion, 1, None, residual).train(training)
        nn.init.zeros_(getattr(module, last).weight)
        silent[residual] = module(x)
    torch.testing.assert_close(silent[True], x.relu(), atol=0, rtol=0)
    assert not silent[False].any()


def test_blocks_add_their_shortcut_before_the_last_relu() -> None:
    torch.manual_seed(0)
    x = images(3, 6, channels=4)
    shortcut = ZeroChannels(4)
    residual = BasicBlock(4, 8, 2, shortcut, True).eval()
    plain = BasicBlock(4, 8, 2, None, False).eval()
    plain.load_state_dict(residual.state_dict())
    before_relu = {}
    plain.bn2.register_forward_hook(lambda module, given, out: before_relu.update(out=out))
    torch.testing.assert_close(plain(x), before_relu["out"].relu())
    added = before_relu["out"] + shortcut(x[:, :, ::2, ::2])
    torch.testing.assert_close(residual(x), added.relu())


@pytest.mark.parametrize("size", [6, 7])
def test_option_a_takes_every_second_pixel_and_fills_with_zeros(size: int) -> None:
    x = images(2, size, channels=3).abs()  # the block ends with a ReLU
    block = BasicBlock(3, 8, 2, ZeroChannels(5), True).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    out = block(x)
    half = (size + 1) // 2
    assert out.shape == (2, 8, half, half)
    for row in range(half):
        for column in range(half):
            torch.testing.assert_close(out[:, :3, row, column], x[:, :, 2 * row, 2 * column])
    assert not out[:, 3:].any()


@pytest.mark.parametrize("name", [*IMAGENET_RESNETS, *CIFAR_RESNETS])
def test_no_convolution_of_one_pixel_has_a_stride(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert not [m for m in convolutions if m.kernel_size == (1, 1) and m.stride != (1, 1)]


def test_narrow_networks_train_on_any_number_of_images() -> None:
    # In a process of its own: with strided 1x1 convolutions it dies on processors with AVX-512.
    program = """
import torch
from helpers.models import build_model

for count, threads in ((5, 2), (20, 3)):
    torch.set_num_threads(threads)
    model = build_model("resnet18", num_classes=3, width=0.125)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(count, 3, 16, 16).to(memory_format=torch.channels_last)
    for _ in range(10):
        model(images).square().sum().backward()
print("done")
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


# --- Residual or plain -------------------------------------------------------------------------


def additions(model: nn.Module) -> int:
    graph = torch.fx.symbolic_trace(model).graph
    adds = (operator.add, operator.iadd, torch.add, "add", "add_")
    return sum(node.target in adds for node in graph.nodes)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_plain_networks_have_no_shortcuts(name: str) -> None:
    residual, plain = (
        build_model(name, num_classes=10, width=0.25, residual=residual)
        for residual in (True, False)
    )
    blocks = sum(IMAGENET_RESNETS[name][1] if name in IMAGENET_RESNETS else CIFAR_RESNETS[name])
    assert additions(residual) == blocks
    assert additions(plain) == 0
    kept = [key for key in residual.state_dict() if "downsample" not in key]
    assert list(plain.state_dict()) == kept
    assert not [m for m in plain.modules() if isinstance(m, ZeroChannels)]


# --- Stem, width, dropout, channels ------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stem"),
    [(8, "cifar"), (32, "cifar"), (64, "cifar"), (65, "imagenet"), (224, "imagenet")],
)
def test_the_stem_follows_the_image_size(size: int, stem: str) -> None:
    assert default_stem(size) == stem
    for name in ("resnet18", "resnet20"):
        assert on_meta(name, num_classes=10, image_size=size).stem == stem


@pytest.mark.parametrize(
    ("stem", "kernel", "sides"), [("cifar", 3, [64, 32, 16, 8]), ("imagenet", 7, [16, 8, 4, 2])]
)
def test_an_explicit_stem_wins_and_sets_the_resolution(
    stem: str, kernel: int, sides: list[int]
) -> None:
    opposite = 224 if stem == "cifar" else 32
    model = build_model("resnet18", num_classes=10, image_size=opposite, stem=stem, width=0.125)
    assert model.conv1.kernel_size == (kernel, kernel)
    seen = []
    for stage in model.stages:
        getattr(model, stage).register_forward_hook(lambda m, x, out: seen.append(out.shape[-1]))
    model(images(2, 64))
    assert seen == sides


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("resnet18", 1.0, [64, 64, 128, 256, 512]),
        ("resnet18", 0.25, [16, 16, 32, 64, 128]),
        ("resnet34", 2.0, [128, 128, 256, 512, 1024]),
        ("resnet50", 0.25, [16, 64, 128, 256, 512]),
        ("resnet20", 0.5, [8, 8, 16, 32]),
        ("resnet20", 0.01, [4, 4, 4, 4]),
    ],
)
def test_width_multiplies_every_stage(name: str, width: float, expected: list[int]) -> None:
    model = on_meta(name, num_classes=7, width=width)
    last = {"resnet50": "conv3"}.get(name, "conv2")
    found = [model.conv1.out_channels]
    found += [getattr(getattr(model, stage)[-1], last).out_channels for stage in model.stages]
    assert found == expected
    assert (model.fc.in_features, model.fc.out_features) == (expected[-1], 7)


def test_width_of_the_simple_cnn() -> None:
    model = on_meta("simple_cnn", num_classes=10, width=0.25)
    assert [model.conv1.out_channels, model.conv2.out_channels, model.conv3.out_channels] == [
        8,
        16,
        32,
    ]


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18", "resnet20"])
def test_dropout_acts_before_the_classifier_and_only_in_training(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, width=0.5, dropout=0.4)
    x = images(8, 16)
    given = []
    classifier = model.fc2 if isinstance(model, SimpleCNN) else model.fc
    classifier.register_forward_hook(lambda module, args, out: given.append(args[0].detach()))
    model.dropout.register_forward_hook(lambda module, args, out: given.append(args[0].detach()))
    model.train()
    assert not torch.equal(model(x), model(x))
    before, after = given[:2]
    alive = before > 0
    dropped = (after == 0) & alive
    assert abs(dropped.sum() / alive.sum() - 0.4) < 0.1
    torch.testing.assert_close(after[~dropped], before[~dropped] / 0.6)
    model.eval()
    assert torch.equal(model(x), model(x))
    given.clear()
    model(x)
    assert torch.equal(given[0], given[1])


def test_without_dropout_training_mode_is_deterministic() -> None:
    model = build_model("resnet18", num_classes=10, width=0.125).train()
    assert torch.equal(model(images()), model(images()))


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18", "resnet20"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(name: str, stem: str, channels: int) -> None:
    model = build_model(name, num_classes=4, in_channels=channels, stem=stem, width=0.1)
    assert model.conv1.in_channels == channels
    assert model.eval()(images(2, 32, channels)).shape == (2, 4)


# --- All together ------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_gives_logits_and_trains_every_parameter(name: str, residual: bool) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=6, width=0.1, residual=residual, image_size=16)
    logits = model.train()(images(4, 16))
    assert logits.shape == (4, 6)
    logits.square().sum().backward()
    assert torch.isfinite(logits).all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18", "resnet20"])
@pytest.mark.parametrize("size", [8, 15, 33])
def test_odd_and_small_images(name: str, size: int) -> None:
    model = build_model(name, num_classes=3, width=0.1, image_size=size).eval()
    assert model(images(2, size)).shape == (2, 3)


def test_weights_come_from_the_seed_with_the_variance_of_he_et_al() -> None:
    state = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        state.append(build_model("resnet18", num_classes=10).state_dict())
    assert all(torch.equal(state[0][key], state[1][key]) for key in state[0])
    assert not torch.equal(state[0]["conv1.weight"], state[2]["conv1.weight"])
    for key, fan_out in (("layer2.0.conv1.weight", 128 * 9), ("layer2.0.downsample.0.weight", 128)):
        assert state[0][key].std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    assert (state[0]["layer1.0.bn2.weight"] == 1).all()


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet19"}, ["'resnet19'", "resnet18", "simple_cnn", "resnet110"]),
        ({"num_classes": 1}, ["num_classes is 1", "at least 2"]),
        ({"in_channels": 0}, ["in_channels is 0", "positive"]),
        ({"width": 0}, ["width is 0", "above 0"]),
        ({"width": 17}, ["width is 17", "at most 16"]),
        ({"width": float("nan")}, ["width is nan"]),
        ({"dropout": 1.0}, ["dropout is 1.0", "0 to below 1"]),
        ({"dropout": -0.1}, ["dropout is -0.1", "0 to below 1"]),
        ({"stem": "vit"}, ["'vit'", "cifar", "imagenet"]),
        ({"stem": "vit", "name": "resnet20"}, ["'vit'", "cifar", "imagenet"]),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(
    options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        build_model(**({"name": "resnet18", "num_classes": 10} | options))
    assert all(word in str(caught.value) for word in words)


def test_resnet_refuses_an_unknown_stem() -> None:
    with pytest.raises(ValueError, match="'auto'"):
        ResNet(BasicBlock, (1,), (4,), num_classes=2, stem="auto")
