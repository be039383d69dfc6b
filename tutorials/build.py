"""Execute tutorials and write the notebooks: `python tutorials/build.py [01_quickstart ...]`; all of them without a name.

The percent scripts are the source. A notebook has the same cells, and the outputs of a run in a fresh kernel. Figures are kept
twice: for plotly, and as an image for viewers that run no scripts, such as that of a code host.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import plotly.io as pio
from nbclient import NotebookClient
from nbformat import NotebookNode, write
from traitlets.config import Config

FOLDER = Path(__file__).parent
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run a notebook in a fresh kernel, where a cell that fails raises.

    Args:
        notebook: whose outputs are replaced.
        folder: the working directory of the kernel.
    """
    env = os.environ | {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # no progress bars
    with tempfile.TemporaryDirectory() as place:
        # Over sockets of its own: a port is chosen before the kernel takes it, and another program may be quicker.
        manager = {"connection_file": f"{place}/kernel.json", "transport": "tcp" if os.name == "nt" else "ipc"}
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", record_timing=False, config=Config(KernelManager=manager)
        )
        client.execute(cwd=str(folder), env=env)


def from_script(script: Path) -> NotebookNode:
    """The cells of a percent script, without outputs.

    Args:
        script: the script.
    """
    notebook = jupytext.read(script)
    for k, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{k:02}"  # random ids would change with every build
        if "remove-cell" in cell.metadata.get("tags", []):  # the documentation leaves these out, editors fold them
            cell.metadata |= {"jupyter": {"source_hidden": True}, "cellView": "form"}
    return notebook


def add_images(notebook: NotebookNode) -> None:
    """Put an image beside every plotly figure.

    Args:
        notebook: an executed notebook; changed in place.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if found := output.get("data", {}).get("application/vnd.plotly.v1+json"):
                figure = pio.from_json(json.dumps({"data": found["data"], "layout": found["layout"]}))
                image = figure.to_image(format="png", width=800, height=found["layout"].get("height", 450))
                output["data"]["image/png"] = base64.b64encode(image).decode()


def add_pictures(notebook: NotebookNode) -> None:
    """Put the picture that a cell's tag `picture:NAME` names, of `docs/`, in place of its widget, which needs a kernel.

    Args:
        notebook: an executed notebook; changed in place.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        names = [tag.removeprefix("picture:") for tag in cell.metadata.get("tags", []) if tag.startswith("picture:")]
        for output in cell.get("outputs", []):
            if names and output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None):
                picture = (FOLDER.parent / "docs" / names[0]).read_bytes()
                output["data"] |= {"image/png": base64.b64encode(picture).decode(), "text/plain": "Explorer()"}


def build(script: Path) -> None:
    """Write the notebook beside a script.

    Args:
        script: the script.
    """
    notebook = from_script(script)
    execute(notebook, script.parent)
    notebook.metadata.pop("language_info", None)  # the version of Python is of no interest
    add_images(notebook)
    add_pictures(notebook)
    write(notebook, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    for path in [FOLDER / f"{name}.py" for name in sys.argv[1:]] or SCRIPTS:
        begin = time.perf_counter()
        build(path)
        print(f"{path.stem}: {time.perf_counter() - begin:.0f} s")
