"""Train the bundled sample model: a small Stable Video Diffusion on the clips of `sample_scenes.py`.

First the VAE (L1 + gradients + KL, whole clips, so that the decoder's time layers learn too), then the UNet together
with the image encoder. The UNet F is trained in the EDM parameterisation (Karras et al. 2022, arXiv:2206.00364) that
SVD uses (Blattmann et al. 2023, arXiv:2311.15127), with sigma_data = 1:

    x = x0 + sigma n,    F(x / sqrt(sigma^2 + 1), ln(sigma) / 4)  ->  v = (n - sigma x0) / sqrt(sigma^2 + 1)

and a plain mean squared error, which is what EDM's weighting comes to. What the UNet is conditioned on is computed as
`StableVideoDiffusionPipeline` computes it. The result loads with `StableVideoDiffusionPipeline.from_pretrained`.

    python samples/models/train_sample_model.py --minutes-vae 2.3 --minutes-unet 4.7
    python samples/models/train_sample_model.py --smoke
    python samples/models/train_sample_model.py --evaluate-only
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from PIL import Image
from sample_scenes import FRAMES, HELD_OUT, NAMES, SIZE, contact_sheet, draw_clips
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

REPOSITORY = Path(__file__).resolve().parents[2]
SIGMA_MAX = 80.0
FPS = 7
NOISE_AUG = 0.02
DROP_CONDITION = 0.1
EAGER_STEPS = 5  # before a CUDA graph is captured
DEFAULTS = {"min_guidance_scale": 1.0, "max_guidance_scale": 1.5, "num_inference_steps": 15}


# ------------------------------------------------------------------ model


@dataclass
class Model:
    """What is trained."""

    vae: AutoencoderKLTemporalDecoder
    unet: UNetSpatioTemporalConditionModel
    image_encoder: CLIPVisionModelWithProjection

    def modules(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.vae, self.unet, self.image_encoder

    def pipeline(self) -> StableVideoDiffusionPipeline:
        """The stock pipeline around float16 copies."""
        vae, unet, image_encoder = (copy.deepcopy(module).cpu().half().eval() for module in self.modules())
        for module in (vae, unet, image_encoder):
            set_layout(module, "contiguous")
        return StableVideoDiffusionPipeline(
            vae=vae,
            unet=unet,
            image_encoder=image_encoder,
            scheduler=new_scheduler(),
            feature_extractor=CLIPImageProcessor(),
        )


def new_scheduler() -> EulerDiscreteScheduler:
    """SVD's own settings, but for sigma_max: 80 drowns 32 x 32 latents just as well as 700 and wastes no steps."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", interpolation_type="linear",
        num_train_timesteps=1000, prediction_type="v_prediction", sigma_max=SIGMA_MAX, sigma_min=0.002,
        steps_offset=1, timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip


def new_model() -> Model:
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3,
        # The decoder norms in 32 groups; with one channel in each, nothing could tell bright pictures from dark ones.
        block_out_channels=(64, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )
    unet = UNetSpatioTemporalConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("DownBlockSpatioTemporal", *["CrossAttnDownBlockSpatioTemporal"] * 2),
        up_block_types=(*["CrossAttnUpBlockSpatioTemporal"] * 2, "UpBlockSpatioTemporal"),
        block_out_channels=(64, 96, 96),
        num_attention_heads=(2, 3, 3),
        layers_per_block=1,
        cross_attention_dim=128,
        addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=3 * 64,
        num_frames=FRAMES,
    )
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=224, patch_size=32, hidden_size=128, intermediate_size=512, num_hidden_layers=3,
            num_attention_heads=4, projection_dim=128, hidden_act="gelu",
        )
    )  # fmt: skip
    # Every residual branch starts at zero, and so does the output: training starts from the identity.
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return Model(vae, unet, image_encoder)


def load_model(folder: Path) -> Model:
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder)
    return Model(pipeline.vae.float(), pipeline.unet.float(), pipeline.image_encoder.float())


# ------------------------------------------------------------------ training loop

Batch = tuple[Tensor, ...]
Draw = Callable[[], Batch]
Objective = Callable[..., Tensor]

