"""python -m benchmarks: every figure of docs/performance.md, in one run and as ratios.

Ours, the naive form and the floor (both models whole, no loss) take turns in every round; a ratio
is taken within a round, and its median over the rounds is reported. One thread, fp32 and dropout
0.1 unless said.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import steps
from benchmarks.finetuning import QNLI_EXAMPLES, SST2_EXAMPLES, FinetuningSpeed
from benchmarks.generation import CachedDecoding
from benchmarks.measure import (
    alone,
    circumstances,
    median_ratio,
    seconds_in_turn,
    seconds_of,
)
from benchmarks.naive import padded_batches
from benchmarks.scale import (
    WholeTraining,
    packaged_text,
    settings,
    token_ids,
)
from benchmarks.steps import BASE, LARGE_ON_GPU, LONG, SHORT, Size, make_step
from minilm_exp.documents import read_documents
from minilm_exp.precision import resolve_precision
from minilm_exp.teacher import load_tokenizer


@dataclass
class Row:
    """One measured figure and what it should be."""

    section: str
    what: str
    value: float
    unit: str
    target: str = ""
    # What `--quick` fails at: far off, not merely missed.
    at_most: float | None = None
    at_least: float | None = None

    def is_far_off(self) -> bool:
        """Whether it is wrong by more than noise."""
        return (self.at_most is not None and self.value > self.at_most) or (
            self.at_least is not None and self.value < self.at_least
        )


def loss_alone(num_rounds: int, size: Size = LONG) -> list[Row]:
    """Value and gradient, without any model."""
    run = {name: steps.make_loss(name, size) for name in ("naive", "ours")}
    seconds = seconds_in_turn(run, num_rounds)
    memory = {v: alone("loss_memory", v, size.num_sequences, size.num_tokens) for v in run}
    what = f"loss alone, {size.num_sequences}x{size.num_tokens}"
    return [
        Row("1 loss", f"{what}: naive", 1e3 * median(seconds["naive"]), "ms"),
        Row("1 loss", f"{what}: ours", 1e3 * median(seconds["ours"]), "ms"),
        Row(
            "1 loss",
            f"{what}: time, ours / naive",
            median_ratio(seconds["ours"], seconds["naive"]),
            "x",
            "<= 0.20",
            at_most=0.5,
        ),
        Row("1 loss", f"{what}: memory, naive", memory["naive"], "MiB"),
        Row("1 loss", f"{what}: memory, ours", memory["ours"], "MiB"),
        Row(
            "1 loss",
            f"{what}: memory, ours / naive",
            memory["ours"] / memory["naive"],
            "x",
            "<= 0.05",
            at_most=0.2,
        ),
    ]


def loss_memory() -> list[Row]:
    """Memory of the loss against sequence length."""
    rows = []
    for num_tokens in (128, 256, 512, 1024, 2048):
        for variant in ("naive", "ours"):
            what = f"memory of the loss, 4x{num_tokens}: {variant}"
            rows.append(Row("1 memory", what, alone("loss_memory", variant, 4, num_tokens), "MiB"))
    return rows


def step_without_dropout(name: str, num_rounds: int) -> list[Row]:
    """The same where no slow attention, which dropout asks for on a processor, is saved."""
    size: Size = getattr(steps, name)
    inputs = steps.batch(size)
    made = {variant: make_step(variant, size, dropout=0.0) for variant in ("floor", "ours")}
    seconds = seconds_in_turn({v: partial(run, *inputs) for v, run in made.items()}, num_rounds)
    ratio = median_ratio(seconds["ours"], seconds["floor"])
    return [Row("1 step", f"{size}, dropout 0: ours / floor", ratio, "x")]


def step(name: str, num_rounds: int, target: float | None, with_memory: bool) -> list[Row]:
    """A whole training step."""
    size: Size = getattr(steps, name)
    inputs = steps.batch(size)
    made = {variant: make_step(variant, size) for variant in steps.VARIANTS}
    seconds = seconds_in_turn({v: partial(run, *inputs) for v, run in made.items()}, num_rounds)
    rows = [Row("1 step", f"{size}: {v}", 1e3 * median(seconds[v]), "ms") for v in seconds]
    rows.append(
        Row(
            "1 step",
            f"{size}: naive / floor",
            median_ratio(seconds["naive"], seconds["floor"]),
            "x",
        )
    )
    rows.append(
        Row(
            "1 step",
            f"{size}: ours / floor",
            median_ratio(seconds["ours"], seconds["floor"]),
            "x",
            f"<= {target}" if target else "",
            at_most=target * 1.5 if target else None,
        )
    )
    if with_memory:
        memory = {variant: alone("step_memory", variant, name) for variant in steps.VARIANTS}
        rows += [Row("1 step", f"{size}: memory, {v}", memory[v], "MiB") for v in memory]
        rows.append(
            Row(
                "1 step",
                f"{size}: memory, ours / floor",
                memory["ours"] / memory["floor"],
                "x",
                "<= 1.0",
                at_most=1.5,
            )
        )
    return rows


def layers(num_rounds: int, size: Size = SHORT) -> list[Row]:
    """What is saved by stopping at the tapped layers, in operations and in time."""
    runs = steps.cut_and_whole(size)
    seconds = seconds_in_turn(runs, num_rounds)
    flops = {}
    for name, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops[name] = counter.get_total_flops()
    return [
        Row(
            "2 layers",
            f"{size}: {model} cut / whole, {unit}",
            value,
            "x",
            at_most=1.0 if unit == "operations" else 1.3,
        )
        for model in ("teacher", "student")
        for unit, value in (
            ("operations", flops[f"{model} cut"] / flops[f"{model} whole"]),
            ("time", median_ratio(seconds[f"{model} cut"], seconds[f"{model} whole"])),
        )
    ]


def tokens(texts: list[str], num_rounds: int, num_batches: int, size: Size = SHORT) -> list[Row]:
    """The same step on packed blocks and on padded batches of the same text."""
    tokenizer = load_tokenizer(settings().teacher)
    examples = token_ids(texts, tokenizer, size.num_tokens)
    padded = [
        batch
        for batch, _ in zip(padded_batches(examples, size.num_sequences, 0), range(num_batches))
    ]
    packed = steps.batch(size)
    run = make_step("ours", size)
    num_real = sum(int(mask.sum()) for _, mask in padded)
    num_packed = max(1, num_real // (size.num_sequences * size.num_tokens))

    def run_padded() -> None:
        for inputs in padded:
            run(*inputs)

    def run_packed() -> None:
        for _ in range(num_packed):
            run(*packed)

    seconds = seconds_in_turn({"padded": run_padded, "packed": run_packed}, num_rounds)
    tokens_packed = num_packed * size.num_sequences * size.num_tokens
    ratio = median_ratio(seconds["padded"], seconds["packed"]) * tokens_packed / num_real
    share = num_real / sum(mask.numel() for _, mask in padded)
    return [
        Row("3 tokens", "real tokens in a padded batch", share, "of all"),
        Row(
            "3 tokens",
            f"{size}: real tokens a second, packed / padded",
            ratio,
            "x",
            ">= 1.8",
            at_least=1.2,
        ),
    ]


def precision(num_rounds: int, size: Size = SHORT) -> list[Row]:
    """What `training.precision=auto` gains here."""
    inputs = steps.batch(size)
    made = {name: make_step("ours", size, autocast=name == "bf16") for name in ("fp32", "bf16")}
    seconds = seconds_in_turn({v: partial(run, *inputs) for v, run in made.items()}, num_rounds)
    ratio = median_ratio(seconds["bf16"], seconds["fp32"])
    chosen = resolve_precision("auto", "cpu")
    return [Row("4 precision", f"{size}: step, bf16 / fp32 (auto is {chosen} here)", ratio, "x")]


def teacher_cache(num_rounds: int, size: Size, name: str) -> list[Row]:
    """A step that reads the teacher's states, against one that runs the teacher."""
    rows = []
    inputs = steps.batch(size)
    for how in ("fp32", "bf16"):
        made = {
            label: steps.make_cached_step(size, label == "cached", how)
            for label in ("uncached", "cached")
        }
        runs = {label: partial(run, *inputs) for label, (run, _) in made.items()}
        seconds = seconds_in_turn(runs, num_rounds)
        for _, folder in made.values():
            folder.cleanup()
        ratio = median_ratio(seconds["cached"], seconds["uncached"])
        rows.append(
            Row(
                "5 cache",
                f"{name}{size}: cached / uncached, {how}",
                ratio,
                "x",
                "<= 0.45",
                at_most=1.2,
            )
        )
    return rows


