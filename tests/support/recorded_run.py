"""A run as a trainer and a workflow would have left it in Urza: real rows, a real kernel, made up numbers."""

import hashlib

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Certificate
from esper.contracts.assets import Kernel
from esper.contracts.assets import Seed
from esper.contracts.assets import SiteContract
from esper.contracts.config import EsperConfig
from esper.contracts.config import UrzaConfig
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import FactKind
from esper.contracts.enums import KernelState
from esper.contracts.enums import Outcome
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import Alternative
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import Metrics
from esper.contracts.operational import SiteNode
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import RecordOutcome
from esper.contracts.orders import RecordRun
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import ObjectStore

SITE = SiteContract(
    site="layers.0", output_site="layers.0", kind="linear", input_shape=(4,), output_shape=(3,), dtype="float32"
)
STEPS = 10
PARAMETERS = 870
WEIGHTS = b"the tensors of the final model"
GROWTH = b'{"schema": 1}'
DIGEST = "sha256:" + hashlib.sha256(WEIGHTS).hexdigest()


class RecordedRun:
    """Writes one run, event by event, in the order in which a live one would."""

    def __init__(self, library: Library, store: ObjectStore, config: EsperConfig, run_id: str) -> None:
        self.library = library
        self.store = store
        self.config = config
        self.run_id = run_id
        self._head: HeadRef | None = None

    async def begin(self) -> None:
        await self.library.record_run(RecordRun(run_id=self.run_id, config=self.config), "2026-11-23T12:00:00+00:00")
        self._lease = await self.library.claim(self.run_id, "esper-trainer@test")
        head = await self._commit(0, None)
        loaded = LoadedRun(
            step=0,
            epoch=0,
            steps_per_epoch=STEPS,
            head=head,
            device="cpu",
            threads=1,
            parameters=PARAMETERS,
            model_name="Layered",
            graph=self._graph(SeedState.DORMANT),
            warnings=("one warning",),
        )
        await self._outcome(Outcome.RUNNING, loaded=loaded)

    async def go_on(self, expected_head: str) -> None:
        """What a resumed run does first: a new lease on the head that it was told."""
        self._lease = await self.library.claim(self.run_id, "esper-trainer@test")
        self._head = (await self.library.run(self.run_id)).head
        assert self._head is not None
        assert self._head.digest == expected_head
        await self._outcome(Outcome.RUNNING)

    async def epoch(self, epoch: int, state: SeedState = SeedState.DORMANT) -> None:
        """Train one epoch: a head and its report; the loss falls with every epoch."""
        await self._commit(epoch, self._graph(state))

    async def decide(self, epoch: int, kind: DecisionKind) -> None:
        grows = kind is DecisionKind.GERMINATE
        alternative = Alternative(
            site="layers.0",
            blueprint="bottleneck",
            score=0.5 if grows else 0.01,
            threshold=0.1,
            added_parameters=32,
            added_flops_per_sample=64,
            eligible=True,
            reason="residual gradient",
        )
        await self.library.record_decision(
            AdaptationDecision(
                run_id=self.run_id,
                epoch=epoch,
                policy="heuristic",
                kind=kind,
                code="grow" if grows else "below_threshold",
                reason="the loss is flat" if grows else "nothing scores above its threshold",
                site="layers.0" if grows else None,
                seed=0 if grows else None,
                blueprint="bottleneck" if grows else None,
                alternatives=(alternative,),
            )
        )

    async def adapt(
        self, state: AdaptationState, *, number: int = 1, epoch: int = 1, kernel: str | None = None
    ) -> None:
        adaptation_id = f"{self.run_id}/a{number}"
        judged = state in {AdaptationState.FOSSILIZED, AdaptationState.CULLED}
        judge = JudgeReport(
            run_id=self.run_id,
            adaptation_id=adaptation_id,
            verdict=Verdict.KEEP if state is AdaptationState.FOSSILIZED else Verdict.CULL,
            step=3 * STEPS,
            grown_loss=0.2,
            twin_loss=0.3,
            gain=0.1,
            gain_lower_bound=0.08,
            margin=0.02,
            chunks=8,
            reason="worth it",
        )
        await self.library.record_adaptation(
            Adaptation(
                adaptation_id=adaptation_id,
                number=number,
                epoch=epoch,
                site="layers.0",
                seed=0,
                seed_generation=0,
                blueprint="bottleneck",
                kernel=kernel,
                apply_step=(epoch + 1) * STEPS,
                state=state,
                reason=f"{state.value} for a reason",
                judge=judge if judged else None,
            )
        )

    async def graft_fact(self) -> None:
        fact = Fact(
            run_id=self.run_id,
            adaptation_id=f"{self.run_id}/a1",
            kind=FactKind.GRAFT,
            apply_step=2 * STEPS,
            seq=0,
            site="layers.0",
            seed=0,
        )
        await self.library.insert_fact(self._lease, fact)

    async def publish_kernel(self) -> Kernel:
        """A real kernel with a certificate, in the store and in the table."""
        files = build_kernel("bottleneck", SITE, {"rank": 2}, seed=7, samples=None, max_parameters=1000)
        certificate = Certificate(
            kernel=files.digest,
            passed=True,
            birth_difference=0.0,
            first_step_drift=0.01,
            parameters_with_gradient=3,
            parameters_total=3,
            parameter_count=16,
            flops_per_sample=28,
            host_flops_per_sample=24,
            forward_us=1.0,
            host_forward_us=1.0,
            compiled="off",
            torch_version="2",
            forge="test",
        )
        kernel = Kernel(
            digest=files.digest,
            blueprint="bottleneck",
            hyperparameters={"rank": 2},
            site=SITE,
            manifest=self.store.put(files.manifest),
            weights=self.store.put(files.weights),
            certificate=self.store.put(certificate.model_dump_json().encode()),
            parameter_count=16,
            state=KernelState.CERTIFIED,
        )
        return await self.library.publish_kernel(kernel, f"{self.run_id}/a1", self.run_id)

    async def end(self, outcome: Outcome) -> None:
        assert self._head is not None
        files: dict[str, ArtifactRef] = {
            "model.safetensors": self.store.put(WEIGHTS),
            "growth.json": self.store.put(GROWTH),
            "config.yaml": self.store.put(b"run: {name: digits}\n"),
        }
        finished = FinishedRun(
            head=self._head,
            digest=DIGEST,
            metrics={"test_accuracy": 0.91},
            parameters=PARAMETERS + 16,
            files=files,
        )
        await self._outcome(outcome, finished=finished)

    async def fail(self, code: str, message: str) -> None:
        await self._outcome(
            Outcome.FAILED, failure={"code": code, "message": message, "hint": "Try another", "run_id": self.run_id}
        )

    async def whole(self) -> Kernel:
        """A completed run of four epochs: one kernel grafted and kept, one delivery missed."""
        await self.begin()
        kernel = await self.publish_kernel()
        for epoch in range(1, 5):
            await self.epoch(epoch, SeedState.DORMANT if epoch < 3 else SeedState.TRAINING)
            await self.decide(epoch, DecisionKind.GERMINATE if epoch in (1, 3) else DecisionKind.WAIT)
        await self.graft_fact()
        await self.adapt(AdaptationState.FOSSILIZED, kernel=kernel.digest)
        await self.adapt(AdaptationState.MISSED, number=2, epoch=3)
        await self.end(Outcome.COMPLETED)
        return kernel

    async def _commit(self, epoch: int, graph: LayerGraph | None) -> HeadRef:
        manifest = self.store.put(f"{self.run_id} {epoch}".encode())
        parent = self._head.digest if self._head else None
        head = HeadRef(digest=manifest.digest, parent=parent, step=epoch * STEPS, epoch=epoch)
        report = None if graph is None else self._report(epoch, head, graph)
        self._head = await self.library.commit_head(
            self._lease, head=head, manifest=manifest, parent=parent, report=report
        )
        return self._head

    def _report(self, epoch: int, head: HeadRef, graph: LayerGraph) -> EpochReport:
        return EpochReport(
            run_id=self.run_id,
            epoch=epoch,
            step=head.step,
            head=head,
            metrics=Metrics(train_loss=1 / epoch, val_loss=1.5 / epoch, extra={"accuracy": 1 - 0.5 / epoch}),
            learning_rate=0.01,
            samples=640,
            parameters=PARAMETERS,
            training_flops=1e6,
            probe_flops=1e5,
            busy_seconds=1.0,
            stall_seconds=0.25,
            graph=graph,
            health=(),
        )

    def _graph(self, state: SeedState) -> LayerGraph:
        grown = state is not SeedState.DORMANT
        seeds = (
            Seed(
                site="layers.0",
                index=0,
                state=state,
                blueprint="bottleneck" if grown else None,
                parameters=16 if grown else 0,
                born_step=2 * STEPS if grown else None,
            ),
            Seed(site="layers.0", index=1),
        )
        return LayerGraph(
            nodes=(SiteNode(contract=SITE, parameter_count=15, flops_per_sample=24, depth=0, seeds=seeds),), edges=()
        )

    async def _outcome(
        self,
        outcome: Outcome,
        *,
        loaded: LoadedRun | None = None,
        finished: FinishedRun | None = None,
        failure: dict[str, object] | None = None,
    ) -> None:
        await self.library.finish(
            RecordOutcome(
                run_id=self.run_id,
                urza=UrzaConfig(),
                outcome=outcome,
                loaded=loaded,
                finished=finished,
                failure=failure,  # type: ignore[arg-type]
                warnings=loaded.warnings if loaded else (),
            )
        )
