from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.build import SiteSamples
from esper.runtime.tezzeret.forge_child import ForkServer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def linear_site() -> SiteContract:
    return SiteContract(
        site="fc1", output_site="fc1", kind="linear", input_shape=(12,), output_shape=(7,), dtype="float32"
    )


@pytest.fixture
def conv2d_site() -> SiteContract:
    return SiteContract(
        site="conv",
        output_site="conv",
        kind="conv2d",
        input_shape=(3, 8, 8),
        output_shape=(5, 8, 8),
        dtype="float32",
        attributes={"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1},
    )


@pytest.fixture
def pair_site() -> SiteContract:
    return SiteContract(
        site="fc1",
        output_site="fc2",
        kind="linear",
        input_shape=(12,),
        output_shape=(4,),
        dtype="float32",
        attributes={"width": 2, "pair_activation": "tanh"},
    )


@pytest.fixture
def draw_samples() -> Callable[..., SiteSamples]:
    """Samples of a site whose gradient is a non-linear function of the input."""

    def draw(site: SiteContract, rows: int = 128, seed: int = 0) -> SiteSamples:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((rows, *site.input_shape), generator=generator)
        mixing = torch.randn((x[0].numel(), torch.Size(site.output_shape).numel()), generator=generator)
        g = torch.relu(x.flatten(1) - 0.5) @ mixing / rows
        return SiteSamples(x, g.reshape(rows, *site.output_shape))

    return draw


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer(jobs="forge_faults", search_path=(str(Path(__file__).parent),))
    server.start()
    yield server
    server.stop()
