"""From the composed config to typed settings, checked before any model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minilm_exp.checks import (
    NO_TOKEN_IDS,
    check_baseline_values,
    check_corpus,
    check_export,
    check_finetune,
    check_init,
    check_objective,
    check_student,
    check_values,
    highest_init_layer,
)
from minilm_exp.errors import ExperimentError, key_of, reason_of
from minilm_exp.objective_settings import LabelTerm, LogitTerm, parse_terms, trains_head
from minilm_exp.settings import Settings, Stage, StageGiven, Student, max_tokens
from minilm_exp.task_settings import check_tasks, parse_changes, parse_tasks
from minilm_exp.teacher_facts import is_there, kind_of, pooling_of, read_facts


def parse(
    config: DictConfig,
    teacher_was_chosen: bool = True,
    typed: Container[str] = frozenset(),
    data: str = "corpus",
) -> Settings:
    """The typed settings of one run.

    Args:
        config: The composed config.
        teacher_was_chosen: False where the teacher group is at its default. A teacher.path then
            brings its own facts; otherwise they must agree with the chosen teacher's.
        typed: Names of the settings that were given on the command line; a teacher.path does not
            replace those.
        data: What the stage reads, of which these are the settings.

    Raises:
        ExperimentError: A key or value is wrong, missing, or does not fit another one.
    """
    config = config.copy()
    OmegaConf.set_struct(config, False)
    for name in ("notes", "stages", "data", "candidates"):
        if name in config:
            raise ExperimentError(
                f"there is no setting {name}: it is misspelt, or belongs elsewhere"
            )
    _check_form(config)
    given = (config.recipe.get("stages") or {}).values()
    is_objective_read = not given or any(node.get("objective") is None for node in given)
    read = [config.recipe, *([config.objective] if is_objective_read else [])]
    config.objective.reads_relation_set = "${relation_set." in OmegaConf.to_yaml(read)
    config.objective.is_read = is_objective_read
    if "objective" in typed and not is_objective_read:
        raise ExperimentError(
            f"objective={config.objective.name} makes no difference with"
            f" recipe={config.recipe.name}, whose stages name their own: leave it out, or choose"
            " objective@recipe.stages.STAGE.objective=NAME"
        )
    config.outputs_dir = os.path.abspath(os.path.expanduser(str(config.outputs_dir)))
    student_facts = _complete_student(config)
    budget = config.student.get("budget")
    if budget is not None and not isinstance(budget, DictConfig):
        raise ExperimentError(
            f"student.budget={budget!r:.100} is no group of settings: student.budget.speedup=4,"
            " .params=20M or .latency_ms=5"
        )
    is_open = config.student.get("num_layers", 0) is None
    if is_open and not OmegaConf.is_interpolation(config.student, "num_layers"):
        raise ExperimentError(
            "student=budget (experiment=compress) needs a budget: add student.budget.speedup=4,"
            " student.budget.params=20M or student.budget.latency_ms=5; or a shape: student=NAME"
        )
    notes = _complete_teacher(config, teacher_was_chosen, typed)
    try:
        # ${teacher.hidden_size} is that of the run's teacher, also in a stage that has another.
        OmegaConf.resolve(config.student)
        merged = OmegaConf.merge(OmegaConf.structured(Settings), config)
        settings = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ExperimentError(_explain(error)) from error
    assert isinstance(settings, Settings)
    settings.data = data
    settings.notes.extend(notes)
    settings.runtime.teacher_cache = settings.runtime.teacher_cache.lower()  # YAML's true and false
    settings.tasks = parse_tasks(settings.tasks)
    settings.objective.terms = parse_terms(settings.objective.terms)
    if settings.data_root is not None:
        settings.data_root = os.path.abspath(os.path.expanduser(settings.data_root))
    for name in ("relations", "relation_set", *(f"relation_set.{n}" for n in _RELATION_SETTINGS)):
        if name in typed and not settings.objective.reads_relation_set:
            named = f"objective={settings.objective.name}, which names"
            if not is_objective_read:
                named = f"recipe={settings.recipe.name}, whose objectives name"
            raise ExperimentError(
                f"{name} makes no difference with {named} their own relations: leave it out, or set"
                " those of the objective"
            )
    check_values(settings)
    check_baseline_values(settings.baseline)
    settings.stages = _parse_stages(config)
    if not settings.stages:
        _resolve_init(settings)
        if settings.recipe.name not in _WITHOUT_STAGES:
            raise ExperimentError(
                f"recipe={settings.recipe.name} has no stages: give recipe.stages, or choose one of"
                f" {', '.join(_WITHOUT_STAGES)}"
            )
    if settings.recipe.name == "teacher_assistant":
        settings.notes.append(_assistant_note(settings))
    if settings.recipe.name == "finetune":
        check_finetune(settings)
    elif not settings.stages:
        check_student(settings, student_facts)
        check_objective(settings)
        check_init(settings)
    if "corpus" not in settings.unread_groups:
        check_corpus(settings)
    check_export(settings)
    check_tasks(
        settings.tasks,
        settings.task_training,
        _max_tokens(settings, student_facts),
        _model_types(settings, student_facts),
    )
    return settings


def read_settings(file: Path) -> Settings:
    """The settings of a run as its folder keeps them.

    Raises:
        ExperimentError: They cannot be read, or do not hold here, as where a checkpoint is gone.
    """
    try:
        config = OmegaConf.create(yaml.safe_load(file.read_text(encoding="utf-8")))
        if not isinstance(config, DictConfig):
            raise ValueError("no settings by name")
        reads_relation_set = bool(config.objective.reads_relation_set)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ExperimentError(f"{file} cannot be read: {reason_of(error)}") from error
    settings = parse(config, typed={"teacher.revision"})
    # Told by its interpolations, which are resolved here.
    settings.objective.reads_relation_set = reads_relation_set
    return settings


# Groups that code reads before their types are known.
_GROUPS = ("teacher", "student", "objective", "recipe", "corpus", "tasks", "relation_set")
# What an option sets that conf/config.yaml does not.
_OF_GROUP = {"teacher": "weights", "student": "init"}
# Of a text in a config; the longest path of a file has 4096 bytes.
_LONGEST_TEXT = 4000


def _check_form(config: DictConfig) -> None:
    """Refuses a value where a group belongs, and text that is no text."""
    for name in _GROUPS:
        is_group = name in config and isinstance(config[name], DictConfig)
        if not is_group or _OF_GROUP.get(name, "") not in ("", *config[name]):
            raise ExperimentError(
                f"{name}={config.get(name)!r:.100} is no group of settings: choose an option"
                f" ({name}=NAME), or change one of its settings ({name}.SETTING=VALUE)"
            )
    stages = config.recipe.get("stages")
    if stages is not None and not isinstance(stages, DictConfig):
        raise ExperimentError(f"recipe.stages={stages!r:.100} must be stages by name")
    for key, stage in (stages or {}).items():
        if not isinstance(stage, DictConfig):
            raise ExperimentError(
                f"recipe.stages.{key!r}={stage!r:.100} must be settings of a stage"
            )
    for where, text in _texts(OmegaConf.to_container(config, resolve=False), ""):
        is_text = "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)
        if not is_text or len(text) > _LONGEST_TEXT:
            raise ExperimentError(
                f"{where}={text!r:.100} is no text: it has a NUL or half a character in it, or more"
                f" than {_LONGEST_TEXT} of them"
            )


def _texts(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text of nested data, names too, and where it stands."""
    if isinstance(node, str):
        yield where, node
    elif isinstance(node, (dict, list)):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            inner = f"{where}.{name}" if where else str(name)
            yield f"the name in {where or 'the config'}", str(name)
            yield from _texts(value, inner)


