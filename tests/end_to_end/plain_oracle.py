"""Compare a run with the same recipe done by plain torch, transformers and peft: `differences(run)`.

What these cannot follow step by step is drawn out of the recipe before (`followed`): noise, halves, quantised bases.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_predictions as predictions
import plain_training as training
import torch
import transformers
from plain_rows import Example, Reader, Row, namespace
from safetensors.torch import load_file

_LEFT_OUT = (
    *(
        "adapter.dropout",
        "train.neftune_alpha",
        "train.precision",
        "train.master_weights",
        "train.optimizer=adamw_8bit",
    ),
    *("train.optimizer=paged", "predict.load_in", "predict.sample", "predict.temperature", "predict.top_"),
    *("adapter.method=qlora", "predict.decodings={one"),
)
# Adam's first steps are signs of gradients; with so large an epsilon rounding does not turn them.
_ALWAYS = ["train.precision=float32", "train.epsilon=1e-4"]


def followed(request: dict[str, Any]) -> None:
    """Take out of a recipe, and of the model's config, what plain torch cannot follow."""
    kept = [one for one in request["overrides"] if not one.startswith(_LEFT_OUT)]
    request["overrides"] = [*_ALWAYS, *kept]

    def without_noise(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        is_noise = {name: ("drop" in name or name.endswith("jitter_noise")) for name in value}
        noise = {name: type(one)(0) for name, one in value.items() if is_noise[name] and type(one) in (int, float)}
        return {name: without_noise(one) for name, one in value.items()} | noise

    path = Path("model/config.json")
    path.write_text(json.dumps(without_noise(json.loads(path.read_text()))))


class Differences(list[str]):
    """What differs, a line each."""

    def expect(self, what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            self.append(f"{what}: {str(found)[:400]}, and plainly {str(wanted)[:400]}")

    def expect_close(self, what: str, found: float, wanted: float, rel: float, least: float) -> None:
        if not math.isclose(found, wanted, rel_tol=rel, abs_tol=least):
            self.append(f"{what}: {found}, and plainly {wanted}")


class Oracle:
    """A run beside the same recipe in plain torch."""

    def __init__(self, run: Path) -> None:
        torch.manual_seed(0)
        self.run, self.found = run, Differences()
        plan = json.loads((run / "plan.json").read_text())
        self.stages = {stage["name"]: namespace(stage) for stage in plan["stages"]}
        self.train = self.stages["train"]
        self.settings = settings = self.train.settings
        tokenizer = transformers.AutoTokenizer.from_pretrained("model")
        tokenizer.add_tokens(settings.model.add_tokens)
        reader = Reader(settings=settings, tokenizer=tokenizer)
        self.rows = self._selected(reader.rows("train"))
        labels = {reader.target(row).strip() for row in self.rows} if settings.task == "classification" else set()
        self.reader = Reader(settings=settings, tokenizer=tokenizer, labels=sorted(labels, key=_label_order))
        self.logged: dict[int, dict[str, float]] = {}
        self.noisy: set[str] = set()  # weights whose gradient is rounding alone, by which Adafactor moves them
        for path in sorted((run / "ledger").glob("job.train-*")):
            for event in map(json.loads, path.read_text().splitlines()):
                if event["kind"] == "step":
                    self.logged.setdefault(event["step"], {}).update(event)

    def differences(self) -> list[str]:
        steps = self._examples_of_steps()
        if not self.found:  # else nothing that follows can be equal
            model = self._model()
        if not self.found:
            self._train(model, steps)
            self._choose(max(steps) + 1)
            self._consolidate(model)
            self._predict()
        return self.found

    def _selected(self, rows: list[Row]) -> list[Row]:
        """Return the rows that the run selected, which must be so many of ours, in our order."""
        select = self.settings.data.select
        if select is None:
            return rows
        chosen = [*map(json.loads, Path(self.train.splits["train"].path).read_text().splitlines())]
        if select.sample and not select.bm25:
            self.found.expect("rows of the sample", len(chosen), min(select.sample, len(rows)))
        left = iter(rows)
        keys = [json.dumps(row, sort_keys=True) for row in left]
        places = [keys.index(json.dumps(row, sort_keys=True)) for row in chosen]
        self.found.expect("places of the selected rows", places, sorted({*places}))
        return [rows[place] for place in places]

    # Training

    def _examples_of_steps(self) -> dict[int, list[Example]]:
        """Return which of our examples each step took; each must be one of them, and every epoch have each."""
        settings, batch = self.settings, self.train.batch
        is_packed = settings.data.packing == "rows"
        self.examples = examples = self.reader.examples(self.rows, is_packed=is_packed)
        recorded = training.recorded_steps(settings.task)
        known = {training.key_of(example): place for place, example in enumerate(examples)}
        steps: dict[int, list[int]] = {}
        for step, taken in recorded.items():
            unknown = [example for example, _ in taken if training.key_of(example) not in known]
            if unknown:
                self.found.expect(f"an example of step {step}", unknown[0], examples[:3])
                return {}
            steps[step] = [known[training.key_of(example)] for example, _ in taken]
            wanted = training.rate_at(settings, step, batch.steps, batch.steps_per_epoch)
            for _, rate in taken:
                self.found.expect_close(f"rate of step {step}", rate, wanted, 1e-6, 1e-12)
        if not is_packed:
            wanted = math.ceil(len(examples) / settings.train.global_batch)
            self.found.expect("steps of an epoch", batch.steps_per_epoch, wanted)
            self._expect_epochs(steps)
        whole = settings.train.steps or max(1, math.ceil(settings.train.epochs * batch.steps_per_epoch))
        self.found.expect("steps", batch.steps, whole)
        return {step: [examples[place] for place in places] for step, places in steps.items()}

    def _expect_epochs(self, steps: Mapping[int, Sequence[int]]) -> None:
        batch = self.train.batch
        together = batch.world_size * batch.micro_batch
        keys = [training.key_of(example) for example in self.examples]
        for first in range(0, len(steps), batch.steps_per_epoch):
            numbers = range(first, first + batch.steps_per_epoch)
            seen = Counter(keys[place] for step in numbers for place in steps.get(step, ()))
            again = seen - Counter(keys)  # they fill up the last micro batches
            is_whole = all(step in steps for step in numbers)
            filled = -len(keys) % together if is_whole else 0
            self.found.expect(f"rows that come again in the epoch of step {first}", again.total(), filled)
            if is_whole:
                self.found.expect(f"rows that the epoch of step {first} lacks", (Counter(keys) - seen).total(), 0)

    def _model(self) -> Any:
        settings, first = self.settings, torch.load("train-first.pt")
        model, new = training.base_model(settings, self.reader.labels)
        old = model.get_input_embeddings().weight.shape[0]
        model = training.prepared(settings, model, self.reader.tokenizer, first["trained"])
        trained = sorted(name for name, weight in model.named_parameters() if weight.requires_grad)
        unequal = sorted({*first["trained"]} ^ {*trained})
        self.found.expect("what trains on one side alone", unequal, [])
        other = training.take_values(model, first["values"])
        if not settings.model.from_scratch:
            size = len(self.reader.tokenizer)
            if size > old:
                new |= {name for name, weight in model.named_parameters() if weight.shape[0] == size}
            marks = ("lora_", "trainable_tokens", "modules_to_save")
            names = {name: name.removeprefix("base_model.model.").replace(".original_module", "") for name in other}
            wrong = [name for name in other if not {name, names[name]} & new and not any(one in name for one in marks)]
            self.found.expect("weights that are not the base's", wrong, [])
        return model

    def _train(self, model: Any, steps: Mapping[int, Sequence[Example]]) -> None:
        settings, batch = self.settings, self.train.batch
        optimizer, losses = training.optimizer_of(settings, model), list[float]()
        weights = training.class_weights(settings, self.reader.labels, self.examples)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        options = {"smoothing": settings.train.label_smoothing, "weights": weights}
        for step, examples in steps.items():
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = training.rate_at(settings, step, batch.steps, batch.steps_per_epoch)
            optimizer.zero_grad()
            parts = [training.loss_of(model, settings.task, example, **options) for example in examples]
            loss = sum(total for total, _ in parts) / sum(count for _, count in parts)
            loss.backward()
            losses.append(float(loss.detach()))
            norm = torch.nn.utils.clip_grad_norm_(trained, settings.train.max_grad_norm or math.inf)
            self.noisy |= {name for name, weight in model.named_parameters() if _is_noise(weight.grad)}
            optimizer.step()
            told = self.logged.get(step + 1, {})
            if "loss" in told:
                self.found.expect_close(f"loss {step + 1}", told["loss"], sum(losses) / len(losses), 2e-4, 2e-5)
                self.found.expect_close(f"norm {step + 1}", told["grad_norm"], float(norm), 2e-3, 1e-4)
                losses.clear()
            self._measure(model, step + 1, weights)
            self._compare_weights(model, step + 1)

    def _measure(self, model: Any, step: int, weights: Any) -> None:
        told, train = self.logged.get(step, {}), self.settings.train
        if "eval_loss" not in told:
            return
        model.eval()
        rows = self.reader.rows(train.eval_split)[: train.eval_rows]
        with torch.no_grad():
            parts = [
                training.loss_of(model, self.settings.task, example, weights=weights)
                for example in self.reader.examples(rows)
            ]
        loss = float(sum(total for total, _ in parts)) / sum(count for _, count in parts)
        self.found.expect_close(f"eval_loss {step}", told["eval_loss"], loss, 5e-4, 5e-5)
        metric = self.settings.checkpoints.metric
        if f"eval_{metric}" in told and metric not in ("loss", "eval_loss"):
            rows = rows[: train.metric_rows]
            made = [predictions.answer(model, self.reader, row, self.settings.predict) for row in rows]
            self._expect_scores(
                f"eval_ {step}",
                {metric: told[f"eval_{metric}"]},
                rows,
                [_text(one, self.settings.predict.post) for one in made],
            )

    def _compare_weights(self, model: Any, step: int) -> None:
        if not (path := Path(f"train-{step}.pt")).exists():
            return
        saved, mine = torch.load(path), dict(model.named_parameters())
        moved, off = self.settings.train.learning_rate * step, []
        for name, weight in saved.items():
            if name in self.noisy:
                continue
            is_off = (weight - mine[name].detach()).abs() > 0.03 * moved + 1e-6
            off += [f"{name} in {float(is_off.float().mean()):.1%}"] if is_off.float().mean() > 0.02 else []
        self.found.expect(f"weights of step {step}", off, [])

    # After the training

    def _choose(self, last: int) -> None:
        """Compare when the training stopped, what it saved, and which checkpoint became the model."""
        settings, batch = self.settings, self.train.batch
        points, metric = settings.checkpoints, settings.checkpoints.metric
        name = metric if metric.startswith("eval_") or metric == "loss" else f"eval_{metric}"
        is_lowest = points.goal == "lowest" if points.goal else "loss" in name
        values = {step: told[name] * (1 if is_lowest else -1) for step, told in self.logged.items() if name in told}
        stop, measured = batch.steps, list[float]()
        for step, value in sorted(values.items()):
            measured.append(value)
            if settings.train.patience and len(measured) - 1 - measured.index(min(measured)) >= settings.train.patience:
                stop = step
                break
        self.found.expect("last step", last, stop)
        every = points.every_steps or max(
            1,
            round(points.every_epochs * batch.steps_per_epoch) if points.every_epochs else math.ceil(batch.steps / 10),
        )
        choose = self.stages["consolidate"].settings.consolidate.choose
        wanted = {step for step in range(1, last + 1) if step % every == 0 or step in points.keep_steps} | {last}
        wanted |= {int(choose[5:])} if choose.startswith("step-") else set()
        saved = {step for step in range(1, last + 1) if Path(f"train-{step}.pt").exists()}
        self.found.expect("steps that are saved", saved, wanted)
        self.step = json.loads((self.run / "model/consolidate/manifest.json").read_text())["step"]
        if choose == "best" and (of_saved := {step: values[step] for step in saved & {*values}}):
            best = [step for step, value in of_saved.items() if value == min(of_saved.values())]
            self.found.expect("a best step", self.step in best, True)
        else:
            self.found.expect("step", self.step, int(choose[5:]) if choose.startswith("step-") else last)

    def _consolidate(self, model: Any) -> None:
        """Compare the model that was made with the weights of its step, merged by peft."""
        settings = self.stages["consolidate"].settings
        training.take_values(model, torch.load(f"train-{self.step}.pt"))
        plain = model.merge_and_unload() if settings.adapter.method != "full" else model
        loader = getattr(transformers, training.CLASSES[settings.task])
        made, told = loader.from_pretrained(self.run / "model/consolidate", output_loading_info=True)
        self.found.expect("names", sorted({*told["missing_keys"], *told["unexpected_keys"]}), [])
        files = (self.run / "model/consolidate").glob("*.safetensors")
        types = {str(weight.dtype) for path in files for weight in load_file(path).values()}
        self.found.expect("types of the weights", types, {f"torch.{settings.consolidate.dtype or 'float16'}"})
        weights, near = dict(plain.named_parameters()), 1e-2 if made.dtype == torch.bfloat16 else 2e-3
        off = [
            name
            for name, weight in made.named_parameters()
            if not torch.allclose(weight.float(), weights[name].to(weight.dtype).float(), rtol=near, atol=2e-6)
        ]
        self.found.expect("weights of the model", off, [])

    def _predict(self) -> None:
        stage = self.stages["predict"]
        settings, predict = stage.settings, stage.settings.predict
        reader = Reader(settings=settings, tokenizer=self.reader.tokenizer, labels=self.reader.labels)
        rows = reader.rows(predict.split, is_filtered=False)[: predict.rows]
        model = training.load(settings, self.run / "model/consolidate")[0].eval()
        if reader.labels:
            self.found.expect("labels", model.config.id2label, dict(enumerate(reader.labels)))
        for name, values in (predict.decodings or {"": {}}).items():
            decoded = SimpleNamespace(**vars(predict) | values)
            (path,) = self.run.glob(f"predictions/*/predictions{name and '.'}{name}.jsonl")
            self._compare_answers(path, model, reader, rows, decoded)

    def _compare_answers(self, path: Path, model: Any, reader: Reader, rows: Sequence[Row], predict: Any) -> None:
        made = [*map(json.loads, path.read_text().splitlines())]
        self.found.expect("rows that are predicted", [one["index"] for one in made], [*range(len(rows))])
        if identity := reader.data.columns.id:
            self.found.expect("ids", [str(one["id"]) for one in made], [str(row[identity]) for row in rows])
        for row, one in zip(rows, made, strict=True):
            self._compare_answer(one, predictions.answer(model, reader, row, predict), reader)
            if predict.keep_logprobs and one["logprobs"]["tokens"]:
                self._compare_log_probabilities(one["logprobs"], model, reader, row)
        scores = json.loads((self.run / "metrics/score.json").read_text())
        scores = scores.get("scores", scores)
        name = path.stem.partition(".")[2] or "model"
        self._expect_scores("score ", scores.get(name, scores), rows, [one["prediction"] for one in made])

    def _compare_answer(self, one: Mapping[str, Any], plain: Mapping[str, Any], reader: Reader) -> None:
        what, predict = f"answer to row {one['index']}", reader.settings.predict
        raw = one.get("raw_prediction", one["prediction"])
        if "n_best" in plain:
            self.found.expect_close(f"null score {what}", one["null_score"], plain["null_score"], 2e-3, 2e-3)
            scores = [[each["score"] for each in some["n_best"]] for some in (one, plain)]
            self.found.expect(f"n_best of {what}", len(scores[0]), len(scores[1]))
            for found, wanted in zip(*scores, strict=False):
                self.found.expect_close(f"score of {what}", found, wanted, 2e-3, 2e-3)
            threshold = reader.settings.question_answering.null_threshold
            is_null = threshold is not None and plain["null_score"] - scores[1][0] > threshold
            self.found.expect(f"no {what}", one["start"] is None, is_null)
            if not is_null and not plain["is_close"]:
                self.found.expect(what, raw, plain["n_best"][0]["text"])
        else:
            self.found.expect(what, raw, plain["prediction"])
            for found, wanted in zip(one.get("probabilities", ()), plain.get("probabilities", ()), strict=True):
                self.found.expect_close(f"probability of {what}", found, wanted, 2e-3, 2e-4)
        self.found.expect(f"repaired {what}", one["prediction"], predictions.posted(raw, predict.post))

    def _compare_log_probabilities(self, told: Mapping[str, Any], model: Any, reader: Reader, row: Row) -> None:
        predict, tokens = reader.settings.predict, told["tokens"]
        plain = predictions.log_probabilities(model, reader, row, predict, tokens)
        for place, token in enumerate(tokens):
            self.found.expect_close("log-probability", told["chosen"][place], float(plain[place, token]), 1e-3, 5e-3)
            best = plain[place].topk(predict.keep_logprobs).values.tolist()
            for (_, found), wanted in zip(told["top"][place], best, strict=True):
                self.found.expect_close("top log-probability", found, wanted, 1e-3, 5e-3)

    def _expect_scores(self, what: str, told: Mapping[str, float], rows: Sequence[Row], made: Sequence[str]) -> None:
        settings, made = self.settings, [predictions.nfc(str(one)) for one in made]
        if settings.task == "question_answering":
            answers = [row[self.reader.column("answers")]["text"] for row in rows]
            plain = predictions.span_scores(made, answers)
        else:
            targets = [predictions.nfc(self.reader.target(row)) for row in rows]
            if settings.task == "classification":
                plain = predictions.label_scores(made, [one.strip() for one in targets])
            else:
                plain = predictions.text_scores(made, targets, self.stages["score"].settings.score.tokenizer)
        for name in {*told} & {*plain}:
            self.found.expect_close(what + name, told[name], plain[name], 1e-6, 1e-6)


def _is_noise(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and 0 < float(gradient.abs().max()) < 1e-6


def _text(one: Mapping[str, Any], post: Sequence[str]) -> str:
    return predictions.posted(one["n_best"][0]["text"] if "n_best" in one else one["prediction"], post)


def _label_order(label: str) -> tuple[int, int, str]:
    is_number = label.removeprefix("-").isdecimal()
    return (0, int(label), "") if is_number else (1, 0, label)


def differences(run: Path) -> list[str]:
    """Return in what a run and the same recipe in plain torch differ."""
    return Oracle(run).differences()
