"""`start-run --dry-run`: build model and data, run one batch forward and backward, contact nothing, say the cost."""

from typing import Any

import torch

from esper.commands import output
from esper.commands.actions.launch import Prepared
from esper.commands.actions.own_code import reach_own_code
from esper.contracts.operational import LayerGraph
from esper.runtime.configuration import dump_config
from esper.runtime.kasmina.lineage import layer_graph
from esper.runtime.tezzeret.blueprints.registry import cost
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.blueprints.registry import site_contract_for
from esper.runtime.tolaria.data.data_checks import check_task
from esper.runtime.tolaria.data.identity import identity
from esper.runtime.tolaria.device import choose_device
from esper.runtime.tolaria.plan import require_repeatable
from esper.runtime.tolaria.plan import wrapped
from esper.runtime.tolaria.sampler import Batches
from esper.runtime.tolaria.sampler import steps_per_epoch
from esper.runtime.tolaria.tasks import load_task


def rehearse(prepared: Prepared, *, as_json: bool) -> int:
    """Print the resolved configuration, the sites and what training and growing would cost."""
    reach_own_code()
    document = rehearsal(prepared)
    if as_json:
        output.write_json(document)
        return 0
    output.write(dump_config(prepared.config).rstrip("\n"))
    output.write("")
    output.write_pairs([(name, document["cost"][name]) for name in document["cost"]])
    output.write("")
    output.write_table(
        ("site", "kind", "parameters", "flops/sample", "can grow"),
        [
            (
                site["site"],
                site["kind"],
                site["parameters"],
                site["flops_per_sample"],
                ", ".join(f"{name} +{added['parameters']}" for name, added in site["blueprints"].items()),
            )
            for site in document["sites"]
        ],
    )
    return 0


def rehearsal(prepared: Prepared) -> dict[str, Any]:
    """The dry run as a document. Raises what the worker would: ESP-310..315, 340..346, 207."""
    config = prepared.config
    device = choose_device(config.run.device)
    task = load_task(config.task, config.run.seed)
    check_task(task, config.training.batch_size)
    require_repeatable(config, identity(task), task.data_digest)
    rows = len(task.train)  # type: ignore[arg-type]
    batch = Batches(task.train, task.collate, device).rows(torch.arange(min(config.training.batch_size, rows)))
    model = wrapped(task.model.to(device), config.kasmina, batch, task.loss)
    graph = layer_graph(model, lambda: task.loss(model, batch))
    steps = steps_per_epoch(rows, config.training.batch_size)
    return {
        "schema": 1,
        "run_id": prepared.run_id,
        "output": prepared.named_folder,
        "config": config.model_dump(mode="json"),
        "cost": {
            "device": str(device),
            "training_rows": rows,
            "steps_per_epoch": steps,
            "steps": steps * config.run.max_epochs,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_per_sample": sum(node.flops_per_sample for node in graph.nodes),
        },
        "sites": _sites(graph, config.tamiyo.blueprints),
    }


def _sites(graph: LayerGraph, blueprints: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each site with what every blueprint that fits would add."""
    sites = []
    for node in graph.nodes:
        fitting = {}
        for name in blueprints:
            contract = site_contract_for(name, node, graph)
            if contract is not None:
                parameters, flops = cost(name, contract, resolve_hyperparameters(name, contract, {}))
                fitting[name] = {"parameters": parameters, "flops_per_sample": flops}
        sites.append(
            {
                "site": node.contract.site,
                "kind": node.contract.kind,
                "parameters": node.parameter_count,
                "flops_per_sample": node.flops_per_sample,
                "seeds": len(node.seeds),
                "blueprints": fitting,
            }
        )
    return sites
