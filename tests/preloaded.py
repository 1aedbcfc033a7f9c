"""What each process of a test would do again, done once: imports, and MLflow's empty database.

The server that runs are forked from imports it (tests/running.py), and so do tests that write to
MLflow (tests/conftest.py).
"""

import functools
import sqlite3
import tempfile
from contextlib import suppress
from pathlib import Path

import alembic.command  # noqa: F401
import hydra.main  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import mlflow.store.db.utils as schema
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import PIL.Image
import transformers.models.bert.modeling_bert  # noqa: F401
from hydra.core.plugins import Plugins
from sqlalchemy import Engine, event

import minilm_exp.launching
import minilm_exp.parsing
import minilm_exp.pipeline
import minilm_exp.summary
import minilm_exp.sweeping  # noqa: F401
from minilm_exp import tracking

Plugins.instance()  # imports those of Hydra
PIL.Image.init()  # imports a module for each format
# MLflow reads its 100 migrations for each database that it opens, to know which is the latest.
schema._get_latest_schema_revision = functools.cache(schema._get_latest_schema_revision)


@event.listens_for(Engine, "connect")
def _write_without_waiting(connection, _):
    """SQLite waits for the disk at each commit, which only a power cut can tell apart."""
    if isinstance(connection, sqlite3.Connection):
        with suppress(sqlite3.DatabaseError):  # the first query tells it
            connection.execute("PRAGMA synchronous=OFF").close()


def _empty_database():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mlflow.db"
        tracking._create_whole(f"sqlite:///{file}")
        return file.read_bytes()


_EMPTY = _empty_database()


def write_database(uri):
    """In place of `tracking._create_whole`, which takes seconds: the same file where none is."""
    file = tracking.sqlite_file(uri)
    if file is not None and not file.exists():
        partial = file.with_name(f"{file.name}.partial")
        partial.write_bytes(_EMPTY)
        partial.replace(file)
