"""What the documents tell a reader to type, and how a test can do it.

To add a document's command nothing is needed where its words are known; else a line in one of the
tables below.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "sweeps" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]

# What a reader puts in: by the word in the document, what the test's folder has in its place.
PLACES = {
    "outputs/runs/NAME/stages/relations/student": "model",
    "DIR_OR_HUB_ID": "model",
    "FOLDER": "model",
    "MY_CLASSIFIER": "classifier",
    "MY_SENTENCE_ENCODER": "sentence_encoder",
    "LARGE": "model",
    "data_root=DIR": "data_root=data",
    "outputs_dir=/shared/outputs": "outputs_dir=outputs",
    "outputs_dir=DIR": "outputs_dir=outputs",
    "tracking.uri=...": "tracking.uri=http://127.0.0.1:5000",
    "tracking.studies=...": "tracking.studies=postgresql://minilm@127.0.0.1:5432/optuna",
    "COMMON": "student=demo seed=1 task=stsb_similarity data_root=data corpus=text_files"
    " 'corpus.files=[en_*.txt]' 'recipe.models=[student,undistilled]' training.batch_size=32"
    " task_training.max_validation_examples=1500 training.warmup_steps=30"
    " training.checkpoint_steps=300 training.evaluation_steps=300",
}

# First words of blocks that show what a program says, or a picture.
SHOWN = (
    "model                         layers",
    "run folder ",
    "mean ± standard deviation",
    "4086 passed",
    "part of a step",
    "layers x hidden  heads",
    "text ---> tokens",
    "[CLS] source [SEP]",
    "run.py -> settings",
)

# Programs that are not ours and that a test does not start, and why.
ELSEWHERE = {
    "docker": "needs Docker; tests/test_deploy.py reads the file",
    "createdb": "needs a Postgres server of the reader's",
    "ssh": "needs another machine",
    "cp": "copies a file",
    "mkdir": "Debian's wordnet-base",
    "cd": "Debian's wordnet-base",
    "touch": "Debian's wordnet-base",
    "seq": "Debian's wordnet-base",
    "source": "the shell's",
    ".venv/bin/pre-commit": "changes the checkout",
}

# run.py commands that the slow test does not start, by a word in them, and why. The quick test
# composes and parses them all the same.
NOT_RUN = {
    "tracking.studies=": "needs Postgres and a server; tests/test_launchers.py, test_claims.py",
    "hydra/launcher=submitit_slurm": "needs Slurm; tests/test_launchers.py reads its script",
    "-sc install=": "needs a shell of the reader's; tests/test_docs.py drives what it installs",
    "torchrun": "needs as many GPUs; tests/test_processes.py runs two processes",
}


@dataclass(frozen=True)
class Command:
    """One command of a document."""

    document: Path
    line: int
    words: tuple[str, ...]

    @property
    def program(self):
        """The first word that sets no variable of the environment."""
        return next(word for word in self.words if not re.match(r"[A-Z_]+=", word))

    @property
    def arguments(self):
        return list(self.words[self.words.index(self.program) + 1 :])

    @property
    def name(self):
        """For people."""
        document = self.document.relative_to(REPOSITORY)
        return f"{document}:{self.line} {' '.join(self.words)}"[:110]


def blocks(document):
    """Kind ("" for indented ones), first line and lines of each block of code."""
    lines = document.read_text("utf-8").splitlines()
    found, number = [], 0
    while number < len(lines):
        fence = re.match(r"( *)```(\w*)", lines[number])
        if fence:
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            indent = len(fence[1])
            body = [line[indent:] for line in lines[number + 1 : end]]
            found.append((fence[2] or "text", number + 2, body))
            number = end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(("", number + 1, lines[number:end]))
            number = end
        else:
            number += 1
    return found


def commands_of(document):
    """Each command of the blocks that are no Python, YAML or output."""
    commands = []
    for kind, first, body in blocks(document):
        if kind not in ("", "bash", "sh", "text") or _is_shown(body):
            continue
        joined, start = "", first
        for number, line in enumerate(body, start=first):
            if not joined:
                start = number
            joined += line.strip().removesuffix("\\") + " "
            if not line.endswith("\\"):
                for place, value in PLACES.items():
                    joined = re.sub(rf"(?<![\w/-]){re.escape(place)}(?![\w/-])", value, joined)
                commands += [
                    Command(document, start, tuple(words)) for words in _split(joined) if words
                ]
                joined = ""
    return commands


def _is_shown(body):
    return not any(body) or body[0].strip().startswith(SHOWN)


def _split(line):
    """Words of each command of a line."""
    if line.lstrip().startswith(("eval ", "#")):
        return [line.strip().split(maxsplit=1)] if line.lstrip().startswith("eval ") else []
    words, found = shlex.split(line, comments=True), [[]]
    for word in words:
        if word in ("&&", "|"):
            found.append([])
        elif word == ">":
            break
        else:
            found[-1].append(word)
    return found


def files_of(document):
    """The files that a document has a reader write: path and content of each."""
    for kind, _, body in blocks(document):
        named = re.fullmatch(r"# ((?:mine|conf|sweeps)/\S+\.(?:yaml|table))", body[0].strip())
        if kind == "yaml" and named:
            yield named[1], "\n".join(body[1:]) + "\n"


COMMANDS = [command for document in DOCUMENTS for command in commands_of(document)]
