"""From files and overrides to a recipe."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sousbatch.errors import NotFoundError, RecipeError, UsageError
from sousbatch.recipes.catalog import list_recipes
from sousbatch.recipes.compose import compose, values_of
from sousbatch.recipes.stages import resolve_stages, smoke, stages_of

BASE = "name: a\nmodel: {path: m}\ndata: {splits: {train: t.jsonl}}\n"


def _write(folder: Path, text: str, name: str = "a.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def _faults(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        compose(path, overrides)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("name", ["two words.yaml", "it's.yaml", 'a"b.yaml', "a\nb.yaml", "a=b,c.yaml", "리뷰.yaml"])
def test_a_recipe_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert compose(_write(tmp_path, BASE, name)).name == "a"


def test_a_recipe_is_called_as_its_file(tmp_path: Path) -> None:
    assert compose(_write(tmp_path, BASE.replace("name: a\n", ""), "my-own.yaml")).name == "my-own"


def test_a_file_name_that_is_no_name_is_answered_with_one(tmp_path: Path) -> None:
    (fault,) = _faults(_write(tmp_path, BASE.replace("name: a\n", ""), "My_own.yaml"))
    assert fault.endswith("such as name: my-own)")


def test_recipes_of_the_search_folders_hide_those_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOUSBATCH_RECIPES", f"{tmp_path}:{tmp_path}/none")
    path = _write(tmp_path, BASE + "description: mine\n", "hangul-restoration.yaml")
    assert [str(recipe.path) for recipe in list_recipes() if recipe.description == "mine"] == [path]
    assert compose("hangul-restoration").description == "mine"


@pytest.mark.parametrize(
    ("base", "stages", "left"),
    [
        ("", "{score: false}", ["train", "consolidate", "predict", "merge"]),
        ("stages: {predict: {}, merge: {}, score: {}}\n", "{score: false}", ["predict", "merge"]),
        ("stages: {predict: {}, merge: {}}\n", "{score: {}, merge: false}", ["predict", "score"]),
    ],
)
def test_a_recipe_drops_stages_of_the_one_that_it_starts_from(
    tmp_path: Path, base: str, stages: str, left: list[str]
) -> None:
    _write(tmp_path, BASE + base, "base.yaml")
    child = _write(tmp_path, f"defaults: [base, _self_]\nstages: {stages}\n", "child.yaml")
    assert list(values_of(child)[0]["stages"]) == left


def test_a_recipe_without_any_stage_left_is_refused(tmp_path: Path) -> None:
    none = "{train: false, consolidate: false, predict: false, merge: false, score: false}"
    assert _faults(_write(tmp_path, f"{BASE}stages: {none}\n"))[0].startswith("stages.train")


def test_a_recipe_that_cannot_be_read_is_still_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUSBATCH_RECIPES", str(tmp_path))
    _write(tmp_path, "a: [1\n", "broken.yaml")
    assert {recipe.name: recipe.description for recipe in list_recipes()}["broken"] == "cannot be read"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- 1\n", "it is a list; a recipe has keys"),
        ("a: [1\nb: 2", "line 2"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        (BASE + "seed: ${nothing}\n", "Interpolation key 'nothing' not found"),
        ("defaults: [adapter: nope]\n" + BASE, "nothing is called 'adapter/nope'"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        compose(path)
    assert path in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_without_a_file_says_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=f"looked in {tmp_path}"):
        compose(str(tmp_path / "none.yaml"))


def test_the_nearest_recipe_is_named() -> None:
    with pytest.raises(NotFoundError, match="did you mean 'hangul-restoration'"):
        compose("hangul-restauration")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("+seed=3", ("seed",), 3),
        ("train.learning_rate=1e-4", ("train", "learning_rate"), 1e-4),
        ("train.eval_split=null", ("train", "eval_split"), None),
        ("tracking.tags=[a,b]", ("tracking", "tags"), ("a", "b")),
        ("data.prompt='Q: {input}'", ("data", "prompt"), "Q: {input}"),
        ("model.config.hidden_size=64", ("model", "config"), {"hidden_size": 64}),
        ("adapter=lora", ("adapter", "method"), "lora"),
        ("train.steps=${checkpoints.every_steps}", ("train", "steps"), 7),
    ],
)  # fmt: skip
def test_an_override_is_laid_over_the_file(tmp_path: Path, override: str, key: tuple[str, ...], value: object) -> None:
    found: object = compose(_write(tmp_path, BASE + "checkpoints: {every_steps: 7}\n"), [override])
    for name in key:
        found = getattr(found, name)
    assert found == value


def test_a_reference_sees_what_was_overridden(tmp_path: Path) -> None:
    path = _write(tmp_path, BASE + "train: {steps: 5}\ncheckpoints: {every_steps: '${train.steps}'}\n")
    assert compose(path, ["train.steps=9"]).checkpoints.every_steps == 9


def test_epochs_hold_once_steps_are_taken_away(tmp_path: Path) -> None:
    path = _write(tmp_path, BASE + "train: {steps: 5}\n")
    assert compose(path, ["train.epochs=2", "train.steps=null"]).train.steps is None


def test_a_value_is_taken_away_with_a_tilde(tmp_path: Path) -> None:
    assert compose(_write(tmp_path, BASE + "train: {steps: 5}\n"), ["~train.steps"]).train.steps is None


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("seed", "seed is not an override"),
        ("data.prompt={input}", "quotes around a value with braces"),
        (r"data.prompt={a}\n{b}", r"""'data.prompt="{a}\n{b}"'"""),
        ("seed=1,2", "seed=1,2 has several values (a list is written [a,b])"),
        ("adapter=loar", "adapter=loar is unknown; known: full, lora, qlora (did you mean 'lora'?)"),
        ("seed.more=1", "seed.more=1 goes too deep (seed is 5, which has no keys)"),
        ("~train.stesp", "~train.stesp takes away what the recipe does not give"),
        ("train.stesp=1", "train.stesp is not a key (did you mean 'steps'?)"),
        (
            "train.epochs=2",
            "train.epochs=2 has no effect: the recipe gives train.steps=5, which wins (add train.steps=",
        ),
    ],
)
def test_a_wrong_override_is_a_fault(tmp_path: Path, override: str, fault: str) -> None:
    (found,) = _faults(_write(tmp_path, BASE + "seed: 5\ntrain: {steps: 5}\n"), override)
    assert fault in found


def test_faults_of_file_and_overrides_come_together(tmp_path: Path) -> None:
    assert len(_faults(_write(tmp_path, BASE + "trian: 1\n"), "seed=1,2", "adapter=loar", "train.lr=1")) == 4


SOUND = {
    "no model": ("model: {path: ''}", "model.path is missing"),
    "no data": ("data: {splits: {}}", "data.splits is missing"),
    "code folders of one name": ("environment: {code: [a/src, b/src/]}", "environment.code has 2 folders called 'src'"),
    "a variable that W&B gets from the recipe": (
        "environment: {variables: {WANDB_MODE: online}}",
        "has WANDB_MODE, which the job sets by the recipe's own key (leave it out, and set tracking.mode)",
    ),
    "code folder without a name": ("environment: {code: [..]}", "give the folder by its name"),
    "a name that leads out of the runs": ("name: ../../x", "name is '../../x'"),
    "a stage that leads out of its run": ("stages: {../x: {kind: train}}", "stages.../x is no name for a stage"),
    "unclosed prompt": ("data: {prompt: 'Q {input'}", "data.prompt is 'Q {input'"),
    "prompt with a position": ("data: {prompt: '{0}'}", "{0} is not the name of a column"),
    "prompt with an attribute": ("data: {prompt: '{a.b}'}", "{a.b} is not the name of a column"),
    "prompt with a width": ("data: {prompt: '{input!r:>9}'}", "{input!r:>9} is not the name of a column"),
    "prompt that holds the answer": ("data: {prompt: '{input} {target}'}", "data.prompt reads the target column"),
    "restarts without a period": ("train: {schedule: {name: cosine_restarts}}", "schedule cosine_restarts needs it"),
    "patience without a split": ("train: {patience: 3, eval_split: null}", "train.patience needs train.eval_split"),
    "an unknown metric": (
        "checkpoints: {metric: rouge9}",
        "checkpoints.metric is 'rouge9'; known: loss, eval_loss, character_accuracy",
    ),
    "a metric without a split": (
        "checkpoints: {metric: rougeL}\ntrain: {eval_split: null}",
        "checkpoints.metric is 'rougeL', and there is no train.eval_split to answer",
    ),
    "an own metric without a goal": (
        "checkpoints: {metric: 'mine:METRIC'}",
        "checkpoints.goal is missing, and checkpoints.metric is own code, 'mine:METRIC' (set checkpoints.goal=highest",
    ),
    "the highest loss as the best": (
        "checkpoints: {goal: highest}",
        "checkpoints.goal is highest, and the best eval_loss is the lowest (leave it out:",
    ),
    "the lowest ROUGE as the best": (
        "checkpoints: {metric: rougeL, goal: lowest}",
        "checkpoints.goal is lowest, and the best rougeL is the highest (leave it out:",
    ),
    "a metric without a prompt": (
        "data: {prompt: '', splits: {train: a}}\ncheckpoints: {metric: rougeL}\nstages: {train: {}}",
        "data.prompt is empty, so there are no answers to measure rougeL of (write a template, or set check",
    ),
    "shortest above longest": ("predict: {min_new_tokens: 9, max_new_tokens: 8}", "above max_new_tokens 8"),
    "sampling beams": ("predict: {sample: true, num_beams: 4}", "draw tokens or search beams"),
    "answers for another task": ("question_answering: {n_best: 3}", "has no meaning for task causal_lm"),
    "a template of a question": (
        "data: {prompt: '{a}'}\ntask: question_answering",
        "data.prompt has no meaning for task",
    ),
    "two limits of one text": (
        "data: {max_target_tokens: 9}",
        "data.max_target_tokens has no meaning for task causal_lm",
    ),
    "resources of no stage": ("resources: {tran: {nodes: 2}}", "resources.tran is no stage and no kind; known: train"),
    "stage without a kind": ("stages: {tune: {}}", "stages.tune.kind is missing; known: train, consolidate"),
    "stage that is no name": ("stages: {Tune: {kind: train}}", "stages.Tune is no name for a stage"),
    "stage on nothing": ("stages: {merge: {}}", "stages.merge has no predict stage above it"),
    "stage on a wrong one": ("stages: {train: {}, c: {kind: consolidate, of: trian}}", "(did you mean 'train'?)"),
    "unknown key in set": ("stages: {train: {set: {train: {stesp: 1}}}}", "stages.train.set.train.stesp is not a key"),
    "shared key in set": ("stages: {train: {set: {model: {path: x}}}}", "set.model.path is one for the whole run"),
    "shared section in set": ("stages: {train: {set: {resources: {}}}}", "set.resources is one for the whole run"),
    "unread section in set": (
        "stages: {predict: {set: {train: {steps: 1}}}}",
        "stages.predict.set.train does nothing: a predict stage reads model, data, predict",
    ),
    "no section in set": ("stages: {train: {set: {model: 5}}}", "stages.train.set.model is 5 (a section of keys"),
    "unsound set": (
        "stages: {predict: {set: {predict: {sample: true, num_beams: 2}}}}",
        "stages.predict.set.predict.num_beams",
    ),
}


@pytest.mark.parametrize(("text", "fault"), SOUND.values(), ids=SOUND)
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    section = text.split(":")[0]
    kept = "".join(line + "\n" for line in BASE.splitlines() if not line.startswith(section))
    if section == "data" and "splits" not in text:
        text = text.replace("data: {", "data: {splits: {train: t.jsonl}, ")
    (found,) = _faults(_write(tmp_path, kept + text + "\n"))
    assert fault in found


def test_a_fault_in_what_a_stage_sets_hides_none_in_the_resources(tmp_path: Path) -> None:
    text = "stages: {train: {set: {train: {stesp: 1}}}}\nresources: {tran: {nodes: 2}}\n"
    assert len(_faults(_write(tmp_path, BASE + text))) == 2


STAGES = """\
stages:
  train: {}
  consolidate: {}
  predict: {}
  predict-other: {kind: predict, set: {predict: {split: other}}}