def _parse_stages(config: DictConfig) -> list[Stage]:
    """Each stage's settings are those of the run with the stage's own merged over them."""
    stages: dict[str, Stage] = {}
    for name in config.recipe.get("stages") or {}:
        where = f"recipe.stages.{name}"
        if name == "teacher":
            raise ExperimentError(f"{where}: teacher is the name of the run's own; choose another")
        try:
            node = OmegaConf.merge(OmegaConf.structured(StageGiven), config.recipe.stages[name])
            assert isinstance(node, DictConfig)
            # ${teacher.num_layers} is that of the run, not of the stage's own teacher.
            node._set_parent(config)
            given = {
                group: OmegaConf.to_container(node[group], resolve=True)
                for group in ("student", "layer_selection", "corpus", "training", "task_training")
            }
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ExperimentError(f"{where}: {_explain(error)}") from error
        for key in ("teacher", "start"):
            earlier = [*stages, "teacher"] if key == "teacher" else [*stages, None]
            if node[key] not in earlier:
                raise ExperimentError(
                    f"{where}.{key}={node[key]} is not one of the stages before it"
                    f" ({', '.join(stages) or 'there is none'})"
                )
        if node.start is not None and given["student"]:
            raise ExperimentError(
                f"{where}.student={given['student']}: the stage goes on with the student of"
                f" {node.start}, which has its shape; leave out student or start"
            )
        _check_reads(where, node, given, stages)
        changes_of_task: Any = given.pop("task_training")
        own = config.copy()
        own.recipe.name, own.recipe.stages = "task_agnostic", {}
        for group, changes in given.items():
            own[group] = OmegaConf.merge(own[group], changes)
        if node.objective is not None:
            own.objective = config.recipe.stages[name].objective
        if node.teacher != "teacher":
            _become_teacher(own, stages[node.teacher])
        if node.start is not None:
            _continue(own, stages[node.start].settings.student)
        try:
            settings = parse(own, data=node.data)
            stage = Stage(
                name, node.teacher, node.start, settings, changes_of_task, bool(node.head_only)
            )
            _carry_facts(stage, stages)
            _check_head(stage, stages)
        except ExperimentError as error:
            raise ExperimentError(f"{where}: {error}") from error
        stages[name] = stage
    last = next(reversed(stages.values()), None)
    if last is not None and last.settings.data == "task":
        if "student" not in config.recipe.models:
            raise ExperimentError(
                f"recipe.models={[*config.recipe.models]} has no student, which the stages on a"
                " task train: add it, or use recipe=finetune"
            )
        if not trains_head(last.settings.objective.terms):
            raise ExperimentError(
                f"recipe.stages.{last.name}: the last stage on a task is scored as it is, and"
                f" objective={last.settings.objective.name} does not train the head: add a term"
                " logits or labels, or a stage after it"
            )
    return list(stages.values())


