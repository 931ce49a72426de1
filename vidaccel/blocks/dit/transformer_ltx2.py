"""diffusers' ``transformers/transformer_ltx2.py``: the block of LTX-2 and 2.3, of a video and its sound.

Each stream attends to itself and to the text, then each to the other, then comes its feed-forward. What lies between
two products is one pass, as in LTX-Video; the norm before the streams attend to each other has two modulations, one for
its queries and one for its keys, and both leave the same pass. 175 passes over the tokens of a block become 30.

The queries of one stream and its keys for the other have the same shape and the same rotary table, though they belong
to two attentions: so they are normed and turned together.

Where tokens are spread over ranks, they are those of the video; the sound, which has few, is whole on every rank.

In 2.3 the heads of an attention have gates, and cross-attention to the text is modulated, and gated, by the timestep.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AdaLayerNormSingle,
    LTX2Attention,
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    LTX2VideoTransformerBlock,
)
from torch import Tensor

from vidaccel.blocks.dit.attention import (
    Attention,
    attend,
    attention_reason,
    feed_forward,
    over_heads,
    project,
    whole_over_heads,
)
from vidaccel.blocks.dit.normalization import TimestepModulation
from vidaccel.blocks.dit.text_attention import Lengths, head_mask
from vidaccel.blocks.dit.transformer_ltx import (
    LTX_OPS,
    LTXBlock,
    Modulation,
    Tables,
    first_tokens,
    head_norm,
    modulations,
    paired_rope,
)
from vidaccel.kernels.attention.qk_norm_rope import Rope, qk_norm_rope
from vidaccel.parallel.layout import all_tokens, own_tokens
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, call_site, fuses

__all__ = ["FusedLTX2AdaLayerNormSingle", "FusedLTX2VideoTransformerBlock"]


class _Call(NamedTuple):
    """The arguments of a block, by position: video ``[B, S, C]``, audio ``[B, S', C']``, and what goes with them."""

    hidden_states: Tensor
    audio_hidden_states: Tensor
    encoder_hidden_states: Tensor
    audio_encoder_hidden_states: Tensor
    temb: Tensor
    temb_audio: Tensor
    temb_ca_scale_shift: Tensor
    temb_ca_audio_scale_shift: Tensor
    temb_ca_gate: Tensor
    temb_ca_audio_gate: Tensor
    temb_prompt: Tensor | None
    temb_prompt_audio: Tensor | None
    video_rotary_emb: Tables | None
    audio_rotary_emb: Tables | None
    ca_video_rotary_emb: Tables | None
    ca_audio_rotary_emb: Tables | None
    encoder_attention_mask: Tensor | None
    audio_encoder_attention_mask: Tensor | None
    self_attention_mask: Tensor | None
    audio_self_attention_mask: Tensor | None
    a2v_cross_attention_mask: Tensor | None
    v2a_cross_attention_mask: Tensor | None
    use_a2v_cross_attention: bool
    use_v2a_cross_attention: bool
    perturbation_mask: Tensor | None
    all_perturbed: Any

    def masked_texts(self) -> list[tuple[Tensor | None, Tensor]]:
        """The masks of the texts of video and audio, and these."""
        return [
            (self.encoder_attention_mask, self.encoder_hidden_states),
            (self.audio_encoder_attention_mask, self.audio_encoder_hidden_states),
        ]


class _Stream(NamedTuple):
    """The parts of a block that video, or audio, goes through, and what they take in a call.

    Attributes:
        attn1: Self-attention.
        attn2: Attention to the text.
        ff: Feed-forward.
        norms: Before each of the two, before attention to the other stream, and before the feed-forward.
        modulation: Shift, scale and gate of self-attention, then of the feed-forward, then of attention to the text if
            that has some.
        cross: Scale and shift of the queries for the other stream, then of the keys that the other one attends to.
        cross_gate: Of attention to the other stream.
        text: ``[B, T, C'']``.
        text_mask: ``[B, 1, T]``, additive, or None.
        lengths: Of the texts behind the mask, if they are known.
        self_mask: Of self-attention.
        rotary_emb: Of self-attention.
        cross_rotary_emb: Of attention between the streams.
        whole: Whether every rank has all its tokens.
    """

    attn1: Any
    attn2: Any
    ff: Any
    norms: tuple[Any, Any, Any, Any]
    modulation: list[Modulation]
    cross: list[Modulation]
    cross_gate: Modulation
    text: Tensor
    text_mask: Tensor | None
    lengths: Lengths
    self_mask: Tensor | None
    rotary_emb: Tables | None
    cross_rotary_emb: Tables | None
    whole: bool


@fuses(LTX2VideoTransformerBlock, LTX_OPS)
class FusedLTX2VideoTransformerBlock(LTXBlock, LTX2VideoTransformerBlock):
    """Video and audio: self-attention, attention to the text, attention to each other, feed-forward."""

    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: Tables | None = None,
        audio_rotary_emb: Tables | None = None,
        ca_video_rotary_emb: Tables | None = None,
        ca_audio_rotary_emb: Tables | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Any:
        return call_site(
            FusedLTX2VideoTransformerBlock,
            self,
            *_Call(
                hidden_states, audio_hidden_states, encoder_hidden_states, audio_encoder_hidden_states,
                temb, temb_audio, temb_ca_scale_shift, temb_ca_audio_scale_shift, temb_ca_gate, temb_ca_audio_gate,
                temb_prompt, temb_prompt_audio,
                video_rotary_emb, audio_rotary_emb, ca_video_rotary_emb, ca_audio_rotary_emb,
                encoder_attention_mask, audio_encoder_attention_mask, self_attention_mask, audio_self_attention_mask,
                a2v_cross_attention_mask, v2a_cross_attention_mask, use_a2v_cross_attention, use_v2a_cross_attention,
                perturbation_mask, all_perturbed,
            ),
        )  # fmt: skip

    def call_reason(self, *args: Any) -> str | None:
        call = _Call(*args)
        if call.use_a2v_cross_attention != call.use_v2a_cross_attention:
            return "only one of its streams attends to the other"
        if call.a2v_cross_attention_mask is not None or call.v2a_cross_attention_mask is not None:
            return "attention between its streams has a mask"
        x, audio = call.hidden_states, call.audio_hidden_states
        if len({len(tokens) for tokens in call[:4]}) > 1:  # stock code may broadcast them
            return "video, audio and their texts differ in batch size"
        tables = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
        return self.blocks_reason(
            [*self._video_norms(), *self._audio_norms()],
            [
                (x, all_tokens(x), self.scale_shift_table, call.temb),
                (x, all_tokens(x), tables[0], call.temb_ca_scale_shift),
                (x, all_tokens(x), tables[0], call.temb_ca_gate),
                (audio, audio.shape[1], self.audio_scale_shift_table, call.temb_audio),
                (audio, audio.shape[1], tables[1], call.temb_ca_audio_scale_shift),
                (audio, audio.shape[1], tables[1], call.temb_ca_audio_gate),
            ],
        )

    def spread_reason(self, *args: Any) -> str | None:
        call = _Call(*args)
        if reason := self._spread_self_attention_reason(call):
            return reason
        if not call.use_a2v_cross_attention:
            return None
        return self._pair_reason(call.ca_video_rotary_emb, call.ca_audio_rotary_emb, call.hidden_states)

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _Call(*args)
        table = self.video_a2v_cross_attn_scale_shift_table
        path = self.path_of(
            call.masked_texts(),
            (self.scale_shift_table, call.temb), (table[:4], call.temb_ca_scale_shift), (table[4:], call.temb_ca_gate),
        )  # fmt: skip
        return path, self._is_perturbed(call), _all_perturbed(call), self._all_angles_reason(call)

    def _all_angles_reason(self, call: _Call) -> str | None:
        tables = call.video_rotary_emb, call.audio_rotary_emb, call.ca_video_rotary_emb, call.ca_audio_rotary_emb
        return self.angles_reason(*tables) if self.attn1.rope_type == "interleaved" else None

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _Call(*args)
        if call.hidden_states.numel() <= MOST_WHOLE:
            return args, kwargs
        rows, mask = CORNER_ROWS, call.self_attention_mask
        corner = call._replace(
            hidden_states=call.hidden_states[:, :rows],
            temb=first_tokens(call.temb, rows),
            temb_ca_scale_shift=first_tokens(call.temb_ca_scale_shift, rows),
            temb_ca_gate=first_tokens(call.temb_ca_gate, rows),
            video_rotary_emb=_first_angles(call.video_rotary_emb, rows),
            ca_video_rotary_emb=_first_angles(call.ca_video_rotary_emb, rows),
            self_attention_mask=None if mask is None else mask[:, :rows, :rows],
        )
        return tuple(corner), kwargs

    def fused_forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        call = _Call(*args)
        video, audio = self._streams(call)
        attends_to_other = call.use_a2v_cross_attention
        x, *queries_keys = self._to_itself_and_text(video, call.hidden_states, call, attends_to_other)
        y, *audio_queries_keys = self._to_itself_and_text(audio, call.audio_hidden_states, call, attends_to_other)
        if attends_to_other:
            from_audio, from_video = self._to_each_other(video, audio, queries_keys, audio_queries_keys)
            x, normed = self._before_feed_forward(video, x, from_audio, video.cross_gate)
            y, audio_normed = self._before_feed_forward(audio, y, from_video, audio.cross_gate)
        else:
            (normed,), (audio_normed,) = queries_keys, audio_queries_keys
        return self._feed_forward(video, x, normed), self._feed_forward(audio, y, audio_normed)

    def _streams(self, call: _Call) -> tuple[_Stream, _Stream]:
        (mask, text), (audio_mask, audio_text) = call.masked_texts()
        lengths, audio_lengths = self.lengths_of((mask, text), (audio_mask, audio_text))
        if self.cross_attn_adaln:
            text = _modulated_text(text, self.prompt_scale_shift_table, call.temb_prompt)
            audio_text = _modulated_text(audio_text, self.audio_prompt_scale_shift_table, call.temb_prompt_audio)
        tables, audio_tables = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
        # in both, attention from audio to video comes first: queries of the video, keys of the audio
        cross = modulations(tables[:4], call.temb_ca_scale_shift)
        audio_cross = modulations(audio_tables[:4], call.temb_ca_audio_scale_shift, whole=True)
        video = _Stream(
            self.attn1, self.attn2, self.ff, self._video_norms(),
            modulations(self.scale_shift_table, call.temb), cross, modulations(tables[4:], call.temb_ca_gate)[0],
            text, mask, lengths, call.self_attention_mask, call.video_rotary_emb, call.ca_video_rotary_emb, False,
        )  # fmt: skip
        audio = _Stream(
            self.audio_attn1, self.audio_attn2, self.audio_ff, self._audio_norms(),
            modulations(self.audio_scale_shift_table, call.temb_audio, whole=True),
            [*audio_cross[2:], *audio_cross[:2]], modulations(audio_tables[4:], call.temb_ca_audio_gate, whole=True)[0],
            audio_text, audio_mask, audio_lengths, call.audio_self_attention_mask,
            call.audio_rotary_emb, call.ca_audio_rotary_emb, True,
        )  # fmt: skip
        return video, audio

    def _video_norms(self) -> tuple[Any, Any, Any, Any]:
        return self.norm1, self.norm2, self.audio_to_video_norm, self.norm3

    def _audio_norms(self) -> tuple[Any, Any, Any, Any]:
        return self.audio_norm1, self.audio_norm2, self.video_to_audio_norm, self.audio_norm3

    def _to_itself_and_text(self, stream: _Stream, x: Tensor, call: _Call, attends_to_other: bool) -> list[Tensor]:
        """The stream behind its first two attentions, and what the next one takes of it.

        Those are its queries and its keys before their projections; or, if the streams do not attend to each other, the
        input of its feed-forward.
        """
        norm1, norm2, norm_cross, norm3 = stream.norms
        shift, scale, gate, ff_shift, ff_scale, _, *of_text = stream.modulation
        text_shift, text_scale, text_gate = of_text or (None, None, None)
        attended = self._self_attention(stream, self.modulate(x, norm1, scale, shift), call)
        x, normed = self.add_norm(x, attended, gate, norm2, text_scale, text_shift)
        attended = self._text_attention(stream, normed)
        if attends_to_other:
            return self.add_norm(x, attended, text_gate, norm_cross, *stream.cross)
        return self.add_norm(x, attended, text_gate, norm3, ff_scale, ff_shift)

    def _before_feed_forward(self, stream: _Stream, x: Tensor, branch: Tensor, gate: Modulation) -> list[Tensor]:
        _, _, _, ff_shift, ff_scale, *_ = stream.modulation
        return self.add_norm(x, branch, gate, stream.norms[3], ff_scale, ff_shift)

    def _feed_forward(self, stream: _Stream, x: Tensor, normed: Tensor) -> Tensor:
        out = feed_forward(stream.ff, normed, fused=self.runs("linear_gelu"))
        return self.add(x, out, stream.modulation[5])

    def _foreign_reason(self, attn: Any) -> str | None:
        """Why ``attn`` has to be called, or None."""
        kind = LTX2PerturbedAttnProcessor if self.perturbed_attn else LTX2AudioVideoAttnProcessor
        return attention_reason(attn, LTX2Attention, kind)

    def _self_attention(self, stream: _Stream, x: Tensor, call: _Call) -> Tensor:
        attn, tables, mask = stream.attn1, stream.rotary_emb, stream.self_mask
        arguments: dict[str, Any] = {"encoder_hidden_states": None, "query_rotary_emb": tables, "attention_mask": mask}
        if self.perturbed_attn:
            arguments |= {"perturbation_mask": call.perturbation_mask, "all_perturbed": call.all_perturbed}
            if self._is_perturbed(call):
                return attn(hidden_states=x, **arguments)  # values stand for attention: there is no query to norm
        if reason := self._self_attention_reason(attn, x, tables):
            self.note_called("qk_norm_rope", reason)
            return attn(hidden_states=x, **arguments)
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        heads, rope = _rope(attn, tables, stream.whole)
        query, key = qk_norm_rope(query, key, heads, head_norm(attn.norm_q, attn.norm_k), rope)
        attention = partial(self._attend_masked, attn, mask)
        attended = (attention if stream.whole else partial(over_heads, attention))(query, key, value, attn.heads)
        return self._project(attn, x, attended)

    def _is_perturbed(self, call: _Call) -> bool:
        """Whether values stand for self-attention, in some samples or in all."""
        if not self.perturbed_attn:
            return False
        return call.perturbation_mask is not None or not (call.all_perturbed is None or call.all_perturbed is False)

    def _spread_self_attention_reason(self, call: _Call) -> str | None:
        """Why self-attention of the video needs all tokens to be called with, or None."""
        if not self._is_perturbed(call):
            return self._self_attention_reason(self.attn1, call.hidden_states, call.video_rotary_emb)
        if reason := self._foreign_reason(self.attn1):
            return reason
        return None if _all_perturbed(call) else "values stand for self-attention in some samples"

    def _self_attention_reason(self, attn: Any, x: Tensor, tables: Tables | None) -> str | None:
        """Why a self-attention has to be called, or None."""
        reason = self._foreign_reason(attn) or self.rope_reason(x, tables, attn.norm_q, attn.norm_k)
        return reason or self._tables_reason(attn, tables, tables)

    def _attend_masked(
        self, attn: Any, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor, num_heads: int
    ) -> Tensor:
        mask = head_mask(attn, mask, key)
        mask = None if mask is None else mask[:, :num_heads]  # that of one head is that of all
        return self._attention(attn, mask)(query, key, value, num_heads)

    def _attention(self, attn: Any, mask: Tensor | None = None) -> Attention:
        return partial(attend, attn.processor, mask=mask, fused=self.runs("spatial_attention"))

    def _text_attention(self, stream: _Stream, x: Tensor) -> Tensor:
        attn = stream.attn2
        if reason := self._foreign_reason(attn):
            self.note_called("padded_text", reason)
            return attn(
                x, encoder_hidden_states=stream.text, query_rotary_emb=None, attention_mask=stream.text_mask
            )  # fmt: skip
        out = self.attend_to_text(attn, x, stream.text, stream.text_mask, stream.lengths)
        return self._project(attn, x, out)

    def _to_each_other(
        self, video: _Stream, audio: _Stream, of_video: list[Tensor], of_audio: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What video finds in audio, and audio in video, from the inputs of their queries and their keys."""
        a2v, v2a = self.audio_to_video_attn, self.video_to_audio_attn
        (video_query, video_key), (audio_query, audio_key) = of_video, of_audio
        tables, audio_tables = video.cross_rotary_emb, audio.cross_rotary_emb
        if reason := self._pair_reason(tables, audio_tables, video_query):
            self.note_called("qk_norm_rope", reason)
            return (
                a2v(
                    video_query, encoder_hidden_states=audio_key,
                    query_rotary_emb=tables, key_rotary_emb=audio_tables, attention_mask=None,
                ),
                v2a(
                    audio_query, encoder_hidden_states=video_key,
                    query_rotary_emb=audio_tables, key_rotary_emb=tables, attention_mask=None,
                ),
            )  # fmt: skip
        q, k = _turned(a2v, video_query, v2a, video_key, tables, whole=False)
        audio_q, audio_k = _turned(v2a, audio_query, a2v, audio_key, audio_tables, whole=True)
        from_audio = self._attention(a2v)(q, audio_k, a2v.to_v(audio_key), a2v.heads)
        from_video = whole_over_heads(self._attention(v2a), audio_q, k, v2a.to_v(video_key), v2a.heads)
        return self._project(a2v, video_query, from_audio), self._project(v2a, audio_query, from_video)

    def _pair_reason(self, tables: Tables | None, audio_tables: Tables | None, x: Tensor) -> str | None:
        """Why attention between the streams has to be called, or None."""
        a2v, v2a = self.audio_to_video_attn, self.video_to_audio_attn
        for attn in (a2v, v2a):
            if reason := self._foreign_reason(attn):
                return reason
        norms = a2v.norm_q, v2a.norm_k, v2a.norm_q, a2v.norm_k
        for of_stream, pair in ((tables, norms[:2]), (audio_tables, norms[2:])):
            if reason := self.rope_reason(x, of_stream, *pair):
                return reason
        if a2v.rope_type != v2a.rope_type:
            return "its rotary embeddings differ in kind"
        return self._tables_reason(a2v, tables, audio_tables)

    def _tables_reason(self, attn: Any, tables: Tables | None, others: Tables | None) -> str | None:
        """Why queries and keys cannot be turned by ``tables`` and ``others``, or None."""
        if (tables is None) != (others is None):
            return "only one of queries and keys has a rotary table"
        if tables is None or others is None:
            return None
        if attn.rope_type == "interleaved":
            return self.angles_reason(tables, others)
        if any(cos.ndim != 4 or 2 * cos.shape[1] * cos.shape[3] != attn.inner_dim for cos, _ in (tables, others)):
            return "its rotary table is not [B, H, S, D/2]"
        return None

    def _project(self, attn: Any, x: Tensor, out: Tensor) -> Tensor:
        """``out`` ``[B, S, H*D]`` times the gates of its heads, which ``x`` has opened, and projected."""
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(x))  # [B, S, H]
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        return project(attn, out)


