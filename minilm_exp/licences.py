"""Under which licence a teacher or a data set comes, as far as it says so itself."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilm_exp.hub import hub_commit
from minilm_exp.settings import Teacher
from minilm_exp.teacher import package_folder
from minilm_exp.teacher_facts import is_there

# What the hub calls a licence.
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}")
# Words with which the text of a licence begins, where it is one of the best known.
_FIRST_WORDS = {
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
    "the mit license": "mit",
    "bsd 3-clause license": "bsd-3-clause",
}
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


@dataclass(frozen=True)
class Licence:
    """What was found.

    Attributes:
        identifier: As the hub writes it; `other` for one that has no such name; None where nothing
            names a licence.
        source: Where it stands, or where it was looked for.
        name: Of a licence that is `other`.
        languages: Of a model, by the same source.
    """

    identifier: str | None
    source: str
    name: str | None = None
    languages: list[str] = field(default_factory=list)


def licence_of_teacher(teacher: Teacher) -> Licence:
    """By its model card, then its package's metadata, then a licence file beside it."""
    if teacher.weights == "random":
        return Licence(None, "a teacher with random weights")
    if teacher.path is not None and is_there(teacher.path):
        return _of_folder(Path(teacher.path).expanduser(), "the teacher's folder")
    if teacher.package is not None and teacher.path is None:
        of_package = f"the metadata of the package {teacher.package}"
        found = _of_folder(package_folder(teacher.package), f"the package {teacher.package}")
        named = None if found.identifier else _name_in_package(teacher.package)
        return _licence(named, of_package, found.languages) if named else found
    source = teacher.path or teacher.hub_id
    return (
        Licence(None, "the teacher")
        if source is None
        else of_hub(source, teacher.revision, "model")
    )


def of_hub(hub_id: str, revision: str | None, kind: str) -> Licence:
    """Of a model or dataset of the hub, by its card; asked of an earlier download where offline."""
    from huggingface_hub import hf_hub_download

    source = f"the card of {hub_id}"
    with contextlib.suppress(Exception):  # of many kinds: no network, no card, a card of no form
        commit = hub_commit(hub_id, revision, kind)
        card = hf_hub_download(hub_id, "README.md", revision=commit, repo_type=kind)
        return _of_card(Path(card), source)
    return Licence(None, f"{source} could not be read, which")


def _of_folder(folder: Path, named: str) -> Licence:
    card = _of_card(folder / "README.md", f"the model card (README.md) in {named}")
    if card.identifier is not None:
        return card
    for name in _FILES:
        with contextlib.suppress(OSError, ValueError):
            text = " ".join((folder / name).read_text("utf-8")[:2000].lower().split())
            text = text.replace("license, version", "license version").removeprefix("# ")
            known = [one for words, one in _FIRST_WORDS.items() if text.startswith(words)]
            where = f"the file {name} in {named}"
            return Licence(known[0] if known else "other", where, None if known else name,
                           card.languages)  # fmt: skip
    return Licence(None, f"{named} (README.md, LICENSE)", languages=card.languages)


def _of_card(file: Path, source: str) -> Licence:
    from huggingface_hub import ModelCard

    data: dict[str, Any] = {}
    # Its front matter may be no YAML, or of no kind that the library knows.
    with contextlib.suppress(Exception):
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    given = data.get("language")
    languages = [one for one in (given if isinstance(given, list) else [given]) if one]
    languages = [str(one) for one in languages if re.fullmatch(r"[a-z]{2,3}", str(one))]
    named, licence = data.get("license_name"), data.get("license")
    licence = licence[0] if isinstance(licence, list) and licence else licence
    if not isinstance(licence, str) or not licence.strip():
        return Licence(None, source, languages=languages)
    if licence == "other" and isinstance(named, str):
        return Licence("other", source, named, languages)
    return _licence(licence, source, languages)


def _licence(text: str, source: str, languages: list[str]) -> Licence:
    """A licence by whatever it is called."""
    short = " ".join(text.split())
    plain = short.lower().removesuffix(" license").replace(" ", "-")
    if _IDENTIFIER.fullmatch(plain):
        return Licence(plain, source, languages=languages)
    return Licence("other", source, short[:100], languages)


def _name_in_package(package: str) -> str | None:
    for distribution in importlib.metadata.packages_distributions().get(package, []):
        metadata = importlib.metadata.metadata(distribution)
        for name in ("License-Expression", "License"):
            if metadata[name]:
                return str(metadata[name])
        for classifier in metadata.get_all("Classifier") or []:
            if classifier.startswith("License :: "):
                return str(classifier).rsplit(" :: ", 1)[-1]
    return None
