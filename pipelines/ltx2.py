"""LTX-2 and LTX-2.3: video with its sound, from text, images, videos and references.

What the family offers: 175 passes over the tokens of a block become 30 (``gated_residual_norm``, ``qk_norm_rope``,
``linear_gelu``); attention to the text without its mask (``padded_text``); where tokens have timesteps of their own,
one modulation for each different one (``modulation_rows``). The rotary tables, which the model makes anew at every
call, stay: what they depend on is known to the GPU only. The decoder of
the video is LTX-Video's but for its padding by reflection, which ``rms_norm_silu`` writes; that of the sound stays.
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_ltx2 import FusedLTX2AdaLayerNormSingle, FusedLTX2VideoTransformerBlock
from vidaccel.blocks.vae.autoencoder_kl_ltx2 import FusedLTX2VideoDecoder3d, FusedLTX2VideoEncoder3d
from vidaccel.blocks.vae.tile_batches import TileBatches
from vidaccel.blocks.vae.tile_blends import TileBlends
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

# those that take the timesteps of video tokens
PER_TOKEN = "time_embed", "av_cross_attn_video_scale_shift", "av_cross_attn_video_a2v_gate"

RULES = {
    "AutoencoderKLLTX2Video": (
        Swap(FusedLTX2VideoDecoder3d),
        Swap(FusedLTX2VideoEncoder3d),
        TileBatches(),
        TileBlends(),
    ),
    "LTX2VideoTransformer3DModel": (
        Swap(FusedLTX2VideoTransformerBlock),
        Swap(FusedLTX2AdaLayerNormSingle, names=PER_TOKEN),
    ),
}
SPREAD = {
    "LTX2VideoTransformer3DModel": Sequence(
        "transformer_blocks", heads=("num_attention_heads", "audio_num_attention_heads")
    ),
}
