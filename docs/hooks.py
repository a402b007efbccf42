"""What MkDocs adds to the pages when it builds them: a figure."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ["moeprof/demo/comparison/comparison.png"]


def on_files(files, config):
    """Figures that lie elsewhere in the repository are parts of the site, too."""
    from mkdocs.structure.files import File

    for path in FIGURES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    for path in FIGURES:
        markdown = markdown.replace(f"../{path}", path)
    return markdown
