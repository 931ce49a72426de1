import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from vidaccel.clips.pixels import pinned_pixels


class Pipe:
    def __init__(self) -> None:
        self.video_processor = VideoProcessor(vae_scale_factor=8)


def pixels_of(pipe: Pipe, video: torch.Tensor, **kwargs) -> np.ndarray:
    return pipe.video_processor.postprocess_video(video=video, output_type="np", **kwargs)


def check_pixels(device: str, dtype: torch.dtype) -> None:
    pipe = Pipe()
    video = torch.randn(2, 3, 5, 24, 40, device=device, dtype=dtype)
    expected = pixels_of(pipe, video)
    with pinned_pixels(pipe):
        made = [pixels_of(pipe, video), pixels_of(pipe, -video)]
        as_tensor = pipe.video_processor.postprocess_video(video, output_type="pt")
    assert made[0].dtype == np.float32 and made[0].shape == (2, 5, 24, 40, 3)
    np.testing.assert_array_equal(made[0], expected)
    np.testing.assert_array_equal(made[1], pixels_of(pipe, -video))  # each clip has memory of its own
    assert isinstance(as_tensor, torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pixels_are_those_of_diffusers(dtype):
    check_pixels("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pixels_of_a_gpu_are_those_of_diffusers(dtype):
    check_pixels("cuda", dtype)


@pytest.mark.gpu
def test_pixels_of_a_gpu_are_pinned():
    pipe = Pipe()
    with pinned_pixels(pipe):
        assert torch.from_numpy(pixels_of(pipe, torch.randn(1, 3, 2, 8, 8, device="cuda"))).is_pinned()


def test_the_processor_is_as_before_after_an_error():
    pipe = Pipe()
    with pytest.raises(ZeroDivisionError), pinned_pixels(pipe):
        1 / 0  # noqa: B018
    assert not vars(pipe.video_processor).keys() & {"postprocess_video"}


def test_a_method_of_somebodys_own_stays():
    pipe = Pipe()
    pipe.video_processor.postprocess_video = lambda video, output_type: "own"
    with pinned_pixels(pipe):
        assert pixels_of(pipe, torch.zeros(1, 3, 1, 8, 8)) == "own"
    assert pixels_of(pipe, torch.zeros(1, 3, 1, 8, 8)) == "own"


def test_a_pipeline_without_a_video_processor_is_left_alone():
    with pinned_pixels(object()):
        pass
