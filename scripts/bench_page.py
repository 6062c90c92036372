"""How heavy the page is and how soon it is there: python scripts/bench_page.py FOLDER...

Of every run folder the page is written anew and opened in headless Chromium (Playwright, of the `test` extra,
with the system's browser; CHROMIUM names another). Prints a line per page: its size, its nodes with those of
shadow roots, milliseconds to the first contentful paint and until all plots are drawn, and how long a change
of task takes to be shown; of three loads the fastest. tests/synthetic_run.py makes a folder of OPT-66B's
size.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from headless_browser import COUNT_NODES, opened_browser

from lowmem_icl.report.page.write import write_report
from lowmem_icl.report.run_tables import read_run

LOADS = 3
PICTURE_WIDTH, PICTURE_HEIGHT = 1200, 1180
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
NOW = "performance.now()"
CHANGE = """() => {
  const began = performance.now(), task = document.querySelector("select[name=task]");
  task.selectedIndex = 0;
  task.dispatchEvent(new Event("change"));
  const taken = () => performance.now() - began;
  return new Promise((told) => requestAnimationFrame(() => setTimeout(() => told(taken()))));
}"""


def measured(browser: Any, page: Path) -> dict[str, float]:
    """Return nodes, and milliseconds to the first paint, to the whole page and to a change, of one load."""
    window = browser.new_page(viewport={"width": 1280, "height": 900})
    window.goto(page.as_uri())
    window.wait_for_selector("html[data-ready]", state="attached")
    found = {
        "ready": window.evaluate(NOW),
        "first paint": window.evaluate(FIRST_PAINT),
        "change": window.evaluate(CHANGE),
        "nodes": window.evaluate(COUNT_NODES),
    }
    window.close()
    return found


def take_picture(browser: Any, page: Path, picture: Path) -> None:
    """Write a picture of the top of a page."""
    window = browser.new_page(viewport={"width": PICTURE_WIDTH, "height": PICTURE_HEIGHT})
    window.goto(page.as_uri())
    window.wait_for_selector("html[data-ready]", state="attached")
    window.screenshot(path=picture)
    window.close()


def main() -> None:
    """Measure the pages of the folders given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--picture", type=Path, help="PNG for a picture of the first page")
    given = parser.parse_args()
    folders = given.folders
    print(f"{'folder':<30} {'MB':>6} {'nodes':>6} {'first paint':>12} {'ready':>8} {'change':>8}")
    with opened_browser() as browser, tempfile.TemporaryDirectory() as temporary:
        for number, folder in enumerate(folders):
            page = Path(temporary) / f"{number}.html"
            write_report([read_run(folder)], page)
            if given.picture is not None and number == 0:
                take_picture(browser, page, given.picture)
            loads = [measured(browser, page) for _ in range(LOADS)]
            best = {name: min(load[name] for load in loads) for name in loads[0]}
            print(
                f"{folder.name:<30} {page.stat().st_size / 1e6:6.2f} {best['nodes']:6.0f} "
                f"{best['first paint']:9.0f} ms {best['ready']:5.0f} ms {best['change']:5.0f} ms"
            )


if __name__ == "__main__":
    main()
