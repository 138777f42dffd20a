"""A SLURM of one machine for tests: sbatch, srun, sacct, scontrol and scancel, as far as launching goes.

`install(folder)` makes the commands, which are links to this file. They record their calls in `calls.txt`, and
run what they are given: an array's tasks at once, `srun` in the task's process, `scontrol requeue` by running
the task again after it has ended.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol", "scancel")


def install(folder: Path) -> None:
    """Make the commands in a folder, which then goes first on PATH."""
    folder.mkdir(parents=True)
    for name in COMMANDS:
        command = folder / name
        command.write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
        command.chmod(0o755)


def sbatch(folder: Path, arguments: list[str]) -> None:
    """Start a controller of all tasks in the background and print the job's number."""
    script = Path(arguments[-1])
    number = str(1000 + len(list(folder.glob("job_*"))))
    (folder / f"job_{number}").mkdir()
    (folder / f"job_{number}" / "script.sh").write_text(script.read_text())
    array = re.search(r"#SBATCH --array=0-(\d+)", script.read_text())
    tasks = range(int(array[1]) + 1) if array else [None]
    for task in tasks:
        name = number if task is None else f"{number}_{task}"
        subprocess.Popen(
            [sys.executable, str(folder / "sbatch"), "--controller", number, name],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    print(f"Submitted batch job {number}")


def controller(folder: Path, number: str, name: str) -> None:
    """Run one task until it ends without having been requeued."""
    state = folder / f"job_{number}" / f"{name}.json"
    environment = os.environ | {
        "SLURM_JOB_ID": number,
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    if "_" in name:
        environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": name.partition("_")[2]}
    while True:
        task = subprocess.Popen(["bash", str(folder / f"job_{number}" / "script.sh")], env=environment)
        state.write_text(json.dumps({"state": "RUNNING", "pid": task.pid}))
        task.wait()
        requeued = state.with_suffix(".requeued")
        if not requeued.exists():
            break
        requeued.unlink()
    state.write_text(
        json.dumps({"state": "COMPLETED" if task.returncode == 0 else "FAILED", "pid": task.pid})
    )


def srun(folder: Path, arguments: list[str]) -> None:
    """Become the command behind the options, with its output in the files that they name."""
    name = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    files: dict[str, str] = {}
    while arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option in ("--output", "--error"):
            path = arguments.pop(0)
            for pattern, value in (("%A_%a", name), ("%j", name), ("%t", "0")):
                path = path.replace(pattern, value)
            files[option] = path
    for option, descriptor in (("--output", 1), ("--error", 2)):
        if option in files:
            file = os.open(files[option], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
    (folder / f"job_{os.environ['SLURM_JOB_ID']}" / f"{name}.pid").write_text(str(os.getpid()))
    os.execvp(arguments[0], arguments)


def sacct(folder: Path) -> None:
    print("JobID|State|NodeList")
    for state in sorted(folder.glob("job_*/*.json")):
        print(f"{state.stem}|{json.loads(state.read_text())['state']}|localhost")


def scontrol(folder: Path, arguments: list[str]) -> None:
    assert arguments[0] == "requeue", arguments
    name = arguments[1]
    (folder / f"job_{name.partition('_')[0]}" / f"{name}.requeued").touch()


def scancel(folder: Path, arguments: list[str]) -> None:
    """Send the signal behind --signal to the job's process."""
    name, number = arguments[0], arguments[arguments.index("--signal") + 1]
    pid = int((folder / f"job_{name.partition('_')[0]}" / f"{name}.pid").read_text())
    os.kill(pid, getattr(signal, number if number.startswith("SIG") else f"SIG{number}"))


def main() -> None:
    folder, command, arguments = Path(sys.argv[0]).parent, Path(sys.argv[0]).name, sys.argv[1:]
    with (folder / "calls.txt").open("a") as calls:
        calls.write(shlex.join([command, *arguments]) + "\n")
    if arguments[:1] == ["--controller"]:
        controller(folder, *arguments[1:])
    elif command == "sacct":
        sacct(folder)
    else:
        {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}[command](folder, arguments)


if __name__ == "__main__":
    main()
