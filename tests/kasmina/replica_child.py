"""One rank of a small distributed training: `replica_child.py RANK FILE SCENARIO` prints what came of it as JSON."""

import json
import os
import sys

import torch
from torch import distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper


def main(rank: int, meeting: str, scenario: str) -> dict[str, object]:
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    esper.wrap(model, example_inputs=torch.randn(4, 8))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    own_rows = torch.Generator().manual_seed(rank)

    def train(wrapper: nn.Module, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(16, 8, generator=own_rows)
            optimizer.zero_grad()
            (wrapper(x) - x[:, :4].sin()).square().mean().backward()
            optimizer.step()

    def weights() -> list[float]:
        return [float(parameter.detach().double().sum()) for parameter in model.parameters()]

    train(ddp, 3)
    if scenario == "alone":
        told = []
        for act in (
            lambda: esper.graft(model, "0", "bottleneck", optimizer=optimizer, rank=4),
            lambda: esper.cull(model, "0", optimizer=optimizer),
            lambda: esper.fossilize(model, optimizer=optimizer),
        ):
            try:
                act()
            except esper.GrowthError as error:
                told.append(f"{error.code} {error}")
        return {"told": told, "grown": esper.status(model).grown_parameters}
    if scenario == "taken back":
        before, weights_before = esper.snapshot(model, optimizer), weights()
        ddp, _ = esper.grow_replicas(ddp, lambda m: esper.graft(m, "0", "bottleneck", optimizer=optimizer, rank=4))
        train(ddp, 2)
        told = []
        for act in (lambda: esper.rollback(before), lambda: esper.unwrap(model, optimizer=optimizer)):
            try:
                act()
            except esper.GrowthError as error:
                told.append(f"{error.code} {error}")
        grown = esper.status(model).grown_parameters
        ddp, _ = esper.grow_replicas(ddp, lambda m: esper.rollback(before))
        back = weights() == weights_before
        train(ddp, 3)
        esper.rollback(before)
        return {"told": told, "grown": grown, "back": back, "again": weights() == weights_before}
    if scenario == "differently":
        try:
            esper.grow_replicas(ddp, lambda m: esper.graft(m, "0", "bottleneck", optimizer=optimizer, rank=4 + rank))
        except esper.GrowthError as error:
            return {"code": error.code}
        return {"code": None}
    if scenario == "one refuses":
        try:
            esper.grow_replicas(ddp, lambda m: esper.graft(m, "0", "bottleneck" if rank else "botleneck"))
        except esper.EsperError as error:
            return {"code": error.code}
        return {"code": None}
    ddp, made = esper.grow_replicas(ddp, lambda m: esper.graft(m, "0", "bottleneck", optimizer=optimizer, rank=4))
    born = weights()
    train(ddp, 5)
    grown = weights()
    ddp, _ = esper.grow_replicas(ddp, lambda m: esper.cull(m, "0", optimizer=optimizer))
    train(ddp, 2)
    return {"kernel": made.kernel, "born": born, "grown": grown, "culled": weights(), "rank": distributed.get_rank()}


if __name__ == "__main__":
    document = main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    print(json.dumps(document), flush=True)
    os._exit(0)
