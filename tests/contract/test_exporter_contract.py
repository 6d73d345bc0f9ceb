"""Our export targets against the contract."""

from pathlib import Path

import pytest

from bitplan.exporters.targets import EXPORTERS
from bitplan.models.workload import LoadedModel
from bitplan.testing import ExporterContract
from bitplan.tests.gguf_toys import write_llama_gguf


class TestExporters(ExporterContract):
    plugins = EXPORTERS.names()

    @pytest.fixture(scope="class")
    def like(
        self, model: LoadedModel, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Path:
        path = tmp_path_factory.mktemp("like") / "llama.gguf"
        return write_llama_gguf(model, model_folder, path)
