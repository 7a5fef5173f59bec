"""Kill a training run at random moments, resume it, and compare it with an undisturbed one.

    python -m benchmarks.soak --kills 100

Each round trains a small network twice: once in one go, and once in processes that get SIGKILL
after a random time, so that a kill can hit reading the data, a step, a validation, or the writing
of a checkpoint (one after each step) or of the result. Dropout, augmentation and early stopping
are on, since each has a state that a checkpoint could lose. The round passes if the weights, the
history (but for seconds) and the predictions are the same bit for bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from helpers import shapes
from helpers.config import PROFILES, Study
from helpers.data import Augmentation, load_dataset
from helpers.runs import Run, load_or_train, load_result
from helpers.training import RECIPES, load_checkpoint

KILLS_A_ROUND = 10
CASES = (("onecycle", "resnet20"), ("adam", "simple_cnn"), ("fast", "simple_cnn"))


@dataclass(frozen=True)
class Round:
    """What a round did: `steps` are those of the checkpoints that its kills left (0: none yet).

    `cut_writes` counts the kills that hit the writing of a file, `resumed` the checkpoints that
    a process went on from, and `differences` names what isn't the same as in the undisturbed run.
    """

    run: Run
    kills: int
    steps: tuple[int, ...]
    cut_writes: int
    differences: tuple[str, ...]

    @property
    def resumed(self) -> int:
        """How many of the kills left a checkpoint to go on from."""
        return sum(step > 0 for step in self.steps)


def draw_folder(root: Path, images_a_class: int = 12) -> Path:
    """Draw a small folder of images, which a process reads faster than it would draw it."""
    labels = np.arange(10 * images_a_class) % 10
    drawing = shapes.draw(labels, image_size=16, seed=0)
    for number, (image, label) in enumerate(zip(drawing.images, labels, strict=True)):
        path = root / "train" / shapes.CLASSES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image[..., ::-1])
    return root


def make_study(folder: Path) -> Study:
    """Return a study on the CPU that keeps its runs and decoded images in a folder."""
    return Study(
        profile=PROFILES["smoke"],
        dataset="shapes",
        runs_dir=folder / "runs",
        data_dir=folder.parent / "data",
        analysis_dir=folder / "analysis",
        device=torch.device("cpu"),
        progress="none",
    )


def make_run(
    images: Path, study: Study, recipe: str, model: str, *, seed: int = 0, epochs: int = 30
) -> Run:
    """Return a run of five steps an epoch with everything on that has a state of its own."""
    return Run(
        dataset=str(images),
        fingerprint=load_dataset(str(images), data_dir=study.data_dir).fingerprint,
        model=model,
        recipe=replace(
            RECIPES[recipe], batch_size=16, augmentation=Augmentation(crop_padding=4, cutout=8)
        ),
        epochs=epochs,
        seed=seed,
        width=0.25,
        dropout=0.3,
        patience=25,
    )


def work(run: Run, study: Study) -> None:
    """Load or train a run: what the processes that get killed do."""
    torch.set_num_threads(1)
    load_or_train(run, study, checkpoint_seconds=0.0)


def kill_and_compare(run: Run, folder: Path, kills: int, generator: np.random.Generator) -> Round:
    """Train a run in one go, and again with up to `kills` kills; compare the two.

    The kills come at uniformly random times that add up to less than the run takes in one go, so
    usually all of them find it unfinished. Raises RuntimeError if a process ends with an error.
    """
    processes = multiprocessing.get_context("forkserver")
    # Importing takes seconds; torch itself imports torch._dynamo with the first optimizer.
    processes.set_forkserver_preload(["helpers.runs", "torch._dynamo"])
    starter = processes.Process(target=time.sleep, args=(0,))  # starts the server, untimed
    starter.start()
    starter.join()
    undisturbed, disturbed = make_study(folder / "undisturbed"), make_study(folder / "disturbed")

    def run_for(seconds: float | None, study: Study) -> bool:
        """Run a process for so long at most; return whether it was killed."""
        process = processes.Process(target=work, args=(run, study))
        process.start()
        process.join(seconds)
        killed = process.exitcode is None
        process.kill()
        process.join()
        if not killed and process.exitcode != 0:
            raise RuntimeError(f"training {run.key} ended with exit code {process.exitcode}")
        return killed

    begun = time.perf_counter()
    run_for(None, undisturbed)
    duration = time.perf_counter() - begun
    here = disturbed.runs_dir / run.key
    steps_an_epoch = len(run.load_data(disturbed.data_dir).train) // run.recipe.batch_size
    steps: list[int] = []
    cut_writes = 0
    for _ in range(kills):
        if not run_for(generator.uniform(0, duration / kills), disturbed):
            break
        steps.append(_steps_done(run, here, steps_an_epoch))
        cut_writes += any(here.glob(".*.tmp"))
    run_for(None, disturbed)
    found = differences(run, undisturbed.runs_dir / run.key, here)
    return Round(run, len(steps), tuple(steps), cut_writes, tuple(found))


def _steps_done(run: Run, folder: Path, steps_an_epoch: int) -> int:
    """Return how many steps the checkpoint in a run's folder has behind it, 0 without one."""
    path = folder / "resume.pt"
    if not path.exists():
        return 0
    state = load_checkpoint(path, run.key)
    return steps_an_epoch * state["epoch"] + state["step"]


