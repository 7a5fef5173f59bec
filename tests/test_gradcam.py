"""Grad-CAM against closed forms, numbers worked out by hand, three peer libraries and misuse."""

from __future__ import annotations

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

GRADIENT_METHODS = [name for name, method in METHODS.items() if method.uses == "gradients"]


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


# --------------------------------------------------------------------------- worked by hand
A = torch.tensor([[[[1.0, 2], [0, 1]], [[0, 1], [3, 2]]]], dtype=torch.float64)
P = torch.tensor([[[1.0, 0], [2, 1]], [[1, -1], [1, -3]]], dtype=torch.float64)
# Score S = sum(P * A) = 2 - 4 = -2: the gradient is P, with channel means 1 and -1/2.
E3, E23 = math.exp(-3), math.exp(-2 / 3)  # scores through the channels, S(A * M_c)
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
    "eigen-cam": (
        (4 * A[0, 0] + (4 + math.sqrt(32)) * A[0, 1]) / math.hypot(4, 4 + math.sqrt(32))
    ).tolist(),
    # masks [[.5, 1], [0, .5]] and [[0, 1/3], [1, 2/3]] give scores -3 and -2/3
    "score-cam": ((E3 * A[0, 0] + E23 * A[0, 1]) / (E3 + E23)).tolist(),
    # drops 2 and -4, over |S| = 2
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


def test_grad_cam_plus_plus_where_its_denominator_is_zero():
    activations = torch.tensor([[[[-3.0, 1]]]])  # adds up to -2: 2 + sum(A) G = 0 where G = 1
    gradients = torch.tensor([[[[1.0, 0.5]]]])
    expected = 0.5 / (2 - 2 * 0.5) * activations[:, 0]
    torch.testing.assert_close(METHODS["grad-cam++"].rule(activations, gradients), expected)


# --------------------------------------------------------------------------- peers
@functools.cache
def network(name: str) -> nn.Module:
    models = torchvision.models
    if name in ("resnet18", "resnet50"):
        return randomise(getattr(models, name)(num_classes=10))
    if name == "vgg11":
        with torch.device("meta"):  # the original head has 120 million weights
            model = models.vgg11(num_classes=10, init_weights=False)
        widths = [size if size == "M" else size // 4 for size in models.vgg.cfgs["A"]]
        model.features = models.vgg.make_layers(widths)
        head = [nn.Linear(128 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10)]
        model.classifier = nn.Sequential(*head)
        return randomise(model)
    if name == "densenet":
        model = models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10)
        return randomise(model)
    return randomise(models.mobilenet_v2(num_classes=10, width_mult=0.5))


# Layers for the gradient methods, and a small one after a ReLU for those that need a pass a channel
PEER_LAYERS = {
    "resnet18": (["layer2", "layer4"], "layer1"),
    "resnet50": (["layer3", "layer4"], "relu"),
    "vgg11": (["features.9", "features.15"], "features.2"),
    "densenet": (["features.denseblock2", "features.denseblock3"], "features.relu0"),
    "mobilenet": (["features.6", "features.13"], "features.0"),
}
CASES = [(name, layer) for name, (layers, _) in PEER_LAYERS.items() for layer in layers]
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


def raw(name: str, layer: str, method: str, images=X, classes=CLASSES) -> torch.Tensor:
    model = network(name)
    return cam(model, images, classes, layer, method, size="layer", normalise=False).maps


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


@pytest.mark.parametrize("name", PEER_LAYERS)
def test_agrees_with_grad_cam_on_eigen_cam(name):
    """The peer centres each channel first, which the paper does not: centre for it, up to sign."""
    pytest.importorskip("pytorch_grad_cam", reason="peer library grad-cam is not installed")
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

    kept = {}
    layer = network(name).get_submodule(PEER_LAYERS[name][0][0])
    handle = layer.register_forward_hook(lambda _m, _i, out: kept.update(out=out.detach()))
    network(name)(X)
    handle.remove()
    centred = kept["out"] - kept["out"].mean((2, 3), keepdim=True)
    ours = METHODS["eigen-cam"].rule(centred)
    theirs = torch.as_tensor(get_2d_projection(kept["out"].numpy()))
    theirs = theirs * (ours * theirs).sum((1, 2), keepdim=True).sign()
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    uncentred = METHODS["eigen-cam"].rule(kept["out"])
    torch.testing.assert_close(raw(name, PEER_LAYERS[name][0][0], "eigen-cam"), uncentred.relu())


