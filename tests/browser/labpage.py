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
# "widget model not found": JupyterLab draws stored outputs before it has fetched the kernel's widgets, and then again.
NOT_OURS = ("widget model not found", "favicon", "/api/kernels", "jupyterlab-news", "apputils-extension:notification",
            "ResizeObserver loop")
THEMES = ("JupyterLab Light", "JupyterLab Dark")
READABLE = 3.0     # contrast: WCAG 2's bound for large text and for parts of charts; #808080 on white has 3.95

_CONTRAST = """where => {                        // [text, contrast] of every text of the panel, WCAG 2's formula
    const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
    const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
    const behind = el => {
        for (; el; el = el.parentElement) {
            const c = rgb(getComputedStyle(el).backgroundColor);
            if (c.length === 3 || c[3] > .9) return c;
        }
        return [255, 255, 255];
    };
    const texts = [...document.querySelectorAll(where + ' *')].filter(el =>
        [...el.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && el.getClientRects().length
        && !['OPTION', 'STYLE'].includes(el.tagName) && !el.closest('.bars'));      // a bar's label stands on its colour
    return texts.map(el => {
        const svg = el instanceof SVGElement;
        const color = light(rgb(svg ? getComputedStyle(el).fill : getComputedStyle(el).color));
        const paper = light(behind(svg ? el.closest('.js-plotly-plot') : el));
        return [el.textContent.trim().slice(0, 30), (Math.max(color, paper) + .05) / (Math.min(color, paper) + .05)];
    }); }"""

