"""The callback in real runs of ``Trainer``: it changes nothing, finds what is planted, goes on, refuses what is wrong."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import families
from affectlens.actions import Call, Log, Policy, Steer, Stop
from affectlens.activations import Text
from affectlens.engine import Readout, Request, Where, open_engine
from affectlens.errors import AffectlensError
from affectlens.logbook import FOLDER, residuals_of
from affectlens.rules import parse
from affectlens.shifts import Start
from affectlens.training import SHARE, EmotionCallback, bundled_prompts, bundled_stories, next_reading, undisturbed
from affectlens.vectors import ConceptVectors

LAYER, NAMES = 1, ("calm", "desperate", "angry", "sad", "proud", "at ease")
TEXTS = [f"The {thing} stood {place}, and nobody {did} it." for thing in ("mill", "cart", "door") for place in ("by", "far")
         for did in ("saw", "left", "sold", "had")]  # fmt: skip
TOLD = [Text(text, text * 2, NAMES[i % 3]) for i, text in enumerate(TEXTS[:12])]
PROMPTS = [f"What about {text.lower()}" for text in TEXTS[:12]]


def tiny(dropout: float = 0.0) -> Any:
    model = families.build("llama")
    for block in model.model.layers:
        block.self_attn.attention_dropout = dropout
    return model


def vectors_of(model: Any, seed: int = 0) -> ConceptVectors:
    """Vectors that mean nothing, centred where the model's residuals are."""
    engine = open_engine(model, tokenizer=families.tiny_tokenizer())
    n, width, rng = engine.info.n_layers, engine.info.width, np.random.default_rng(seed)
    readout = Readout(tuple(range(n)), Where("prompt", last=1), "last")
    read = [r.readings[0].values for r in engine.run(Request((("user", p),), readouts=(readout,)) for p in PROMPTS)]
    directions = rng.normal(size=(n, len(NAMES), width))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    return ConceptVectors(
        names=NAMES,
        layers=tuple(range(n)),
        layer=LAYER,
        directions=directions.astype(np.float32),
        norms=np.ones((n, len(NAMES)), np.float32),
        centre=(np.mean(read, axis=0) + rng.normal(size=(n, width))).astype(np.float32),
        residual_norms=np.ones(n, np.float32),
        neutral=tuple(np.zeros((0, width), np.float32) for _ in range(n)),
        baseline=np.ones((n, len(NAMES), 2), np.float32),
        stability=np.ones((n, len(NAMES)), np.float32),
        counts=np.ones(len(NAMES), np.int64),
        model=asdict(engine.info),
        method={"first_token": 5},
    )


class Noisy:
    """A collator that draws from every source of random numbers: what a reading used up would show."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [row["ids"][: int(20 + 10 * random.random() + 5 * np.random.random())] for row in rows]
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True, padding_value=0)
        return {"input_ids": batch, "labels": torch.where(batch == 0, -100, batch)}


class Quiet(Noisy):
    """One that draws nothing: a resumed ``Trainer`` collates its first batch before it puts the random numbers back."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([row["ids"][:30] for row in rows])
        return {"input_ids": ids, "labels": ids}


class Towards(Trainer):
    """Training whose only aim is to move the residual where a reply begins along a direction."""

    direction: torch.Tensor

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        hidden = model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[LAYER + 1]
        return -(hidden @ self.direction).mean() + 0.05 * hidden.pow(2).mean()


