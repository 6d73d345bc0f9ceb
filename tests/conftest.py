"""Shared fixtures: a tiny language model trained once per session, and the real data folder."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see __main__.py
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do what they start
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores, 1)))
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: no test may look for a model online

import pytest
import torch

from bitplan.models.load import load_model
from bitplan.models.texts import builtin_prose
from bitplan.models.workload import LoadedModel

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("BITPLAN_DATA", ROOT.parent / "shared" / "data"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden files")


@pytest.fixture(scope="session")
def wikitext() -> Path:
    folder = DATA / "wikitext-2"
    if not folder.is_dir():
        pytest.skip(f"needs wikitext-2/valid.txt and test.txt; set BITPLAN_DATA (looked in {DATA})")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama trained for a few seconds on the built-in prose, as a Hub folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = builtin_prose("calibration")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(fast(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        starts = torch.randint(len(ids) - 64, (16,), generator=generator)
        batch = torch.stack([ids[s : s + 64] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), "cpu")


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama whose rows hold whole blocks of 256, as a Hub folder."""
    from bitplan.testing.llama import save_toy_llama

    return save_toy_llama(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="session")
def wide(wide_folder: Path) -> LoadedModel:
    return load_model(str(wide_folder), "cpu")


@pytest.fixture(scope="session")
def wide_gguf(wide_folder: Path, wide: LoadedModel) -> Path:
    """The same model as a float32 GGUF file."""
    from bitplan.tests.gguf_toys import write_llama_gguf

    return write_llama_gguf(wide, wide_folder, wide_folder / "wide.gguf")