_OVERFLOW = """where => {                        // what sticks out of the panel, and texts of the chart on top of each other
    const panel = document.querySelector(where), edge = panel.getBoundingClientRect();
    const out = box => box.width && (box.right > edge.right + 1.5 || box.left < edge.left - 1.5);
    const found = [...panel.querySelectorAll('*')]
        .filter(el => !el.closest('svg, table') && !el.matches('.noUi-origin') && out(el.getBoundingClientRect()))
        .map(el => el.className);
    const texts = [...panel.querySelectorAll('.main-svg text')].map(t => [t.textContent, t.getBoundingClientRect()])
        .filter(([text, box]) => text && box.width > 1);
    texts.forEach(([text, a], i) => {
        if (out(a)) found.push('outside: ' + text);
        for (const [other, b] of texts.slice(0, i))
            if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3) found.push(`${text} over ${other}`);
    });
    return found; }"""


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

    def all_run(self, seconds: float) -> None:
        """Run all cells, in a window of the notebook alone, and wait until each has run."""
        self.run_all()
        self.alone()
        self.page.wait_for_function("""() => window.jupyterapp.shell.currentWidget.content.widgets
            .filter(cell => cell.model.type === 'code').every(cell => cell.model.executionCount)""", timeout=1000 * seconds)

    def run(self, code: str) -> None:
        """Run code in the notebook's kernel, as a cell would, and wait for it."""
        self.page.evaluate("""async code => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const reply = await kernel.requestExecute({code}).done;
            if (reply.content.status !== 'ok') throw new Error(reply.content.evalue); }""", code)

    def settle(self) -> None:
        """Wait until what page and kernel have to tell each other is told."""
        for _ in range(2):
            self.run("pass")
            self.page.wait_for_timeout(150)

    def save(self) -> None:
        """Store the outputs: a page that is reloaded finds its panels by them."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")

    def cells(self) -> list[dict]:
        """[{"count", "errors"}] of the code cells."""
        return self.page.evaluate("""() => [...window.jupyterapp.shell.currentWidget.content.widgets]
            .filter(cell => cell.model.type === 'code').map(cell => ({count: cell.model.executionCount,
                errors: cell.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o => o.evalue)}))""")

    def show(self, words: str) -> None:
        """Scroll to the first code cell with these words: JupyterLab attaches only what is near the window."""
        self.page.evaluate("""async words => {
            const content = window.jupyterapp.shell.currentWidget.content;
            const at = content.widgets.findIndex(c => c.model.type === 'code' && c.model.sharedModel.source.includes(words));
            content.activeCellIndex = at; await content.scrollToItem(at, 'start'); }""", words)

    def panel(self):
        """The fit panel, scrolled into view, its chart drawn."""
        self.show("FitExplorer(")
        panel = self.page.locator(".llmlab-fit").first
        panel.wait_for(timeout=60_000)
        panel.locator(".js-plotly-plot .main-svg .bars path").first.wait_for(timeout=60_000)
        return panel

    def bars(self) -> list[list[float]]:
        """The lengths of the bars in the panel's chart, by trace."""
        return self.page.evaluate("""() => document.querySelector('.llmlab-fit .js-plotly-plot').data
            .filter(trace => trace.type === 'bar').map(trace => [...trace.x])""")

    def wait_bars(self, wanted: list[list[float]]) -> None:
        """Wait until the chart shows these lengths, and is drawn so."""
        self.page.wait_for_function("""wanted => {
            const chart = document.querySelector('.llmlab-fit .js-plotly-plot');
            const bars = chart.data.filter(trace => trace.type === 'bar').map(trace => [...trace.x]);
            return bars.length === wanted.length && bars.every((x, i) => x.length === wanted[i].length
                && x.every((v, j) => Math.abs(v - wanted[i][j]) < 1e-6)); }""", arg=wanted, timeout=60_000)

    def wait_words(self, words: str) -> None:
        """Wait until the panel's answer has these words in it."""
        self.page.wait_for_function("""words => document.querySelector('.llmlab-fit [role=status]').innerText
            .includes(words)""", arg=words, timeout=60_000)

    def axis(self) -> list[str]:
        """What is written beside the bars, a text a device."""
        return self.page.evaluate("""() => [...document.querySelectorAll('.llmlab-fit .yaxislayer-above text')]
            .map(text => text.textContent)""")

    def legend(self) -> list[str]:
        """The names in the chart's legend."""
        return self.page.evaluate("() => [...document.querySelectorAll('.llmlab-fit .legendtext')].map(t => t.textContent)")

    def slider(self, description: str) -> int:
        """Which of the panel's visible sliders has this description."""
        return self.page.evaluate("""words => [...document.querySelectorAll('.llmlab-fit .widget-slider')]
            .filter(s => s.getClientRects().length)
            .findIndex(s => s.querySelector('label').textContent === words)""", description)

    def handle(self, where: str, label: str):
        """The handle of the slider with this label."""
        named = self.page.locator(f"label:text-is('{label}')")
        return self.page.locator(f"{where} .widget-slider", has=named).locator("[role=slider]")

    def contrast(self, where: str) -> list[list]:
        """[text, contrast] of every text in an element."""
        return self.page.evaluate(_CONTRAST, where)

    def overflow(self, where: str) -> list[str]:
        """What sticks out of an element, and texts of its chart on top of each other. A wide table scrolls."""
        return self.page.evaluate(_OVERFLOW, where)

    def readable(self, where: str, picture: Path, texts: int, across: int = 1) -> None:
        """In both themes: more than so many texts, each with contrast enough, nothing that sticks out, and a chart as wide as
        its panel, or so many `across` as wide. A picture of each is kept, "<picture>-dark.png"."""
        panel = self.page.locator(where).first
        for theme in THEMES:
            self.theme(theme)
            self.page.wait_for_timeout(600)       # the charts follow their new width in the next frames
            panel.screenshot(path=picture.with_name(f"{picture.name}-{theme.split()[1].lower()}.png"))
            seen = self.contrast(where)
            assert len(seen) > texts and [pair for pair in seen if pair[1] < READABLE] == [], theme
            assert not (found := self.overflow(where)), (theme, found)
            chart, whole = (self.page.locator(f"{where}{part}").first.bounding_box() for part in (" .main-svg", ""))
            assert chart["width"] > 0.97 * whole["width"] / across
        self.theme(THEMES[0])

    def latencies(self, presses: int, control=None, keys=("ArrowRight", "ArrowLeft"), where=".llmlab-fit") -> list[float]:
        """Milliseconds from a key on a control (none: the context slider) until the chart is drawn anew, in the page's own
        time. The two keys take turns, so that what one changes the other brings back."""
        control = control or self.panel().locator(".widget-slider [role=slider]:visible").nth(self.slider("context"))
        control.focus()
        self.page.evaluate("""where => {
            const chart = document.querySelector(where + ' .js-plotly-plot');
            window.pressed = null; window.took = [];
            if (chart.timed) return;
            chart.timed = true;
            document.addEventListener('keydown', () => { window.pressed = performance.now(); }, true);
            chart.on('plotly_afterplot', () => {
                if (window.pressed !== null) window.took.push(performance.now() - window.pressed);
                window.pressed = null; }); }""", where)
        for press in range(presses):
            self.page.keyboard.press(keys[press % 2])
            self.page.wait_for_function("count => window.took.length === count", arg=press + 1, timeout=60_000)
            self.page.wait_for_timeout(60)
        return self.page.evaluate("() => window.took")