def together(texts: list[str], num_rounds: int, num_steps: int) -> list[Row]:
    """Real tokens a second of the whole training with default settings, all threads.

    Each text is an example of the naive form. Its second line has bf16 autocast as ours has.
    """
    rows = []
    with TemporaryDirectory() as folder:
        training = WholeTraining(texts, Path(folder), num_steps)
        training.ours(cached=True)  # fills the cache
        speeds = [
            (
                training.naive(num_steps, "fp32"),
                training.naive(num_steps, "bf16"),
                training.ours(cached=False),
                training.ours(cached=True),
            )
            for _ in range(num_rounds)
        ]
    naive, naive_bf16, ours, cached = (list(values) for values in zip(*speeds))
    threads = f"{torch.get_num_threads()} threads"
    names = ("naive", "naive in bf16", "ours", "ours, cached")
    for name, values in zip(names, (naive, naive_bf16, ours, cached)):
        rows.append(Row("6 together", f"{name}, {threads}", median(values), "tokens/s"))
    for name, values, target in (("ours", ours, 3), ("ours, cached", cached, 5)):
        ratio = median_ratio(values, naive)
        what = f"{name} / naive, {threads}"
        rows.append(Row("6 together", what, ratio, "x", f">= {target}", at_least=target / 2))
    ratio = median_ratio(ours, naive_bf16)
    rows.append(Row("6 together", f"ours / naive in bf16, {threads}", ratio, "x"))
    return rows