@pytest.mark.parametrize("name", PEER_LAYERS)
def test_agrees_with_grad_cam_on_score_cam(name, monkeypatch):
    pytest.importorskip("pytorch_grad_cam", reason="peer library grad-cam is not installed")
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def half_pixel(size):  # the peer enlarges masks with aligned corners
        return nn.Upsample(size=size, mode="bilinear", align_corners=False)

    monkeypatch.setattr(nn, "UpsamplingBilinear2d", half_pixel)
    monkeypatch.setattr("tqdm.tqdm", lambda items, **_: items)
    layer, images = PEER_LAYERS[name][1], X[:, :, ::2, ::2].contiguous()
    model = copy.deepcopy(network(name))
    classes = model(images).argmax(1).tolist()
    module = model.get_submodule(layer)
    with ScoreCAM(model, [module]) as theirs:
        targets = [ClassifierOutputTarget(k) for k in classes]
        theirs.activations_and_grads(images)
        activations = theirs.activations_and_grads.activations[0].numpy()
        maps = theirs.get_cam_image(images, module, targets, activations, None)
    assert_same_map(raw(name, layer, "score-cam", images, classes), maps)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_agrees_with_torchcam(name, layer):
    methods = pytest.importorskip(
        "torchcam.methods", reason="peer library torchcam is not installed"
    )
    peers = {"grad-cam": "GradCAM", "layercam": "LayerCAM", "xgrad-cam": "XGradCAM"}
    # Not Grad-CAM++: torchcam 0.5.0 divides a copy of alpha, so its weights are sum(G^2 ReLU(G)).
    for method, peer in peers.items():
        with getattr(methods, peer)(network(name), layer) as extractor:
            maps = extractor(CLASSES, network(name)(X), normalized=False)[0]
        assert_same_map(raw(name, layer, method), maps)


def test_agrees_with_torchcam_on_score_cam_at_full_resolution():
    """It scales masks before enlarging them, the paper after: equal where nothing is enlarged."""
    methods = pytest.importorskip(
        "torchcam.methods", reason="peer library torchcam is not installed"
    )
    model = SmallNet()
    with methods.ScoreCAM(model, "layer1") as extractor:
        maps = extractor([1, 2, 3, 0], model(IMAGES), normalized=False)[0]
    ours = cam(model, IMAGES, [1, 2, 3, 0], "layer1", "score-cam", normalise=False).maps
    assert_same_map(ours, maps)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_agrees_with_captum(name, layer):
    attr = pytest.importorskip("captum.attr", reason="peer library captum is not installed")
    model = network(name)
    peer = attr.LayerGradCam(model, model.get_submodule(layer))
    theirs = peer.attribute(X, torch.tensor(CLASSES), relu_attributions=True)
    ours = raw(name, layer, "grad-cam")
    torch.testing.assert_close(ours, theirs[:, 0].detach(), rtol=1e-10, atol=1e-14)


# --------------------------------------------------------------------------- what is computed
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
@pytest.mark.parametrize("layers", [None, ["layer2", "layer3"]], ids=["one layer", "two layers"])
def test_large_batches_in_parts_give_the_same(monkeypatch, target, layers):
    model, images = SmallNet(), draw(11, 3, 16, 16)
    whole = cam(model, images, target, layers, normalise=False)
    monkeypatch.setattr(gradcam, "IMAGES_AT_ONCE", 4)
    sizes = []
    handle = model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    parts = cam(model, images, target, layers, normalise=False)
    handle.remove()
    assert sizes == [4, 4, 3]
    assert (whole.targets is None) == (parts.targets is None)
    if whole.targets is not None:
        assert torch.equal(parts.targets, whole.targets)
    torch.testing.assert_close(parts.logits, whole.logits)
    for name in layers or [None]:
        a, b = (r.maps if name is None else r.maps[name] for r in (parts, whole))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        a, b = (r.all_zero if name is None else r.all_zero[name] for r in (parts, whole))
        assert torch.equal(a, b)


