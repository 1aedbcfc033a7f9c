"""Distillation of a teacher into a student, on transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.profiler import record_function
from torch.utils.data import DataLoader, Subset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from minilm_exp import processes
from minilm_exp.checkpoints import CheckpointedTrainer, step_of, take_up, tensors_only
from minilm_exp.corpus import PreparedCorpus
from minilm_exp.errors import ExperimentError
from minilm_exp.masking import Masker
from minilm_exp.objectives import Objective
from minilm_exp.precision import teacher_dtype
from minilm_exp.profiling import FORWARD_AND_BACKWARD, LOSS, STUDENT, TEACHER, StepProfiler
from minilm_exp.progress import TokenProgress
from minilm_exp.settings import Settings
from minilm_exp.shuffle import ShuffleSampler
from minilm_exp.states import (
    HEAD_STATES,
    OUTPUT,
    QKV,
    State,
    StateTap,
    layers_of,
    qkv_states,
)
from minilm_exp.student import untrained_parameters
from minilm_exp.teacher_cache import TeacherCaches

LogMetrics = Callable[[dict[str, float], int], None]

_log = logging.getLogger(__name__)
# Between the seeds of two processes, whose dropout would else be the same.
_SEED_STRIDE = 1_000_003
# In the place of a step.
_VALIDATION = -1


class Distiller(nn.Module):
    """Teacher and student side by side, both run no further than the objective needs.

    The teacher is no submodule: it stays in evaluation mode, gets no optimiser state and is in no
    checkpoint.

    Args:
        teacher: Frozen model.
        student: Model that is trained.
        objective: What is minimised; its linear maps are trained too.
        teacher_dtype: What the teacher's states are rounded to, cached or not.
        caches: Of the query, key and value of the one teacher layer that the objective needs, for
            the parts "train" and "validation"; without them the teacher runs each time.
        teacher_ids: The teacher's id of each token of the student, where those differ.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        objective: Objective,
        teacher_dtype: torch.dtype = torch.float32,
        caches: TeacherCaches | None = None,
        teacher_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._teacher_ids: Tensor | None
        self.register_buffer("_teacher_ids", teacher_ids, persistent=False)
        wanted = objective.teacher_states
        if caches is not None:
            wanted = set(qkv_states(next(iter(wanted)).layer))
        self._teacher = (StateTap(teacher, wanted),)
        self.teacher_is_sharded = isinstance(teacher, FSDPModule)
        self.student = StateTap(student, objective.student_states)
        self.objective = objective
        self.teacher_dtype = teacher_dtype
        self.caches = caches
        self._compiled: list[nn.Module] = []

    def forward(
        self,
        attention_mask: Tensor | None = None,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        return_loss: bool = True,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """The loss, and `terms`: those of `objective.names` without weight, and the loss again.

        `inputs` are those of the student: input_ids, and token_type_ids where it has them. `index`
        numbers the examples in their part: training's in training mode, else validation's.
        """
        with record_function(TEACHER):
            teacher_states = self._teacher_states(inputs, attention_mask, index)
        with record_function(STUDENT):
            student_states = self.student(attention_mask=attention_mask, **inputs)
        with record_function(LOSS):
            loss, terms_T = self.objective(teacher_states, student_states, attention_mask, labels)
        return {"loss": loss, "terms": torch.cat([terms_T, loss.detach()[None]])}

    @torch.no_grad()
    def _teacher_states(
        self, inputs: dict[str, Tensor], attention_mask: Tensor | None, index: Tensor | None
    ) -> dict[State, Tensor]:
        if not self.objective.teacher_states:
            return {}

        def run_teacher(rows: Tensor | slice) -> dict[State, Tensor]:
            mask = None if attention_mask is None else attention_mask[rows]
            taken = {name: tensor[rows] for name, tensor in inputs.items()}
            if self._teacher_ids is not None:
                taken["input_ids"] = self._teacher_ids[taken["input_ids"]]
            states = self._teacher[0](attention_mask=mask, **taken)
            if self.teacher_is_sharded:
                processes.give_back_shares(self._teacher[0].encoder)
            return states

        if self.caches is None or index is None:
            states = run_teacher(slice(None))
            return {state: tensor.to(self.teacher_dtype) for state, tensor in states.items()}
        cache = self.caches.train if self.training else self.caches.validation
        wanted = {state.name: state for state in self.objective.teacher_states}

        def run_by_name(rows: Tensor | slice) -> dict[str, Tensor]:
            return {state.name: tensor for state, tensor in run_teacher(rows).items()}

        cached = cache.states(index, sorted(wanted), attention_mask, run_by_name)
        return {wanted[name]: tensor for name, tensor in cached.items()}

    def compile_layers(self) -> None:
        """Has torch.compile translate the layers, but not their attention, nor those with a tap.

        A tapped layer may be left before its end. Nothing is compiled where modules are tapped by
        their path.
        """
        for tap in (*self._teacher, self.student):
            layers = layers_of(tap.encoder)
            above = {state for state in tap.wanted if state.name in (OUTPUT, *HEAD_STATES)}
            below = tap.wanted - above
            if any(state.name not in (*QKV, "hidden") for state in below):
                continue
            tapped = {max(state.layer - 1, 0) for state in below}
            end = len(layers) if above else max(tapped, default=0)
            self._compiled += [layers[i] for i in range(end) if i not in tapped]
        # Else dropout would draw other units than without compiling.
        torch._inductor.config.fallback_random = True
        for layer in self._compiled:
            layer.compile()

    def close(self) -> None:
        """Gives teacher and student back as plain models."""
        for layer in self._compiled:
            layer._compiled_call_impl = None  # there is no public way back
        self._teacher[0].close()
        self.student.close()


def distil(
    settings: Settings,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    objective: Objective,
    tokenizer: PreTrainedTokenizerFast,
    corpus: PreparedCorpus,
    precision: str,
    checkpoints: Path,
    log_metrics: LogMetrics,
    caches: TeacherCaches | None = None,
    profile_folder: Path | None = None,
    teacher_ids: Tensor | None = None,
    masker: Masker | None = None,
) -> dict[str, float]:
    """Trains the student in place and returns its final validation losses.

    Args:
        settings: The run; training, runtime and seed are used.
        teacher: Frozen model.
        student: Model that is trained. What the loss cannot reach keeps its weights.
        objective: What is minimised, made for these two.
        tokenizer: The student's; for padding, where the corpus is not packed.
        corpus: Blocks to train on and held-out ones.
        precision: fp32 or bf16.
        checkpoints: Folder for checkpoints; with settings.resume the last whole one is gone on
            from.
        log_metrics: Called with metrics and the step they belong to.
        caches: Of the teacher's states; None runs the teacher each time.
        profile_folder: Where a trace of a few steps is written, if anywhere.
        teacher_ids: The teacher's id of each token of the student, where those differ.
        masker: Masks tokens of every batch, for models with a head of masked language modelling.

    Returns:
        Of the held-out blocks the mean of each of `objective.names` ("query-query"), and of the
        whole objective ("total").

    Raises:
        ExperimentError: Fewer blocks than a batch, or a loss or gradient that is not finite.
        Interrupted: A signal ended the training, after a checkpoint.
    """
    training = settings.training
    if len(corpus.train) < training.batch_size:
        raise ExperimentError(
            f"the corpus has {len(corpus.train)} blocks to train on, fewer than"
            f" training.batch_size={training.batch_size}; give more text, or lower"
            " training.batch_size or corpus.block_length"
        )
    device = settings.runtime.device
    if settings.runtime.shard_teacher:
        layers = layers_of(teacher)
        teacher = cast(PreTrainedModel, processes.sharded(teacher, layers, device))
    else:
        nn.Module.to(teacher, device)
    nn.Module.to(student, device)
    objective.to(device)
    distiller = Distiller(
        teacher,
        student,
        objective,
        teacher_dtype(precision, settings.runtime.teacher_cache),
        caches,
        teacher_ids,
    )
    untrained = [student.get_parameter(name) for name in untrained_parameters(distiller.student)]
    for parameter in untrained:
        parameter.requires_grad_(False)
    trainer = _DistillationTrainer(
        model=distiller,
        args=_training_arguments(settings, precision, checkpoints),
        data_collator=Collator(tokenizer, corpus_is_packed=settings.corpus.packing),
        train_dataset=corpus.train,
        eval_dataset=corpus.validation.spread(training.evaluation_sequences),
        callbacks=[TokenProgress(training.batch_size * settings.corpus.block_length)]
        if processes.is_leader()
        else [],
        keep_checkpoints=training.keep_checkpoints,
        log_metrics=log_metrics,
        masker=masker,
    )
    trainer.remove_callback(PrinterCallback)
    profiler = None if profile_folder is None else StepProfiler(profile_folder)
    if profiler is not None:
        trainer.add_callback(profiler)
    start = processes.from_leader(lambda: take_up(checkpoints) if settings.resume else None)
    try:
        if settings.runtime.compile:
            distiller.compile_layers()
        set_seed(settings.seed + _SEED_STRIDE * processes.rank())
        if start is not None:
            _log.info("going on after step %d of %d", step_of(start), training.max_steps)
        if start is not None and step_of(start) >= training.max_steps:
            trainer.load(start)  # the library would train for one step more
        else:
            trainer.train_whole(start)
        return trainer.final_losses()
    finally:
        if profiler is not None:
            profiler.close()
        distiller.close()
        for parameter in untrained:
            parameter.requires_grad_(True)


class _DistillationTrainer(CheckpointedTrainer):
    """The library's training loop; only what is logged and evaluated is ours."""

    def __init__(self, log_metrics: LogMetrics, masker: Masker | None, **arguments: Any) -> None:
        super().__init__(
            subject="distillation",
            remedy="lower training.learning_rate, raise training.warmup_steps, or set"
            " training.precision=fp32",
            **arguments,
        )
        self._log_metrics, self._masker = log_metrics, masker
        self._evaluated: tuple[int, dict[str, float]] | None = None
        distiller: Distiller = arguments["model"]
        self._distiller = distiller
        self._names = [*distiller.objective.names, "total"]
        self.add_callback(_SetEpoch(self))

    def load(self, checkpoint: Path) -> None:
        """Weights and step, without training."""
        with tensors_only(checkpoint):
            self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def _get_train_sampler(self, train_dataset: Any = None) -> ShuffleSampler:
        """Whole steps only, so that an epoch's end is the same for every micro-batch size."""
        blocks: Any = self.train_dataset if train_dataset is None else train_dataset
        num_drawn = self.steps_per_epoch * self._batch_size
        self.sampler = ShuffleSampler(len(blocks), num_drawn, self.args.seed)
        return self.sampler

    @property
    def _batch_size(self) -> int:
        """Sequences of a step, over all processes; the library gives each its micro-batches."""
        own = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return own * processes.size()

    @property
    def steps_per_epoch(self) -> int:
        """Whole ones."""
        blocks: Any = self.train_dataset
        return len(blocks) // self._batch_size

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Of tied weights a copy, without which the library saves its own models only."""
        own: dict[str, Tensor] = {}
        places: set[int] = set()
        for name, tensor in self._distiller.state_dict().items():
            own[name] = tensor.clone() if tensor.data_ptr() in places else tensor
            places.add(tensor.data_ptr())
        super()._save(output_dir, own)

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        with record_function(FORWARD_AND_BACKWARD):
            return super().training_step(*arguments, **named)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**self._masked(inputs, self.state.global_step))
        loss = outputs["loss"]
        if model.training:
            terms_T = outputs["terms"]
            self._sums = terms_T if self._sums is None else self._sums + terms_T
            self._num_summed += 1
            self.note_loss(loss, inputs["index"].tolist())
        return (loss, outputs) if return_outputs else loss

    def _masked(self, inputs: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        if self._masker is None:
            return inputs
        ids, labels = self._masker(
            inputs["input_ids"], inputs.get("attention_mask"), inputs["index"], step
        )
        return inputs | {"input_ids": ids, "labels": labels}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" not in logs or self._sums is None:
            return
        sums = processes.sum_of_all(self._sums)
        means = (sums / (self._num_summed * processes.size())).tolist()
        self._sums, self._num_summed = None, 0
        metrics = {f"distill/loss/{name}": mean for name, mean in zip(self._names, means)}
        metrics["distill/learning_rate"] = logs["learning_rate"]
        metrics["distill/gradient_norm"] = float(logs["grad_norm"])
        self._log_metrics(metrics, self.state.global_step)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        losses = self.losses_on(self.eval_dataset)
        self._evaluated = self.state.global_step, losses
        self._log_metrics(
            {f"distill/validation/{name}": value for name, value in losses.items()},
            self.state.global_step,
        )
        metrics = {f"eval_{name}": value for name, value in losses.items()}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def final_losses(self) -> dict[str, float]:
        """Validation losses after the last step; taken anew where it was not evaluated."""
        if self._evaluated is not None and self._evaluated[0] == self.state.global_step:
            return self._evaluated[1]
        return self.losses_on(self.eval_dataset)

    @torch.no_grad()
    def losses_on(self, examples: Any) -> dict[str, float]:
        """Mean over sequences of each term, and of the whole."""
        model = self._distiller.eval()
        # Of several processes each takes its share, or all of it where they share the teacher too.
        own = range(processes.rank(), len(examples), processes.size())
        if self._distiller.teacher_is_sharded:
            own = range(len(examples))
        loader = DataLoader(
            Subset(examples, own),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            # Of its own, so that evaluating draws nothing that training would have drawn.
            generator=torch.Generator(),
        )
        sums = torch.zeros(len(self._names), dtype=torch.float64)
        num_sequences = 0
        for batch in loader:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                outputs = model(**self._masked(inputs, _VALIDATION))
            count = len(batch["input_ids"])
            sums += outputs["terms"].cpu().double() * count
            num_sequences += count
        model.train()
        total = processes.sum_of_all(torch.cat([sums, sums.new_tensor([num_sequences])]))
        means = (total[:-1] / total[-1]).tolist()
        losses = dict(zip(self._names, means))
        if not numpy.isfinite(losses["total"]):
            raise ExperimentError(
                f"the validation loss is {losses['total']} after step"
                f" {self.state.global_step}: lower training.learning_rate"
            )
        return losses


class Collator:
    """Stacks blocks of one length; pads examples of several and masks the padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, corpus_is_packed: bool) -> None:
        self.tokenizer = tokenizer
        self.corpus_is_packed = corpus_is_packed

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.corpus_is_packed:
            return {
                name: torch.stack([example[name] for example in examples])
                for name in ("input_ids", "index")
            }
        padded = self.tokenizer.pad(
            {"input_ids": [e["input_ids"].tolist() for e in examples]}, return_tensors="pt"
        )
        return {
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "index": torch.stack([example["index"] for example in examples]),
        }


