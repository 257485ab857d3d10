"""A JupyterLab of one's own on a free port, and its pages in Debian's Chromium; nothing of the user's is touched."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
TOKEN = "llmlab-browser-test"
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
NOT_OURS = ("favicon", "/api/kernels", "jupyterlab-news", "apputils-extension:notification", "ResizeObserver loop")


@contextlib.contextmanager
def lab(work: Path):
    """The address of a JupyterLab over a copy of notebooks/ in `work`, with private settings; stopped at the end."""
    shutil.copytree(TOP / "notebooks", work / "notebooks", ignore=shutil.ignore_patterns(".*", "conftest.py"))
    own = {name: str(work / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTER_DATA_DIR",
                                                       "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    settings = Path(own["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={work / 'notebooks'}", f"--IdentityProvider.token={TOKEN}",
               "--expose-app-in-browser"]
    path = os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH")]))
    with open(work / "lab.log", "w+") as log:
        server = subprocess.Popen(command, cwd=work, env=os.environ | own | {"PYTHONPATH": path}, stdout=log, stderr=log,
                                  stdin=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, server, work / "lab.log")
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(address: str, server, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(300):
        assert server.poll() is None, f"JupyterLab ended: {log.read_text()[-2000:]}"
        try:
            opener.open(f"{address}/api/status?token={TOKEN}", timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer: {log.read_text()[-2000:]}")


def chromium(playwright):
    """Debian's Chromium, or the one CHROMIUM names."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    return playwright.chromium.launch(executable_path=found, args=FLAGS, headless=True)


class Notebook:
    """A page on one notebook."""

    def __init__(self, browser, address: str, name: str, width: int = 1400, height: int = 1000):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.address, self.name, self.errors = address, name, []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(f"page error: {error}"))

    def _heard(self, message) -> None:
        where = (message.location or {}).get("url", "")
        if message.type == "error" and not any(word in message.text + where for word in NOT_OURS):
            self.errors.append(f"{message.text[:300]} ({where[:120]})")

    def open(self, reset: bool = True) -> "Notebook":
        self.page.goto(f"{self.address}/lab/tree/{self.name}?token={TOKEN}{'&reset' * reset}")
        return self.ready()

    def reload(self) -> "Notebook":
        self.page.reload()
        return self.ready()

    def ready(self) -> "Notebook":
        """Wait until the notebook is there and its kernel answers; the "idle" sign is a race."""
        self.page.wait_for_selector(".jp-NotebookPanel:visible .jp-Notebook", timeout=60_000)
        self.page.evaluate("""async () => {
            const app = window.jupyterapp; await app.restored;
            const panel = app.shell.currentWidget; await panel.context.ready;
            const session = panel.sessionContext; await session.ready; await session.session.kernel.info; }""")
        return self

    def theme(self, name: str) -> None:
        self.page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
        self.page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg=str("Light" in name).lower())

    def alone(self) -> None:
        """Hide the file browser: the notebook gets the window's width."""
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")

    def run_all(self) -> None:
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def cells(self) -> list[dict]:
        """[{"count", "errors"}] of the code cells."""
        return self.page.evaluate("""() => [...window.jupyterapp.shell.currentWidget.content.widgets]
            .filter(cell => cell.model.type === 'code').map(cell => ({count: cell.model.executionCount,
                errors: cell.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)}))""")

    def panel(self):
        """The fit panel, scrolled into view, its chart drawn."""
        panel = self.page.locator(".llmlab-fit").first
        panel.wait_for(timeout=60_000)
        panel.scroll_into_view_if_needed()
        panel.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
        return panel

    def bars(self) -> list[list[float]]:
        """The lengths of the bars in the panel's chart, by trace."""
        return self.page.evaluate("""() => document.querySelector('.llmlab-fit .js-plotly-plot').data
            .filter(trace => trace.type === 'bar').map(trace => [...trace.x])""")
