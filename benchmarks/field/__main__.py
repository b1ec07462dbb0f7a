"""`python -m benchmarks.field`: Esper against gromo, which is installed for benchmarks only and so looked for first."""

import importlib
import importlib.util
import sys

if __name__ == "__main__":
    if importlib.util.find_spec("gromo") is None:
        sys.exit("benchmarks.field compares with gromo, which is not installed: uv pip install --group benchmarks")
    importlib.import_module("benchmarks.field.comparison").main()