def _check_reads(
    where: str, node: DictConfig, given: dict[str, Any], earlier: dict[str, Stage]
) -> None:
    """Whether a stage's settings are of use with the data that it reads."""
    if node.data not in ("corpus", "task"):
        raise ExperimentError(f"{where}.data={node.data} is not corpus or task")
    on_task = node.data == "task"
    for key in ("corpus", "training") if on_task else ("task_training",):
        if given[key]:
            raise ExperimentError(
                f"{where}.{key}={given[key]} makes no difference with data={node.data}:"
                f" set {'task_training' if on_task else 'training'} instead"
            )
    if node.head_only and not on_task:
        raise ExperimentError(f"{where}.head_only=true needs data=task")
    before = [stage.name for stage in earlier.values() if stage.settings.data == "task"]
    if before and not on_task:
        raise ExperimentError(
            f"{where}: a stage on the corpus comes before those on a task ({', '.join(before)})"
        )


def _check_head(stage: Stage, earlier: dict[str, Stage]) -> None:
    """Whether both models have the head that the objective asks for."""
    settings = stage.settings
    needs_head = trains_head(settings.objective.terms)
    if settings.data == "corpus":
        if needs_head and stage.teacher != "teacher":
            raise ExperimentError(
                f"objective={settings.objective.name} needs a teacher with a head of masked"
                f" language modelling, which the student of stage {stage.teacher} has not"
            )
        soft = [n for n, term in settings.objective.terms.items() if isinstance(term, LogitTerm)]
        if soft and stage.is_pruned:
            raise ExperimentError(
                f"objective.terms.{soft[0]}: the teacher predicts tokens that the student has not;"
                " set student.vocabulary=full"
            )
        return
    fixed = [name for name, task in settings.tasks.items() if not task.is_trained]
    if not settings.tasks or fixed:
        named = f"task={fixed[0]} trains nothing" if fixed else "there is no task"
        raise ExperimentError(f"data=task needs tasks to learn, but {named}: set task=NAME")
    written = [name for name, task in settings.tasks.items() if task.kind == "generation"]
    if written:
        raise ExperimentError(
            f"data=task: no objective compares models on task={written[0]} (generation); distil on"
            " the corpus and fine-tune there, or choose another task"
        )
    if stage.start is None and settings.student.vocabulary != "full":
        raise ExperimentError(
            f"student.vocabulary={settings.student.vocabulary}: the corpus says what stays, and"
            " this stage reads a task; give a stage on the corpus as its start"
        )
    others = [
        name
        for name, term in settings.objective.terms.items()
        if not isinstance(term, (LogitTerm, LabelTerm))
    ]
    if stage.head_only and others:
        raise ExperimentError(
            f"head_only=true: the objective's terms {', '.join(others)} do not reach the head;"
            " leave them out"
        )
    positions = min(stage.num_positions, settings.teacher.max_position_embeddings)
    stage.task_training = parse_changes(
        stage.task_training,
        settings.tasks,
        settings.task_training,
        max_tokens(settings.teacher.model_type, positions),
    )


