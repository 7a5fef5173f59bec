"""Grad-CAM against closed forms, numbers worked out by hand, three peer libraries and misuse."""

from __future__ import annotations

import contextlib
import copy
import functools
import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from helpers import gradcam
from helpers.gradcam import METHODS, cam, default_layer
from helpers.plots import overlay


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and batch-norm statistics in float64, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.ndim > 1:
            tensor.copy_(noise * math.sqrt(2 / tensor[0].numel()))
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.2 * noise.abs())
        else:
            tensor.copy_(0.1 * noise + (1 if "weight" in name else 0))
    return model


class SmallNet(nn.Module):
    """Three stages named as in a ResNet, batch norm, pooling and a linear head."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.layer1 = self.stage(3, 8, 1)
        self.layer2 = self.stage(8, 12, 2)
        self.layer3 = self.stage(12, 16, 2)
        self.fc = nn.Linear(16, classes)
        randomise(self)

    @staticmethod
    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


IMAGES = draw(4, 3, 16, 16)


class Function(nn.Module):
    """A module from a function, with submodules."""

    def __init__(self, function, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


A = torch.tensor([[[[1.0, 2], [0, 1]], [[0, 1], [3, 2]]]], dtype=torch.float64)
P = torch.tensor([[[1.0, 0], [2, 1]], [[1, -1], [1, -3]]], dtype=torch.float64)
# Score S = sum(P * A) = 2 - 4 = -2: the gradient is P, with channel means 1 and -1/2.
E3, E23 = math.exp(-3), math.exp(-2 / 3)  # scores through the channels, S(A * M_c)
V = 4 + math.sqrt(32)
BY_HAND = {
    # A1 - A2 / 2
    "grad-cam": [[1, 1.5], [-1.5, 0]],
    # alpha = 1 / (2 + 4 P1) and 1 / (2 + 6 P2): weights 1/6 + 2/10 + 1/6 and 1/8 + 1/8
    "grad-cam++": [[8 / 15, 16 / 15 + 1 / 4], [3 / 4, 8 / 15 + 1 / 2]],
    # P1 A1 + P2 A2, and the same without negative P
    "hirescam": [[1, -1], [3, -5]],
    "layercam": [[1, 0], [3, 1]],
    # 2/4 A1 - 4/6 A2
    "xgrad-cam": [[1 / 2, 1 / 3], [-2, 1 / 2 - 4 / 3]],
    # A^T A = [[6, 4], [4, 14]]: v is parallel to (4, 4 + sqrt 32)
    "eigen-cam": ((4 * A[0, 0] + V * A[0, 1]) / math.hypot(4, V)).tolist(),
    # masks [[.5, 1], [0, .5]] and [[0, 1/3], [1, 2/3]] give scores -3 and -2/3
    "score-cam": ((E3 * A[0, 0] + E23 * A[0, 1]) / (E3 + E23)).tolist(),
}


@pytest.mark.parametrize("method", METHODS)
def test_values_worked_out_by_hand(method):
    toy = Function(
        lambda self, x: torch.stack([(self.layer(x) * P).sum((1, 2, 3)), x.sum((1, 2, 3)) - 99], 1),
        layer=nn.Identity(),
    )
    result = cam(toy, A, target=0, layers="layer", method=method, normalise=False)
    expected = torch.tensor(BY_HAND[method], dtype=torch.float64)
    torch.testing.assert_close(result.maps[0], expected.relu(), rtol=1e-12, atol=1e-12)
    assert result.targets.tolist() == [0] and not result.all_zero.any()


def test_closed_form_of_a_pooled_linear_head():
    model = SmallNet()
    features = model.layer3(model.layer2(model.layer1(IMAGES))).detach()
    positions = features[0, 0].numel()
    weight = model.fc.weight.detach()
    expected = torch.einsum("kc,nchw->nkhw", weight, features).relu() / positions
    for method in ("grad-cam", "hirescam", "xgrad-cam"):
        result = cam(model, IMAGES, "all", method=method, size="layer", normalise=False)
        torch.testing.assert_close(result.maps, expected, rtol=1e-10, atol=1e-12)
    layer_cam = cam(model, IMAGES, "all", method="layercam", size="layer", normalise=False).maps
    torch.testing.assert_close(
        layer_cam, torch.einsum("kc,nchw->nkhw", weight.relu(), features) / positions
    )
    total = features.sum((2, 3))
    gradient = weight / positions
    plus = positions * gradient.relu() / (2 + gradient * total[:, None])
    result = cam(model, IMAGES, "all", method="grad-cam++", size="layer", normalise=False)
    torch.testing.assert_close(result.maps, torch.einsum("nkc,nchw->nkhw", plus, features).relu())


@functools.cache
def network(name: str) -> nn.Module:
    models = torchvision.models
    if name == "mobilenet":
        return randomise(models.mobilenet_v2(num_classes=10, width_mult=0.5))
    if name == "densenet":
        return randomise(models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10))
    if name != "vgg11":
        return randomise(getattr(models, name)(num_classes=10))
    with torch.device("meta"):  # the original head has 120 million weights
        model = models.vgg11(num_classes=10, init_weights=False)
    widths = [size if size == "M" else size // 4 for size in models.vgg.cfgs["A"]]
    model.features = models.vgg.make_layers(widths)
    head = [nn.Linear(128 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10)]
    model.classifier = nn.Sequential(*head)
    return randomise(model)


LAYERS = {
    "resnet18": ["layer2", "layer4"],
    "resnet50": ["layer3", "layer4"],
    "vgg11": ["features.9", "features.15"],
    "densenet": ["features.denseblock2", "features.denseblock3"],
    "mobilenet": ["features.6", "features.13"],
}
CASES = [(name, layer) for name, layers in LAYERS.items() for layer in layers]
X = draw(2, 3, 64, 64)
CLASSES = [3, 7]


def assert_same_map(ours: torch.Tensor, theirs) -> None:
    """Equal after the same post-processing: ReLU, then division by the maximum."""
    theirs = torch.as_tensor(np.asarray(theirs)).double().relu()
    assert ours.shape == theirs.shape
    scale = ours.amax((1, 2), keepdim=True)
    assert (scale > 0).any(), "all maps are zero, so nothing is compared"
    same = theirs / theirs.amax((1, 2), keepdim=True).clamp(min=1e-300)
    ours = ours / scale.clamp(min=1e-300)
    assert (ours - same).abs().max() < 1e-5


def raw(name: str, layer: str, method: str) -> torch.Tensor:
    return cam(network(name), X, CLASSES, layer, method, size="layer", normalise=False).maps


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_agrees_with_grad_cam(name, layer):
    pytest.importorskip("pytorch_grad_cam", reason="peer library grad-cam is not installed")
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM

    model = network(name)
    module = model.get_submodule(layer)
    for method, peer in {
        "grad-cam": GradCAM,
        "hirescam": HiResCAM,
        "layercam": LayerCAM,
        "xgrad-cam": XGradCAM,
        "grad-cam++": GradCAMPlusPlus,
    }.items():
        with peer(model, [module]) as theirs:
            output = theirs.activations_and_grads(X)
            sum(row[k] for row, k in zip(output, CLASSES, strict=True)).backward()
            activations = theirs.activations_and_grads.activations[0].numpy()
            gradients = theirs.activations_and_grads.gradients[0].numpy()
            if method == "grad-cam++":
                # It adds 1e-6 to a denominator of the size of G^2. Its weights for (A / s, s G)
                # are s times those for (A, G), so a large s makes the addend negligible.
                activations, gradients = activations / 1e6, gradients * 1e6
            maps = theirs.get_cam_image(X, module, None, activations, gradients, False)
        assert_same_map(raw(name, layer, method), maps)
    model.zero_grad()


SWIN = functools.partial(torchvision.models.SwinTransformer, [4, 4], 24, [1, 1], [2, 2], [4, 4])
LAST = functools.partial(torch.permute, dims=(0, 3, 1, 2))
VIT = functools.partial(torchvision.models.VisionTransformer, 32, 8, 2, 2, 24, 48)


@pytest.mark.parametrize(
    ("build", "layer", "reshape"),
    [
        (SWIN, "features.1", LAST),
        (SWIN, "norm", LAST),
        (VIT, "encoder.layers.encoder_layer_1.ln_1", lambda a: LAST(a[:, 1:].unflatten(1, (4, 4)))),
    ],
)
def test_transformers_agree_with_captum(build, layer, reshape):
    """Its gradients are those of its gradients times activations, over its activations."""
    attr = pytest.importorskip("captum.attr", reason="peer library captum is not installed")
    model, images = build(num_classes=10).double().eval(), X[:, :, :32, :32]
    for number, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.copy_(0.3 * draw(*parameter.shape, seed=number))
    module, classes = model.get_submodule(layer), torch.tensor(CLASSES)
    activations = attr.LayerActivation(model, module).attribute(images).detach()
    product = attr.LayerGradientXActivation(model, module).attribute(images, classes).detach()
    weights = reshape(product / activations).mean((2, 3), keepdim=True)
    expected = {"hirescam": reshape(product), "grad-cam": weights * reshape(activations)}
    options = {"size": "layer", "normalise": False, "reshape": reshape}
    for method, theirs in expected.items():
        maps = cam(model, images, CLASSES, layer, method, **options).maps
        torch.testing.assert_close(maps, theirs.sum(1).relu(), rtol=1e-12, atol=1e-12)
        assert maps.max() > 1e-3
    for method in METHODS:
        assert cam(model, images, None, layer, method, reshape=reshape).maps.shape == (2, 32, 32)
    with pytest.raises(ValueError, match=f"'{layer}' gives .* expected 2 x C x h x w.*`reshape`"):
        cam(model, images, CLASSES, layer)
    if build is VIT:
        with pytest.raises(ValueError, match=r"refuses images of torch.float64 \(2, 3, 33, 32\): "):
            cam(model, F.pad(images, (0, 0, 0, 1)), None, layer)


@pytest.mark.parametrize(
    ("inputs", "outputs", "fits"),
    [
        ((224, 224), (7, 7, 768), False),  # channels last
        ((224, 224), (56, 56, 96), False),
        ((224, 224), (28, 28, 32), False),
        ((16, 16), (8, 17, 17), False),  # more pixels than the image
        ((224, 224), (8, 7, 8), True),
        ((33, 64), (8, 1, 2), True),
        ((24, 200), (8, 1, 7), True),
        ((224, 448), (8, 52, 108), True),  # a deep stem without padding
        ((32, 100), (8, 1, 25), False),  # made for lines of text: passes with a reshape
    ],
)
def test_maps_that_cannot_be_of_the_image_are_refused(inputs, outputs, fits):
    conv = nn.Conv2d(1, outputs[0], 1)
    resize = nn.AdaptiveAvgPool2d(outputs[1:])
    model = Function(lambda m, x: m.stage(x).mean((2, 3)), stage=nn.Sequential(conv, resize))
    images = torch.rand(1, 1, *inputs)
    assert cam(model, images, 0, "stage", reshape=lambda a: a).maps.shape == (1, *inputs)
    if fits:
        assert cam(model, images, 0, "stage").maps.shape == (1, *inputs)
    else:
        with pytest.raises(ValueError, match="'stage' gives .* in proportion to the images"):
            cam(model, images, 0, "stage")


def test_single_and_all_targets_layers_and_batches_agree():
    model = SmallNet()
    names = ["layer1", "layer2", "layer3"]
    for method in METHODS:
        single = cam(model, IMAGES, [0, 4, 2, 1], names[1], method)
        every = cam(model, IMAGES, "all", names, method)
        several = cam(model, IMAGES, (0, 4, 2, 1), [model.layer3, "layer2"], method)
        assert list(every.maps) == names and list(several.maps) == ["layer3", "layer2"]
        assert every.maps["layer2"].shape == (4, 5, 16, 16)
        assert every.all_zero["layer2"].shape == (4, 5)
        assert every.targets is None
        chosen = every.maps["layer2"][range(4), [0, 4, 2, 1]]
        torch.testing.assert_close(single.maps, chosen, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(single.maps, several.maps["layer2"], rtol=1e-9, atol=1e-12)
        for index, k in enumerate([0, 4, 2, 1]):
            alone = cam(model, IMAGES[index], k, "layer2", method)
            assert alone.maps.shape == (1, 16, 16)
            torch.testing.assert_close(alone.maps[0], single.maps[index], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "target",
    [None, 2, [k % 3 for k in range(11)], torch.arange(11) % 3, "all", lambda z: z[:, 1] - z[:, 0]],
    ids=["predicted", "class", "list", "tensor", "all", "function"],
)
def test_large_batches_in_parts_give_the_same(monkeypatch, target):
    model, images, sizes = SmallNet(), draw(11, 3, 16, 16), []
    whole = cam(model, images, target, ["layer2", "layer3"], normalise=False)
    monkeypatch.setattr(gradcam, "IMAGES_AT_ONCE", 4)
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    parts = cam(model, images, target, ["layer2", "layer3"], normalise=False)
    assert sizes == [4, 4, 3]
    for field in ("maps", "logits", "targets", "all_zero"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field))


def test_target_kinds_mean_the_same():
    model = SmallNet()
    predicted = model(IMAGES).argmax(1)
    result = cam(model, IMAGES)
    assert torch.equal(result.targets, predicted)
    torch.testing.assert_close(result.logits, model(IMAGES).detach())
    for target in (predicted, predicted.tolist(), predicted.int().numpy()):
        assert torch.equal(cam(model, IMAGES, target).maps, result.maps)
    for target in (2, np.int64(2), torch.tensor(2), [2, 2, 2, 2]):
        assert torch.equal(cam(model, IMAGES, target).maps, cam(model, IMAGES, 2).maps)
    for method in ("grad-cam", "score-cam"):
        by_function = cam(model, IMAGES, lambda z: z[:, 2], method=method)
        assert by_function.targets is None
        torch.testing.assert_close(by_function.maps, cam(model, IMAGES, 2, method=method).maps)
        wrapped = Function(lambda m, x: {"out": m.net(x), "more": [x]}, net=model)
        by_key = cam(wrapped, IMAGES, lambda out: out["out"][:, 2], "net.layer3", method)
        assert torch.equal(by_key.maps, by_function.maps) and by_key.logits is None
    with pytest.raises(ValueError, match="pass a target function.*got a dict"):
        cam(wrapped, IMAGES, 2, "net.layer3")
    difference = cam(model, IMAGES, lambda z: z[:, 1] - z[:, 3], normalise=False, size="layer")
    weight = (model.fc.weight[1] - model.fc.weight[3]).detach()
    features = model.layer3(model.layer2(model.layer1(IMAGES))).detach()
    expected = torch.einsum("c,nchw->nhw", weight, features).relu() / 16
    torch.testing.assert_close(difference.maps, expected)


def test_size_and_normalisation():
    model = SmallNet()
    raw_layer = cam(model, IMAGES, size="layer", normalise=False).maps
    raw_input = cam(model, IMAGES, size="input", normalise=False).maps
    assert raw_layer.shape == (4, 4, 4) and raw_input.shape == (4, 16, 16)
    enlarged = F.interpolate(raw_layer[:, None], (16, 16), mode="bilinear")[:, 0]
    torch.testing.assert_close(raw_input, enlarged)
    scaled = cam(model, IMAGES).maps
    torch.testing.assert_close(scaled, enlarged / enlarged.amax((1, 2), keepdim=True))
    assert (scaled.amax((1, 2)) == 1).all() and (scaled >= 0).all()


def test_default_layer():
    assert default_layer(SmallNet()) == "layer3"
    assert default_layer(torchvision.models.resnet18()) == "layer4"
    assert default_layer(nn.Sequential(nn.Identity(), SmallNet())) == "1.layer3"
    with pytest.raises(ValueError, match="layerN in features, avgpool, classifier: pass the"):
        default_layer(network("vgg11"))
    with pytest.raises(ValueError, match="pass the target layer"):
        default_layer(nn.ModuleList([SmallNet(), SmallNet()]))


def test_a_new_method_is_one_rule(monkeypatch):
    rule = gradcam.Method(lambda activations, gradients: activations.sum(1))
    monkeypatch.setitem(METHODS, "activation-sum", rule)
    maps = cam(SmallNet(), IMAGES, method="activation-sum", size="layer", normalise=False).maps
    model = SmallNet()
    features = model.layer3(model.layer2(model.layer1(IMAGES))).sum(1).detach()
    torch.testing.assert_close(maps, features)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["conv", "keep"])
def test_operations_in_place_after_the_layer(method, layer):
    conv = nn.Conv2d(3, 6, 3, padding=1)
    parts = {"conv": conv, "keep": nn.Identity(), "fc": nn.Linear(6, 5)}

    def in_place(self, x):
        y = self.conv(x)
        z = self.keep(y)  # shares its memory with y
        z += 0.5
        z.mul_(2)
        z = F.relu(z.sub_(1), inplace=True)
        logits = self.fc(z.mean((2, 3)))
        if layer == "keep":
            y.zero_()
        return logits

    def out_of_place(self, x):
        z = self.keep(self.conv(x)) + 0.5
        return self.fc(F.relu(2 * z - 1).mean((2, 3)))

    ours = randomise(Function(in_place, **parts))
    reference = randomise(Function(out_of_place, **copy.deepcopy(parts)))
    maps = cam(ours, IMAGES, 1, layer, method, normalise=False)
    expected = cam(reference, IMAGES, 1, layer, method, normalise=False)
    torch.testing.assert_close(maps.logits, expected.logits)
    torch.testing.assert_close(maps.maps, expected.maps)
    assert not expected.all_zero.all()


@pytest.mark.parametrize("method", METHODS)
def test_the_last_call_of_a_module_used_twice_counts(method):
    def forward(self, x):
        return self.fc(self.second(self.b(self.first(self.a(x)))).mean((2, 3)))

    convs = {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(6, 6, 3), "fc": nn.Linear(6, 5)}
    shared = nn.ReLU()
    twice = randomise(Function(forward, **convs, first=shared, second=shared))
    apart = copy.deepcopy(twice)
    apart.first, apart.second = nn.ReLU(), nn.ReLU()
    for layers in ("second", ["second", "a"]):
        ours = cam(twice, IMAGES, 1, layers, method).maps
        expected = cam(apart, IMAGES, 1, layers, method).maps
        if isinstance(ours, dict):
            ours, expected = ours["second"], expected["second"]
        torch.testing.assert_close(ours, expected)
        assert expected.amax() > 0


def state(model: nn.Module) -> dict:
    """Everything that must survive: flags, gradients, buffers, hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": [module.training for module in model.modules()],
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in hooks],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
    }


