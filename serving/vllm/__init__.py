# Copyright 2026 the mc-transformers authors.
"""The plugin for vLLM: `register` is the entry point of `vllm.general_plugins`. Nothing here is imported without vLLM.

vLLM calls it in every process that it starts (front end, engine, workers, the one that inspects classes of models),
perhaps more than once. An error in it would stop vLLM for every model of the environment, so there is none.
"""

import re
import warnings


SUPPORTED = ((0, 32), (0, 33))  # versions from the first and before the second one have been run


def register() -> None:
    """Tell vLLM of the family; of an unknown version, or if anything goes wrong, only warn."""
    try:
        from vllm.version import __version__ as version

        if not is_supported(version):
            low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
            warnings.warn(
                f"mc-transformers: the plugin has not been run with vLLM {version} (allowed: >= {low}, < {high}), so "
                "MCForCausalLM is not registered",
                stacklevel=2,
            )
            return
        from vllm import ModelRegistry

        import mc_transformers  # noqa: F401  the config class and the Auto classes

        ModelRegistry.register_model("MCForCausalLM", "mc_transformers.serving.vllm.model:MCForCausalLM")
    except Exception as error:
        warnings.warn(f"mc-transformers: the vLLM plugin is off ({type(error).__name__}: {error})", stacklevel=2)


def is_supported(version: str) -> bool:
    """Whether this code has been run with such a version of vLLM, for example "0.32.0+cpu"."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and SUPPORTED[0] <= tuple(map(int, numbers.groups())) < SUPPORTED[1]
