"""Pruning, quantization, and the size of what is left."""

from __future__ import annotations

import copy
import gzip
import sys
import warnings

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from helpers import compression, data, evaluation, models


def small_network(seed: int = 0) -> models.ResNet:
    """A ResNet-18 of an eighth of its width whose batch-norm statistics aren't the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = models.build_model("resnet18", num_classes=4, width=0.125)
        with torch.no_grad():
            for _ in range(10):
                network(torch.randn(8, 3, 16, 16))
    return network.eval()


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# --- Pruning -----------------------------------------------------------------------------------


def test_the_smallest_weights_of_the_whole_network_are_masked() -> None:
    model = models.build_model("resnet18", num_classes=10, width=0.125)
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    before = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    compression.prune_weights(model, 0.8)
    compression.make_permanent(model)
    after = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    gone = (after == 0) & (before > 0)
    assert abs(gone.double().mean() - 0.8) < 1e-4
    assert before[gone].max() <= after[after > 0].min()  # a weight can be drawn as exactly 0
    assert torch.equal(after[~gone], before[~gone])


def test_channels_with_the_smallest_filters_go() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    )
    with torch.no_grad():
        for row, size in enumerate((3.0, 1.0, 4.0, 2.0)):
            model[0].weight[row] = size
            model[4].weight[:, row] = size
    compression.prune_channels(model, 0.5, 8)
    assert model[0].weight[:, 0, 0, 0].tolist() == [3.0, 4.0]
    assert model[4].weight.shape == (2, 2)


def test_a_filters_size_is_the_sum_of_its_absolute_weights() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 3, bias=False),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(2, 2),
    )
    with torch.no_grad():
        model[0].weight[0] = 0.4  # 27 weights: 10.8 in all, their squares 4.3
        model[0].weight[1] = 0
        model[0].weight[1, 0, 0, 0] = -6  # one weight: 6 in all, its square 36
        model[3].weight.fill_(1)
    compression.prune_channels(model, 0.5, 8)
    assert torch.equal(model[0].weight, torch.full((1, 3, 3, 3), 0.4))


# --- Quantization ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return compression.quantize(small_network(), images(130))


def test_a_quantized_network_says_nearly_the_same(quantized: nn.Module) -> None:
    with torch.no_grad():
        expected, found = small_network()(images(50, 2)), quantized(images(50, 2))
    error = (found - expected).square().mean() / expected.var()
    assert 0 < error < 0.05
    assert (found.argmax(1) == expected.argmax(1)).double().mean() > 0.9


def test_the_activations_range_comes_from_the_images(quantized: nn.Module) -> None:
    """All images take part, not only the first batch: the last one here is much brighter."""
    bright = torch.cat([images(128), 20 * images(2, 3)])
    other = compression.quantize(small_network(), bright)
    assert other.conv1_input_scale_0 > 5 * quantized.conv1_input_scale_0


def test_weights_are_the_nearest_of_256_values() -> None:
    layer = nn.Conv2d(3, 4, 3, bias=False)
    quantized = compression.quantize(nn.Sequential(layer), images(2))
    stored = compression.stored_tensors(quantized)
    assert stored["0.weight"].dtype == torch.int8
    scale = stored["0.weight.scale"].view(-1, 1, 1, 1)
    error = (stored["0.weight"] * scale - layer.weight.detach()).abs()
    assert (error <= 0.5001 * scale).all()
    assert scale.max() <= layer.weight.abs().max() / 120


def test_quantizing_leaves_the_network_as_it_was_and_is_silent() -> None:
    network = small_network().train()
    before = copy.deepcopy(network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = compression.quantize(network, images(4))
        quantized(images(2))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_quantized_network_is_evaluated_and_timed_on_the_cpu(quantized: nn.Module) -> None:
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    split = data.Split(pixels, torch.zeros(12, dtype=torch.int64))
    logits = evaluation.predict(quantized, split, torch.zeros(3), torch.ones(3))
    assert logits.shape == (12, 4)
    assert evaluation.latency(quantized, 16, 2, repeats=1).median > 0


@pytest.mark.parametrize("missing", ["engine", "module"])
def test_where_quantization_is_missing_the_error_says_so(missing: str, monkeypatch) -> None:
    if missing == "engine":
        backend = type("Backend", (), {"supported_engines": ["none"], "engine": "none"})()
        monkeypatch.setattr(torch.backends, "quantized", backend)
    else:
        monkeypatch.setitem(sys.modules, "torch.ao.quantization.quantize_fx", None)
    with pytest.raises(compression.QuantizationUnavailable, match="no 8-bit integers"):
        compression.quantize(small_network(), images(2))


# --- What is left ------------------------------------------------------------------------------


def test_stored_bytes_are_those_of_the_file(quantized: nn.Module) -> None:
    network = small_network()
    content = save_safetensors({n: v.contiguous() for n, v in network.state_dict().items()})
    plain, compressed = compression.stored_bytes(network)
    assert plain == len(content)
    assert compressed == len(gzip.compress(content, 6, mtime=0))
    assert 3 < plain / compression.stored_bytes(quantized)[0] < 4


def test_zeros_are_stored_but_compress() -> None:
    network = small_network()
    plain, compressed = compression.stored_bytes(network)
    compression.prune_weights(network, 0.9)
    compression.make_permanent(network)
    pruned = compression.stored_bytes(network)
    assert pruned[0] == plain
    assert pruned[1] < 0.3 * compressed


def test_a_quantized_networks_file_holds_all_its_weights(quantized: nn.Module) -> None:
    network = small_network()
    stored = load_safetensors(save_safetensors(compression.stored_tensors(quantized)))
    integers = sum(v.numel() for n, v in stored.items() if v.dtype == torch.int8 and v.ndim > 1)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert integers == sum(layer.weight.numel() for layer in layers)
    biases = sum(v.numel() for n, v in stored.items() if "bias" in n or n.endswith("params.1"))
    assert biases == sum(len(layer.weight) for layer in layers)  # of folded batch norms, and fc's