def used_network() -> nn.Module:
    """In the middle of a training: mixed modes, some gradients, some frozen parameters."""
    model = SmallNet().train()
    model.layer2.eval()
    model(IMAGES).sum().backward()
    model.fc.weight.grad = None
    model.layer1.requires_grad_(False)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["nowhere", "trunk", "tail", "target"])
def test_nothing_is_left_behind_even_after_an_exception(method, where):
    def fail(*_):
        raise KeyError("stop")

    model, images = used_network(), IMAGES.clone().requires_grad_()
    if where in ("trunk", "tail"):
        stage = model.layer1 if where == "trunk" else model.fc
        stage.register_forward_pre_hook(fail)
    before, rng = state(model), torch.get_rng_state()
    with contextlib.nullcontext() if where == "nowhere" else pytest.raises(KeyError, match="stop"):
        target = fail if where == "target" else None
        result = cam(model, images, target, ["layer2", "layer3"], method)
        assert not any(x.requires_grad for x in (*result.maps.values(), result.logits))
        expected = cam(copy.deepcopy(model).eval(), IMAGES, None, ["layer2", "layer3"], method)
        torch.testing.assert_close(result.maps, expected.maps)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert images.grad is None and torch.is_grad_enabled()
    assert torch.equal(rng, torch.get_rng_state())