LAYOUTS = {  # of the weights of 2D and of 3D convolutions
    "contiguous": (torch.contiguous_format, torch.contiguous_format),
    "channels_last": (torch.channels_last, torch.contiguous_format),
    "channels_last_3d": (torch.channels_last, torch.channels_last_3d),
}


def set_layout(module: nn.Module, layout: str) -> None:
    for parameter in module.parameters():
        if parameter.dim() in (4, 5):
            parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[layout][parameter.dim() - 4])


def fastest_layout(modules: Sequence[nn.Module], draw: Draw, loss_of: Objective) -> str:
    """Which layout is fast depends on the shapes and on cuDNN's version: try a few steps of each."""
    seconds = {}
    for layout in LAYOUTS:
        for module in modules:
            set_layout(module, layout)
        for trial in range(6):
            if trial == 3:
                torch.cuda.synchronize()
                start = time.monotonic()
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(*draw())
            loss.backward()
            for module in modules:
                module.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds[layout] = (time.monotonic() - start) / 3
    print("seconds per step:", {name: round(value, 3) for name, value in seconds.items()}, file=sys.stderr)
    return min(seconds, key=lambda name: seconds[name])


class Ema:
    """Exponential moving average of weights, quick to forget at first."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.998) -> None:
        self.live = parameters
        self.average = [parameter.detach().clone() for parameter in parameters]
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.average, list(self.live), 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        torch._foreach_copy_(self.live, self.average)


class Gradients:
    """Loss and gradients of a batch; on a GPU replayed as a CUDA graph.

    The networks are so small that launching their kernels one by one takes longer than running them.
    """

    def __init__(self, loss_of: Objective, parameters: list[nn.Parameter], device: torch.device) -> None:
        self.loss_of = loss_of
        self.parameters = parameters
        self.device = device
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Batch = ()
        self.loss = torch.zeros(())

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss, before the weights change; gradients are in the parameters."""
        self.calls += 1
        if self.device.type != "cuda" or self.calls <= EAGER_STEPS:  # cuDNN is still choosing
            return self._run(*batch)
        if self.graph is None:
            self._capture(batch)
        for static, fresh in zip(self.batch, batch, strict=True):
            static.copy_(fresh)
        self.graph.replay()
        return self.loss

    def _capture(self, batch: Batch) -> None:
        self.batch = tuple(part.clone() for part in batch)
        self._forget()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.loss = self._run(*self.batch)

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _run(self, *batch: Tensor) -> Tensor:
        self._forget()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss_of(*batch)
        loss.backward()
        return loss.detach()


class Interrupted:
    """While entered, turns Ctrl-C or SIGTERM into a flag, so that what has been learnt is still exported."""

    def __init__(self) -> None:
        self.flag = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupted:
        self.before = {number: signal.signal(number, self._raise) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: object) -> None:
        self.flag = True
        signal.signal(number, self.before[number])  # the second one is for real

    def __bool__(self) -> bool:
        return self.flag