def test_too_few_targets_for_a_large_batch(monkeypatch):
    monkeypatch.setattr(gradcam, "IMAGES_AT_ONCE", 4)
    with pytest.raises(ValueError, match="one for each of 11 images"):
        cam(SmallNet(), draw(11, 3, 16, 16), [0] * 8)


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
    with pytest.raises(ValueError, match=r"Candidates: features, .*features\.18"):
        default_layer(torchvision_like_vgg())
    with pytest.raises(ValueError, match="pass the target layer"):
        default_layer(nn.ModuleList([SmallNet(), SmallNet()]))


def torchvision_like_vgg() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.vgg11(init_weights=False)


def test_a_new_method_is_one_rule(monkeypatch):
    rule = gradcam.Method(lambda activations, gradients: activations.sum(1))
    monkeypatch.setitem(METHODS, "activation-sum", rule)
    maps = cam(SmallNet(), IMAGES, method="activation-sum", size="layer", normalise=False).maps
    model = SmallNet()
    features = model.layer3(model.layer2(model.layer1(IMAGES))).sum(1).detach()
    torch.testing.assert_close(maps, features)


# --------------------------------------------------------------------------- known failures
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


def test_densenet_features_before_an_in_place_relu():
    model = network("densenet")
    features = model.features(X).detach().requires_grad_()
    logits = model.classifier(F.relu(features).mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits[range(2), CLASSES].sum(), features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    torch.testing.assert_close(raw("densenet", "features", "grad-cam"), expected)


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


def assert_same_state(before: dict, after: dict) -> None:
    for key in ("training", "hooks", "requires_grad"):
        assert before[key] == after[key], key
    for old, new in zip(before["grad"], after["grad"], strict=True):
        assert (old is None) == (new is None) and (old is None or torch.equal(old, new))
    for key, old in before["tensors"].items():
        assert torch.equal(old, after["tensors"][key]), key


def used_network() -> nn.Module:
    """In the middle of a training: mixed modes, some gradients, some frozen parameters."""
    model = SmallNet().train()
    model.layer2.eval()
    model(IMAGES).sum().backward()
    model.fc.weight.grad = None
    model.layer1.requires_grad_(False)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method):
    model = used_network()
    before = state(model)
    rng, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    images = IMAGES.clone().requires_grad_()
    result = cam(model, images, None, ["layer1", "layer3"], method)
    assert not any(maps.requires_grad for maps in result.maps.values())
    assert not result.logits.requires_grad
    expected = cam(copy.deepcopy(model).eval(), IMAGES, None, ["layer1", "layer3"], method)
    torch.testing.assert_close(result.maps, expected.maps)
    assert_same_state(before, state(model))
    assert images.grad is None and torch.is_grad_enabled() == grad_mode
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["trunk", "tail", "target"])
def test_nothing_is_left_behind_after_an_exception(method, where):
    def fail(*_):
        raise KeyError("stop")

    model, target = used_network(), None
    if where == "target":
        target = fail
    else:
        stage = model.layer1 if where == "trunk" else model.fc
        stage.register_forward_pre_hook(fail)
    before = state(model)
    with pytest.raises(KeyError, match="stop"):
        cam(model, IMAGES, target, ["layer2", "layer3"], method)
    assert_same_state(before, state(model))
    assert torch.is_grad_enabled()


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


def test_parameters_get_no_gradient_work():
    model, asked = SmallNet().train(), []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: asked.append(1))
    cam(model, IMAGES, layers="layer1")
    assert not asked