def _carry_facts(stage: Stage, earlier: dict[str, Stage]) -> None:
    """What a stage's student has from its checkpoint, teacher or start."""
    settings = stage.settings
    source = settings.student.config or settings.student.path
    if stage.start is not None:
        before = earlier[stage.start]
        stage.num_positions, stage.is_pruned = before.num_positions, before.is_pruned
    elif source is not None:
        facts = read_facts(str(source), None)
        stage.num_positions = facts["max_position_embeddings"]
        stage.is_pruned = facts["vocab_size"] < settings.teacher.vocab_size
    else:
        stage.num_positions = settings.teacher.max_position_embeddings
        stage.is_pruned = settings.student.vocabulary == "prune_to_corpus"
    if stage.teacher != "teacher":
        stage.is_pruned = stage.is_pruned or earlier[stage.teacher].is_pruned
    if settings.data == "task":
        return
    longest = max_tokens(settings.teacher.model_type, stage.num_positions)
    if settings.corpus.block_length > longest:
        raise ExperimentError(
            f"corpus.block_length={settings.corpus.block_length} is above the {longest} positions"
            " of the student"
        )
    if stage.is_pruned and settings.corpus.pretokenized:
        raise ExperimentError(NO_TOKEN_IDS)


def _assistant_note(settings: Settings) -> str:
    """Whether MiniLM (section 3.3) would use an assistant here."""
    teacher, student = settings.teacher, settings.student
    holds = (
        2 * student.num_layers <= teacher.num_layers
        and 2 * student.hidden_size <= teacher.hidden_size
    )
    return (
        "recipe=teacher_assistant: MiniLM uses an assistant where the student has at most half of"
        f" the teacher's layers and half of its hidden size; {student.num_layers} of"
        f" {teacher.num_layers} and {student.hidden_size} of {teacher.hidden_size}"
        f" {'are' if holds else 'are not, so nothing is known of its use here'}"
    )