def on_gpu(num_rounds: int, size: Size = LARGE_ON_GPU) -> list[Row]:
    """The step on a CUDA device in bf16; nothing where there is none."""
    if not torch.cuda.is_available():
        return []
    inputs = steps.batch(size, "cuda")
    rows, runs = [], {}
    for variant in steps.VARIANTS:
        run = make_step(variant, size, "cuda", autocast=True)

        def synchronised(run: steps.Step = run) -> None:
            run(*inputs)
            torch.cuda.synchronize()

        runs[variant] = synchronised
        synchronised()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        synchronised()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows.append(Row("7 GPU", f"{size}: memory, {variant}", memory, "MiB"))
    seconds = seconds_in_turn(runs, num_rounds, 3, by_wall=True)
    for variant in runs:
        rows.append(Row("7 GPU", f"{size}: {variant}", 1e3 * median(seconds[variant]), "ms"))
    ratio = median_ratio(seconds["ours"], seconds["floor"])
    with FlopCounterMode(display=False) as counter:
        make_step("ours", size, "cuda", autocast=True)(*inputs)
    rate = counter.get_total_flops() / median(seconds["ours"]) / 1e12
    rows.append(Row("7 GPU", f"{size}: ours / floor", ratio, "x", "<= 1.15"))
    rows.append(Row("7 GPU", f"{size}: model operations a second, ours", rate, "TFLOP/s"))
    return rows