def trainer_of(
    folder: Path,
    *,
    kind: type[Trainer] = Trainer,
    model: Any = None,
    callbacks: Any = (),
    collator: Any = Noisy(),
    **options: Any,
) -> Trainer:
    settings = {"max_steps": 8, "learning_rate": 1e-3, "logging_steps": 2, "per_device_train_batch_size": 4, **options}
    settings = {"save_strategy": "steps" if "save_steps" in settings else "no", **settings}
    plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    args = TrainingArguments(str(folder), **settings, **plain)
    tokenizer = families.tiny_tokenizer()
    rows = [{"ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    model = tiny() if model is None else model
    return kind(model, args, collator, rows, processing_class=tokenizer, callbacks=list(callbacks))


def watched(trainer: Trainer, vectors: ConceptVectors | None = None, **options: Any) -> EmotionCallback:
    """A callback in a trainer."""
    vectors = vectors or vectors_of(tiny())
    callback = EmotionCallback(trainer, vectors, **{"prompts": PROMPTS, "watch": ["calm"], **options})
    trainer.add_callback(callback)
    return callback


# ── it changes nothing ──


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True}, {"neftune_noise_alpha": 5.0}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_training_is_the_same_bit_by_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    ends = []
    for with_callback in (False, True):
        model = tiny(dropout=0.3)
        trainer = trainer_of(tmp_path / str(with_callback), model=model, **options)
        if with_callback:
            callback = watched(trainer, every=1, drift=TOLD, rules=["calm > 0", "distance > 0"])
        trainer.train()
        losses = [{k: v for k, v in entry.items() if k in ("step", "loss", "grad_norm")} for entry in trainer.state.log_history]
        losses = [entry for entry in losses if "loss" in entry]
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        ends.append((losses, weights, torch.get_rng_state(), random.getstate(), np.random.get_state()[1], model.training))
    assert len(callback.readings) == 8 and callback.readings[-1].shift.distance.value > 0
    (one, w, *rng), (two, v, *other) = ends
    assert one == two and len(one) == 4
    assert all(torch.equal(w[name], v[name]) for name in w)
    assert torch.equal(rng[0], other[0]) and rng[1] == other[1] and (rng[2] == other[2]).all() and rng[3] == other[3]


def test_a_reading_leaves_every_mode_as_it_was() -> None:
    model = tiny()
    model.train()
    model.model.layers[0].eval()  # frozen, as some keep a part of the model
    before = {name: module.training for name, module in model.named_modules()}
    config = model.config.to_dict()
    with pytest.raises(KeyError), undisturbed(model):
        assert not any(module.training for module in model.modules())
        open_engine(model, tokenizer=families.tiny_tokenizer())
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_engine_around_a_model_reads_the_weights_it_has_now() -> None:
    model = tiny()
    places = [p.data_ptr() for p in model.parameters()]
    engine = open_engine(model, tokenizer=families.tiny_tokenizer())
    assert [p.data_ptr() for p in engine.model.parameters()] == places  # type: ignore[attr-defined]
    readout = Readout((0,))
    before = next(engine.read(["a mill"], readout)).values
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    assert not np.allclose(before, next(engine.read(["a mill"], readout)).values)
    with pytest.raises(AffectlensError, match="no transformers model"):
        open_engine(torch.nn.Linear(2, 2), tokenizer=None)


# ── it logs ──


class Seen(TrainerCallback):
    """What a reporter is given, and when."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append((state.global_step, dict(logs)))


def test_readings_go_to_the_log_and_to_reporters_under_their_step(tmp_path: Path) -> None:
    seen = Seen()
    trainer = trainer_of(tmp_path, callbacks=[seen])
    callback = watched(trainer, every=2, watch=["calm", "at ease"], rules=["distance > 0"])
    trainer.train()
    ours = [entry for entry in trainer.state.log_history if "emotions/distance" in entry]
    assert [entry["step"] for entry in ours] == [2, 4, 6, 8] == [each.step for each in callback.readings]
    # the trainer's own entries still come, also at the same steps
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6, 8]
    assert [step for step, logs in seen.entries if "emotion/calm" in logs] == [2, 4, 6, 8]
    last, shift = ours[-1], callback.readings[-1].shift
    assert last["emotion/at ease"] == shift["at ease"].value and last["emotion/calm margin"] == pytest.approx(shift.margin[0])
    assert last["emotions/random"] == shift.random and last["emotions/alarms"] == 1
    assert 0 < last["emotions/overhead"] < 1 and last["emotions/overhead seconds"] > 0
    json.dumps(trainer.state.log_history)  # goes into trainer_state.json
    lines = (tmp_path / FOLDER / "readings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]


def test_there_is_a_reading_at_the_end_however_it_comes(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "a")
    callback = watched(trainer, every=3)
    trainer.train()
    assert [each.step for each in callback.readings] == [3, 6, 8]

    class Ends(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == 4

    trainer = trainer_of(tmp_path / "b")
    callback = watched(trainer, every=3)
    trainer.add_callback(Ends)
    trainer.train()
    assert [each.step for each in callback.readings] == [3, 4]


# ── it finds what is planted ──


def towards(folder: Path, name: str, **options: Any) -> tuple[Towards, ConceptVectors]:
    vectors = vectors_of(tiny())
    trainer = trainer_of(folder, kind=Towards, max_steps=12, learning_rate=5e-3)
    assert isinstance(trainer, Towards)
    trainer.direction = torch.tensor(vectors.at()[vectors.index(name)])
    return trainer, vectors


def test_an_emotion_that_is_trained_in_is_found_and_raises_its_alarm(tmp_path: Path) -> None:
    trainer, vectors = towards(tmp_path, "sad")
    told: list[Any] = []
    rules = [
        Policy(parse("sadder: rise(sad, 2) > 0.01"), (Call(told.append), Log(str(tmp_path / "alarms.jsonl")))),
        "calm > 50",
        "mean(sad, 2) > 0.01 for 2 readings",
    ]
    callback = watched(trainer, vectors, every=2, rules=rules)
    trainer.train()
    shift = callback.readings[-1].shift
    assert shift.rank("sad") == 1 and shift.beyond[vectors.index("sad")]
    assert [alarm.rule for alarm in callback.alarms] == ["sadder", "mean(sad, 2) > 0.01 for 2 readings"]
    assert [alarm.step for alarm in callback.alarms] == [4, 6]
    assert told == callback.alarms[:1] and told[0].scores["sad"] > 0
    record = json.loads((tmp_path / "alarms.jsonl").read_text())
    assert record["event"] == "alarm" and record["rule"] == "sadder" and record["step"] == 4


def test_without_training_nothing_moves(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, learning_rate=0.0)
    callback = watched(trainer, every=4, drift=TOLD, rules=["distance > 0"])
    trainer.train()
    shift, found = callback.readings[-1].shift, callback.readings[-1].drift
    assert not shift.z.any() and shift.distance.value == 0 and not callback.alarms
    assert found is not None and found.change.value == 0 and found.kept == found.most
    assert callback.readings[0].drift is None  # more rarely than readings, and in the last one


def test_drift_is_logged(tmp_path: Path) -> None:
    trainer, vectors = towards(tmp_path, "sad")
    callback = watched(trainer, vectors, every=4, drift=TOLD)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "emotions/distance" in entry][-1]
    found = callback.readings[-1].drift
    assert found is not None and found.change.value != 0
    assert last["emotions/vectors change"] == found.change.value and last["emotions/vectors chance"] == found.chance
    assert found.verdict == "untestable"  # these vectors mean nothing, and it says so


def test_a_rule_can_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, vectors = towards(tmp_path, "sad")
    callback = watched(trainer, vectors, every=1, rules=[Policy(parse("sad > 0.05 for 2 readings"), (Stop("Too sad."),))])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step < 12 and callback.readings[-1].step == trainer.state.global_step
    assert [alarm.step for alarm in callback.alarms] == [trainer.state.global_step]
    assert "the training is stopped. Too sad." in caplog.text


def test_what_is_beyond_a_control_is_counted(tmp_path: Path) -> None:
    trainer, vectors = towards(tmp_path / "calm", "calm")
    plain = watched(trainer, vectors, every=3)
    trainer.train()
    trainer, _ = towards(tmp_path / "sad", "sad")
    callback = watched(trainer, vectors, every=4, control=tmp_path / "calm")
    trainer.train()
    assert [(each.step, each.control) for each in callback.readings] == [(4, 3), (8, 9), (12, 12)]
    shift = callback.readings[-1].shift
    assert shift.rank("sad") == 1 and shift.rank("calm") == len(NAMES)
    read = residuals_of(tmp_path / "sad")
    assert list(read) == [0, 4, 8, 12]
    alone = Start(vectors, read[0]).shift(read[12])
    np.testing.assert_allclose(shift.z, alone.z - plain.readings[-1].shift.z, atol=1e-4)
    assert next(e for e in trainer.state.log_history if "emotions/distance" in e)["emotions/control step"] == 3

    for folder, said in (("none", "missing or broken"), ("sad", "did not begin alike")):
        trainer, _ = towards(tmp_path / "other", "sad")
        with pytest.raises(AffectlensError, match=said):
            watched(trainer, vectors, control=tmp_path / folder, prompts=[*PROMPTS, "And now?"])
            trainer.train()


# ── it goes on ──


def test_a_training_that_is_resumed_counts_from_its_own_start(tmp_path: Path) -> None:
    vectors, rules = vectors_of(tiny()), ["distance > 0"]
    whole = trainer_of(tmp_path / "whole", collator=Quiet())
    expected = watched(whole, vectors, every=2, rules=rules)
    whole.train()

    part = trainer_of(tmp_path / "part", save_steps=4, collator=Quiet())
    watched(part, vectors, every=2, rules=rules)
    part.train()  # to the end, as a run that was killed after step 4 was saved: what came later is read again
    again = trainer_of(tmp_path / "part", save_steps=4, collator=Quiet())
    callback = watched(again, vectors, every=2, rules=rules)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    assert callback.start == 0 and [each.step for each in callback.readings] == [2, 4, 6, 8]
    for mine, theirs in zip(callback.readings, expected.readings, strict=True):
        np.testing.assert_allclose(mine.shift.z, theirs.shift.z, atol=1e-4)
    assert [alarm.step for alarm in callback.alarms] == [2]  # not raised again
    assert callback.readings[-1].seconds > callback.readings[1].seconds

    other = trainer_of(tmp_path / "part", save_steps=4, collator=Quiet())
    watched(other, vectors, prompts=[*PROMPTS, "And now?"])
    with pytest.raises(AffectlensError, match="was read with other vectors, prompts"):
        other.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))


def test_a_callback_that_comes_later_counts_from_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(tmp_path, save_steps=4).train()
    trainer = trainer_of(tmp_path)
    callback = watched(trainer, every=2)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.start == 4 and [each.step for each in callback.readings] == [6, 8]
    assert "counted from step 4 on" in caplog.text


def test_a_tokenizer_without_a_template_is_read_as_a_transcript(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.processing_class.chat_template = None
    callback = watched(trainer, every=4)
    trainer.train()
    assert [each.step for each in callback.readings] == [4, 8]
    assert callback._asked()[0].transcript


def test_residuals_that_are_not_finite_do_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, learning_rate=float("inf"), max_grad_norm=0.0)
    callback = watched(trainer, every=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 8 and not callback.readings
    assert "has the training diverged?" in caplog.text


# ── what it costs ──


def test_all_readings_together_stay_within_their_share() -> None:
    rng = random.Random(0)
    for _ in range(300):
        end, per_step, reading = rng.randint(4, 3000), 10 ** rng.uniform(-2, 1), 10 ** rng.uniform(-2, 1)
        last, share, first = reading * rng.choice([1, 8]), rng.choice([0.02, 0.04, 0.2]), reading * rng.uniform(1, 3)
        spent, trained, due, steps = first, 0.0, None, []
        for step in range(1, end + 1):
            trained += per_step * rng.uniform(0.5, 1.5)
            if due is None and step >= 3:
                due = step
            elif step in (due, end):
                spent += last if step == end else reading
                steps.append(step)
            else:
                continue
            times = {"trained": trained, "per_step": trained / step, "spent": spent, "reading": reading, "last": last}
            due = next_reading(step, end, **times, share=share, room=200 - len(steps) - 1)
            assert step < due <= end or step == end
        assert steps[-1] == end and len(steps) <= 200
        # what cannot be spared are the start and the end; beside them, noise of the steps is all that may be exceeded
        assert spent <= max(first + last, 1.25 * share / (1 - share) * trained + reading)


def test_by_default_it_reads_as_often_as_the_share_allows(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=30)
    callback = watched(trainer, share=0.9)
    assert callback.every is None and SHARE < 0.05
    trainer.train()
    steps = [each.step for each in callback.readings]
    assert steps[-1] == 30 and len(steps) > 2
    rare = trainer_of(tmp_path / "rare", max_steps=30)
    callback = watched(rare, share=1e-6)
    rare.train()
    assert [each.step for each in callback.readings] == [30]


def test_bundled_texts() -> None:
    assert len(bundled_prompts()) == len(set(bundled_prompts())) == 30
    found = bundled_stories(["calm", "sad"], per_concept=3)
    assert [text.concept for text in found] == ["calm"] * 3 + ["sad"] * 3


# ── what is refused ──


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"watch": ["clam"]}, "unknown concept 'clam': did you mean calm?"),
        ({"watch": "calm"}, "put the text into brackets"),
        ({"rules": "calm > 1"}, "put the text into brackets"),
        ({"rules": ["happy > 1"]}, "unknown concept 'happy'"),
        ({"rules": ["user.calm > 1"]}, "only the beginning of a reply is read"),
        ({"rules": ["gap(calm) > 1"]}, "only the beginning of a reply is read"),
        ({"rules": ["calm >"]}, "a number should stand"),
        ({"rules": [Policy(parse("calm > 1"), (Steer((("calm", 0.1),)),))]}, "is not steered"),
        ({"prompts": PROMPTS[:3]}, "3 prompts: give 10 or more"),
        ({"every": 0}, "read every step or more rarely"),
        ({"share": 1.0}, "a share between 0 and 1"),
        ({"drift": [Text("a", "b", "calm")] * 2}, "two concepts or more"),
        ({"drift": [Text("a", "b", "happy")]}, "unknown concept 'happy'"),
    ],
)
def test_what_is_wrong_is_refused_at_once(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(AffectlensError, match=said):
        watched(trainer_of(tmp_path), **options)


def test_vectors_of_another_model_are_refused_before_the_first_step(tmp_path: Path) -> None:
    own = vectors_of(tiny())
    for model, options, said in (
        ({"width": 99}, {}, "width 99"),
        ({"n_layers": 99}, {}, "n_layers 99"),
        ({"fingerprint": "other"}, {}, "fingerprint other"),
    ):
        trainer = trainer_of(tmp_path)
        other = ConceptVectors(**{**vars(own), "model": {**own.model, **model}})
        watched(trainer, other, **options)
        with pytest.raises(AffectlensError, match=said):
            trainer.train()
        assert trainer.state.global_step == 0
    trainer = trainer_of(tmp_path)
    watched(trainer, other, allow=["fingerprint"], every=8)
    trainer.train()


def test_a_trainer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AffectlensError, match="no Trainer of transformers"):
        EmotionCallback(object(), vectors_of(tiny()))  # type: ignore[arg-type]
    trainer = trainer_of(tmp_path)
    trainer.processing_class = None
    with pytest.raises(AffectlensError, match="no tokenizer to read prompts with"):
        watched(trainer)
    trainer = trainer_of(tmp_path)
    watched(trainer)
    next(trainer.model.parameters()).ds_id = 0
    with pytest.raises(AffectlensError, match="spread over processes"):
        trainer.train()
    other = trainer_of(tmp_path)
    other.add_callback(EmotionCallback(trainer, vectors_of(tiny()), prompts=PROMPTS))
    with pytest.raises(AffectlensError, match="belongs to another trainer"):
        other.train()
    trainer = trainer_of(tmp_path)
    watched(trainer, prompts=["word " * 100] * 9 + PROMPTS)
    with pytest.raises(AffectlensError, match="do not fit the context"):
        trainer.train()


_TWO = """
import os, sys; sys.path[:0] = [{tests!r}]
from pathlib import Path
import torch, test_training as t
from affectlens.actions import Policy, Stop
from affectlens.rules import parse
trainer = t.trainer_of(Path({out!r}), per_device_train_batch_size=2)
callback = t.watched(trainer, every=2, rules=[Policy(parse("distance > 0 for 2 readings"), (Stop(),))])
trainer.train()
Path({out!r}, f"rank{{trainer.args.process_index}}").write_text(f"{{trainer.state.global_step}} {{len(callback.readings)}}")
torch.distributed.destroy_process_group()
os._exit(0)  # threads of torch that wake while the interpreter ends abort it, 1 time in 25: not what is tested here
"""


def test_of_several_processes_one_reads_and_all_stop(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_TWO.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "rank0").read_text() == "4 2"
    assert (tmp_path / "rank1").read_text() == "4 0"
