"""What is done with every foreign model: wrapped, grown at each of its sites, trained, and looked at."""

import copy
import dataclasses
import sys
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path

import torch
from foreign_models import Foreign
from torch import Tensor
from torch import nn

import esper
from esper.runtime.kasmina.wrapping.calls import tensors_in

ESPER = str(Path(esper.__file__).parent)
RATE = 0.01
STEPS = 10


def seeded(foreign: Foreign, seed: int = 0) -> nn.Module:
    """A new model; equal seeds give equal bits."""
    torch.manual_seed(seed)
    return foreign.make()


def wrapped(foreign: Foreign, model: nn.Module | None = None) -> nn.Module:
    """A model (a new one where none is given) that can grow at every layer and at every block."""
    given = seeded(foreign) if model is None else model
    return esper.wrap(given, ["*", *foreign.blocks], exclude=foreign.exclude, example_inputs=foreign.batch())


def evaluated(model: nn.Module, foreign: Foreign) -> list[Tensor]:
    """What a model returns in evaluation mode and without gradients; its mode stays what it is."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = [tensor.clone() for tensor in tensors_in(model(**foreign.batch()))]
    model.train(training)
    return found


def gradients(model: nn.Module, foreign: Foreign) -> dict[str, Tensor]:
    """The loss of a training forward with a fixed seed, and all gradients by name. The model stays as it is."""
    twin = copy.deepcopy(model).train()
    twin.zero_grad()
    torch.manual_seed(5)
    loss = foreign.loss(twin(**foreign.batch()))
    loss.backward()
    return {"": loss.detach()} | {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def step(model: nn.Module, foreign: Foreign, *, training: bool) -> dict[str, Tensor]:
    """One step of AdamW and everything that came of it, by name: outputs, loss, gradients, parameters, buffers, the
    optimizer's state, and where the random generator stands."""
    model.train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    torch.manual_seed(5)
    returned = model(**foreign.batch())
    loss = foreign.loss(returned)
    loss.backward()
    optimizer.step()
    seen = {f"output {index}": tensor.detach() for index, tensor in enumerate(tensors_in(returned))}
    seen |= {"loss": loss.detach(), "random": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            seen[f"gradient of {name}"] = parameter.grad
        for key, value in optimizer.state[parameter].items():
            seen[f"{key} of {name}"] = value
    return seen | {f"weight {name}": tensor for name, tensor in model.state_dict().items()}


def train(model: nn.Module, foreign: Foreign, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    model.train()
    torch.manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        foreign.loss(model(**foreign.batch())).backward()
        optimizer.step()


def new_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that were grown, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "kasmina" in name.split(".")}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with everything grown in it and a few steps behind it, in training mode, and what was before them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    born: Mapping[str, Tensor]
    loss_at_birth: float


def trained(foreign: Foreign) -> Trained:
    """Everything that a foreign model grows, trained for a few steps."""
    model = wrapped(foreign)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for growth in foreign.grows:
        esper.graft(model, growth.site, growth.blueprint, optimizer=optimizer, **growth.hyperparameters)
    born, before = new_parameters(model), loss_of(model, foreign)
    train(model, foreign, optimizer)
    return Trained(model, optimizer, born, before)


def loss_of(model: nn.Module, foreign: Foreign) -> float:
    """The loss in evaluation mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = float(foreign.loss(model(**foreign.batch())))
    model.train(training)
    return loss


def lines_of_esper(action: Callable[[], object]) -> set[str]:
    """The files of Esper from which anything ran during an action."""
    seen: set[str] = set()
    sys.setprofile(lambda frame, event, argument: seen.add(frame.f_code.co_filename))
    try:
        action()
    finally:
        sys.setprofile(None)
    return {file for file in seen if file.startswith(ESPER)}
