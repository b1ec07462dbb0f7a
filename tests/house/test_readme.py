"""What the README shows as code does what it says."""

import re
from pathlib import Path

import torch
from torch import nn

import esper

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def test_the_library_lines_of_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    block = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "esper.wrap" in code)
    code = block.replace('"grown/"', repr(str(tmp_path / "grown")))
    net = Net()
    scope = {
        "net": net,
        "optimizer": torch.optim.AdamW(net.parameters(), lr=1e-2),
        "criterion": nn.CrossEntropyLoss(),
        "x": torch.randn(16, 6),
        "y": torch.randint(0, 3, (16,)),
    }
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102 (our own README)
    assert (tmp_path / "grown" / "growth.json").exists()
    assert not isinstance(scope["plain"], esper.MorphableModel)


def test_every_link_into_the_repository_leads_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