def scale(megabytes: tuple[int, int]) -> list[Row]:
    """Tokenising, its memory at two sizes, and how soon run.py answers."""
    python = sys.executable
    with TemporaryDirectory() as folder:
        rate = alone("corpus_speed", 10, folder)
        memory = [alone("corpus_memory", size, folder) for size in megabytes]
    starts = [
        ("--help", [python, "run.py", "--help"], 1.5),
        ("a config error", [python, "run.py", "student.hidden_size=100"], 2.0),
    ]
    rows = [Row("8 scale", "tokenise and pack, per core", rate, "MB/s", ">= 2", at_least=0.7)]
    for size, mib in zip(megabytes, memory):
        rows.append(Row("8 scale", f"memory to tokenise and pack {size} MB of text", mib, "MiB"))
    what = f"that of {megabytes[1]} / of {megabytes[0]} MB"
    rows.append(Row("8 scale", what, memory[1] / memory[0], "x", "~ 1", at_most=3.0))
    for what, command, target in starts:
        seconds = median(seconds_of(command) for _ in range(3))
        rows.append(
            Row("8 scale", f"run.py, {what}", seconds, "s", f"< {target}", at_most=2 * target)
        )
    return rows


def finetuning(
    texts: list[str], num_rounds: int, num_ours: int, num_plain: int, num_short: int, whole: bool
) -> list[Row]:
    """Examples a second of fine-tuning and evaluation, all threads, and of tokenising.

    Ours is in the precision that `auto` chooses, and with `whole` also in float32: that one beside
    the plain recipe is what padding costs, the rest is what precision gains.
    """
    auto = resolve_precision("auto", "cpu")
    precisions = {"fp32", auto} if whole else {auto}
    row, rows = partial(Row, "9 fine-tune"), []
    with TemporaryDirectory() as folder:
        speed = FinetuningSpeed(texts, num_ours, num_plain, Path(folder))
        for what, plain, ours in (
            ("fine-tuning", speed.train_plainly, speed.train),
            ("evaluation", speed.evaluate_plainly, speed.evaluate),
        ):
            what = f"{what}, {torch.get_num_threads()} threads"
            runs = {p: partial(ours, p) for p in sorted(precisions, reverse=True)}
            seconds = seconds_in_turn({"plain": plain, **runs}, num_rounds, 0, by_wall=True)
            speeds = {p: [num_ours / s for s in seconds[p]] for p in runs}
            plain_speeds = [num_plain / s for s in seconds["plain"]]
            rows.append(row(f"{what}: plain", median(plain_speeds), "examples/s"))
            for p in runs:
                rows.append(row(f"{what}: ours in {p}", median(speeds[p]), "examples/s"))
            for p in runs:
                ratio = median_ratio(speeds[p], plain_speeds)
                if p == auto:
                    name = f"{what}: ours in {p} (auto is {p} here) / plain"
                    rows.append(row(name, ratio, "x", "> 1", at_least=1.0))
                else:
                    rows.append(row(f"{what}: ours in {p} / plain", ratio, "x"))
        shares = {
            "plain": speed.plain_share(),
            f"ours, these {num_ours} examples": speed.real_share(num_ours),
            f"ours, {QNLI_EXAMPLES} examples as QNLI has": speed.real_share(QNLI_EXAMPLES),
        }
        for name, share in shares.items():
            rows.append(row(f"real tokens in a batch: {name}", share, "of all"))
        rate = num_short / speed.tokenise_seconds(texts, num_short, num_rounds)
    rows.append(row("tokenise sentences of about 10 words", rate, "examples/s"))
    what = f"that is, {SST2_EXAMPLES} of them, as SST-2 has"
    rows.append(row(what, SST2_EXAMPLES / rate, "s"))
    return rows


