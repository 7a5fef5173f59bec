"""Plant deliberate faults in helpers/, one at a time, and see whether the tests notice.

    python -m benchmarks.faults              all of them, two at a time (`make faults`)
    python -m benchmarks.faults gradcam      those in one module
    python -m benchmarks.faults notebooks    those that a notebook has to notice

Each fault is one changed place, of the kind that a tired person makes: an off-by-one, a lost term,
a flipped sign, a check that is gone. It is planted in a copy of the repository, where the tests of
its module run until one fails; a fault that gets past these meets the other tests but the slowest
and the notebooks. The tests of the modules run first without any fault and have to pass.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from helpers.config import ROOT

WORKERS = 2
SECONDS_ALLOWED = 900
# The tests of a module are in tests/test_<module>.py; these meet more.
MORE_TESTS = {"training": ("resume", "runs", "starts"), "runs": ("resume", "starts")}
# Too slow to meet each fault, or not about helpers/.
LEFT_OUT = ("executors", "data_parallel", "series", "report", "faults")


@dataclass(frozen=True)
class Fault:
    """What a fault breaks, and the text in helpers/<module>.py that it replaces by another."""

    module: str
    breaks: str
    right: str
    wrong: str

    def planted(self, source: str) -> str:
        """Return the module's source with the fault.

        Raises ValueError unless the text to replace is there exactly once.
        """
        found = source.count(self.right)
        if found != 1:
            raise ValueError(
                f"{self.breaks!r}: {self.right!r} is {found} times in helpers/{self.module}.py; "
                "expected once. Update the fault to the code as it is now."
            )
        return source.replace(self.right, self.wrong)


def _faults(module: str, *entries: tuple[str, str, str]) -> tuple[Fault, ...]:
    return tuple(Fault(module, *entry) for entry in entries)


FAULTS = (
    *_faults(
        "models",
        (
            "the shortcut of a basic block is dropped",
            "out = self.bn2(self.conv2(out))\n        if self.residual:",
            "out = self.bn2(self.conv2(out))\n        if False:",
        ),
        (
            "the shortcut of a bottleneck is dropped",
            "out = self.bn3(self.conv3(out))\n        if self.residual:",
            "out = self.bn3(self.conv3(out))\n        if False:",
        ),
        (
            "a bottleneck's last batch norm is missing",
            "out = self.bn3(self.conv3(out))",
            "out = self.conv3(out)",
        ),
        (
            "a bottleneck's stride sits on the 1x1 convolution",
            "self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)\n"
            "        self.bn1 = nn.BatchNorm2d(channels)\n"
            "        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)",
            "self.conv1 = nn.Conv2d(in_channels, channels, 1, stride, bias=False)\n"
            "        self.bn1 = nn.BatchNorm2d(channels)\n"
            "        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)",
        ),
        (
            "the first stage halves the resolution, too",
            "stride = 2 if i > 0 and j == 0 else 1",
            "stride = 2 if j == 0 else 1",
        ),
        (
            "weights are drawn by fan-in",
            'mode="fan_out"',
            'mode="fan_in"',
        ),
        (
            "maximum in place of average pooling",
            "self.avgpool = nn.AdaptiveAvgPool2d(1)",
            "self.avgpool = nn.AdaptiveMaxPool2d(1)",
        ),
        (
            "a parameter-free shortcut shifts the channels",
            "(0, 0, 0, 0, 0, self.new_channels)",
            "(0, 0, 0, 0, self.new_channels, 0)",
        ),
        (
            "a shortcut averages pixels in place of taking one",
            "F.avg_pool2d(x, 1, stride)",
            "F.avg_pool2d(x, stride, stride)",
        ),
        (
            "64-pixel images get the ImageNet stem",
            'return "cifar" if image_size <= LARGEST',
            'return "cifar" if image_size < LARGEST',
        ),
        (
            "the ImageNet stem has no pooling",
            "nn.MaxPool2d(3, stride=2, padding=1)",
            "nn.Identity()",
        ),
        (
            "the blocks of ResNet-34's stages are swapped",
            '"resnet34": (BasicBlock, (3, 4, 6, 3))',
            '"resnet34": (BasicBlock, (3, 6, 4, 3))',
        ),
        (
            "dropout falls on the logits",
            "return self.fc(self.dropout(x))",
            "return self.dropout(self.fc(x))",
        ),
    ),
    *_faults(
        "data",
        (
            "validation images are trained on",
            "split(pool.train_images, pool.train_labels, kept, SPLIT_SEED + 1)",
            "split(pool.train_images, pool.train_labels, np.arange(len(pool.train_labels)), 1)",
        ),
        (
            "the two parts of a cut overlap",
            "return part, np.setdiff1d(np.arange(len(labels)), part)",
            "return part, np.arange(len(labels))",
        ),
        (
            "classes come one after the other",
            "(np.arange(len(members)) + 0.5) / len(members)",
            "np.arange(len(members)) + 1e6 * label",
        ),
        (
            "the fingerprint forgets the test labels",
            "self.test_images, self.test_labels)\n\n\ndef _split_pool",
            "self.test_images)\n\n\ndef _split_pool",
        ),
        (
            "images shrink by picking pixels",
            "method = cv2.INTER_AREA if shrinking",
            "method = cv2.INTER_NEAREST if shrinking",
        ),
        (
            "blue and red change places",
            "return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)",
            "return pixels",
        ),
        (
            "photographs lie on their side",
            "image = ImageOps.exif_transpose(image)",
            "image = image.copy()",
        ),
        (
            "transparent pixels turn black",
            'Image.new("RGBA", image.size, "white")',
            'Image.new("RGBA", image.size, "black")',
        ),
        (
            "16-bit images are cut off at 255",
            "    largest = 65535\n    if floating",
            "    largest = 255\n    if floating",
        ),
        (
            "the last crop is never taken",
            "torch.randint(0, 2 * padding + 1, (count, 2)",
            "torch.randint(0, max(1, 2 * padding), (count, 2)",
        ),
        (
            "flips don't alternate",
            "generator=first) + epoch) % 2 == 1",
            "generator=first)) % 2 == 1",
        ),
        (
            "the seed of an epoch's choices is ignored",
            "torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)",
            "torch.Generator().manual_seed(epoch)",
        ),
        (
            "every epoch has the same order",
            "torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)",
            "torch.Generator().manual_seed(seed)",
        ),
        (
            "digits are mirrored",
            "if augmentation.flip and mirror:",
            "if augmentation.flip:",
        ),
        (
            "the mean is added, not subtracted",
            "(-mean / deviation)",
            "(mean / deviation)",
        ),
        (
            "normalisation by the test split",
            "return channel_statistics(self.train.images)",
            "return channel_statistics(self.test.images)",
        ),
        (
            "cutout hangs from its centre",
            "first = centres - side // 2",
            "first = centres",
        ),
        (
            "a crop's rows and columns change places",
            "self._windows[chosen, shift[:, 0], shift[:, 1]]",
            "self._windows[chosen, shift[:, 1], shift[:, 0]]",
        ),
        (
            "mixup leaves the labels as they are",
            "(1 - share) * labels.flip(0)",
            "(1 - share) * labels",
        ),
        (
            "every process trains on the first one's share",
            "places[pair % self.ranks == self.rank]",
            "places[pair % self.ranks == 0]",
        ),
        (
            "subsets aren't nested",
            "None if part is None else part[:count]",
            "None if part is None else part[-count:]",
        ),
        (
            "the loader is made of validation images",
            "return kind(\n        dataset.train,",
            "return kind(\n        dataset.validation,",
        ),
        (
            "saturation weighs colours in the wrong order",
            "(0.299, 0.587, 0.114)",
            "(0.114, 0.587, 0.299)",
        ),
        (
            "pickles in a cache are executed",
            'np.load(cache / f"{name}.npy", allow_pickle=False)',
            'np.load(cache / f"{name}.npy", allow_pickle=True)',
        ),
        (
            "a changed image file goes unnoticed",
            "{stat.st_size} {stat.st_mtime_ns}",
            "{stat.st_size}",
        ),
        (
            "a damaged cache is believed",
            "if pool.fingerprint != expected:",
            "if False:",
        ),
    ),
    *_faults(
        "training",
        (
            "the triangular schedule is one step late",
            "min((step + 1) / rise,",
            "min(step / rise,",
        ),
        (
            "the step schedule falls at four fifths",
            "(step >= 0.75 * steps)",
            "(step >= 0.8 * steps)",
        ),
        (
            "onecycle ends too high",
            "cosine(peak, peak / 25e4,",
            "cosine(peak, peak / 25,",
        ),
        (
            "the learning rate scales in proportion to the batch",
            "self.learning_rate * math.sqrt(share)",
            "self.learning_rate * share",
        ),
        (
            "no weight decay",
            '"weight_decay": recipe.weight_decay}',
            '"weight_decay": 0.0}',
        ),
        (
            "no Nesterov momentum",
            "nesterov=recipe.nesterov, **common",
            "nesterov=False, **common",
        ),
        (
            "AdamW in place of Adam",
            'torch.optim.Adam if recipe.optimizer == "adam"',
            'torch.optim.AdamW if recipe.optimizer == "adam"',
        ),
        (
            "no label smoothing",
            "label_smoothing=self.recipe.label_smoothing",
            "label_smoothing=0.0",
        ),
        (
            "the schedule isn't applied",
            'group["lr"] = rate * group.get("scale", 1.0)',
            "pass",
        ),
        (
            "all parts of a network learn at the same rate",
            'group["lr"] = rate * group.get("scale", 1.0)',
            'group["lr"] = rate',
        ),
        (
            "gradients pile up",
            "self.optimizer.zero_grad(set_to_none=True)",
            "pass",
        ),
        (
            "the network trains in evaluation mode",
            "self.model.train()\n        for module",
            "self.model.eval()\n        for module",
        ),
        (
            "frozen batch norm goes on averaging",
            "not module.weight.requires_grad:\n                module.eval()",
            "not module.weight.requires_grad:\n                pass",
        ),
        (
            "the test split is read for early stopping",
            'device = device or torch.device("cpu")\n    check("epochs"',
            'device = device or torch.device("cpu")\n'
            "    dataset = __import__('dataclasses').replace(dataset, validation=dataset.test)\n"
            '    check("epochs"',
        ),
        (
            "the best weights aren't put back",
            "self.model.load_state_dict(self.best)",
            "pass",
        ),
        (
            "patience is one epoch too long",
            "self.epoch - self.best_epoch >= self.patience",
            "self.epoch - self.best_epoch > self.patience",
        ),
        (
            "the best epoch is the one with the highest loss",
            "if validation_loss < self.best_loss:",
            "if validation_loss > self.best_loss or self.best_epoch == 0:",
        ),
        (
            "training accuracy is a share of all images",
            "train_accuracy=correct / seen",
            "train_accuracy=correct / len(self.dataset.train)",
        ),
        (
            "a loss that isn't finite goes unnoticed",
            "if math.isfinite(bad_step):",
            "if False:",
        ),
        (
            "the seed is ignored",
            "torch.manual_seed(self.seed + self.rank)",
            "torch.manual_seed(0)",
        ),
        (
            "a resumed run loses the optimizer's momentum",
            'self.optimizer.load_state_dict(state["optimizer"])',
            "pass",
        ),
        (
            "a resumed run draws other dropout",
            '_restore_generators(state["generators"][self.rank], self.device)',
            "pass",
        ),
        (
            "a resumed run loses the epoch's sums",
            'self.sums = (state["sums"] * shares).to(self.device)',
            "self.sums = self._new_sums()",
        ),
        (
            "a checkpoint loses the best weights",
            '"best": self.best,',
            '"best": None,',
        ),
        (
            "a checkpoint loses the best loss",
            'self.best_loss = state["best_loss"]',
            "pass",
        ),
        (
            "a checkpoint of another run is taken",
            "if found != identity:",
            "if False:",
        ),
        (
            "a damaged checkpoint is taken",
            "if hashlib.sha256(payload).digest() != content[start : start + 32]:",
            "if False:",
        ),
        (
            "code in a checkpoint is executed",
            'map_location="cpu", weights_only=True',
            'map_location="cpu", weights_only=False',
        ),
        (
            "files are written in place",
            'path.with_name(f".{path.name}.{os.getpid()}.tmp")\n    try:\n        with open',
            "path\n    try:\n        with open",
        ),
        (
            "the global generator stays moved",
            "with torch.random.fork_rng(devices=generators), cudnn,",
            "with cudnn,",
        ),
        (
            "the published rate of a recipe is changed",
            '"fast",\n            "sgd",\n            0.2,',
            '"fast",\n            "sgd",\n            0.02,',
        ),
    ),
    *_faults(
        "gradcam",
        ("maps aren't rectified", "here = here.relu()", "here = here"),
        (
            "the gradient's sign is flipped",
            "rule(activation, _wide(gradient))",
            "rule(activation, -_wide(gradient))",
        ),
        ("a hook isn't removed", "handle.remove()", "pass"),
        (
            "Grad-CAM adds gradients up",
            "_weighted(gradients.mean((2, 3)), activations)",
            "_weighted(gradients.sum((2, 3)), activations)",
        ),
        (
            "the least likely class is explained",
            "chosen = output.detach().argmax(1)",
            "chosen = output.detach().argmin(1)",
        ),
        (
            "all images are explained for the first one's class",
            "rows.gather(1, chosen[index, None])",
            "rows[:, chosen[0]][:, None]",
        ),
        ("training mode isn't put back", "module.training = True", "pass"),
        (
            "maps are made in training mode",
            "for module in training:\n                module.training = False",
            "for module in training:\n                pass",
        ),
        ("parameters stay frozen", "tensor.requires_grad_(True)", "pass"),
        ("Grad-CAM++ weighs wrongly", "denominator = 2 + ", "denominator = 1 + "),
        (
            "LayerCAM takes negative gradients",
            "gradients.relu(), activations)\n\n\ndef xgrad_cam",
            "gradients, activations)\n\n\ndef xgrad_cam",
        ),
        ("XGrad-CAM doesn't divide", "attributed / total)", "attributed)"),
        (
            "Eigen-CAM has the other sign",
            "maps.sum(1, keepdim=True) < 0",
            "maps.sum(1, keepdim=True) > 0",
        ),
        (
            "Score-CAM without softmax",
            "torch.cat(scores).softmax(0)",
            "torch.cat(scores)",
        ),
        (
            "Ablation-CAM the other way round",
            "(whole - torch.cat(scores))",
            "(torch.cat(scores) - whole)",
        ),
        (
            "Ablation-CAM turns around for negative logits",
            "torch.where(whole == 0, 1, whole.abs())",
            "torch.where(whole == 0, 1, whole)",
        ),
        ("maps are enlarged from corner to corner", "align_corners=False", "align_corners=True"),
        ("the first stage is the default layer", "-int(match[1])", "int(match[1])"),
        (
            "guided backpropagation isn't guided",
            "gradient.clamp(min=0)",
            "gradient",
        ),
        ("all-zero maps aren't told", "here.amax((-2, -1)) == 0", "here.amax((-2, -1)) < 0"),
        (
            "a module that runs twice is explained at its first call",
            "kept[name] = output.clone()",
            "kept[name] = kept.get(name, output).clone()",
        ),
        (
            "later operations in place change the activations",
            "return kept[name].clone() if record else None",
            "return kept[name] if record else None",
        ),
        (
            "an overlay shows the opacity of the image",
            "cv2.addWeighted(colours, alpha, picture, 1 - alpha, 0)",
            "cv2.addWeighted(picture, alpha, colours, 1 - alpha, 0)",
        ),
        (
            "heat is shown with blue for red",
            "return cv2.cvtColor(cv2.applyColorMap(levels, colormap), cv2.COLOR_BGR2RGB)",
            "return cv2.applyColorMap(levels, colormap)",
        ),
    ),
    *_faults(
        "cam_metrics",
        ("the least important pixels go first", "descending=True", "descending=False"),
        (
            "ties are broken by position",
            "torch.rand(flat.shape, generator=generator).argsort(1)",
            "torch.arange(flat.shape[1]).repeat(len(flat), 1)",
        ),
        (
            "heat is a share of the mask",
            "_placed((maps * masks).sum((1, 2)) / maps.sum((1, 2))",
            "_placed((maps * masks).sum((1, 2)) / masks.sum((1, 2))",
        ),
        ("an all-zero map counts", "torch.where(zero | empty,", "torch.where(empty,"),
        ("an empty mask counts", "torch.where(zero | empty,", "torch.where(zero,"),
        (
            "the intersection over the intersection",
            "union = (region | masks).sum((1, 2))",
            "union = (region & masks).sum((1, 2))",
        ),
        (
            "a mosaic's cells are read backwards",
            "own = sums.flatten(2).diagonal",
            "own = sums.flatten(2).flip(2).diagonal",
        ),
        (
            "insertion and deletion change places",
            "for c in (inserted, deleted)]",
            "for c in (deleted, inserted)]",
        ),
        (
            "ROAD's sign is flipped",
            "gap = gap + _probabilities(model, least, targets) - _probabilities(model, most",
            "gap = gap - _probabilities(model, least, targets) + _probabilities(model, most",
        ),
        (
            "a rise counts as a drop",
            "drop = (before - after).clamp(min=0)",
            "drop = (before - after).abs()",
        ),
        (
            "randomisation begins at the input",
            "for name, part in reversed(parts):",
            "for name, part in parts:",
        ),
        (
            "the network itself is randomised",
            "network = copy.deepcopy(model)\n    parts",
            "network = model\n    parts",
        ),
        ("a class comes twice in a mosaic", "cells, replace=False)", "cells, replace=True)"),
        (
            "ties don't share their rank",
            "(below + up_to).double() / 2",
            "up_to.double()",
        ),
        (
            "diagonal neighbours count as much as others",
            "2 * rows[..., 1:-1] + rows[..., 2:] - 4 * x) / 12",
            "rows[..., 1:-1] + rows[..., 2:] - 2 * x) / 10",
        ),
        (
            "the centred control is wider",
            "torch.exp(-(rows[:, None] ** 2 + columns**2) / 2)",
            "torch.exp(-(rows[:, None] ** 2 + columns**2) / 8)",
        ),
    ),
    *_faults(
        "evaluation",
        ("micro in place of macro averages", 'average="macro"', 'average="micro"'),
        (
            "all bins count alike in the calibration error",
            '(table["images"] * gap).sum() / len(labels)',
            "gap.mean()",
        ),
        (
            "a temperature's reciprocal is returned",
            "return 1 / (low * high) ** 0.5",
            "return (low * high) ** 0.5",
        ),
        (
            "only images are resampled, not seeds",
            "np.bincount(generator.integers(0, seeds, seeds), minlength=seeds)",
            "np.ones(seeds)",
        ),
        (
            "only seeds are resampled, not images",
            "np.bincount(generator.integers(0, images, images), minlength=images)",
            "np.ones(images)",
        ),
        (
            "intervals are of 90 %",
            "resamples: int = 2000,\n    level: float = 0.95,",
            "resamples: int = 2000,\n    level: float = 0.90,",
        ),
        (
            "the confusion matrix lies on its side",
            "sklearn_confusion(labels.numpy(), logits.argmax(1).numpy(), labels=classes)",
            "sklearn_confusion(logits.argmax(1).numpy(), labels.numpy(), labels=classes)",
        ),
        (
            "test-time images aren't mirrored",
            "model(batch.flip(-1) if mirror else batch)",
            "model(batch)",
        ),
        ("the mode isn't put back", "module.training = flag", "pass"),
        (
            "a multiply-add counts twice",
            "counter.get_total_flops() // 2",
            "counter.get_total_flops()",
        ),
        ("gradients move the statistics", "buffer.copy_(buffers[name])", "pass"),
        (
            "the epoch that reaches a target is counted from 0",
            "enumerate(validation_accuracy, start=1)",
            "enumerate(validation_accuracy)",
        ),
    ),
    *_faults(
        "runs",
        (
            "dropout isn't part of a run's key",
            'values = asdict(self) | {"dataset"',
            'values = asdict(self) | {"dropout": 0, "dataset"',
        ),
        (
            "a folder's whole path is part of the key",
            '{"dataset": dataset_slug(self.dataset)}\n        if self.recipe.reference',
            '{"dataset": self.dataset}\n        if self.recipe.reference',
        ),
        (
            "weights depend on what came before",
            "torch.manual_seed(self.seed)",
            "pass",
        ),
        (
            "other data than a run was made for",
            "if dataset.fingerprint != self.fingerprint:",
            "if False:",
        ),
        (
            "a damaged result is believed",
            "if hashlib.sha256(contents[name]).hexdigest() != digest:",
            "if False:",
        ),
        (
            "an altered metric is believed",
            'if summary["checksum"] != _checksum(summary):',
            "if False:",
        ),
        (
            "two processes train the same run",
            "lock.acquire()\n",
            "pass\n",
        ),
        (
            "a run that failed is trained again",
            "if failed.exists():",
            "if False:",
        ),
        (
            "a large batch isn't capped",
            "min(recipe.batch_size, profile.batch_size, len(dataset.train))",
            "min(recipe.batch_size, len(dataset.train))",
        ),
        (
            "metrics of the test split under the name of validation",
            "logits = {\n        split: predict(model, getattr(dataset, split), *statistics)",
            "dataset = replace(dataset, validation=dataset.test)\n    logits = {\n"
            "        split: predict(model, getattr(dataset, split), *statistics)",
        ),
        (
            "differences have the other sign",
            "one.correct - other.correct for",
            "other.correct - one.correct for",
        ),
        (
            "runs of other seeds are paired",
            "if one.run.seed != other.run.seed or not same_images:",
            "if not same_images:",
        ),
        (
            "the gap is that to validation",
            'result.metrics["train"]["accuracy"] - result.metrics["test"]["accuracy"]',
            'result.metrics["train"]["accuracy"] - result.metrics["validation"]["accuracy"]',
        ),
        (
            "NaN reaches the report",
            "allow_nan=False",
            "allow_nan=True",
        ),
        (
            "every difference is called shown",
            "if difference.low > 0:\n        text",
            "if difference.mean > 0:\n        text",
        ),
    ),
    *_faults(
        "starts",
        (
            "the last layer is transferred, too",
            "model.load_state_dict(weights | kept)",
            "model.load_state_dict(kept | weights)",
        ),
        (
            "frozen features are trained",
            'parameter.requires_grad_(name.startswith(f"{last}."))',
            "parameter.requires_grad_(True)",
        ),
    ),
    *_faults(
        "compression",
        ("random weights are pruned", "prune.L1Unstructured,", "prune.RandomUnstructured,"),
        (
            "masks aren't written into the weights",
            'prune.remove(module, "weight")',
            "pass",
        ),
        (
            "channels are chosen by squares",
            "GroupMagnitudeImportance(p=1)",
            "GroupMagnitudeImportance(p=2)",
        ),
        ("the classes are pruned", "ignored_layers=[last],", "ignored_layers=[],"),
    ),
    *_faults(
        "corruptions",
        (
            "noise depends on the place in a batch",
            "(seed, zlib.crc32(picture))",
            "(seed, i)",
        ),
        (
            "contrast falls towards black",
            "mean = image.mean(axis=(0, 1))",
            "mean = 0 * image.mean(axis=(0, 1))",
        ),
        (
            "severities are one off",
            "STRENGTHS[corruption][severity - 1]",
            "STRENGTHS[corruption][severity % 5]",
        ),
    ),
    *_faults(
        "shapes",
        (
            "an occluded object counts as seen",
            "[(canvas, occluder_colour), (visible, 0)]",
            "[(canvas, occluder_colour)]",
        ),
        (
            "all images are drawn from one generator",
            "np.random.default_rng([seed, index])",
            "np.random.default_rng([seed])",
        ),
        (
            "the mark is the same for every class",
            "MARK_COLOURS[label]",
            "MARK_COLOURS[0]",
        ),
    ),
)

# What a reader of the notebooks has to notice: a model, a recipe's default, a rule of a map.
NOTEBOOK_FAULTS = {
    "02_architectures": (
        "the shortcut of a basic block is dropped",
        "a bottleneck's stride sits on the 1x1 convolution",
        "maximum in place of average pooling",
    ),
    "03_regularization": ("severities are one off",),
    "04_depth": ("the published rate of a recipe is changed",),
    "05_gradcam": (
        "the gradient's sign is flipped",
        "maps aren't rectified",
        "Grad-CAM++ weighs wrongly",
        "the least important pixels go first",
    ),
    "01_data": ("validation images are trained on", "classes come one after the other"),
}


def copy_repository(folder: Path) -> Path:
    """Copy the repository, without what was installed, trained or drawn, into a new folder."""
    left_out = (".git", ".venv", ".ruff_cache", "__pycache__", "data", "runs")
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out)))


def notices(repository: Path, paths: list[str]) -> str | None:
    """Run tests in a copy of the repository until one fails; return its name, None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", *paths]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    if any(path.endswith(".ipynb") for path in paths):
        command.append("--nbval")
    try:
        done = subprocess.run(
            command,
            cwd=repository,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS_ALLOWED,
        )
    except subprocess.TimeoutExpired:
        return f"nothing within {SECONDS_ALLOWED} s"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else done.stdout[-300:] + done.stderr[-300:]


