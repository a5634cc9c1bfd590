"""Patched models as ONNX graphs, for ONNX Runtime and other engines.

``torch.onnx.export`` takes a patched model as it is and writes standard operators. :func:`export`
can also write each operator of this package as one node, which an engine runs by a library of ours:

>>> tome_ext.onnx.export(model, (images,), "model.onnx", operators="native")
>>> options = onnxruntime.SessionOptions()
>>> options.register_custom_ops_library(tome_ext.onnx.library("onnxruntime"))
>>> session = onnxruntime.InferenceSession("model.onnx", options)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from . import _library, _onnx_native, _onnx_standard

__all__ = ["Engine", "Operators", "export", "library"]

Operators = Literal["standard", "native"]
Engine = Literal["onnxruntime", "openvino"]

Forms = Mapping[str, Callable[..., Any]]
# By engine. OpenVINO's own attention takes sizes as cheaply, and computes in bfloat16, which nodes
# of others do not: docs/running/cpu.md.
NATIVE: Mapping[str, Forms] = {
    "onnxruntime": _onnx_native.FORMS,
    "openvino": {
        **_onnx_native.FORMS,
        "attention_forward": _onnx_standard.FORMS["attention_forward"],
    },
}
# By engine, the library's name, and how an installation comes to have it.
LIBRARIES: Mapping[str, tuple[str, str]] = {
    "onnxruntime": ("_onnxruntime", "install tome_ext again"),
    "openvino": (
        "_openvino",
        "install tome_ext from source with TOME_OPENVINO set to the folder that "
        "python -c 'import openvino; print(openvino.__path__[0])' prints",
    ),
}

_forms: ContextVar[Forms] = ContextVar("forms", default=_onnx_standard.FORMS)


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    operators: Operators = "standard",
    engine: Engine = "onnxruntime",
    **options: Any,
) -> Any:
    """Write a patched model as an ONNX graph: ``torch.onnx.export`` with a choice of operators.

    Args:
        model: a patched model in eval mode, or a program of ``torch.export``.
        args: example inputs.
        path: the file to write; None writes none.
        operators: "standard" writes what ONNX has, which any runtime can run. "native" writes each
            operator of this package as one node of the domain ``tome_ext``: fewer and faster, for
            an engine that has loaded :func:`library`.
        engine: for which native operators are chosen: "openvino" keeps its own attention. Either
            graph gives the same answers in both.
        **options: of ``torch.onnx.export``, such as ``dynamic_shapes`` and ``input_names``.

    Returns:
        The ``torch.onnx.ONNXProgram``.

    Raises:
        ValueError: there are no such operators or engine, or ``dynamo=False`` asks for the old
            exporter.
    """
    if operators not in ("standard", "native"):
        raise ValueError(f"operators: expected 'standard' or 'native', got {operators!r}")
    if engine not in tuple(NATIVE):  # which compares, so that any value may come
        raise ValueError(f"engine: expected one of {tuple(NATIVE)}, got {engine!r}")
    if not options.setdefault("dynamo", True):
        raise ValueError("dynamo: expected True, as the old exporter cannot take a patched model")
    token = _forms.set(NATIVE[engine] if operators == "native" else _onnx_standard.FORMS)
    try:
        return torch.onnx.export(model, args, path, **options)
    finally:
        _forms.reset(token)


def library(engine: Engine) -> str:
    """The file by which an engine learns the operators that ``operators="native"`` writes.

    It needs neither Python nor torch.

    Args:
        engine: "onnxruntime", 1.17 or newer: for
            ``SessionOptions.register_custom_ops_library``, or ``RegisterCustomOpsLibrary_V2`` of
            its C API. "openvino", for ``Core.add_extension``: it serves the release of OpenVINO
            that it was built for, and is there only if it was asked for (CONTRIBUTING.md,
            ``TOME_OPENVINO``).

    Returns:
        Its path.

    Raises:
        ValueError: there is none for such an engine.
        RuntimeError: this installation has been built without it, or for another release.
    """
    if engine not in tuple(LIBRARIES):
        raise ValueError(f"engine: expected one of {tuple(LIBRARIES)}, got {engine!r}")
    name, remedy = LIBRARIES[engine]
    found = [x for x in Path(_library.FOLDER).glob(f"{name}.*") if x.suffix in (".so", ".pyd")]
    if not found:
        raise RuntimeError(
            f"engine: expected a library {name} in {_library.FOLDER}, which holds none; {remedy}"
        )
    if engine == "openvino":
        _check_openvino(found[0], remedy)
    return str(found[0])


def _check_openvino(path: Path, remedy: str) -> None:
    """Refuse a library that is not for the OpenVINO installed here, if one is."""
    spec = find_spec("openvino")
    needed = re.search(rb"libopenvino\.so\.\d+", path.read_bytes())
    if spec is None or spec.origin is None or needed is None:
        return
    folder = Path(spec.origin).parent / "libs"
    here = sorted(x.name for x in folder.glob("libopenvino.so.*"))
    if here and needed[0].decode() not in here:
        raise RuntimeError(
            f"engine: expected a library for {here[-1]}, which is installed, got one for "
            f"{needed[0].decode()}; {remedy}"
        )


def register() -> None:
    """Make ``torch.onnx.export`` trace the operators in these forms; nothing else changes."""
    for name in _onnx_standard.FORMS:
        torch.library.register_torch_dispatch(f"tome::{name}", ProxyTorchDispatchMode, _rule(name))


def _rule(name: str) -> Callable[..., Any]:
    """What a tracing mode does with an operator: torch's own, but in an export to ONNX."""

    def rule(
        mode: ProxyTorchDispatchMode,
        operator: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not torch.onnx.is_in_onnx_export():
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode:
            return _forms.get()[name](*args, **(kwargs or {}))

    return rule
