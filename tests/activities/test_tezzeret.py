"""The forge's activities with a real forkserver and a folder of objects: build, certify, publish."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from activity_bench import Bench
from temporalio.testing import ActivityEnvironment

from esper.activities import tezzeret
from esper.activities.tezzeret import TezzeretActivities
from esper.activities.tezzeret import kernel_seed
from esper.contracts.assets import Blueprint
from esper.contracts.assets import Certificate
from esper.contracts.assets import SiteContract
from esper.contracts.config import OptimizerConfig
from esper.contracts.enums import KernelState
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import BuildRequest
from esper.contracts.orders import CertifyRequest
from esper.contracts.orders import RecordRun
from esper.errors import BlueprintError
from esper.errors import IntegrityError
from esper.runtime.tezzeret.blueprints import sources
from esper.runtime.tezzeret.blueprints.documents import parse_document
from esper.runtime.tezzeret.blueprints.registering import TABLE

Play = Callable[..., Any]


def order(bench: Bench, number: int = 1, **limits: Any) -> BuildRequest:
    config = bench.config(tezzeret={"timeout_s": 120.0, "memory_mb": 4096, "compile": "off"} | limits)
    return BuildRequest(
        run_id="r1",
        run_seed=1,
        adaptation=ScheduledAdaptation(
            adaptation_id=f"r1/a{number}",
            number=number,
            site="0",
            seed=0,
            seed_generation=0,
            blueprint="bottleneck",
            hyperparameters={"rank": 2},
            decided_epoch=1,
            apply_step=8,
        ),
        site=SiteContract(
            site="0", output_site="0", kind="linear", input_shape=(4,), output_shape=(3,), dtype="float32"
        ),
        site_samples=None,
        tezzeret=config.tezzeret,
        optimizer=OptimizerConfig(),
        urza=bench.urza,
    )


async def forge(bench: Bench) -> TezzeretActivities:
    await bench.library.record_run(RecordRun(run_id="r1", config=bench.config()), "2030-01-01T00:00:00+00:00")
    return TezzeretActivities(bench.connections, asyncio.get_running_loop())


@pytest.mark.fault("B1")
def test_a_kernel_is_built_certified_and_published_once(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        activities = await forge(bench)
        assert {activity.__name__ for activity in activities.all()} == {
            "build_kernel",
            "certify_kernel",
            "publish_kernel",
        }
        heard: list[object] = []
        environment = ActivityEnvironment()
        environment.on_heartbeat = heard.append
        built = await bench.run(activities.build_kernel, order(bench), environment=environment)
        again = await bench.run(activities.build_kernel, order(bench))
        assert built == again, "a build that is tried again gives the same kernel"
        assert heard[0] == "building"
        certified = await bench.run(
            activities.certify_kernel, CertifyRequest(kernel=built.kernel, build=order(bench)), environment=environment
        )
        assert certified.certificate.passed
        assert "certifying" in heard
        first = await bench.run(activities.publish_kernel, certified)
        assert await bench.run(activities.publish_kernel, certified) == first
        assert first.kernel.state is KernelState.CERTIFIED
        assert await bench.library.kernels() == (first.kernel,)
        store = bench.connections.store(bench.urza)
        assert first.kernel.certificate is not None
        certificate = Certificate.model_validate_json(store.get(first.kernel.certificate))
        assert certificate == certified.certificate

    play(scene)


def test_a_kernel_that_fails_its_certificate_is_refused(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tezzeret.certify_in_child

    def failing(*arguments: Any, **options: Any) -> Certificate:
        certificate = real(*arguments, **options)
        return certificate.model_copy(update={"passed": False, "failures": ("no gradient for up.weight",)})

    monkeypatch.setattr(tezzeret, "certify_in_child", failing)

    async def scene(bench: Bench) -> None:
        activities = await forge(bench)
        built = await bench.run(activities.build_kernel, order(bench))
        with pytest.raises(BlueprintError, match="no gradient") as refused:
            await bench.run(activities.certify_kernel, CertifyRequest(kernel=built.kernel, build=order(bench)))
        assert refused.value.code == "ESP-427"
        assert await bench.library.kernels() == ()

    play(scene)


@pytest.mark.fault("B2")
def test_a_kernel_over_its_budget_is_refused(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        activities = await forge(bench)
        with pytest.raises(BlueprintError):
            await bench.run(activities.build_kernel, order(bench, max_parameters=3))
        with pytest.raises(BlueprintError, match="floating point operations"):
            await bench.run(activities.build_kernel, order(bench, max_flops=3))

    play(scene)


def test_damaged_bytes_are_never_certified(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        activities = await forge(bench)
        built = await bench.run(activities.build_kernel, order(bench))
        place = next(
            path
            for path in (bench.folder / "objects").rglob("*")
            if path.is_file() and path.name.endswith(built.kernel.weights.digest.split(":")[1][-40:])
        )
        damaged = bytearray(place.read_bytes())
        damaged[-1] ^= 1
        place.chmod(0o644)
        place.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            await bench.run(activities.certify_kernel, CertifyRequest(kernel=built.kernel, build=order(bench)))

    play(scene)


def test_equal_runs_get_equal_kernels_whatever_they_are_called() -> None:
    assert kernel_seed(1, 1) == kernel_seed(1, 1)
    assert len({kernel_seed(run, number) for run in range(5) for number in range(5)}) == 25
    assert all(0 <= kernel_seed(run, 1) < 2**56 for run in range(5))


def test_a_submitted_blueprint_is_built_by_a_forge_that_asks(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    up = {"id": "up", "op": "linear", "inputs": ["x"], "attributes": {"out_features": "$out", "bias": False}}
    document = {"name": "plain_branch", "description": "", "host_kinds": ["linear"]}
    blueprint = parse_document(json.dumps(document | {"graph": {"nodes": [up], "outputs": ["up"]}}).encode())
    asked: list[str] = []

    def source() -> tuple[Blueprint, ...]:
        asked.append("plain_branch")
        return (blueprint,)

    monkeypatch.setattr(sources, "SOURCES", [source])

    async def scene(bench: Bench) -> None:
        activities = await forge(bench)
        ordered = order(bench)
        adaptation = ordered.adaptation.model_copy(update={"blueprint": "plain_branch", "hyperparameters": {}})
        wanted = ordered.model_copy(update={"adaptation": adaptation})
        built = await bench.run(activities.build_kernel, wanted)
        assert (built.kernel.blueprint, built.kernel.parameter_count) == ("plain_branch", 4 * 3)
        certified = await bench.run(activities.certify_kernel, CertifyRequest(kernel=built.kernel, build=wanted))
        assert certified.certificate.passed
        await bench.run(activities.build_kernel, wanted)

    try:
        play(scene)
    finally:
        TABLE.pop("plain_branch", None)
    assert asked == ["plain_branch"], "a name that is known is not asked for again"
