"""The floors of the house, by what a process has loaded."""

import subprocess
import sys

SERVICES = {"temporalio", "sqlalchemy", "boto3", "botocore", "torch_geometric"}


def loaded(code: str) -> set[str]:
    """The top packages that a fresh interpreter has loaded after `code`."""
    # Without finalisation: what has loaded a Temporal client may hang there.
    told = "import os, sys\nprint('LOADED', *{name.split('.')[0] for name in sys.modules}, flush=True)\nos._exit(0)"
    script = f"{code}\n{told}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    assert len(lines) == 1
    return set(lines[0].split()[1:])


def test_importing_esper_loads_next_to_nothing() -> None:
    assert loaded("import esper") & (SERVICES | {"torch", "numpy", "pydantic", "ruamel"}) == set()


def test_the_library_face_loads_no_service() -> None:
    names = "import esper\nfor name in esper.__all__: getattr(esper, name)"
    assert loaded(names) & SERVICES == set()


def test_help_loads_neither_torch_nor_a_service() -> None:
    code = "from esper.cli import run\nassert run(['--help']) == 0\nassert run(['start-run', '--help']) == 0"
    assert loaded(code) & (SERVICES | {"torch", "numpy", "ruamel"}) == set()


def test_what_the_orchestrator_and_the_supervisor_are_made_of_has_no_torch() -> None:
    modules = (
        "esper.workflows.training_run",
        "esper.workflows.tamiyo_decision",
        "esper.workflows.tezzeret_compile",
        "esper.worker",
        "esper.activities.names",
        "esper.activities.urza",
        "esper.runtime.supervisor",
        "esper.runtime.stack",
        "esper.runtime.temporal.client",
    )
    assert loaded(f"import {', '.join(modules)}") & {"torch", "torch_geometric"} == set()


def test_configuration_loads_no_service() -> None:
    assert loaded("import esper.runtime.configuration") & (SERVICES | {"torch"}) == set()


def test_blueprints_are_known_without_torch() -> None:
    assert loaded("import esper.runtime.tezzeret.blueprints.registry") & (SERVICES | {"torch"}) == set()