def differences(run: Run, first: Path, second: Path) -> list[str]:
    """Name what differs between two folders of the same run; nothing for a perfect resume."""
    found = []
    for name in ("model.safetensors", "predictions.npz"):
        if (first / name).read_bytes() != (second / name).read_bytes():
            found.append(name)
    one, other = load_result(run, first), load_result(run, second)
    if not one.history.drop(columns="seconds").equals(other.history.drop(columns="seconds")):
        found.append("history.csv")
    for name in ("metrics", "best_epoch", "stopped_early"):
        if getattr(one, name) != getattr(other, name):
            found.append(name)
    kept = {"run.json", "history.csv", "result.json", "predictions.npz", "model.safetensors"}
    extra = {path.name for path in second.iterdir()} - kept - {"lock"}
    if extra:
        found.append(f"leftovers {sorted(extra)}")
    return found


def main() -> int:
    """Run rounds until the asked number of kills is reached; return 1 if any round differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=100, help="how many processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the networks")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}; expected a positive number")
    generator = np.random.default_rng(options.seed)
    rounds: list[Round] = []
    begun = time.perf_counter()
    print("recipe    model       seed  kills  resumed  cut writes  last checkpoints   verdict")
    with tempfile.TemporaryDirectory() as folder:
        images = draw_folder(Path(folder) / "images")
        while (done := sum(r.kills for r in rounds)) < options.kills:
            recipe, model = CASES[len(rounds) % len(CASES)]
            place = Path(folder) / f"round{len(rounds)}"
            seed = options.seed + len(rounds)
            run = make_run(images, make_study(place), recipe, model, seed=seed)
            kills = min(KILLS_A_ROUND, options.kills - done)
            result = kill_and_compare(run, place, kills, generator)
            rounds.append(result)
            verdict = "same" if not result.differences else f"DIFFERS: {result.differences}"
            print(
                f"{recipe:10s}{model:12s}{seed:4d}{result.kills:7d}{result.resumed:9d}"
                f"{result.cut_writes:12d}  {str(list(result.steps[-3:])):17s}  {verdict}",
                flush=True,
            )
    kills = sum(r.kills for r in rounds)
    wrong = sum(bool(r.differences) for r in rounds)
    print(
        f"\n{kills} kills in {len(rounds)} runs, {time.perf_counter() - begun:.0f} s: "
        f"{sum(r.resumed for r in rounds)} left a checkpoint to go on from, "
        f"{sum(r.cut_writes for r in rounds)} cut off the writing of a file; "
        + (f"{wrong} runs DIFFER from" if wrong else "every run is bit for bit the same as")
        + " the undisturbed one"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
