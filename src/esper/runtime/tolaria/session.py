"""The live training session of one run: the face that the trainer's activities call.

Threads: `train_epoch`, `judge`, `checkpoint` and `finish` take turns at the model, in the order of epochs; `install`,
`abandon` and `remove` work beside them and only record facts. At each step boundary the thread that trains executes
the facts of that step by `seq`, then a checkpoint that was asked for, and takes the step.
"""

from collections import Counter
from collections.abc import Collection
from concurrent.futures import Future
from time import monotonic

from esper.contracts.config import EsperConfig
from esper.contracts.enums import EpochStatus
from esper.contracts.enums import FactKind
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.contracts.operational import EpochReport
from esper.contracts.operational import EpochResult
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import InstallResult
from esper.contracts.orders import LoadedRun
from esper.errors import RunFailed
from esper.runtime.failpoints import hit
from esper.runtime.kasmina.digest import weights_digest
from esper.runtime.tolaria.live import deliveries
from esper.runtime.tolaria.live.boundary import judge_is_due
from esper.runtime.tolaria.live.boundary import pass_boundary
from esper.runtime.tolaria.live.boundary import serve_checkpoints
from esper.runtime.tolaria.live.boundary import take_verdict
from esper.runtime.tolaria.live.epoch_report import close_epoch
from esper.runtime.tolaria.live.export import export_files
from esper.runtime.tolaria.live.export import final_metrics
from esper.runtime.tolaria.live.kernel_faults.guard import take_step
from esper.runtime.tolaria.live.loading import Loaded
from esper.runtime.tolaria.live.loading import load_run
from esper.runtime.tolaria.live.surgery import all_seeds
from esper.runtime.tolaria.live.task_failure import guarded
from esper.runtime.tolaria.live.turns import Pulse
from esper.runtime.tolaria.live.writer import Committed
from esper.runtime.tolaria.store import Beat
from esper.runtime.tolaria.store import Ledger
from esper.runtime.tolaria.store import Progress
from esper.runtime.tolaria.store import SessionStore

_ENDINGS = (FactKind.REMOVE, FactKind.CULL, FactKind.BREAKER, FactKind.QUARANTINE, FactKind.MISSED)


