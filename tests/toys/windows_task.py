"""A task of another package, the pure half: texts are cut into windows, so that a row gives several examples."""

from __future__ import annotations

from sousbatch.errors import Fault
from sousbatch.recipes.data.encode import Encoded
from sousbatch.recipes.tasks import Column, TaskSpec


def _faults(settings, uses):
    if settings.data.prompt:
        yield Fault(key="data.prompt", problem="has no meaning for windows", hint="set data.prompt=''")


def _encode(settings, use, rows, tokenizer, longest):
    found = []
    for text in (" ".join(row[settings.data.columns.text]) for row in rows):
        ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
        for start in range(0, len(ids), longest):
            window = ids[start : start + longest]
            found.append(Encoded(window, ((0, len(window)),), len(window), False, is_first=start == 0))
    return found


TASK = TaskSpec(
    name="windows",
    version=1,
    runtime="windows_runtime",
    model_class="AutoModelForCausalLM",
    peft_type="CAUSAL_LM",
    generates=False,
    decides=("data.columns.text", "data.max_tokens"),
    reads=("data",),
    fields=("num_windows",),
    metrics=("exact_match",),
    faults=_faults,
    columns=lambda settings, use: [
        Column(named_by="data.columns.text", name=settings.data.columns.text, may_nest=True)
    ],
    longest=lambda settings, use, config: settings.data.max_tokens,
    encode=_encode,
    refusals=lambda stage, inputs: iter(()),
    warnings=lambda stage, inputs: iter(()),
    outputs=lambda config: (config["vocab_size"], "words"),
    row_bytes=lambda settings: (100, "100 B"),
)