def test_frozen_no_grad_and_inference_mode():
    model = SmallNet()
    expected = cam(model, IMAGES, layers="layer2").maps
    frozen = SmallNet().requires_grad_(False)
    torch.testing.assert_close(cam(frozen, IMAGES, layers="layer2").maps, expected)
    with torch.no_grad():
        torch.testing.assert_close(cam(model, IMAGES, layers="layer2").maps, expected)
    with torch.inference_mode():
        maps = cam(model, IMAGES.clone(), layers=model.layer2).maps
        made_here = SmallNet()
        maps_made_here = cam(made_here, IMAGES.clone(), layers=made_here.layer2).maps
    torch.testing.assert_close(maps.clone(), expected)
    torch.testing.assert_close(maps_made_here.clone(), expected)


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
    late = Function(lambda self, x: self.model(x).detach(), model=model)
    with pytest.raises(ValueError, match="doesn't depend on"):
        cam(late, IMAGES, layers="model.layer3")


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
    model = SmallNet()
    with torch.no_grad():
        model.fc.weight[0] = -model.fc.weight[0].abs()
        model.fc.weight[1] = 0
    for method in ("grad-cam", "layercam", "xgrad-cam", "grad-cam++", "hirescam"):
        result = cam(model, IMAGES, "all", method=method)
        assert torch.isfinite(result.maps).all()
        assert result.all_zero[:, :2].all() and not result.all_zero[:, 2:].all()
        assert torch.equal(result.all_zero, result.maps.amax((2, 3)) == 0)
    dead = SmallNet()
    with torch.no_grad():
        dead.layer3[1].bias.fill_(-1e9)
    for method in METHODS:
        result = cam(dead, IMAGES, method=method)
        assert torch.isfinite(result.maps).all() and result.all_zero.all()
        assert result.maps.abs().max() == 0


def test_nan_is_an_error():
    model = SmallNet()
    images = IMAGES.clone()
    images[1, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="images must be .* NaN"):
        cam(model, images)
    broken = SmallNet()
    with torch.no_grad():
        broken.fc.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="logits"):
        cam(broken, IMAGES)
    overflow = Function(
        lambda self, x: torch.stack([self.layer(x).sum((1, 2, 3)) * 1e300 * 1e10] * 2, 1) * 0,
        layer=nn.Conv2d(3, 2, 3).double(),
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
    ("target", "error", "message"),
    [
        (5, ValueError, "0 to 4"),
        (-1, ValueError, "0 to 4"),
        ([0, 1, 2, 9], ValueError, "0 to 4"),
        ([0, 1, 2], ValueError, "4 images"),
        ([[0], [1], [2], [3]], ValueError, "4 images"),
        (1.0, ValueError, "a class or one for each"),
        (True, ValueError, "a class or one for each"),
        ("cat", ValueError, "'all'"),
        (lambda z: z.sum(), ValueError, "one score a row"),
        (lambda z: 3, ValueError, "one score a row"),
    ],
)
def test_wrong_targets(target, error, message):
    with pytest.raises(error, match=message):
        cam(SmallNet(), IMAGES, target)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES.numpy(), ValueError, "floating point"),
        ((IMAGES * 255).to(torch.uint8), ValueError, "uint8"),
        (IMAGES[0, 0], ValueError, "N x C x H x W"),
        (IMAGES[:0], ValueError, "N x C x H x W"),
    ],
)
def test_wrong_images(images, error, message):
    with pytest.raises(error, match=message):
        cam(SmallNet(), images)


