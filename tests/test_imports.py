"""The one direction of imports."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minilm_exp"
FILES = sorted(PACKAGE.rglob("*.py"))

# Later files may import earlier ones, never the other way.
ORDER = [
    "errors", "processes", "class_paths", "redaction", "locks", "studies", "resolvers", "trial",
    "hub", "sentence_modules", "teacher_facts", "checkpoint_code", "task_settings",
    "objective_settings",
    "settings", "budget", "checks", "parsing", "precision", "provenance",
    "relations_block", "relations_triton", "relations", "attention", "states", "terms",
    "head_terms", "prefix_lm", "writer", "generate", "objectives", "teacher", "heads", "student",
    "masking", "vocabulary",
    "documents", "corpus", "shuffle", "teacher_cache", "progress", "profiling",
    "checkpoints", "distil",
    "tasks.examples", "tasks.splits", "tasks.tables", "tasks.data",
    "tasks.next_passage", "tasks.answers", "tasks.spans", "tasks.seq2seq", "tasks.text_scores",
    "tasks.metrics", "tasks.encode", "tasks.finetune", "tasks.similarity", "tasks.teacher_labels",
    "speed", "result", "sizing",
    "claims", "run_folder", "student_folder", "plots", "tracking", "stages", "task_stages",
    "downstream", "exported", "export", "export_comparison", "run_exports", "licences",
    "model_card", "pushing", "result_table", "report_page", "heat_maps", "disagreement",
    "run_report", "delivery", "pipeline", "quick_search", "summary", "estimate", "sweep_record",
    "pareto", "paper", "table_spec", "table_data", "tables", "figures", "sweep_report",
    "sweep_summary", "sweeping", "report", "launching",
]  # fmt: skip


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_every_file_has_its_place():
    """A new file that no one has put in order."""
    names = {name_of(path) for path in FILES if path.name != "__init__.py"}
    assert names == set(ORDER)


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py"], ids=name_of)
def test_imports_point_back(path):
    """A cycle, or the loss that begins to know of the trainer."""
    own = ORDER.index(name_of(path))
    for module in imported(path):
        if module.startswith("minilm_exp."):
            assert ORDER.index(module.removeprefix("minilm_exp.")) < own, module


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("hydra", {"launching", "sweeping"}),
        ("optuna", {"studies", "sweeping"}),
        ("mlflow", {"tracking"}),
        (
            "omegaconf",
            {
                "class_paths",
                "resolvers",
                "parsing",
                "task_settings",
                "objective_settings",
                "launching",
                "quick_search",
                "sizing",
                "sweeping",
            },
        ),
    ],
)
def test_libraries_stay_in_their_place(library, allowed):
    """A second place that talks to the same library and does it differently."""
    users = {
        name_of(path)
        for path in FILES
        if any(module.split(".")[0] == library for module in imported(path))
    }
    assert users == allowed


def test_the_loss_needs_torch_only():
    """A loss that cannot be used without the rest."""
    modules = {
        module.split(".")[0]
        for path in PACKAGE.glob("relations*.py")
        for module in imported(path)
        if module != "minilm_exp.errors"
    }
    assert modules <= set(sys.stdlib_module_names) | {"torch", "triton", "minilm_exp"}