def learning_rate(progress: float, peak: float, warm_up: float = 0.03, floor: float = 0.01) -> float:
    """Linear warm-up, then half a cosine down to `floor * peak`; `progress` is the share of the time that is gone."""
    if progress < warm_up:
        return peak * (progress + 1e-3) / warm_up
    progress = min(1.0, (progress - warm_up) / (1 - warm_up))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(
    name: str,
    modules: Sequence[nn.Module],
    draw: Draw,
    loss_of: Objective,
    *,
    minutes: float,
    peak: float,
    layout: str,
    device: torch.device,
    stop: Interrupted,
    max_steps: int | None,
) -> dict[str, Any]:
    """Train `modules` on `loss_of(*draw())` for `minutes`, leave the averaged weights in them, say what happened."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for module in modules:
        module.train().requires_grad_(True)
    if layout == "auto":
        layout = fastest_layout(modules, draw, loss_of) if device.type == "cuda" else "contiguous"
    for module in modules:
        set_layout(module, layout)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = Ema(parameters)
    gradients = Gradients(loss_of, parameters, device)
    start = last_log = time.monotonic()
    seconds = 60 * minutes
    smooth = torch.zeros((), device=device)
    bar = tqdm(desc=name, unit="step", mininterval=5, dynamic_ncols=True)
    while not stop and (elapsed := time.monotonic() - start) < seconds and ema.steps != max_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed / seconds, peak)
        loss = gradients(*draw())
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        # The fused step leaves the weights alone when this is set; asking `norm` itself would wait for the device.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        ema.update()
        smooth.lerp_(loss.nan_to_num(), 1 / min(ema.steps, 50))
        bar.update()
        if time.monotonic() - last_log > 20 or ema.steps == 10:
            last_log = time.monotonic()
            value, rate = smooth.item(), ema.steps / (last_log - start)
            bar.set_postfix(loss=f"{value:.4f}", left=f"{max(0, seconds - elapsed):.0f}s")
            line = f"{name}: step {ema.steps}, loss {value:.4f}, lr {optimizer.param_groups[0]['lr']:.1e}"
            tqdm.write(f"{line}, {rate:.2f} steps/s, {max(0, seconds - elapsed):.0f} s left", file=sys.stderr)
    bar.close()
    ema.apply()
    for module in modules:
        module.eval().requires_grad_(False)
    spent = (time.monotonic() - start) / 60
    facts = {"steps": ema.steps, "minutes": round(spent, 2), "loss": round(smooth.item(), 5)}
    return facts | {"peak_lr": peak, "layout": layout}


def endless_clips(block: int, size: int, device: torch.device, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh training clips in -1..1, `block` at a time, all kinds alike, and their motion buckets."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        spread = torch.randint(HELD_OUT // len(NAMES), (block,), generator=generator) * len(NAMES)
        clips, buckets = draw_clips(spread + torch.arange(block) % len(NAMES), size=size, device=device)
        yield clips * 2 - 1, buckets


# ------------------------------------------------------------------ VAE


def vae_objective(vae: AutoencoderKLTemporalDecoder, clips: Tensor, kl_weight: float = 2e-4) -> Tensor:
    """L1 and L2 of colours, L1 of their differences in x, y and time, plus KL.

    L2 settles large areas, the differences keep edges sharp and still parts still. The KL term keeps the latents near
    unit scale, and the noise it leaves in them teaches the decoder to bear the small errors of a diffusion model.
    """
    posterior = vae.encode(clips.flatten(0, 1)).latent_dist
    error = vae.decode(posterior.sample(), num_frames=clips.shape[1]).sample.float().view_as(clips) - clips
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (1, 3, 4))
    mean, variance = posterior.mean.float(), posterior.var.float()
    kl = 0.5 * (mean**2 + variance - 1 - variance.log()).mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + kl_weight * kl


def cut(clips: Tensor, size: int, frames: int) -> Tensor:
    """A random window of ``size`` x ``size`` pixels and ``frames`` frames, the same for all clips."""
    first, y, x = (
        int(torch.randint(whole - part + 1, ()))
        for whole, part in zip((clips.shape[1], *clips.shape[3:]), (frames, size, size), strict=True)
    )
    return clips[:, first : first + frames, :, y : y + size, x : x + size]


def train_vae(vae: AutoencoderKLTemporalDecoder, args: argparse.Namespace, **common: Any) -> dict[str, Any]:
    """On small windows, where a step is cheap, then a while on whole frames, where attention and norms see it all."""
    stream = endless_clips(args.block, args.size, common["device"], args.seed)

    def draw_from(queue: list[Tensor], size: int, passes: int) -> Draw:
        def draw() -> Batch:
            if not queue:
                block, _ = next(stream)
                for _ in range(passes):
                    whole_batches = len(block) // args.batch_vae * args.batch_vae
                    queue.extend(
                        block[torch.randperm(len(block))[:whole_batches].to(block.device)].split(args.batch_vae)
                    )
            return (cut(queue.pop(), size, args.window_frames),)

        return draw

    objective = partial(vae_objective, vae)
    spans = {"minutes": 0.7 * args.minutes_vae, "peak": args.lr_vae}
    windows = fit("vae, windows", [vae], draw_from([], args.size // 2, 4), objective, **spans, **common)
    spans = {"minutes": 0.3 * args.minutes_vae, "peak": 0.3 * args.lr_vae}
    facts = fit("vae", [vae], draw_from([], args.size, 2), objective, **spans, **common)
    latents = encode(vae, next(stream)[0][:128].flatten(0, 1))
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 5))
    return facts | {"window_steps": windows["steps"], "minutes": windows["minutes"] + facts["minutes"]}


@torch.no_grad()
def encode(vae: AutoencoderKLTemporalDecoder, images: Tensor, chunk: int = 448) -> Tensor:
    """`latent_dist.mode()`, not scaled: what the pipeline feeds to the UNet beside the noisy latents."""
    with torch.autocast(images.device.type, torch.float16, enabled=images.device.type == "cuda"):
        return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(chunk)]).float()


# ------------------------------------------------------------------ UNet and image encoder


class Pool:
    """Encoded clips on the device; the oldest are replaced, bit by bit, by new ones."""

    def __init__(self, vae: AutoencoderKLTemporalDecoder, stream: Iterator[tuple[Tensor, Tensor]], blocks: int) -> None:
        self.vae, self.stream, self.turn = vae, stream, 0
        self.processor = CLIPImageProcessor()
        self.blocks = [self._next() for _ in tqdm(range(blocks), desc="encode", unit="block")]

    def _next(self) -> tuple[Tensor, ...]:
        clips, buckets = next(self.stream)
        images = clips[:, 0].clone()
        latents = encode(self.vae, clips.flatten(0, 1)) * self.vae.config.scaling_factor
        return latents.unflatten(0, clips.shape[:2]).half(), images, clip_pixels(images, self.processor).half(), buckets

    def refresh(self) -> None:
        self.blocks[self.turn % len(self.blocks)] = self._next()
        self.turn += 1

    def sample(self, count: int) -> Batch:
        """Scaled latents `[B, F, C, h, w]`, first frames `[B, 3, H, W]`, the same for CLIP, buckets `[B]`."""
        device = self.blocks[0][0].device
        share = -(-count // len(self.blocks))
        picked = []
        for block in self.blocks:
            pick = torch.randint(len(block[0]), (share,), device=device)
            picked.append([part[pick] for part in block])
        return tuple(torch.cat(parts)[:count].float() for parts in zip(*picked, strict=True))


def draw_sigmas(count: int, device: torch.device, mean: float = 0.5, std: float = 1.6) -> Tensor:
    """Log-normal and stratified over the batch; the tail falls on sigma_max, where sampling starts."""
    strata = torch.rand(count, device=device).argsort()
    quantiles = (strata + torch.rand(count, device=device)) / count
    return (mean + std * torch.special.ndtri(quantiles.clamp(1e-4, 1 - 1e-4))).exp().clamp(0.002, SIGMA_MAX)


def v_target(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What EulerDiscreteScheduler takes a v-prediction for at `latents + sigma * noise`."""
    return (noise - sigma * latents) / (sigma**2 + 1).sqrt()


