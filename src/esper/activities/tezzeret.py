"""The forge role: build, certify and publish a kernel. Building and certifying run in a child with limits."""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from typing import Any

from temporalio import activity

from esper.activities import names
from esper.activities.heartbeats import pulse
from esper.contracts.assets import Kernel
from esper.contracts.config import CompileMode
from esper.contracts.enums import KernelState
from esper.contracts.orders import BuildRequest
from esper.contracts.orders import BuiltKernel
from esper.contracts.orders import CertifyRequest
from esper.contracts.orders import PublishRequest
from esper.errors import BlueprintError
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import verify
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.forge_child import build_in_child
from esper.runtime.tezzeret.forge_child import certify_in_child
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import samples_for
from esper.runtime.tezzeret.samples import unpack_samples
from esper.runtime.urza.connections import Connections

log = logging.getLogger(__name__)


def kernel_seed(run_seed: int, number: int) -> int:
    """The seed of the `number`-th kernel of a run: equal runs get equal kernels, whatever they are called."""
    return int.from_bytes(hashlib.sha256(f"esper-kernel\n{run_seed}\n{number}".encode()).digest()[:7], "big")


class TezzeretActivities:
    """Bytes travel through Urza; between activities only their digests do."""

    def __init__(self, connections: Connections, loop: asyncio.AbstractEventLoop) -> None:
        self._connections = connections
        self._loop = loop

    def all(self) -> list[Callable[..., Any]]:
        return [self.build_kernel, self.certify_kernel, self.publish_kernel]

    @activity.defn(name=names.BUILD_KERNEL.name, no_thread_cancel_exception=True)
    def build_kernel(self, request: BuildRequest) -> BuiltKernel:
        """From blueprint and samples to two files in Urza."""
        with pulse("building"):
            return self._build(request)

    def _build(self, request: BuildRequest) -> BuiltKernel:
        adaptation = request.adaptation
        hyperparameters = resolve_hyperparameters(adaptation.blueprint, request.site, adaptation.hyperparameters)
        files = build_in_child(
            adaptation.blueprint,
            request.site,
            hyperparameters,
            seed=kernel_seed(request.run_seed, adaptation.number),
            samples=self._samples(request),
            max_parameters=request.tezzeret.max_parameters,
            max_flops=request.tezzeret.max_flops,
            timeout_s=request.tezzeret.timeout_s,
            memory_mb=request.tezzeret.memory_mb,
        )
        manifest = verify(files, files.digest)
        store = self._connections.store(request.urza)
        kernel = Kernel(
            digest=files.digest,
            blueprint=adaptation.blueprint,
            hyperparameters=hyperparameters,
            site=request.site,
            manifest=store.put(files.manifest),
            weights=store.put(files.weights),
            parameter_count=manifest.parameter_count,
        )
        log.info("built %s for %s: %s", kernel.blueprint, kernel.site.site, kernel.digest)
        return BuiltKernel(kernel=kernel)

    @activity.defn(name=names.CERTIFY_KERNEL.name, no_thread_cancel_exception=True)
    def certify_kernel(self, request: CertifyRequest) -> PublishRequest:
        """The birth certificate; a kernel that fails it is refused here and never published as usable."""
        with pulse("certifying"):
            return self._certify(request)

    def _certify(self, request: CertifyRequest) -> PublishRequest:
        build, kernel = request.build, request.kernel
        store = self._connections.store(build.urza)
        certificate = certify_in_child(
            KernelFiles(manifest=store.get(kernel.manifest), weights=store.get(kernel.weights)),
            samples=self._samples(build),
            optimizer=build.optimizer,
            compile=build.tezzeret.compile is CompileMode.ON,
            timeout_s=build.tezzeret.timeout_s,
            memory_mb=build.tezzeret.memory_mb,
        )
        if not certificate.passed:
            raise BlueprintError(
                "ESP-427",
                f"kernel {kernel.digest[:19]} ({kernel.blueprint} for {kernel.site.site}) fails its birth "
                f"certificate: {'; '.join(certificate.failures)}",
                hint="nothing was grafted; the run goes on",
            )
        log.info("certified %s", kernel.digest)
        return PublishRequest(kernel=kernel, certificate=certificate, build=build)

    @activity.defn(name=names.PUBLISH_KERNEL.name)
    async def publish_kernel(self, request: PublishRequest) -> BuiltKernel:
        """Into the library: the certificate as a file of its own, the kernel once per adaptation."""
        build = request.build
        document = canonical_json(request.certificate.model_dump(mode="json"))
        certificate = await asyncio.to_thread(self._connections.store(build.urza).put, document)
        kernel = request.kernel.model_copy(update={"certificate": certificate, "state": KernelState.CERTIFIED})
        library = await self._connections.library(build.urza)
        published = await library.publish_kernel(kernel, build.adaptation.adaptation_id, build.run_id)
        return BuiltKernel(kernel=published)

    def _samples(self, request: BuildRequest) -> SiteSamples | None:
        if request.site_samples is None:
            return None
        data = self._connections.store(request.urza).get(request.site_samples)
        return samples_for(request.site, unpack_samples(data))
