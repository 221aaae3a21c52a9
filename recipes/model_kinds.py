"""Say what kind of model a config describes, and how many tokens it takes.

Pure, and without transformers: planning asks it of every recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

ModelKind = Literal["decoder", "encoder-decoder", "encoder"]

# The model types of transformers that learn by filling gaps, as their masked language models are listed there, and two
# that see what follows a token though they are listed as causal: XLNet, and BertGeneration unless it is a decoder.
_ENCODERS = frozenset(
    """albert bert bert-generation big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra
    ernie esm eurobert flaubert fnet funnel gte ibert jina_embeddings_v3 layoutlm longformer luke megatron-bert
    mobilebert modernbert mpnet mra nomic_bert nystromformer perceiver rembert roberta roberta-prelayernorm
    roc_bert roformer splinter squeezebert tapas xlm xlnet xlm-roberta xlm-roberta-xl xmod yoso""".split()
)
# These two have their kind by their classes' default, which a config may leave out.
_ENCODER_DECODERS = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5 mvp
    nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5""".split()
)
# Their attention knows distances, not positions: n_positions in an old config is only what they were trained with.
_WITHOUT_POSITIONS = frozenset("t5 mt5 umt5 longt5 switch_transformers".split())
# Their first position is the one after the padding token's id, as fairseq counts.
_AFTER_PADDING = frozenset(
    """roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod camembert data2vec-text ibert longformer luke
    mpnet""".split()
)
# What configs call the longest sequence that a model can take.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
_POSITIONS_OF = {"encoder": "max_encoder_position_embeddings", "decoder": "max_decoder_position_embeddings"}


def kind_of(config: Mapping[str, Any]) -> ModelKind:
    """Return what kind of model *config* describes; an unknown one is a decoder."""
    model_type = config.get("model_type")
    if config.get("is_encoder_decoder") or model_type in _ENCODER_DECODERS:
        return "encoder-decoder"
    return "encoder" if model_type in _ENCODERS and not config.get("is_decoder") else "decoder"


def is_known(config: Mapping[str, Any]) -> bool:
    """Say whether the kind of a config's model is certain, and that it reads text."""
    return config.get("model_type") in _ENCODERS | _ENCODER_DECODERS


def overflows_in_float16(config: Mapping[str, Any]) -> bool:
    """Say whether it computes values beyond float16's range.

    T5 and its kin do, and MobileBERT.
    """
    return config.get("model_type") in (*_WITHOUT_POSITIONS, "mobilebert")


def fails_loaded_in_half(config: Mapping[str, Any]) -> bool:
    """Say whether it fails with weights that were loaded in half precision.

    FNet's Fourier transform knows neither bfloat16 nor most lengths in float16; MRA makes some of its values in
    float32 whatever is asked, as XLNet and the first DeBERTa make some of their weights (transformers 5.23).
    """
    return config.get("model_type") in ("fnet", "xlnet", "mra", "deberta")


def fails_cast_to_half(config: Mapping[str, Any]) -> bool:
    """Say whether it fails with all weights in half precision.

    So DeepSpeed has them. Inkling2 chooses its experts in float32, with weights that stay so where they are loaded
    (transformers 5.23).
    """
    return config.get("model_type") in ("fnet", "mra", "inkling2_text")


def fails_in_mixed_precision(config: Mapping[str, Any]) -> bool:
    """Say whether it fails where half precision and float32 are mixed.

    The first DeBERTa masks scores in half precision by a number of float32's range, and X-MOD puts what its adapters
    give among values of another dtype (transformers 5.23).
    """
    return config.get("model_type") in ("deberta", "xmod")


def is_unshardable(config: Mapping[str, Any]) -> bool:
    """Say whether it fails under ZeRO-3.

    Pegasus, RoFormer and RWKV compute values from the shape of a weight that is cut by then; the ranks of an LED
    gather other weights where one pads its texts and another need not (transformers 5.23).
    """
    return config.get("model_type") in ("pegasus", "roformer", "rwkv", "led")


def layer_drops(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a config that leave out layers at random (LayerDrop)."""
    return tuple(key for key in ("encoder_layerdrop", "decoder_layerdrop", "layerdrop") if config.get(key))


def reads_padding(config: Mapping[str, Any], max_tokens: int) -> bool:
    """Say whether a model mixes the padding of a batch into its texts.

    None of these has more than *max_tokens*. Whatever the mask says, FNet transforms all places together, the
    convolutions of ConvBERT and Nystromformer and MobileBERT's embeddings of three tokens reach into it, and YOSO
    attends to it, as CPM-Ant does, a decoder. The blocks of a BigBird, which long texts have, are counted from the end
    of the padding (transformers 5.23).
    """
    most_in_full = most_in_full_attention(config)
    if most_in_full is not None:
        return max_tokens > most_in_full
    return config.get("model_type") in ("fnet", "convbert", "nystromformer", "mobilebert", "yoso", "cpmant")


def most_in_full_attention(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a text has at most that a BigBird attends to in full.

    Of longer ones it attends to blocks. Return None for other models, and for one without blocks.
    """
    if config.get("model_type") not in ("big_bird", "bigbird_pegasus"):
        return None
    if config.get("attention_type", "block_sparse") != "block_sparse":
        return None
    most: int = (5 + 2 * config.get("num_random_blocks", 3)) * config.get("block_size", 64)
    return most


def mixes_beams(config: Mapping[str, Any]) -> bool:
    """Say whether beams of a model would continue from the states of others.

    What RecurrentGemma and MiniMax remember does not move with its beam, and is mixed up in silence; that of RWKV and
    xLSTM ends the search (transformers 5.23).
    """
    return config.get("model_type") in ("recurrent_gemma", "minimax", "rwkv", "xlstm")


def padding_side(config: Mapping[str, Any]) -> Literal["left", "right"]:
    """Return where the padding of a text stands that is classified.

    XLNet reads what a text is from its last place; the others from its first, or from the last token before padding.
    """
    return "left" if config.get("model_type") == "xlnet" else "right"


def max_positions(config: Mapping[str, Any], side: Literal["encoder", "decoder"] = "decoder") -> int | None:
    """Return how many tokens a model of this config can take.

    Of an encoder-decoder they are those of one *side*. Return None where it names no limit.
    """
    if config.get("model_type") in _WITHOUT_POSITIONS:
        return None
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, Mapping) else {}):
        for name in (_POSITIONS_OF[side], *_POSITIONS):
            value = section.get(name)
            if isinstance(value, int) and value > 0:
                padding = section.get("pad_token_id")
                is_after = section.get("model_type") in _AFTER_PADDING
                return value - 1 - (padding if isinstance(padding, int) else 1) if is_after else value
    return None
