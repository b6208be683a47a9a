# Copyright 2026 the mc-transformers authors.
"""The package's modules as the flat files that a Hub repository with custom code needs, generated, never kept.

Transformers copies and loads the files that it sees imported as `from .name import`, one folder deep. So every module
that the model needs gets a file of its own there, and its relative imports are rewritten to these names.
"""

import ast
import re
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from ..modeling_mc.registration import AUTO_CLASSES


ROOT = Path(__file__).parents[1]
CONFIGURATION, MODELING, COMMON = "configuration_mc", "modeling_mc.model", "kernels.shared.ops"
HUB = "hub"  # the room of what only the package can do
FILES = {MODELING: "modeling_mc"}  # flat names other than the dotted name with underscores
REQUIRED = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
AUTO_MAP = {"AutoConfig": "configuration_mc.MCConfig"}
AUTO_MAP |= {auto_class: f"modeling_mc.{name}" for name, auto_class in AUTO_CLASSES.items()}


def _file(module: str) -> Path | None:
    """Source of a module of the package, by its dotted name inside the package."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _flat_name(module: str) -> str:
    return FILES.get(module, module.replace(".", "_"))


def _target(module: str, node: ast.ImportFrom) -> str:
    """The module of the package that a relative import in `module` takes names from.

    Raises:
        ValueError: it imports a module itself, which no flat file can do so that Transformers sees it.
    """
    is_package = _file(module).name == "__init__.py"
    parts = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
    target = ".".join([*parts, *filter(None, [node.module])])
    for alias in node.names:
        if not target or _file(f"{target}.{alias.name}"):
            written = f"from {'.' * node.level}{node.module or ''} import {alias.name}"
            raise ValueError(f"{module}: `{written}` imports a module: import the names that it defines instead")
    if _file(target) is None:
        raise ValueError(f"{module}: line {node.lineno} imports from `{target}`, which is not a module of the package")
    return target


def _imported(node: ast.AST) -> set[str]:
    """Top-level modules outside of this package that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return set() if node.level else {node.module.split(".")[0]}
    return {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()


def _in_try(lines: list[str], indent: int) -> list[str]:
    margin = " " * indent
    return [f"{margin}try:", *(f"    {line}" for line in lines), f"{margin}except ImportError:", f"{margin}    raise"]


def _source(module: str) -> str:
    """Source of a module without the methods that import from `hub`: in a repository Transformers' own are called."""
    source = _file(module).read_text(encoding="utf-8")
    lines, functions = source.splitlines(), [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef)]
    for function in sorted(functions, key=lambda node: -node.lineno):
        relative = (x for x in ast.walk(function) if isinstance(x, ast.ImportFrom) and x.level)
        if any(_target(module, node).split(".")[0] == HUB for node in relative):
            del lines[function.lineno - 1 : function.end_lineno]
    return "\n".join(lines)


def _rewrite(module: str) -> tuple[str, list[str]]:
    """Flat source of a module, and the modules of the package that it imports."""
    source = _source(module)
    lines, needed = source.splitlines(), []
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(imports, key=lambda node: -node.lineno):  # from the end, so that line numbers stay right
        first, stop = node.lineno - 1, node.end_lineno
        if isinstance(node, ast.ImportFrom) and node.level:
            needed.append(_target(module, node))
            new = f"from .{_flat_name(needed[-1])} import"
            lines[first] = re.sub(r"from\s+\.+[\w.]*\s+import", new, lines[first], count=1)
        elif _imported(node) - REQUIRED:
            # inside `try` Transformers does not take an optional package for a requirement of the whole repository
            lines[first:stop] = _in_try(lines[first:stop], node.col_offset)
    note = f"# Generated from {_file(module).relative_to(ROOT).as_posix()} of mc-transformers: edit that file instead."
    lines.insert(1 if lines[0].startswith("#") else 0, note)
    return "\n".join(lines) + "\n", needed


def _lazy_modules() -> list[str]:
    """Modules that no `import` names, because they are loaded when the first op needs them."""
    files = (path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "kernels").rglob("*triton*.py")))
    return [".".join(file.parts) for file in files]


def flat_files() -> dict[str, str]:
    """File name to source of everything that a repository needs to load without this package.

    Raises:
        ValueError: an import that cannot be made flat.
    """
    lazy = _lazy_modules()
    sources: dict[str, str] = {}
    waiting = [CONFIGURATION, MODELING, *lazy]
    while waiting:
        module = waiting.pop()
        if _flat_name(module) not in sources:
            sources[_flat_name(module)], needed = _rewrite(module)
            waiting += needed
    if lazy:
        # Transformers copies what it sees imported; it looks for lines, and does not mind that these are in a string
        imports = "".join(f"    from .{_flat_name(module)} import forward\n" for module in lazy)
        sources[_flat_name(COMMON)] += f'\n\n_LOADED_WHEN_NEEDED = """\n{imports}"""\n'
    return {f"{name}.py": source for name, source in sorted(sources.items())}


def unreachable(files: dict[str, str], folder: Path) -> set[str]:
    """Files written to `folder` that Transformers would not copy, starting from the two that `AUTO_MAP` names."""
    seen, waiting = set(), ["configuration_mc", "modeling_mc"]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += get_relative_imports(folder / f"{name}.py")
    return set(files) - {f"{name}.py" for name in seen}
