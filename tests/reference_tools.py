"""The tools that metrics are compared with (extra `parity`); where one is not installed, its tests are skipped.

All of them require torchvision, whose published builds are for CUDA: beside a torch for CPUs it lacks its compiled
operators, and its own import fails when it describes two of them. No test runs these, so they are declared here.
"""

from importlib.util import find_spec
from types import ModuleType

import pytest

OPERATORS = ("nms", "qnms")
_declared: list = []  # torch forgets an operator with the library that declared it


def reference(name: str) -> ModuleType:
    """Return a module of a tool, such as "torch_fidelity"; skip the caller, a test or a file of tests, without it."""
    torch = pytest.importorskip("torch")
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed; pip install -e '.[parity]'", allow_module_level=True)
    if not _declared and torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    return pytest.importorskip(name)