def test_wrong_layers_methods_and_outputs():
    model = SmallNet()
    with pytest.raises(ValueError, match="model must be a torch network"):
        cam(IMAGES, model)
    with pytest.raises(ValueError, match=r"'layer9' is no layer.*layer1, .*layer3\.0"):
        cam(model, IMAGES, layers="layer9")
    with pytest.raises(ValueError, match="Sequential is no layer of this model"):
        cam(model, IMAGES, layers=SmallNet().layer3)
    with pytest.raises(ValueError, match=r"\[\] is no layer"):
        cam(model, IMAGES, layers=[])
    with pytest.raises(ValueError, match="convolutional layer"):
        cam(model, IMAGES, layers="fc")
    with pytest.raises(ValueError, match="above 1 x 1"):
        cam(model, IMAGES[:, :, :4, :4], layers="layer3")
    doubled = Function(lambda self, x: self.net(x.repeat(2, 1, 1, 1))[: len(x)], net=SmallNet())
    with pytest.raises(ValueError, match="expected 4 x C"):  # rows that are no longer the images
        cam(doubled, IMAGES, layers="net.layer3")
    with pytest.raises(ValueError, match="grad-cam, grad-cam"):
        cam(model, IMAGES, method="gradcam")
    with pytest.raises(ValueError, match="'input' or 'layer'"):
        cam(model, IMAGES, size="full")
    model.spare = nn.Conv2d(3, 3, 1).double()
    with pytest.raises(ValueError, match=r"never ran \['spare'\]"):
        cam(model, IMAGES, layers="spare")
    idle = Function(
        lambda self, x: (self.side(x), self.net(x))[1], net=SmallNet(), side=nn.Conv2d(3, 2, 1)
    ).double()
    with pytest.raises(ValueError, match="doesn't depend on 'side'"):
        cam(idle, IMAGES, layers=["side", "net.layer3"])
    with pytest.raises(ValueError, match="doesn't depend on 'side'"):
        cam(idle, IMAGES, layers="side")
    pair = Function(lambda self, x: (self.net(x), x), net=SmallNet())
    with pytest.raises(ValueError, match="got a tuple"):
        cam(pair, IMAGES, layers="net.layer3")
    dense = Function(lambda self, x: self.net(x)[:, :, None, None], net=SmallNet())
    with pytest.raises(ValueError, match="target function"):
        cam(dense, IMAGES, layers="net.layer3")
    cam(dense, IMAGES, lambda z: z[:, 1, 0, 0], "net.layer3")


@pytest.mark.parametrize("method", ["grad-cam", "eigen-cam"])
def test_the_memory_order_changes_no_map(monkeypatch, method):
    orders = []

    def note(module, x):
        orders.append(x.is_contiguous(memory_format=torch.channels_last))
        return module.net(x)

    model = Function(note, net=SmallNet())
    plain = cam(model, IMAGES, None, "net.layer2", method)
    assert not any(orders)
    monkeypatch.setattr(gradcam, "PIXELS_FOR_CHANNELS_LAST", IMAGES[:, 0].numel())
    orders.clear()
    fast = cam(model, IMAGES, None, "net.layer2", method)
    assert orders[0]
    torch.testing.assert_close(fast.maps, plain.maps, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast.logits, plain.logits, rtol=0, atol=1e-12)
    assert IMAGES.is_contiguous()


@pytest.mark.parametrize("method", ["grad-cam", "score-cam"])
def test_a_network_that_flattens_with_view(monkeypatch, method):
    """On images in channels_last order `view` raises; the maps come all the same."""
    conv = nn.Conv2d(3, 6, 3, padding=1)
    tail = nn.Linear(6 * 16 * 16, 4)
    randomise(nn.ModuleList([conv, tail]))
    model = Function(
        lambda m, x: m.tail(m.conv(x).relu().view(len(x), -1)), conv=conv, tail=tail
    ).double()
    plain = cam(model, IMAGES, None, "conv", method)
    monkeypatch.setattr(gradcam, "PIXELS_FOR_CHANNELS_LAST", 1)
    torch.testing.assert_close(cam(model, IMAGES, None, "conv", method).maps, plain.maps)