class _SetEpoch(TrainerCallback):
    """Tells the sampler its epoch.

    The library does so through its loaders, but not through those of a run of several processes
    that begins within an epoch.
    """

    def __init__(self, trainer: _DistillationTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.sampler.set_epoch(state.global_step // self._trainer.steps_per_epoch)


def _training_arguments(settings: Settings, precision: str, checkpoints: Path) -> TrainingArguments:
    training, runtime = settings.training, settings.runtime
    share = processes.share(training.batch_size)
    microbatch_size = min(runtime.microbatch_size or share, share)
    if share % microbatch_size:
        raise ExperimentError(
            f"runtime.microbatch_size={microbatch_size} does not divide the {share} sequences of"
            f" training.batch_size={training.batch_size} that each of {processes.size()} processes"
            " computes: change one of them"
        )
    on_cpu = runtime.device == "cpu"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=training.max_steps,
        per_device_train_batch_size=microbatch_size,
        per_device_eval_batch_size=microbatch_size,
        gradient_accumulation_steps=share // microbatch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=training.warmup_steps,
        optim="adamw_torch_fused",
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=precision == "bf16",
        use_cpu=on_cpu,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=runtime.num_workers,
        dataloader_drop_last=True,
        dataloader_pin_memory=not on_cpu,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=training.evaluation_steps,
        save_strategy="steps",
        save_steps=training.checkpoint_steps,
        remove_unused_columns=False,
        label_names=[],
        # What the loss does not reach is left out, so there is nothing to look for.
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    # Several visible cards would silently multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
