import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from esper.contracts.enums import FactKind
from esper.contracts.orders import Lease
from esper.errors import IntegrityError
from esper.errors import LeaseLost
from esper.errors import NotFoundError
from esper.runtime.urza.library import Library

NOW = "2026-11-23T12:00:00Z"


async def begin(library: Library, make) -> Lease:
    await library.record_run(make.run(), NOW)
    return await library.claim("r1", "esper-trainer@host-1")


def test_a_head_moves_from_its_parent_and_carries_the_report(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        birth = make.head("birth")
        await library.commit_head(lease, head=birth, manifest=make.manifest("birth"), parent=None)
        first = make.head("first", parent=birth, step=10, epoch=1)
        report = make.report(first)
        manifest = make.manifest("first")
        assert (
            await library.commit_head(lease, head=first, manifest=manifest, parent=birth.digest, report=report) == first
        )
        assert await library.reports("r1") == (report,)
        record = await library.run("r1")
        assert (record.head, record.steps, record.epochs, record.divergences) == (first, 10, 1, 0)
        ledger = await library.take_over(lease)
        assert (ledger.head, ledger.manifest, ledger.reports, ledger.frontier) == (first, manifest, (report,), 10)

    play(scenario)


@pytest.mark.fault("E4", "D6")
def test_a_commit_whose_answer_was_lost_succeeds_again(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        head = make.head("birth")
        for _ in range(2):
            await library.commit_head(
                lease, head=head, manifest=make.manifest("birth"), parent=None, report=make.report(head)
            )
        assert len(await library.heads("r1")) == len(await library.reports("r1")) == 1
        assert (await library.run("r1")).divergences == 0
        # Also when the run was given to another process in between: the commit was made.
        await library.claim("r1", "esper-trainer@host-2")
        assert await library.commit_head(lease, head=head, manifest=make.manifest("birth"), parent=None) == head

    play(scenario)


def test_a_report_may_join_a_head_that_is_there_already(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        head = make.head("end of epoch", step=10, epoch=1)
        await library.commit_head(lease, head=head, manifest=make.manifest("end of epoch"), parent=None)
        successor = await library.claim("r1", "esper-trainer@host-2")
        await library.commit_head(
            successor, head=head, manifest=make.manifest("end of epoch"), parent=None, report=make.report(head)
        )
        assert [report.epoch for report in await library.reports("r1")] == [1]

    play(scenario)


@pytest.mark.fault("I9")
def test_a_fenced_owner_writes_nothing(play, make):
    async def scenario(library):
        stale = await begin(library, make)
        birth = make.head("birth")
        await library.commit_head(stale, head=birth, manifest=make.manifest("birth"), parent=None)
        await library.insert_fact(stale, make.fact())
        owner = await library.claim("r1", "esper-trainer@host-2")
        assert owner.lease_gen == stale.lease_gen + 1
        late = make.head("late", parent=birth, step=5)
        with pytest.raises(LeaseLost) as fenced:
            await library.commit_head(
                stale, head=late, manifest=make.manifest("late"), parent=birth.digest, report=make.report(late)
            )
        assert fenced.value.code == "ESP-503"
        assert "esper-trainer@host-2" in str(fenced.value)
        for write in (
            library.insert_fact(stale, make.fact(2)),
            library.insert_fact(stale, make.fact()),
            library.take_over(stale),
            library.rewind(stale, damaged=birth.digest, to=birth.digest, reason="damage"),
        ):
            with pytest.raises(LeaseLost):
                await write
        assert not await library.release(stale)
        assert await library.lease("r1") == owner
        assert (await library.run("r1")).head == birth
        assert await library.reports("r1") == ()
        assert len(await library.facts("r1")) == 1

    play(scenario)


@pytest.mark.fault("A4", "I9")
def test_a_zombie_is_fenced_even_where_its_successor_made_the_same_head(play, make):
    async def scenario(library):
        zombie = await begin(library, make)
        owner = await library.claim("r1", "esper-trainer@host-2")
        head = make.head("same")
        await library.commit_head(owner, head=head, manifest=make.manifest("same"), parent=None)
        with pytest.raises(LeaseLost):
            await library.commit_head(zombie, head=head, manifest=make.manifest("same"), parent=None)

    play(scenario)


@pytest.mark.fault("I9")
def test_of_concurrent_commits_exactly_one_wins(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        names = [f"head {number}" for number in range(8)]
        results = await asyncio.gather(
            *(
                library.commit_head(lease, head=make.head(name, step=1), manifest=make.manifest(name), parent=None)
                for name in names
            ),
            return_exceptions=True,
        )
        winners = [result for result in results if not isinstance(result, BaseException)]
        assert len(winners) == 1
        assert all(isinstance(result, LeaseLost) for result in results if result not in winners)
        assert (await library.run("r1")).head == winners[0]
        assert [item.head for item in await library.heads("r1")] == winners

    play(scenario)


def test_a_commit_that_contradicts_itself_is_refused(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        head, other = make.head("one"), make.head("two")
        with pytest.raises(ValueError, match="digest of its manifest"):
            await library.commit_head(lease, head=head, manifest=make.manifest("two"), parent=None)
        with pytest.raises(ValueError, match="parent"):
            await library.commit_head(lease, head=head, manifest=make.manifest("one"), parent=other.digest)
        with pytest.raises(ValueError, match="another head"):
            await library.commit_head(
                lease, head=head, manifest=make.manifest("one"), parent=None, report=make.report(other)
            )
        assert (await library.run("r1")).head is None

    play(scenario)


def test_the_first_report_of_an_epoch_wins_and_another_one_is_a_divergence(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        head = make.head("birth")
        manifest = make.manifest("birth")
        first = make.report(head, loss=0.5, busy_seconds=1.0)
        for again in (first, make.report(head, loss=0.5, busy_seconds=9.0)):
            await library.commit_head(lease, head=head, manifest=manifest, parent=None, report=again)
        assert (await library.run("r1")).divergences == 0
        for _ in range(2):
            different = make.report(head, loss=0.4)
            await library.commit_head(lease, head=head, manifest=manifest, parent=None, report=different)
        assert await library.reports("r1") == (first,)
        assert (await library.run("r1")).divergences == 1

    play(scenario)


def test_reports_come_back_to_the_last_bit(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        head = make.head("birth")
        report = make.report(head, loss=0.1 + 0.2)
        await library.commit_head(lease, head=head, manifest=make.manifest("birth"), parent=None, report=report)
        assert [found.model_dump_json() for found in await library.reports("r1")] == [report.model_dump_json()]
        assert await library.reports("r1", after_epoch=1) == ()

    play(scenario)


def test_head_at_follows_the_line_of_the_present_head(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        line = [make.head("birth")]
        for name, step in (("a", 10), ("b", 20)):
            line.append(make.head(name, parent=line[-1], step=step))
        for name, head in zip(("birth", "a", "b"), line, strict=True):
            await library.commit_head(lease, head=head, manifest=make.manifest(name), parent=head.parent)
        rewound = await library.rewind(lease, damaged=line[2].digest, to=line[1].digest, reason="ESP-401")
        assert rewound.head == line[1]
        # Safe twice.
        await library.rewind(lease, damaged=line[2].digest, to=line[1].digest, reason="ESP-401")
        other = make.head("other b", parent=line[1], step=20)
        await library.commit_head(lease, head=other, manifest=make.manifest("other b"), parent=other.parent)
        found = await library.head_at("r1", 20)
        assert found is not None
        assert (found.head, found.manifest) == (other, make.manifest("other b"))
        assert await library.head_at("r1", 15) is None
        before = await library.head_at("r1", 0)
        assert before is not None and before.head == line[0]
        assert [item.head for item in await library.heads("r1")] == [*line, other]
        assert [(rewind.from_head, rewind.to_head) for rewind in await library.rewinds("r1")] == [
            (line[2].digest, line[1].digest)
        ]
        assert (await library.take_over(lease)).frontier == 20

    play(scenario)


def test_a_rewind_goes_only_to_a_head_that_was(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        birth = make.head("birth")
        await library.commit_head(lease, head=birth, manifest=make.manifest("birth"), parent=None)
        with pytest.raises(IntegrityError, match="never had"):
            await library.rewind(lease, damaged=birth.digest, to=make.head("never").digest, reason="damage")
        second = make.head("second", parent=birth, step=10)
        await library.commit_head(lease, head=second, manifest=make.manifest("second"), parent=birth.digest)
        with pytest.raises(LeaseLost, match="the head is"):
            await library.rewind(lease, damaged=make.head("never").digest, to=birth.digest, reason="damage")
        assert (await library.run("r1")).head == second

    play(scenario)


def test_a_fact_is_inserted_once_and_numbered_by_the_database(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        graft = await library.insert_fact(lease, make.fact(1, step=100))
        assert graft.seq == 1
        assert await library.insert_fact(lease, make.fact(1, step=200)) == graft
        verdict = await library.insert_fact(lease, make.fact(1, FactKind.FOSSILIZE, step=900))
        stop = await library.insert_fact(lease, make.fact(2, FactKind.STOP, step=901))
        assert [fact.seq for fact in (graft, verdict, stop)] == [1, 2, 3]
        assert await library.facts("r1") == (graft, verdict, stop)
        ledger = await library.take_over(lease)
        assert (ledger.facts, ledger.frontier, ledger.head) == ((graft, verdict, stop), 901, None)

    play(scenario)


@pytest.mark.fault("F1", "I2")
@pytest.mark.parametrize(("first", "second"), [(FactKind.GRAFT, FactKind.MISSED), (FactKind.MISSED, FactKind.GRAFT)])
def test_a_graft_and_a_missed_delivery_exclude_each_other(play, make, first, second):
    async def scenario(library):
        lease = await begin(library, make)
        ruling = await library.insert_fact(lease, make.fact(1, first))
        assert ruling.kind is first
        assert await library.insert_fact(lease, make.fact(1, second)) == ruling
        assert await library.facts("r1") == (ruling,)
        other = await library.insert_fact(lease, make.fact(2, second))
        assert other.kind is second

    play(scenario)


def test_concurrent_facts_of_one_delivery_are_one(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        kinds = [FactKind.GRAFT, FactKind.MISSED] * 4
        results = await asyncio.gather(*(library.insert_fact(lease, make.fact(1, kind)) for kind in kinds))
        assert len({fact.model_dump_json() for fact in results}) == 1
        assert len(await library.facts("r1")) == 1

    play(scenario)


def test_a_fact_of_another_run_is_refused(play, make):
    async def scenario(library):
        lease = await begin(library, make)
        with pytest.raises(ValueError, match="lease of run"):
            await library.insert_fact(lease.model_copy(update={"run_id": "r2"}), make.fact())
        with pytest.raises(NotFoundError):
            await library.take_over(lease.model_copy(update={"run_id": "r2"}))
        head = make.head("x")
        with pytest.raises(NotFoundError):
            await library.commit_head(
                lease.model_copy(update={"run_id": "r2"}), head=head, manifest=make.manifest("x"), parent=None
            )

    play(scenario)


WRITER = Path(__file__).with_name("writer.py")


@pytest.mark.fault("E1")
def test_four_processes_lose_no_write(play, make, database_url):
    play(lambda library: begin(library, make))
    command = [sys.executable, str(WRITER), database_url, "4", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    facts = play(lambda library: library.facts("r1"))
    assert [fact.seq for fact in facts] == list(range(1, 201))
    assert len({fact.adaptation_id for fact in facts}) == 200
    if database_url.startswith("sqlite"):
        assert play(lambda library: library.run("r1")).restarts == 200