def tests_of(module: str) -> list[str]:
    """Return the test files that are about a module."""
    return [f"tests/test_{name}.py" for name in (module, *MORE_TESTS.get(module, ()))]


def other_tests(module: str) -> list[str]:
    """Return all test files that a module's own tests leave."""
    names = sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py"))
    left_out = [f"tests/test_{name}.py" for name in LEFT_OUT]
    return [name for name in names if name not in (*tests_of(module), *left_out)]


def chosen(names: list[str]) -> list[tuple[Fault, list[list[str]]]]:
    """Return faults and, for each, the lists of tests to meet one after the other.

    `names` are modules (none: all), or "notebooks".
    """
    if names == ["notebooks"]:
        by_name = {fault.breaks: fault for fault in FAULTS}
        return [
            (by_name[name], [[f"notebooks/{notebook}.ipynb"]])
            for notebook, faults in NOTEBOOK_FAULTS.items()
            for name in faults
        ]
    faults = [fault for fault in FAULTS if not names or fault.module in names]
    return [(f, [tests_of(f.module), other_tests(f.module)]) for f in faults]


def main(names: list[str]) -> int:
    """Plant the faults; print what noticed each, and how many were noticed."""
    todo = chosen(names)
    if not todo:
        print(f"no faults for {' '.join(names)}; modules: {sorted({f.module for f in FAULTS})}")
        return 2
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(WORKERS):
            copies.put(copy_repository(Path(folder) / f"copy{number}"))

        def check_sound(paths: list[str]) -> str | None:
            copy = copies.get()
            try:
                return notices(copy, paths)
            finally:
                copies.put(copy)

        def check_fault(task: tuple[Fault, list[list[str]]]) -> str | None:
            fault, rounds = task
            copy = copies.get()
            path = copy / "helpers" / f"{fault.module}.py"
            source = path.read_text()
            try:
                path.write_text(fault.planted(source))
                return next(filter(None, (notices(copy, tests) for tests in rounds)), None)
            finally:
                path.write_text(source)
                copies.put(copy)

        sound = list({tuple(rounds[0]): None for _, rounds in todo})
        for tests, failed in zip(sound, pool.map(check_sound, map(list, sound)), strict=True):
            if failed:
                print(f"{' '.join(tests)} fail without any fault: {failed}")
                return 1
        found = []
        for (fault, _), noticed in zip(todo, pool.map(check_fault, todo), strict=True):
            found.append(noticed)
            print(f"{fault.module}: {fault.breaks}: {noticed or 'NOT NOTICED'}", flush=True)
    caught = sum(noticed is not None for noticed in found)
    minutes = (time.monotonic() - begun) / 60
    print(f"{caught} of {len(found)} faults noticed ({caught / len(found):.0%}), {minutes:.0f} min")
    return 0 if caught >= 0.9 * len(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
