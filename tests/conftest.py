"""What the tests share: no network, one place for outputs, and a teacher that is made on the spot.

Heavy imports wait until a fixture needs them, so that tests of the config alone stay quick.
"""

import functools
import gc
import os
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from minilm_exp.resolvers import register_resolvers

# Before any library that reads them is imported; child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).resolve().parents[1]
LOCAL = ("127.", "::1", "localhost")
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(autouse=True)
def closed_network(monkeypatch):
    """A connection to another machine is an error, so no test can lean on the network."""

    def guard(method):
        def guarded(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                if not str(address[0]).startswith(LOCAL):
                    raise OSError(f"the tests have no network, but {address} was asked for")
            return method(self, address)

        return guarded

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard(getattr(socket.socket, name)))


@pytest.fixture(scope="session", autouse=True)
def quick_collection():
    """Takes what is imported out of the garbage collection, a second, that ends each training."""
    if "transformers" in sys.modules:
        import transformers.trainer  # noqa: F401
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def ready_database(request, monkeypatch):
    """MLflow's database is copied, not made, but in tests of how it is made."""
    tracking = sys.modules.get("minilm_exp.tracking")
    if tracking is not None and request.node.get_closest_marker("makes_database") is None:
        from preloaded import write_database

        monkeypatch.setattr(tracking, "_create_whole", write_database)


class Cluster:
    """A Postgres server of the tests' own."""

    def __init__(self):
        found = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr/local").glob("pgsql/bin")]
        if on_path := shutil.which("initdb"):
            found.append(Path(on_path).resolve().parent)
        if not found:
            pytest.skip("Postgres is not installed")
        self._programs = found[-1]
        self._folder = Path(tempfile.mkdtemp(prefix="minilm_exp-postgres-", dir="/tmp"))
        # Postgres refuses to run as root.
        self._as_user = []
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres")
            self._as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"postgresql://minilm@127.0.0.1:{self._port}/postgres"
        initdb = [self._programs / "initdb", "-D", self._folder / "data", "-U", "minilm"]
        subprocess.run(
            [*self._as_user, *initdb, "-A", "trust", "--no-sync"],
            check=True, capture_output=True, cwd=self._folder,
        )  # fmt: skip
        self.start()

    def start(self):
        self._server = subprocess.Popen(
            [*self._as_user, self._programs / "postgres", "-D", self._folder / "data",
             "-k", self._folder, "-h", "127.0.0.1", "-p", str(self._port), "-F"],
            cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        ready = [self._programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self._port), "-q"]
        while subprocess.run(ready, check=False).returncode and time.monotonic() < deadline:
            time.sleep(0.1)

    def stop(self):
        self._server.send_signal(signal.SIGINT)  # which does not wait for clients
        self._server.wait(30)

    def remove(self):
        if self._server.poll() is None:
            self.stop()
        shutil.rmtree(self._folder)


@pytest.fixture(scope="session")
def postgres():
    """Address of a Postgres database, of a cluster of its own that ends with the tests."""
    cluster = Cluster()
    yield cluster.url
    cluster.remove()


@pytest.fixture
def cluster():
    """A Postgres server that a test may stop."""
    own = Cluster()
    yield own
    own.remove()


def new_database(server):
    """Address of a new database in a Postgres server."""
    from sqlalchemy import NullPool, create_engine, make_url, text

    name = f"tests_{time.time_ns()}"
    engine = create_engine(server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return str(make_url(server).set(database=name))


@pytest.fixture(params=["sqlite", "postgres"])
def studies(request, tmp_path):
    """Address of a new database for studies."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/optuna.db"
    return new_database(request.getfixturevalue("postgres"))


@pytest.fixture(scope="session")
def compose_config():
    """Gives the composed, untyped config for overrides such as "teacher=bert_base"."""
    register_resolvers()

    @functools.cache
    def composed(*overrides):
        with initialize_config_dir(str(REPOSITORY / "conf")):
            return compose("config", list(overrides))

    return lambda *overrides: composed(*overrides).copy()


@pytest.fixture
def settings_for(compose_config, tmp_path):
    """Gives the parsed settings for overrides such as "student=tiny"; outputs in tmp_path.

    What is in `values` is set after composing, which is slow and done once for equal overrides.
    """
    from minilm_exp.parsing import parse

    def parsed(*overrides, values=None, teacher_was_chosen=True):
        config = compose_config(*overrides)
        for name, value in (values or {}).items():
            OmegaConf.update(config, name, value)
        if not any(override.startswith("outputs_dir=") for override in overrides):
            config.outputs_dir = str(tmp_path / "outputs")
        # It costs a second, and is for tests that look at it.
        if not any(override.startswith("report=") for override in overrides):
            config.report = False
        return parse(config, teacher_was_chosen)

    return parsed


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A BERT tokenizer whose words are spelt letter by letter, so no ASCII text is unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits
    words = ["the", "and", "of", "model", "student", "teacher", "##s", "##ing"]
    tokens = dict.fromkeys(
        [*SPECIAL_TOKENS, *letters, *(f"##{c}" for c in letters), *string.punctuation, *words]
    )
    backend = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session")
def tiny_bert(tiny_tokenizer):
    """A random BERT of 4 layers and 32 dimensions; its feed-forward is not 4 x as wide."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(11)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


@pytest.fixture(scope="session")
def tiny_teacher_folder(tiny_bert, tiny_tokenizer, tmp_path_factory):
    """That BERT and its tokenizer as a folder for teacher.path. Read it; write to a copy."""
    folder = tmp_path_factory.mktemp("models") / "tiny_bert"
    tiny_bert.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings_of(compose_config, tiny_teacher_folder, tmp_path):
    """Settings of a recipe that a user wrote, on a tiny teacher of 4 layers and 32 dimensions."""
    from minilm_exp.parsing import parse

    text = tmp_path / "text.txt"
    passages = [f"the model number {i} and the teacher" for i in range(400)]
    text.write_text("\n\n".join("\n".join(passages[i : i + 4]) for i in range(0, 400, 4)))

    def made(recipe_stages, *overrides, **values):
        config = compose_config(
            "experiment=smoke", "baseline.num_batches=1",
            "teacher=custom", f"teacher.path={tiny_teacher_folder}",
            "student.hidden_size=32", "student.num_attention_heads=4", "task=none",
            "relation_set.num_relation_heads=4",
            "corpus=text_files", f"corpus.files=[{text}]", "report=false", *overrides,
        )  # fmt: skip
        OmegaConf.set_struct(config, False)
        config.outputs_dir = str(tmp_path / "outputs")
        if recipe_stages is not None:
            config.recipe.name = "mine"
            config.recipe.stages = recipe_stages
        for name, value in values.items():
            OmegaConf.update(config, name, value)
        return parse(config)

    return made
