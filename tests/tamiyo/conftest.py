"""Requests as a real run would send them: multi-layer perceptrons with health at every site."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from esper.contracts.assets import Seed
from esper.contracts.assets import SiteContract
from esper.contracts.config import TamiyoConfig
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.contracts.operational import Adaptation
from esper.contracts.operational import EpochReport
from esper.contracts.operational import HeadRef
from esper.contracts.operational import HealthSignal
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import LayerEdge
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import LossPoint
from esper.contracts.operational import Metrics
from esper.contracts.operational import SiteNode
from esper.contracts.orders import ScoreRequest

RUN = "run-1"
STEPS_PER_EPOCH = 100
DIGEST = "sha256:" + "0" * 64

RequestFactory = Callable[..., ScoreRequest]
AdaptationFactory = Callable[..., Adaptation]


def perceptron(widths: Sequence[int], slots: int, states: Mapping[str, Sequence[SeedState]]) -> LayerGraph:
    names = [f"layers.{2 * index}" for index in range(len(widths) - 1)]
    nodes = []
    for index, name in enumerate(names):
        fan_in, fan_out = widths[index], widths[index + 1]
        site_states = states.get(name, [SeedState.DORMANT] * slots)
        nodes.append(
            SiteNode(
                contract=SiteContract(
                    site=name,
                    output_site=name,
                    kind="linear",
                    input_shape=(fan_in,),
                    output_shape=(fan_out,),
                    dtype="float32",
                ),
                parameter_count=fan_in * fan_out + fan_out,
                flops_per_sample=2 * fan_in * fan_out,
                depth=index,
                widen_output=names[index + 1] if index + 1 < len(names) else None,
                seeds=tuple(Seed(site=name, index=slot, state=state) for slot, state in enumerate(site_states)),
            )
        )
    edges = tuple(
        LayerEdge(source=first, target=second, elements=widths[index + 1])
        for index, (first, second) in enumerate(pairwise(names))
    )
    return LayerGraph(nodes=tuple(nodes), edges=edges)


def signal(site: str, **measured: Any) -> HealthSignal:
    return HealthSignal(site=site, epoch=1, step=STEPS_PER_EPOCH, rows_seen=512, **measured)


@pytest.fixture(scope="session")
def make_request() -> RequestFactory:
    """`make_request(...)`: a request of an MLP 16-12-2-12-4 at epoch 8 of 30 whose loss has stopped falling."""

    def make(
        *,
        widths: Sequence[int] = (16, 12, 2, 12, 4),
        epoch: int = 8,
        max_epochs: int = 30,
        losses: Sequence[float] | None = None,
        health: Mapping[str, Mapping[str, Any]] | None = None,
        states: Mapping[str, Sequence[SeedState]] | None = None,
        slots: int = 4,
        held: str | None = None,
        hold_window_steps: int = 800,
        lag_epochs: int = 1,
        adaptations: Sequence[Adaptation] = (),
        pinned: Sequence[str] = (),
        in_flight: str | None = None,
        **tamiyo: Any,
    ) -> ScoreRequest:
        graph = perceptron(widths, slots, states or {})
        points = tuple(losses) if losses is not None else (0.5,) * epoch
        if health is None:
            health = {node.contract.site: HEALTHY for node in graph.nodes}
        report = EpochReport(
            run_id=RUN,
            epoch=epoch,
            step=epoch * STEPS_PER_EPOCH,
            head=HeadRef(digest=DIGEST, parent=None, step=epoch * STEPS_PER_EPOCH, epoch=epoch),
            metrics=Metrics(train_loss=points[-1], val_loss=points[-1]),
            learning_rate=0.01,
            samples=6400,
            parameters=300,
            training_flops=1e6,
            probe_flops=0.0,
            busy_seconds=1.0,
            stall_seconds=0.0,
            graph=graph,
            health=tuple(signal(site, **measured) for site, measured in health.items()),
            held_adaptation=held,
        )
        return ScoreRequest(
            run_id=RUN,
            tamiyo=TamiyoConfig(**tamiyo),
            max_epochs=max_epochs,
            steps_per_epoch=STEPS_PER_EPOCH,
            lag_epochs=lag_epochs,
            hold_window_steps=hold_window_steps,
            report=report,
            history=tuple(
                LossPoint(
                    epoch=epoch - len(points) + 1 + index,
                    step=(epoch - len(points) + 1 + index) * STEPS_PER_EPOCH,
                    train_loss=loss,
                    val_loss=loss,
                )
                for index, loss in enumerate(points[:-1])
            ),
            adaptations=tuple(adaptations),
            pinned=tuple(pinned),
            in_flight=in_flight,
        )

    return make


@pytest.fixture(scope="session")
def make_adaptation() -> AdaptationFactory:
    """`make_adaptation(number, state, ...)`: one entry of the run's record."""

    def make(
        number: int,
        state: AdaptationState,
        *,
        site: str = "layers.2",
        blueprint: str = "widen",
        seed: int = 0,
        apply_step: int | None = 300,
        judge_step: int | None = None,
    ) -> Adaptation:
        judge = None
        if judge_step is not None:
            judge = JudgeReport(
                run_id=RUN,
                adaptation_id=f"{RUN}/a{number}",
                verdict=Verdict.CULL,
                step=judge_step,
                reason="no gain",
            )
        return Adaptation(
            adaptation_id=f"{RUN}/a{number}",
            number=number,
            epoch=2,
            site=site,
            seed=seed,
            seed_generation=0,
            blueprint=blueprint,
            apply_step=apply_step,
            state=state,
            reason="test",
            judge=judge,
        )

    return make


HEALTHY: dict[str, Any] = {
    "saturation": 0.4,
    "residual_gradient": 0.2,
    "residual_gradient_norm": 1.0,
    "activation_variance": 1.0,
    "gradient_norm": 0.1,
    "gradient_to_weight": 0.01,
}
