"""Execute the tutorials, which are notebooks, and write their outputs into them.

    python -m scripts.run_tutorials              # all of them, in about 20 minutes on two cores
    python -m scripts.run_tutorials compare_methods

Every notebook has a cell of sizes (with the tag ``parameters``), which a test makes smaller. A cell
with the tag ``skip-execution`` is shown and not run: it installs packages. Each notebook runs in an
empty folder.
"""

import argparse
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
SHOWN_FOLDER = "/home/me/tutorial"
"""What outputs have in the place of the folder in which the notebook ran."""

CHECK_COMMANDS = """\
def _checked(_line, _system=get_ipython().system):
    _system(_line)
    if _code := get_ipython().user_ns["_exit_code"]:
        raise RuntimeError(f"{_line}: exit code {_code}")


get_ipython().system = _checked
"""
"""A first cell, which is not stored: a line such as ``!droppeft run`` that fails is an error."""

COLUMNS = "90"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
RICH = '<pre style="white-space:pre;overflow-x:auto'
"""How the HTML of a text that rich printed begins."""


def executed(
    notebook: Path, folder: Path, sizes: Mapping[str, Any] | None = None, timeout_s: float = 3600
) -> Any:
    """Execute a notebook in a folder, and return it with its outputs.

    Args:
        notebook: its path.
        folder: in which its cells run.
        sizes: values of names of its cell of sizes; those of the cell if not given.
        timeout_s: longest time of a cell.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    found: Any = nbformat.read(notebook, as_version=4)
    if sizes:
        [place] = [number for number, cell in enumerate(found.cells) if "parameters" in tags(cell)]
        lines = [f"{name} = {value!r}" for name, value in sizes.items()]
        found.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    found.cells.insert(0, nbformat.v4.new_code_cell(CHECK_COMMANDS))
    client = NotebookClient(
        found,
        timeout=timeout_s,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment(folder))
    del found.cells[0]
    return found


def environment(folder: Path) -> dict[str, str]:
    """The environment of a kernel: text without colours, and no files outside of the folder."""
    commands = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', '')}",
        "COLUMNS": COLUMNS,
        "JUPYTER_COLUMNS": COLUMNS,
        "TTY_COMPATIBLE": "0",  # rich then prints as into a file
        "DROPPEFT_STATE": str(folder / ".state"),
    }


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", ()))


def tidy(notebook: Any, folder: Path) -> None:
    """Make the outputs fit to be stored: plain text, and no names of this machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined([_as_text(one, folder) for one in cell.outputs])
        if cell.get("execution_count"):
            count += 1
            cell.execution_count = count


def _as_text(output: Any, folder: Path) -> Any:
    """An output without escape codes; what rich printed becomes text."""
    if output.output_type in ("display_data", "execute_result"):
        data = output.data
        output.metadata = {}
        if data.get("text/html", "").startswith(RICH):
            output = nbformat.v4.new_output("stream", name="stdout", text=data["text/plain"])
        else:
            for kind in data:
                if kind.startswith("text/"):
                    data[kind] = _plain(data[kind], folder)
    if output.output_type == "stream":
        output.text = _plain(output.text, folder)
    return output


def _plain(text: str, folder: Path) -> str:
    text = ESCAPES.sub("", text).replace("\r\n", "\n")
    lines = (line.rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return "\n".join(lines).replace(str(folder), SHOWN_FOLDER)


def _joined(outputs: list[Any]) -> list[Any]:
    """The outputs without warnings and progress bars; texts that follow one another are one."""
    found: list[Any] = []
    for one in outputs:
        if one.get("name") == "stderr":
            continue
        last = found[-1] if found else None
        if last and one.output_type == last.output_type == "stream":
            last.text += one.text
        else:
            found.append(one)
    return found


def main(arguments: list[str]) -> None:
    """Execute notebooks, all if none is named, and write them with their outputs."""
    paths = {path.stem: path for path in sorted(TUTORIALS.glob("*.ipynb"))}
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", nargs="*", help=f"one of {', '.join(paths)}")
    names = parser.parse_args(arguments).name
    if unknown := [name for name in names if name not in paths]:
        parser.error(f"there is no tutorial {unknown[0]}; name some of {', '.join(paths)}")
    for path in [paths[name] for name in names or paths]:
        begin, before = time.monotonic(), _cpu_s()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch).resolve()
            notebook = executed(path, folder)
            tidy(notebook, folder)
        nbformat.write(notebook, path)
        took = (time.monotonic() - begin) / 60
        used = (_cpu_s() - before) / 60
        print(f"{path.name}: {took:.1f} minutes, of CPU time {used:.1f} minutes", flush=True)


def _cpu_s() -> float:
    """CPU time of the kernels that have ended, and of what they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(sys.argv[1:])
