"""The notebooks run from top to bottom, in a kernel of the interpreter that runs the tests."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
EACH = pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem
)

nbformat = pytest.importorskip("nbformat")


def execute(name, folder):
    """The notebook with its outputs, run in `folder`."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(KernelSpecManager):
        """Whatever kernels are installed on the machine, this one is used."""

        def get_kernel_spec(self, kernel_name):
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name=kernel_name, language="python")

    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    manager = AsyncKernelManager(kernel_spec_manager=ThisInterpreter())
    nbclient.NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed(notebook):
    return "".join(output.get("text", "") for output in outputs(notebook))


def shown(notebook, kind):
    """What was shown as "image/png" or "text/html"."""
    data = [output.data for output in outputs(notebook) if "data" in output]
    return [item[kind] for item in data if kind in item]


@pytest.mark.slow
def test_the_experiment_runs_and_shows_its_table_and_both_figures(tmp_path):
    executed = execute("bh_routing_experiment.ipynb", tmp_path)
    assert "The logits are bit for bit those from before." in printed(executed)
    assert len(shown(executed, "image/png")) == 2
    table = next(html for html in shown(executed, "text/html") if "avg_experts" in html)
    assert "topk_8_baseline" in table and "bh_k16_a020" in table


@pytest.mark.slow
def test_profiling_a_model_runs_and_shows_its_tables_and_figures(tmp_path):
    executed = execute("profile_a_model.ipynb", tmp_path)
    assert "Saved, and the logits are bit for bit those from before." in printed(executed)
    assert "13 tokens and 7 of padding" in printed(executed)
    assert len(shown(executed, "image/png")) == 4
    html = shown(executed, "text/html")
    assert "Profile of moeprof/demo" in html[0] and "data:image/png" in html[0]
    assert any("model.layers.3.mlp.gate" in table for table in html)
    assert (tmp_path / "profile" / "index.html").stat().st_size > 100_000


# ---- the first cell ----


@pytest.fixture
def first_cell(monkeypatch):
    """Run a notebook's first cell in a folder; the lines that begin with % in it, such as %pip."""
    transformer = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()

    def run(path, folder):
        cells = nbformat.read(path, as_version=4).cells
        source = next(cell.source for cell in cells if cell.cell_type == "code")
        given, scope = [], {}

        class Shell:
            def run_line_magic(self, name, line):
                given.append(f"{name} {line.format(**scope)}")  # IPython fills in {names} so

        monkeypatch.chdir(folder)
        scope["get_ipython"] = Shell
        exec(transformer.transform_cell(source), scope)
        return given

    return run


@pytest.fixture
def without_moeprof(monkeypatch):
    monkeypatch.setitem(sys.modules, "moeprof", None)  # its import fails


@EACH
def test_where_moeprof_is_nothing_is_installed(path, first_cell):
    assert first_cell(path, NOTEBOOKS) == []


@EACH
@pytest.mark.parametrize("folder", [NOTEBOOKS, ROOT], ids=["notebooks", "root"])
def test_in_a_checkout_the_checkout_is_installed(path, folder, first_cell, without_moeprof):
    assert first_cell(path, folder) == [f'pip install -q "{ROOT}[hf]"']


@EACH
def test_elsewhere_as_in_colab_the_index_is_asked(path, tmp_path, first_cell, without_moeprof):
    assert first_cell(path, tmp_path) == ['pip install -q "moeprof[hf]"']


@EACH
def test_outputs_are_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
