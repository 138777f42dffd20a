"""Tasks of lm-eval: find one, load its data, check what it needs of a tokenizer.

In: the name of a task, a folder with further ones. Out: a `LoadedTask`. lm-eval is imported inside functions
because its import takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from heapr.errors import ConfigError
from heapr.evaluation.zero_shot_names import PAPER_FOLDERS
from heapr.evaluation.zero_shot_quiet import quiet, seeded
from heapr.hub import hub_is_reachable, no_network
from heapr.words import first_line


@dataclass(frozen=True)
class LoadedTask:
    """A task, group or tag of lm-eval with its data.

    Attributes:
        name: as requested.
        manager: lm-eval's task manager, which knows the task.
        tasks: single tasks by name.
        roots: what lm-eval is given: groups, and tasks that belong to no group.
    """

    name: str
    manager: Any
    tasks: Mapping[str, Any]
    roots: list[Any]


def load_task(name: str, folder: Path | None, content: str) -> LoadedTask:
    """Find a task and load its data from the local cache or the hub.

    Args:
        name: of a task, group or tag.
        folder: with further tasks, which take precedence over lm-eval's own.
        content: hash of the folder.

    Raises:
        ConfigError: the task is unknown, or its data cannot be loaded.
    """
    network = contextlib.nullcontext() if hub_is_reachable() else no_network()
    with quiet(name), seeded(), network:
        manager = _task_manager(folder, content, everything=False)
        if name not in manager.all_tasks:
            manager = _task_manager(folder, content, everything=True)
        if name not in manager.all_tasks:
            raise ConfigError(
                f"zero-shot task '{name}' is unknown to lm-eval, although a file has this word; lm-eval ls"
                " tasks lists all, include_path adds your own"
            )
        try:
            loaded = manager.load([name])
            _try_templates(loaded["tasks"].values())
        except OSError as error:
            raise ConfigError(
                f"the data of zero-shot task '{name}' are not on this machine: {first_line(error)}; "
                "run python -m heapr.prefetch with the same overrides where there is a network"
            ) from error
        except Exception as error:  # a task's templates and code may raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(
                f"zero-shot task '{name}' cannot be loaded ({reason}); correct its YAML or see lm-eval's page"
                " on the task"
            ) from error
    members = {member for names in loaded["group_map"].values() for member in names}
    everything = {**loaded["tasks"], **loaded["groups"]}
    roots = [item for key, item in everything.items() if key not in members]
    return LoadedTask(name, manager, loaded["tasks"], roots)


def _try_templates(tasks: Iterable[Any]) -> None:
    """Fill in the templates of tasks with the first document, because loading leaves out some of them.

    Raises:
        ValueError: the right answer is none of the choices, which lm-eval would count as a wrong answer.
        Exception: whatever a template raises.
    """
    for single in tasks:
        for document in itertools.islice(single.eval_docs, 1):
            single.fewshot_context(document, num_fewshot=0)
            # Some questions have several contexts and one continuation; their answer is elsewhere.
            if single.OUTPUT_TYPE != "multiple_choice" or single.multiple_input:
                continue
            answer, choices = single.doc_to_target(document), single.doc_to_choice(document)
            known = range(len(choices)) if isinstance(answer, int) else choices
            if isinstance(answer, int | str) and answer not in known:
                raise ValueError(f"the answer {answer!r} of the first question is none of its choices")


def generates_text(task: LoadedTask) -> bool:
    """Whether the model has to generate text for it, token after token."""
    return any(single.OUTPUT_TYPE == "generate_until" for single in task.tasks.values())


def check_fewshot(task: LoadedTask, num_fewshot: int | None) -> None:
    """Check that a task has as many examples as are to precede each question.

    Args:
        num_fewshot: None uses the task's default.

    Raises:
        ConfigError: it has fewer.
    """
    for name, single in task.tasks.items():
        number = single.config.num_fewshot if num_fewshot is None else num_fewshot
        if not number:
            continue
        with quiet(name):
            examples = single.fewshot_docs()
        available = 0 if examples is None else len(list(examples))
        if number >= available:  # lm-eval draws one more, in case one is the question
            raise ConfigError(
                f"evaluation.zero_shot.num_fewshot={number}, but task '{name}' has {available} examples, of"
                f" which one may be the question; give at most {max(available - 1, 0)}"
            )


def check_end_token(task: LoadedTask, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer has the special token that a task needs.

    Before a text without context, lm-eval puts the tokenizer's beginning-of-text token, or its end-of-text
    token if there is no other. Generated text ends at the end-of-text token.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    generates = generates_text(task)
    has_beginning = tokenizer.bos_token_id is not None
    if tokenizer.eos_token_id is not None or (has_beginning and not generates):
        return
    missing = "token for the end of a text" if generates else "token for the beginning or the end of a text"
    raise ConfigError(
        f"zero-shot task '{task.name}' needs a {missing}, which the model's tokenizer does not define; set"
        " `eos_token` in its tokenizer_config.json, or skip zero-shot with evaluation.zero_shot=null"
    )


# Cached, because the result depends only on the arguments: `content` is the hash of the folder.
@functools.lru_cache(maxsize=4)
def _task_manager(folder: Path | None, content: str, *, everything: bool) -> Any:
    """lm-eval's task manager for the paper's tasks, or for all its tasks, with the tasks of a folder."""
    import lm_eval.tasks

    folders: list[Path] = []
    if not everything:
        lm_evals = Path(lm_eval.tasks.__file__).parent
        folders += [lm_evals / name for name in PAPER_FOLDERS if (lm_evals / name).is_dir()]
    if folder is not None:
        folders.append(folder)
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=everything)
