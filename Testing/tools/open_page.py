"""Opens pages in QtWebEngine off-screen, clicks every column head twice, and prints what happened as JSON.

    python Testing/tools/open_page.py [--png FILE] PAGE.html ...

One line per page: console messages, number of tables, and for every head the values of its column after the
first and the second click. With --png the first page is drawn into a picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PySide6.QtCore import QEventLoop, Qt, QTimer, QUrl
from PySide6.QtTest import QTest
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

_CLICK = """
(() => {
  const out = [];
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const head of Array.from(table.tHead.rows[0].cells)) {
      const column = () => Array.from(table.tBodies[0].rows, (row) => {
        const cell = row.cells[head.cellIndex];
        return "value" in cell.dataset ? cell.dataset.value : cell.textContent.trim();
      });
      const button = head.querySelector("button"), aria = [];
      button.click(); const up = column(); aria.push(head.getAttribute("aria-sort"));
      button.click(); const down = column(); aria.push(head.getAttribute("aria-sort"));
      out.push({ table: table.id, head: head.textContent, up, down, aria });
    }
  }
  return JSON.stringify(out);
})()
"""
_FOCUS = 'document.querySelector("table.sortable th:last-child button").focus(); true'
_KEYED = 'document.querySelector("table.sortable th:last-child").getAttribute("aria-sort")'


class Page(QWebEnginePage):
    """A page that keeps what it says to the console."""

    def __init__(self, parent: object) -> None:
        super().__init__(parent)
        self.said: list[str] = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        """Keeps a message; the browser calls it."""
        self.said.append(f"{level.name}: {message} ({source}:{line})")


def asked(page: QWebEnginePage, script: str) -> object:
    """What a script answers."""
    loop, answer = QEventLoop(), []
    page.runJavaScript(script, lambda value: (answer.append(value), loop.quit()))
    QTimer.singleShot(60000, loop.quit)
    loop.exec()
    return answer[0]


def opened(view: QWebEngineView, path: Path) -> None:
    """Waits until a page is there."""
    loop, told = QEventLoop(), []
    view.loadFinished.connect(lambda good: (told.append(good), loop.quit()))
    view.load(QUrl.fromLocalFile(str(path.resolve())))
    QTimer.singleShot(120000, loop.quit)
    loop.exec()
    assert told == [True], f"{path} did not open"


def wait(milliseconds: int) -> None:
    """Lets the browser work."""
    loop = QEventLoop()
    QTimer.singleShot(milliseconds, loop.quit)
    loop.exec()


def picture(view: QWebEngineView, file: Path) -> None:
    """Draws the whole page into a PNG."""
    height = int(asked(view.page(), "document.documentElement.scrollHeight"))
    view.resize(1240, min(height, 6000))
    wait(3000)
    view.grab().save(str(file))


def main(arguments: list[str]) -> None:
    """Opens the pages of a command line."""
    png = Path(arguments[arguments.index("--png") + 1]) if "--png" in arguments else None
    pages = [Path(a) for a in arguments if a.endswith(".html")]
    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    page = Page(view)
    view.setPage(page)
    view.resize(1240, 900)
    view.show()
    for path in pages:
        page.said.clear()
        opened(view, path)
        if png is not None:
            picture(view, png)
            png = None
        found = json.loads(str(asked(page, _CLICK)))
        asked(page, _FOCUS)
        QTest.keyClick(view.focusProxy(), Qt.Key.Key_Return)
        for _ in range(50):
            wait(100)
            keyed = asked(page, _KEYED)
            if keyed == "ascending":
                break
        told = {
            "page": path.name,
            "console": page.said,
            "tables": len({item["table"] for item in found}),
            "sorted": found,
            "by keyboard": keyed,
        }
        sys.stdout.write(json.dumps(told) + "\n")
    view.close()
    view.setPage(QWebEnginePage(view))
    application.processEvents()


if __name__ == "__main__":
    main(sys.argv[1:])