def test_only_the_tail_is_recorded():
    model, recorded = SmallNet().train(), {}
    for name in ("layer1", "layer2", "layer3", "fc"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: recorded.update({name: out.requires_grad})
        )
    cam(model, IMAGES, layers="layer2")
    # These hooks run before the one that cuts, so layer2 itself is seen without a graph.
    assert recorded == {"layer1": False, "layer2": False, "layer3": True, "fc": True}
    cam(model, IMAGES, layers="layer2", method="eigen-cam")
    assert not any(recorded.values())


def test_frozen_no_grad_inference_mode_and_other_dtypes():
    model = SmallNet()
    expected = cam(model, IMAGES, layers="layer2").maps
    other = cam(model, IMAGES.float(), layers="layer2").maps
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
    frozen = SmallNet().requires_grad_(False)
    torch.testing.assert_close(cam(frozen, IMAGES, layers="layer2").maps, expected)
    with torch.no_grad():
        torch.testing.assert_close(cam(model, IMAGES, layers="layer2").maps, expected)
    with torch.inference_mode():
        maps = cam(model, IMAGES.clone(), layers=model.layer2).maps
    torch.testing.assert_close(maps.clone(), expected)


def test_no_grad_inside_the_network():
    def forward(self, x):
        with torch.no_grad():
            x = self.layer2(self.layer1(x))
        return self.fc(self.layer3(x).mean((2, 3)))

    model = SmallNet()
    parts = {name: model.get_submodule(name) for name in ("layer1", "layer2", "layer3", "fc")}
    inside = Function(forward, **parts)
    for layer in ("layer1", "layer2", "layer3"):
        torch.testing.assert_close(
            cam(inside, IMAGES, 1, layer).maps, cam(model, IMAGES, 1, layer).maps
        )


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_and_autocast(method):
    model, images = SmallNet().float(), IMAGES.float()
    expected = cam(model, images, 1, "layer2", method).maps
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cam(model, images, 1, "layer2", method)
    assert mixed.logits.dtype == torch.bfloat16
    half = cam(copy.deepcopy(model).bfloat16(), images, 1, "layer2", method)
    for result in (mixed, half):
        assert result.maps.dtype == torch.float32
        assert (result.maps - expected).abs().mean() < 0.03