def decoding(num_rounds: int, num_sources: int, num_source_tokens: int) -> list[Row]:
    """48 tokens of each target, with a cache and with the prefix computed anew at every step."""
    rows = []
    for num_beams in (1, 5):
        case = CachedDecoding(num_sources, num_source_tokens, num_beams)
        runs = {
            "cached": lambda case=case: case.decode(use_cache=True),
            "anew": lambda case=case: case.decode(use_cache=False),
        }
        seconds = seconds_in_turn(runs, num_rounds, 0)
        what = f"48 tokens for {num_sources} sources of {num_source_tokens}, {num_beams} beams"
        for name in runs:
            rows.append(Row("10 decoding", f"{what}: {name}", median(seconds[name]), "s"))
        ratio = median_ratio(seconds["anew"], seconds["cached"])
        rows.append(Row("10 decoding", f"{what}: anew / cached", ratio, "x", "> 5", at_least=3.0))
    return rows


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Every section; the heavy ones smaller with --quick."""
    num_threads = torch.get_num_threads()
    packaged = texts = packaged_text()
    if arguments.text:
        corpus = settings(f"corpus.files=[{','.join(arguments.text)}]").corpus
        texts = list(read_documents(corpus))
    torch.set_num_threads(1)
    if arguments.quick:
        small = Size((4, 128, 4), (2, 64, 4), 8, 4, 256)
        return [
            *loss_alone(3),
            *step("SHORT", 3, 0.95, with_memory=False),
            *layers(2),
            *tokens(texts, 2, 10, Size((4, 128, 4), (2, 64, 4), 8, 16, 128)),
            *teacher_cache(3, small, ""),
            *scale((2, 10)),
            *_with_threads(
                num_threads, lambda: finetuning(packaged, 1, 256, 32, 5000, whole=False)
            ),
        ]
    sections: list[tuple[int, Callable[[], list[Row]]]] = [
        (1, lambda: loss_alone(7)),
        (1, loss_memory),
        (1, lambda: step("SHORT", 7, 0.95, with_memory=True)),
        (1, lambda: step("LONG", 7, 1.05, with_memory=True)),
        (1, lambda: step("BASE", 5, None, with_memory=True)),
        (1, lambda: step_without_dropout("SHORT", 7)),
        (1, lambda: step_without_dropout("LONG", 7)),
        (2, lambda: layers(7)),
        (3, lambda: tokens(texts, 5, 40)),
        (4, lambda: precision(7)),
        (5, lambda: teacher_cache(5, BASE, "")),
        (6, lambda: _with_threads(num_threads, lambda: together(texts, 5, 50))),
        (7, lambda: on_gpu(20)),
        (8, lambda: scale((50, 500))),
        (
            9,
            lambda: _with_threads(
                num_threads,
                lambda: finetuning(packaged, 3, 512, 128, SST2_EXAMPLES, whole=True),
            ),
        ),
        (10, lambda: decoding(2, 2, 256)),
    ]
    return [
        row
        for number, run in sections
        if arguments.section is None or number == arguments.section
        for row in run()
    ]


def _with_threads(num_threads: int, run: Callable[[], list[Row]]) -> list[Row]:
    torch.set_num_threads(num_threads)
    try:
        return run()
    finally:
        torch.set_num_threads(1)


def main() -> None:
    """Prints the table; writes JSON, or with --quick fails where a ratio is far off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under 2 minutes, for CI")
    parser.add_argument("--text", nargs="*", help="files for the sections tokens and together")
    parser.add_argument("--section", type=int, help="only this one, 1 to 10")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    files = {pattern: sorted(glob.glob(pattern)) for pattern in arguments.text or []}
    if not all(files.values()):
        parser.error(
            f"no file matches {[pattern for pattern, found in files.items() if not found]}"
        )
    arguments.text = [path for found in files.values() for path in found]
    output: Path | None = arguments.output
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    num_threads = torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = measure(arguments)
    for row in rows:
        print(f"{row.section:12} {row.what:78} {row.value:10.3f} {row.unit:9} {row.target}")
    if output:
        document: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
            **circumstances(),
            "threads": f"1; {num_threads} where it says so",
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        print(f"written to {output}")
    far_off = [row.what for row in rows if row.is_far_off()]
    if arguments.quick and far_off:
        sys.exit("far off: " + "; ".join(far_off))


if __name__ == "__main__":
    main()
