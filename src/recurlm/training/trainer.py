"""The training loop: one loop for every layer, head, optimiser, schedule and averaging."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurlm import files
from recurlm.config import Config, to_dict, to_toml
from recurlm.errors import CheckpointError, ConfigError, DataError, RunError, lookup
from recurlm.evaluation.perplexity import mean_loss
from recurlm.inference.generate import Sampling, sample_ids
from recurlm.model import directory, precision
from recurlm.model.neural import NeuralModel
from recurlm.protocol import State, detach, map_state, state_leaves
from recurlm.text.batches import Streams, window_length
from recurlm.text.store import Store
from recurlm.training import checkpoint, interrupt, objective
from recurlm.training.averaging import AVERAGING, applied
from recurlm.training.card import model_card
from recurlm.training.cursor import Cursor, Result, seed_for_step
from recurlm.training.monitor import Monitor
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.schedules import SCHEDULES, Progress


class Trainer:
    """One run: model, data, optimiser, averaging and cursor. `run` trains until done, stopped or out of time."""

    def __init__(self, config: Config, store: Store, folder: Path, quiet: bool = False):
        self.config, self.store, self.folder, self.quiet = config, store, folder, quiet
        train = config.train
        if "train" not in store.splits:
            raise DataError(f"{store.path}: the store has no train split.")
        self.tokenizer = store.tokenizer()
        boundary = self.tokenizer.boundary_id
        self.device = precision.resolve_device(train.device)
        self.precision = precision.resolve_dtype(train.dtype, self.device)
        self.model = NeuralModel(
            config.model, store.vocab_size, torch.Generator().manual_seed(train.seed), self.precision.dtype
        ).to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = lookup(OPTIMIZERS, config.optimizer.name, "optimizer.name")(self.parameters, config.optimizer)
        self.schedule = lookup(SCHEDULES, config.schedule.name, "schedule.name")
        self.averaging = lookup(AVERAGING, config.averaging.name, "averaging.name")(config.averaging)
        self.streams = Streams(store.ids("train"), config.data.batch_size, boundary, config.data.counting)
        if self.streams.train_length < 1:
            raise DataError(
                f"{store.path}: {store.info['train'].tokens:,} training tokens are too few for "
                f"{config.data.batch_size} streams; lower data.batch_size."
            )
        self.generator = torch.Generator(self.device)
        self.cursor = Cursor()
        self.state: State = self.model.initial_state(config.data.batch_size)
        self.best_weights: dict[str, Tensor] | None = None
        self.saved_at = time.monotonic()
        self.notes: list[str] = [f"{self.device}, {self.precision.name} ({self.precision.reason})"]

    # ---- one step -------------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """How far the run is, for schedules and the bar."""
        c, train = self.cursor, self.config.train
        share = (c.epoch + c.position / self.streams.train_length) / train.epochs
        if train.max_steps:
            share = max(share, c.step / train.max_steps)
        return Progress(c.step, c.epoch, min(1.0, share), tuple(c.losses))

    def done(self) -> bool:
        """Whether epochs, steps or patience are used up."""
        c, train = self.cursor, self.config.train
        stale = len(c.losses) - 1 - c.losses.index(min(c.losses)) if c.losses else 0
        spent = bool(train.max_steps) and c.step >= train.max_steps
        return c.epoch >= train.epochs or spent or (train.patience > 0 and stale >= train.patience)

    def step(self) -> dict[str, Any]:
        """Trains on one window and returns its numbers; raises RunError before any weight moves if one is not finite."""
        cfg, c = self.config, self.cursor
        length = window_length(cfg.data, cfg.train.seed, c.step)
        inputs, targets = (torch.from_numpy(a).to(self.device) for a in self.streams.window(c.position, length))
        generator = seed_for_step(self.generator, cfg.train.seed, c.step)
        out = self.model(inputs, self.state, cfg.dropout, generator)
        terms = objective.terms(self.model, out, targets, cfg.objective)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        numbers = torch.stack([norm, *(term.detach().float() for term in terms.values())]).tolist()
        if not all(map(math.isfinite, numbers)):
            gone = objective.explain_nonfinite(dict(zip(terms, numbers[1:], strict=True)), self.model, self.state)
            self.optimizer.zero_grad(set_to_none=True)
            raise RunError(
                f"Step {c.step + 1}: {gone}. No weight was changed; "
                "go on with a lower optimizer.lr or a tighter optimizer.clip and --resume auto."
            )
        if cfg.optimizer.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, cfg.optimizer.clip, norm)
        lr = cfg.optimizer.lr * self.schedule(cfg.schedule, self.progress())
        if cfg.data.rescale_lr:
            lr *= length / cfg.data.bptt
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaging.update(self.parameters)
        self.state = detach(out.state)
        c.step, c.position = c.step + 1, c.position + length
        c.epoch_nats, c.epoch_targets = (
            c.epoch_nats + numbers[1] * targets.numel(),
            c.epoch_targets + targets.numel(),
        )
        return {
            "loss_nats": numbers[1], "objective": math.fsum(numbers[1:]), "grad_norm": numbers[0], "lr": lr,
            "length": length, "tokens": targets.numel(),
        }  # fmt: skip

    # ---- validation, model, checkpoint ----------------------------------------------------------------------

    def validate(self, monitor: Monitor, started: float, keep: bool = True) -> None:
        """Measures the (averaged) weights on the valid split, keeps them if best, and starts averaging if due.

        Without `keep` nothing that decides how the run goes on changes, so a resumed run equals an unbroken one.
        """
        c, data = self.cursor, self.config.data
        split = "valid" if "valid" in self.store.splits else "train"
        ids = self.store.ids(split)
        with applied(self.averaging, self.parameters):
            loss = mean_loss(self.model, ids, self.tokenizer.boundary_id, data.eval_batch_size, data.counting)
            if not math.isfinite(loss):
                raise RunError(f"Step {c.step}: the validation loss is {loss}; the best weights so far are kept.")
            averaged = self.averaging.weights() is not None
            best = loss < c.best
            if best:
                c.best = loss if keep else c.best
                self.best_weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if keep:
            c.losses.append(loss)
        fired = keep and self.averaging.observe(c.losses)
        train_loss = c.epoch_nats / max(1, c.epoch_targets)
        values = {
            "epoch": c.epoch + 1, "loss_nats": loss, "ppl": math.exp(min(loss, 700)), "train_loss_nats": train_loss,
            "averaged": averaged, "best": best, "averaging_starts": fired, "seconds": c.seconds + time.monotonic() - started,
        }  # fmt: skip
        monitor.record("valid", c.step, **values)
        notes = ", ".join(n for n, on in (("averaged", averaged), ("best", best), ("averaging starts", fired)) if on)
        monitor.say(
            f"epoch {c.epoch + 1}  step {c.step}  train loss {train_loss:.4f}  {split} loss {loss:.4f}  "
            f"ppl {values['ppl']:,.2f}  {loss / math.log(2):.3f} bits/token  {values['seconds']:.0f} s"
            + (f"  ({notes})" if notes else "")
        )

    def publish(self) -> None:
        """Writes the best weights so far as the run directory's model."""
        c = self.cursor
        if self.best_weights is None and not directory.exists(self.folder):  # stopped before any validation
            with applied(self.averaging, self.parameters):
                self.best_weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if self.best_weights is None:
            return
        facts = {
            "parameters": sum(p.numel() for p in self.parameters),
            "step": c.step,
            "epoch": c.epoch,
            "best_valid_loss_nats": c.best if c.losses else None,
        }
        directory.write(self.folder, self.model, self.best_weights, self.tokenizer.to_json(), facts)
        files.write_atomic(self.folder / "README.md", model_card(self.config, self.store, self.model, c.best, c.step))
        self.best_weights = None

    def save(self, started: float) -> None:
        """Saves everything that decides how the run goes on, the model first."""
        c = self.cursor
        named = dict(self.model.named_parameters())
        if bad := objective.first_nonfinite(dict(named)):
            raise RunError(
                f"Step {c.step}: the weight {bad} is not finite, so no checkpoint was written; resume an older one."
            )
        self.publish()
        mean, mean_values = self.averaging.state()
        tensors = {f"model.{name}": p.detach() for name, p in named.items()}
        tensors |= {f"optimizer.{name}": t for name, t in checkpoint.flatten_optimizer(self.optimizer).items()}
        tensors |= {f"averaging.{name}": t for name, t in mean.items()}
        # Leaves may be one tensor seen twice (zeros at an epoch's start) or parts of a larger one.
        tensors |= {f"state.{i}": t.clone() for i, t in enumerate(state_leaves(self.state))}
        cursor = asdict(c) | {"seconds": c.seconds + time.monotonic() - started}
        cursor["best"] = c.best if math.isfinite(c.best) else None
        values = {
            "cursor": cursor,
            "averaging": mean_values,
            "config": to_dict(self.config),
            "store": self.store.hash,
        }
        checkpoint.save(self.folder / "checkpoints", c.step, tensors, values, self.config.train.keep_checkpoints)
        self.saved_at = time.monotonic()

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continues from a checkpoint; refuses another text, tokenizer or model."""
        if saved.values["store"] != self.store.hash:
            raise DataError(
                f"{self.store.path}: the text or tokenizer changed since step {saved.step}; resume with the data "
                "that the run was started with, or start a new run with another -o."
            )
        now = to_dict(self.config)
        for section in ("data", "tokenizer", "model"):
            for key, value in saved.values["config"].get(section, {}).items():
                if now[section].get(key) != value and (section, key) != ("data", "path"):
                    raise ConfigError(
                        f"{section}.{key} is {now[section].get(key)!r}, but the run was started with {value!r}; "
                        "use that, or start a new run with another -o."
                    )

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t.to(self.device) for k, t in saved.tensors.items() if k.startswith(prefix)}

        try:
            self.model.load_state_dict(part("model."))
            checkpoint.restore_optimizer(self.optimizer, part("optimizer."))
            self.averaging.restore(part("averaging."), saved.values["averaging"])
            leaves = part("state.")
            order = iter(range(len(leaves)))
            self.state = map_state(lambda old: leaves[str(next(order))].to(old.dtype), self.state)
            cursor = dict(saved.values["cursor"])
        except (KeyError, RuntimeError, ValueError, StopIteration) as error:
            raise CheckpointError(
                f"step {saved.step}: the checkpoint does not fit this configuration ({error})."
            ) from None
        cursor["best"] = math.inf if cursor["best"] is None else cursor["best"]
        self.cursor = Cursor(**cursor)

    # ---- the loop -------------------------------------------------------------------------------------------

    def run(self, max_seconds: float = math.inf) -> Result:
        """Trains until the epochs or steps are done, patience ends, time is up or a signal asks to stop."""
        c, train = self.cursor, self.config.train
        files.write_atomic(self.folder / "config.toml", to_toml(self.config))
        started, first = time.monotonic(), c.step
        monitor = Monitor(self.folder, c.step, train.tensorboard, self.quiet)
        for note in self.notes:
            monitor.say(note)
        try:
            with interrupt.listening() as wish, precision.applied(self.precision):
                while not self.done() and not wish.signal and time.monotonic() - started < max_seconds:
                    self._one(monitor, started)
                if not self.done() and not wish.signal:  # out of time: measure what is there, off the record
                    self.validate(monitor, started, keep=False)
                if c.step > first:
                    self.save(started)
        except RunError:
            if not (self.folder / "checkpoints" / f"step-{c.step}").exists() and c.step > first:
                self._save_if_sound(started)
            raise
        finally:
            monitor.close()
        return Result(c.step, c.epoch, c.best, c.seconds + time.monotonic() - started, wish.signal, self.done())

    def _save_if_sound(self, started: float) -> None:
        try:
            self.save(started)
        except RunError:
            return  # the first error is the one to read

    def _one(self, monitor: Monitor, started: float) -> None:
        """One step and what is due after it."""
        c, train = self.cursor, self.config.train
        numbers = self.step()
        monitor.step(c.epoch, self.progress().share, numbers["loss_nats"], numbers["tokens"])
        if c.step % train.log_every == 0:
            monitor.record("step", c.step, **numbers, tokens_per_s=monitor.rate if math.isfinite(monitor.rate) else 0.0)
        if train.sample_every and c.step % train.sample_every == 0:
            text = self.sample()
            monitor.record("sample", c.step, text=text)
            monitor.say(f"sample at step {c.step}: {text!r}")
        ended = c.position >= self.streams.train_length
        ending = (ended and c.epoch + 1 >= train.epochs) or (bool(train.max_steps) and c.step >= train.max_steps)
        if ending or (c.step % train.eval_every == 0 if train.eval_every else ended):
            self.validate(monitor, started)
        if ended:
            c.epoch, c.position, c.epoch_nats, c.epoch_targets = c.epoch + 1, 0, 0.0, 0
            self.state = self.model.initial_state(self.config.data.batch_size)
        due = ended and time.monotonic() - self.saved_at >= train.checkpoint_seconds
        if not self.done() and (due or (train.checkpoint_every and c.step % train.checkpoint_every == 0)):
            self.save(started)

    def sample(self, count: int = 60) -> str:
        """A short text from the current (averaged) weights."""
        ids = self.tokenizer.encode(self.config.train.sample_prompt).tolist() if self.config.train.sample_prompt else []
        start = [self.tokenizer.boundary_id, *ids]
        generator = torch.Generator().manual_seed(self.config.train.seed)
        with applied(self.averaging, self.parameters):
            drawn = list(sample_ids(self.model, start, count, Sampling(temperature=0.8), generator))
        return self.tokenizer.decode(ids + drawn)
