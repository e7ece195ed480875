"""Text and images in, text out: load a checkpoint, then chat, stream, generate on ids, or ask for logits.

    messages, images --Processor.prompt--> rows --Predictor--> logits <--> samplers.denoise --> ids --> text

Row i of a batch is answered as the same request alone, whatever the other rows' lengths and pictures: the same tokens
in float32 (to rounding in the model), also when tokens are drawn, since every row has a generator of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmllm.checkpoints import folder
from dmllm.checkpoints.card import describe
from dmllm.computed import Kept
from dmllm.constraints import Constraints
from dmllm.data.collate import collate
from dmllm.encoded import ROOM
from dmllm.imagining import Draws
from dmllm.infilling import conversations_of, infill
from dmllm.likelihoods import likelihoods
from dmllm.logits import aligned_logits
from dmllm.nn.graphs import Workspaces
from dmllm.predictor import decode, prepare
from dmllm.replies import Generated, Reply, answered, replies_of
from dmllm.requests import Asked, Seeds, prompts_of, row_generators, rows_of_ids, split_requests
from dmllm.samplers.config import DecodeConfig, decode_config
from dmllm.scoring import rank
from dmllm.tiling import TilingConfig
from dmllm.types import Batch, Example, SpecialTokens, Step


def load(
    path_or_name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    image_room: int = ROOM,
    prompt_room: int = ROOM,
    image_tokenizer: Any = None,
) -> Pipeline:
    """A checkpoint ready to be asked.

    Args:
        path_or_name: a folder, a packaged name such as "dmllm-tiny", or a hub name.
        device: None is the GPU if there is one, else the CPU.
        dtype: None is float32 on a CPU and the checkpoint's own elsewhere; "auto" is its own everywhere.
        revision: of a hub name: a branch, tag or commit.
        config: fields over those of a published config.json, e.g. {"image_aspect_ratio": "pad"}.
        image_room, prompt_room: as for `Pipeline`.
        image_tokenizer: what makes pictures of codes, or its path; None is the checkpoint's own, if it has one.

    Raises:
        ValueError, FileNotFoundError: there is no such checkpoint, or it is not complete; the message says which file.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    own = folder.dtype_of(dtype, device)
    loaded = folder.load(path_or_name, device=device, dtype=own, revision=revision, config=config)
    pipeline = Pipeline(loaded.model, loaded.processor, loaded.generation, image_room, prompt_room)
    return pipeline.drawing_by(image_tokenizer or loaded.image_tokenizer)