def _become_teacher(config: DictConfig, stage: Stage) -> None:
    """Gives the group teacher the facts of an earlier stage's student."""
    student, teacher = stage.settings.student, stage.settings.teacher
    wanted_heads = config.teacher.num_relation_heads
    config.teacher = asdict(teacher) | {
        "name": stage.name,
        "hub_id": None,
        "revision": None,
        "package": None,
        "path": None,
        "trust_remote_code": False,
        "num_layers": student.num_layers,
        "hidden_size": student.hidden_size,
        "num_attention_heads": student.num_attention_heads,
        "intermediate_size": student.intermediate_size or 4 * student.hidden_size,
        "max_position_embeddings": stage.num_positions,
        "paper_layer": student.num_layers,
        "upper_middle_layer": round(5 * student.num_layers / 6),
        "num_relation_heads": fitting_heads(
            wanted_heads, student.hidden_size, config.student.hidden_size
        ),
    }


def _continue(config: DictConfig, student: Student) -> None:
    """The shape of the student that goes on; its weights come from the stage's folder."""
    changes = {"init": "random", "vocabulary": "full", "path": None, "config": None}
    config.student = asdict(student) | changes


def _max_tokens(settings: Settings, student_facts: dict[str, Any] | None) -> int | None:
    """Positions of every model that is fine-tuned."""
    longest = []
    if "teacher" not in settings.unread_groups:
        longest.append(settings.teacher.max_tokens)
    if student_facts is not None:
        longest.append(
            max_tokens(student_facts["model_type"], student_facts["max_position_embeddings"])
        )
    return min(longest, default=None)


def _model_types(settings: Settings, student_facts: dict[str, Any] | None) -> set[str]:
    """Architectures of every model that is fine-tuned."""
    types = set() if "teacher" in settings.unread_groups else {settings.teacher.model_type}
    return types if student_facts is None else types | {student_facts["model_type"]}


def _resolve_init(settings: Settings) -> None:
    student = settings.student
    if student.init == "auto" and student.path is None:
        _choose_init(settings)
    if student.init_layers == "whole" and (student.init == "random" or student.path is not None):
        student.init_layers = "evenly"  # a sweep asks it of every student


def _choose_init(settings: Settings) -> None:
    student, teacher = settings.student, settings.teacher
    intermediate_size = student.intermediate_size or 4 * student.hidden_size
    agree = (
        student.hidden_size == teacher.hidden_size
        and student.num_attention_heads == teacher.num_attention_heads
        and intermediate_size == teacher.intermediate_size
        and student.num_layers <= highest_init_layer(settings)
        and student.embedding_size is None
        and student.config is None
    )
    if agree:
        student.init, reason = "teacher_layers", "student and teacher layers have the same sizes"
    else:
        reason = "student and teacher layers differ in size, or not 4 x wide inside"
        if student.num_layers > highest_init_layer(settings):
            reason = f"there are fewer than student.num_layers={student.num_layers} teacher layers"
        student.init = "random"
    settings.notes.append(f"student.init=auto: {student.init}, because {reason}")


def _explain(error: Exception) -> str:
    message = reason_of(error)
    key = key_of(error)
    if "missing mandatory value" in message.lower():
        return f"{key} has no value and has no default: add {key}=VALUE"
    if "not in" in message and "Key" in message:
        return f"there is no setting {key}: it is misspelt, or belongs elsewhere"
    if "is not a ListConfig" in message:
        return f"{key} takes a list: {key}=[...]"
    return f"{key}: {message}" if key else message


