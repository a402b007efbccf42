"""The notebooks run from top to bottom, in a kernel of the interpreter that runs the tests.

All in one kernel, since each imports torch and transformers; it is reset for every notebook. Some
run on fewer texts and tokens than a reader's, see FEWER.
"""

import re
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
EACH = pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem
)

FEWER = {  # {notebook: {what it says: what runs here}}
    "01_profile.ipynb": {
        "texts[::16]": "texts[::32]",
        "max_new_tokens=40": "max_new_tokens=10",
        "max_new_tokens=10, repeats=5": "max_new_tokens=3, repeats=5",
    },
    "02_bh_routing.ipynb": {
        "calibration_texts()[::8]": "calibration_texts()[::32]",
        "prompts()[::3]": "prompts()[::12]",
        "heldout_texts()[::32]": "heldout_texts()[::128]",
        "max_new_tokens=4": "max_new_tokens=2",
    },
    "03_router_for_a_budget.ipynb": {
        "tokens=4096": "tokens=1024",
        "context=128, tokens=8192": "context=128, tokens=8192, budget_tokens=2048",
    },
    "04_your_own_router.ipynb": {"heldout_texts()[::16]": "heldout_texts()[::32]"},
    "05_fit_a_real_model.ipynb": {"heldout_texts()[::16]": "heldout_texts()[::32]"},
}

# As conftest.py has it in this process: what a page's pictures are is tested elsewhere.
UNDRAWN = """
from moeprof.show import pictures
pictures.svg = lambda figure, **_: b"<svg></svg>"
del pictures
"""

nbformat = pytest.importorskip("nbformat")


def read(name):
    """The notebook as it runs here."""
    text = (NOTEBOOKS / name).read_text(encoding="utf-8")
    for said, here in FEWER[name].items():
        assert said in text, f"{name}: {said}"
        text = text.replace(said, here)
    return nbformat.reads(text, as_version=4)


@pytest.fixture(scope="module")
def kernel():
    """The manager of a kernel that runs."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_core.utils import run_sync

    class ThisInterpreter(KernelSpecManager):
        """Whatever kernels are installed on the machine, this one is used."""

        def get_kernel_spec(self, kernel_name):
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name=kernel_name, language="python")

    manager = AsyncKernelManager(kernel_spec_manager=ThisInterpreter())
    run_sync(manager.start_kernel)()
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.fixture
def execute(kernel, tmp_path):
    """A function: the notebook with its outputs, run in `tmp_path` without any variable before.

    twice : what cells say that run a second time after the first
    """
    import nbclient

    def execute(name, twice=None):
        notebook = read(name)
        times = [1 + (twice is not None and twice in cell.source) for cell in notebook.cells]
        assert twice is None or max(times) == 2
        notebook.cells = [c for c, n in zip(notebook.cells, times, strict=True) for _ in range(n)]
        reset = f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})\ndel os\n{UNDRAWN}"
        before = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(reset)])
        for each in (before, notebook):
            client = nbclient.NotebookClient(each, km=kernel, timeout=300)
            try:
                client.execute()
            finally:
                client.kc.stop_channels()
        return notebook

    return execute


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed(notebook):
    return "".join(output.get("text", "") for output in outputs(notebook))


def shown(notebook, kind):
    """What was shown as "image/png" or "text/html"."""
    data = [output.data for output in outputs(notebook) if "data" in output]
    return [item[kind] for item in data if kind in item]


@pytest.mark.slow
def test_the_experiment_runs_and_shows_its_table_and_both_figures(execute):
    executed = execute("02_bh_routing.ipynb")
    assert "The logits are bit for bit those from before." in printed(executed)
    assert len(shown(executed, "image/png")) == 2
    table = next(html for html in shown(executed, "text/html") if "avg_experts" in html)
    assert "topk_8_baseline" in table and table.count("bh_k") == 20 and "bh_k64_a020" in table


@pytest.mark.slow
def test_profiling_a_model_runs_and_shows_its_tables_and_figures(execute, tmp_path):
    executed = execute("01_profile.ipynb")
    assert "Saved, and the logits are bit for bit those from before." in printed(executed)
    assert "13 tokens and 7 of padding" in printed(executed)
    assert len(shown(executed, "image/png")) == 4
    html = shown(executed, "text/html")
    assert not any("difference can be told from noise" in table for table in html)
    assert "Profile of moeprof/demo" in html[0] and "data:image/png" in html[0]
    assert any("model.layers.3.mlp.gate" in table for table in html)
    page = (tmp_path / "profile" / "index.html").read_text(encoding="utf-8")
    assert "model.layers.{0 … 3}.mlp" in page and page.count("data:image/svg") > 5


@pytest.mark.slow
def test_routers_at_a_budget_are_compared_and_judged(execute):
    executed = execute("03_router_for_a_budget.ipynb")
    text = printed(executed)
    judged = [line for line in text.splitlines() if "static top-4" in line]
    assert [line.split("@")[0] for line in judged] == ["fixed_p", "bh", "top_p", "entropy"]
    said = ["better than", "worse than", "no difference from"]
    assert all(sum(word in line for word in said) == 1 for line in judged)
    assert "better than" in judged[0]  # as in docs/results.md
    table = next(html for html in shown(executed, "text/html") if "bits_above_own" in html)
    assert all(name in table for name in ("own routing", "topk:k=4", "fixed_p@4"))
    assert len(shown(executed, "image/png")) == 1


@pytest.mark.slow
def test_a_router_of_ones_own_is_checked_and_a_middleware_shown(execute):
    executed = execute("04_your_own_router.ipynb")
    text = printed(executed)
    assert "the same number of experts for every token: True" in text
    assert len(re.findall(r"layer \d without expert +\d+: \+0\.0", text)) == 4
    stock, broken = re.search(r"([\d.]+) nats .* all experts, ([\d.]+) without", text).groups()
    assert (
        0 < float(broken) - float(stock) < 0.2
    )  # 1 of 64 experts; the weights are on the model's scale
    assert text.endswith("Unpatched, the loss is what it was.\n")
    assert len(shown(executed, "image/png")) == 2


@pytest.mark.slow
def test_fitting_a_real_model_counts_memory_and_saves_in_4_bits(execute):
    executed = execute("05_fit_a_real_model.ipynb", twice="save_quantized(model")
    table = next(html for html in shown(executed, "text/html") if "Qwen3-30B-A3B" in html)
    cells = re.findall(r"<t[dh]>([^<]*)</t[dh]>", table)
    at = cells.index("OLMoE-1B-7B")
    # 4.6 and 7.8 GB are what was measured, see docs/quantisation.md.
    assert cells[at + 1 : at + 5] == ["6.9", "13.8", "7.8", "4.6"]
    before, after, *_ = re.findall(r"([\d.]+) MB", printed(executed))
    assert float(after) < float(before) / 2
    assert len(shown(executed, "image/png")) == 1


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
def test_a_clone_in_colab_is_installed(path, tmp_path, first_cell, monkeypatch):
    """Its folder can be imported before that, as a namespace package with nothing in it."""
    clone = tmp_path / "moeprof"
    (clone / "csrc").mkdir(parents=True)
    (clone / "csrc" / "kernels.def").touch()
    spec = PathFinder.find_spec("moeprof", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "moeprof", module_from_spec(spec))
    assert first_cell(path, tmp_path) == [f'pip install -q "{clone}[hf]"']


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
