"""A run that wants compiled kernels where nothing can compile says so."""

import torch

from esper.contracts.config import CompileMode
from esper.contracts.config import TezzeretConfig
from esper.runtime.tolaria.live.compilation import no_compiler

CPU = torch.device("cpu")


def test_no_compiler_is_said_only_where_it_is_wanted(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    (warning,) = no_compiler(TezzeretConfig(compile=CompileMode.ON), CPU)
    assert "run eagerly" in warning
    assert no_compiler(TezzeretConfig(compile=CompileMode.AUTO), CPU) == ()
