"""Generate with transformers' `generate`.

A text depends on its own row alone: batches only share the time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
import transformers
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
)

from ...errors import RunError
from ...recipes.data.encode import pad_id
from ...recipes.generation import WEIGHTS_SHARE
from ...recipes.model_kinds import reads_padding
from ...recipes.schema import Predict, StageSettings
from ..quantisation import empty_model, mend_quantised, quantised_in
from ..training.model import attend_by_length
from . import Generation, LoadRequest, Prompt, not_finite
from .batches import Batches
from .steps import Choice, Limits, Record, Unpadded
from .texts import end_ids

_NUM_HIDDEN = 8  # tokens of padding that are looked at
_ROUNDING = 0.01  # rows of one batch may differ by the rounding of bfloat16, as a share of the largest score


def load(request: LoadRequest) -> TransformersEngine:
    """Return the engine with the model of the request."""
    return TransformersEngine(request.settings, load_model(request), request.tokenizer)


def load_model(request: LoadRequest) -> Any:
    """Return the model of the request, ready to answer.

    The layers are dealt out over the devices. With `predict.offload` those for which there is no place stay in host
    memory, and come to a device when it is their turn.

    Raises:
        RunError: there is no place for some layers.
    """
    spec, model_class = request.settings.model, getattr(transformers, request.model_class)
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(request.model_dir, **options, **spec.config)
    if spec.attention:
        options["attn_implementation"] = spec.attention
    placement = _placement(request)
    if width := request.settings.predict.load_in:
        empty = empty_model(lambda: model_class.from_config(config, **options))
        options["quantization_config"] = quantised_in(width, request.dtype, empty)
    try:
        model = model_class.from_pretrained(
            request.model_dir, config=config, dtype=getattr(torch, request.dtype), **options, **placement
        )
    except ValueError as error:
        if "dispatched on the CPU or the disk" not in str(error):  # bitsandbytes says it before anything is loaded
            raise
        raise _no_place(request) from error
    unwanted = {"disk"} | ({"cpu"} if not request.settings.predict.offload else set())
    if placement.get("device_map") == "auto" and unwanted & set(getattr(model, "hf_device_map", {}).values()):
        raise _no_place(request)
    mend_quantised(model)
    attend_by_length(model)
    return (model if placement else model.to(request.device)).eval()


def _placement(request: LoadRequest) -> dict[str, Any]:
    """Return how transformers deals a model out.

    Return nothing where it is to be loaded on one device, and not quantised.
    """
    predict = request.settings.predict
    found = {"device_map": request.device} if predict.load_in is not None else dict[str, Any]()
    if request.device == "cpu" or (request.num_devices == 1 and not predict.offload):
        return found
    most: dict[int | str, int] = {
        number: int(WEIGHTS_SHARE * torch.cuda.mem_get_info(number)[0]) for number in range(request.num_devices)
    }
    if predict.offload:
        most["cpu"] = psutil.virtual_memory().available
    return {"device_map": "auto", "max_memory": most}


def _no_place(request: LoadRequest) -> RunError:
    where = f"its {request.num_devices} devices" if request.num_devices > 1 else "its device"
    if request.settings.predict.offload:
        where += " and of the host"
    return RunError(
        f"the model does not fit into the memory of {where}; give predict more in resources.predict.devices_per_node, "
        "or set predict.load_in=4bit or predict.offload=true"
    )


def input_device(model: Any) -> torch.device:
    """Return the device that a model takes its inputs on.

    Weights that are elsewhere have none until it is their turn: accelerate moves them.
    """
    if model.device.type != "meta":
        found: torch.device = model.device
        return found
    places = (place for place in model.hf_device_map.values() if place not in ("cpu", "disk"))
    return torch.device(next(places, "cpu"))


class TransformersEngine:
    """A model of transformers that continues prompts, or answers them."""

    def __init__(self, settings: StageSettings, model: Any, tokenizer: Any) -> None:
        self._settings, self._model, self._tokenizer = settings, model, tokenizer
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._pad = pad_id(tokenizer)
        self._generation = _generation_config(settings.predict, model, tokenizer, self._pad)
        forced = self._generation.forced_eos_token_id  # of each row at its own end, see steps.Choice
        self._forced: list[int] = forced if isinstance(forced, list) else [] if forced is None else [forced]
        self._generation.forced_eos_token_id = None
        self._ends: frozenset[int] = frozenset(self._generation.eos_token_id or ())
        is_alone = reads_padding(model.config.to_dict(), settings.data.max_tokens)
        batch_rows = 1 if is_alone else settings.predict.batch_rows
        self._batches = Batches(batch_rows, settings.predict.batch_tokens)
        self._is_probed = self._is_encoder_decoder
        # a mixture of experts would compute what balances them in training, which fails beside what it remembers
        has_balance = getattr(model.config, "output_router_logits", False)
        self._options = {"output_router_logits": False} if has_balance else {}

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config."""
        return dict(self._model.config.to_dict())

    def with_settings(self, settings: StageSettings) -> TransformersEngine:
        """Return the same model with other settings of `predict`."""
        other = TransformersEngine(settings, self._model, self._tokenizer)
        other._batches = self._batches  # no decoding changes their sizes, and what memory has held is known
        other._is_probed = self._is_probed
        return other

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Return what follows each prompt; those of like length share a batch.

        A model that reads padding gets each alone.

        Raises:
            RunError: the model's scores of a row are no numbers, or a row alone is too large for the device.
        """
        beams = self._generation.num_beams or 1
        sizes = [(beams * prompt.max_new_tokens, beams * len(prompt.ids)) for prompt in prompts]
        rows = [prompt.row for prompt in prompts]
        if not self._is_probed and len(prompts) > 1:
            self._is_probed = True
            if self._reads_padding(prompts):
                self._batches = Batches(1, self._settings.predict.batch_tokens)
        return self._batches.run(sizes, lambda places: self._continue([prompts[place] for place in places]), rows)

    @torch.no_grad()
    def _reads_padding(self, prompts: Sequence[Prompt]) -> bool:
        """Say whether a token's scores depend on what stands in the padding.

        Some recurrent models pay no heed to the mask: in transformers 5.23 RecurrentGemma, and RWKV, which mixes up the
        states of rows of one length, too. Their rows are answered one by one.
        """
        token = next((one for prompt in prompts for one in prompt.ids if one != self._pad), self._pad)
        ids = torch.tensor([[hidden] * _NUM_HIDDEN + [token] for hidden in (self._pad, token)])
        mask = torch.tensor([[0] * _NUM_HIDDEN + [1]] * 2)
        device = input_device(self._model)
        output = self._model.generate(  # as answers are made: ranks that share a model wait for each other in it
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=1, pad_token_id=self._pad, return_dict_in_generate=True, output_logits=True
            ),
            **self._options,
        )
        scores = output.logits[0].float()
        return bool((scores[0] - scores[1]).abs().max() > _ROUNDING * scores.abs().max())

    @torch.no_grad()  # not inference_mode: what a model keeps from it could not be used by a training that goes on
    def _continue(self, prompts: list[Prompt]) -> list[Generation]:
        """Continue one batch."""
        # padding inside a prompt is attended to, that beside it is not; an encoder counts positions from the left
        side = "right" if self._is_encoder_decoder else "left"
        ids = _padded([prompt.ids for prompt in prompts], self._pad, side)
        mask = _padded([[1] * len(prompt.ids) for prompt in prompts], 0, side)
        device, predict = input_device(self._model), self._settings.predict
        num_read = 1 if self._is_encoder_decoder else ids.shape[1]  # a decoder reads its start token
        config = copy.copy(self._generation)
        config.max_new_tokens = max(prompt.max_new_tokens for prompt in prompts)
        is_padding = None if self._is_encoder_decoder else mask.to(device) == 0
        once = [] if is_padding is None else _once(config, is_padding)
        choice = Choice(self._settings, prompts, num_read, sorted(self._ends), device, self._forced)
        limits = Limits(predict.stop, prompts, num_read, self._tokenizer, device)
        record = Record(self._model, predict.keep_logprobs) if predict.keep_logprobs else None
        try:
            output = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([*once, choice]),
                stopping_criteria=StoppingCriteriaList([limits, *([record] if record else [])]),
                **self._memory(),
                **self._options,
            )
        finally:
            if record is not None:
                record.close()
        answers = [
            self._ended(row[: prompt.max_new_tokens], prompt.max_new_tokens)
            for prompt, row in zip(prompts, output[:, num_read:].tolist(), strict=True)
        ]
        _check(prompts, answers, choice.first_bad.tolist())
        return record.add_to(answers) if record is not None else answers

    def _memory(self) -> dict[str, Any]:
        """Return what a decoder with more layers than its encoder remembers into.

        Some T5s have one, and transformers 5.23 counts the layers of the encoder.
        """
        config = self._model.config
        if not (getattr(config, "num_decoder_layers", None) or 0) > getattr(config, "num_hidden_layers", 0):
            return {}
        return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}

    def _ended(self, ids: list[int], most: int) -> Generation:
        """Return the answer in *ids*.

        It is what comes before the first end token, or before the padding.
        """
        for place, token in enumerate(ids):
            if token in self._ends:
                return Generation(ids=ids[:place], ended="stop")
        while ids and ids[-1] == self._pad:  # the row has ended at a text, or is a beam that has
            ids.pop()
        return Generation(ids=ids, ended="length" if len(ids) == most else "stop")


def _check(prompts: Sequence[Prompt], answers: Sequence[Generation], first_bad: Sequence[int]) -> None:
    """Refuse scores that are no numbers, of tokens that belong to an answer."""
    for prompt, answer, bad in zip(prompts, answers, first_bad, strict=True):
        if bad <= len(answer.ids):
            raise not_finite(prompt.row, f"for token {prompt.first + bad} of the answer")


def _padded(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _once(config: GenerationConfig, is_padding: torch.Tensor) -> list[Any]:
    """Return `no_repeat_ngram` of *config* as a processor without padding."""
    size = config.no_repeat_ngram_size
    if not size:
        return []
    config.no_repeat_ngram_size = 0
    # no token is -1, so that no n-gram reaches into the padding; one token alone would be taken away by it
    return [Unpadded(NoRepeatNGramLogitsProcessor(size), is_padding, None if size == 1 else -1)]


def _generation_config(spec: Predict, model: Any, tokenizer: Any, pad: int) -> GenerationConfig:
    """Return how tokens are chosen.

    An encoder-decoder's own settings stay where the recipe is silent: the tokens that it must begin and end with, its
    beams, its n-grams. Lengths and drawing are the recipe's alone.
    """
    own = model.generation_config if model.generation_config is not None else GenerationConfig()
    base = own if model.config.is_encoder_decoder else GenerationConfig()
    found = copy.deepcopy(base)
    found.update(
        max_length=None,
        min_length=None,
        max_new_tokens=spec.max_new_tokens,
        min_new_tokens=None,  # of a row, see steps.Choice
        do_sample=False,  # drawing is done by a processor, see steps.Choice
        **dict.fromkeys(("temperature", "top_k", "top_p")),
        num_beams=spec.num_beams or (not spec.sample and not spec.keep_logprobs and base.num_beams) or 1,
        repetition_penalty=spec.repetition_penalty or base.repetition_penalty or 1.0,
        no_repeat_ngram_size=base.no_repeat_ngram_size or 0 if spec.no_repeat_ngram is None else spec.no_repeat_ngram,
        eos_token_id=[*end_ids(own.eos_token_id, tokenizer), *spec.stop_ids] or None,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=pad,
    )
    return found
