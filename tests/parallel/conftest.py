from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Team


@pytest.fixture(scope="package")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    team = Team(2, tmp_path_factory.mktemp("ranks"))
    yield team
    team.close()


@pytest.fixture(scope="package")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    team = Team(4, tmp_path_factory.mktemp("ranks"))
    yield team
    team.close()
