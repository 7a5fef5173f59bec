"""The networks: exactly the published ones, and what residual, plain, stem and width mean."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.models import (
    CIFAR_RESNETS,
    IMAGENET_RESNETS,
    MODELS,
    BasicBlock,
    Bottleneck,
    SimpleCNN,
    build_model,
    count_parameters,
    default_stem,
    every_nth_pixel,
)
from helpers.recipes import RECIPES
from helpers.runs import Run

IMAGENET_COUNTS = (11_689_512, 21_797_672, 25_557_032, 44_549_160, 60_192_808)
CIFAR_COUNTS = (269_722, 464_154, 658_586, 853_018, 1_727_962)
THREE = ("simple_cnn", "resnet18", "resnet20")


def on_meta(name: str, **options: object) -> nn.Module:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return build_model(name, **options)


def images(count: int, size: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, size, size, generator=generator)


@pytest.mark.parametrize(("name", "expected"), zip(IMAGENET_RESNETS, IMAGENET_COUNTS, strict=True))
def test_parameters_and_names_are_torchvisions(name: str, expected: int) -> None:
    ours = on_meta(name, num_classes=1000, image_size=224)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    assert count_parameters(ours) == expected
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize(("name", "expected"), zip(CIFAR_RESNETS, CIFAR_COUNTS, strict=True))
def test_parameters_of_the_cifar_networks(name: str, expected: int) -> None:
    model = on_meta(name, num_classes=10)
    assert count_parameters(model) == expected
    # Depth counts the layers with weights; shortcuts have none.
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_weights_load_and_give_its_logits(name: str) -> None:
    torch.manual_seed(0)
    theirs, x = getattr(torchvision.models, name)(weights=None).eval(), images(2, 64)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # each with a scale, shift and statistics of its own
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.2, 0.2)
    ours = build_model(name, num_classes=1000, stem="imagenet").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.inference_mode():
        scale = theirs(x).abs().max()
        torch.testing.assert_close(ours(x) / scale, theirs(x) / scale, atol=1e-5, rtol=0)


def test_simple_cnn_is_three_convolutions_and_two_linear_layers() -> None:
    model = build_model("simple_cnn", num_classes=10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [type(layer) for layer in layers] == [nn.Conv2d] * 3 + [nn.Linear] * 2
    convolutions = (3 * 32 + 32 * 64 + 64 * 128) * 9 + 32 + 64 + 128
    assert count_parameters(model) == convolutions + 2048 * 256 + 256 + 256 * 10 + 10
    model.fc2.requires_grad_(False)
    assert count_parameters(model) == convolutions + 2048 * 256 + 256
    model.avgpool = nn.Identity()
    assert model(images(1, 16)).shape == (1, 10)  # sides of 16, 8 and then 4, as it averages to


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


@pytest.mark.parametrize("size", [6, 7])
def test_option_a_takes_every_second_pixel_and_fills_with_zeros(size: int) -> None:
    x = images(2, size, channels=4).abs()  # the block ends with a ReLU
    block = build_model("resnet20", num_classes=3, width=0.25).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    out = block(x)
    assert torch.equal(out[:, :4], x[:, :, ::2, ::2])
    assert out.shape[1] == 8 and not out[:, 4:].any()
    pixels = every_nth_pixel(x.contiguous(memory_format=torch.channels_last), 3)
    assert torch.equal(pixels, x[:, :, ::3, ::3])
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODELS)
def test_no_convolution_of_one_pixel_has_a_stride(name: str) -> None:
    for module in on_meta(name, num_classes=10).modules():
        assert getattr(module, "kernel_size", 0) != (1, 1) or module.stride == (1, 1)


def additions(model: nn.Module) -> int:
    nodes = make_fx(model.eval())(images(1, 16)).graph.nodes
    return sum(node.target == torch.ops.aten.add.Tensor for node in nodes)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_plain_networks_have_no_shortcuts(name: str) -> None:
    residual, plain = (
        build_model(name, num_classes=10, width=0.25, residual=residual)
        for residual in (True, False)
    )
    blocks = sum(IMAGENET_RESNETS[name][1] if name in IMAGENET_RESNETS else CIFAR_RESNETS[name])
    assert (additions(residual), additions(plain)) == (blocks, 0)
    kept = [key for key in residual.state_dict() if "downsample" not in key]
    assert list(plain.state_dict()) == kept


def test_the_stem_follows_the_image_size() -> None:
    for size, stem in ((8, "cifar"), (64, "cifar"), (65, "imagenet"), (224, "imagenet")):
        assert default_stem(size) == stem
        assert on_meta("resnet18", num_classes=10, image_size=size).stem == stem


def test_the_imagenet_stem_needs_33_pixels() -> None:
    fields = {"epochs": 1, "seed": 0, "stem": "imagenet"}
    for name in ("resnet18", "resnet20"):
        model = build_model(name, num_classes=3, stem="imagenet", width=0.1)
        assert model(images(2, 33)).shape == (2, 3)
        Run("shapes", "0", name, RECIPES["fast"], image_size=33, **fields)
        message = r"images have 32 pixels a side; the ImageNet stem needs at least 33. Set a larger"
        with pytest.raises(ValueError, match=message):
            model(images(2, 64)[..., :32])
        with pytest.raises(ValueError, match=message):
            Run("shapes", "0", name, RECIPES["fast"], image_size=32, **fields)
    Run("shapes", "0", "simple_cnn", RECIPES["fast"], image_size=32, **fields)  # has no stem


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
@pytest.mark.parametrize(
    ("stem", "other", "sides"), [("cifar", 224, [8, 4, 2]), ("imagenet", 32, [33, 9, 5, 3])]
)
def test_an_explicit_stem_wins_and_no_stride_meets_a_single_pixel(
    name: str, stem: str, other: int, sides: list[int]
) -> None:
    """There, oneDNN leaves a weight gradient unwritten where it computes in bfloat16."""
    model, seen = build_model(name, num_classes=3, stem=stem, image_size=other, width=0.1), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.register_forward_hook(lambda m, given, out: seen.append(given[0].shape[-1]))
    model(images(2, sides[0]))
    assert seen == (sides[:-1] if name == "resnet20" else sides)


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("simple_cnn", 0.25, [8, 16, 32]),
        ("resnet18", 1.0, [64, 64, 128, 256, 512]),
        ("resnet18", 0.25, [16, 16, 32, 64, 128]),
        ("resnet50", 0.25, [16, 64, 128, 256, 512]),
        ("resnet20", 0.5, [8, 8, 16, 32]),
        ("resnet20", 0.01, [4, 4, 4, 4]),
    ],
)
def test_width_multiplies_every_stage(name: str, width: float, expected: list[int]) -> None:
    model = on_meta(name, num_classes=7, width=width)
    last = "conv3" if name == "resnet50" else "conv2"
    stages = [f"{stage}.0.{last}" for stage in getattr(model, "stages", ())] or ["conv2", "conv3"]
    assert [model.get_submodule(n).out_channels for n in ("conv1", *stages)] == expected
    if name != "simple_cnn":
        assert (model.fc.in_features, model.fc.out_features) == (expected[-1], 7)


@pytest.mark.parametrize("name", THREE)
def test_dropout_acts_before_the_classifier_and_only_in_training(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, width=0.5, dropout=0.4)
    x = images(8, 16)
    given = []
    for module in (model.fc2 if isinstance(model, SimpleCNN) else model.fc, model.dropout):
        module.register_forward_hook(lambda module, args, out: given.append(args[0].detach()))
    assert not torch.equal(model.train()(x), model(x))
    before, after = given[:2]
    dropped = (after == 0) & (before > 0)
    assert abs(dropped.sum() / (before > 0).sum() - 0.4) < 0.1
    torch.testing.assert_close(after[~dropped], before[~dropped] / 0.6)
    assert torch.equal(model.eval()(x), model(x))
    assert torch.equal(given[-1], given[-2])
    model = build_model(name, num_classes=10, width=0.125).train()
    assert torch.equal(model(x), model(x)), "without dropout, training is deterministic"


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_gives_logits_and_trains_every_parameter(name: str, residual: bool) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=6, width=0.1, residual=residual, image_size=16)
    logits = model.train()(images(4, 16))
    assert logits.shape == (4, 6)
    for size in (8, 15, 33):
        assert model(images(2, size)).shape == (2, 6)
    logits.square().sum().backward()
    assert torch.isfinite(logits).all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


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


def test_a_bad_setting_is_named_with_what_was_expected() -> None:
    for options, message in (
        ({"name": "resnet19"}, "'resnet19' is unknown; .* simple_cnn, resnet18, .* resnet110"),
        ({"width": 17}, "width is 17; expected a multiplier above 0 and at most 16"),
        ({"width": float("nan")}, "width is nan"),
        ({"stem": "vit"}, "stem is 'vit'; expected .cifar. or .imagenet."),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(**({"name": "resnet18", "num_classes": 10} | options))
