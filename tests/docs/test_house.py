"""The size of rooms: what is larger is usually two things."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") or part in ("build", "dist", "outputs") for part in path.relative_to(ROOT).parts)
]


def test_no_file_is_longer_than_500_lines():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := path.read_text("utf-8").count("\n")) > 500}
    assert len(FILES) > 100 and not long


def test_no_class_has_more_than_20_public_methods():
    large = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                public = [x for x in node.body if isinstance(x, ast.FunctionDef) and not x.name.startswith("_")]
                if len(public) > 20:
                    large[f"{path.relative_to(ROOT)}: {node.name}"] = len(public)
    assert not large


@pytest.mark.parametrize("folder", ["kernels", "kernels/read", "kernels/write", "kernels/step", "kernels/shared"])
def test_folders_of_kernels_are_no_packages(folder):
    """Transformers probes for a PyPI package of that name."""
    assert (ROOT / folder).is_dir() and not (ROOT / folder / "__init__.py").exists()
