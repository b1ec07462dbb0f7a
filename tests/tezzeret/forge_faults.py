"""Jobs that go wrong, for a fork server of the tests, beside the real ones."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from esper.errors import BlueprintError
from esper.runtime.tezzeret import forge_jobs


def loop(header, blobs):
    while True:
        pass


def sleep_with_grandchild(header, blobs):
    """The grandchild's id goes where the test says; both would sleep far longer than any test."""
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(header["file"]).write_text(f"{os.getpid()} {grandchild.pid} {tempfile.gettempdir()}")
    time.sleep(600)


def hog(header, blobs):
    return {"elements": torch.ones(2**30).numel()}, []


def python_hog(header, blobs):
    return {"bytes": len(bytearray(2**32))}, []


def leave(header, blobs):
    os._exit(header["code"])


def segfault(header, blobs):
    ctypes.string_at(0)


def burn(header, blobs):
    """Over the limit of processor time, with the alarm of wall time far away."""
    os.kill(os.getpid(), signal.SIGXCPU)


def big_file(header, blobs):
    with Path("big").open("wb") as file:
        file.seek(2**30)
        file.write(b"x")


def refuse(header, blobs):
    raise BlueprintError("ESP-414", "node 'a': wrong", hint="right it")


def crash(header, blobs):
    raise KeyError("nonesuch")


def garbage(header, blobs):
    os.write(3, b"x")
    return {"value": float("nan")}, []


def look(header, blobs):
    """What a child sees."""
    heavy = [name for name in ("torch_geometric", "temporalio", "sqlalchemy", "boto3", "pytest") if name in sys.modules]
    return {
        "environment": dict(os.environ),
        "modules": heavy,
        "preloaded": "torch._dynamo" in sys.modules,
        "main": getattr(sys.modules["__main__"], "__file__", ""),
        "folder": str(Path.cwd()),
        "session": os.getsid(0) == os.getpid(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "blobs": [len(blob) for blob in blobs],
    }, blobs


JOBS = {
    **forge_jobs.JOBS,
    "loop": loop,
    "sleep_with_grandchild": sleep_with_grandchild,
    "hog": hog,
    "python_hog": python_hog,
    "leave": leave,
    "segfault": segfault,
    "burn": burn,
    "big_file": big_file,
    "refuse": refuse,
    "crash": crash,
    "garbage": garbage,
    "look": look,
}
