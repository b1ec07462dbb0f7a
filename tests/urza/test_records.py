import asyncio
import itertools

import pytest

from esper.contracts.assets import Blueprint
from esper.contracts.config import UrzaConfig
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import KernelState
from esper.contracts.enums import Outcome
from esper.contracts.enums import Verdict
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import LayerGraph
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import RecordOutcome
from esper.errors import BlueprintError
from esper.errors import ConflictError
from esper.errors import NotFoundError
from esper.errors import RunConflict
from esper.runtime.urza.decisions import ADAPTATION_MOVES
from esper.runtime.urza.decisions import StoredHistory
from esper.runtime.urza.library import Library
from esper.runtime.urza.runs import OUTCOMES

NOW = "2026-11-23T12:00:00Z"


def outcome(which: Outcome, **known) -> RecordOutcome:
    return RecordOutcome(run_id="r1", urza=UrzaConfig(), outcome=which, **known)


def loaded(head: HeadRef, *, parameters: int = 870) -> LoadedRun:
    return LoadedRun(
        step=0,
        epoch=0,
        steps_per_epoch=10,
        head=head,
        device="cpu",
        threads=1,
        parameters=parameters,
        model_name="Net",
        graph=LayerGraph(nodes=(), edges=()),
    )


def test_recording_a_run_twice_is_recording_it_once(play, make):
    async def scenario(library: Library):
        first = await library.record_run(make.run(), NOW)
        assert first == await library.record_run(make.run(), "later")
        assert first == await library.run("r1")
        assert (first.outcome, first.created, first.name) == (Outcome.RUNNING, NOW, "digits")
        assert first.config == make.config()

    play(scenario)


