"""A list of runs as notebook 04 has it, trained by each executor and by a straightforward loop.

`python -m benchmarks.executors` prints a Markdown section; `markdown()` returns it. SimpleCNN and
ResNet-18, 34 and 50 are trained with three seeds at a quarter of their width, all twelve in a fresh
process; the contenders take turns. Ray is measured where it is installed (`pip install .[ray]`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.training import PerImage, straightforward
from helpers import data, executors
from helpers.config import PROFILES, ROOT, Study
from helpers.models import build_model
from helpers.recipes import RECIPES

NETWORKS, SEEDS = ("simple_cnn", "resnet18", "resnet34", "resnet50"), (0, 1, 2)
LOCAL, LOOP = "one process, all cores", "straightforward loop"


def train(executor: str, images: int, width: float) -> float:
    """Return the seconds that twelve runs of one epoch take, start of processes included."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("runs", "data", "analysis")]
        profile = replace(PROFILES["long"], width=width, epochs=1, seeds=SEEDS)
        cpu = torch.device("cpu")
        study = Study(profile, "shapes", *places, cpu, "none", executor)
        drawn = data.study_data(study, train_size=images, validation_size=100, test_size=100)
        recipe = replace(RECIPES["long"], batch_size=min(128, images))
        begun = time.perf_counter()
        if executor != "loop":
            variants = {name: {"model": name, "recipe": recipe} for name in NETWORKS}
            executors.train_variants(study, drawn, variants)
        else:
            per_image = PerImage(drawn.train, *map(list, drawn.channel_statistics), train=True)
            for name in NETWORKS * len(SEEDS):
                model = build_model(name, num_classes=10, width=width)
                straightforward(model, per_image, recipe.batch_size)()
        return time.perf_counter() - begun


def markdown(tiny: bool = False) -> str:
    """Measure (about ten minutes on two cores) and return this section of RESULTS.md."""
    images, width, rounds = (40, 0.0625, 1) if tiny else (1280, 0.25, 3)
    contenders = {"processes, 1 core a run": "processes", LOCAL: "local", LOOP: "loop"}
    if not tiny and importlib.util.find_spec("ray"):
        contenders["Ray, 1 core a run"] = "ray"
    times: dict[str, list[float]] = {name: [] for name in contenders}
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for turn in range(rounds):
        for name in [*contenders][turn:] + [*contenders][:turn]:
            given = [contenders[name], str(images), str(width)]
            command = [sys.executable, "-m", "benchmarks.executors", *given]
            said = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, env=alone, check=True)
            times[name].append(json.loads(said.stdout.splitlines()[-1]))
    lines = [
        "## Executors",
        "",
        f"`python -m benchmarks.executors`: {len(NETWORKS) * len(SEEDS)} runs at width {width:g}, "
        f"{images:,} drawn images of 32 pixels each, {rounds} alternating rounds, medians (range); "
        "ratios of seconds within a round, against processes. Targets: the straightforward loop "
        f"at least 4. {os.cpu_count()} CPU cores, torch {torch.__version__}.",
        "",
        "| executor | seconds | ratio |",
        "|---|---|---|",
    ]
    ours, *_ = times.values()
    for name, found in times.items():
        ratios = [t / o for t, o in zip(found, ours, strict=True)]
        cells = [(found, ".1f"), (ratios, ".2f")]
        texts = [f"{statistics.median(v):{f}} ({min(v):{f}} to {max(v):{f}})" for v, f in cells]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(train(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
    else:
        print(markdown("--tiny" in sys.argv))
