"""A compiled model that grows: recompiled once for each change, never silently run uncompiled, equal to eager."""

import pytest
import torch
from torch import nn

import esper

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


class Counting:
    """A backend that counts the graphs that it is asked to compile, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def deep():
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(12) for part in (nn.Linear(16, 16), nn.ReLU())))
    return esper.wrap(model, example_inputs=torch.randn(4, 16))


def test_dormant_model_compiles_to_one_graph_without_a_break(deep):
    backend = Counting()
    compiled = torch.compile(deep, backend=backend, fullgraph=True)
    x = torch.randn(4, 16)
    assert torch.equal(compiled(x), deep(x))
    assert backend.graphs == 1


def test_twelve_growths_are_twelve_compilations_and_never_eager(deep):
    backend = Counting()
    compiled = torch.compile(deep, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(deep.parameters(), lr=0.01)
    x = torch.randn(4, 16)
    compiled(x)
    for growth in range(12):
        esper.graft(deep, str(2 * growth), "bottleneck", optimizer=optimizer, rank=4)
        before = backend.graphs
        for _ in range(3):
            loss = compiled(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert backend.graphs == before + 1, f"growth {growth}"
        torch.testing.assert_close(compiled(x), deep(x))


def test_culled_and_regrown_model_stays_compiled(deep):
    backend = Counting()
    compiled = torch.compile(deep, backend=backend, fullgraph=True)
    x = torch.randn(4, 16)
    compiled(x)
    for _ in range(10):
        esper.graft(deep, "0", "bottleneck", rank=4)
        grown = backend.graphs
        compiled(x)
        assert backend.graphs <= grown + 1
        esper.cull(deep, "0")
        compiled(x)
    after = backend.graphs
    compiled(x)
    assert backend.graphs == after
    assert torch._dynamo.utils.counters["frames"]["total"] == torch._dynamo.utils.counters["frames"]["ok"]


def test_regionally_compiled_blocks_recompile_where_they_grew():
    torch.manual_seed(0)
    backend = Counting()
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(6)))
    esper.wrap(blocks, example_inputs=torch.randn(2, 8))
    for block in blocks:
        block.compile(backend=backend)
    x = torch.randn(2, 8)
    expected = blocks(x)
    graphs = backend.graphs
    esper.graft(blocks, "2.0", "bottleneck", rank=4)
    assert torch.equal(blocks(x), expected)
    assert graphs < backend.graphs <= graphs + 2
    for index in (0, 1, 3, 4, 5):
        esper.graft(blocks, f"{index}.0", "bottleneck", rank=4)
        assert torch.equal(blocks(x), expected)


def test_a_widened_pair_that_was_called_uncompiled_too_is_one_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(2, 8)
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "0", "widen", units=10)
    backend = Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
    assert backend.graphs == 1


def test_another_compiled_model_survives_the_room_that_is_made(deep):
    other, backend = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Counting()
    compiled_other = torch.compile(other, backend=backend)
    y = torch.randn(2, 4)
    compiled_other(y)
    compiled = torch.compile(deep, backend=Counting())
    for growth in range(10):
        esper.graft(deep, str(2 * growth), "bottleneck", rank=4)
        compiled(torch.randn(4, 16))
    assert torch.equal(compiled_other(y), other(y))
    assert backend.graphs <= 3