"""


def test_a_stage_sees_its_own_values_and_others_do_not(tmp_path: Path) -> None:
    recipe = compose(_write(tmp_path, BASE + STAGES), ["predict.rows=5"])
    found = {name: stage.settings.predict for name, stage in resolve_stages(recipe).items() if "predict" in name}
    assert {name: (predict.split, predict.rows) for name, predict in found.items()} == {
        "predict": ("test", 5),
        "predict-other": ("other", 5),
    }


def test_an_override_reaches_into_the_set_of_a_stage(tmp_path: Path) -> None:
    recipe = compose(_write(tmp_path, BASE + STAGES), ["stages.predict-other.set.predict.split=third"])
    assert resolve_stages(recipe)["predict-other"].settings.predict.split == "third"


def test_an_override_of_a_usual_stage_leaves_the_others(tmp_path: Path) -> None:
    recipe = compose(_write(tmp_path, BASE), ["stages.predict.set.predict.rows=5"])
    assert list(stages_of(recipe)) == ["train", "consolidate", "predict", "merge", "score"]


def test_a_usual_stage_can_be_taken_away(tmp_path: Path) -> None:
    assert list(compose(_write(tmp_path, BASE), ["~stages.score"]).stages) == [
        "train",
        "consolidate",
        "predict",
        "merge",
    ]


def test_resources_are_laid_over_those_of_the_kind_and_the_default(tmp_path: Path) -> None:
    text = "resources: {predict-other: {cpus_per_device: 2}, predict: {tasks: 3}, default: {device: cpu}}\n"
    recipe = compose(_write(tmp_path, BASE + STAGES + text))
    found = {name: stage.resources for name, stage in resolve_stages(recipe).items()}
    wanted = found["predict-other"]
    assert (wanted.device, wanted.tasks, wanted.cpus_per_device) == ("cpu", 3, 2)
    assert (found["predict"].tasks, found["train"].device) == (3, "cpu")


def test_a_smoke_run_is_short_in_every_stage(tmp_path: Path) -> None:
    text = BASE + "stages: {train: {set: {train: {steps: 500}}}, consolidate: {}, predict: {}}\n"
    recipe = smoke(compose(_write(tmp_path, text)))
    stages = resolve_stages(recipe)
    assert [stage.settings.train.steps for stage in stages.values()] == [2, 2, 2]
    assert stages["predict"].settings.predict.rows == 8


def test_the_users_site_defaults_lie_under_every_recipe(tmp_path: Path) -> None:
    Path(os.environ["SOUSBATCH_CONFIG"]).write_text(
        "resources: {default: {account: lab7, partition: gpu, cpus_per_device: 8}}\n"
        "environment: {setup: [module load cuda]}\n"
    )
    recipe = compose("hangul-restoration", ["resources.default.partition=other"])
    default = recipe.resources["default"]
    assert (default.account, default.partition, default.cpus_per_device) == ("lab7", "other", 8)
    assert default.device == "cpu", "the recipe's own values stay"
    assert recipe.environment.setup == ("module load cuda",)


def test_site_defaults_have_nothing_of_what_is_computed() -> None:
    path = os.environ["SOUSBATCH_CONFIG"]
    Path(path).write_text("train: {steps: 1}\n")
    with pytest.raises(RecipeError, match="has train .it can have the sections resources, environment, tracking"):
        compose("hangul-restoration")
    Path(path).write_text("resources: [\n")
    with pytest.raises(UsageError, match="cannot be read"):
        compose("hangul-restoration")


UNREADABLE = {
    "a list": ("- task: causal_lm\n", "it is a list; a recipe has keys"),
    "an unknown base": ("defaults: [hangul-restoraton]\n", "which its defaults list names .*'hangul-restoration'"),
    "an unknown file of a group": (
        "defaults: [hangul-restoration, {schedule: cosin}]\n",
        "'schedule/cosin', which its",
    ),
    "an unknown group": ("defaults: [hangul-restoration, {nope: x}]\n", "`sousbatch recipes list`"),
}


@pytest.mark.parametrize(("text", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_no_recipe_can_begin_with_is_told_in_words_of_recipes(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        compose(str(tmp_path / "mine.yaml"))


def test_a_folder_called_like_a_recipe_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(NotFoundError, match="is a folder"):
        compose(str(tmp_path / "mine.yaml"))


PASSWORD = "sesame-1234"
SECRETS = {
    "a secret's value": ("environment.variables.NOTE=ghp_" + "0123456789abcdefghij", "environment.variables.NOTE"),
    "a secret's name": (f"environment.variables.OPENAI_KEY={PASSWORD}", "environment.variables.OPENAI_KEY"),
    "a number": ("environment.variables.DB_PASSWORD=12340123456789", "environment.variables.DB_PASSWORD"),
    "a variable of this shell": ('environment.variables={A: "${oc.env:HF_TOKEN}"}', "environment.variables.A"),
    "anywhere": ("description=${oc.env:HF_TOKEN}", "description"),
    "a line of set-up": (f"environment.setup=['export API_KEY={PASSWORD}']", "environment.setup.0"),
    "a model": (f"model.path='https://anna:{PASSWORD}@example.org/model'", "model.path"),
    "a split": (f"data.splits.train='https://anna:{PASSWORD}@example.org/t.jsonl'", "data.splits.train"),
    "an archive": (f"checkpoints.archive_url='sftp://anna:{PASSWORD}@example.org/a'", "checkpoints.archive_url"),
    "W&B": ("tracking.entity='" + "0123456789" * 4 + "'", "tracking.entity"),
    "a stage": (
        f"+stages={{train: {{set: {{data: {{prompt: 'x://a:{PASSWORD}@b'}}}}}}}}".removeprefix("+"),
        "stages.train.set.data.prompt",
    ),
}


@pytest.mark.parametrize(("override", "key"), SECRETS.values(), ids=SECRETS)
def test_a_recipe_that_holds_a_secret_is_refused_by_its_key_and_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", PASSWORD)
    with pytest.raises(RecipeError) as caught:
        compose(_write(tmp_path, BASE), [override])
    assert any(fault.key == key and "secret" in fault.problem and fault.hint for fault in caught.value.faults)
    assert not any(part in str(caught.value) for part in (PASSWORD, "0123456789"))


def test_set_up_lines_and_variables_that_name_no_secret_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_TOKENS", "512")
    lines = "setup: ['export HF_TOKEN=$(cat ~/.token)', 'export KEY=$KEY', module load cuda/12.1]"
    variables = 'variables: {MAX_TOKENS: "${oc.env:MAX_TOKENS}", HTTPS_PROXY: "http://proxy:3128"}'
    recipe = compose(_write(tmp_path, BASE + f"environment:\n  {lines}\n  {variables}\n"))
    assert recipe.environment.variables["MAX_TOKENS"] == "512"


def _bomb() -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
    return "\n".join(lines) + "\n"


_HOSTILE = {
    "aliases of aliases": _bomb(),
    "an alias of itself": "a: &a {b: *a}\n",
    "deep": "a: " + "[" * 300_000 + "]" * 300_000 + "\n",
    "deep by aliases": "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 500)),
}


@pytest.mark.parametrize("text", _HOSTILE.values(), ids=_HOSTILE)
@pytest.mark.parametrize("place", ["recipe", "group", "config"])
def test_a_hostile_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, place: str
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text if place == "recipe" else "defaults: [{train: big}, _self_]\n")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "big.yaml").write_text(text if place == "group" else "steps: 1\n")
    (tmp_path / "config.yaml").write_text("resources: {}\n" + text if place == "config" else "resources: {}\n")
    began = time.monotonic()
    with pytest.raises(UsageError, match="is too large: with its aliases written out"):
        compose(str(recipe))
    assert time.monotonic() - began < 5
    if place == "recipe":
        monkeypatch.setenv("SOUSBATCH_RECIPES", str(tmp_path))
        assert {one.path: one.description for one in list_recipes()}[recipe] == "cannot be read"


def test_aliases_within_reason_are_taken(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {path: &here /m}\ndata: {splits: {train: *here, a: *here}}\n")
    assert compose(str(tmp_path / "mine.yaml")).data.splits == {"train": "/m", "a": "/m"}


@pytest.mark.parametrize("other", ["mine", "two"])
def test_files_that_name_each_other_are_refused(tmp_path: Path, other: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"defaults: [{other}, _self_]\n")
    (tmp_path / "two.yaml").write_text("defaults: [mine, _self_]\n")
    with pytest.raises(UsageError, match="files of its defaults list name each other in a circle"):
        compose(str(tmp_path / "mine.yaml"))


def test_an_unknown_metric_is_named_with_all_other_faults_and_also_in_the_set_of_a_stage(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as found:
        compose(_write(tmp_path, BASE), ["score.metrics=[crr]", "tracking.trackers=[[1]]", "trian=1"])
    assert "trian is not a key" in str(found.value) and "tracking.trackers.0 is [1]" in str(found.value)
    assert "score.metrics.0 is 'crr'; known: character_accuracy, cer" in str(found.value)
    with pytest.raises(RecipeError, match=r"stages.score.set.score.metrics.0 is 'crr'; known: "):
        compose(_write(tmp_path, BASE), ["stages.score.set={score: {metrics: [crr]}}"])
