import copy
import random
import threading
import time

import pytest
import torch
from torch._dynamo.utils import counters

from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret import compile as compile_module
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.compile import CompiledKernel
from esper.runtime.tezzeret.compile import warm
from esper.runtime.tezzeret.parity import c_compiler

needs_compiler = pytest.mark.skipif(c_compiler() is None, reason="no C++ compiler")


def kernel_of(site: SiteContract, name: str = "bottleneck") -> KernelModule:
    files = build_kernel(name, site, {}, seed=0, samples=None, max_parameters=10**6)
    kernel = load_kernel(files, files.digest)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        kernel.get_parameter("up.weight").normal_(generator=generator)
    return kernel


@pytest.mark.fault("B4")
def test_without_a_compiler_a_kernel_stays_eager_and_says_why(linear_site, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    told: list[CompiledKernel] = []
    kernel = kernel_of(linear_site)
    compiled = warm(kernel, torch.randn(4, 12), told.append)
    assert told == [compiled]
    assert compiled.wait(0)
    assert not compiled.ready
    assert compiled.reason == "no C++ compiler on this machine"
    assert not compiled.use_compiled()
    assert kernel.accelerated is None


@needs_compiler
def test_a_kernel_is_compiled_beside_training_and_swapped_between_steps(linear_site):
    kernel = kernel_of(linear_site)
    x = torch.randn(8, 12)
    eager = kernel(x).detach()
    told = threading.Event()
    main = threading.get_ident()
    torch.manual_seed(5)
    random.seed(5)
    compiled = warm(kernel, x, lambda _: told.set())
    drawn = []
    while not told.is_set():
        # Training goes on meanwhile, eagerly, and draws from the global generators.
        drawn.append((float(torch.rand(())), random.random()))
        time.sleep(0.02)
    assert threading.get_ident() == main
    torch.manual_seed(5)
    random.seed(5)
    assert drawn == [(float(torch.rand(())), random.random()) for _ in drawn]

    assert compiled.reason is None
    assert compiled.ready
    assert kernel.accelerated is None
    assert all(p.grad is None for p in kernel.parameters())
    assert compiled.use_compiled()

    graphs = counters["stats"]["unique_graphs"]
    assert torch.allclose(kernel(x), eager, atol=1e-5)
    for batch in (8, 5, 31):
        y = torch.randn(batch, 12)
        delta = kernel(y)
        delta.sum().backward()
        with torch.no_grad():
            kernel(y)
    with torch.no_grad():
        kernel.get_parameter("up.weight").mul_(2.0)
    assert torch.allclose(kernel(x), 2 * eager, atol=1e-5), "the compiled form reads the kernel's own weights"
    kernel(torch.randn(1, 12))
    assert counters["stats"]["unique_graphs"] == graphs, "nothing was compiled on the training thread"
    assert all(p.grad is not None and p.grad.any() for p in kernel.parameters())

    assert copy.deepcopy(kernel).accelerated is None
    compiled.use_eager()
    assert kernel.accelerated is None
    assert torch.equal(kernel(x), 2 * eager)


@needs_compiler
def test_what_was_not_warmed_runs_eagerly(linear_site):
    kernel = kernel_of(linear_site)
    compiled = warm(kernel, torch.randn(1, 12, requires_grad=True))
    assert compiled.wait(300)
    assert compiled.ready, compiled.reason
    assert compiled.covers(torch.randn(3, 12, requires_grad=True))
    assert not compiled.covers(torch.randn(3, 12))
    assert not compiled.covers(torch.randn(1, 12, requires_grad=True))
    assert not compiled.covers(torch.randn(3, 12, dtype=torch.float64))
    with torch.no_grad():
        assert compiled.covers(torch.randn(3, 12))
    with torch.inference_mode():
        assert not compiled.covers(torch.randn(3, 12))


@pytest.mark.fault("B4")
def test_a_compiler_that_fails_leaves_the_kernel_eager_with_a_reason(linear_site, monkeypatch):
    kernel = kernel_of(linear_site)
    compiled = CompiledKernel(kernel)

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the compiler said no\nat length")

    monkeypatch.setattr(compiled, "_compiled", fail)
    compile_module._compile(compiled, torch.randn(4, 12), None)
    assert compiled.reason == "compiling failed: the compiler said no"
    assert not compiled.use_compiled()
