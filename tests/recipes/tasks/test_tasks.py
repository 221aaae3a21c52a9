"""Every task passes the same contract, that of another package too."""

from __future__ import annotations

import dataclasses
import json
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest

from sousbatch.cluster.site import Site
from sousbatch.errors import PlanError, RecipeError, UsageError
from sousbatch.plugins import Registry
from sousbatch.predictions.metrics import METRICS
from sousbatch.recipes import tasks
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.inputs import inspect
from sousbatch.recipes.plan import Plan
from sousbatch.recipes.schema import StageSettings
from sousbatch.recipes.stage_kinds import STAGE_KINDS, RowUse
from sousbatch.recipes.tasks import TASKS, Column, task_of

SITE = Site(name="here", launcher="local", cpus_per_node=2, memory_bytes=10**10, gpus_per_node=0, gpu_memory_bytes=0)
WINDOWS = ["./small.yaml", "task=windows", "data.prompt=''", "data.max_tokens=8"]


@pytest.mark.parametrize("name", [*TASKS, "windows"])
@pytest.mark.usefixtures("windows")
class TestEveryTask:
    """What holds for every task."""

    def test_it_reads_and_decides_by_settings_that_there_are(self, name: str) -> None:
        task, settings = task_of(name), StageSettings()
        for key in (*task.decides, *task.reads):
            attrgetter(key)(settings)

    def test_it_names_the_columns_of_every_use(self, name: str) -> None:
        for use in get_args(RowUse):
            columns = task_of(name).columns(StageSettings(), use)
            assert columns and all(isinstance(column, Column) for column in columns)
            for column in columns:
                assert attrgetter(column.named_by)(StageSettings()) == column.name or column.named_by == "data.prompt"

    def test_its_faults_name_keys_that_there_are(self, name: str) -> None:
        for kind in STAGE_KINDS.values():
            for prompt in ("", "{input}", "{broken"):
                settings = StageSettings(data=dataclasses.replace(StageSettings().data, prompt=prompt))
                for fault in task_of(name).faults(settings, kind.rows):
                    attrgetter(fault.key)(settings)

    def test_its_sizes_have_a_formula(self, name: str) -> None:
        task = task_of(name)
        num_bytes, formula = task.row_bytes(StageSettings())
        assert num_bytes > 0 and "B" in formula
        assert task.outputs({"vocab_size": 32})[0] > 0


def _plan(*words: str) -> Plan:
    recipe = compose(words[0], words[1:])
    return compile(recipe, SITE, inspect(recipe, Path.cwd()))


def _write_texts(folder: Path) -> None:
    for split, num_rows in (("train", 4), ("validation", 2), ("test", 2)):
        row = {"text": ["one two three four five", "six seven eight nine ten"]}  # two windows of 8 tokens
        (folder / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * num_rows)


@pytest.mark.usefixtures("windows")
def test_a_task_of_another_package_is_planned_by_its_examples(project: Path) -> None:
    _write_texts(project)
    plan = _plan(*WINDOWS, "+stages={train: {}, consolidate: {}, predict: {}, merge: {}}")
    train = plan.stage("train")
    assert (train.splits["train"].num_rows, train.splits["train"].num_examples) == (4, 8)
    assert train.batch is not None and train.batch.steps_per_epoch == 2  # 8 examples, 4 a step
    assert plan.stage("predict").splits["predict"].num_rows == 2


@pytest.mark.usefixtures("windows")
def test_a_task_of_another_package_refuses_in_its_own_words(project: Path) -> None:
    with pytest.raises(RecipeError, match="data.prompt has no meaning for windows"):
        compose("./small.yaml", ["task=windows"])
    with pytest.raises(PlanError, match="no column 'text'"):
        _plan(*WINDOWS)


def test_the_name_of_a_task_is_checked_when_a_recipe_is_composed(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"task is 'causal'; known: causal_lm, .* \(did you mean 'causal_lm'\?\)"):
        compose("./small.yaml", ["task=causal"])


def test_a_run_has_one_task(project: Path) -> None:
    with pytest.raises(RecipeError, match="stages.predict.set.task is one for the whole run"):
        compose("./small.yaml", ["+stages={predict: {set: {task: causal_lm}}}"])


def test_what_is_no_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Registry("task", "sousbatch.tasks", {"other": "recipes.tasks.causal_lm:TASK"})
    monkeypatch.setattr(tasks, "TASKS", other)
    with pytest.raises(UsageError, match="installed as task 'other' is not a TaskSpec of that name"):
        task_of("other")


