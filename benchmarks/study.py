"""Time a whole study from nothing: how long a reader of the README has to wait.

    python -m benchmarks.study PROFILE FOLDER

The notebooks run as in `make study`, on the profile's default dataset; FOLDER, which must not exist
yet, keeps runs, data and results. The seconds of each notebook go into benchmarks/study.json, whose
sums the README's table of profiles shows as long as the profile is the one that was measured
(`report/build.py --publish` fills it in).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from helpers import config, runs
from helpers.training import write_atomically

MEASURED = Path(__file__).parent / "study.json"


def environment(profile: str, folder: Path) -> dict[str, str]:
    """Return the variables under which a study has everything in one folder."""
    places = {f"{name}_DIR": str(folder / name.lower()) for name in ("RUNS", "DATA", "ANALYSIS")}
    own = {"PROFILE": profile, "DATASET": config.PROFILES[profile].default_dataset}
    return os.environ | places | own


def main(profile: str, folder: Path) -> int:
    """Run the study; add its times to study.json if it ran through."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "helpers.notebooks"]
    done = subprocess.run(command, cwd=config.ROOT, env=environment(profile, folder.resolve()))
    if done.returncode:
        return done.returncode
    (times,) = folder.glob("analysis/*/results/run_times.json")
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    measured[profile] = {
        "profile": asdict(config.PROFILES[profile]),
        "machine": runs.machine(config.choose_device()),
        "seconds": json.loads(times.read_text()),
    }
    write_atomically(MEASURED, (json.dumps(measured, indent=1) + "\n").encode())
    print(f"{sum(measured[profile]['seconds'].values()) / 60:.1f} min, written to {MEASURED}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
