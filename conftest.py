"""Tests run in the smoke profile, in folders of their own, with one thread a process.

Set before torch is imported and inherited by pytest's workers and by the notebooks' kernels.
"""

import functools
import os
import shutil
import tempfile

import nbval.kernel

_OWN = "RESNET_STUDY_TEST_FOLDER"

if _OWN not in os.environ:
    folder = tempfile.mkdtemp(prefix="resnet-study-test-")
    os.environ[_OWN] = folder
    # A profile exported for a study would turn the tests into hours of training.
    os.environ["PROFILE"] = "smoke"
    os.environ["EXECUTOR"] = "local"
    os.environ.setdefault("DATASET", "shapes")
    os.environ["RUNS_DIR"] = f"{folder}/runs"
    os.environ["ANALYSIS_DIR"] = f"{folder}/analysis"
    os.environ["DATA_DIR"] = f"{folder}/data"
    os.environ["PROGRESS"] = "none"
    os.environ.setdefault("DEVICE", "cpu")
    # Two workers with a thread for each core would wait for each other most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.name == "posix":
    # Kernels listen in the file system: by default at ports, which two workers may choose at once.
    sockets = {"transport": "ipc", "ip": f"{os.environ[_OWN]}/kernel-{os.getpid()}"}
    nbval.kernel.KernelManager = functools.partial(nbval.kernel.KernelManager, **sockets)


def pytest_unconfigure(config):
    """Remove the tests' folder at the end of the session, in the main process."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.get(_OWN, ""), ignore_errors=True)