def test_autocast_training_goes_on_after_a_map():
    """Weights cast without a graph must not stay in autocast's cache."""
    model, images = SmallNet().float(), IMAGES.float()
    with torch.autocast("cpu", torch.bfloat16):
        cam(model, images)
        model(images).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [model.layer1[0].weight])


def test_all_zero_maps_are_zeros_and_counted():
    model, dead = SmallNet(), SmallNet()
    with torch.no_grad():
        model.fc.weight[0] = -model.fc.weight[0].abs()
        model.fc.weight[1] = 0
        dead.layer3[1].bias.fill_(-1e9)
    for method in METHODS:
        result = cam(model, IMAGES, "all", method=method)
        assert torch.equal(result.all_zero, result.maps.amax((2, 3)) == 0)
        if METHODS[method].uses == "gradients":
            assert result.all_zero[:, :2].all() and not result.all_zero[:, 2:].all()
        result = cam(dead, IMAGES, method=method)
        assert result.all_zero.all() and result.maps.abs().max() == 0


def test_nan_and_overflow_are_errors():
    broken = SmallNet()
    with torch.no_grad():
        broken.fc.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="logits"):
        cam(broken, IMAGES)
    overflow = Function(
        lambda self, x: torch.stack([self.layer(x).sum((1, 2, 3)) * 1e300 * 1e10] * 2, 1) * 0,
        layer=nn.Conv2d(3, 1, 3).double(),
    )
    with pytest.raises(ValueError, match="logits|maps"):
        cam(overflow, IMAGES, 0, "layer")
    steep = Function(  # the root has no slope at 0
        lambda self, x: self.layer(x).square().sum((2, 3)).sqrt(), layer=nn.Conv2d(3, 2, 3)
    ).double()
    for parameter in steep.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="NaN or infinity"):
        cam(steep, IMAGES, 0, "layer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "layer9"}, "'layer9' is no layer of this model, made of layer1, layer2"),
        ({"layers": SmallNet().layer3}, "Sequential.* is no layer of this model"),
        ({"layers": "fc"}, "'fc' gives .* earlier convolutional layer"),
        ({"layers": "spare"}, r"never ran \['spare'\]"),
        ({"layers": ["idle", "layer3"]}, r"doesn't depend on \['idle'\]"),
        ({"layers": "pair"}, "'pair' gives a tuple"),
        ({"method": "gradcam"}, "grad-cam, grad-cam"),
        ({"size": "full"}, "choose one of input, layer"),
        ({"target": 5}, "0 to 4"),
        ({"target": -1}, "0 to 4"),
        ({"target": [0, 1, 2, 9]}, "0 to 4"),
        ({"target": [0, 1, 2]}, "4 images"),
        ({"target": [[0], [1], [2], [3]]}, "4 images"),
        ({"target": 1.0}, "a class or one for each"),
        ({"target": True}, "a class or one for each"),
        ({"target": "cat"}, "'all'"),
        ({"target": lambda z: z.sum()}, "one score a row"),
        ({"target": lambda z: 3}, "one score a row"),
        ({"images": IMAGES.numpy()}, "floating point"),
        ({"images": (IMAGES * 255).to(torch.uint8)}, "uint8"),
        ({"images": IMAGES[0, 0]}, "N x C x H x W"),
        ({"images": IMAGES[:0]}, "N x C x H x W"),
        ({"images": IMAGES / 0}, "images must be finite"),
        ({"images": IMAGES[:, :, :4, :4]}, "above 1 x 1"),
    ],
)
def test_wrong_arguments(options, message):
    model = SmallNet()
    model.spare, model.idle = nn.Conv2d(3, 3, 1).double(), nn.Conv2d(3, 2, 1).double()
    model.pair = Function(lambda m, x: (x, x))
    model.layer1.register_forward_pre_hook(lambda _m, x: (model.idle(*x), model.pair(*x), None)[2])
    with pytest.raises(ValueError, match=message):
        cam(model, **{"images": IMAGES} | options)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.net(x.repeat(2, 1, 1, 1))[: len(x)], "expected 4 x C"),  # other rows
        (lambda m, x: (m.net(x), x), "got a tuple"),
        (lambda m, x: m.net(x)[:, :, None, None], "target function"),
        (lambda m, x: m.net(x).detach(), "doesn't depend on"),
    ],
)
def test_networks_that_cannot_be_explained(forward, message):
    with pytest.raises(ValueError, match=message):
        cam(Function(forward, net=SmallNet()), IMAGES, layers="net.layer3")


