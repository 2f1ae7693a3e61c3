"""Notebooks as pages of the documentation site: a hook that ``mkdocs.yml`` names.

nbconvert writes a notebook as Markdown, which mkdocs treats like any other page: links are checked,
and text and code have the site's look in both colour schemes. A page loads nothing for it.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import DictLoader
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from nbconvert import MarkdownExporter

TEMPLATE = """
{%- extends 'markdown/index.md.j2' -%}
{% block stream %}{{ fenced(output.text) }}{% endblock stream %}
{% block data_text %}{{ fenced(output.data['text/plain']) }}{% endblock data_text %}
{% block data_html %}{{ plain_table(output.data['text/html']) }}{% endblock data_html %}
{% block data_png %}
![A figure, the output of the cell above.]({{ output.metadata.filenames['image/png'] }}){ .output }
{% endblock data_png %}
"""


class NotebookPage(File):
    """A notebook that mkdocs takes for a page."""

    def is_documentation_page(self) -> bool:
        """Say that it is a page, although its name does not end with ``.md``."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace each notebook by its page, its images, and a copy to download."""
    for file in [one for one in files if one.src_uri.endswith(".ipynb")]:
        files.remove(file)
        for new in _pages(file, config):
            files.append(new)
    return files


def _pages(file: File, config: MkDocsConfig) -> Iterator[File]:
    path = PurePosixPath(file.src_uri)
    markdown, images = as_markdown(Path(file.src_dir or "", file.src_uri))
    copy = path.with_name(f"{path.stem}_files") / path.name
    title, _, rest = markdown.partition("\n")
    link = f"[:material-download: Download this notebook]({copy.relative_to(path.parent)})"
    page = NotebookPage(
        file.src_uri,
        file.src_dir,
        config.site_dir,
        config.use_directory_urls,
        inclusion=InclusionLevel.INCLUDED,
    )
    page.content_string = f"{title}\n\n{link}{{ .download }}\n{rest}"
    yield page
    for name, content in {str(copy.relative_to(path.parent)): file.content_bytes, **images}.items():
        where = str(path.parent / name)
        yield File.generated(config, where, content=content, inclusion=InclusionLevel.INCLUDED)


def as_markdown(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its images by the names that the Markdown has."""
    exporter: Any = MarkdownExporter(
        extra_loaders=[DictLoader({"page.md.j2": TEMPLATE})], template_file="page.md.j2"
    )
    exporter.environment.globals.update(fenced=_fenced, plain_table=_plain_table)
    folder = f"{notebook.stem}_files"
    resources = {"output_files_dir": folder, "unique_key": "output"}
    markdown, found = exporter.from_filename(str(notebook), resources=resources)
    return markdown.strip() + "\n", found["outputs"]


def _fenced(text: str) -> str:
    return f"\n``` {{ .text .output }}\n{text.rstrip()}\n```\n"


def _plain_table(html: str) -> str:
    """Return the HTML of pandas without its own look, so that the site's tables are all alike."""
    html = re.sub(r"<style scoped>.*?</style>", "", html, flags=re.DOTALL)
    html = html.replace(' border="1" class="dataframe"', "").replace(
        ' style="text-align: right;"', ""
    )
    lines = (line.strip() for line in html.splitlines())
    return f'\n<div class="output">{"".join(lines)}</div>\n'
