"""Figures and tables of `experiments/results` in the site: links in `docs` go to them as they are.

So a link works in the repository and in the site, and no file is there twice.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

RESULTS = "experiments/results"
# To a folder beside `docs`; in the site it is within.
_LINK = re.compile(rf"\]\(((?:\.\./)*)\.\./{RESULTS}/")


def on_files(files, config):
    """Add the results, tables as pages that no menu names."""
    for path in sorted((Path(config.config_file_path).parent / RESULTS).glob("*.*")):
        own = {"abs_src_path": str(path), "inclusion": InclusionLevel.NOT_IN_NAV}
        files.append(File.generated(config, f"results/{path.name}", **own))
    return files


def on_page_markdown(markdown, **_):
    """Links to the results, as the site has them."""
    return _LINK.sub(r"](\1results/", markdown)
