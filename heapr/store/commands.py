"""Looks at a store from the command line, and clears it up.

Run:  python -m heapr.store ls                    every artifact: size, parts, made from, needed by
      python -m heapr.store show KEY              all about one; the beginning of a key is enough
      python -m heapr.store verify [KEY ...]      read every file again, whatever is remembered of large ones
      python -m heapr.store gc [--delete]         list what nothing needs; with --delete, remove it
      python -m heapr.store gc --also KEY         also what a run needs, and all that was made from it
Each takes --outputs FOLDER (default: outputs). Exit code 1: verify found damage; 2: a mistake, in one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from heapr.arguments import one_line_arguments
from heapr.artifacts import ARTIFACTS
from heapr.errors import ConfigError
from heapr.files import user_path
from heapr.os_errors import one_line_about
from heapr.report.terminal import open_console, print_lines
from heapr.secrets import without_secrets
from heapr.signals import one_line_ends
from heapr.store.garbage import find_garbage, remove_garbage
from heapr.store.inspector import Inspector
from heapr.store.inventory import Entry, entries, made_from, size_of
from heapr.store.leftovers import damaged_copies
from heapr.store.references import needs_of_runs
from heapr.store.verify import Hashes
from heapr.unread_output import until_nobody_reads
from heapr.words import plural

COMMAND = "python -m heapr.store"
MISTAKE, DAMAGE = 2, 1  # exit codes
GONE = "it was removed just now"
MINUTE = len("2026-01-01T00:00")  # of a time, as far as the list shows it


def main(arguments: Sequence[str]) -> None:
    """Do what the command line asks, and exit."""
    try:
        with until_nobody_reads(), one_line_ends(), one_line_arguments(COMMAND):
            options = _parser().parse_args(arguments)
            root = user_path(options.outputs) / ARTIFACTS
            sys.exit(_do(root, options))
    except ConfigError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"error: {without_secrets(line)}\n")
        sys.exit(MISTAKE)


def _do(root: Path, options: argparse.Namespace) -> int:
    with one_line_about(root):
        if not root.is_dir():
            raise ConfigError(f"'{root}' is not there; give the folder of results with --outputs")
        return int(options.do(root, options))


def _list(root: Path, options: argparse.Namespace) -> int:
    """Print a line for every artifact."""
    found = entries(root)
    users = made_from(found)
    needs, unreadable = needs_of_runs(root)
    table = Table("stage", "key", "size", "made", "parts", "made from", "needed by", box=None)
    for column in table.columns:
        column.no_wrap = True
    for entry in found:
        runs = plural(len(_runs_that_need(entry, needs)), "run")
        artifacts = plural(len(users.get(entry.name, [])), "artifact")
        cells = _cells(entry, f"{runs}, {artifacts}")
        table.add_row(*map(Text, cells))
    console = open_console()
    console.print(table)
    line = f"{_number_and_size(found)} in {root}"
    copies = damaged_copies(root)
    if copies:
        number = plural(len(copies), "damaged copy", "damaged copies")
        line += f"; {number}"
    print_lines(console, line)
    for reason in unreadable:
        print_lines(console, f"cannot be read: {reason}")
    return 0


def _cells(entry: Entry, needed_by: str) -> list[str]:
    """A row of the list."""
    manifest = entry.manifest
    created = entry.problem if manifest is None else manifest["created"][:MINUTE]
    return [
        entry.path.parent.name,
        entry.path.name,
        _size(entry.num_bytes),
        created,
        " ".join(entry.parts),
        " ".join(entry.upstream),
        needed_by,
    ]


def _runs_that_need(entry: Entry, needs: Mapping[Path, Collection[str]]) -> list[str]:
    """Folders of the runs that need an artifact."""
    folders = [str(folder) for folder, artifacts in needs.items() if entry.name in artifacts]
    return sorted(folders)


def _show(root: Path, options: argparse.Namespace) -> int:
    """Print all that is known of one artifact."""
    found = entries(root)
    (entry,) = _chosen(found, [options.key])
    console = open_console()
    print_lines(console, f"{entry.name}, {_size(entry.num_bytes)}, in {entry.path}")
    if entry.manifest is None:
        print_lines(console, f"damaged: {entry.problem}")
        return DAMAGE
    needs, _ = needs_of_runs(root)
    upstream = ", ".join(entry.upstream) or "nothing in the store"
    users = ", ".join(made_from(found).get(entry.name, [])) or "nothing"
    runs = ", ".join(_runs_that_need(entry, needs)) or "no run"
    print_lines(console, json.dumps(dict(entry.manifest), indent=2))
    print_lines(console, f"made from: {upstream}")
    print_lines(console, f"made from it: {users}")
    print_lines(console, f"needed by: {runs}")
    return 0


def _verify(root: Path, options: argparse.Namespace) -> int:
    """Read every file of the chosen artifacts again; print those that are not as they were made."""
    found = entries(root)
    chosen = _chosen(found, options.keys) if options.keys else found
    console = open_console()
    num_damaged = 0
    for entry in chosen:
        problems = _problems(entry)
        num_damaged += bool(problems)
        for problem in problems:
            print_lines(console, f"{entry.name} is damaged: {problem}")
    line = f"{_number_and_size(chosen)} read, {num_damaged} damaged"
    if num_damaged:
        line += "; a run that needs them moves them aside and makes them again"
    print_lines(console, line)
    return DAMAGE if num_damaged else 0


def _collect_garbage(root: Path, options: argparse.Namespace) -> int:
    """Print what nothing needs, and remove it if that was asked for."""
    also = [entry.name for entry in _chosen(entries(root), options.also)] if options.also else []
    garbage = find_garbage(root, also)
    console = open_console()
    for entry in garbage.artifacts:
        why = "was asked for" if entry.name in also else "no run needs it"
        print_lines(console, f"{entry.name}, {_size(entry.num_bytes)}: {entry.problem or why}")
    for copy in garbage.copies:
        print_lines(console, f"{copy.parent.name}/{copy.name}, {_size(size_of(copy))}: a damaged copy")
    number = plural(len(garbage.artifacts), "artifact")
    what = f"{number}, {_size(garbage.num_bytes)} in all"
    if not options.delete:
        print_lines(console, f"{what}; nothing is removed without --delete")
        return 0
    removed = remove_garbage(root, garbage, also)
    kept = [entry.name for entry in garbage.artifacts if entry.path not in removed]
    line = f"{what}; removed"
    if kept:
        names = ", ".join(kept)
        line += f", except for {names}: in use"
    print_lines(console, line)
    return 0


def _problems(entry: Entry) -> list[str]:
    """What is wrong with an artifact and its parts, one line each."""
    if entry.manifest is None:
        return [entry.problem]
    inspector = Inspector(Hashes(None))
    found = [inspector.problem(entry.path, part) for part in ["", *entry.parts]]
    return [GONE if problem == "" else problem for problem in found if problem is not None]


def _chosen(found: Sequence[Entry], beginnings: Sequence[str]) -> list[Entry]:
    """The artifact that each beginning of a key means.

    Raises:
        ConfigError: it means none, or several.
    """
    chosen = []
    for beginning in beginnings:
        key = beginning.rpartition("/")[2]
        fitting = [entry for entry in found if key and entry.path.name.startswith(key)]
        if len(fitting) != 1:
            names = ", ".join(entry.name for entry in fitting[:5]) or "no artifact"
            raise ConfigError(f"key '{beginning}' means {names}; give one of those that ls prints")
        chosen += fitting
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Look at a store of results.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--outputs", default="outputs", help="folder of results, as paths.outputs of run.py")
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("ls", parents=[common], help="every artifact")
    listing.set_defaults(do=_list)
    show = commands.add_parser("show", parents=[common], help="all about one artifact")
    show.add_argument("key", help="or its beginning")
    show.set_defaults(do=_show)
    check = commands.add_parser("verify", parents=[common], help="read every file again")
    check.add_argument("keys", nargs="*", help="of artifacts; without any, all of them")
    check.set_defaults(do=_verify)
    collect = commands.add_parser("gc", parents=[common], help="list, or remove, what nothing needs")
    collect.add_argument("--delete", action="store_true", help="remove it")
    collect.add_argument("--also", nargs="+", default=[], metavar="KEY", help="although a run needs it")
    collect.set_defaults(do=_collect_garbage)
    return parser


def _number_and_size(found: Sequence[Entry]) -> str:
    number = plural(len(found), "artifact")
    total = sum(entry.num_bytes for entry in found)
    return f"{number}, {_size(total)}"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
