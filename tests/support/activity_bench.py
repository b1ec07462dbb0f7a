"""Activities run as a worker runs them, on a real Urza, with a tiny task of a user's own."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from temporalio.testing import ActivityEnvironment

from esper.contracts.config import EsperConfig
from esper.contracts.config import UrzaConfig
from esper.runtime.urza.connections import Connections
from esper.runtime.urza.library import Library

TASK = """
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from esper.runtime.tolaria.tasks import Task


def loss(model, batch):
    x, y = batch
    return functional.mse_loss(model(x), y)


def tiny():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 4, generator=generator)
    y = torch.relu(x @ torch.randn(4, 2, generator=generator))
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    return Task(model, TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:]), loss)
"""


class Bench:
    """Urza, and activities run as a worker runs them: async ones on the loop, sync ones in threads."""

    def __init__(self, folder: Path, library: Library, connections: Connections) -> None:
        self.folder = folder
        self.library = library
        self.connections = connections
        self.urza = UrzaConfig()

    async def run(
        self, activity: Callable[..., Any], request: object, *, environment: ActivityEnvironment | None = None
    ) -> Any:
        environment = environment or ActivityEnvironment()
        if asyncio.iscoroutinefunction(activity):
            return await environment.run(activity, request)
        return await asyncio.to_thread(environment.run, activity, request)

    def config(self, *, target: str = "tiny_task:tiny", **sections: dict[str, object]) -> EsperConfig:
        document: dict[str, Any] = {
            "run": {"name": "tiny", "seed": 1, "max_epochs": 4, "threads": 1, "device": "cpu"},
            "task": {"target": target},
            "training": {"batch_size": 16},
            "tamiyo": {"hold_epochs": 1, "hold_steps": 0},
            "tezzeret": {"timeout_s": 60.0},
        }
        return EsperConfig.model_validate(document | sections, strict=False)
