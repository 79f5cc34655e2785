"""Trying an OpenVINO file in a process of its own: OpenVINO may crash where others refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from el_convert.errors import ExportError

Arrays = list[npt.NDArray[np.float32]]
_NODES = "nodes"


def run_apart(file: Path, inputs: Sequence[Any], folder: Path) -> tuple[list[Arrays], set[str]]:
    """What OpenVINO's CPU plugin makes of a file, in float32, one input after the other.

    Args:
        file: .xml, with its .bin beside it.
        inputs: arrays of the shape the file takes.
        folder: for arrays on their way.

    Returns:
        The outputs for each input, and the names of the nodes that ran on its 1-bit kernels.

    Raises:
        ExportError: OpenVINO crashes, or cannot compile or run the file.
    """
    given, found = folder / "inputs.npz", folder / "outputs.npz"
    np.savez(given, *inputs)
    call = f"from {__name__} import _run; _run({str(file)!r}, {str(given)!r}, {str(found)!r})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)  # noqa: S603
    if done.returncode < 0:
        raise ExportError(f"OpenVINO crashes with this model (signal {-done.returncode})")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ExportError(f"OpenVINO cannot run this model here ({said[-1] if said else 'silent'})")
    with np.load(found) as arrays:
        outputs = [
            [arrays[f"{index}.{output}"] for output in range(int(arrays["outputs"]))]
            for index in range(len(inputs))
        ]
        return outputs, {str(name) for name in arrays[_NODES]}


def compiled(file: Path, threads: int = 0) -> Any:
    """A file compiled for the CPU, in float32 also where the machine has something shorter.

    Args:
        file: .xml or .onnx.
        threads: to use; 0 leaves it to OpenVINO.
    """
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return openvino.Core().compile_model(str(file), "CPU", options)


def one_bit_nodes(compiled: Any) -> set[str]:
    """The names of what really runs on 1-bit kernels, from the graph that is executed.

    Args:
        compiled: an `openvino.CompiledModel`.
    """
    names: set[str] = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        kernel = facts.get("primitiveType", "")  # such as jit_avx2_u1
        if facts["layerType"] == "BinaryConvolution" and kernel.startswith("jit_"):
            names.update(facts["originalLayersNames"].split(","))
    return names


def _run(file: str, given: str, found: str) -> None:
    """In the process apart."""
    model = compiled(Path(file))
    request = model.create_infer_request()
    results: dict[str, Any] = {"outputs": len(model.outputs)}
    with np.load(given) as inputs:
        for index, name in enumerate(inputs.files):
            request.infer({0: inputs[name]})
            for output in range(len(model.outputs)):
                results[f"{index}.{output}"] = request.get_output_tensor(output).data.copy()
    results[_NODES] = sorted(one_bit_nodes(model))
    np.savez(found, **results)
