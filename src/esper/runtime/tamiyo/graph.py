"""The health graph as a PyTorch Geometric `Data`: what every policy reads and a learned one is trained on.

The only module that imports torch_geometric (10 s, 700 MB): the tamiyo role alone loads it.
"""

from dataclasses import dataclass

import torch
from torch_geometric.data import Data

from esper.contracts.base import SiteName
from esper.contracts.orders import ScoreRequest
from esper.runtime.tamiyo.features import NODE_FEATURES
from esper.runtime.tamiyo.features import RUN_FEATURES
from esper.runtime.tamiyo.features import HealthFeatures
from esper.runtime.tamiyo.features import describe
from esper.runtime.tamiyo.features import read_feature


@dataclass(frozen=True)
class HealthGraph:
    """A `HealthView` over one `Data`.

    `data` has `x` [sites, len(NODE_FEATURES)], `edge_index` [2, edges] (int64), `edge_type` [edges] (int64,
    an index of `RELATIONS`), `edge_attr` [edges, 1] (log of the elements that flow), `u`
    [1, len(RUN_FEATURES)] and `sites`, the names in row order. Floats are float64, so that what a policy
    decides on is to the bit what was measured; a network casts down on its own.
    """

    data: Data

    def node(self, site: SiteName, feature: str) -> float | None:
        return read_feature(self.data.x[self.data.sites.index(site)].tolist(), NODE_FEATURES, feature)

    def run(self, feature: str) -> float | None:
        return read_feature(self.data.u[0].tolist(), RUN_FEATURES, feature)


def build_graph(request: ScoreRequest) -> HealthGraph:
    """The health graph of the request's report."""
    return HealthGraph(as_data(describe(request)))


def as_data(features: HealthFeatures) -> Data:
    """The features as one `Data`, laid out as `HealthGraph` says."""
    edges = features.edges
    pairs = torch.tensor([(edge.source, edge.target) for edge in edges], dtype=torch.int64).reshape(-1, 2)
    return Data(
        x=torch.tensor(features.nodes, dtype=torch.float64).reshape(-1, len(NODE_FEATURES)),
        edge_index=pairs.t().contiguous(),
        edge_type=torch.tensor([edge.relation for edge in edges], dtype=torch.int64),
        edge_attr=torch.tensor([edge.log_elements for edge in edges], dtype=torch.float64).reshape(-1, 1),
        u=torch.tensor([features.run_row], dtype=torch.float64),
        sites=list(features.sites),
    )