def test_one_id_cannot_name_two_configurations(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        with pytest.raises(RunConflict, match=r"run\.seed") as conflict:
            await library.record_run(make.run(seed=1), NOW)
        assert conflict.value.code == "ESP-501"
        assert (await library.run("r1")).config.run.seed == 0

    play(scenario)


def test_an_unknown_run_names_near_ones(play, make):
    async def scenario(library):
        await library.record_run(make.run("digits-1"), NOW)
        with pytest.raises(NotFoundError, match="digits-1") as unknown:
            await library.run("digit-1")
        assert unknown.value.code == "ESP-505"
        for call in (
            library.claim("zzz", "q"),
            library.lease("zzz"),
            library.set_outcome("zzz", Outcome.PAUSED),
            library.record_decision(make.decision()),
            library.publish_kernel(make.kernel(), "zzz/a1", "zzz"),
        ):
            with pytest.raises(NotFoundError):
                await call

    play(scenario)


def test_runs_are_listed_newest_first(play, make):
    async def scenario(library):
        assert await library.runs() == ()
        for name in ("b", "c", "a"):
            await library.record_run(make.run(name), NOW)
        assert [record.run_id for record in await library.runs(limit=2)] == ["a", "c"]

    play(scenario)


def test_every_claim_is_a_new_lease_and_only_the_holder_releases(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        assert await library.lease("r1") is None
        first = await library.claim("r1", "one")
        second = await library.claim("r1", "two")
        assert (first.lease_gen, second.lease_gen) == (1, 2)
        assert not await library.release(first)
        assert await library.lease("r1") == second
        assert await library.release(second)
        assert await library.release(second)
        assert await library.lease("r1") is None
        assert (await library.claim("r1", "three")).lease_gen == 3

    play(scenario)


def test_concurrent_claims_get_different_leases(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        leases = await asyncio.gather(*(library.claim("r1", f"queue {number}") for number in range(8)))
        assert sorted(lease.lease_gen for lease in leases) == list(range(1, 9))
        assert await library.lease("r1") in leases

    play(scenario)


def test_a_run_is_finished_with_its_files(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        head = make.head("end", step=10, epoch=1)
        await library.finish(outcome(Outcome.RUNNING, loaded=loaded(head)))
        await library.finish(outcome(Outcome.RUNNING, loaded=loaded(head, parameters=999), restarts=1, warnings=("w",)))
        files = {"model.safetensors": make.manifest("model")}
        end = FinishedRun(head=head, digest=head.digest, metrics={"val_loss": 0.1}, parameters=999, files=files)
        for _ in range(2):
            record = await library.finish(outcome(Outcome.COMPLETED, finished=end, warnings=("w", "v")))
        assert record == await library.run("r1")
        assert (record.outcome, record.finished, record.restarts) == (Outcome.COMPLETED, end, 1)
        assert (record.device, record.threads, record.parameters_start) == ("cpu", 1, 870)
        assert record.warnings == ("w", "v")

    play(scenario)


def test_a_resumed_run_goes_back_to_running(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        failure = {"code": "ESP-601", "message": "it broke", "hint": None}
        failed = await library.finish(outcome(Outcome.FAILED, failure=failure))
        assert failed.failure == failure
        resumed = await library.set_outcome("r1", Outcome.RUNNING)
        assert (resumed.outcome, resumed.failure, resumed.finished) == (Outcome.RUNNING, None, None)

    play(scenario)


def test_outcomes_move_only_by_their_table(play, make):
    ways = {
        Outcome.RUNNING: (),
        Outcome.PAUSED: (Outcome.PAUSED,),
        Outcome.COMPLETED: (Outcome.COMPLETED,),
        Outcome.STOPPED: (Outcome.STOPPED,),
        Outcome.FAILED: (Outcome.FAILED,),
    }

    async def scenario(library):
        for number, (old, new) in enumerate(itertools.product(Outcome, Outcome)):
            run_id = f"run-{number}"
            await library.record_run(make.run(run_id), NOW)
            for step in ways[old]:
                await library.set_outcome(run_id, step)
            if new is old or new in OUTCOMES[old]:
                assert (await library.set_outcome(run_id, new)).outcome is new
            else:
                with pytest.raises(RunConflict) as refused:
                    await library.set_outcome(run_id, new)
                assert refused.value.code == "ESP-504"
                assert (await library.run(run_id)).outcome is old

    play(scenario)


def test_the_first_decision_of_an_epoch_wins(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        first = make.decision(1)
        later = make.decision(2)
        assert await library.record_decision(later) == later
        assert await library.record_decision(first) == first
        assert await library.record_decision(first) == first
        assert (await library.run("r1")).divergences == 0
        for _ in range(2):
            assert await library.record_decision(make.decision(1, reason="steep")) == first
        assert (await library.run("r1")).divergences == 1
        await library.record_decision(make.decision(1, reason="steeper"))
        assert (await library.run("r1")).divergences == 2
        assert [item.model_dump_json() for item in await library.decisions("r1")] == [
            first.model_dump_json(),
            later.model_dump_json(),
        ]

    play(scenario)


def test_adaptations_move_only_by_their_table(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        for number, (old, new) in enumerate(itertools.product(AdaptationState, AdaptationState), start=1):
            await library.record_adaptation(make.adaptation(old, number=number))
            expected = new if new in ADAPTATION_MOVES[old] else old
            standing = await library.record_adaptation(make.adaptation(new, number=number))
            assert standing.state is expected
            assert standing == await library.record_adaptation(make.adaptation(new, number=number))
        assert [item.number for item in await library.adaptations("r1")] == list(range(1, 82))

    play(scenario)


def test_what_is_known_of_an_adaptation_is_not_lost(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        kernel = make.kernel().digest
        await library.record_adaptation(make.adaptation(AdaptationState.ORDERED))
        await library.record_adaptation(make.adaptation(AdaptationState.ORDERED, apply_step=90))
        await library.record_adaptation(make.adaptation(AdaptationState.TRAINING, kernel=kernel))
        await library.record_adaptation(make.adaptation(AdaptationState.FOSSILIZED))
        await library.record_adaptation(make.adaptation(AdaptationState.FOSSILIZED, apply_step=1))
        (found,) = await library.adaptations("r1")
        assert (found.state, found.kernel, found.apply_step) == (AdaptationState.FOSSILIZED, kernel, 90)

    play(scenario)


def test_of_two_terminal_states_at_once_the_first_wins(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        await library.record_adaptation(make.adaptation(AdaptationState.ORDERED))
        ends = (AdaptationState.MISSED, AdaptationState.VETOED, AdaptationState.FAILED, AdaptationState.STALE)
        standing = await asyncio.gather(*(library.record_adaptation(make.adaptation(end)) for end in ends))
        assert len({item.state for item in standing}) == 1
        assert (await library.adaptations("r1"))[0] == standing[0]

    play(scenario)


def test_the_first_judgement_wins(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        keep = JudgeReport(run_id="r1", adaptation_id="r1/a1", verdict=Verdict.KEEP, step=900, gain=0.1, reason="gain")
        cull = keep.model_copy(update={"verdict": Verdict.CULL})
        assert await library.record_judgement(keep) == keep
        assert await library.record_judgement(keep) == keep
        assert (await library.run("r1")).divergences == 0
        assert await library.record_judgement(cull) == keep
        assert await library.judgements("r1") == (keep,)
        assert (await library.run("r1")).divergences == 1

    play(scenario)


def test_a_fuller_history_takes_the_place_of_an_earlier_one(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        await library.store_history("r1", "r1/tamiyo/1", "abc", make.manifest("child"), 2)
        for content in ("half", "half", "whole"):
            await library.store_history("r1", "r1", "def", make.manifest(content), 1)
        assert await library.histories("r1") == (
            StoredHistory("r1", "def", 1, make.manifest("whole")),
            StoredHistory("r1/tamiyo/1", "abc", 2, make.manifest("child")),
        )

    play(scenario)


@pytest.mark.fault("B1")
def test_a_kernel_is_published_once_for_its_adaptation_and_once_for_its_digest(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        kernel = make.kernel("one")
        for _ in range(2):
            assert await library.publish_kernel(kernel, "r1/a1", "r1") == kernel
        # A forge that built anew, with other bits, gets the kernel that was published first.
        assert await library.publish_kernel(make.kernel("two"), "r1/a1", "r1") == kernel
        assert await library.publish_kernel(kernel, "r1/a2", "r1") == kernel
        assert await library.kernels() == (kernel,)
        assert await library.kernel(kernel.digest) == kernel
        with pytest.raises(NotFoundError) as unknown:
            await library.kernel(make.kernel("two").digest)
        assert unknown.value.code == "ESP-430"

    play(scenario)


@pytest.mark.fault("B1")
def test_two_forges_at_once_publish_one_kernel(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        names = [f"kernel {number}" for number in range(6)]
        found = await asyncio.gather(*(library.publish_kernel(make.kernel(name), "r1/a1", "r1") for name in names))
        assert len({kernel.digest for kernel in found}) == 1
        assert await library.kernels() == (found[0],)

    play(scenario)


def test_a_kernel_state_moves_only_from_the_state_that_was_named(play, make):
    async def scenario(library):
        await library.record_run(make.run(), NOW)
        digest = (await library.publish_kernel(make.kernel(), "r1/a1", "r1")).digest
        for _ in range(2):
            moved = await library.set_kernel_state(digest, KernelState.CERTIFIED, KernelState.QUARANTINED)
            assert moved.state is KernelState.QUARANTINED
        assert (await library.kernels())[0].state is KernelState.QUARANTINED
        with pytest.raises(ConflictError, match="quarantined"):
            await library.set_kernel_state(digest, KernelState.BUILT, KernelState.CERTIFIED)
        # Published again, it stays what it has become.
        again = await library.publish_kernel(make.kernel(), "r1/a2", "r1")
        assert again.state is KernelState.QUARANTINED

    play(scenario)


def test_blueprints_are_kept_by_name_and_version(play):
    async def scenario(library):
        one = Blueprint(
            name="bottleneck",
            description="non-linear",
            formula="y += B act(A x + a)",
            host_kinds=("linear",),
            defaults={"rank": 32, "scale": 1.0, "bias": True},
        )
        two = one.model_copy(update={"version": 2, "description": "better"})
        for blueprint in (one, two, one):
            assert await library.submit_blueprint(blueprint) == blueprint
        assert await library.blueprints() == (one, two)
        assert await library.blueprint("bottleneck") == two
        assert await library.blueprint("bottleneck", version=1) == one
        with pytest.raises(ConflictError, match="version 1"):
            await library.submit_blueprint(one.model_copy(update={"description": "changed"}))
        with pytest.raises(BlueprintError, match="Did you mean bottleneck"):
            await library.blueprint("botleneck")

    play(scenario)
