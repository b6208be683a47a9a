# Copyright 2026 the mc-transformers authors.
"""`mc-transformers export`: a model for programs without PyTorch."""

import argparse

from ..conversion.export.limits import FORMATS, WEIGHTS
from ..hub import facts
from .arguments import at_least_two, examples, positive


def run_export(args: argparse.Namespace) -> None:
    from ..conversion.export.run import export

    output = export(
        args.checkpoint,
        args.output,
        args.to,
        weights=args.weights,
        max_length=args.max_length,
        piece=args.piece,
        reads=args.reads,
        revision=args.revision,
        overwrite=args.overwrite,
    )
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    print(facts.table([(name, facts.human_bytes(size)) for name, size in sizes.items()], ("file", "size")))
    print(f"{output}: {facts.human_bytes(sum(sizes.values()))}")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model as two graphs, for ONNX Runtime or torch.export (extra `export`)",
        description="`prefill` reads a piece of a prompt, `decode` one token; both take and give a cache of fixed "
        "size. examples/onnx_chat runs them without PyTorch.",
        **examples(
            "export outputs/demo/model outputs/demo/onnx",
            "export me/my-model onnx --weights int8 --max-length 16384 --reads",
            "export outputs/demo/model outputs/demo/pt2 --to torch",
        ),
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a Hub repository")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--to", choices=FORMATS, default="onnx", help="(%(default)s)")
    parser.add_argument("--weights", choices=WEIGHTS, default="float32", help="int8: of ONNX only (%(default)s)")
    parser.add_argument(
        "--max-length", type=positive, help="tokens the cache has room for (as the config's max_position_embeddings)"
    )
    parser.add_argument("--piece", type=at_least_two, default=64, help="tokens of a prompt at a time (%(default)s)")
    parser.add_argument("--reads", action="store_true", help="let `decode` say which segments each token read")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.set_defaults(run=run_export)
