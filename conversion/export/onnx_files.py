# Copyright 2026 the mc-transformers authors.
"""ONNX graphs as files, with one file for the weights of all."""

import hashlib
from pathlib import Path


WEIGHTS_FILE = "weights.data"
INLINE = 1024  # bytes up to which a constant stays in its graph
ALIGNED = 64  # bytes that a constant's place is a multiple of


def save_graphs(graphs: dict, folder: Path) -> None:
    """Write `onnx_ir.Model`s as NAME.onnx into `folder`; what is the same in several of them is written once."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    places: dict[tuple, int] = {}
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for graph in graphs.values():
            RemoveUnusedNodesPass()(graph)
            for node in graph.graph.all_nodes():  # where in the source each came from: half of the file
                node.metadata_props.clear()
            for value in graph.graph.initializers.values():
                tensor = value.const_value
                if tensor.nbytes <= INLINE:
                    continue
                data = tensor.tobytes()
                key = (hashlib.sha256(data).digest(), tensor.dtype)
                if key not in places:
                    file.write(bytes(-file.tell() % ALIGNED))
                    places[key] = file.tell()
                    file.write(data)
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS_FILE,
                    places[key],
                    len(data),
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                    base_dir=folder,
                )
    for name, graph in graphs.items():
        onnx_ir.save(graph, folder / f"{name}.onnx")