def _all_perturbed(call: _Call) -> bool:
    """Whether they do in all samples: stock code asks the same, of a tensor on the CPU."""
    if call.all_perturbed is not None:
        return bool(call.all_perturbed)
    return call.perturbation_mask is not None and not call.perturbation_mask.any()


def _modulated_text(text: Tensor, table: Tensor, temb: Tensor | None) -> Tensor:
    """``[B, T, C]`` as keys and values are made of it, with a modulation ``[2, C]`` that may know the timestep."""
    if temb is None:
        shift, scale = table[None, None].to(device=text.device, dtype=text.dtype).unbind(2)
    else:
        shift, scale = (table[None, None] + temb.unflatten(2, (2, -1))).unbind(2)
    return text * (1 + scale) + shift


def _rope(attn: Any, tables: Tables | None, whole: bool) -> tuple[int, Rope | None]:
    """The rotary embedding by ``tables``, and the number of heads that those are for."""
    if tables is None or attn.rope_type == "interleaved":
        return attn.heads, paired_rope(tables, attn.heads, whole=whole)
    cos, sin = (table if whole else own_tokens(table, 2) for table in tables)  # [B, H, S, D/2]
    return cos.shape[1], Rope("halves", cos.transpose(1, 2), sin.transpose(1, 2))


def _turned(of_query: Any, x: Tensor, of_key: Any, y: Tensor, tables: Tables | None, *, whole: bool) -> list[Tensor]:
    """The queries of one attention and the keys of another, for which one stream has the same rotary table."""
    heads, rope = _rope(of_query, tables, whole)
    return qk_norm_rope(of_query.to_q(x), of_key.to_k(y), heads, head_norm(of_query.norm_q, of_key.norm_k), rope)


def _first_angles(tables: Tables | None, tokens: int) -> Any:
    """Of ``[B, H, S, D/2]`` or ``[B, S, C]``."""
    return None if tables is None else tuple(table[..., :tokens, :] for table in tables)


@fuses(LTX2AdaLayerNormSingle, {"modulation_rows": "math-exact"})
class FusedLTX2AdaLayerNormSingle(TimestepModulation, LTX2AdaLayerNormSingle):
    """Of a timestep for each token, one modulation for each stretch of tokens that share it."""

    def forward(
        self,
        timestep: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> Any:
        return call_site(FusedLTX2AdaLayerNormSingle, self, timestep, added_cond_kwargs, batch_size, hidden_dtype)