def _complete_teacher(
    config: DictConfig, teacher_was_chosen: bool, typed: Container[str]
) -> list[str]:
    """Facts of a teacher that is given by path and not by name, from its own config.json."""
    teacher = config.teacher
    if OmegaConf.is_missing(teacher, "path"):
        raise ExperimentError("teacher=custom needs teacher.path=FOLDER_OR_HUB_ID")
    if teacher.get("pooling") is None:
        path, pooling = teacher.get("path"), None
        readers = [config.recipe, config.objective, config.tasks]
        if path is not None and "${teacher.pooling}" in OmegaConf.to_yaml(readers):
            pooling = pooling_of(str(path), teacher.get("revision"))
        teacher.pooling = pooling or "mean"
    if teacher.get("path") is None:
        return []
    is_custom = teacher.get("name") == "custom"
    if not is_custom and "teacher.revision" not in typed:
        teacher.revision = None  # the revision of another repository
    if teacher_was_chosen and not is_custom:
        return []
    facts = read_facts(str(teacher.path), teacher.get("revision"))
    num_layers = facts["num_layers"]
    upper_middle_layer = round(5 * num_layers / 6)
    is_large = num_layers >= _LARGE
    wanted_heads = 64 if facts["hidden_size"] > 768 else 48
    facts |= {
        "name": Path(str(teacher.path)).name,
        "hub_id": None,
        "package": None,
        "paper_layer": upper_middle_layer if is_large else num_layers,
        "upper_middle_layer": upper_middle_layer,
        "num_relation_heads": fitting_heads(
            wanted_heads, facts["hidden_size"], config.student.hidden_size
        ),
    }
    for name, value in facts.items():
        given = f"teacher.{name}" in typed or (is_custom and teacher.get(name) is not None)
        if name == "name" or not given:
            teacher[name] = value
    which = (
        "upper middle, round(5/6 of them), as the papers take layer 21 or 19 of 24"
        if is_large
        else "the last; the papers take another one of large teachers only"
    )
    kind = kind_of(str(teacher.path), teacher.get("revision"))
    if kind != "encoder" and config.recipe.name == "task_agnostic":
        kept = {"classifier": "task_specific", "sentence_encoder": "sentence_encoder"}[kind]
        kind += f", distilled as a plain encoder (recipe={kept} makes its student one, too)"
    heads = teacher.num_relation_heads
    adapted = "" if heads == wanted_heads else ", or the next lower number that divides both sizes"
    return [
        f"teacher.path: {kind.replace('_', ' ', 1)}; facts read from its config.json; teacher layer"
        f" {teacher.paper_layer} of {num_layers}: {which}",
        f"{heads} relation heads: MiniLMv2's {wanted_heads} for hidden sizes"
        f" {'above' if wanted_heads == 64 else 'up to'} 768{adapted}",
    ]


# Layers of what the papers call large.
_LARGE = 24


def fitting_heads(wanted: int, teacher_hidden_size: int, student_hidden_size: Any) -> int:
    """The wanted number of relation heads, or the next lower one that divides both hidden sizes."""
    if student_hidden_size is None:  # an interpolation of the teacher's
        student_hidden_size = teacher_hidden_size
    if not isinstance(student_hidden_size, int) or student_hidden_size < 1:
        return wanted  # what is no size is refused with the other values
    common = math.gcd(teacher_hidden_size, student_hidden_size)
    return max(number for number in range(1, wanted + 1) if common % number == 0)


def _complete_student(config: DictConfig) -> dict[str, Any] | None:
    """The shape that student.config or student.path gives, instead of the group's numbers."""
    source = config.student.get("config") or config.student.get("path")
    if source is None:
        return None
    if config.student.get("config") and config.student.get("path"):
        raise ExperimentError("give student.config or student.path, not both")
    setting = "student.config" if config.student.get("config") else "student.path"
    if not is_there(str(source)):
        raise ExperimentError(f"{setting}: {source} does not exist here")
    facts = read_facts(str(source), None)
    for name in ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
        config.student[name] = facts[name]
    return facts


_WITHOUT_STAGES = ("task_agnostic", "finetune", "prepare_corpus")


_RELATION_SETTINGS = ("pairs", "num_relation_heads")