@pytest.mark.parametrize("method", ["grad-cam", "eigen-cam", "score-cam"])
@pytest.mark.parametrize("flatten", [torch.flatten, lambda x, _: x.view(len(x), -1)])
def test_the_memory_order_changes_no_map(monkeypatch, method, flatten):
    """On images in channels_last order `view` raises; the maps come all the same."""
    orders, conv, tail = [], nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16 * 16, 4)

    def forward(module, x):
        orders.append(x.is_contiguous(memory_format=torch.channels_last))
        return tail(flatten(module.conv(x).relu(), 1))

    model = Function(forward, conv=conv, tail=tail)
    randomise(model)
    plain = cam(model, IMAGES, None, "conv", method)
    assert not any(orders)
    monkeypatch.setattr(gradcam, "PIXELS_FOR_CHANNELS_LAST", IMAGES[:, 0].numel())
    fast = cam(model, IMAGES, None, "conv", method)
    assert any(orders) and IMAGES.is_contiguous()
    torch.testing.assert_close(fast.maps, plain.maps, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.logits, plain.logits, rtol=0, atol=1e-12)


def test_compiled_and_wrapped_networks():
    expected = cam(SmallNet(), IMAGES, layers="layer2").maps
    whole = torch.compile(SmallNet(), backend="eager")
    in_place, part = SmallNet(), SmallNet()
    in_place.compile(backend="eager")
    part.layer2 = torch.compile(part.layer2, backend="eager")
    part.layer3.compile(backend="eager")
    for model in (whole, in_place, part, nn.DataParallel(SmallNet())):
        model(IMAGES)  # compiles
        layer = next(name for name, _ in model.named_modules() if name.endswith("layer2"))
        for one in (layer, model.get_submodule(layer)):
            torch.testing.assert_close(cam(model, IMAGES, layers=one).maps, expected)
        assert cam(model, IMAGES, method="eigen-cam").maps.shape == (4, 16, 16)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