@pytest.mark.usefixtures("windows")
def test_what_is_measured_follows_the_task(project: Path) -> None:
    _write_texts(project)
    stages = "+stages={train: {}, consolidate: {}, predict: {}, merge: {}, score: {}}"
    assert _plan(*WINDOWS, stages).stage("score").settings.score.metrics == ("exact_match",)
    assert _plan(*WINDOWS, stages, "score.metrics=[cer]").stage("score").settings.score.metrics == ("cer",)


def test_a_metric_that_needs_what_the_task_does_not_answer_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = dataclasses.replace(METRICS.load("cer"), fields=("probabilities",))
    monkeypatch.setattr(METRICS, "load", lambda name: needs)
    with pytest.raises(RecipeError, match="score.metrics.0 is 'rouge1', which needs probabilities in each prediction"):
        compose("./small.yaml", ["score.metrics=[rouge1]"])


def test_a_task_that_names_a_setting_which_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(task_of("causal_lm"), decides=("data.colums.input",))
    monkeypatch.setattr("sousbatch.recipes.tasks.causal_lm.TASK", wrong)
    with pytest.raises(UsageError, match="task 'causal_lm' names the setting 'data.colums.input', which no recipe has"):
        task_of("causal_lm")


SEQ2SEQ = ["./small.yaml", "task=seq2seq", "model.path=library:tiny-bart", "model.tokenizer=library:tiny-llama"]
SEQ2SEQ += ["model.from_scratch=true", "data.max_target_tokens=16"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.prompt=chat", "data.prompt is chat, and models of task seq2seq have no turns of a conversation"),
        ("data.prompt=''", "data.prompt is empty, so task seq2seq has nothing to read"),
        ("data.separator='='", "data.separator has no meaning for task seq2seq"),
        ("data.pad_input_to=8", "data.pad_input_to has no meaning for task seq2seq"),
    ],
)
def test_keys_without_a_meaning_for_an_encoder_decoder_are_refused(override: str, said: str, project: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        compose(SEQ2SEQ[0], [*SEQ2SEQ[1:], override])


def _write_pairs(folder: Path, source: str, target: str) -> None:
    for split in ("train", "validation", "test"):
        rows = [{"input": "짧다", "target": "네"}, {"input": source, "target": target}]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_sources_and_targets_each_have_their_limit(project: Path) -> None:
    _write_pairs(project, "가" * 40, "나" * 20)
    with pytest.raises(PlanError) as error:
        _plan(*SEQ2SEQ)
    train = next(reason for reason in error.value.reasons if "split 'train'" in reason)
    assert "1 of 2 rows (row 2) are longer than data.max_tokens=32 or data.max_target_tokens=16" in train
    assert "data.long_rows=drop, data.long_rows=cut_left or data.long_rows=cut_right" in train
    assert any("split 'test'" in reason and "drop" not in reason for reason in error.value.reasons)
    plan = _plan(*SEQ2SEQ, "data.long_rows=cut_right")
    assert any("longer than data.max_tokens=32 or data.max_target_tokens=16, and are cut" in w for w in plan.warnings)


def test_a_model_of_few_positions_limits_sources_targets_and_answers(project: Path) -> None:
    _write_pairs(project, "가" * 40, "나" * 20)
    few = ["+model.config.max_position_embeddings=16", "data.max_tokens=64", "data.max_target_tokens=64"]
    with pytest.raises(PlanError) as error:
        _plan(*SEQ2SEQ, *few)
    said = "\n".join(error.value.reasons)
    assert "set data.max_tokens=16 and data.long_rows" in said and "set data.max_target_tokens=16 and" in said
    assert "set predict.max_new_tokens=15" in said


def test_a_t5_becomes_a_bfloat16_model(project: Path) -> None:
    _write_pairs(project, "가", "나")
    config = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config |= {"vocab_size": 32, "is_encoder_decoder": True, "decoder_start_token_id": 0}
    (project / "model" / "config.json").write_text(json.dumps(config))
    t5 = ["./small.yaml", "task=seq2seq", "model.from_scratch=true"]
    assert _plan(*t5).recipe.consolidate.dtype == "bfloat16"
    warnings = _plan(*t5, "consolidate.dtype=float16").warnings
    assert any("consolidate.dtype=float16 for a t5 model" in warning for warning in warnings)
