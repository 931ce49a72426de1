"""What the commands are run on: a tiny pipeline on disk and a first frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_svd_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-svd"
    tiny_svd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "first frame.png"
    ramp = np.add.outer(np.arange(48), np.arange(64))
    Image.fromarray((ramp * 2).astype(np.uint8)).convert("RGB").save(path)
    return path