def test_compiled_and_wrapped_networks(tmp_path):
    model = SmallNet()
    expected = cam(model, IMAGES, layers=["layer2", "layer3"]).maps

    def same(wrapped: nn.Module, layers: list) -> None:
        wrapped(IMAGES)  # compiles
        torch.testing.assert_close(cam(wrapped, IMAGES, layers=layers).maps, expected)

    same(torch.compile(SmallNet(), backend="eager"), ["layer2", "layer3"])
    wrapped = torch.compile(model, backend="eager")
    same(wrapped, [model.layer2, wrapped.layer3])
    in_place = SmallNet()
    in_place.compile(backend="eager")
    same(in_place, ["layer2", "layer3"])
    part = SmallNet()
    part.layer2 = torch.compile(part.layer2, backend="eager")
    part.layer3.compile(backend="eager")
    same(part, ["layer2", "layer3"])
    same(nn.DataParallel(SmallNet()), ["layer2", "layer3"])

    # Compiled for just the conditions in which a map is computed: nothing forces a recompilation.
    ready = SmallNet().requires_grad_(False)
    ready.compile(backend="eager")
    with torch.no_grad():
        ready(IMAGES)
    eigen = cam(model, IMAGES, method="eigen-cam").maps
    torch.testing.assert_close(cam(ready, IMAGES, method="eigen-cam").maps, eigen)
    dist = torch.distributed
    if dist.is_available() and dist.is_gloo_available():
        dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            same(nn.parallel.DistributedDataParallel(SmallNet()), ["layer2", "layer3"])
        finally:
            dist.destroy_process_group()


def test_devices_dtypes_and_memory_formats():
    model = SmallNet()
    expected = cam(model, IMAGES).maps
    torch.testing.assert_close(cam(model, IMAGES.float()).maps, expected, rtol=1e-4, atol=1e-5)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = IMAGES.to(memory_format=torch.channels_last)
    torch.testing.assert_close(cam(last, images).maps, expected)


# --- Pictures ----------------------------------------------------------------------------------


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


HEAT = np.linspace(0, 1, 240, dtype=np.float32).reshape(12, 20)


def test_overlay_blends_without_wrapping():
    image = picture()
    image[:4] = 255
    colours = overlay(image, HEAT, 1).astype(np.float64)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        blended = overlay(image, HEAT, alpha)
        assert blended.dtype == np.uint8 and blended.shape == image.shape
        expected = alpha * colours + (1 - alpha) * image
        assert np.abs(blended - expected).max() <= 0.5 + 1e-6
    assert np.array_equal(overlay(image, HEAT, 0), image)


def test_colours_are_viridis_in_the_order_red_green_blue():
    ends = overlay(np.zeros((1, 2, 3), np.uint8), np.array([[0.0, 1.0]]), 1)[0].astype(int)
    assert np.abs(ends - [[68, 1, 84], [253, 231, 37]]).max() <= 2


def test_pictures_accept_every_layout():
    image = picture()
    expected = overlay(image, HEAT)
    as_float = image / np.float32(255)
    for variant in (
        image.transpose(2, 0, 1),
        torch.from_numpy(image),
        as_float.astype(np.float64),
        torch.from_numpy(as_float.transpose(2, 0, 1).copy()),
    ):
        for heat in (HEAT, torch.from_numpy(HEAT), HEAT.astype(np.float64)):
            assert np.array_equal(overlay(variant, heat), expected)
    assert overlay(image, HEAT[::4, ::4]).shape == image.shape  # the map is enlarged


@pytest.mark.parametrize(
    ("image", "heat"),
    [
        (picture()[:, :, 0], HEAT),
        (picture()[..., None], HEAT),
        (picture().astype(np.int64), HEAT),
        (picture().astype(np.float32), HEAT),
        (picture() / 255 - 0.5, HEAT),
        (np.full((12, 20, 3), np.nan), HEAT),
        (picture(), HEAT * 2),
        (picture(), HEAT - 0.5),
        (picture(), HEAT * np.nan),
        (picture(), HEAT[None]),
    ],
)
def test_wrong_pictures(image, heat):
    with pytest.raises(ValueError, match=r"expected H x W x 3|must be uint8 or lie in \[0, 1\]"):
        overlay(image, heat)