HEAT = np.linspace(0, 1, 240, dtype=np.float32).reshape(12, 20)


def test_overlay_blends_without_wrapping():
    image = picture()
    image[:4] = 255
    colours = overlay(image, HEAT, 1).astype(np.float64)
    grey = 64 + image @ [0.299, 0.587, 0.114] / 2  # ITU-R BT.601
    for alpha in (0.0, 0.3, 0.5, 1.0):
        blended = overlay(image, HEAT, alpha)
        assert blended.dtype == np.uint8 and blended.shape == image.shape
        expected = alpha * colours + (1 - alpha) * grey[..., None]
        assert np.abs(blended - expected).max() <= 1.5


def test_colours_are_viridis_in_the_order_red_green_blue():
    ends = overlay(np.zeros((1, 2, 3), np.uint8), np.array([[0.0, 1.0]]), 1)[0].astype(int)
    assert np.abs(ends - [[68, 1, 84], [253, 231, 37]]).max() <= 2


@pytest.mark.parametrize(
    ("image", "heat"),
    [
        (picture()[:, :, 0], HEAT),
        (picture().astype(np.int64), HEAT),
        (picture() / 255, HEAT),
        (picture(), HEAT * np.nan),
        (picture(), HEAT * 2),
        (picture(), HEAT[None]),
    ],
)
def test_wrong_pictures(image, heat):
    with pytest.raises(ValueError, match="expected uint8 H x W x 3, a map and alpha"):
        overlay(image, heat)