class Pipeline(Draws):
    """A model, the processor that feeds it, and its decode defaults.

    Args:
        model: a `MultimodalModel`, or what is called like one.
        processor: None for a checkpoint without a tokenizer: `generate` and `logits` remain.
        generation: decode defaults by name, as in `generation_config.json`; its other keys are passed by.
        image_room: bytes of encoded pictures that are kept for later calls and turns (`pipeline.images`); 0 keeps none.
        prompt_room: the same for keys and values of prompts' rows, where they are exact (`pipeline.prompts`).

    Every method that decodes takes `generator` (a number, a torch.Generator, a list of one a row, or None for torch's
    global one), `use_cache` (None: where it is exact; False: never) and, as `**decode`, the fields of
    `samplers.config.DecodeConfig`: max_new_tokens, steps, block_length, remasking, threshold, temperature, top_p,
    cfg_scale, eos_token_id, choices, constraint.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        generation: dict[str, Any] | None = None,
        image_room: int = ROOM,
        prompt_room: int = ROOM,
    ):
        self.model, self.processor = model.eval(), processor
        self.generation = dict(generation or {})
        self.special: SpecialTokens = model.config.special
        self._workspaces = Workspaces()
        self.kept = Kept.of(image_room, prompt_room)
        self.images, self.prompts = self.kept.images, self.kept.prompts
        self.constraints = Constraints(processor, model)

    def chat(
        self,
        messages: Any,
        images: Any = None,
        *,
        generator: Seeds = None,
        use_cache: bool | None = None,
        **decode: Any,
    ) -> Any:
        """Answer a text or a conversation (a `Reply`), or each request of a list of them (a list of `Reply`).

        Args:
            messages: a text; a list of {"role", "content"}; or a list of such requests.
            images: for one request an image or a list of them (path, bytes, data URL, PIL); for a batch a list with
                that, or None, for each. They fill the image parts that hold none, or go before the first question.

        Raises:
            ValueError: a request, an image or a decode option is not understood; the message says what is.
        """
        config = self.decode_config(**decode)
        requests, single = split_requests(messages, images)
        if not requests:
            return []
        examples = self._prompts(requests)
        *_, last = self._denoise(examples, config, generator, use_cache)
        replies = self.replies(last, **decode)
        return replies[0] if single else replies

    def stream(
        self,
        messages: Any,
        images: Any = None,
        *,
        generator: Seeds = None,
        use_cache: bool | None = None,
        **decode: Any,
    ) -> Iterator[Step]:
        """What `chat` does, as it goes: the canvas after every model call. `replies(step)` reads one."""
        config = self.decode_config(**decode)
        examples = self._prompts(split_requests(messages, images)[0])
        return self._denoise(examples, config, generator, use_cache)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        images: Any = None,
        *,
        draft: Any = None,
        streamer: Any = None,
        generator: Seeds = None,
        use_cache: bool | None = None,
        **decode: Any,
    ) -> Generated:
        """Continue ids [B, P] by a canvas of max_new_tokens.

        Args:
            attention_mask: [B, P], 0 at padding on the left or on the right; positions count from a row's first token
                (from the first column for a model that draws as its authors' code does, without a generator).
            images: a list in the order of their image tokens, or a list (or None) for each row. An image token stands
                once for each image, or as often as the image has rows.
            draft: ids [B, D] that the canvas begins with, open where they are the mask token: text to be filled in, or
                behind what is open, an ending that is given.
            streamer: transformers' streamer (`TextDiffusionStreamer` also shows drafts); for one row.

        Raises:
            ValueError: shapes, image tokens or decode options do not fit; or a streamer with more than one row.
        """
        config = self.decode_config(**decode)
        ids, asked = self._asked(input_ids, attention_mask, images)
        if streamer is not None:
            if len(ids) != 1:
                raise ValueError(f"streamer= takes one row, not a batch of {len(ids)}; call generate once for each.")
            streamer.put(ids)
        put_draft = getattr(streamer, "put_draft", None)
        trajectory = []
        given = None if draft is None else torch.as_tensor(draft).cpu()
        counted = generator is None and getattr(self.model, "counts_padding", False)
        examples = [a.counted if counted else a.example for a in asked]
        for step in self._denoise(examples, config, generator, use_cache, given):
            trajectory.append(step)
            if put_draft is not None:
                put_draft(step.ids.cpu())
        last = trajectory[-1]
        kept = answered(last, config.stops)
        answers = last.ids.masked_fill(~kept, self.special.pad)
        if streamer is not None:
            streamer.put(answers[kept].cpu())
            streamer.end()
        return Generated(torch.cat([ids.to(answers.device), answers], 1), last.num_forwards, trajectory)

    def logits(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        images: Any = None,
        time: Tensor | None = None,
        canvas: Tensor | None = None,
        visibility: str | None = None,
        feedback: Tensor | None = None,
    ) -> Tensor:
        """Aligned logits [B, P, V]: entry [b, i] scores the token AT column i of the ids.

        Args:
            attention_mask, images: as for `generate`; values at padding mean nothing, and at an image token that
                stands for a whole image they are those of its first row.
            time: [B] or [B, P], for models conditioned on it.
            canvas: [B, P] bool, the columns that are being denoised, for models whose prompt does not see them;
                None is all.
            visibility: who sees whom: full, prefix, causal, or block:N such as block:4; None is the model's own.
            feedback: [B, P, V], logits that the model gave before, for models conditioned on their own.

        Raises:
            ValueError: as `generate`; or an unknown visibility, or feedback for a model that takes none.
        """
        ids, asked = self._asked(input_ids, attention_mask, images)
        batch = self._collate([own.example for own in asked])
        found = aligned_logits(self.model, asked, batch, time, canvas, visibility, feedback, self.images)
        assert found.shape[:2] == ids.shape
        return found

    def score(
        self,
        input_ids: Any,
        answer_ids: Any,
        attention_mask: Any = None,
        images: Any = None,
        *,
        num_samples: int = 128,
        hidden: Any = None,
        orders: Any = None,
        cfg_scale: float = 0.0,
        batch_size: int = 16,
        generator: Seeds = None,
        use_cache: bool | None = None,
    ) -> Tensor:
        """log p(answer | prompt, images) of each row in nats, [B] float64 (`dmllm.likelihoods`).

        Args:
            input_ids, attention_mask, images: the prompts, as for `generate`.
            answer_ids: [B, n], or a list of B answers of any lengths.
            num_samples: views of each answer, some of its tokens hidden in each; unread where a row predicts the next
                token, whose likelihood is exact.
            hidden: [num_samples, n] bool, what each view hides, in place of drawing it; for one row.
            orders: [num_samples, n], places of the answer in the order in which they come, for models that know all.
            cfg_scale: guidance, as in decoding.
            batch_size: views in one model call.

        Raises:
            ValueError: shapes do not fit, an answer is empty, or the model conditions on more than one masked answer.
        """
        examples = [own.example for own in self._asked(input_ids, attention_mask, images)[1]]
        views = {"num_samples": num_samples, "hidden": hidden, "orders": orders, "batch_size": batch_size}
        return likelihoods(
            self.model,
            [self._collate([example]) for example in examples],
            [torch.as_tensor(answer, device=self.device) for answer in answer_ids],
            self.special.mask,
            row_generators(generator, examples),
            **{**views, "cfg_scale": cfg_scale, "use_cache": use_cache, "kept": self.kept},
        )

    def infill(
        self,
        text: Any,
        messages: Any = None,
        images: Any = None,
        *,
        num_samples: int = 32,
        batch_size: int = 16,
        generator: Seeds = None,
        use_cache: bool | None = None,
        **decode: Any,
    ) -> Any:
        """Fill the holes of a text together (an `Infilled`), or of each text of a list (a list of `Infilled`).

        Args:
            text: [MASK] is a hole of one token, [MASK:4] of four, [MASK:1..3] of one to three: the text that is then
                the most probable (`infilling`); [MASK:*] of any number (`growing`). All else stays, to the character.
            messages, images: as for `chat`: what the text answers; None is the pictures alone, or nothing at all.
            num_samples: random views by which texts of several lengths are compared.
            batch_size: texts, or views, in one model call.

        Raises:
            ValueError: there is no hole, or one that is not understood; too many choices of lengths; the tokenizer
                does not give the fixed text back; or the model does not see what stands behind a hole.
        """
        self._processor()
        texts, conversations, single = conversations_of(text, messages, images)
        options = {"collate": self._collate, "num_samples": num_samples, "batch_size": batch_size}
        found = infill(self, texts, conversations, decode, generator, use_cache=use_cache, **options)
        return found[0] if single else found

    def rank(
        self,
        messages: Any,
        answers: Sequence[Any],
        images: Any = None,
        *,
        by: str = "log_prob",
        num_samples: int = 128,
        cfg_scale: float = 0.0,
        batch_size: int = 16,
        generator: Seeds = None,
        use_cache: bool | None = None,
    ) -> Any:
        """The answers to a question, the most probable first (a list of `Scored`), or to each of a list of questions.

        Args:
            messages, images: as for `chat`.
            answers: texts; for a list of questions a list of texts for each.
            by: log_prob, the sum over an answer, which compares answers as events; or per_token, its mean.
            num_samples: random views of each answer, the same ones of all answers to a question.
            cfg_scale, batch_size: as for `score`.

        Raises:
            ValueError: as `chat`; or an answer that is empty, or an unknown `by`.
        """
        requests, single = split_requests(messages, images)
        examples = self._prompts(requests)
        options = {"num_samples": num_samples, "cfg_scale": cfg_scale, "batch_size": batch_size, "use_cache": use_cache}
        asked = self, requests, examples, [answers] if single else list(answers), by
        found = rank(*asked, row_generators(generator, examples), collate=self._collate, **options)
        return found[0] if single else found

    def decode_config(self, **decode: Any) -> DecodeConfig:
        """The settings of one call: `decode` over the checkpoint's defaults. Raises ValueError naming a wrong one."""
        if (own := getattr(self.model, "decode_config", None)) is not None:
            return own(decode, self.generation)
        config = decode_config(decode, self.generation)
        own = getattr(self.processor, "stop_ids", None) or (self.special.eos,)
        return config if config.eos_token_id is not None else replace(config, eos_token_id=list(own))

    def replies(self, step: Step, **decode: Any) -> list[Reply]:
        """The answers that a step of `stream` shows so far: what is known in order, up to the end of sequence."""
        return replies_of(step, self.decode_config(**decode).stops, self._processor().decode)

    def text(self, step: Step) -> str:
        """The first row's answer in a step."""
        return self.replies(step)[0].text

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, special tokens by their names."""
        return self._processor().tokens.texts(ids)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tiling(self) -> TilingConfig | None:
        """How images are cut: the processor's way, or the model's own; None for text only."""
        return getattr(self.model if self.processor is None else self.processor.config, "tiling", None)

    def describe(self) -> dict[str, Any]:
        """Family, parts, sizes, ids, caches and decode defaults, by name."""
        config = self.decode_config()
        return {
            **describe(self.model, self.tiling),
            "decoding": ", ".join(f"{k}={v}" for k, v in getattr(config, "chosen", vars(config)).items()),
            "device": f"{self.device}, {self.model.dtype}",
        }

    def _denoise(
        self,
        examples: list[Example],
        config: DecodeConfig,
        generator: Seeds,
        use_cache: bool | None,
        draft: Tensor | None = None,
    ) -> Iterator[Step]:
        if (own := getattr(self.model, "denoise", None)) is not None:
            if draft is not None:
                raise ValueError("draft= is not for a model that denoises in its own way; leave it out.")
            draws = None if generator is None else row_generators(generator, examples)
            return own(self._collate(examples), config, draws)
        prompts, kept = self._collate(examples), (self._workspaces, self.kept)
        asked = prepare(self.model, prompts, config, self.special.mask, use_cache, draft, *kept)
        constraint, draws = self.constraints.of(config, asked[1]), row_generators(generator, examples)
        run = self.model, draws, config.max_new_tokens, self._workspaces
        return decode(*asked, *run, constraint)

    def _collate(self, examples: list[Example]) -> Batch:
        return collate(examples, self.special, rows_per_tile=getattr(self.tiling, "rows_per_tile", 0))

    def _prompts(self, requests: list[tuple[Any, list[Any]]]) -> list[Example]:
        return prompts_of(self._processor(), requests)

    def _asked(self, input_ids: Any, attention_mask: Any, images: Any) -> tuple[Tensor, list[Asked]]:
        ids = torch.as_tensor(input_ids).cpu()
        mask = None if attention_mask is None else torch.as_tensor(attention_mask).cpu()
        prefix = self.processor is not None and self.processor.config.image_prefix
        asked = rows_of_ids(ids, mask, images, tiling=self.tiling, image_prefix=prefix, special=self.special)
        return ids, asked

    def _processor(self) -> Any:
        if self.processor is None:
            raise ValueError("This checkpoint has no tokenizer, so it cannot chat; use generate() and logits() on ids.")
        return self.processor