class Session:
    """One run in the memory of one process. Once it has failed, every call raises what it failed with."""

    def __init__(self, loaded: Loaded, reports: dict[int, EpochReport], commit_at: Collection[int] = ()) -> None:
        self._shared = loaded.shared
        self._writer = loaded.writer
        self._warnings = loaded.warnings
        self._rewound_from = loaded.rewound_from
        self._commit_at = commit_at
        self._reports = reports
        self._commits: dict[int, Future[Committed]] = {}
        self._hold: int | None = None
        self._holds = 0
        self._loss: float | None = None
        self._rows = 0
        self._rate: tuple[float, int] = (monotonic(), 0)

    @classmethod
    def load(
        cls,
        config: EsperConfig,
        ledger: Ledger,
        store: SessionStore,
        *,
        commit_at: Collection[int] = (),
        accept_drift: bool = False,
        timed: bool = True,
    ) -> "Session":
        """A run where its head stands, or a fresh one with its first head committed at step 0.

        Heads are committed at the end of epochs (`training.checkpoint_every`, see `close_epoch`), before each graft and
        at the steps `commit_at`; training pauses at the last of those. Without `timed` no kernel is removed for being
        slow.

        Raises what can be wrong with the task, the device, the data (ESP-2xx, ESP-3xx), the checkpoint (ESP-402, 408,
        409) and the recipe (`RunConflict` ESP-502, unless `accept_drift`).
        """
        reports = {report.epoch: report for report in ledger.reports}
        return cls(load_run(config, ledger, store, accept_drift=accept_drift, timed=timed), reports, commit_at)

    def describe(self) -> LoadedRun:
        """Where the run stands and what it is made of."""
        run = self._shared.run
        plan, trainee = run.trainee.plan, run.trainee
        stopped = run.state.early_stop.stopped_epoch is not None
        with self._shared.turn.condition:
            facts = self._shared.book.all()
        return LoadedRun(
            step=run.step,
            epoch=trainee.completed,
            steps_per_epoch=plan.steps_per_epoch,
            head=self._head(),
            device=str(plan.device),
            threads=plan.threads,
            parameters=trainee.parameters,
            model_name=plan.model_name,
            graph=run.graph(),
            facts=facts,
            finished=stopped or trainee.completed >= plan.config.run.max_epochs,
            warnings=self._warnings,
            rewound_from=self._rewound_from,
        )

    def train_epoch(self, request: EpochRequest, beat: Beat) -> EpochResult:
        """Train to the end of an epoch, in turn, and return its report once it is committed.

        Already past it: the stored report. Early stopping ended the run before it: SKIPPED. Paused: where it stands.
        `beat` may raise to cancel: training then stands at a step boundary, and the next order goes on from there.
        Raises `RunFailed` (ESP-601) when the model or the task raises, `LeaseLost` when another process has the run.
        """
        pulse = Pulse(beat, self._progress)
        shared = self._shared
        holds = self._holds
        with shared.turn.condition:
            shared.book.expect(request.schedule)
            if self._hold is not None and request.pauses >= self._hold:
                self._hold = None
            while True:
                shared.turn.check()
                if holds != self._holds or self._hold is not None:
                    return self._result(EpochStatus.PAUSED, request.epoch)
                if shared.run.trainee.completed >= request.epoch:
                    break
                if self._ended_before(request.epoch):
                    return self._result(EpochStatus.SKIPPED, request.epoch)
                next_epoch = shared.run.trainee.completed + 1
                if request.epoch == next_epoch and not judge_is_due(shared) and shared.turn.claim():
                    break
                shared.turn.wait(pulse, "queued")
        if shared.run.trainee.completed < request.epoch:
            with shared.turn.taken():
                with guarded(shared, pulse, lambda: f"step {shared.run.step}"):
                    whole = self._train(request, pulse, holds)
                if not whole:
                    return self._result(EpochStatus.PAUSED, request.epoch)
        report = self._report(request.epoch, pulse)
        hit("epoch.before_answer")
        return EpochResult(
            status=EpochStatus.COMPLETED,
            epoch=request.epoch,
            step=request.epoch * shared.run.trainee.plan.steps_per_epoch,
            report=report,
        )

    def install(self, delivery: KernelDelivery) -> InstallResult:
        """Record the graft of a delivered kernel, with the kernel ready. See `deliveries.install`."""
        return deliveries.install(self._shared, delivery)

    def abandon(self, adaptation: ScheduledAdaptation, reason: str) -> InstallResult:
        """There will be no kernel for this adaptation: training does not wait for it."""
        return deliveries.abandon(self._shared, adaptation, reason)

    def remove(self, adaptation_id: str) -> InstallResult:
        """A person's cull of a block on probation: alpha falls to 0 over 64 steps, then the block is gone."""
        return deliveries.remove(self._shared, adaptation_id)

    def judge(self, adaptation_id: str, beat: Beat) -> JudgeReport:
        """Judge a graft at the step of its verdict, execute the verdict, and commit. Training waits there for it.

        Judged before: the same report. Nothing to judge (never grafted, removed): VOID.
        """
        pulse = Pulse(beat, self._progress)
        shared = self._shared
        with shared.turn.condition:
            while True:
                shared.turn.check()
                state = shared.run.state
                for known in state.judgements:
                    if known.adaptation_id == adaptation_id:
                        return known
                held = state.held.fact if state.held is not None else shared.book.pending_graft(state)
                if held is None or held.adaptation_id != adaptation_id:
                    return self._void(adaptation_id)
                if held.judge_step == shared.run.step and not self._epoch_is_open() and shared.turn.claim():
                    break
                shared.turn.wait(pulse, "queued")
        with shared.turn.taken():
            with guarded(shared, pulse, lambda: f"the judgement of {adaptation_id}"):
                report = take_verdict(shared, pulse)
            commit = shared.run.commit()
        shared.await_commit(commit, pulse)
        hit("judge.before_answer")
        return report

    def checkpoint(self, hold: bool, pauses: int = 0) -> HeadRef:
        """Commit where training stands, at the next step boundary.

        With `hold`, every `train_epoch` that is under way or waits returns PAUSED there; one that is ordered later,
        with at least as many `pauses`, goes on.
        """
        shared = self._shared
        request: Future[Future[Committed]] = Future()
        with shared.turn.condition:
            shared.turn.check()
            if hold:
                self._hold, self._holds = pauses, self._holds + 1
            shared.requests.append(request)
            shared.turn.condition.notify_all()
            while not request.done() and not shared.turn.claim():
                shared.turn.wait(lambda phase: None, "committing")
                shared.turn.check()
            served = request.done()
        if not served:
            with shared.turn.taken():
                serve_checkpoints(shared, lambda phase: None)
        return shared.await_commit(request.result(), lambda phase: None).head

    def finish(self) -> FinishedRun:
        """Commit what is not yet committed, measure the final model, and store its files."""
        shared = self._shared
        head = self.checkpoint(hold=True)
        with shared.turn.condition:
            while not shared.turn.claim():
                shared.turn.wait(lambda phase: None, "finishing")
        with shared.turn.taken():
            run = shared.run
            hit("finish.before_files")
            with guarded(shared, None, lambda: "the evaluation of the final model"):
                metrics = final_metrics(run)
            finished = FinishedRun(
                head=head,
                digest=weights_digest(run.trainee.model),
                metrics=metrics,
                parameters=run.trainee.parameters,
                files=export_files(run, shared.store),
                data_digest=run.trainee.plan.data_digest,
            )
        hit("finish.before_answer")
        return finished

    def digest(self) -> str:
        """`weights_digest` of the model as it stands; nobody may be training."""
        return weights_digest(self._shared.run.trainee.model)

    def unfinished(self) -> FinishedRun:
        """What is known of a run that ends here without an end result."""
        trainee = self._shared.run.trainee
        return FinishedRun(
            head=self._head(),
            digest=None,
            metrics={},
            parameters=trainee.parameters,
            data_digest=trainee.plan.data_digest,
        )

    def close(self) -> None:
        """Wait for the commit in flight; nothing more may be asked of this session."""
        self._writer.close()

    def _train(self, request: EpochRequest, pulse: Pulse, holds: int) -> bool:
        """Train the epoch whose turn it is. False when it was paused on the way."""
        shared, run = self._shared, self._shared.run
        began, stalled = monotonic(), shared.stall_seconds
        shared.began = run.step, began
        end = request.epoch * run.trainee.plan.steps_per_epoch
        while run.step < end:
            pass_boundary(shared, pulse)
            if shared.requests:
                serve_checkpoints(shared, pulse)
            if holds != self._holds or self._ends_here(pulse):
                return False
            self._rows += take_step(shared, pulse)
            shared.turn.moved()
            if run.step < end:
                pulse("training")
        with guarded(shared, pulse, lambda: f"the evaluation after epoch {request.epoch}"):
            commit = close_epoch(
                shared,
                pulse,
                expects_decision=request.expects_decision,
                began=began,
                stall_seconds=stalled,
                wants_head=end in self._commit_at,
            )
        self._commits = {request.epoch: commit} | {n: c for n, c in self._commits.items() if not c.done()}
        return True

    def _ends_here(self, pulse: Pulse) -> bool:
        """Commit where it was asked for from the beginning; true at the last of those steps."""
        shared = self._shared
        if shared.run.step not in self._commit_at:
            return False
        if not shared.run.committed:
            shared.run.wait_for_writer(lambda commit: shared.stall_for(commit, pulse))
            shared.stall_for(shared.run.commit(), pulse)
        return shared.run.step == max(self._commit_at)

    def _report(self, epoch: int, pulse: Pulse) -> EpochReport:
        commit = self._commits.get(epoch)
        if commit is not None:
            report = self._shared.await_commit(commit, pulse).report
            if report is not None:
                self._reports[epoch] = report
        if epoch not in self._reports:
            raise RunFailed("ESP-601", f"the report of epoch {epoch} is neither here nor in Urza")
        return self._reports[epoch]

    def _result(self, status: EpochStatus, epoch: int) -> EpochResult:
        return EpochResult(status=status, epoch=epoch, step=self._shared.run.step)

    def _ended_before(self, epoch: int) -> bool:
        run = self._shared.run
        stopped = run.state.early_stop.stopped_epoch
        return epoch > run.trainee.plan.config.run.max_epochs or (stopped is not None and epoch > stopped)

    def _epoch_is_open(self) -> bool:
        """Whether steps of an epoch were taken that has not been closed."""
        trainee = self._shared.run.trainee
        return trainee.step != trainee.completed * trainee.plan.steps_per_epoch

    def _head(self) -> HeadRef:
        last = self._writer.last
        if last is None:
            raise RunFailed("ESP-601", "the run has no head yet")
        return last.head

    def _void(self, adaptation_id: str) -> JudgeReport:
        shared = self._shared
        fact = shared.book.find(adaptation_id, *_ENDINGS)
        reason = f"{fact.kind}: {fact.reason}" if fact is not None else "it was never grafted"
        return JudgeReport(
            run_id=shared.run.run_id,
            adaptation_id=adaptation_id,
            verdict=Verdict.VOID,
            step=shared.run.step,
            reason=reason,
        )

    def _progress(self, phase: str) -> Progress:
        shared = self._shared
        trainee = shared.run.trainee
        if phase == "training" and trainee.last_loss is not None:
            # Only here, on the thread that trains, is a tensor read.
            self._loss = float(trainee.last_loss)
        now, (then, rows) = monotonic(), self._rate
        speed = (self._rows - rows) / max(1e-9, now - then)
        if phase == "training":
            self._rate = now, self._rows
        seeds = Counter(seed.state.value for seed in all_seeds(trainee.model))
        with shared.turn.condition:
            ordered = len(shared.book.expected())
        seeds[SeedState.GERMINATED.value] += ordered
        seeds[SeedState.DORMANT.value] -= ordered
        return Progress(
            step=trainee.step,
            epoch=trainee.completed + 1,
            loss=self._loss,
            samples_per_s=speed,
            seeds={state: count for state, count in seeds.items() if count > 0},
            phase=phase,
        )