def clip_pixels(images: Tensor, processor: CLIPImageProcessor) -> Tensor:
    """`[B, 3, H, W]` in -1..1 -> the image encoder's input, as in the pipeline's `_encode_image`."""
    images = (_resize_with_antialiasing(images, (224, 224)) + 1) / 2
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (images - mean) / std


def unet_objective(model: Model, latents: Tensor, images: Tensor, pixels: Tensor, buckets: Tensor) -> Tensor:
    """Mean squared error of the predicted v; some clips go without their condition, for classifier-free guidance."""
    batch, frames, *_ = latents.shape
    device = latents.device
    keep = (torch.rand(batch, device=device) >= DROP_CONDITION).float()
    noise_aug = NOISE_AUG * 2.0 ** (2 * torch.rand(batch, device=device) - 1)
    noisy_images = images + noise_aug.view(-1, 1, 1, 1) * torch.randn_like(images)
    image_latents = encode(model.vae, noisy_images) * keep.view(-1, 1, 1, 1)
    embeds = model.image_encoder(pixels).image_embeds * keep.view(-1, 1)
    # Any frame rate, so that the model learns to make nothing of it: a clip's speed is its motion bucket's alone.
    fps = torch.randint(4, 30, (batch,), device=device)
    time_ids = torch.stack([fps - 1, buckets, noise_aug], dim=1)

    sigma = draw_sigmas(batch, device)
    timestep = sigma.log() / 4
    sigma = sigma.view(-1, 1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = (latents + sigma * noise) / (sigma**2 + 1).sqrt()
    sample = torch.cat([noisy, image_latents.unsqueeze(1).expand(-1, frames, -1, -1, -1)], dim=2)
    predicted = model.unet(sample, timestep, embeds.unsqueeze(1), time_ids, return_dict=False)[0]
    return F.mse_loss(predicted.float(), v_target(latents, noise, sigma))


def train_unet(model: Model, args: argparse.Namespace, **common: Any) -> dict[str, Any]:
    stream = endless_clips(args.block, args.size, common["device"], args.seed + 1)
    pool = Pool(model.vae, stream, args.pool_blocks)
    steps = 0

    def draw() -> Batch:
        nonlocal steps
        steps += 1
        if steps % args.refresh_every == 0:
            pool.refresh()
        return pool.sample(args.batch_unet)

    modules = [model.unet, model.image_encoder]
    spans = {"minutes": args.minutes_unet, "peak": args.lr_unet}
    return fit("unet", modules, draw, partial(unet_objective, model), **spans, **common)


# ------------------------------------------------------------------ export


def export(model: Model, out: Path, training: dict[str, Any]) -> None:
    """Write the pipeline beside `out`, then put it in its place."""
    aside = out.with_name(out.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    model.pipeline().save_pretrained(aside)
    # transformers loads a model in the dtype its config names; float32 matches what diffusers does by default.
    amend_json(aside / "image_encoder" / "config.json", dtype="float32")
    # Without torchvision, transformers falls back to another class, whose name older versions do not know.
    amend_json(aside / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    write_json(aside / "generation_defaults.json", common_arguments() | DEFAULTS)
    write_json(aside / "metrics.json", {"training": training})
    previous = out.with_name(out.name + ".old")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        out.rename(previous)
    aside.rename(out)
    shutil.rmtree(previous, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    print(f"wrote {out.name}: {size / 1e6:.1f} MB of weights", file=sys.stderr)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def amend_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def common_arguments(size: int = SIZE) -> dict[str, Any]:
    return {"height": size, "width": size, "num_frames": FRAMES, "fps": FPS, "noise_aug_strength": NOISE_AUG}


# ------------------------------------------------------------------ evaluation


def to_pil(images: Tensor) -> list[Image.Image]:
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def psnr(clips: Tensor, truth: Tensor) -> Tensor:
    """`[N]`, in dB, over frames 2 to the last of clips in 0..1: the first frame is given."""
    return -10 * (clips[:, 1:] - truth[:, 1:]).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def motion(clips: Tensor) -> float:
    """Mean absolute difference of successive frames."""
    return clips.diff(dim=1).abs().mean().item()


@dataclass
class Evaluator:
    """Held-out scenes, the same for every setting; each group of scenes shares a motion bucket, as a call must."""

    pipeline: StableVideoDiffusionPipeline
    size: int
    device: torch.device

    def draw(self, seeds: Sequence[int], bucket: int) -> Tensor:
        return draw_clips(seeds, size=self.size, device=self.device, motion_bucket_ids=[bucket] * len(seeds))[0]

    def generate(self, first_frames: Tensor, bucket: int, settings: dict[str, Any]) -> Tensor:
        """`[N, F, 3, H, W]` in 0..1, on the device."""
        frames = self.pipeline(
            to_pil(first_frames),
            motion_bucket_id=bucket,
            generator=torch.Generator().manual_seed(bucket),
            output_type="pt",
            **common_arguments(self.size) | settings,
        ).frames
        return frames.to(self.device).float()

    @torch.no_grad()
    def reconstruct(self, clips: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = torch.cat([vae.encode(clip * 2 - 1).latent_dist.mode() for clip in clips])
        frames = torch.cat([vae.decode(part, num_frames=FRAMES).sample for part in latents.split(FRAMES)])
        return (frames.view_as(clips) / 2 + 0.5).clamp(0, 1)

    def choose_settings(self, seeds: Sequence[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The guidance with the best PSNR, then the fewest steps that come within 0.1 dB of the best."""
        tried: list[dict[str, Any]] = []

        def score(settings: dict[str, Any]) -> float:
            pairs = ((self.draw(seeds, bucket), bucket) for bucket in (64, 192))
            scores = [psnr(self.generate(truth[:, 0], bucket, settings), truth) for truth, bucket in pairs]
            tried.append(settings | {"psnr": round(torch.cat(scores).mean().item(), 3)})
            return tried[-1]["psnr"]

        guidances = ((1.0, 1.0), (1.0, 1.2), (1.0, 1.5), (1.0, 2.0), (1.0, 3.0))
        choices = [DEFAULTS | {"min_guidance_scale": low, "max_guidance_scale": high} for low, high in guidances]
        best = max(choices, key=score)
        lengths = [best | {"num_inference_steps": steps} for steps in (10, 15, 20, 25)]
        scores = [score(settings) for settings in lengths]
        enough = next(settings for settings, value in zip(lengths, scores, strict=True) if value > max(scores) - 0.1)
        return enough, tried


def evaluate(out: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the exported model on held-out scenes with the stock pipeline; write figures, pictures and the card."""
    torch.backends.cudnn.benchmark = False  # few calls of many shapes
    pipeline = StableVideoDiffusionPipeline.from_pretrained(out).to(device)
    pipeline.set_progress_bar_config(disable=True)
    judge = Evaluator(pipeline, args.size, device)
    started = time.monotonic()
    metrics = json.loads((out / "metrics.json").read_text())
    stored = json.loads((out / "generation_defaults.json").read_text())
    settings = {key: stored[key] for key in DEFAULTS} | ({"num_inference_steps": 2} if args.smoke else {})
    tried = metrics.get("evaluation", {}).get("settings_tried", [])
    if device.type == "cuda" and not args.no_sweep:
        settings, tried = judge.choose_settings(range(HELD_OUT + 10_000, HELD_OUT + 10_000 + len(NAMES)))
    write_json(out / "generation_defaults.json", common_arguments() | settings)

    groups = 8 if args.eval_scenes >= 8 * len(NAMES) else 2
    seeds = torch.arange(HELD_OUT, HELD_OUT + args.eval_scenes).tensor_split(groups)
    buckets = torch.linspace(32, 240, groups).round().long().tolist()
    truth = torch.cat([judge.draw(part.tolist(), bucket) for part, bucket in zip(seeds, buckets, strict=True)])
    offsets = torch.tensor([len(part) for part in seeds]).cumsum(0)[:-1]
    made = torch.cat(
        [
            judge.generate(part[:, 0], bucket, settings)
            for part, bucket in zip(truth.tensor_split(offsets), buckets, strict=True)
        ]
    )
    kinds = torch.cat(seeds).to(device) % len(NAMES)
    rivals = {
        "model": made,
        "repeat_first_frame": truth[:, :1].expand_as(truth),
        "vae_reconstruction": judge.reconstruct(truth),
    }
    figures: dict[str, Any] = {}
    for name, clips in rivals.items():
        decibels, squares = psnr(clips, truth), (clips[:, 1:] - truth[:, 1:]).square().flatten(1).mean(1)
        members = {kind: (kinds == index).nonzero().flatten() for index, kind in enumerate(NAMES)}
        figures[name] = {
            "psnr": round(decibels.mean().item(), 2),
            "mse": round(squares.mean().item(), 6),
            "psnr_by_kind": {
                kind: round(decibels[rows].mean().item(), 2) for kind, rows in members.items() if len(rows)
            },
        }
    amount = {}
    still = range(HELD_OUT + 20_000, HELD_OUT + 20_000 + min(len(NAMES), args.eval_scenes))
    for bucket in (32, 128, 224):
        clips = judge.draw(still, bucket)
        generated = judge.generate(clips[:, 0], bucket, settings)
        amount[str(bucket)] = {"generated": round(motion(generated), 5), "true": round(motion(clips), 5)}
    chosen = choose_rows(kinds.tolist())
    rows = [clips[index] for index in chosen for clips in (truth, made)]
    contact_sheet(rows, [0, 3, 6, 9, 13]).save(out / "eval.png", optimize=True)

    metrics["evaluation"] = {
        "scenes": args.eval_scenes,
        "motion_bucket_ids": buckets,
        "settings": settings,
        "frames_2_to_14": figures,
        "motion": amount,
        "settings_tried": tried,
        "device": device_name(device),
        "seconds": round(time.monotonic() - started, 1),
    }
    metrics["parameters"] = {
        name: sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        for name in ("unet", "vae", "image_encoder")
    }
    write_json(out / "metrics.json", metrics)
    (out / "README.md").write_text(model_card(metrics))
    return metrics


def choose_rows(kinds: Sequence[int], count: int = 8) -> list[int]:
    """Rows of different kinds, from the middle of the set on, where the motion is neither slow nor fast."""
    order = [*range(len(kinds) // 2, len(kinds)), *range(len(kinds) // 2)]
    first_of_kind = {kinds[index]: index for index in reversed(order)}
    return sorted(first_of_kind.values(), key=lambda index: kinds[index])[:count]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def training_runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that made a model, first to last."""
    return [*(training_runs(training["before"]) if "before" in training else []), training]


def steps_taken(phase: dict[str, Any]) -> str:
    windows = phase.get("window_steps")
    return f"{windows} steps on windows and {phase['steps']} on whole frames" if windows else f"{phase['steps']} steps"


def model_card(metrics: dict[str, Any]) -> str:
    """The folder's README, in numbers taken from `metrics.json`."""
    training, evaluation, parameters = metrics["training"], metrics["evaluation"], metrics["parameters"]
    figures, settings = evaluation["frames_2_to_14"], evaluation["settings"]
    table = "\n".join(
        f"| {kind} | " + " | ".join(f"{figures[rival]['psnr_by_kind'][kind]:.1f}" for rival in figures) + " |"
        for kind in figures["model"]["psnr_by_kind"]
    )
    total = " | ".join(f"**{figures[rival]['psnr']:.1f}**" for rival in figures)
    moves = "\n".join(f"| {b} | {m['generated']:.4f} | {m['true']:.4f} |" for b, m in evaluation["motion"].items())
    phases = "\n".join(
        f"- {label}: {steps_taken(run[key])} of {run[key]['batch']} clips in {run[key]['minutes']} minutes, "
        f"final loss {run[key]['loss']:.4f}"
        for run in training_runs(training)
        for key, label in (("vae", "VAE"), ("unet", "UNet and image encoder"))
        if key in run
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-video
---

# svd-tiny-scenes

A Stable Video Diffusion model of {sum(parameters.values()) / 1e6:.1f} M parameters for {SIZE} x {SIZE} cartoon scenes,
in the format of `StableVideoDiffusionPipeline`: the real architecture, small enough to try on any computer.

![Held-out clips, frames 1, 4, 7, 10, 14. Odd rows: true; even rows: generated from the first frame.](eval.png)

```python
import json
from pathlib import Path

from diffusers import StableVideoDiffusionPipeline
from diffusers.utils import load_image

folder = Path("samples/models/svd-tiny-scenes")
pipeline = StableVideoDiffusionPipeline.from_pretrained(folder)
settings = json.loads((folder / "generation_defaults.json").read_text())
frames = pipeline(load_image("first_frame.png"), motion_bucket_id=160, **settings).frames[0]
```

## How it was trained

From scratch, by `samples/models/train_sample_model.py`, on one {training.get("device", "unknown device")}, on nothing
but the clips that `samples/models/sample_scenes.py` draws; no photograph, film or other model went into it.

{phases}

| part | parameters |
|---|---|
| UNet | {parameters["unet"]:,} |
| VAE | {parameters["vae"]:,} |
| image encoder | {parameters["image_encoder"]:,} |

## How well it works

PSNR in dB against the true continuation, frames 2 to 14, mean of {evaluation["scenes"]} scenes that were never trained
on, with {settings["num_inference_steps"]} steps, guidance {settings["min_guidance_scale"]} to \
{settings["max_guidance_scale"]}, and the true motion bucket.

| scene | model | first frame repeated | true clip through the VAE |
|---|---|---|---|
{table}
| all | {total} |

The motion bucket sets the speed (mean absolute difference of successive frames, colours in 0..1):

| motion_bucket_id | generated | true |
|---|---|---|
{moves}

## What it is for, and what it cannot do

For examples, tests and timings of code that runs Stable Video Diffusion, where the pictures must show whether the code
is right. It knows the kinds of scenes listed above, at {SIZE} x {SIZE} pixels and {FRAMES} frames, in our drawing
style; it makes nothing sensible of photographs, of other sizes or of longer clips. Minutes of training leave their
marks: things go where they should, but what turns or moves fast (a planet, a fin, a ball's stripes) smears in colour
and leaves a faint trail; the VAE's own reconstruction of the true clip is the ceiling. The image noise was
trained between {NOISE_AUG / 2} and {NOISE_AUG * 2}; the frame rate is ignored. It is no measure of the quality of SVD
itself.

Apache-2.0.
"""


def write_images(folder: Path, kinds: Sequence[str] = ("car", "fish", "windmill", "balloon", "boat", "rocket")) -> None:
    """First frames of held-out scenes, to animate."""
    folder.mkdir(parents=True, exist_ok=True)
    start = HELD_OUT + 30_000
    seeds = [start + (NAMES.index(kind) - start) % len(NAMES) for kind in kinds]
    for kind, image in zip(kinds, to_pil(draw_clips(seeds, frames=1)[0][:, 0]), strict=True):
        image.save(folder / f"{kind}.png", optimize=True)


# ------------------------------------------------------------------ command line


def train(args: argparse.Namespace, device: torch.device) -> bool:
    """Both phases, then the export, whatever has come in between. Returns whether all of it was done."""
    torch.manual_seed(args.seed)
    model = load_model(args.init_from) if args.init_from else new_model()
    for module in model.modules():
        module.to(device).requires_grad_(False)
    training: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "seed": args.seed}
    if args.init_from:
        training["before"] = json.loads((args.init_from / "metrics.json").read_text())["training"]
    with Interrupted() as stop:
        common = {"layout": args.layout, "device": device, "stop": stop, "max_steps": args.max_steps}
        try:
            if device.type == "cuda":  # a CUDA graph cannot be captured on the default stream
                torch.cuda.set_stream(torch.cuda.Stream(device))
            if args.minutes_vae > 0:
                training["vae"] = train_vae(model.vae, args, **common) | {"batch": args.batch_vae}
            if args.minutes_unet > 0 and not stop:
                training["unet"] = train_unet(model, args, **common) | {"batch": args.batch_unet}
        finally:
            export(model, args.out, training)
    return not stop


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes-vae", type=float, default=2.3, help="wall-clock budget; the schedule follows it")
    parser.add_argument("--minutes-unet", type=float, default=4.7, help="wall-clock budget; the schedule follows it")
    parser.add_argument("--batch-vae", type=int, default=8, help="clips per step")
    parser.add_argument("--window-frames", type=int, default=8, help="frames of a clip that a VAE step sees")
    parser.add_argument("--batch-unet", type=int, default=32, help="clips per step")
    parser.add_argument("--lr-vae", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--lr-unet", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--block", type=int, default=640, help="clips drawn at a time")
    parser.add_argument("--pool-blocks", type=int, default=6, help="blocks of encoded clips to choose from")
    parser.add_argument("--refresh-every", type=int, default=80, help="UNet steps between new blocks")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels; other sizes only to try things out")
    parser.add_argument("--max-steps", type=int, help="end each phase early")
    parser.add_argument("--eval-scenes", type=int, help="held-out scenes (default: 80, on a CPU 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "samples" / "models" / "svd-tiny-scenes")
    parser.add_argument("--init-from", type=Path, metavar="DIR", help="continue from an exported model")
    parser.add_argument("--no-sweep", action="store_true", help="keep the stored guidance and number of steps")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help="of convolution weights")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the model in --out")
    parser.add_argument("--write-images", type=Path, metavar="DIR", help="also write held-out first frames")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps into a temporary folder")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    if args.eval_scenes is None:
        args.eval_scenes = 80 if device.type == "cuda" else 8
    if args.write_images:
        write_images(args.write_images)
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            tiny = {"batch_vae": 2, "batch_unet": 2, "block": 10, "pool_blocks": 1, "size": 32, "max_steps": 3}
            vars(args).update(tiny, eval_scenes=2, out=Path(scratch) / "model", init_from=None, evaluate_only=False)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.evaluate_only or train(args, device):
            print(json.dumps(evaluate(args.out, args, device), indent=2))


if __name__ == "__main__":
    main()
