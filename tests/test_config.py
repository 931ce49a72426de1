"""Every wrong environment variable names the nearest right word; what ``VIDACCEL_*`` say is read anew each time."""

from __future__ import annotations

import pytest

from vidaccel.config import (
    adopt,
    cache_directory,
    check_environment,
    count_of,
    preferred_implementation,
    self_check_enabled,
    tuning_enabled,
    variables,
)
from vidaccel.errors import UsageError
from vidaccel.kernels.op import check_wishes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VIDACCEL_IMPLS", "torch", "VIDACCEL_IMPLS is no setting of vidaccel; did you mean VIDACCEL_IMPL?"),
        ("VIDACCEL_CACHE", "/tmp", "did you mean VIDACCEL_CACHE_DIR"),
        ("VIDACCEL_SELFCHECK", "0", "did you mean VIDACCEL_SELF_CHECK"),
        ("VIDACCEL_X", "1", "VIDACCEL_X is no setting of vidaccel"),
        ("VIDACCEL_TUNE", "of", "VIDACCEL_TUNE='of' is neither on nor off; did you mean off?"),
        (
            "VIDACCEL_TUNE",
            "2",
            "VIDACCEL_TUNE='2' is neither on nor off; there are 0, 1, false, no, off, on, true, yes",
        ),
        ("VIDACCEL_TUNE", "", "VIDACCEL_TUNE='' is neither on nor off"),
        ("VIDACCEL_SELF_CHECK", "flase", "VIDACCEL_SELF_CHECK='flase' is neither on nor off; did you mean false"),
    ],
)
def test_a_wrong_variable_names_the_nearest(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as error:
        check_environment()
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["0", "off", "OFF", "False", "no"])
def test_switches_go_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIDACCEL_TUNE", "VIDACCEL_SELF_CHECK"):
        monkeypatch.setenv(name, value)
    check_environment()
    assert not tuning_enabled() and not self_check_enabled()


@pytest.mark.parametrize("value", ["1", "on", "True", "yes", None])
def test_switches_are_on(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIDACCEL_TUNE", "VIDACCEL_SELF_CHECK"):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    check_environment()
    assert tuning_enabled() and self_check_enabled()


def test_another_process_adopts_what_is_set_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    monkeypatch.delenv("VIDACCEL_TUNE", raising=False)
    monkeypatch.delenv("VIDACCEL_CACHE_DIR", raising=False)
    wanted = variables()
    assert wanted["VIDACCEL_IMPL"] == "torch" and "VIDACCEL_TUNE" not in wanted
    monkeypatch.setenv("VIDACCEL_TUNE", "0")
    monkeypatch.setenv("VIDACCEL_IMPL", "triton")
    adopt(wanted)
    assert variables() == wanted and tuning_enabled()


def test_the_cache_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", "/tmp/here")
    assert cache_directory() == "/tmp/here"
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", "")
    assert cache_directory() == "~/.cache/vidaccel"


@pytest.mark.parametrize(
    ("wishes", "found"),
    [
        ("", None),
        ("torch", "torch"),
        ("geglu=triton", "triton"),
        ("alpha_blend=torch", None),
        ("alpha_blend=torch, geglu=triton", "triton"),
        ("alpha_blend=torch, , ", None),
        ("geglu=triton,torch", "triton"),
        ("torch,geglu=triton", "torch"),
    ],
)
def test_the_first_wish_for_an_op_counts(wishes: str, found: str | None) -> None:
    assert preferred_implementation("geglu", wishes) == found


@pytest.mark.parametrize("wishes", ["torch", "triton", "geglu=triton", "geglu=torch, triton, ", "a_shortcut=torch", ""])
def test_right_wishes_pass(wishes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", wishes)
    check_wishes(["a_shortcut"])


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ("gelgu=triton", "VIDACCEL_IMPL: there is no op 'gelgu'; did you mean geglu"),
        ("geglu=triton,spacial_attention=torch", "there is no op 'spacial_attention'; did you mean spatial_attention"),
        ("a_shrtcut=torch", "there is no op 'a_shrtcut'; did you mean a_shortcut"),
        ("=torch", "there is no op ''; there are "),
        ("geglu=tirton", "VIDACCEL_IMPL: geglu has no implementation 'tirton'; did you mean triton"),
        ("geglu=cudnn", "geglu has no implementation 'cudnn'; there are torch, triton"),
        ("spatial_attention=flsh", "spatial_attention has no implementation 'flsh'; did you mean flash"),
        ("tritn", "there is no implementation 'tritn'; did you mean triton"),
        ("geglu", "'geglu'"),
        ("geglu=", "geglu has no implementation ''; there are torch, triton"),
    ],
)
def test_a_wrong_wish_names_the_nearest(wishes: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", wishes)
    with pytest.raises(UsageError) as error:
        check_wishes(["a_shortcut", "a_shortcut"])  # one for each site
    assert message in str(error.value) and str(error.value).count("a_shortcut") <= 1


def test_a_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert count_of("WORLD_SIZE") == 3
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UsageError, match="WORLD_SIZE='abc' is no whole number"):
        count_of("WORLD_SIZE")
    monkeypatch.delenv("WORLD_SIZE")
    assert count_of("WORLD_SIZE") == 1
