"""The training loop: one loop for every layer, head, optimiser, schedule and averaging."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurlm import files, provenance
from recurlm.config import Config, stage, stage_count, to_dict, to_toml
from recurlm.errors import DataError, RunError, UserError, lookup
from recurlm.evaluation.perplexity import check_measurable, mean_loss
from recurlm.model import directory, precision
from recurlm.model.neural import NeuralModel
from recurlm.protocol import State
from recurlm.text.batches import Streams, reading_order, training_batches, window_length
from recurlm.text.store import Store
from recurlm.training import captured, checkpoint, interrupt, snapshot
from recurlm.training.averaging import AVERAGING, applied, nonmonotone
from recurlm.training.cursor import Cursor, Result
from recurlm.training.monitor import METRICS, Monitor
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.publish import Best, publish, sample
from recurlm.training.schedules import SCHEDULES, Progress, warm_up
from recurlm.training.settings import settle
from recurlm.training.step import Order, PlainStep, Step

CHECKPOINTS = "checkpoints"


class Trainer:
    """One run: model, data, optimiser, averaging and cursor. `run` trains until done, stopped or out of time.

    `recipe` holds all settings, `config` those of the stage.
    """

    def __init__(self, config: Config, store: Store, folder: Path, quiet: bool = False):
        if "train" not in store.splits:
            raise DataError(f"{store.path}: the store has no train split.")
        config, choice = settle(config, store)
        self.recipe, self.store, self.folder, self.quiet = config, store, folder, quiet
        train = config.train
        self.valid_split = "valid" if "valid" in store.splits else "train"
        self.tokenizer = store.tokenizer()
        self.boundary = self.tokenizer.boundary_id
        self.device = precision.resolve_device(train.device)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # streams, graphs and kernels go where the current device is
        self.precision = precision.resolve_dtype(train.dtype, self.device)
        self.model = NeuralModel(
            config.model, store.vocab_size, torch.Generator().manual_seed(train.seed), self.precision
        ).to(self.device)
        self.parameters = list(self.model.parameters())
        self.cursor, self.stages = Cursor(), stage_count(config)
        for number in reversed(range(self.stages)):  # also those to come: what cannot work is found now
            self.enter(number)
        self.waiting: list[tuple[Cursor, int, dict[str, Any]]] = []  # steps whose numbers were not read yet
        self.best: Best | None = None  # not yet published
        self.kept: dict[str, Tensor] = {}  # the best weights on record, with which a next stage begins
        self.made = provenance.facts() | {
            "device": precision.device_name(self.device), "dtype": self.precision.name, "seed": train.seed,
            "parameters": sum(p.numel() for p in self.parameters),
        }  # fmt: skip
        self.saved_at, self.saved = time.monotonic(), False
        self.wish = interrupt.Wish()
        self.notes: list[str] = [f"{self.device}, {self.precision.name} ({self.precision.reason})"]
        if choice:
            self.notes.append(choice)
        if self.device.type == "cuda":
            self.notes.append(
                f"step by step: {self.obstacle}" if self.obstacle else "the step is captured in CUDA graphs"
            )

    def enter(self, number: int) -> None:
        """Makes what a stage has of its own: settings, batches, optimiser, schedule, averaging, and a fresh carried state."""
        self.config = config = stage(self.recipe, number)
        self.optimizer = lookup(OPTIMIZERS, config.optimizer.name, "optimizer.name")(self.parameters, config.optimizer)
        schedule = lookup(SCHEDULES, config.schedule.name, "schedule.name")
        self.rate = lambda at: schedule(config.schedule, at) * warm_up(config.schedule, at)
        self.averaging = lookup(AVERAGING, config.averaging.name, "averaging.name")(config.averaging)
        self.batches = training_batches(self.ids("train"), config.data, self.boundary, config.train.seed)
        if self.batches.epoch_length(0) < 1:
            raise DataError(
                f"{self.store.path}: {self.store.info['train'].tokens:,} training tokens are too few for "
                f"{config.data.batch_size} streams; lower data.batch_size."
            )
        check_measurable(self.ids(self.valid_split), self.boundary, config.data)
        self.obstacle = captured.obstacle(config, self.device)
        self.start: State = self.model.initial_state(config.data.batch_size)  # the carried state before the first step
        self.__dict__.pop("stepper", None)

    def next_stage(self) -> None:
        """Goes over to the next stage, which starts from the best weights so far."""
        c = self.cursor
        self.enter(c.stage + 1)
        self.model.load_state_dict(self.kept or self.weights())
        c.stage, c.stage_step, c.stage_epoch = c.stage + 1, c.step, c.epoch + (c.position > 0)
        c.epoch, c.position, c.epoch_nats, c.epoch_targets, c.losses = c.stage_epoch, 0, 0.0, 0, []

    def ids(self, split: str) -> np.ndarray:
        """The split's ids in the model's reading order."""
        return reading_order(self.store.ids(split), self.config.model.backward, self.boundary)

    # ---- one step -------------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """How far the stage is, for schedules and the bar."""
        c, train = self.cursor, self.config.train
        step, epoch = c.step - c.stage_step, c.epoch - c.stage_epoch
        share = (epoch + c.position / self.batches.epoch_length(c.epoch)) / train.epochs
        if train.max_steps:
            share = max(share, step / train.max_steps)
        return Progress(step, epoch, min(1.0, share), tuple(c.losses))

    def epoch_ended(self) -> bool:
        """Whether the text is at its end; the next step starts it anew."""
        return self.cursor.position >= self.batches.epoch_length(self.cursor.epoch)

    def spent(self) -> bool:
        """Whether the stage's epochs or steps are used up."""
        c, train = self.cursor, self.config.train
        epochs = c.epoch - c.stage_epoch + self.epoch_ended()
        return epochs >= train.epochs or 0 < train.max_steps <= c.step - c.stage_step

    def stage_done(self) -> bool:
        """Whether the stage's epochs, steps or patience are used up."""
        losses, train = self.cursor.losses, self.config.train
        if self.cursor.due:
            return False
        stale = len(losses) - 1 - losses.index(min(losses)) if losses else 0
        rising = train.stop_nonmono > 0 and nonmonotone(losses, train.stop_nonmono)
        return self.spent() or rising or 0 < train.patience <= stale

    def done(self) -> bool:
        """Whether the last stage is done."""
        return self.cursor.stage + 1 >= self.stages and self.stage_done()

    @functools.cached_property
    def stepper(self) -> Step:
        """What takes the steps, made at the first one."""
        given = self.model, self.optimizer, self.averaging, self.config, self.start
        if self.obstacle or not isinstance(self.batches, Streams):
            return PlainStep(*given)
        return captured.CapturedStep(*given, self.batches)

    @property
    def state(self) -> State:
        """The carried state."""
        return self.stepper.state

    def advance(self) -> None:
        """Trains on one window; its numbers are there for `read`."""
        cfg, c = self.config, self.cursor
        if self.epoch_ended():
            c.epoch, c.position, c.epoch_nats, c.epoch_targets = c.epoch + 1, 0, 0.0, 0
        length = window_length(cfg.data, cfg.train.seed, c.step)
        window = self.batches.window(c.position, length, c.epoch)
        progress = self.progress()
        lr = cfg.optimizer.lr * self.rate(progress) * (length / cfg.data.bptt if cfg.data.rescale_lr else 1.0)
        tokens = window.targets_TB.size if window.counted_TB is None else int(window.counted_TB.sum())
        self.waiting.append(
            (replace(c), self.averaging.count, {"lr": lr, "length": len(window.inputs_TB), "tokens": tokens})
        )
        newest = self.averaging.enters(c.step + 1, progress.share)
        self.stepper.take(Order(c.step, window, c.position, lr, newest))
        c.step, c.position = c.step + 1, window.next

    def read(self) -> tuple[list[tuple[int, dict[str, Any]]], str]:
        """(step and its numbers of the steps since the last call, why the one after them failed or '').

        After a failure the run stands before that step, and no weight moved from there on.
        """
        c, waiting, out = self.cursor, self.waiting, []
        rows, failure = self.stepper.read()
        self.waiting = []
        for (before, _, facts), (norm, *terms) in zip(waiting, rows, strict=False):
            if before.epoch == c.epoch:
                c.epoch_nats += terms[0] * facts["tokens"]
                c.epoch_targets += facts["tokens"]
            out.append(
                (before.step + 1, {"loss_nats": terms[0], "objective": math.fsum(terms), "grad_norm": norm, **facts})
            )
        if not failure:
            return out, ""
        before, self.averaging.count, _ = waiting[len(rows)]
        c.step, c.epoch, c.position = before.step, before.epoch, before.position
        if self.averaging.count <= 0:
            self.averaging.mean = []
        return out, (
            f"Step {c.step + 1}: {failure}. No weight was changed; "
            "go on with a lower optimizer.lr or a tighter optimizer.clip and --resume auto."
        )

    def step(self) -> dict[str, Any]:
        """Trains on one window and returns its numbers; raises RunError before any weight moves if one is not finite."""
        self.advance()
        numbers, failure = self.read()
        if failure:
            raise RunError(failure)
        return numbers[-1][1]

    # ---- validation, model, checkpoint ----------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """A copy of the parameters by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def validate(self, monitor: Monitor, started: float, keep: bool = True) -> None:
        """Measures the (averaged) weights on the valid split, keeps them if best, and starts averaging if due.

        Without `keep` nothing that decides how the run goes on changes, so a resumed run equals an unbroken one.
        A signal gives it up between two windows (interrupt.Stopped), with nothing changed; it is done after the resume.
        """
        c, data = self.cursor, self.config.data
        with applied(self.averaging, self.parameters), self.heeding():
            ids, rule = self.ids(self.valid_split), (data.counting, data.batching)
            loss = mean_loss(self.model, ids, self.boundary, data.eval_batch_size, *rule)
            if not math.isfinite(loss):
                c.due = False  # measured it was; a resume goes on with the next step
                raise RunError(f"Step {c.step}: the validation loss is {loss}; the best weights so far are kept.")
            best = loss < c.best
            if best:
                self.best = Best(loss, c.step, self.weights(), c.stage)
        averaged, fired = self.averaging.weights() is not None, False
        if keep:
            if self.best and best and self.recipe.stages:
                self.kept = self.best.weights
            c.best = min(c.best, loss)
            c.losses.append(loss)
            fired, c.due = self.averaging.observe(c.losses), False
        train_loss = c.epoch_nats / c.epoch_targets if c.epoch_targets else None  # none before the epoch's first step
        values = {
            "stage": c.stage + 1, "epoch": c.epoch + 1, "loss_nats": loss, "ppl": math.exp(min(loss, 700)),
            "train_loss_nats": train_loss, "averaged": averaged, "best": best, "averaging_starts": fired,
            "seconds": c.seconds + time.monotonic() - started, "done": self.done(),
        }  # fmt: skip
        monitor.record("valid" if keep else "stopped", c.step, values)
        guessing = math.log(self.model.vocab_size)
        marks = (
            ("averaged", averaged), ("best", best), ("averaging starts", fired),
            (f"worse than guessing, {guessing:.2f}", loss > guessing + 0.1),
        )  # fmt: skip
        notes = ", ".join(mark for mark, on in marks if on)
        name = "valid" if self.valid_split == "valid" else "whole train text's"
        trained = "" if train_loss is None else f"train loss {train_loss:.4f}  "
        monitor.say(
            f"{self.place()}  step {c.step}  {trained}{name} loss {loss:.4f}  "
            f"ppl {values['ppl']:{',.2f' if loss < 20 else '.2e'}}  {loss / math.log(2):.3f} bits/token  {values['seconds']:.0f} s"
            + (f"  ({notes})" if notes else "")
        )

    def place(self) -> str:
        """Stage and epoch, for people."""
        return (f"stage {self.cursor.stage + 1}  " if self.stages > 1 else "") + f"epoch {self.cursor.epoch + 1}"

    @contextlib.contextmanager
    def heeding(self) -> Iterator[None]:
        """Lets a signal end what the model is asked to do, before its next forward pass."""
        hook = self.model.register_forward_pre_hook(lambda *_: self.wish.heed())
        try:
            yield
        finally:
            hook.remove()

    def publish(self) -> None:
        """Writes the best weights so far as the run directory's model."""
        c = self.cursor
        if self.best is None and c.best == math.inf:  # before any validation the newest are the ones to have
            with applied(self.averaging, self.parameters):
                self.best = Best(math.inf, c.step, self.weights(), c.stage)
        if self.best is None:
            return
        facts = self.model, self.store, self.tokenizer, self.config, self.stages, self.made
        publish(self.folder, self.best, *facts)
        self.best = None

    def save(self, started: float) -> None:
        """Saves everything that decides how the run goes on, the model first. RunError when that cannot be written."""
        c = replace(self.cursor, seconds=self.cursor.seconds + time.monotonic() - started)
        tensors, values = snapshot.pack(self.model, self.optimizer, self.averaging, self.state, c, self.kept)
        self.publish()
        with contextlib.suppress(OSError):  # the records up to this step survive a power loss too
            files.sync(self.folder / METRICS)
        values |= {"config": to_dict(self.recipe), "store": self.store.hash}
        checkpoint.save(self.folder / CHECKPOINTS, c.step, tensors, values, self.config.train.keep_checkpoints)
        self.saved_at, self.saved = time.monotonic(), True

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continues from a checkpoint; refuses another text, tokenizer or model."""
        snapshot.check(saved, self.recipe, self.store)
        self.cursor = c = snapshot.cursor(saved)
        if c.stage:
            self.enter(c.stage)
        self.start, self.kept = snapshot.unpack(
            saved, self.config, self.model, self.optimizer, self.averaging, self.start, self.device
        )
        if self.recipe.stages and not self.kept and c.best < math.inf:  # it had no later stages then
            self.kept = directory.read(self.folder, self.device, self.precision)[0].state_dict()
        self.saved = True
        self.__dict__.pop("stepper", None)

    # ---- the loop -------------------------------------------------------------------------------------------

    def run(self, max_seconds: float = math.inf) -> Result:
        """Trains until the epochs or steps are done, patience ends, time is up or a signal asks to stop."""
        c, train = self.cursor, self.config.train
        (self.folder / CHECKPOINTS).mkdir(exist_ok=True)
        if self.done():
            more = ", train.stages" if self.stages <= len(self.recipe.stages) else ""
            self.notes.append(f"Nothing is left to train: to go on, raise train.epochs{more} or train.max_steps.")
        else:
            files.write_atomic(self.folder / "config.toml", to_toml(self.recipe))
        started, first = time.monotonic(), (c.step, c.due, c.stage)
        monitor = Monitor(self.folder, c.step, train.tensorboard, self.quiet, c.due)
        for note in self.notes:
            monitor.say(note)
        if not self.done():
            monitor.record("start", c.step, self.made)
        try:
            with interrupt.listening() as self.wish, precision.applied(self.precision):
                with contextlib.suppress(interrupt.Stopped):
                    if c.due:
                        self.validate(monitor, started)
                    while not self.done() and not self.wish.signal and time.monotonic() - started < max_seconds:
                        if self.stage_done():
                            self.next_stage()
                            monitor.say(f"stage {c.stage + 1} of {self.stages} begins from the best weights so far")
                        self.step_and_dues(monitor, started)
                    self.report(monitor)
                    if not self.done() and not self.wish.signal:  # out of time: measure what is there, off the record
                        self.validate(monitor, started, keep=False)
                best = min(c.best, self.best.loss if self.best else math.inf)
                if (c.step, c.due, c.stage) != first:
                    self.save(started)
        except (UserError, OSError):
            if (c.step, c.due, c.stage) != first:
                with contextlib.suppress(UserError, OSError):  # the first error is the one to read
                    self.save(started)
            raise
        finally:
            monitor.close()
        seconds = c.seconds + time.monotonic() - started
        epochs = c.epoch + self.epoch_ended()
        where = c.stage + 1, self.stages, self.valid_split
        return Result(c.step, epochs, best, seconds, self.wish.signal, self.done(), *where)

    def step_and_dues(self, monitor: Monitor, started: float) -> None:
        """One step and what is due after it: records, sample, validation, checkpoint."""
        c, train = self.cursor, self.config.train
        self.advance()
        validate = self.spent() or (c.step % train.eval_every == 0 if train.eval_every else self.epoch_ended())
        sample = train.sample_every and c.step % train.sample_every == 0
        due = time.monotonic() - self.saved_at >= train.checkpoint_seconds or (bool(c.losses) and not self.saved)
        save = due or (train.checkpoint_every and c.step % train.checkpoint_every == 0)
        if validate or sample or save or self.epoch_ended() or len(self.waiting) >= self.stepper.lag:
            self.report(monitor)
        if sample:
            text = self.sample()
            monitor.record("sample", c.step, {"text": text})
            monitor.say(f"sample at step {c.step}: {text!r}")
        if validate:
            c.due = True
            self.validate(monitor, started)
            save = save or (bool(c.losses) and not self.saved)
        if save and not self.done():
            self.save(started)

    def report(self, monitor: Monitor) -> None:
        """Shows and records the numbers of the steps since the last call; RunError when one was not finite."""
        share = self.progress().share
        numbers, failure = self.read()
        for step, values in numbers:
            monitor.step(self.place(), share, values["loss_nats"], values["tokens"])
            if step % self.config.train.log_every == 0:
                monitor.record("step", step, values | {"tokens_per_s": monitor.rate})
        if failure:
            raise RunError(failure)

    def sample(self) -> str:
        """A short text from the current (averaged) weights."""
        with applied(self.averaging, self.parameters):
            return sample(self.model, self.tokenizer, self.config.train.sample_prompt, self.config.train.seed)
