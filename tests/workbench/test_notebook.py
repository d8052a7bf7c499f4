"""What libraries say of themselves stays out of a notebook."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tinyonn_lib.workbench import notebook

SAVED = """
from tempfile import mkdtemp
from tinyonn_lib.lm.models import new_model
from tinyonn_lib.workbench import notebook
notebook._quiet()
new_model(vocab_size=64, width=16, layers=1, ffn=16, heads=1, kv_heads=1, head_dim=16).save_pretrained(mkdtemp())
import sys
assert "deepspeed" in sys.modules
"""


@pytest.mark.parametrize(
    ("gpu", "set_by_user", "expected"), [(False, None, "cpu"), (True, None, None), (False, "mps", "mps")]
)
def test_deepspeed_is_told_that_there_is_no_gpu_and_only_then(
    gpu: bool, set_by_user: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {} if set_by_user is None else {"DS_ACCELERATOR": set_by_user})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    notebook._quiet()
    assert os.environ.get("DS_ACCELERATOR") == expected


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra 'train'")
@pytest.mark.skipif(torch.cuda.is_available(), reason="says nothing with a GPU")
def test_saving_a_model_says_nothing() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", SAVED], env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
